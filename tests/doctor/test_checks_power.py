from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mgpu.doctor.check import Check, Finding, Purpose, Skip
from mgpu.doctor.checks import power
from mgpu.machine.inspection import Inspection, PciDevice, Unread
from tests.doctor.inspections import GIB, H100, bare, changed, changed_card, changed_gpu, healthy
from tests.doctor.said import said

BUSY: dict[str, Any] = {"utilisation_percent": 98, "pstate": 2, "power_w": 300.0, "sm_clock_mhz": 2700, "events": 0}


def each_card(inspection: Inspection, **changes: Any) -> Inspection:
    for card in inspection.cards:
        inspection = changed_card(inspection, card.gpu, **changes)
    return inspection


def capped(limit_w: float | None, **changes: Any) -> Inspection:
    return changed_card(healthy(), 0, power_requested_w=limit_w, **changes)


def alternating(**changes: Any) -> Inspection:
    """One reading of three is changed: something that flickers."""
    before = healthy()
    _, *others = before.cards[0].readings
    flicker = changed_card(before, 0, readings=changes).cards[0].readings[0]
    return changed_card(before, 0, readings=(flicker, *others))


WITH_ARC = changed(
    healthy(), pci=(*healthy().pci, PciDevice(address="0000:99:00.0", vendor=0x8086, pci_class=0x030000))
)
LAPTOPS = ("NVIDIA GeForce RTX 4090 Laptop GPU", "Quadro T2000 with Max-Q Design", "NVIDIA GeForce GTX 1650 Mobile")
LOADED = changed_gpu(healthy(), 0, free_bytes=4 * GIB)
ALL_BUSY = each_card(healthy(3), readings=BUSY)


