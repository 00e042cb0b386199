"""Checks of each NVIDIA card, and of the kind of machine it is in."""

from __future__ import annotations

from typing import Any

import pytest

from mgpu.doctor.check import Check, Finding, Purpose
from mgpu.doctor.checks.cards import (
    bar1_small,
    compute_mode,
    gpu_lost,
    memory_remap,
    mig_enabled,
    recovery_action,
    xid_recent,
)
from mgpu.doctor.checks.virtual import virtualised, wsl2
from mgpu.machine.inspection import Inspection, LogEntry
from tests.doctor.inspections import (
    DAY_S,
    H100,
    MIB,
    bare,
    changed,
    changed_card,
    changed_gpu,
    changed_machine,
    changed_pair,
    healthy,
    verdict,
)

RTX_3090 = "NVIDIA GeForce RTX 3090"
UNKNOWN_ERRORS = {
    "ecc_uncorrected_volatile": None,
    "remap_pending": None,
    "remap_failed": None,
    "retired_pages_pending": None,
}


def xid(number: int, age_s: float | None = 60.0, bus_id: str = "0000:20:00.0") -> Inspection:
    entry = LogEntry(kind="xid", text=f"NVRM: Xid (PCI:{bus_id}): {number}", age_s=age_s, number=number, bus_id=bus_id)
    return healthy(host={"log": (entry,)})


def virtual(inspection: Inspection, kind: str | None = "kvm", **host: Any) -> Inspection:
    return changed_machine(inspection, host={"virtualisation": kind, **host})


@pytest.mark.parametrize(
    ("check", "inspection", "purpose", "expected"),
    [
        pytest.param(gpu_lost, changed_card(healthy(), 1, nvml_error=15), {}, "fail", id="lost"),
        pytest.param(gpu_lost, changed_card(healthy(), 1, nvml_error=16), {}, "fail", id="must be reset"),
        pytest.param(
            gpu_lost, changed_gpu(healthy(), 1, problem="it fell off the bus"), {}, "fail", id="problem known"
        ),
        pytest.param(gpu_lost, changed_card(healthy(), 1, nvml_error=999), {}, "fail", id="answers with an error"),
        pytest.param(gpu_lost, healthy(), {}, "", id="both answer"),
        pytest.param(xid_recent, xid(79), {}, "fail", id="off the bus a minute ago"),
        pytest.param(xid_recent, xid(94), {}, "warn", id="contained memory error"),
        pytest.param(xid_recent, xid(31), {}, "info", id="a program's page fault"),
        pytest.param(xid_recent, xid(12345), {}, "info", id="a number that nobody knows"),
        pytest.param(xid_recent, xid(79, 2 * DAY_S), {}, "info", id="two days ago"),
        pytest.param(xid_recent, xid(79, None), {}, "info", id="at an unknown time"),
        pytest.param(xid_recent, healthy(), {}, "", id="a log without any"),
        pytest.param(xid_recent, healthy(host={"log_known": False}), {}, "skip", id="no log"),
        pytest.param(memory_remap, changed_card(healthy(2, H100), 1, remap_failed=True), {}, "fail", id="remap failed"),
        pytest.param(memory_remap, changed_card(healthy(2, H100), 1, remap_pending=True), {}, "warn", id="remap waits"),
        pytest.param(
            memory_remap,
            changed_card(healthy(1, "Tesla P40"), 0, retired_pages_pending=True),
            {},
            "warn",
            id="retired pages wait",
        ),
        pytest.param(
            memory_remap, changed_card(healthy(2, H100), 0, ecc_uncorrected_volatile=2), {}, "warn", id="errors now"
        ),
        pytest.param(
            memory_remap, changed_card(healthy(2, H100), 0, ecc_uncorrected_aggregate=2), {}, "info", id="errors once"
        ),
        pytest.param(memory_remap, healthy(), {}, "", id="GeForce does not count"),
        pytest.param(memory_remap, changed_card(healthy(1, H100), 0, **UNKNOWN_ERRORS), {}, "skip", id="no counters"),
        pytest.param(recovery_action, changed_card(healthy(), 0, recovery_action=1), {}, "fail", id="asks for a reset"),
        pytest.param(
            recovery_action, changed_card(healthy(), 0, recovery_action=99), {}, "fail", id="asks for the new"
        ),
        pytest.param(recovery_action, healthy(), {}, "", id="asks for nothing"),
        pytest.param(recovery_action, changed_card(healthy(), 0, recovery_action=None), {}, "skip", id="older driver"),
        pytest.param(
            mig_enabled,
            changed_card(changed_gpu(healthy(2, H100), 0, mig=True), 0, mig_pending=True),
            {"tensor_parallel": 2},
            "fail",
            id="MIG on a card that a model is cut over",
        ),
        pytest.param(
            mig_enabled,
            changed_card(changed_gpu(healthy(2, H100), 0, mig=True), 0, mig_pending=True),
            {},
            "info",
            id="MIG where nothing is cut",
        ),
        pytest.param(
            mig_enabled, changed_card(healthy(2, H100), 0, mig_pending=True), {}, "warn", id="MIG after a reset"
        ),
        pytest.param(mig_enabled, healthy(), {}, "", id="cards without MIG"),
        pytest.param(mig_enabled, changed_gpu(healthy(1, H100), 0, mig=None), {}, "skip", id="MIG unread"),
        pytest.param(compute_mode, changed_card(healthy(), 0, compute_mode=2), {}, "fail", id="prohibited"),
        pytest.param(compute_mode, changed_card(healthy(), 0, compute_mode=3), {}, "warn", id="exclusive"),
        pytest.param(compute_mode, healthy(), {}, "", id="shared"),
        pytest.param(compute_mode, changed_card(healthy(), 0, compute_mode=None), {}, "skip", id="mode unread"),
        pytest.param(bar1_small, healthy(2, RTX_3090), {}, "info", id="3090 without Resizable BAR"),
        pytest.param(
            bar1_small, changed_pair(healthy(2, RTX_3090), 0, 1, read=0, write=0), {}, "warn", id="granted all the same"
        ),
        pytest.param(
            bar1_small, changed_gpu(healthy(2, H100), 0, bar1_bytes=256 * MIB), {}, "warn", id="H100, 256 MiB"
        ),
        pytest.param(
            bar1_small,
            changed_gpu(
                healthy(1, "NVIDIA GeForce RTX 4090"),
                0,
                name="Tesla T4",
                compute_capability="7.5",
                bar1_bytes=256 * MIB,
            ),
            {},
            "",
            id="a T4 has no more",
        ),
        pytest.param(bar1_small, virtual(healthy(2, RTX_3090)), {}, "", id="a virtual machine's window says nothing"),
        pytest.param(bar1_small, healthy(), {}, "", id="window as large as the memory"),
        pytest.param(bar1_small, changed_gpu(healthy(), 0, bar1_bytes=None), {}, "skip", id="window unread"),
        pytest.param(virtualised, virtual(healthy()), {}, "info", id="a virtual machine"),
        pytest.param(virtualised, changed_card(healthy(), 0, virtualisation_mode=1), {}, "info", id="passed through"),
        pytest.param(virtualised, virtual(healthy(), "none", container="lxc"), {}, "info", id="LXC"),
        pytest.param(virtualised, healthy(), {}, "", id="bare metal"),
        pytest.param(virtualised, virtual(healthy(), None), {}, "skip", id="the processor does not say"),
        pytest.param(virtualised, virtual(bare()), {}, "", id="nothing to judge without a card"),
        pytest.param(wsl2, virtual(healthy(), "wsl2"), {}, "info", id="WSL2"),
        pytest.param(
            wsl2, virtual(healthy(), "wsl2"), {"tensor_parallel": 2}, "warn", id="WSL2 and a model that is cut"
        ),
        pytest.param(wsl2, virtual(healthy(), "wsl2", kernel="4.19.104-microsoft"), {}, "warn", id="WSL2, old kernel"),
        pytest.param(wsl2, healthy(), {}, "", id="native Linux"),
        pytest.param(virtualised, virtual(healthy(), "wsl2"), {}, "", id="WSL2 is said once"),
    ],
)
def test_what_is_said_of_cards(check: Check, inspection: Inspection, purpose: dict[str, Any], expected: str) -> None:
    assert verdict(check, inspection, **purpose) == expected


