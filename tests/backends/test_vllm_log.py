from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.backends.backend import DeviceMemory
from mgpu.backends.vllm_log import PHASES, Entry, device_memory, kv_tokens, parse_line, phase, reached
from mgpu.planning.candidates import Candidate, PlannedDevice, PlannedHost
from mgpu.planning.speed import Speed
from mgpu.planning.vllm_memory import VllmWants
from mgpu.units import GIB

from . import recorded_vllm as recorded


def candidate(
    *,
    tensor: int = 1,
    pipeline: int = 1,
    replicas: int = 1,
    partition: tuple[int, ...] = (),
    uuids: bool = True,
    vendor: str = "CUDA",
    kv_type: str = "f16",
    cards: bool = True,
    kv_bytes: int = 0,
    wants: VllmWants | None = None,
) -> Candidate:
    """A candidate of this shape, on cards 4, 3, 2, .. (an order that is not the driver's)."""
    count = tensor * pipeline * replicas if cards else 0
    devices = tuple(
        PlannedDevice(
            gpu=count - rank,
            uuid=f"GPU-{count - rank}" if uuids else None,
            name="card",
            device=f"{vendor}{count - rank}",
            first_layer=0,
            layers=partition[rank // tensor % pipeline] if partition else 32,
            head=True,
            weights_bytes=1,
            kv_bytes=1,
            compute_bytes=1,
            runtime_bytes=1,
            card_bytes=24 * GIB,
            free_bytes=24 * GIB,
            basis="made up",
        )
        for rank in range(count)
    )
    return Candidate(
        backend="vllm",
        split_mode="tensor" if tensor > 1 else "none",
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        replicas=replicas,
        quant="bf16",
        kv_type=kv_type,
        ctx_tokens=4096,
        parallel=8,
        verdict="fits",
        reasons=(),
        devices=devices,
        host=PlannedHost(layers=0, weights_bytes=0, kv_bytes=kv_bytes, compute_bytes=0, free_bytes=None),
        short_bytes=0,
        max_ctx_tokens=None,
        speed=Speed(),
        wants=wants or VllmWants(),
    )


@pytest.mark.parametrize(
    ("line", "entry"),
    [
        pytest.param(
            "(Worker_PP0_TP1 pid=12) ERROR 11-23 04:41:25 [multiproc_executor.py:315] ValueError: x",
            Entry(process="Worker_PP0_TP1", level="ERROR", text="ValueError: x"),
            id="a worker's log line",
        ),
        pytest.param(
            "(APIServer pid=1) ValueError: x",
            Entry(process="APIServer", level=None, text="ValueError: x"),
            id="a traceback with the process",
        ),
        pytest.param(
            "INFO 01-01 00:00:00 [utils.py:1] x", Entry(process=None, level="INFO", text="x"), id="one process alone"
        ),
        pytest.param(
            "INFO:     Application startup complete.",
            Entry(process=None, level="INFO", text="Application startup complete."),
            id="the web server",
        ),
        pytest.param("  raise x", Entry(process=None, level=None, text="  raise x"), id="anything else"),
        pytest.param("", Entry(process=None, level=None, text=""), id="nothing"),
    ],
)
def test_a_line_is_taken_apart(line: str, entry: Entry) -> None:
    assert parse_line(line) == entry


@pytest.mark.parametrize(
    ("log", "phases"),
    [
        pytest.param(
            "tp2",
            [
                "starting",
                "starting workers",
                "connecting cards",
                "loading weights",
                "loading weights, 0 %",
                "loading weights, 100 %",
                "allocating KV cache",
                "listening",
            ],
            id="two workers",
        ),
        pytest.param(
            "tp1",
            [
                "starting",
                "starting workers",
                "connecting cards",
                "loading weights",
                "loading weights, 0 %",
                "loading weights, 100 %",
                "compiling",
                "allocating KV cache",
                "listening",
            ],
            id="one that compiles",
        ),
        pytest.param("fail_port", ["starting"], id="one that fails before anything"),
        pytest.param("fail_flag", [], id="one that never starts"),
    ],
)
def test_a_load_goes_through_its_phases(log: str, phases: list[str]) -> None:
    named = [name for line in recorded.lines(log) if (name := phase(line))]
    seen = [name for i, name in enumerate(named) if i == 0 or named[i - 1] != name]
    assert seen == phases
    assert {name.partition(",")[0] for name in seen} <= set(PHASES)
    assert reached(recorded.lines(log)) == (phases[-1] if phases else None)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  10%|", "capturing CUDA graphs"),
        ("(EngineCore pid=1) INFO 01-01 00:00:00 [backends.py:1] Dynamo bytecode transform time: 4.20 s", "compiling"),
        ("Loading safetensors checkpoint shards:  50% Completed | 2/4 [00:00<00:00]", "loading weights, 50 %"),
        ("INFO:     127.0.0.1:1 - GET /health", None),
    ],
)
def test_lines_that_only_cards_print(line: str, name: str | None) -> None:
    assert phase(line) == name


