"""Predicted speed against published measurements, and what must hold of any prediction."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgpu.planning.prediction import Prediction, predict
from mgpu.planning.speed import Range
from mgpu.planning.speed_constants import CONSTANTS, VALUES
from mgpu.planning.work import Chip, HostPart, Share, Stage, Work
from tests.planning.measured_choice import judged_pairs, reached
from tests.planning.measured_rows import MeasuredRow, largest_source, many_users, measured_rows, single_stream
from tests.planning.measured_scores import (
    AGGREGATE_BAR,
    COVERAGE_BAR,
    PAIRS_BAR,
    REACHED_BAR,
    SINGLE_BAR,
    SINGLE_WITHOUT_LARGEST_BAR,
    Recorder,
    decode_rate,
    evidence,
    score_many,
    score_single,
)

RTX_4090 = Chip(
    name="RTX 4090",
    vendor="nvidia",
    bandwidth_gb_s=1008,
    compute_capability=8.9,
    tensor_tflops=165.2,
    full_rate=False,
)
RX_7900_XTX = Chip(name="RX 7900 XTX", vendor="amd", bandwidth_gb_s=960, gfx="gfx1100", tensor_tflops=122.8)
ARC_B60 = Chip(name="Arc Pro B60", vendor="intel", bandwidth_gb_s=456, tensor_tflops=98.3)
P40 = Chip(name="Tesla P40", vendor="nvidia", bandwidth_gb_s=347, compute_capability=6.1, tensor_tflops=11.8)
MI100 = Chip(name="MI100", vendor="amd", bandwidth_gb_s=1229, memory="hbm", tensor_tflops=184.6)
GB10 = Chip(name="GB10", vendor="nvidia", bandwidth_gb_s=273, memory="lpddr", compute_capability=12.1)

CHIPS = (RTX_4090, RX_7900_XTX, ARC_B60, P40, MI100, GB10)
ENGINES = ("llama.cpp", "vllm", "ollama")
LIBRARIES = ("CUDA", "ROCm", "Vulkan", "SYCL")


def dense(
    chip: Chip = RTX_4090,
    *,
    cards: int = 1,
    tensor: bool = False,
    read_gb: float = 41.9,
    kv_gb: float = 0.0,
    layers: int = 80,
    engine: str = "llama.cpp",
    library: str = "CUDA",
    users: float = 1,
    host: HostPart | None = None,
    power: float = 1.0,
) -> Work:
    share = Share(chip=replace(chip, power=power), weights_bytes=read_gb * 1e9 / cards, kv_bytes=kv_gb * 1e9 / cards)
    stages = (
        (Stage(layers=layers, shares=(share,) * cards),)
        if tensor
        else tuple(Stage(layers=layers // cards, shares=(share,)) for _ in range(cards))
    )
    return Work(
        engine=engine,
        library=library,
        stages=stages,
        quantised=True,
        active_parameters=69.5e9,
        embedding_length=8192,
        users=users,
        host=host,
    )


def with_experts(work: Work) -> Work:
    """The same reads, of a model of which a token uses 8 of 128 experts."""
    stages = tuple(
        replace(stage, shares=tuple(replace(share, expert_bytes=share.weights_bytes * 8) for share in stage.shares))
        for stage in work.stages
    )
    return replace(work, stages=stages, experts=128, experts_used=8)


def predicted(work: Work) -> Prediction:
    found = predict(work)
    assert found is not None
    return found


# The bars.


def test_one_users_speed_is_within_seven_per_cent_of_what_was_measured() -> None:
    assert statistics.median(score_single(row).error for row in single_stream()) <= SINGLE_BAR


def test_so_it_is_within_ten_without_the_source_that_gives_most_rows() -> None:
    rows = single_stream()
    largest = largest_source(rows)
    assert statistics.median(score_single(r).error for r in rows if r.source != largest) <= SINGLE_WITHOUT_LARGEST_BAR


def test_four_of_five_measurements_are_inside_the_interval() -> None:
    assert statistics.mean(score_single(row).inside for row in single_stream()) >= COVERAGE_BAR


def test_intervals_say_something() -> None:
    widths = [found.decode.high / found.decode.low for row in single_stream() if (found := predict(row.work))]
    assert statistics.median(widths) < 1.4


def test_many_users_speed_is_within_sixteen_per_cent() -> None:
    rows = many_users()
    assert len(rows) > 100
    assert statistics.median(score_many(row).error for row in rows) <= AGGREGATE_BAR


def test_nine_of_ten_pairs_are_in_the_right_order() -> None:
    pairs = judged_pairs(decode_rate)
    assert len(pairs) >= 13
    assert sum(pair.right for pair in pairs) / len(pairs) >= PAIRS_BAR


def test_what_is_picked_reaches_the_best_measured_speed() -> None:
    assert statistics.mean(share for _, share in reached(decode_rate)) >= REACHED_BAR


def test_most_rows_are_judged() -> None:
    rows, left_out = measured_rows()
    assert len(single_stream()) >= 260
    assert len(rows) + sum(left_out.values()) == 522
    assert left_out["a card that is not in the catalogue"] <= 4


# What decides between splits.


@pytest.mark.parametrize(
    ("layer", "tensor"),
    [
        pytest.param(dense(cards=2), dense(cards=2, tensor=True), id="dense on two cards with CUDA"),
        pytest.param(
            dense(cards=4, layers=16, read_gb=2.4), dense(cards=4, layers=16, read_gb=2.4, tensor=True), id="a tiny one"
        ),
        pytest.param(
            dense(RX_7900_XTX, cards=2, layers=64, read_gb=16, library="Vulkan"),
            dense(RX_7900_XTX, cards=2, layers=64, read_gb=16, library="Vulkan", tensor=True),
            id="dense on two cards with Vulkan, as in llama.cpp's PR 25051",
        ),
    ],
)
def test_a_tensor_split_is_faster_for(layer: Work, tensor: Work) -> None:
    assert predicted(tensor).decode.likely > predicted(layer).decode.likely * 1.05


@pytest.mark.parametrize(
    ("layer", "tensor"),
    [
        pytest.param(
            with_experts(dense(cards=2, layers=46, read_gb=3.3)),
            with_experts(dense(cards=2, layers=46, read_gb=3.3, tensor=True)),
            id="experts of few bytes",
        ),
        pytest.param(
            dense(ARC_B60, cards=2, layers=64, read_gb=19, library="SYCL"),
            dense(ARC_B60, cards=2, layers=64, read_gb=19, library="SYCL", tensor=True),
            id="Arc with SYCL, as in llama.cpp's issue 26409",
        ),
    ],
)
def test_a_layer_split_is_faster_for(layer: Work, tensor: Work) -> None:
    assert predicted(layer).decode.likely > predicted(tensor).decode.likely * 1.1
    assert predicted(tensor).thin, "the ranking must be able to say how little is known"


@pytest.mark.parametrize(
    ("work", "word"),
    [
        pytest.param(with_experts(dense(cards=2, tensor=True)), "experts", id="tensor split with experts"),
        pytest.param(dense(cards=4, tensor=True), "more than two", id="tensor split over four"),
        pytest.param(dense(RX_7900_XTX, cards=2, tensor=True, library="ROCm"), "ROCm", id="tensor split on AMD"),
        pytest.param(dense(P40), "tensor cores", id="Pascal"),
        pytest.param(dense(ARC_B60), "neither", id="Arc"),
        pytest.param(dense(GB10), "shared", id="unified memory"),
        pytest.param(dense(MI100, engine="vllm"), "NVIDIA", id="vLLM on AMD"),
    ],
)
def test_thin_evidence_is_said_and_widens(work: Work, word: str) -> None:
    found = predicted(work)
    assert any(word in reason for reason in found.thin)
    ordinary = predicted(dense()).decode
    assert found.decode.high / found.decode.likely > ordinary.high / ordinary.likely or found.decode.high == found.bound


def test_the_common_case_is_not_thin() -> None:
    assert predicted(dense(cards=2)).thin == ()
    assert predicted(dense(cards=2, tensor=True)).thin == ()
    assert predicted(dense(engine="vllm", cards=2, tensor=True)).thin == ()


# What must hold of any prediction.


@st.composite
def works(draw: st.DrawFn) -> Work:
    engine = draw(st.sampled_from(ENGINES))
    chips = draw(st.lists(st.sampled_from(CHIPS), min_size=1, max_size=8))
    if draw(st.booleans()):
        chips = chips[:1] * len(chips)
    chips = [replace(chip, power=draw(st.floats(0.3, 1.0))) for chip in chips]
    shares = tuple(
        Share(
            chip=chip,
            weights_bytes=draw(st.floats(1e6, 3e11)),
            expert_bytes=draw(st.floats(0, 1e12)),
            kv_bytes=draw(st.floats(0, 1e11)),
        )
        for chip in chips
    )
    layers = draw(st.integers(1, 130))
    stages = (
        (Stage(layers=layers, shares=shares),)
        if draw(st.booleans())
        else tuple(Stage(layers=layers, shares=(share,)) for share in shares)
    )
    experts = draw(st.sampled_from((0, 8, 128, 512)))
    used = min(8, experts)
    if experts:  # a token reads at least the experts it uses
        stages = tuple(
            replace(
                stage,
                shares=tuple(
                    replace(s, weights_bytes=s.weights_bytes + s.expert_bytes * used / experts) for s in stage.shares
                ),
            )
            for stage in stages
        )
    return Work(
        engine=engine,
        library=draw(st.sampled_from(LIBRARIES)),
        stages=stages,
        quantised=draw(st.booleans()),
        experts=experts,
        experts_used=used,
        active_parameters=draw(st.one_of(st.none(), st.floats(1e8, 1e12))),
        embedding_length=draw(st.one_of(st.none(), st.integers(64, 20_000))),
        users=draw(st.integers(1, 500)),
        replicas=draw(st.integers(1, 4)),
        flash_attention=draw(st.booleans()),
        link=draw(st.sampled_from(("nvlink", "peer", "host"))),
        before_2025=draw(st.booleans()),
    )


def changed_shares(work: Work, **changes: float) -> Work:
    """Each share's fields times the factors given."""

    def scaled(share: Share) -> Share:
        return replace(share, **{name: getattr(share, name) * factor for name, factor in changes.items()})

    stages = tuple(replace(stage, shares=tuple(map(scaled, stage.shares))) for stage in work.stages)
    return replace(work, stages=stages)


