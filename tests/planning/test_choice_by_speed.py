"""The choice between ways whose speed is known: held against published measurements, and its rules."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest

from mgpu.machine.simulate import simulate
from mgpu.planning.choice import Offer, choose, preference
from mgpu.planning.plan import Plan
from mgpu.planning.speed import Range, Speed
from mgpu.planning.wants import Goal
from tests.planning.measured_plan import chosen_pairs, reached
from tests.planning.measured_scores import PAIRS_BAR, REACHED_BAR
from tests.planning.test_choice import INSTALL, LLAMA, LONGEST_LINE, OLLAMA, VLLM, way
from tests.planning.test_plan import facts

MACHINE = simulate("2x4090")


def test_of_two_ways_that_were_measured_the_faster_one_is_chosen_in_nine_of_ten() -> None:
    right = chosen_pairs()
    assert len(right) >= 13
    assert statistics.mean(right) >= PAIRS_BAR


def test_what_is_chosen_of_all_that_was_measured_reaches_the_best() -> None:
    shares = reached()
    assert len(shares) >= 8
    assert statistics.mean(shares) >= REACHED_BAR


def at(
    low: float, high: float, *, thin: bool | tuple[str, ...] = False, many: tuple[float, float] | None = None
) -> Speed:
    def rates(low: float, high: float) -> Range:
        return Range(low=low, likely=(low * high) ** 0.5, high=high)

    reasons = thin if isinstance(thin, tuple) else ("few",) if thin else ()
    return Speed(decode_tok_s=rates(low, high), aggregate_tok_s=rates(*many) if many else None, thin=reasons)


def offered(
    backend: str,
    *speeds: Speed,
    verdict: str = "fits",
    split: str | None = None,
    installed: bool = True,
    on_disk: bool = False,
    ctx_tokens: int = 8192,
) -> Offer:
    made = [replace(way(backend, verdict), speed=each, ctx_tokens=ctx_tokens, parallel=8) for each in speeds]
    if split:
        made = [replace(each, split_mode=split) for each in made]
    return Offer(
        backend=backend,
        facts=facts("llama-3.1-8b"),
        candidates=tuple(made),
        install=None if installed else INSTALL[backend],
        on_disk=on_disk,
    )


def chosen(*offers: Offer, goal: Goal = Goal.latency, parallel: int = 1) -> Plan:
    return choose(offers, preference(goal, parallel, MACHINE.gpus, offers), MACHINE)


@pytest.mark.parametrize(
    ("offers", "first", "why"),
    [
        pytest.param(
            [offered(LLAMA, at(17, 22)), offered(VLLM, at(29, 39))],
            VLLM,
            "29-39 tokens/s with vLLM, 17-22 with llama.cpp",
            id="the faster one",
        ),
        pytest.param(
            [offered(LLAMA, at(17, 22)), offered(VLLM, at(29, 39), installed=False)],
            LLAMA,
            "29-39 tokens/s with vLLM, not 17-22; not installed: mgpu backends install vllm",
            id="the faster one is not installed",
        ),
        pytest.param(
            [offered(LLAMA, at(17, 22)), offered(VLLM, at(16, 23), installed=False)],
            LLAMA,
            "17-22 tokens/s with llama.cpp, 16-23 with vLLM, which is not installed",
            id="about as fast is not installed",
        ),
        pytest.param(
            [offered(LLAMA, at(17, 22)), offered(VLLM, at(20, 26))],
            LLAMA,
            "17-22 tokens/s with llama.cpp, 20-26 with vLLM; llama.cpp is simpler",
            id="about as fast: the simpler one",
        ),
        pytest.param(
            [offered(LLAMA, at(17, 22)), offered(VLLM, at(20, 26), on_disk=True)],
            VLLM,
            "20-26 tokens/s with vLLM, 17-22 with llama.cpp; the model is on disk for vLLM only",
            id="about as fast: the one on disk",
        ),
        pytest.param(
            [offered(LLAMA, at(17, 22), on_disk=True), offered(VLLM, at(29, 39))],
            VLLM,
            "29-39",
            id="faster is worth a download",
        ),
        pytest.param(
            [offered(LLAMA, at(17, 22)), offered(VLLM, at(18, 39, thin=True))],
            LLAMA,
            "17-22 tokens/s with llama.cpp, 18-39 with vLLM on thin evidence",
            id="thin evidence does not go first",
        ),
        pytest.param(
            [offered(LLAMA, at(17, 22)), offered(VLLM, at(25, 60, thin=True))], VLLM, "25-60", id="unless it is sure"
        ),
        pytest.param(
            [offered(LLAMA, at(17, 22)), offered(VLLM, at(29, 39), ctx_tokens=4096)],
            LLAMA,
            "17-22 tokens/s with llama.cpp, 29-39 with vLLM, which has room for 4096 tokens each only",
            id="the context asked for before speed",
        ),
        pytest.param(
            [offered(LLAMA, at(2, 4), verdict="fits-with-offload"), offered(OLLAMA, at(1, 3))],
            OLLAMA,
            "llama.cpp needs host memory",
            id="what fits before what needs host memory",
        ),
        pytest.param(
            [offered(VLLM, at(27, 36)), offered(LLAMA, at(28, 38), split="tensor")],
            VLLM,
            "27-36 tokens/s with vLLM, 28-38 with llama.cpp; vLLM is simpler",
            id="a split that llama.cpp calls experimental is not simple",
        ),
        pytest.param(
            [offered(LLAMA, at(17, 22)), offered(OLLAMA, at(17, 22))], LLAMA, "exactly as planned", id="the same engine"
        ),
        pytest.param(
            [offered(LLAMA, Speed(unknown="nobody knows")), offered(OLLAMA, Speed())],
            LLAMA,
            "exactly as planned",
            id="unknown speeds: the rule of thumb",
        ),
    ],
)
def test_speed_decides_among_what_fits(offers: list[Offer], first: str, why: str) -> None:
    for some in (offers, offers[::-1]):
        plan = chosen(*some)
        assert plan.chosen.backend == first
        assert plan.why is not None
        assert why in plan.why
        assert len(plan.why) <= LONGEST_LINE


@pytest.mark.parametrize(
    ("goal", "first"), [pytest.param(Goal.latency, LLAMA, id="each"), pytest.param(Goal.throughput, VLLM, id="all")]
)
def test_the_goal_says_whose_speed_counts(goal: Goal, first: str) -> None:
    offers = offered(LLAMA, at(40, 50, many=(60, 90))), offered(VLLM, at(20, 30, many=(200, 300)))
    plan = chosen(*offers, goal=goal, parallel=8)
    assert plan.chosen.backend == first
    assert (
        plan.why
        == {
            LLAMA: "40-50 tokens/s with llama.cpp, 20-30 with vLLM",
            VLLM: "8 users: 200-300 tokens/s with vLLM, 60-90 with llama.cpp",
        }[first]
    )


def test_of_one_engine_the_faster_way_comes_first_and_of_equal_ones_the_one_asked_for() -> None:
    ways = [offered(LLAMA, at(17, 22), at(25, 33), at(25.5, 33.5), at(24, 32))]
    plan = chosen(*ways)
    assert [each.speed.decode_tok_s and each.speed.decode_tok_s.low for each in plan.candidates] == [25, 25.5, 24, 17]


@pytest.mark.parametrize(
    ("surer", "thinner", "first"),
    [
        pytest.param((), ("a",), "surer", id="thin and not"),
        pytest.param(("a",), ("a", "b"), "surer", id="thin both, one for one reason more"),
        pytest.param(("a",), ("b",), "thinner", id="thin for different reasons: the faster one"),
        pytest.param(("a",), ("a",), "thinner", id="thin for the same reasons: the faster one"),
        pytest.param(("a",), ("b", "c"), "thinner", id="more reasons, but others"),
    ],
)
def test_what_rests_on_thinner_evidence_must_be_faster_at_its_low_end(
    surer: tuple[str, ...], thinner: tuple[str, ...], first: str
) -> None:
    for low, expected in ((18, first), (20, "thinner")):  # 19.3 is likely of the surer one
        plan = chosen(offered(LLAMA, at(17, 22, thin=surer), at(low, 60, thin=thinner)))
        rates = plan.chosen.speed.decode_tok_s
        assert rates
        assert ("surer" if rates.high == 22 else "thinner") == expected
