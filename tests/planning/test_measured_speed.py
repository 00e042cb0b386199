"""What measurements of this machine do to the speed of a plan."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from mgpu.machine.simulate import simulate
from mgpu.machine.snapshot import Host
from mgpu.models.shape import facts_from_shape
from mgpu.planning.candidates import Candidate, layer_split
from mgpu.planning.measured_speed import narrowed, with_measured
from mgpu.planning.measurements import Measurement, Setting
from mgpu.planning.predicted import predicted
from mgpu.planning.speed import Range
from mgpu.planning.wants import Wants
from tests.fakes.shapes import SHAPES
from tests.planning.measured_settings import CARD, MEASURED, SETTING


def predict(depth_tokens: int) -> Range:
    """20 tokens/s at the start, a tenth less at 16 Ki."""
    likely = 20 / (1 + depth_tokens / 16384 / 9)
    return Range(low=likely / 1.15, likely=likely, high=likely * 1.15)


def after(
    *measured: Measurement, setting: Setting = SETTING, depth_tokens: int = 1024, users: int = 1, bound: float = 25.0
) -> Range:
    found = narrowed(predict, measured, setting, depth_tokens=depth_tokens, users=users, bound_tok_s=bound)
    return found.rate if found else predict(depth_tokens)


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
        pytest.param(replace(SETTING, cpu="A CPU, 8 cores"), id="a processor that computes, too"),
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
        pytest.param(replace(SETTING, cards=()), id="neither a card nor a processor"),
    ],
)
def test_what_cannot_be_recognised_again_says_nothing(uncertain: Setting) -> None:
    assert after(replace(MEASURED, setting=uncertain), setting=uncertain) == predict(1024)


def test_another_number_of_users_says_nothing() -> None:
    assert after(MEASURED, users=4) == predict(1024)


def test_measurements_of_one_depth_count_together_each_by_its_own_prediction() -> None:
    beside = [replace(MEASURED, depth_tokens=depth, tok_s=0.9 * predict(depth).likely) for depth in (1000, 1024, 1100)]
    assert after(*beside).likely == pytest.approx(0.9 * predict(1024).likely)
    assert width(after(*beside)) == pytest.approx(width(after(beside[1])))


def test_the_last_ones_count() -> None:
    before = [replace(MEASURED, tok_s=10.0)] * 30
    assert after(*before, *[MEASURED] * 10) == after(MEASURED)


@pytest.mark.parametrize(
    ("depth_tokens", "likely"),
    [
        pytest.param(1024, 18.0, id="at the same depth"),
        pytest.param(2048, 18.0, id="at twice the depth"),
        pytest.param(0, 18.0, id="at half of it, where the first tokens are alike"),
        pytest.param(2100, None, id="further away it says nothing"),
    ],
)
def test_without_a_prediction_it_is_the_rate_itself(depth_tokens: int, likely: float | None) -> None:
    found = narrowed(lambda _: None, [MEASURED], SETTING, depth_tokens=depth_tokens, users=1, bound_tok_s=None)
    assert (found.rate.likely if found else None) == likely


def planned(machine: str = "2x4090", *, ctx: int = 8192, cores: int = 16, wants: Wants | None = None) -> Candidate:
    model, gpus, host = (
        facts_from_shape("8b", SHAPES["llama-3.1-8b"], "Q4_K_M"),
        simulate(machine).gpus,
        Host(cores=cores),
    )
    return predicted(layer_split(model, wants or Wants(), gpus, host, ctx), model, gpus, host)


def measured(tok_s: float, depth_tokens: int = 200, users: int = 1) -> Measurement:
    return replace(MEASURED, tok_s=tok_s, depth_tokens=depth_tokens, users=users)


def start_of(candidate: Candidate) -> Range:
    assert candidate.speed.decode_start_tok_s
    return candidate.speed.decode_start_tok_s


def decode_of(candidate: Candidate) -> Range:
    assert candidate.speed.decode_tok_s
    return candidate.speed.decode_tok_s


def test_one_answer_shifts_both_ends_by_the_same_factor() -> None:
    before = planned()
    after = with_measured(before, SETTING, [measured(0.9 * start_of(before).likely, 0)])
    assert start_of(after).likely == pytest.approx(0.9 * start_of(before).likely)
    assert decode_of(after).likely == pytest.approx(0.9 * decode_of(before).likely)
    assert width(start_of(after)) < width(decode_of(after)) < width(decode_of(before))


def test_what_was_measured_half_way_is_compared_with_half_the_growth_of_a_tokens_time() -> None:
    before = planned(ctx=65536)
    half_s = (1 / start_of(before).likely + 1 / decode_of(before).likely) / 2
    after = with_measured(before, SETTING, [measured(0.95 / half_s, 32768)])
    assert decode_of(after).likely == pytest.approx(0.95 * decode_of(before).likely)


def test_the_sums_can_be_redone_with_a_pencil() -> None:
    before = planned()
    several = [measured(factor * start_of(before).likely, 230) for factor in (0.9, 0.92, 0.95)]
    sums = with_measured(before, SETTING, several).speed.sums
    told, full, start = sums[len(before.speed.sums) :]
    numbers = re.search(
        r"3 times, median ([\d.]+) tokens/s at 230 tokens, predicted ([\d.]+): the prediction × ([\d.]+) ", told
    )
    assert numbers, told
    rate, there, factor = map(float, numbers.groups())
    assert factor == pytest.approx(rate / there, rel=0.002)
    formula = told.rpartition(" = ")[2].replace("÷", "/").replace("×", "*").replace("−", "-")
    assert eval(formula) == pytest.approx(there, rel=0.002)
    for line in (full, start):
        sum_ = re.search(r": ([\d.]+) × ([\d.]+) = ([\d.]+) tokens/s, ([\d.]+) to [\d.]+ \(÷ ([\d.]+) and", line)
        assert sum_, line
        one, other, likely, low, below = map(float, sum_.groups())
        assert one * other == pytest.approx(likely, rel=0.002)
        assert likely / below == pytest.approx(low, rel=0.005)


def test_the_basis_says_that_it_was_measured() -> None:
    before = planned()
    basis = with_measured(before, SETTING, [measured(100.0)] * 3).speed.basis
    assert basis
    assert basis.startswith("measured here 3 times: 100.0 tokens/s at 200 tokens, the prediction × 0.")
    assert basis.endswith(f" ({before.speed.basis})")


def test_no_end_is_above_the_bound() -> None:
    after = with_measured(planned(), SETTING, [measured(5000.0)])
    assert decode_of(after).high <= start_of(after).high == after.speed.bound_tok_s


def test_all_users_together_are_measured_apart_from_one() -> None:
    before = planned(wants=Wants(parallel=4))
    assert before.speed.aggregate_tok_s
    rate = 0.8 * before.speed.aggregate_tok_s.likely
    after = with_measured(before, SETTING, [measured(rate, 8192, users=4)])
    assert after.speed.aggregate_tok_s
    assert after.speed.aggregate_tok_s.likely == pytest.approx(rate)
    assert decode_of(after) == decode_of(before)
    shallow = with_measured(before, SETTING, [measured(rate, 100, users=4)])
    assert shallow.speed.aggregate_tok_s
    assert shallow.speed.aggregate_tok_s.likely < rate


@pytest.mark.parametrize(
    ("users", "thin"),
    [
        pytest.param((1,), True, id="one user of four"),
        pytest.param((4,), True, id="all four and not one"),
        pytest.param((1, 4), False, id="both"),
    ],
)
def test_evidence_is_no_longer_thin_where_every_rate_was_measured(users: tuple[int, ...], thin: bool) -> None:
    before = planned(wants=Wants(parallel=4))
    assert before.speed.thin
    after = with_measured(before, SETTING, [measured(80.0, users=each) for each in users])
    assert bool(after.speed.thin) is thin


def test_where_nothing_is_predicted_a_rate_stands_for_its_own_depth() -> None:
    before = planned("none", cores=2)
    assert before.speed.unknown
    setting = replace(SETTING, cards=(), cpu="A CPU, 2 cores")
    at_start = replace(measured(40.0), setting=setting)
    after = with_measured(before, setting, [at_start])
    assert start_of(after).likely == 40.0
    assert (after.speed.decode_tok_s, after.speed.unknown) == (None, before.speed.unknown)
    assert "nothing is predicted" in after.speed.sums[0]
    deep = with_measured(before, setting, [at_start, replace(at_start, depth_tokens=6000, tok_s=30.0)])
    assert (decode_of(deep).likely, start_of(deep).likely, deep.speed.unknown) == (30.0, 40.0, None)


def test_what_does_not_fit_has_no_speed() -> None:
    before = planned("4090", ctx=10_000_000)
    assert before.verdict == "does-not-fit"
    assert with_measured(before, SETTING, [MEASURED]) == before


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(None, id="no setting"),
        pytest.param(replace(SETTING, build="b10435"), id="another build"),
        pytest.param(replace(SETTING, cards=(CARD,)), id="one card fewer"),
    ],
)
def test_without_a_measurement_in_the_setting_nothing_changes(setting: Setting | None) -> None:
    before = planned()
    assert with_measured(before, setting, [MEASURED]) == before