def ordered(interval: Range) -> bool:
    return 0 < interval.low <= interval.likely <= interval.high < math.inf


@settings(max_examples=300, deadline=None)
@given(works())
def test_no_prediction_exceeds_the_physical_bound(work: Work) -> None:
    found = predicted(work)
    assert found.bound is not None
    assert ordered(found.decode)
    assert ordered(found.start)
    assert found.decode.high <= found.start.high <= found.bound
    assert found.decode.likely <= found.start.likely
    if found.aggregate:
        assert ordered(found.aggregate)
        assert found.aggregate.high <= found.bound * work.users
    assert found.prefill is None or ordered(found.prefill)


@settings(max_examples=150, deadline=None)
@given(works(), st.floats(1.0, 8.0))
def test_more_depth_is_never_faster(work: Work, factor: float) -> None:
    deeper = predicted(changed_shares(work, kv_bytes=factor))
    assert deeper.decode.likely <= predicted(work).decode.likely * (1 + 1e-9)


@settings(max_examples=150, deadline=None)
@given(works(), st.floats(1.0, 4.0))
def test_a_faster_card_is_never_slower(work: Work, factor: float) -> None:
    stages = tuple(
        replace(
            stage,
            shares=tuple(
                replace(share, chip=replace(share.chip, bandwidth_gb_s=(share.chip.bandwidth_gb_s or 0) * factor))
                for share in stage.shares
            ),
        )
        for stage in work.stages
    )
    faster = predicted(replace(work, stages=stages))
    slower = predicted(work)
    assert faster.decode.likely >= slower.decode.likely * (1 - 1e-9)
    if slower.aggregate and faster.aggregate:
        assert faster.aggregate.likely >= slower.aggregate.likely * (1 - 1e-9)


