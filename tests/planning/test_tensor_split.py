"""llama.cpp's tensor split against what llama-server allocated on each device.

`tests/data/llama_cpp_memory_tensor.csv` holds the allocations of build 10434 on RPC devices, to the byte.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from pathlib import Path

import pytest

from mgpu.machine.snapshot import Gpu, Host
from mgpu.models.facts import ModelFacts
from mgpu.models.shape import facts_from_shape
from mgpu.planning.candidates import Candidate, place_layers, place_tensors
from mgpu.planning.wants import Wants
from mgpu.units import GIB, MIB
from tests.fakes.shapes import SHAPES, resized

ROWS = Path(__file__).parents[1] / "data" / "llama_cpp_memory_tensor.csv"
Row = dict[str, str]
_KEYS = ("model", "sm", "n_dev", "ctx", "np", "ctk", "ub", "fa", "ts")


def configurations() -> list[list[Row]]:
    grouped: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    with ROWS.open(newline="") as file:
        for row in csv.DictReader(file):
            grouped[tuple(row[key] for key in _KEYS)].append(row)
    return list(grouped.values())


def facts_of(name: str) -> ModelFacts:
    match = re.fullmatch(r"(.+?)(?:-L(\d+))?-(Q4_K_M|MXFP4_MOE|Q4_1)", name)
    assert match
    quantisation = match[3].removesuffix("_MOE")
    return facts_from_shape(name, resized(SHAPES[match[1]], layers=int(match[2] or 0)), quantisation)


def planned(rows: list[Row]) -> Candidate:
    row, count = rows[0], int(rows[0]["n_dev"])
    gpus = [
        Gpu(
            index=index,
            vendor="other",
            name="card",
            total_bytes=900 * GIB,
            free_bytes=900 * GIB,
            engine_devices=(f"RPC{index}",),
        )
        for index in range(count)
    ]
    users = int(row["np"])
    wants = Wants(
        parallel=users,
        kv_type_k=row["ctk"],
        kv_type_v=row["ctk"],
        ubatch=int(row["ub"]),
        flash_attention=row["fa"],
        tensor_split=tuple(map(float, row["ts"].split(","))) if row["ts"] else None,
    )
    facts, ctx_tokens = facts_of(row["model"]), int(row["ctx"]) // users
    if row["sm"] == "layer":
        return place_layers(facts, wants, gpus, Host(), ctx_tokens, host_units=0)
    return place_tensors(facts, wants, gpus, Host(), ctx_tokens)


def allocated(row: Row) -> tuple[int | None, int | None, int | None]:
    """Weights, cache and compute buffer; what was too slow to load gave only its first allocation, the weights."""
    if row["model_bytes"]:
        return int(row["model_bytes"]), int(row["kv_bytes"]), int(row["compute_bytes"])
    first = re.search(r"allocs=\[(\d+)", row["note"])
    return (int(first[1]) if first else None), None, None


@pytest.mark.parametrize(
    "rows", [pytest.param(rows, id=" ".join(rows[0][key] for key in _KEYS)) for rows in configurations()]
)
def test_each_device_gets_what_the_engine_allocated(rows: list[Row]) -> None:
    candidate = planned(rows)
    refused = "rc=1" in rows[0]["note"]
    assert (candidate.verdict == "illegal") == refused
    for row, device in zip(rows, candidate.devices, strict=True):
        weights, cache, compute = allocated(row)
        if weights is not None:
            assert abs(device.weights_bytes - weights) <= MIB
        if cache is not None and compute is not None and weights is not None:
            assert abs(device.kv_bytes - cache) <= MIB
            assert -MIB <= device.compute_bytes - compute <= 0.05 * (weights + cache + compute)


def test_every_device_row_is_compared() -> None:
    rows = [row for rows in configurations() for row in rows]
    known = [allocated(row) for row in rows]
    assert len(rows) == 70
    assert sum(weights is not None for weights, _, _ in known) == 68
    assert sum(cache is not None for _, cache, _ in known) == 54


@pytest.mark.parametrize(
    ("model", "wants", "reason"),
    [
        pytest.param("deepseek-v3-L6-Q4_K_M", Wants(), "llama.cpp has no tensor split for the architecture", id="MLA"),
        pytest.param(
            "qwen3-32b-L8-Q4_K_M", Wants(flash_attention="off"), "tensor split needs flash attention", id="attention"
        ),
    ],
)
def test_what_llama_cpp_refuses_is_illegal_with_its_reason(model: str, wants: Wants, reason: str) -> None:
    gpus = [
        Gpu(
            index=i,
            vendor="nvidia",
            name="card",
            total_bytes=90 * GIB,
            free_bytes=90 * GIB,
            engine_devices=(f"CUDA{i}",),
        )
        for i in range(2)
    ]
    candidate = place_tensors(facts_of(model), wants, gpus, Host(), 4096)
    assert candidate.verdict == "illegal"
    assert reason in candidate.reasons[0]
