"""What was measured on this machine, and what it may say."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mgpu.planning.measurements import (
    MeasuredCard,
    Measurement,
    Setting,
    measurement_from_json,
    measurement_to_json,
    narrowed,
)
from mgpu.planning.speed import Range

CARD = MeasuredCard(uuid="GPU-1", name="NVIDIA GeForce RTX 3090", power_limit_w=350.0)
SETTING = Setting(
    engine="llama.cpp",
    build="b10434",
    flags=("-fa on", "-sm layer"),
    cards=(CARD, replace(CARD, uuid="GPU-2")),
    model="sha256:1234",
    quantisation="Q4_K_M",
)
MEASURED = Measurement(setting=SETTING, depth_tokens=1024, users=1, tok_s=18.0, measured_at="2026-08-01T12:00:00Z")


def predict(depth_tokens: int) -> Range:
    """20 tokens/s at the start, a tenth less at 16 Ki."""
    likely = 20 / (1 + depth_tokens / 16384 / 9)
    return Range(low=likely / 1.15, likely=likely, high=likely * 1.15)


def after(
    *measured: Measurement, setting: Setting = SETTING, depth_tokens: int = 1024, users: int = 1, bound: float = 25.0
) -> Range:
    found = narrowed(predict, measured, setting, depth_tokens=depth_tokens, users=users, bound_tok_s=bound)
    assert found is not None
    return found


def width(interval: Range) -> float:
    return interval.high / interval.low


def test_a_measurement_shifts_and_narrows() -> None:
    found = after(MEASURED)
    assert found.likely == pytest.approx(18.0)
    assert found.low < 18.0 < found.high
    assert width(found) < width(predict(1024)) / 1.1


def test_at_another_depth_the_prediction_is_shifted_by_the_same_factor_and_is_wider() -> None:
    found = after(MEASURED, depth_tokens=16384)
    assert found.likely / predict(16384).likely == pytest.approx(18.0 / predict(1024).likely)
    assert width(after(MEASURED)) < width(found) < width(predict(16384))


def test_the_nearest_depth_counts() -> None:
    far = replace(MEASURED, depth_tokens=65536, tok_s=5.0)
    assert after(far, MEASURED, depth_tokens=2048).likely == pytest.approx(
        18.0 * predict(2048).likely / predict(1024).likely
    )


def test_several_count_by_their_median_and_as_wide_as_they_differ() -> None:
    several = [replace(MEASURED, tok_s=tok_s) for tok_s in (18.0, 17.0, 21.0)]
    found = after(*several)
    assert found.likely == pytest.approx(18.0)
    assert found.high == pytest.approx(21.0)
    assert width(found) > width(after(MEASURED))


def test_what_was_measured_too_fast_is_capped_by_physics() -> None:
    found = after(replace(MEASURED, tok_s=30.0), bound=25.0)
    assert found.low <= found.likely <= found.high == 25.0


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(replace(SETTING, engine="ollama"), id="engine"),
        pytest.param(replace(SETTING, build="b10435"), id="build"),
        pytest.param(replace(SETTING, flags=("-fa off", "-sm layer")), id="a flag"),
        pytest.param(replace(SETTING, cards=(CARD,)), id="fewer cards"),
        pytest.param(replace(SETTING, cards=(CARD, replace(CARD, uuid="GPU-3"))), id="another card of the same name"),
        pytest.param(replace(SETTING, cards=tuple(replace(c, power_limit_w=250.0) for c in SETTING.cards)), id="power"),
        pytest.param(replace(SETTING, model="sha256:5678"), id="model"),
        pytest.param(replace(SETTING, quantisation="Q5_K_M"), id="quantisation"),
    ],
)
def test_a_measurement_never_crosses_to_another(other: Setting) -> None:
    assert after(replace(MEASURED, setting=other)) == predict(1024)
    assert after(MEASURED, setting=other) == predict(1024)


@pytest.mark.parametrize(
    "uncertain",
    [
        pytest.param(replace(SETTING, build=None), id="no build"),
        pytest.param(replace(SETTING, cards=(CARD, replace(CARD, uuid=None))), id="a card without identity"),
    ],
)
def test_what_cannot_be_recognised_again_says_nothing(uncertain: Setting) -> None:
    assert after(replace(MEASURED, setting=uncertain), setting=uncertain) == predict(1024)


def test_another_number_of_users_says_nothing() -> None:
    assert after(MEASURED, users=4) == predict(1024)


def test_without_a_prediction_there_is_nothing_to_shift() -> None:
    found = narrowed(lambda _: None, [MEASURED], SETTING, depth_tokens=0, users=1, bound_tok_s=None)
    assert found is None


def test_a_measurement_comes_back_from_json_as_it_was() -> None:
    for each in (
        MEASURED,
        replace(MEASURED, setting=replace(SETTING, build=None, cards=(replace(CARD, uuid=None, power_limit_w=None),))),
    ):
        assert measurement_from_json(json.loads(json.dumps(measurement_to_json(each)))) == each


@pytest.mark.parametrize(
    ("path", "value"),
    [
        pytest.param(("tok_s",), "fast", id="text for a number"),
        pytest.param(("tok_s",), float("nan"), id="not a number"),
        pytest.param(("tok_s",), -1.0, id="a negative speed"),
        pytest.param(("users",), True, id="yes for a number"),
        pytest.param(("measured_at",), 5, id="a number for text"),
        pytest.param(("setting",), None, id="no setting"),
        pytest.param(("setting", "flags"), "-fa on", id="text for a list"),
        pytest.param(("setting", "cards"), [{"uuid": "x"}], id="half a card"),
        pytest.param(("setting", "more"), 1, id="what is not known"),
    ],
)
def test_a_record_that_is_not_understood_is_refused(path: tuple[str, ...], value: object) -> None:
    record = json.loads(json.dumps(measurement_to_json(MEASURED)))
    place = record
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=r"."):
        measurement_from_json(record)
    with pytest.raises(ValueError, match="nothing else"):
        measurement_from_json([record])