@pytest.mark.parametrize(
    ("check", "inspection", "purpose", "expected"),
    [
        pytest.param("thermal", changed_gpu(healthy(), 0, temperature_c=94), Purpose(), ["fail 0"], id="2 °C below"),
        pytest.param("thermal", changed_gpu(healthy(), 0, temperature_c=90), Purpose(), ["warn 0"], id="6 °C below"),
        pytest.param(
            "thermal",
            changed_card(healthy(), 0, temperature_margin_c=3),
            Purpose(),
            ["fail 0"],
            id="the card's own margin",
        ),
        pytest.param(
            "thermal", changed_card(healthy(), 1, readings={"events": 0x20}), Purpose(), ["warn 1"], id="lasts"
        ),
        pytest.param("thermal", alternating(events=0x40), Purpose(), [], id="a thermal bit for a moment is nothing"),
        pytest.param(
            "thermal", changed_gpu(healthy(), 0, temperature_c=75), Purpose(), ["info 0"], id="hot while idle"
        ),
        pytest.param(
            "thermal",
            changed_card(healthy(), 0, temperature_slowdown_c=-2),
            Purpose(),
            [],
            id="a limit given as a distance is no temperature",
        ),
        pytest.param(
            "hw-slowdown", changed_card(healthy(), 0, readings={"events": 0x80}), Purpose(), ["fail 0"], id="brake"
        ),
        pytest.param(
            "hw-slowdown", changed_card(healthy(), 0, readings={"events": 0x08}), Purpose(), ["warn 0"], id="slow"
        ),
        pytest.param("hw-slowdown", alternating(events=0x88), Purpose(), [], id="a change of state is no slowdown"),
        pytest.param(
            "hw-slowdown", changed_card(healthy(), 0, readings={"events": 0x48}), Purpose(), [], id="heat is thermal's"
        ),
        pytest.param(
            "sw-power-cap",
            changed_card(healthy(), 0, readings={**BUSY, "events": 0x04, "power_w": 445.0}),
            Purpose(),
            ["info 0"],
            id="at the limit under load",
        ),
        pytest.param("sw-power-cap", healthy(), Purpose(), [], id="the power cap bit of an idle card is ignored"),
        pytest.param("power-capped", capped(400.0), Purpose(), ["info 0"], id="a little"),
        pytest.param("power-capped", capped(200.0), Purpose(), ["warn 0"], id="deep"),
        pytest.param(
            "power-capped",
            changed_card(healthy(), 1, power_requested_w=350.0),
            Purpose(tensor_parallel=2),
            ["info 1", "warn 1"],
            id="siblings that share a model have unequal limits",
        ),
        pytest.param(
            "power-capped",
            each_card(healthy(), power_requested_w=350.0),
            Purpose(tensor_parallel=2),
            ["info 0", "info 1"],
            id="siblings capped alike",
        ),
        pytest.param(
            "power-capped",
            capped(None, power_enforced_w=200.0),
            Purpose(),
            ["warn 0"],
            id="what holds stands for a limit that is not told",
        ),
        pytest.param(
            "power-capped", capped(450.0, power_enforced_w=200.0), Purpose(), [], id="nobody set the limit that holds"
        ),
        pytest.param("power-capped", capped(400.0, power_max_w=400.0), Purpose(), [], id="as high as the card takes"),
        *(
            pytest.param(
                "power-capped",
                changed_gpu(capped(None, power_enforced_w=60.0), 0, name=name),
                Purpose(),
                [],
                id=f"{name}: its limit changes by itself",
            )
            for name in LAPTOPS
        ),
        pytest.param(
            "power-capped",
            changed_gpu(capped(60.0), 0, name=LAPTOPS[0]),
            Purpose(),
            ["warn 0"],
            id="a limit that was set in a laptop",
        ),
        pytest.param(
            "power-capped",
            changed_gpu(
                capped(None, power_enforced_w=200.0), 0, name="NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition"
            ),
            Purpose(),
            ["warn 0"],
            id="a workstation's Max-Q is no laptop's",
        ),
        pytest.param("psu-budget", healthy(), Purpose(), ["info"], id="without a wattage the sum is said"),
        pytest.param("psu-budget", healthy(1), Purpose(), [], id="one card's sum is not worth saying"),
        pytest.param("psu-budget", healthy(), Purpose(psu_w=1000), ["fail"], id="1170 W from 1000"),
        pytest.param("psu-budget", healthy(), Purpose(psu_w=1300), ["warn"], id="1170 W from 1300"),
        pytest.param("psu-budget", healthy(), Purpose(psu_w=1600), [], id="1170 W from 1600"),
        pytest.param("psu-budget", WITH_ARC, Purpose(psu_w=1600), ["skip"], id="and an Arc, whose limit is not told"),
        pytest.param("psu-budget", WITH_ARC, Purpose(psu_w=1000), ["fail"], id="too much even without the Arc"),
        pytest.param(
            "clocks-locked",
            changed_card(healthy(1), 0, readings={**BUSY, "sm_clock_mhz": 1500}),
            Purpose(),
            ["warn 0"],
            id="busy at half its clock for no reason",
        ),
        pytest.param(
            "clocks-locked",
            changed_card(healthy(1), 0, readings={**BUSY, "sm_clock_mhz": 1500, "events": 0x04}),
            Purpose(),
            [],
            id="a power cap explains a low clock",
        ),
        pytest.param(
            "clocks-locked",
            changed_card(ALL_BUSY, 2, readings={"sm_clock_mhz": 2200}),
            Purpose(),
            ["warn 2"],
            id="one is slower than its busy siblings",
        ),
        pytest.param(
            "clocks-locked",
            changed_card(ALL_BUSY, 2, readings={"sm_clock_mhz": 2200, "events": 0x04}),
            Purpose(),
            [],
            id="one that has less power than its siblings",
        ),
        pytest.param(
            "clocks-locked",
            changed_card(healthy(1), 0, readings={**BUSY, "sm_clock_mhz": 2402, "events": 0x02}),
            Purpose(),
            ["info 0"],
            id="held by a setting at 77 %",
        ),
        pytest.param(
            "clocks-locked",
            changed_card(healthy(1), 0, readings={**BUSY, "sm_clock_mhz": 3000, "events": 0x02}),
            Purpose(),
            [],
            id="held by a setting at nearly all",
        ),
        pytest.param(
            "clocks-locked",
            changed_card(healthy(1), 0, readings={**BUSY, "sm_clock_mhz": 1500, "events": 0x02}),
            Purpose(),
            ["warn 0"],
            id="held by a setting at half",
        ),
        pytest.param("clocks-locked", healthy(), Purpose(), [], id="idle clocks are not judged"),
        pytest.param(
            "idle-power-stuck",
            changed_card(LOADED, 0, readings={"pstate": 0, "power_w": 52.0}),
            Purpose(),
            ["info 0"],
            id="P0 with a model that waits",
        ),
        pytest.param("idle-power-stuck", healthy(8, H100), Purpose(), [], id="datacentre cards idle at P0 by design"),
    ],
)
def test_power_is_judged_by_what_lasts(
    check: str, inspection: Inspection, purpose: Purpose, expected: list[str]
) -> None:
    assert said(power.CHECKS, check, inspection, purpose) == expected


BLIND = changed_card(healthy(), 1, readings=())


def test_events_that_were_read_once_are_not_called_unread() -> None:
    (reading, *_) = healthy().cards[1].readings
    once = changed_card(healthy(), 1, readings=(dataclasses.replace(reading, events=0x80),))
    for inspection in (once, BLIND):
        (skip,) = power.hw_slowdown.run(inspection, Purpose())
        assert isinstance(skip, Skip)
        assert (skip.reason == "clock events of GPU1 were read once, not three times") is (inspection is once)