@settings(max_examples=100, deadline=None)
@given(works())
def test_equal_cards_may_change_places(work: Work) -> None:
    turned = replace(work, stages=tuple(reversed(work.stages)))
    assert predicted(turned).decode.likely == pytest.approx(predicted(work).decode.likely)


@settings(max_examples=100, deadline=None)
@given(works(), st.integers(1, 20))
def test_more_users_never_get_less_together(work: Work, more: int) -> None:
    one = replace(work, replicas=1, engine="vllm")
    few, many = (predicted(replace(one, users=users)).aggregate for users in (one.users + 1, one.users + 1 + more))
    assert few is not None
    assert many is not None
    assert many.likely >= few.likely * (1 - 1e-9)


def test_a_card_of_unknown_bandwidth_gives_no_speed() -> None:
    unknown = replace(RTX_4090, bandwidth_gb_s=None)
    assert predict(dense(unknown)) is None
    assert predict(replace(dense(), stages=(*dense().stages, *dense(unknown).stages))) is None
    assert predict(replace(dense(), stages=())) is None


def test_a_lower_power_limit_shifts_and_widens_downwards() -> None:
    free, capped = predicted(dense()).decode, predicted(dense(power=0.6)).decode
    assert capped.likely < free.likely
    assert capped.likely / capped.low > free.likely / free.low


def test_replicas_share_the_users() -> None:
    alone = predicted(dense(users=8, engine="vllm")).aggregate
    twice = predicted(replace(dense(users=16, engine="vllm"), replicas=2)).aggregate
    assert alone is not None
    assert twice is not None
    assert twice.likely == pytest.approx(2 * alone.likely)