def test_a_lost_card_is_spoken_of_once() -> None:
    lost = changed_card(healthy(), 1, nvml_error=15, compute_mode=None, recovery_action=None)
    assert [verdict(check, lost) for check in (compute_mode, recovery_action, memory_remap, bar1_small)] == [""] * 4


def test_errors_of_the_same_card_and_number_are_one_finding_with_the_youngest_age() -> None:
    again = (*xid(79, 7200.0).host.log, *xid(79, 120.0).host.log, *xid(79, 60.0, "0000:10:00.0").host.log)
    first, second = xid_recent.run(changed(healthy(), host={"log": again}), Purpose())
    assert isinstance(first, Finding)
    assert isinstance(second, Finding)
    assert (first.gpus, second.gpus) == ((1,), (0,))
    assert first.summary == "Xid 79 on GPU1 2.0 min ago: fell off the bus"
    assert first.evidence[1].value == "2"


def test_a_lost_card_shows_what_the_kernel_logged_of_it() -> None:
    lines = tuple(
        LogEntry(kind=kind, text=f"{kind} of {bus_id}", age_s=60.0, bus_id=bus_id)
        for kind, bus_id in (("bus", "0000:20:00.0"), ("bus", "0000:10:00.0"), ("init", "0000:20:00.0"))
    )
    (finding,) = gpu_lost.run(changed(changed_card(healthy(), 1, nvml_error=15), host={"log": lines}), Purpose())
    assert isinstance(finding, Finding)
    assert [each.value for each in finding.evidence] == ["15 (lost)", "bus of 0000:20:00.0"]