@pytest.mark.parametrize(
    ("check", "inspection", "purpose"),
    [
        pytest.param("thermal", changed_card(BLIND, 1, temperature_slowdown_c=None), Purpose(), id="thermal"),
        pytest.param("hw-slowdown", BLIND, Purpose(), id="hw-slowdown"),
        pytest.param("sw-power-cap", BLIND, Purpose(), id="sw-power-cap"),
        pytest.param("power-capped", changed_card(healthy(), 1, power_default_w=None), Purpose(), id="power-capped"),
        pytest.param(
            "psu-budget",
            changed_gpu(changed_card(healthy(), 1, power_enforced_w=None), 1, power_limit_w=None),
            Purpose(),
            id="psu-budget",
        ),
        pytest.param(
            "psu-budget", healthy(host={"cpu_power_w": None}), Purpose(psu_w=1600), id="psu-budget, processor"
        ),
        pytest.param("clocks-locked", BLIND, Purpose(), id="clocks-locked"),
        pytest.param("idle-power-stuck", BLIND, Purpose(), id="idle-power-stuck"),
    ],
)
def test_what_cannot_be_read_of_a_card_is_skipped_once(check: str, inspection: Inspection, purpose: Purpose) -> None:
    assert said(power.CHECKS, check, inspection, purpose) == ["skip"]


def test_a_skip_says_why_and_whether_root_could() -> None:
    inspection = changed(BLIND, unread=(Unread(what="nvmlEventReasons", why="no permission", needs_root=True),))
    (skip,) = power.hw_slowdown.run(inspection, Purpose())
    assert skip == Skip(reason="clock events of GPU1 could not be read: no permission", needs_root=True)


def test_a_lost_card_is_left_to_the_check_of_lost_cards() -> None:
    lost = changed_card(healthy(), 1, nvml_error=15, readings=(), temperature_slowdown_c=None)
    assert said(power.CHECKS, "thermal", lost) == []


def test_nothing_is_said_of_a_computer_without_cards() -> None:
    assert [item for check in power.CHECKS for item in check.run(bare(), Purpose(psu_w=600))] == []


@pytest.mark.parametrize(
    ("margin", "words"),
    [
        pytest.param(2, "GPU0 is 2 °C below its limit", id="below"),
        pytest.param(0, "GPU0 is at its temperature limit", id="at it"),
        pytest.param(-2, "GPU0 is 2 °C over its limit", id="over"),
    ],
)
def test_a_card_is_below_at_or_over_its_limit(margin: int, words: str) -> None:
    (finding,) = power.thermal.run(changed_card(healthy(), 0, temperature_margin_c=margin), Purpose())
    assert isinstance(finding, Finding)
    assert finding.summary == words


@pytest.mark.parametrize(
    ("inspection", "commands"),
    [
        pytest.param(capped(200.0), ["sudo nvidia-smi -i 0 -pl 450"], id="the default"),
        pytest.param(capped(200.0, power_max_w=399.5), ["sudo nvidia-smi -i 0 -pl 399"], id="no more than it takes"),
        pytest.param(
            capped(200.0, power_default_w=390.0),
            ["sudo nvidia-smi -i 0 -pl 390", "sudo nvidia-smi -i 0,1 -pl 390"],
            id="siblings: the highest that all of them have by default",
        ),
    ],
)
def test_a_limit_is_raised_to_one_that_the_card_takes(inspection: Inspection, commands: list[str]) -> None:
    purpose = Purpose(tensor_parallel=2 if len(commands) > 1 else None)
    found = [item for item in power.power_capped.run(inspection, purpose) if isinstance(item, Finding)]
    assert [line for item in found for line in item.fix] == commands


def test_a_hot_laptop_is_not_told_to_set_a_limit() -> None:
    hot = changed_gpu(changed_card(healthy(), 0, temperature_margin_c=1), 0, name=LAPTOPS[0])
    (finding,) = power.thermal.run(hot, Purpose())
    assert isinstance(finding, Finding)
    assert not any("-pl" in line for line in finding.fix)


def test_a_fix_stays_above_the_lowest_limit_of_the_card() -> None:
    hot = changed_card(changed_gpu(healthy(), 0, temperature_c=95), 0, power_min_w=400.0)
    (finding,) = power.thermal.run(hot, Purpose())
    assert isinstance(finding, Finding)
    assert finding.fix[-1] == "sudo nvidia-smi -i 0 -pl 400"


@pytest.mark.parametrize(
    ("limit_w", "commands"),
    [
        pytest.param(200.0, ["sudo nvidia-smi -i 0 -pl 160"], id="below the one that was set"),
        pytest.param(600.0, ["sudo nvidia-smi -i 0 -pl 360"], id="below the default where more was set"),
        pytest.param(150.0, [], id="none below the lowest that the card takes"),
    ],
)
def test_a_hot_or_braked_card_is_never_told_to_draw_more(limit_w: float, commands: list[str]) -> None:
    card = changed_gpu(capped(limit_w, power_min_w=150.0), 0, temperature_c=95)
    for check in (power.thermal, power.hw_slowdown):
        (finding,) = check.run(changed_card(card, 0, readings={"events": 0x80}), Purpose())
        assert isinstance(finding, Finding)
        assert [line.partition("  #")[0] for line in finding.fix if "-pl" in line] == commands


@pytest.mark.parametrize("check", [power.sw_power_cap, power.clocks_locked], ids=lambda check: check.id)
def test_what_is_judged_of_busy_cards_is_no_praise_of_cards_at_rest(check: Check) -> None:
    assert not check.applies(healthy(), Purpose())
    assert check.applies(ALL_BUSY, Purpose())
    assert check.applies(BLIND, Purpose())
