"""What must hold of any prediction of speed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgpu.planning.prediction import predict
from mgpu.planning.speed import Range
from mgpu.planning.work import HostPart, Share, Stage, Work
from tests.planning.works import CHIPS, ENGINES, LIBRARIES, RTX_4090, dense, predicted


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
    assert predict(replace(dense(), stages=(), host=HostPart(layers=80, weights_bytes=0))) is None
    assert predict(dense(read_gb=0)) is None


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


def test_replicas_without_users_serve_nobody() -> None:
    two, four = (predicted(replace(dense(users=2, engine="vllm"), replicas=n)).aggregate for n in (2, 4))
    assert two == four


def test_without_cards_the_hosts_memory_decides() -> None:
    found = predicted(replace(dense(), stages=(), host=HostPart(layers=80, weights_bytes=41.9e9)))
    assert 0.6 < found.decode.low < found.decode.high < 2
    assert found.prefill is None


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
