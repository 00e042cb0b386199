"""The same line for every engine: `mgpu run trio --gpus 2 --backend …`, with real engines where there are some.

The machine has two NVIDIA cards (the fake driver library tells so) for vLLM and Ollama, and two Vulkan devices (Mesa's
software renderer) for llama.cpp: each engine gets two of those that it can use.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mgpu.profile import shipped_profile_folder, user_profile_folder
from tests.fakes import ollama_server, vllm_server
from tests.fakes.devices import lavapipe_environment, real_llama_server, require_or_skip
from tests.fakes.hub_server import FakeHub, running
from tests.fakes.ollama_running import REAL_OLLAMA
from tests.fakes.tiny_llama import make_tiny_llama
from tests.fakes.vllm_environment import real_vllm

from .program import Mgpu

LINE = ("run", "trio", "--gpus", "2", "--ctx", "1k", "--ask", "Say hello.", "--max-tokens", "12")
RIG = Path(__file__).parents[1] / "machines" / "rigs" / "2x4090-x670e.txt"
UUIDS = re.findall(r"(?m)^gpu\d+\.uuid = (.*)$", RIG.read_text())
CARDS = ";".join(f"CUDA{index}: NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free)" for index in range(2))
# A real vLLM on a busy machine.
START_LIMIT_S = 300
REPOSITORY = "trio/tiny-llama"


def llama_cpp(_: Path) -> dict[str, str]:
    vulkan = lavapipe_environment()
    require_or_skip(vulkan is not None, "Mesa's software Vulkan is not installed")
    return {"MGPU_LLAMA_SERVER": str(real_llama_server()), **(vulkan or {})}


def vllm(folder: Path) -> dict[str, str]:
    return {"MGPU_VLLM": str(vllm_server.install(folder)), "FAKE_CARD_BYTES": "25757220864,25757220864"}


def vllm_for_real(folder: Path) -> dict[str, str]:
    """Its CPU build, which takes any number of workers for cards; they have to be told what a card would tell."""
    program = folder / "vllm"
    settings = "VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND='0|1'"
    program.write_text(f'#!/bin/sh\nexec env {settings} {real_vllm()} "$@" --enforce-eager\n')
    program.chmod(0o755)
    return {"MGPU_VLLM": str(program)}


def ollama(folder: Path) -> dict[str, str]:
    return {"MGPU_OLLAMA": str(ollama_server.install(folder)), "FAKE_DEVICES": CARDS, "FAKE_UUIDS": ",".join(UUIDS)}


def ollama_for_real(folder: Path) -> dict[str, str]:
    """On the Vulkan devices: it would look for a CUDA on cards that are not there."""
    return {"MGPU_OLLAMA": os.environ[REAL_OLLAMA], "LD_LIBRARY_PATH": "", **llama_cpp(folder)}


@pytest.fixture
def trio(tmp_path: Path, nvml: dict[str, Path], smollm2: Path) -> Iterator[Mgpu]:
    """mgpu with a profile that has a GGUF on disk, and safetensors on a hub."""
    text = (shipped_profile_folder() / "smollm2-135m.yaml").read_text()
    text = text.replace("name: smollm2-135m", "name: trio").replace("HuggingFaceTB/SmolLM2-135M-Instruct", REPOSITORY)
    text = text.replace("heads: 9", "heads: 8").replace("kv_heads: 3", "kv_heads: 4")  # as the safetensors have them
    user_profile_folder().mkdir(parents=True)
    (user_profile_folder() / "trio.yaml").write_text(text)
    tiny = make_tiny_llama(tmp_path / "tiny")
    hub = FakeHub({REPOSITORY: {path.name: path.read_bytes() for path in tiny.iterdir()}})
    with running(hub):
        environment = {
            "LD_LIBRARY_PATH": str(nvml["new"]),
            "FAKE_NVML": str(RIG),
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "hub"),
            "OLLAMA_MODELS": str(tmp_path / "ollama-models"),
            "PATH": os.defpath,
        }
        program = Mgpu(tmp_path, environment)
        yield program
        program.end_all()


@pytest.mark.parametrize(
    ("backend", "installed", "shape"),
    [
        pytest.param("llama.cpp", llama_cpp, "layer split", id="llama.cpp", marks=pytest.mark.real_engine),
        pytest.param("vllm", vllm, "tensor parallel 2", id="vllm, the fake"),
        pytest.param("vllm", vllm_for_real, "tensor parallel 2", id="vllm", marks=pytest.mark.real_vllm),
        pytest.param("ollama", ollama, "layer split", id="ollama, the fake"),
        *(
            [pytest.param("ollama", ollama_for_real, "layer split", id="ollama", marks=pytest.mark.real_ollama)]
            if REAL_OLLAMA in os.environ
            else []
        ),
    ],
)
def test_the_same_line_means_the_same(
    backend: str, installed: Callable[[Path], dict[str, str]], shape: str, trio: Mgpu, tmp_path: Path
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    started = trio.start(*LINE, "--backend", backend, **installed(programs))
    started.process.wait(START_LIMIT_S)
    ended = started.end()
    assert ended.exit_code == 0, ended
    assert ended.out.strip(), "an answer"
    assert re.search(rf"(?m)^plan .* · {shape} over gpu\d, gpu\d · ", ended.err), ended.err
    assert re.search(rf"(?m)^ready: trio on http://127\.0\.0\.1:\d+/v1  \({re.escape(backend)}, 2 GPUs, pid", ended.err)
    assert re.search(r"(?m)^answer +\d+ tokens at [\d.]+ tokens/s", ended.err), ended.err
    assert re.search(r"(?m)^stop +trio … stopped in", ended.err)
    trio.assert_nothing_left()
