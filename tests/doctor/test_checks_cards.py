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


def recovery(*texts: str) -> Inspection:
    """Xid 154, with what it says the recovery changed to."""
    log = tuple(LogEntry(kind="xid", text=text, age_s=60.0 - at, number=154) for at, text in enumerate(texts))
    return healthy(host={"log": log})


def small_windows(name: str, capability: str | None = None, *, read: int = 1) -> Inspection:
    """Two cards of that name with windows of 256 MiB."""
    inspection = changed_pair(healthy(2), 0, 1, read=read, write=read)
    for index in (0, 1):
        facts: dict[str, Any] = {"name": name, "bar1_bytes": 256 * MIB}
        inspection = changed_gpu(
            inspection, index, **facts, **({"compute_capability": capability} if capability else {})
        )
    return inspection


REQUIRED = "Xid (PCI:0000:10:00): 154, GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)"
DONE = "Xid (PCI:0000:10:00): 154, GPU recovery action changed from 0x1 (GPU Reset Required) to 0x0 (None)"


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
        pytest.param(xid_recent, xid(54), {}, "fail", id="power cables not attached"),
        pytest.param(xid_recent, recovery(REQUIRED), {}, "fail", id="a recovery is asked for"),
        pytest.param(xid_recent, recovery(REQUIRED, DONE), {}, "info", id="a recovery that is done"),
        pytest.param(xid_recent, recovery(DONE, REQUIRED), {}, "fail", id="a recovery asked for again"),
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
        pytest.param(bar1_small, small_windows("NVIDIA RTX A6000", read=0), {}, "", id="A6000 as they are sold"),
        *(
            pytest.param(bar1_small, small_windows(name), {}, "info", id=f"{name} is no datacentre's")
            for name in ("NVIDIA RTX A400", "NVIDIA RTX A500 Laptop GPU", "NVIDIA RTX A1000")
        ),
        pytest.param(bar1_small, small_windows("Quadro P400", "6.1"), {}, "", id="a Quadro P400 has no more"),
        pytest.param(bar1_small, small_windows("NVIDIA GeForce GTX 1080 Ti", "6.1"), {}, "", id="nor has a GTX 10"),
        pytest.param(
            bar1_small, small_windows("NVIDIA GeForce GTX 1080 Ti", "6.1", read=0), {}, "", id="granted by right or not"
        ),
        pytest.param(bar1_small, small_windows("Tesla P40", "6.1"), {}, "warn", id="a P40 has a large one"),
        pytest.param(bar1_small, small_windows("NVIDIA A40", "8.6"), {}, "warn", id="A40, 256 MiB"),
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


@pytest.mark.parametrize(
    ("error", "problem", "summary", "fix"),
    [
        pytest.param(15, "fell off the bus (GPU is lost): power it", "fell off the bus", "reseat", id="lost"),
        pytest.param(16, "needs a reset: sudo nvidia-smi -r", "needs a reset", "sudo nvidia-smi -r -i 1", id="reset"),
        pytest.param(
            4,
            "may not be opened by this user: check the permissions of /dev/nvidia*",
            "may not be opened by this user",
            "check the permissions of /dev/nvidia*",
            id="no permission",
        ),
        pytest.param(
            8,
            "its power cables are not attached: plug them in",
            "its power cables are not attached",
            "plug them in",
            id="no power",
        ),
        pytest.param(999, None, "does not answer (NVML error 999)", "dmesg", id="an error without a meaning"),
    ],
)
def test_what_to_do_about_a_card_that_refuses_fits_its_error(
    error: int, problem: str | None, summary: str, fix: str
) -> None:
    refusing = changed_gpu(changed_card(healthy(), 1, nvml_error=error), 1, problem=problem)
    (finding,) = gpu_lost.run(refusing, Purpose())
    assert isinstance(finding, Finding)
    assert finding.summary == f"GPU1 at 0000:20:00.0: {summary}"
    assert fix in finding.fix[1 if error == 15 else 0]
    assert ("-lgc" in "".join(finding.fix)) is (error == 15)


def test_a_lost_card_is_found_by_its_address() -> None:
    lost = changed_gpu(changed_card(healthy(), 1, nvml_error=15, bus_id="0000:20:00.0"), 1, problem="x", bus_id=None)
    (finding,) = gpu_lost.run(lost, Purpose())
    assert isinstance(finding, Finding)
    assert finding.fix[0] == "lspci -vs 0000:20:00.0  # which card, and its slot"
    assert finding.fix[2].startswith("sudo nvidia-smi -i 0000:20:00.0 -lgc 300,1500  # after it is back")
    (finding,) = gpu_lost.run(changed_card(lost, 1, bus_id=None), Purpose())
    assert isinstance(finding, Finding)
    assert finding.summary == "GPU1: fell off the bus"
    assert "lspci" not in "".join(finding.fix)


def test_no_card_is_called_lost_where_the_whole_driver_hangs() -> None:
    hung = changed_gpu(healthy(driver={"nvml_error": -1}), 0, problem="does not answer: its driver hangs")
    assert verdict(gpu_lost, hung) == ""


@pytest.mark.parametrize(
    ("number", "words", "fix"),
    [
        pytest.param(31, "a program's fault", None, id="a page fault"),
        pytest.param(12345, "meaning unknown here", None, id="unknown"),
        pytest.param(54, "its power cables are not attached", "attach all power cables", id="no power"),
    ],
)
def test_an_xid_is_blamed_on_programs_only_where_it_is_theirs(number: int, words: str, fix: str | None) -> None:
    (finding,) = xid_recent.run(xid(number), Purpose())
    assert isinstance(finding, Finding)
    assert finding.summary.endswith(words)
    assert (fix is None) == (not finding.fix)
    assert (fix or "") in "".join(finding.fix)


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