@pytest.mark.parametrize(
    ("on_cards_gb", "on_host_gb", "bandwidth_gb_s", "measured"),
    [
        pytest.param(21.0, 21.0, None, 3.10, id="70B on an RTX 4090 and a Ryzen 7900X"),
        pytest.param(10.5, 9.0, None, 4.42, id="32B on 12 GB and a laptop's processor"),
        pytest.param(5.0, 9.0, None, 4.2, id="27B on 8 GB and a laptop's processor"),
    ],
)
def test_what_is_offloaded_gives_a_wide_range(
    on_cards_gb: float, on_host_gb: float, bandwidth_gb_s: float | None, measured: float
) -> None:
    host = HostPart(layers=40, weights_bytes=on_host_gb * 1e9, bandwidth_gb_s=bandwidth_gb_s)
    found = predicted(dense(read_gb=on_cards_gb, layers=40, host=host))
    assert found.decode.low <= measured <= found.decode.high
    assert found.decode.high / found.decode.low > 1.5
    assert found.bound is None


def test_a_known_host_bandwidth_bounds_and_narrows() -> None:
    host = HostPart(layers=40, weights_bytes=21e9)
    unknown = predicted(dense(read_gb=21, host=host)).decode
    known = predicted(dense(read_gb=21, host=replace(host, bandwidth_gb_s=75)))
    assert known.bound is not None
    assert known.decode.high <= known.bound
    assert known.decode.high / known.decode.low < unknown.high / unknown.low


# The sums on paper.


def summed_ms(lines: tuple[str, ...]) -> float:
    """Redo the sums of a basis with what is printed, as a reader would."""
    total = 0.0
    for line in lines:
        if line.startswith("one user:"):
            return total
        sums = line.split(": ", 1)[1].split(" = ")[0].replace("log2(2 cards)", "1").replace("log2(4 cards)", "2")
        if "GB/s" in sums:
            read, bandwidth, reached = (float(part) for part in re.findall(r"[\d.]+", sums)[:3])
            total += read / bandwidth / reached * 1e3
        elif line.startswith("power"):
            share, cut = (float(part) for part in re.findall(r"[\d.]+", sums)[1:])
            total /= 1 - share * cut
        else:
            count, bracket = sums.split(" × ", 1)
            numbers = eval(re.sub(r"[^\d.×+() ]", "", bracket).replace("×", "*"))
            total += float(re.findall(r"\d+", count)[0]) * float(numbers) / 1e3
    raise AssertionError(lines)


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row.id} {row.group}") for row in single_stream()[::9]])
def test_a_reader_can_redo_the_sum_with_a_pencil(row: MeasuredRow) -> None:
    found = predicted(row.work)
    assert 1e3 / summed_ms(found.basis) == pytest.approx(found.decode.likely, rel=0.02)


def test_a_candidate_carries_the_prediction_with_the_sum_in_one_line() -> None:
    found = predicted(dense(cards=2, kv_gb=2.7, users=4))
    assert (found.speed.decode_tok_s, found.speed.aggregate_tok_s) == (found.decode, found.aggregate)
    assert (found.speed.prefill_tok_s, found.speed.bound_tok_s) == (found.prefill, found.bound)
    summed = sum(float(number) for number in re.findall(r"([\d.]+) ms", found.speed.basis or ""))
    assert 1e3 / summed == pytest.approx(found.decode.likely, rel=0.01)


def test_the_sum_for_many_users_is_shown_too() -> None:
    basis = predicted(dense(users=16, engine="vllm", cards=2, tensor=True)).basis
    assert any(line.startswith("16 users, weights") for line in basis)
    assert basis[-1].startswith("16 users: 16 ÷ ")


def test_every_constant_says_how_much_evidence_it_has() -> None:
    assert all(constant.origin for constant in CONSTANTS.values())
    found = evidence()
    assert {name: (each.rows, each.sources) for name, each in CONSTANTS.items() if each.rows} == found


def test_every_constant_is_used() -> None:
    recorder = Recorder(VALUES)
    hosts = (None, HostPart(layers=1, weights_bytes=1e9), HostPart(layers=1, weights_bytes=1e9, bandwidth_gb_s=80))
    for chip, engine, library, tensor, host in itertools.product(CHIPS, ENGINES, LIBRARIES, (False, True), hosts):
        work = dense(chip, cards=2, tensor=tensor, kv_gb=1, engine=engine, library=library, users=4, host=host)
        for each in (work, with_experts(work), replace(work, before_2025=True), replace(work, quantised=False)):
            for link in ("nvlink", "peer", "host"):
                predict(replace(each, link=link), recorder)
    assert recorder.read == set(CONSTANTS)
