"""Checks of each card's PCIe link."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mgpu.doctor.check import Check, Finding, Purpose, Skip
from mgpu.doctor.checks.pcie import (
    pcie_aer,
    pcie_gen_degraded,
    pcie_host_gen,
    pcie_replay_rate,
    pcie_slot_limited,
    pcie_width_degraded,
    pcie_x1_riser,
)
from mgpu.machine.inspection import Inspection
from tests.doctor.inspections import (
    H100,
    changed,
    changed_card,
    changed_gpu,
    changed_machine,
    changed_pci,
    healthy,
    verdict,
)

PORT = "0000:00:01.1"
TP2 = {"tensor_parallel": 2}


def width(lanes: int | None, slot: int | None = 16, *, busy: bool = False) -> Inspection:
    """GPU1 runs with `lanes` lanes in a slot that has `slot`."""
    inspection = changed_gpu(healthy(), 1, pcie={"width": lanes, "slot_width": slot})
    inspection = changed_pci(inspection, PORT, width_max=slot)
    load = {"utilisation_percent": 98, "power_w": 400.0, "pstate": 2} if busy else {}
    return changed_card(inspection, 1, readings={"pcie_width": lanes, **load})


def generation(gen: int | None, *, busy: bool, name: str = "NVIDIA GeForce RTX 4090") -> Inspection:
    inspection = changed_gpu(healthy(2, name), 1, pcie={"gen": gen})
    load = {"utilisation_percent": 98, "pstate": 0} if busy else {}
    return changed_card(inspection, 1, readings={"pcie_gen": gen, **load})


def board_gen(gen: int | None, lanes: int = 16) -> Inspection:
    return changed_gpu(healthy(lanes=lanes), 1, pcie={"gen_max": gen})


def replays(*counts: int | None, apart_s: float = 1.0) -> Inspection:
    inspection = healthy()
    readings = tuple(
        dataclasses.replace(inspection.cards[1].readings[0], at_s=number * apart_s, pcie_replays=count)
        for number, count in enumerate(counts)
    )
    return changed_card(inspection, 1, readings=readings)


def virtual(inspection: Inspection) -> Inspection:
    return changed_machine(inspection, host={"virtualisation": "kvm"})


NO_AER: dict[str, Any] = {"aer_correctable": None, "aer_nonfatal": None, "aer_fatal": None}


def errors(fresh: int | None) -> Inspection:
    return changed_pci(healthy(), PORT, aer_correctable=700, aer_fresh=fresh)


@pytest.mark.parametrize(
    ("check", "inspection", "purpose", "expected"),
    [
        pytest.param(pcie_width_degraded, width(8), {}, "warn", id="half the slot's lanes"),
        pytest.param(pcie_width_degraded, width(4), {}, "warn", id="a quarter, at idle"),
        pytest.param(pcie_width_degraded, width(4, busy=True), {}, "fail", id="a quarter, under load"),
        pytest.param(pcie_width_degraded, width(8, slot=8), {}, "", id="all that an x8 slot has"),
        pytest.param(pcie_width_degraded, width(1), {}, "", id="one lane is a riser's"),
        pytest.param(pcie_width_degraded, virtual(width(8)), {}, "", id="a virtual machine has no slots"),
        pytest.param(pcie_width_degraded, width(8, slot=None), {}, "skip", id="slot unknown"),
        pytest.param(
            pcie_width_degraded,
            changed_pci(width(8, slot=None), PORT, width_max=16),
            {},
            "skip",
            id="a bridge above that may be the card's own is not taken for the slot",
        ),
        pytest.param(pcie_width_degraded, width(16, slot=None), {}, "", id="slot unknown, but all lanes in use"),
        pytest.param(pcie_slot_limited, width(4, slot=4), {}, "info", id="x4 slot"),
        pytest.param(pcie_slot_limited, width(4, slot=4), TP2, "warn", id="x4 slot and a model that is cut"),
        pytest.param(pcie_slot_limited, width(8, slot=8), TP2, "", id="x8 slot is normal"),
        pytest.param(pcie_slot_limited, width(4), TP2, "", id="a worse fault is another check's"),
        pytest.param(pcie_slot_limited, width(4, slot=None), {}, "skip", id="x4, slot unknown"),
        pytest.param(pcie_x1_riser, width(1, slot=1), {}, "warn", id="riser, layers"),
        pytest.param(pcie_x1_riser, width(1), TP2, "fail", id="riser and a model that is cut"),
        pytest.param(pcie_x1_riser, width(4, slot=4), TP2, "", id="four lanes are no riser"),
        pytest.param(pcie_x1_riser, virtual(width(1, slot=1)), TP2, "", id="lanes that a virtual machine is shown"),
        pytest.param(pcie_x1_riser, width(None), {}, "skip", id="width unread"),
        pytest.param(pcie_gen_degraded, generation(3, busy=True), {}, "warn", id="one generation less under load"),
        pytest.param(pcie_gen_degraded, generation(1, busy=True), {}, "fail", id="three less under load"),
        pytest.param(pcie_gen_degraded, generation(4, busy=True), {}, "", id="full speed under load"),
        pytest.param(pcie_gen_degraded, generation(1, busy=False), {}, "", id="gen 1 at idle says nothing"),
        pytest.param(pcie_gen_degraded, generation(4, busy=False, name=H100), {}, "warn", id="an H100 keeps its speed"),
        pytest.param(pcie_gen_degraded, generation(None, busy=True), {}, "skip", id="generation unread"),
        pytest.param(pcie_gen_degraded, generation(None, busy=False), {}, "", id="generation unread, at idle"),
        pytest.param(pcie_host_gen, board_gen(3), {}, "info", id="gen 3 board"),
        pytest.param(pcie_host_gen, board_gen(3), TP2, "info", id="gen 3 board, x16, a model that is cut"),
        pytest.param(pcie_host_gen, board_gen(3, 8), TP2, "warn", id="gen 3 board, x8, a model that is cut"),
        pytest.param(pcie_host_gen, board_gen(4), TP2, "", id="board as new as the card"),
        pytest.param(pcie_host_gen, board_gen(None), {}, "skip", id="board unread"),
        pytest.param(pcie_replay_rate, replays(0, 400, 900), {}, "warn", id="hundreds a second"),
        pytest.param(pcie_replay_rate, replays(48_211, 48_211, 48_211), {}, "", id="many, and all of them old"),
        pytest.param(pcie_replay_rate, replays(0, 1, 2), {}, "", id="two in two seconds are no rate yet"),
        pytest.param(pcie_replay_rate, replays(0, 1, apart_s=0.3), {}, "", id="one in 0.3 s is no 200 a minute"),
        pytest.param(pcie_replay_rate, replays(0, 16, apart_s=0.3), {}, "", id="a minute's worth at once"),
        pytest.param(pcie_replay_rate, replays(0, 17, apart_s=0.0), {}, "warn", id="more than that, at any moment"),
        pytest.param(pcie_replay_rate, replays(0, 16, apart_s=60.0), {}, "", id="as many a minute as DCGM allows"),
        pytest.param(pcie_replay_rate, replays(0, 17, apart_s=60.0), {}, "warn", id="one more"),
        pytest.param(pcie_replay_rate, replays(9, 0), {}, "", id="the counter began anew"),
        pytest.param(pcie_replay_rate, replays(None, None), {}, "skip", id="counter unread"),
        pytest.param(pcie_replay_rate, replays(7), {}, "", id="an idle card is read once, which is no rate"),
        pytest.param(pcie_aer, changed_pci(healthy(), PORT, aer_fatal=1), {}, "warn", id="fatal, at the port"),
        pytest.param(pcie_aer, changed_pci(healthy(), "0000:10:00.0", aer_nonfatal=1), {}, "warn", id="non-fatal"),
        pytest.param(
            pcie_aer,
            changed(changed_pci(healthy(), PORT, aer_correctable=700), host={"boot_age_s": 600.0}),
            {},
            "warn",
            id="more than one corrected a second",
        ),
        pytest.param(pcie_aer, changed_pci(healthy(), PORT, aer_correctable=700), {}, "info", id="few corrected"),
        pytest.param(pcie_aer, errors(10), {}, "warn", id="few since the start, many now"),
        pytest.param(pcie_aer, errors(9), {}, "info", id="a few at once"),
        pytest.param(pcie_aer, changed(errors(10), host={"boot_age_s": None}), {}, "warn", id="many now, at any time"),
        pytest.param(pcie_aer, changed(errors(0), host={"boot_age_s": None}), {}, "info", id="none now"),
        pytest.param(pcie_aer, healthy(), {}, "", id="none"),
        pytest.param(pcie_aer, changed_pci(healthy(), **NO_AER), {}, "skip", id="AER is off"),
        pytest.param(pcie_aer, virtual(changed_pci(healthy(), **NO_AER)), {}, "", id="a virtual machine has none"),
    ],
)
def test_what_is_said_of_a_link(check: Check, inspection: Inspection, purpose: dict[str, Any], expected: str) -> None:
    assert verdict(check, inspection, **purpose) == expected


def test_errors_whose_rate_nobody_knows_are_said_and_the_rate_is_skipped() -> None:
    said = list(pcie_aer.run(changed(errors(None), host={"boot_age_s": None}), Purpose()))
    assert [type(each).__name__ for each in said] == ["Finding", "Skip"]
    assert isinstance(said[1], Skip)
    assert said[1].reason == "driver and kernel do not tell it of GPU1"


def test_a_riser_under_load_at_gen_1_is_one_finding() -> None:
    riser = changed_card(
        changed_gpu(width(1, busy=True), 1, pcie={"gen": 1}), 1, readings={"pcie_gen": 1, "pcie_width": 1}
    )
    checks = (pcie_width_degraded, pcie_slot_limited, pcie_x1_riser, pcie_gen_degraded)
    assert [verdict(check, riser) for check in checks] == ["", "", "warn", ""]


def test_what_was_counted_is_said_with_its_time() -> None:
    (finding,) = pcie_replay_rate.run(replays(7, 400, 907, apart_s=0.3), Purpose())
    assert isinstance(finding, Finding)
    assert finding.summary == "GPU1's link repeats packets: 900 in 0.6 s"
    assert [each.value for each in finding.evidence] == ["7, and 907 after 0.6 s", "16"]


def test_the_cards_without_the_riser_are_named() -> None:
    (finding,) = pcie_x1_riser.run(width(2), Purpose(tensor_parallel=2))
    assert isinstance(finding, Finding)
    assert finding.fix[-1] == "export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=0  # leaves it out"


def test_links_of_cards_at_rest_are_not_judged_and_not_praised() -> None:
    purpose, rest, once = Purpose(), generation(1, busy=False), replays(9)
    assert not pcie_gen_degraded.applies(rest, purpose)
    assert pcie_gen_degraded.applies(generation(4, busy=True), purpose)
    assert pcie_gen_degraded.applies(generation(5, busy=False, name=H100), purpose)
    assert not pcie_replay_rate.applies(changed_card(once, 0, readings=once.cards[1].readings), purpose)
    assert pcie_replay_rate.applies(replays(9, 9), purpose)