def logged(process: str, weights: str, cache: str) -> list[str]:
    prefix = f"({process} pid=1) INFO 01-01 00:00:00"
    return [
        f"{prefix} [gpu_model_runner.py:5150] Model loading took {weights} GiB memory and 12.345678 seconds",
        f"{prefix} [gpu_worker.py:760] Available KV cache memory: {cache} GiB",
    ]


def memory(weights_gib: float, kv_gib: float) -> DeviceMemory:
    return DeviceMemory(weights_bytes=round(weights_gib * GIB), kv_bytes=round(kv_gib * GIB))


@pytest.mark.parametrize(
    ("shape", "lines", "expected"),
    [
        pytest.param({}, logged("EngineCore", "15.06", "5.27"), {0: memory(15.06, 5.27)}, id="one card"),
        pytest.param(
            {"tensor": 2},
            logged("Worker_TP0", "7.58", "12.70"),
            {0: memory(7.58, 12.7), 1: memory(7.58, 12.7)},
            id="the first of two speaks for both",
        ),
        pytest.param(
            {"tensor": 2},
            [*logged("Worker_TP0", "7.58", "12.70"), *logged("Worker_TP1", "7.60", "12.60")],
            {0: memory(7.58, 12.7), 1: memory(7.6, 12.6)},
            id="each for itself, as earlier versions do",
        ),
        pytest.param(
            {"tensor": 2, "pipeline": 2},
            logged("Worker_PP1_TP0", "4.04", "16.20"),
            {2: memory(4.04, 16.2), 3: memory(4.04, 16.2)},
            id="nothing is known of another stage",
        ),
        pytest.param(
            {"tensor": 2, "replicas": 2},
            logged("Worker_DP0_TP0", "7.58", "12.70"),
            {rank: memory(7.58, 12.7) for rank in range(4)},
            id="replicas hold the same",
        ),
        pytest.param({}, ["Available KV cache memory: lots of GiB"], {}, id="a line that says nothing"),
        pytest.param({}, recorded.lines("tp1"), {}, id="the CPU build says nothing"),
    ],
)
def test_what_was_allocated(shape: dict[str, int], lines: list[str], expected: dict[int, DeviceMemory]) -> None:
    assert device_memory(lines, candidate(**shape)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("log", "tokens"), [("tp1", 524_288), ("tp2", 1_048_576), ("dp2", 524_288), ("fail_kv", None)])
def test_the_size_of_the_cache_in_tokens(log: str, tokens: int | None) -> None:
    assert kv_tokens(recorded.lines(log)) == tokens


@given(st.lists(st.text()))
def test_any_text_is_read(lines: list[str]) -> None:
    assert device_memory(lines, candidate(tensor=2)) == {}
    assert reached(lines) is None
    for line in lines:
        assert len(parse_line(line).text) <= len(line)
