from __future__ import annotations

from typing import Any

import pytest

from mgpu.doctor.check import Finding, Purpose, Skip
from mgpu.doctor.checks import power
from mgpu.machine.inspection import Inspection, Unread
from tests.doctor.inspections import GIB, H100, bare, changed, changed_card, changed_gpu, healthy
from tests.doctor.said import said

BUSY: dict[str, Any] = {"utilisation_percent": 98, "pstate": 2, "power_w": 300.0, "sm_clock_mhz": 2700, "events": 0}


def each_card(inspection: Inspection, **changes: Any) -> Inspection:
    for card in inspection.cards:
        inspection = changed_card(inspection, card.gpu, **changes)
    return inspection


def alternating(**changes: Any) -> Inspection:
    """One reading of three is changed: something that flickers."""
    before = healthy()
    _, *others = before.cards[0].readings
    flicker = changed_card(before, 0, readings=changes).cards[0].readings[0]
    return changed_card(before, 0, readings=(flicker, *others))


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
        pytest.param(
            "power-capped", changed_card(healthy(), 0, power_enforced_w=400.0), Purpose(), ["info 0"], id="a little"
        ),
        pytest.param(
            "power-capped", changed_card(healthy(), 0, power_enforced_w=200.0), Purpose(), ["warn 0"], id="deep"
        ),
        pytest.param(
            "power-capped",
            changed_card(healthy(), 1, power_enforced_w=350.0),
            Purpose(tensor_parallel=2),
            ["info 1", "warn 1"],
            id="siblings that share a model have unequal limits",
        ),
        pytest.param(
            "power-capped",
            each_card(healthy(), power_enforced_w=350.0),
            Purpose(tensor_parallel=2),
            ["info 0", "info 1"],
            id="siblings capped alike",
        ),
        pytest.param("psu-budget", healthy(), Purpose(), ["info"], id="without a wattage the sum is said"),
        pytest.param("psu-budget", healthy(1), Purpose(), [], id="one card's sum is not worth saying"),
        pytest.param("psu-budget", healthy(), Purpose(psu_w=1000), ["fail"], id="1170 W from 1000"),
        pytest.param("psu-budget", healthy(), Purpose(psu_w=1300), ["warn"], id="1170 W from 1300"),
        pytest.param("psu-budget", healthy(), Purpose(psu_w=1600), [], id="1170 W from 1600"),
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


def test_a_fix_stays_above_the_lowest_limit_of_the_card() -> None:
    hot = changed_card(changed_gpu(healthy(), 0, temperature_c=95), 0, power_min_w=400.0)
    (finding,) = power.thermal.run(hot, Purpose())
    assert isinstance(finding, Finding)
    assert finding.fix[-1] == "sudo nvidia-smi -i 0 -pl 400"
