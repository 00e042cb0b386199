"""What holds for every check of cards' power and memory, computers, containers, engines, AMD's and Intel's cards."""

from __future__ import annotations

import dataclasses
import random
import typing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgpu.doctor.check import Area, Check, Finding, Purpose, Severity, Skip
from mgpu.doctor.checks import amd, configuration, container, engines, host, intel, memory, power, profile
from mgpu.machine.inspection import (
    AmdFacts,
    DiskSpace,
    Inspection,
    InstalledEngine,
    Listener,
    LogEntry,
    PciDevice,
    Unread,
)
from mgpu.machine.snapshot import Gpu, GpuProcess
from tests.doctor.inspections import GIB, H100, asked, bare, healthy

MODULES = (power, memory, host, container, configuration, engines, amd, intel, profile)
CHECKS: tuple[Check, ...] = tuple(check for module in MODULES for check in module.CHECKS)
ENGINE = InstalledEngine(
    backend="vllm", version="0.32.0", architectures=("sm_80", "compute_120"), architectures_known=True
)
DISK = DiskSpace(
    role="Hugging Face cache",
    path="/m",
    free_bytes=900 * GIB,
    total_bytes=GIB * 999,
    file_system="ext4",
    rotational=False,
)
WELL: dict[str, Any] = {"engines": (ENGINE,), "host": {"disks": (DISK,)}}
PURPOSES = (
    Purpose(),
    Purpose(backend="vllm", tensor_parallel=2, attention_heads=64, kv_heads=8, weights_bytes=20 * GIB, port=8000),
    Purpose(backend="vllm", tensor_parallel=5, attention_heads=64, kv_heads=8, weights_bytes=900 * GIB, psu_w=500),
    Purpose(backend="llama.cpp", tensor_parallel=2),
    Purpose(backend="ollama", tensor_parallel=0, attention_heads=0, kv_heads=0, port=0, psu_w=-1, weights_bytes=-1),
    Purpose(tensor_parallel=-3, attention_heads=7, psu_w=0),
)
# One of everything, so that any of its fields can be taken away.
FULL = dataclasses.replace(
    healthy(3, **WELL),
    machine=dataclasses.replace(
        healthy(3).machine,
        gpus=(
            *(dataclasses.replace(gpu, used_by=(GpuProcess(pid=3, bytes=7),)) for gpu in healthy(3).machine.gpus),
            *(Gpu(index=n, vendor="amd", name="Radeon", gfx="gfx1100", bus_id=f"0000:9{n}:00.0") for n in (3, 4)),
            Gpu(index=5, vendor="amd", name="Raphael", integrated=True),
        ),
    ),
    pci=(
        *healthy(3).pci,
        PciDevice(address="0000:93:00.0", vendor=0x1002, parent="0000:00:1c.0", iommu_type="DMA"),
        PciDevice(address="0000:00:1c.0", vendor=0x8086),
        PciDevice(address="0000:a0:00.0", vendor=0x8086, pci_class=0x030000, driver="xe", bar_bytes=7),
    ),
    amd=AmdFacts(kfd_device=True, kfd_accessible=True, render_accessible=True),
    engines=(ENGINE, dataclasses.replace(ENGINE, backend="llama.cpp", nccl=True, nccl_version="2.x")),
    host=dataclasses.replace(
        healthy(3).host,
        disks=(DISK,),
        listeners=(Listener(port=8000, everywhere=True),),
        log=(LogEntry(kind="xid", text=""),),
        environment=(("CUDA_VISIBLE_DEVICES", "0"), ("NCCL_DEBUG", "trace"), ("LD_PRELOAD", "libnccl.so")),
        nodes_without_memory=(-1,),
        governors=("powersave",),
    ),
    unread=(Unread(what="x" * 300, why="y" * 300), Unread(what="", why="", needs_root=True)),
)
ODD: dict[type, tuple[Any, ...]] = {
    int: (0, -1, 1, 10**30),
    float: (0.0, -1.0, float("nan"), float("inf"), 1e-300),
    str: ("", "x", "\n" * 40, "9" * 400, "9.9", "sm_", "gfx11-generic", "none"),
    bool: (True, False),
}


