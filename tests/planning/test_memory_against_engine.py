"""The memory rules against llama-server's own projection, row by row.

`tests/data/llama_cpp_memory.csv` holds what llama-server b10434 projected (`common_memory_breakdown_print`) for
sparse models on RPC and Vulkan devices. It prints MiB rounded down; compute buffers with two decimals.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import pytest

from mgpu.machine.snapshot import Gpu, Host
from mgpu.models.facts import ModelFacts
from mgpu.models.shape import facts_from_shape
from mgpu.planning.candidates import Candidate, place_layers
from mgpu.planning.wants import Wants
from mgpu.units import GIB, MIB
from tests.fakes.shapes import SHAPES, resized

ROWS = Path(__file__).parents[1] / "data" / "llama_cpp_memory.csv"
Row = dict[str, str]


def configurations() -> list[list[Row]]:
    grouped: dict[str, list[Row]] = defaultdict(list)
    with ROWS.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["sm"] == "layer" and row["self_mib"]:
                grouped[row["cfg"]].append(row)
    return list(grouped.values())


def facts_of(row: Row) -> ModelFacts:
    name, _, small_vocabulary = row["model"].partition("-v")
    shape = resized(SHAPES[name], vocabulary=32_000 if small_vocabulary else None, layers=None)
    return facts_from_shape(row["model"], shape, row["quant"])


def planned(rows: list[Row]) -> Candidate:
    row = rows[0]
    facts = facts_of(row)
    devices = [r["device"] for r in rows if r["device"].startswith(("RPC", "Vulkan"))]
    gpus = [
        Gpu(
            index=i,
            vendor="other",
            name=device,
            total_bytes=9000 * GIB,
            free_bytes=9000 * GIB,
            engine_devices=(device,),
        )
        for i, device in enumerate(devices)
    ]
    parallel = 4 if row["np"] == "-1" else int(row["np"])
    wants = Wants(
        parallel=parallel,
        kv_type_k=row["ctk"],
        kv_type_v=row["ctv"],
        ubatch=int(row["ub"]),
        flash_attention=row["fa"],
        tensor_split=tuple(float(share) for share in row["ts"].split(",")) if row["ts"] else (1.0,) * len(gpus),
        kv_unified=row["np"] == "-1" or "--kv-unified" in row["extra"],
        swa_full="--swa-full" in row["extra"],
        kv_on_host="-nkvo" in row["extra"],
        cpu_moe_layers=int(row["extra"].split()[1]) if "-ncmoe" in row["extra"] else 0,
        embeddings="--embeddings" in row["extra"],
    )
    host_units = max(len(facts.layers) + 1 - int(row["ngl"]), 0)
    return place_layers(facts, wants, gpus, Host(), int(row["ctx"]) // parallel, host_units=host_units)


def row_id(rows: list[Row]) -> str:
    row = rows[0]
    parts = (row["cfg"], row["backend"], row["n_dev"], row["model"], row["quant"], row["ctx"], f"np{row['np']}")
    options = (f"{row['ctk']}-{row['ctv']}", f"fa-{row['fa']}", f"ub{row['ub']}", f"ngl{row['ngl']}", row["extra"])
    return " ".join((*parts, *options)).strip()


@pytest.mark.parametrize("rows", [pytest.param(rows, id=row_id(rows)) for rows in configurations()])
def test_plan_agrees_with_the_engine(rows: list[Row]) -> None:
    candidate = planned(rows)
    by_device = {device.device: device for device in candidate.devices}
    for row in rows:
        if row["device"] not in by_device:
            continue
        device = by_device[row["device"]]
        # The engine rounds each figure down to whole MiB.
        assert -1 <= device.weights_bytes / MIB - float(row["model_mib"]) < 1 + 1e-6, row["device"]
        assert -1 <= device.kv_bytes / MIB - float(row["context_mib"]) < 1 + 1e-6, row["device"]
        high_mib = device.compute_bytes / MIB - float(row["compute_exact_mib"] or 0)
        assert -1 <= high_mib <= float(row["self_mib"]) * 0.05, row["device"]


@pytest.mark.parametrize("rows", [pytest.param(rows, id=row_id(rows)) for rows in configurations()])
def test_the_host_holds_no_less_than_planned(rows: list[Row]) -> None:
    on_host = [row for row in rows if not row["device"].startswith(("RPC", "Vulkan"))]
    host = planned(rows).host
    assert -1 <= host.kv_bytes / MIB - sum(float(row["context_mib"]) for row in on_host) < 1 + 1e-6
    assert host.compute_bytes / MIB >= sum(float(row["compute_exact_mib"] or row["compute_mib"]) for row in on_host) - 1
    # A CPU with AMX keeps what it computes in a format of its own, up to 2.5 % larger.
    weights_mib = sum(float(row["model_mib"]) for row in on_host)
    assert weights_mib * 0.975 - 1 <= host.weights_bytes / MIB < weights_mib + len(on_host)


def test_every_device_row_is_compared() -> None:
    rows = [row for rows in configurations() for row in rows if row["device"].startswith(("RPC", "Vulkan"))]
    compared = [device for rows in configurations() for device in planned(rows).devices]
    assert len(rows) > 190
    # Only a device that holds nothing at all has no counterpart (every layer on the host).
    assert len(rows) - len(compared) == sum(row["ngl"] == "0" for row in rows)
