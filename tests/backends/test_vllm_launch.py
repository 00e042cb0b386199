from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from mgpu.backends.backend import Serving
from mgpu.backends.vllm import BACKEND, STOP_GRACE_S, build_launch, read_engine_arguments, temporary_folder
from mgpu.errors import UsageError
from mgpu.planning.vllm_memory import VllmWants
from mgpu.units import GIB

from .test_vllm_log import candidate


def serving(**changes: object) -> Serving:
    values: dict[str, object] = {
        "program": Path("/opt/vllm/bin/vllm"),
        "model": "/models/llama",
        "name": "llama",
        "host": "127.0.0.1",
        "port": 8080,
        "folder": Path("/state/llama"),
    }
    return Serving(**(values | changes))  # type: ignore[arg-type]


def value(argv: tuple[str, ...], flag: str) -> str | None:
    return argv[argv.index(flag) + 1] if flag in argv else None


def test_the_whole_command() -> None:
    launch = build_launch(candidate(tensor=2), serving(arguments=("--enforce-eager",), api_key="secret"))
    assert launch.argv == (
        *("/opt/vllm/bin/vllm", "serve", "/models/llama", "--served-model-name", "llama"),
        *("--host", "127.0.0.1", "--port", "8080", "--tensor-parallel-size", "2"),
        *("--max-model-len", "4096", "--max-num-seqs", "8", "--gpu-memory-utilization", "0.9"),
        *("--shutdown-timeout", "3", "--enforce-eager"),
    )
    assert launch.env == {
        "TMPDIR": "/state/llama/tmp",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "GPU-2,GPU-1",
        "VLLM_API_KEY": "secret",
    }
    assert launch.secrets == {"VLLM_API_KEY"}
    assert "secret" not in " ".join(launch.argv)