def read_once(inspection: Inspection) -> Inspection:
    """Idle cards are not read again to see what lasts."""
    cards = (dataclasses.replace(card, readings=card.readings[:1]) for card in inspection.cards)
    return dataclasses.replace(inspection, cards=tuple(cards))


@pytest.mark.parametrize("check", CHECKS, ids=[check.id for check in CHECKS])
def test_it_explains_itself(check: Check) -> None:
    first, blank, *rest = check.explanation.splitlines()
    assert first.endswith(".")
    assert blank == ""
    assert [line.split(":")[0] for line in rest if line.split(":")[0] in ("Read", "Rule", "Why", "Do")] == [
        "Read",
        "Rule",
        "Why",
        "Do",
    ]
    assert isinstance(check.area, Area)


def test_every_id_is_given_once() -> None:
    assert len({check.id for check in CHECKS}) == len(CHECKS)


@pytest.mark.parametrize(
    "inspection",
    [
        pytest.param(healthy(2, **WELL), id="two 4090"),
        pytest.param(healthy(2, lanes=8, **WELL), id="two 4090 at x8"),
        pytest.param(healthy(4, "NVIDIA GeForce RTX 3090", lanes=4, **WELL), id="four 3090 at x4"),
        pytest.param(healthy(2, "NVIDIA GeForce RTX 5090", lanes=8, **WELL), id="two 5090 at x8"),
        pytest.param(healthy(3, "Tesla P40", **WELL), id="three P40"),
        pytest.param(healthy(2, "NVIDIA RTX A6000", **WELL), id="two A6000"),
        pytest.param(healthy(8, H100, **WELL), id="eight H100"),
        pytest.param(read_once(healthy(8, H100, **WELL)), id="eight H100 read once"),
        pytest.param(read_once(healthy(2, **WELL)), id="two 4090 read once"),
        pytest.param(bare(**WELL), id="no card"),
    ],
)
@pytest.mark.parametrize("check", CHECKS, ids=[check.id for check in CHECKS])
def test_a_healthy_idle_machine_is_never_warned(check: Check, inspection: Inspection) -> None:
    said = asked(check, inspection, Purpose())
    assert not [item for item in said if isinstance(item, Finding) and item.severity is not Severity.info]
    assert not [item for item in said if isinstance(item, Skip)]


def damaged(value: Any, chance: random.Random, *, nothing_only: bool) -> Any:
    """`value` with some of its fields unknown, or (unless `nothing_only`) odd, at any depth."""
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return tuple(damaged(item, chance, nothing_only=nothing_only) for item in value if chance.random() > 0.1)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    hints = typing.get_type_hints(type(value))
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        several = typing.get_origin(hints[field.name]) is tuple
        choices = () if several else (hints[field.name], *typing.get_args(hints[field.name]))
        kinds = [kind for kind in choices if kind in ODD]
        optional = type(None) in choices
        if optional and chance.random() < 0.25:
            changes[field.name] = None
        elif kinds and not nothing_only and chance.random() < 0.15:
            changes[field.name] = chance.choice(ODD[kinds[0]])
        else:
            changes[field.name] = damaged(getattr(value, field.name), chance, nothing_only=nothing_only)
    return dataclasses.replace(value, **changes)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from(PURPOSES), st.booleans())
def test_whatever_is_unknown_or_odd_no_check_raises(seed: int, purpose: Purpose, nothing_only: bool) -> None:
    inspection = damaged(FULL, random.Random(seed), nothing_only=nothing_only)
    for check in CHECKS:
        for item in asked(check, inspection, purpose):
            assert isinstance(item, Finding | Skip)
            if isinstance(item, Finding) and nothing_only:
                assert len(item.summary) <= 90, item.summary
                assert item.evidence, f"{check.id}: {item.summary}"


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_machine_of_which_nothing_is_known_has_no_fault(purpose: Purpose) -> None:
    """What comes of wanting more than there is apart: engines that are absent, and sizes that do not divide."""
    blind = Inspection(machine=dataclasses.replace(FULL.machine, gpus=healthy(2).machine.gpus, links=()))
    for check in CHECKS:
        if check.id not in ("engine-missing", "tp-size", "psu-budget", "ram-swap"):
            assert not [item for item in asked(check, blind, purpose) if isinstance(item, Finding)], check.id
