"""Several users of a pipeline: its stages overlap, and what that makes cheaper."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from mgpu.planning.batching import aggregate_tok_s, least_tok_s, step_terms
from mgpu.planning.decode import decode_seconds
from mgpu.planning.work import Work
from tests.planning.test_speed_invariants import works
from tests.planning.works import dense, predicted, with_experts


def pipeline(cards: int, users: float, *, read_gb: float = 40.0, kv_gb: float = 0.0, active: float = 0.0) -> Work:
    """Equal stages; without active parameters computing never limits."""
    work = dense(cards=cards, engine="vllm", users=users, read_gb=read_gb, kv_gb=kv_gb, layers=cards)
    return replace(work, active_parameters=active or None)


@pytest.mark.parametrize(
    ("work", "gain"),
    [
        pytest.param(pipeline(4, 32), 1.0, id="weights are read for each batch: nothing is gained"),
        pytest.param(pipeline(4, 32, read_gb=0.01, kv_gb=4), 4.0, id="the cache is read by all stages at once"),
        pytest.param(pipeline(2, 32, read_gb=0.01, kv_gb=4), 2.0, id="by two, of two"),
        pytest.param(pipeline(4, 1024, read_gb=1, active=70e9), 4.0, id="so it is with computing"),
        pytest.param(pipeline(4, 3), 1.0, id="weights alone, and fewer users than stages"),
        pytest.param(pipeline(1, 32, kv_gb=4), 1.0, id="one stage overlaps nothing"),
        pytest.param(replace(pipeline(4, 32, kv_gb=4), engine="llama.cpp"), 1.0, id="llama.cpp computes one batch"),
    ],
)
def test_what_stages_that_overlap_gain(work: Work, gain: float) -> None:
    assert aggregate_tok_s(work) / least_tok_s(work) == pytest.approx(gain, rel=0.06)


@pytest.mark.parametrize(
    ("users", "replicas", "alone"),
    [
        pytest.param(2, 1, 2, id="two users of four stages never meet"),
        pytest.param(4, 4, 4, id="one user of each replica"),
        pytest.param(2, 4, 2, id="replicas that nobody uses"),
    ],
)
def test_few_users_get_what_each_would_get_alone(users: int, replicas: int, alone: int) -> None:
    work = replace(pipeline(4, users, kv_gb=8), replicas=replicas)
    assert aggregate_tok_s(work) == pytest.approx(alone / decode_seconds(replace(work, users=1)), rel=0.01)


def test_the_slowest_stage_sets_the_pace() -> None:
    work = pipeline(2, 16, read_gb=0.01, kv_gb=4)
    first, second = work.stages
    heavy = replace(second, shares=tuple(replace(share, kv_bytes=2 * share.kv_bytes) for share in second.shares))
    slower = aggregate_tok_s(replace(work, stages=(first, heavy)))
    assert slower == pytest.approx(aggregate_tok_s(work) / 2, rel=0.05)
    assert slower == aggregate_tok_s(replace(work, stages=(heavy, first)))


def test_fewer_experts_are_touched_by_each_batch() -> None:
    work = with_experts(pipeline(4, 16, read_gb=4))
    assert aggregate_tok_s(work) < least_tok_s(replace(work, experts_used=0, experts=0))
    shared = [term for term in step_terms(work) if term.what == "weights"]
    whole = [term for term in step_terms(replace(work, stages=work.stages[:1])) if term.what == "weights"]
    assert sum(term.seconds for term in shared) < 4 * sum(term.seconds for term in whole)


def test_the_interval_reaches_down_to_stages_that_do_not_overlap() -> None:
    work = pipeline(4, 32, read_gb=0.01, kv_gb=4)
    found = predicted(work)
    assert found.aggregate
    assert found.aggregate.low < least_tok_s(work)
    assert found.aggregate.likely == pytest.approx(aggregate_tok_s(work))
    assert "vLLM's pipeline: not measured, nor how users spread over its stages" in found.thin


@settings(max_examples=150, deadline=None)
@given(works())
def test_stages_gain_no_more_than_there_are(work: Work) -> None:
    work = replace(work, engine="vllm")
    least, together = least_tok_s(work), aggregate_tok_s(work)
    assert least <= together * (1 + 1e-9)
    assert together <= len(work.stages) * least * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(works())
def test_the_summands_add_up_to_the_rate(work: Work) -> None:
    seconds = sum(term.seconds for term in step_terms(replace(work, engine="vllm")))
    assert work.users / seconds == pytest.approx(aggregate_tok_s(replace(work, engine="vllm")))