@pytest.mark.parametrize(
    ("shape", "flags", "env"),
    [
        pytest.param(
            {},
            {"--tensor-parallel-size": "1", "--pipeline-parallel-size": None, "--data-parallel-size": None},
            {},
            id="one",
        ),
        pytest.param(
            {"pipeline": 3, "partition": (29, 34, 17)},
            {"--pipeline-parallel-size": "3"},
            {"VLLM_PP_LAYER_PARTITION": "29,34,17", "CUDA_VISIBLE_DEVICES": "GPU-3,GPU-2,GPU-1"},
            id="a pipeline",
        ),
        pytest.param(
            {"tensor": 2, "pipeline": 2, "replicas": 2, "partition": (20, 12)},
            {"--tensor-parallel-size": "2", "--pipeline-parallel-size": "2", "--data-parallel-size": "2"},
            {"VLLM_PP_LAYER_PARTITION": "20,12"},
            id="all at once",
        ),
        pytest.param(
            {"replicas": 2},
            {"--data-parallel-size": "2", "--max-num-seqs": "4"},
            {},
            id="each replica counts its own users: half of 8",
        ),
        pytest.param({"replicas": 3}, {"--max-num-seqs": "3"}, {}, id="8 users do not divide by 3 replicas"),
        pytest.param({"kv_type": "fp8"}, {"--kv-cache-dtype": "fp8"}, {}, id="a smaller KV cache"),
        pytest.param({"kv_type": "f16"}, {"--kv-cache-dtype": None}, {}, id="a plain KV cache"),
        pytest.param(
            {"wants": VllmWants(gpu_memory_utilization=0.83)},
            {"--gpu-memory-utilization": "0.83"},
            {},
            id="less memory",
        ),
        pytest.param({"tensor": 2, "uuids": False}, {}, {"CUDA_VISIBLE_DEVICES": "2,1"}, id="cards without a UUID"),
        pytest.param(
            {"tensor": 2, "vendor": "ROCm"}, {}, {"HIP_VISIBLE_DEVICES": "2,1", "CUDA_VISIBLE_DEVICES": None}, id="AMD"
        ),
        pytest.param(
            {"cards": False, "kv_bytes": 5 * GIB + 1},
            {"--gpu-memory-utilization": None},
            {"VLLM_CPU_KVCACHE_SPACE": "6", "VLLM_CPU_OMP_THREADS_BIND": None, "CUDA_VISIBLE_DEVICES": None},
            id="the CPU",
        ),
        pytest.param(
            {"cards": False, "kv_bytes": 5 * GIB, "tensor": 2},
            {"--tensor-parallel-size": "2"},
            {"VLLM_CPU_KVCACHE_SPACE": "3", "VLLM_CPU_OMP_THREADS_BIND": "0,1|2,3"},
            id="the CPU in two parts",
        ),
        pytest.param(
            {"cards": False, "tensor": 8},
            {},
            {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
            id="more workers than cores",
        ),
    ],
)
def test_the_shape_becomes_flags_and_variables(
    shape: dict[str, object],
    flags: dict[str, str | None],
    env: dict[str, str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 1, 0, 2})
    launch = build_launch(candidate(**shape), serving())  # type: ignore[arg-type]
    assert {flag: value(launch.argv, flag) for flag in flags} == flags
    assert {name: launch.env.get(name) for name in env} == env
    assert not launch.secrets


@pytest.mark.parametrize(
    ("vendor", "variable"),
    [pytest.param("ROCm", "HIP_VISIBLE_DEVICES", id="AMD"), pytest.param("CUDA", "CUDA_VISIBLE_DEVICES", id="NVIDIA")],
)
def test_a_driver_counts_its_own_cards_only(vendor: str, variable: str) -> None:
    planned = candidate(tensor=2, vendor=vendor, uuids=False)
    behind = tuple(replace(device, gpu=device.gpu + 3) for device in planned.devices)
    assert build_launch(replace(planned, devices=behind), serving()).env[variable] == "2,1"


@pytest.mark.parametrize("key", [" blank", "line\nbreak", "tab\t"])
def test_a_key_that_no_client_could_send(key: str) -> None:
    with pytest.raises(UsageError):
        build_launch(candidate(), serving(api_key=key))


def test_sockets_fit_into_the_temporary_folder() -> None:
    short, long = Path("/state/llama"), Path("/home") / ("x" * 40) / ".local/state/mgpu" / ("n" * 30)
    assert temporary_folder(short) == short / "tmp"
    elsewhere = temporary_folder(long)
    assert elsewhere == temporary_folder(long) != temporary_folder(long / "other")
    for folder in (short, long):
        socket = temporary_folder(folder) / "12345678-1234-1234-1234-123456789012"
        assert len(os.fsencode(socket)) <= 107
    assert build_launch(candidate(), serving(folder=long)).env["TMPDIR"] == str(elsewhere)


@pytest.mark.parametrize(
    ("arguments", "rest", "changes"),
    [
        pytest.param([], (), {}, id="none"),
        pytest.param(["--dtype", "half", "--seed=1"], ("--dtype", "half", "--seed=1"), {}, id="what does not matter"),
        pytest.param(["--enforce-eager"], ("--enforce-eager",), {"enforce_eager": True}, id="no graphs"),
        pytest.param(["--gpu-memory-utilization", "0.8"], (), {"gpu_memory_utilization": 0.8}, id="a share"),
        pytest.param(["--gpu_memory_utilization=0.95"], (), {"gpu_memory_utilization": 0.95}, id="with underscores"),
        pytest.param(["--device-memory-utilization=1"], (), {"gpu_memory_utilization": 1.0}, id="under its new name"),
        pytest.param(["--kv-cache-dtype-skip-layers", "1"], ("--kv-cache-dtype-skip-layers", "1"), {}, id="longer"),
    ],
)
def test_arguments_after_the_dashes(arguments: list[str], rest: tuple[str, ...], changes: dict[str, object]) -> None:
    assert read_engine_arguments(arguments, VllmWants()) == (rest, VllmWants(**changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tensor-parallel-size", "2"], "use --tensor-parallel"),
        (["-tp=2"], "use --tensor-parallel"),
        (["--tensor_parallel_size=2"], "use --tensor-parallel"),
        (["--tensor-par", "2"], "use --tensor-parallel"),
        (["--max-model-len", "1"], "use --ctx"),
        (["--port=1"], "use --port"),
        (["--api-key", "x"], "VLLM_API_KEY"),
        (["--kv-cache-memory-bytes", "1"], "--gpu-memory-utilization"),
        (["--uds", "/x"], "proxy"),
        (["--ssl-keyfile=x"], "proxy"),
        (["--gpu-memory-utilization", "2"], None),
        (["--gpu-memory-utilization"], None),
        (["--gpu-memory-utilization", "nan"], None),
    ],
)
def test_what_would_contradict_the_plan_or_hide_the_engine(arguments: list[str], message: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        read_engine_arguments(arguments, VllmWants())
    assert message is None or message in (caught.value.hint or "")


def test_the_backend() -> None:
    assert (BACKEND.name, BACKEND.ready_path, BACKEND.stop_grace_s) == ("vllm", "/health", STOP_GRACE_S)
    assert BACKEND.launch(candidate(), serving()) == build_launch(candidate(), serving())
    assert BACKEND.memory([], candidate()) == {}
    assert BACKEND.diagnose([], 1).code == "exited"
    assert BACKEND.phase("Starting vLLM server on http://127.0.0.1:1") == "listening"
