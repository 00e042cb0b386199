"""What Ollama cannot do, or is told wrongly: a sentence, a next step, the right exit code, and nothing left behind."""

from __future__ import annotations

import shlex
import socket
import struct
from pathlib import Path

import pytest

from tests.fakes.shapes import SHAPES
from tests.fakes.sparse_gguf import make_sparse_gguf

from .program import Mgpu
from .test_bad_input import assert_explained
from .two_cards import settings_of, store, with_two_cards


@pytest.fixture
def on_two(mgpu: Mgpu, nvml: dict[str, Path], tmp_path: Path) -> Mgpu:
    return with_two_cards(mgpu, nvml, tmp_path)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    split_in_two(folder)
    (folder / "text.gguf").write_text("I am no model")
    (folder / "unrunnable").write_text("x")
    return folder


def split_in_two(folder: Path) -> None:
    """Write a small model as two parts, of which the first has all the tensors."""
    shape = SHAPES["smollm2-135m"]
    whole = make_sparse_gguf(folder / "whole.gguf", shape, "Q4_1", layers=2, vocabulary=1000).read_bytes()
    tensors, entries = struct.unpack("<QQ", whole[8:24])
    for part in range(2):
        values = {b"split.no": part, b"split.count": 2, b"split.tensors.count": tensors}
        marks = [struct.pack("<Q", len(name)) + name + struct.pack("<II", 4, value) for name, value in values.items()]
        counts = struct.pack("<QQ", 0, 3) if part else struct.pack("<QQ", tensors, entries + 3)
        rest = b"" if part else whole[24:] + bytes(64)  # the data begin a little later
        path = folder / f"parts-{part + 1:05}-of-00002.gguf"
        path.write_bytes(whole[:8] + counts + b"".join(marks) + rest)


@pytest.mark.parametrize(
    ("words", "exit_code", "message", "hint"),
    [
        pytest.param("{files}/parts-00001-of-00002.gguf", 3, "2 parts", "--backend llama.cpp", id="a split model"),
        pytest.param("{files}/text.gguf", 3, "no GGUF file", "another file", id="a text"),
        pytest.param("{tiny} --api-key-file {files}/text.gguf", 2, "Ollama knows no API key", "proxy", id="a key"),
        pytest.param("{tiny} --kv-type fp8", 2, "fp8 is vLLM's: Ollama has no", "q8_0", id="another engine's KV type"),
        pytest.param("{tiny} --ubatch 256", 2, "Ollama knows no --ubatch", "leave", id="a micro-batch"),
        pytest.param("{tiny} --tensor-parallel 2", 2, "is vLLM's", "--gpus N", id="tensor parallel"),
        pytest.param("{tiny} --ctx 1m", 1, "131072 tokens at most", "", id="more context than it was trained on"),
        pytest.param("{tiny} --gpus 3", 3, "this machine has 2", "gpu0", id="more cards than there are"),
        pytest.param("{tiny} --tensor-split 1,2,3", 2, "3 proportions for 2 cards", "one for", id="a share too many"),
        pytest.param("{tiny} --host 192.0.2.1", 3, "192.0.2.1 cannot be used", "127.0.0.1", id="another's address"),
        pytest.param("{tiny} -- --num-gpu 1", 2, "takes no options but variables", "OLLAMA_MAX_QUEUE", id="an option"),
        pytest.param("{tiny} -- PATH=/x", 2, "means nothing to Ollama", "OLLAMA_MAX_QUEUE", id="another variable"),
        pytest.param("{tiny} -- OLLAMA_HOST=x", 2, "OLLAMA_HOST after -- would contradict", "--port", id="an address"),
        pytest.param(
            "{tiny} -- LLAMA_ARG_N_GPU_LAYERS=1", 2, "would contradict the plan", "use --offload", id="fewer layers"
        ),
    ],
)
def test_what_ollama_cannot_do_is_explained(
    on_two: Mgpu, tiny: Path, files: Path, words: str, exit_code: int, message: str, hint: str
) -> None:
    model, *more = shlex.split(words.format(tiny=tiny, files=files))
    ended = on_two("run", model, "--backend", "ollama", *more)
    assert_explained(ended, exit_code, message, hint)
    on_two.assert_nothing_left()


@pytest.mark.parametrize(
    ("variables", "exit_code", "message", "hint"),
    [
        pytest.param({"MGPU_OLLAMA": "{files}/none"}, 3, "not a program", "unset MGPU_OLLAMA", id="nothing"),
        pytest.param({"MGPU_OLLAMA": "{files}/unrunnable"}, 3, "not a program", "unset MGPU_OLLAMA", id="a text"),
        pytest.param(
            {"MGPU_OLLAMA": None, "PATH": "/x"}, 3, "Ollama is not installed", "ollama.com/download", id="not installed"
        ),
        pytest.param({"MGPU_OLLAMA": "/bin/false"}, 4, "ended with status 1", "", id="another program"),
        pytest.param({"MGPU_API_KEY": "secret"}, 2, "Ollama knows no API key", "unset MGPU_API_KEY", id="a key"),
    ],
)
def test_a_wrong_environment_is_explained(
    on_two: Mgpu,
    tiny: Path,
    files: Path,
    variables: dict[str, str | None],
    exit_code: int,
    message: str,
    hint: str,
) -> None:
    given = {name: value and value.format(files=files) for name, value in variables.items()}
    ended = on_two("run", tiny, "--backend", "ollama", **given)
    assert_explained(ended, exit_code, message, hint)
    on_two.assert_nothing_left()


def test_no_home_is_no_hindrance(on_two: Mgpu, tiny: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    running = on_two.start("run", tiny, "--backend", "ollama", HOME=None, OLLAMA_MODELS=str(models))
    running.url()
    assert settings_of(running.engine_pid())["HOME"].startswith("/")
    assert running.end(2).exit_code == 130
    assert (models / "blobs").is_dir()


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_a_proxy_is_for_others(on_two: Mgpu, tiny: Path, variable: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        ended = on_two("run", tiny, "--backend", "ollama", "--ask", "Hello", **{variable: address, "NO_PROXY": None})
        assert ended.exit_code == 0
        proxy.settimeout(0)
        with pytest.raises(BlockingIOError):
            proxy.accept()
    assert store(on_two).is_dir()
