"""vLLM's candidates: which ways are found, what fits, and what is never done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgpu.backends.backend import Serving
from mgpu.backends.vllm import build_launch
from mgpu.machine.simulate import simulate
from mgpu.machine.snapshot import Gpu, Host, PcieLink
from mgpu.models.facts import ModelFacts
from mgpu.models.hf import facts_from_config
from mgpu.planning.candidates import Candidate
from mgpu.planning.speed import Speed
from mgpu.planning.vllm_candidates import vllm_candidates, vllm_fixes
from mgpu.planning.vllm_memory import OVERHEAD_BYTES, VllmWants, request_bytes, visible_bytes
from mgpu.planning.vllm_placement import planned_kv_tokens, vllm_candidate
from mgpu.planning.vllm_room import least_share, users_at_once
from mgpu.planning.wants import Goal
from mgpu.units import GIB
from tests.models.test_hf import GEMMA_12B, GPT_OSS_20B, LLAMA_8B, QWEN_30B_A3B
from tests.planning.test_tensor_parallel import AWQ, LLAMA_70B

SERVING = Serving(
    program=Path("vllm"), model="org/model", name="model", host="127.0.0.1", port=8080, folder=Path("/run/model")
)
HOST = Host(ram_bytes=64 * GIB, ram_available_bytes=60 * GIB)


def facts_of(config: dict[str, object], gib: float) -> ModelFacts:
    return facts_from_config(config, round(gib * GIB), name="model", source="org/model")


EIGHT = facts_of(LLAMA_8B, 15)
EIGHT_SMALL = facts_of(LLAMA_8B | AWQ, 5.3)
SEVENTY = facts_of(LLAMA_70B | AWQ, 37)
THIRTY = facts_of(QWEN_30B_A3B | AWQ, 16)


def planned(facts: ModelFacts, machine: str, wants: VllmWants | None = None) -> tuple[Candidate, ...]:
    return vllm_candidates(facts, wants or VllmWants(), simulate(machine).gpus, HOST)


def shapes(candidates: Sequence[Candidate]) -> list[tuple[str, int, int, int]]:
    return [
        (candidate.verdict, candidate.tensor_parallel, candidate.pipeline_parallel, len(candidate.devices))
        for candidate in candidates
    ]


@pytest.mark.parametrize(
    ("facts", "machine", "expected"),
    [
        pytest.param(EIGHT, "4090", [("fits", 1, 1, 1)], id="one card"),
        pytest.param(EIGHT, "2x4090", [("fits", 2, 1, 2), ("fits", 1, 1, 1)], id="two alike, one would do"),
        pytest.param(SEVENTY, "2x4090", [("fits", 2, 1, 2)], id="two alike, both are needed"),
        pytest.param(
            SEVENTY, "3x3090", [("fits", 2, 1, 2), ("fits", 1, 3, 3), ("illegal", 3, 1, 3)], id="64 heads on three"
        ),
        pytest.param(
            THIRTY,
            "4x3090",
            [("fits", 1, 1, 1), ("fits", 2, 1, 2), ("fits", 2, 2, 4), ("illegal", 4, 1, 4)],
            id="six groups of scales on four; of experts nobody knows that more cards are faster",
        ),
        pytest.param(
            EIGHT,
            "4090+4080+4080",
            [("fits", 2, 1, 2), ("fits", 1, 1, 1), ("fits", 1, 3, 3)],
            id="the two like ones, the largest, a pipeline over unlike cards",
        ),
        pytest.param(SEVENTY, "4090+4080", [("does-not-fit", 1, 2, 2)], id="too little together"),
        pytest.param(EIGHT, "4060", [("does-not-fit", 1, 1, 1)], id="too little on one"),
    ],
)
def test_the_ways_that_are_found(facts: ModelFacts, machine: str, expected: list[tuple[str, int, int, int]]) -> None:
    assert shapes(planned(facts, machine)) == expected


@pytest.mark.parametrize(
    ("facts", "wants", "expected"),
    [
        pytest.param(SEVENTY, VllmWants(), [(2, 1), (1, 3)], id="one user: two at once are faster"),
        pytest.param(SEVENTY, VllmWants(all_cards=True), [(1, 3), (2, 1)], id="who counts the cards wants them"),
        pytest.param(SEVENTY, VllmWants(parallel=8), [(1, 3), (2, 1)], id="many users need the memory of all"),
        pytest.param(EIGHT, VllmWants(), [(2, 1), (1, 1), (1, 3)], id="a pipeline, which nobody measured, last"),
        pytest.param(
            facts_of(LLAMA_70B | AWQ, 39), VllmWants(), [(1, 3), (2, 1)], id="not where its context had to be lowered"
        ),
        pytest.param(SEVENTY, VllmWants(split_mode="tensor"), [(3, 1)], id="what was asked for"),
    ],
)
def test_the_fastest_comes_first_for_one_user(
    facts: ModelFacts, wants: VllmWants, expected: list[tuple[int, int]]
) -> None:
    found = [each for each in planned(facts, "3x3090", wants) if each.verdict == "fits" or wants.split_mode]
    assert [(each.tensor_parallel, each.pipeline_parallel) for each in found] == expected
    unknown = [replace(gpu, bandwidth_gb_s=None) for gpu in simulate("3x3090").gpus]
    (first, *_) = vllm_candidates(facts, wants, unknown, HOST)
    assert len(first.devices) == 3, "of what is not known to be faster all cards"


TWELVE = facts_of(GEMMA_12B | AWQ, 8)
MANY = VllmWants(parallel=8)


def ranked(candidates: Sequence[Candidate]) -> list[tuple[int, int, int]]:
    """What fits, as (tensor parallel, pipeline parallel, replicas)."""
    fitting = [each for each in candidates if each.verdict == "fits"]
    return [(each.tensor_parallel, each.pipeline_parallel, each.replicas) for each in fitting]


@pytest.mark.parametrize(
    ("facts", "machine", "wants", "expected"),
    [
        # Published: 1,007 tokens/s as one engine on four 3090, 3,425 as four.
        pytest.param(TWELVE, "4x3090", MANY, [(1, 1, 4), (2, 1, 2), (4, 1, 1), (1, 1, 1)], id="as many as cards"),
        pytest.param(
            TWELVE,
            "4x3090",
            replace(MANY, goal=Goal.latency),
            [(4, 1, 1), (2, 1, 2), (1, 1, 4), (1, 1, 1)],
            id="each user's wait: the other way round",
        ),
        pytest.param(TWELVE, "4x3090", VllmWants(), [(4, 1, 1), (1, 1, 1)], id="one user flips it"),
        pytest.param(SEVENTY, "4x3090", MANY, [(4, 1, 1), (2, 1, 2)], id="those that hold fewer users come later"),
        pytest.param(
            SEVENTY,
            "4x3090",
            replace(MANY, ctx_tokens=2048),
            [(2, 1, 2), (4, 1, 1)],
            id="two, where all users have room",
        ),
        pytest.param(EIGHT, "3x4090", MANY, [(1, 1, 3), (2, 1, 1), (1, 1, 1), (1, 3, 1)], id="three on three"),
        pytest.param(
            EIGHT,
            "5x4090",
            replace(MANY, parallel=2),
            [(4, 1, 1), (2, 1, 2), (1, 1, 5), (1, 1, 1), (1, 5, 1)],
            id="two users leave three of five replicas idle",
        ),
        pytest.param(
            EIGHT,
            "5x4090",
            replace(MANY, parallel=2, all_cards=True),
            [(1, 1, 5), (1, 5, 1), (4, 1, 1), (1, 1, 1)],
            id="none idle when the cards are counted",
        ),
        pytest.param(THIRTY, "2x4090", MANY, [(2, 1, 1), (1, 1, 1)], id="experts are never replicated"),
        pytest.param(EIGHT, "4090+4080+4080", MANY, [(2, 1, 1), (1, 1, 1), (1, 3, 1)], id="none that has room"),
        pytest.param(EIGHT, "2x4090", replace(MANY, split_mode="none"), [(1, 1, 1)], id="one card when asked"),
    ],
)
def test_replicas_serve_many_and_tensor_parallelism_one(
    facts: ModelFacts, machine: str, wants: VllmWants, expected: list[tuple[int, int, int]]
) -> None:
    assert ranked(planned(facts, machine, wants)) == expected


def test_replicas_hold_the_model_each_and_their_users_together() -> None:
    first, *_ = planned(TWELVE, "4x3090", MANY)
    assert first.replicas == len(first.devices) == 4
    assert len({device.uuid or device.gpu for device in first.devices}) == 4
    assert all((device.first_layer, device.layers, device.head) == (0, 48, True) for device in first.devices)
    alone = planned(TWELVE, "3090", VllmWants(parallel=64, ctx_tokens=8192))[0]
    four = next(
        each for each in planned(TWELVE, "4x3090", VllmWants(parallel=64, ctx_tokens=8192)) if each.replicas == 4
    )
    assert users_at_once(four, TWELVE) == 4 * users_at_once(alone, TWELVE) < 64
    assert (
        f"room for {users_at_once(four, TWELVE)} of 64 users at {four.ctx_tokens} tokens; the others wait"
        in four.reasons
    )


def test_replicas_of_experts_are_cut_over_all_cards() -> None:
    (asked,) = planned(THIRTY, "4x3090", VllmWants(replicas=4, parallel=4))
    assert asked.verdict == "illegal"
    (why,) = asked.reasons
    assert why.startswith("vLLM cuts the experts over all 4 cards of the replicas: an expert's width ÷ 4 cards is 192")
    (two,) = planned(THIRTY, "2x3090", VllmWants(replicas=2, parallel=4))
    assert two.verdict == "fits"
    assert "they wait for one another" in two.reasons[-1]


def test_a_slow_link_puts_a_pipeline_before_tensor_parallelism_for_many() -> None:
    slow = PcieLink(gen_max=3, width=1)
    gpus = [replace(gpu, pcie=slow) if gpu.index == 1 else gpu for gpu in simulate("2x4090").gpus]
    many = vllm_candidates(SEVENTY, replace(MANY, ctx_tokens=1024), gpus, HOST)
    assert ranked(many) == [(1, 2, 1), (2, 1, 1)]
    one = vllm_candidates(SEVENTY, VllmWants(), gpus, HOST)
    assert ranked(one) == [(2, 1, 1), (1, 2, 1)]
    assert (
        one[0].reasons[0].startswith("gpu1 is on a slow link (PCIe 3.0 x1, 1.0 GB/s), and a token moves 2.6 MB over it")
    )
    assert not any("slow link" in reason for reason in one[1].reasons), "one vector a token is nothing"


def test_a_card_with_a_display_keeps_more_free() -> None:
    plain = card(12, 11.5)
    (shown,) = vllm_candidates(EIGHT_SMALL, VllmWants(), [replace(plain, display=True)], HOST)
    (hidden,) = vllm_candidates(EIGHT_SMALL, VllmWants(), [plain], HOST)
    assert (share(shown), share(hidden)) == (0.89, 0.9)
    assert shown.devices[0].spare_bytes >= GIB
    assert "gpu0 drives a display: 1.00 GiB of it stays free" in shown.reasons
    (told,) = vllm_candidates(EIGHT_SMALL, VllmWants(headroom_bytes=512 << 20), [replace(plain, display=True)], HOST)
    assert share(told) == 0.9, "what the user said counts"


def test_the_least_share_holds_all_users_and_no_less_does() -> None:
    (alone,) = vllm_candidates(EIGHT, VllmWants(parallel=2, ctx_tokens=8192), [card(48, 47)], HOST)
    least = least_share(EIGHT, alone)
    assert least < (share(alone) or 0)
    for taken, users in ((least, 2), (round(least - 0.02, 2), 1)):
        (again,) = vllm_candidates(
            EIGHT, VllmWants(parallel=2, ctx_tokens=8192, gpu_memory_utilization=taken), [card(48, 47)], HOST
        )
        assert (again.verdict, users_at_once(again, EIGHT)) == ("fits", users)


@pytest.mark.parametrize(
    ("wants", "machine", "changes"),
    [
        pytest.param(VllmWants(tensor_parallel=3), "2x3090", ["--tensor-parallel 2"], id="more than there are"),
        pytest.param(
            VllmWants(tensor_parallel=3),
            "3x3090",
            ["--tensor-parallel 1", "--tensor-parallel 2 --gpus gpu0,gpu1"],
            id="a pipeline, and fewer cards",
        ),
        pytest.param(
            VllmWants(tensor_parallel=3, pipeline_parallel=2),
            "6x3090",
            ["--tensor-parallel 2 --pipeline-parallel 3"],
            id="a pipeline that was asked for becomes another",
        ),
        pytest.param(VllmWants(tensor_parallel=3, replicas=2), "4x3090", ["--tensor-parallel 2"], id="of each replica"),
        pytest.param(VllmWants(tensor_parallel=3), "none", ["--tensor-parallel 2"], id="on the CPU"),
        pytest.param(VllmWants(replicas=2), "3x3090", ["without --replicas"], id="cards that cannot be dealt evenly"),
        pytest.param(VllmWants(replicas=3), "4x3090", ["--replicas 2", "without --replicas"], id="fewer replicas"),
    ],
)
def test_an_illegal_shape_has_a_legal_one_as_its_way_out(wants: VllmWants, machine: str, changes: list[str]) -> None:
    gpus = simulate(machine).gpus
    assert vllm_candidates(SEVENTY, wants, gpus, HOST)[0].verdict == "illegal"
    fixes = vllm_fixes(SEVENTY, (), wants, gpus, replace(simulate(machine), host=HOST))
    assert [fix.change for fix in fixes] == changes
    for fix in fixes:
        assert fix.candidate.verdict == "fits"
        if "--replicas" in fix.change:
            assert fix.candidate.replicas == (int(fix.change.split()[1]) if fix.change.startswith("--") else 1)
            continue
        assert str(fix.candidate.tensor_parallel) in fix.change
        assert fix.candidate.replicas == wants.replicas


@pytest.mark.parametrize(
    ("wants", "machine", "expected"),
    [
        pytest.param(VllmWants(tensor_parallel=2), "4x3090", (2, 2, 4), id="a pipeline follows from the cards"),
        pytest.param(VllmWants(pipeline_parallel=4), "4x3090", (1, 4, 4), id="a pipeline alone"),
        pytest.param(VllmWants(tensor_parallel=1, pipeline_parallel=1), "3090", (1, 1, 1), id="one card"),
        pytest.param(VllmWants(replicas=2), "4x3090", (2, 1, 4), id="replicas share the cards"),
        pytest.param(VllmWants(split_mode="tensor"), "4090+4080", (2, 1, 2), id="unlike cards when asked"),
    ],
)
def test_a_shape_that_is_asked_for_is_the_first(wants: VllmWants, machine: str, expected: tuple[int, int, int]) -> None:
    assert shapes(planned(EIGHT, machine, wants))[0] == ("fits", *expected)


@pytest.mark.parametrize(
    ("wants", "machine", "reason"),
    [
        pytest.param(VllmWants(tensor_parallel=3), "3x3090", "32 attention heads ÷ 3 cards", id="heads"),
        pytest.param(VllmWants(tensor_parallel=4), "2x3090", "takes 4 cards, and there are 2", id="too few cards"),
        pytest.param(VllmWants(replicas=2), "3x3090", "3 cards cannot be dealt evenly to 2 replicas", id="replicas"),
        pytest.param(VllmWants(replicas=2), "3090", "1 card cannot be dealt evenly to 2", id="replicas on one card"),
        pytest.param(VllmWants(kv_type_k="q8_0", kv_type_v="q8_0"), "3090", "no KV cache of type q8_0", id="KV type"),
        pytest.param(VllmWants(ctx_tokens=200_000), "3090", "more than the 131072 vLLM allows", id="context"),
    ],
)
def test_what_vllm_refuses_is_said_before_it_is_tried(wants: VllmWants, machine: str, reason: str) -> None:
    (candidate, *_) = planned(EIGHT, machine, wants)
    assert candidate.verdict == "illegal"
    assert any(reason in each for each in candidate.reasons), candidate.reasons
    assert all(device.idle and not device.total_bytes for device in candidate.devices)


def card(total_gib: float, free_gib: float, index: int = 0) -> Gpu:
    return Gpu(
        index=index,
        vendor="nvidia",
        name="card",
        uuid=f"GPU-{index}",
        total_bytes=round(total_gib * GIB),
        free_bytes=round(free_gib * GIB),
        bandwidth_gb_s=1000.0,
    )


def share(candidate: Candidate) -> float | None:
    assert isinstance(candidate.wants, VllmWants)
    return candidate.wants.gpu_memory_utilization


def test_where_others_hold_memory_vllm_is_given_less() -> None:
    (candidate,) = vllm_candidates(EIGHT, VllmWants(), [card(24, 20.5)], HOST)
    assert candidate.verdict == "fits"
    assert share(candidate) == 0.86  # (20.5 - 0.25) / (24 * 0.98), rounded down
    assert "vLLM is given 0.86 of each card, because no more is free" in candidate.reasons


def test_a_share_that_is_asked_for_is_kept_and_refused_where_it_is_not_free() -> None:
    (candidate,) = vllm_candidates(EIGHT, VllmWants(gpu_memory_utilization=0.95), [card(24, 20.5)], HOST)
    assert share(candidate) == 0.95
    assert candidate.verdict == "does-not-fit"
    assert candidate.reasons == ("vLLM was to take 22.3 GiB of gpu0, where 20.5 GiB are free",)
    assert candidate.short_bytes == int(visible_bytes(24 * GIB) * 0.95) - round(20.5 * GIB)


def test_a_context_nobody_asked_for_is_lowered_and_said() -> None:
    tight = card(24, 23.5)
    (lowered,) = vllm_candidates(facts_of(LLAMA_8B, 19.5), VllmWants(), [tight], HOST)
    assert (lowered.verdict, lowered.ctx_tokens) == ("fits", lowered.max_ctx_tokens)
    assert 2048 <= lowered.ctx_tokens < 8192
    assert lowered.reasons[0].startswith("context lowered from 8192")
    (asked,) = vllm_candidates(facts_of(LLAMA_8B, 19.5), VllmWants(ctx_tokens=8192), [tight], HOST)
    assert (asked.verdict, asked.ctx_tokens, asked.max_ctx_tokens) == ("does-not-fit", 8192, lowered.ctx_tokens)
    assert "KV cache for one request" in asked.reasons[0]


def test_users_who_must_wait_are_counted() -> None:
    (candidate,) = vllm_candidates(EIGHT, VllmWants(parallel=16, ctx_tokens=8192), [card(24, 23.5)], HOST)
    assert candidate.verdict == "fits", "vLLM queues what does not fit at once"
    assert f"room for 5 of 16 users at {candidate.ctx_tokens} tokens; the others wait" in candidate.reasons
    assert planned_kv_tokens(candidate, EIGHT) // 8192 == 5


@pytest.mark.parametrize("facts", [EIGHT, THIRTY, facts_of(GPT_OSS_20B, 13.7)], ids=["8B", "30B", "windows"])
@pytest.mark.parametrize("size", [1, 2])
def test_the_longest_context_fits_and_no_longer_one_does(facts: ModelFacts, size: int) -> None:
    gpus = [card(20, 19, index) for index in range(size)]
    wants = VllmWants(tensor_parallel=size, ctx_tokens=2048)
    longest = vllm_candidates(facts, wants, gpus, HOST)[0].max_ctx_tokens
    assert longest
    verdicts = [
        vllm_candidate(facts, wants, gpus, HOST, tokens, tensor_parallel=size).verdict
        for tokens in (longest, longest + 16)
    ]
    assert verdicts[0] == "fits"
    assert verdicts[1] != "fits"


def test_fp8_doubles_the_context() -> None:
    plain, half = (
        vllm_candidates(EIGHT, VllmWants(kv_type_k=kind, kv_type_v=kind), [card(24, 23.5)], HOST)[0]
        for kind in ("f16", "fp8")
    )
    assert plain.max_ctx_tokens
    assert half.max_ctx_tokens == pytest.approx(2 * plain.max_ctx_tokens, abs=32)


def test_cards_of_a_group_hold_what_the_smallest_can() -> None:
    gpus = [card(24, 23.5, 0), card(16, 15.5, 1)]
    candidate = vllm_candidate(EIGHT, VllmWants(tensor_parallel=2), gpus, HOST, 8192, tensor_parallel=2)
    assert len({device.kv_bytes for device in candidate.devices}) == 1
    assert any("16.0 GiB of up to 24.0 GiB is used" in reason for reason in candidate.reasons)


def test_stages_hold_the_whole_model_once_and_the_larger_card_more() -> None:
    (candidate, *_) = planned(SEVENTY, "4090+3090+4080")
    first, second, third = candidate.devices
    assert [device.first_layer for device in candidate.devices] == [0, first.layers, first.layers + second.layers]
    assert first.layers + second.layers + third.layers == 80
    assert third.layers < min(first.layers, second.layers)
    assert [device.head for device in candidate.devices] == [False, False, True]
    launched = build_launch(candidate, SERVING)
    counts = [int(count) for count in launched.env["VLLM_PP_LAYER_PARTITION"].split(",")]
    assert counts == [device.layers for device in candidate.devices]
    total = sum(device.weights_bytes for device in candidate.devices)
    assert total == pytest.approx(SEVENTY.file_bytes, rel=1e-6)


@pytest.mark.parametrize(
    ("machine", "wants", "bound"),
    [
        pytest.param("4090", VllmWants(), 67.0, id="one card"),
        pytest.param("2x4090", VllmWants(), 133.9, id="two at once, each reads half"),
        pytest.param("2x4090", VllmWants(pipeline_parallel=2), 67.0, id="two in turn"),
        pytest.param("4090+4080", VllmWants(split_mode="tensor"), 95.2, id="the slower one decides"),
        pytest.param("4x4090", VllmWants(replicas=2), 133.9, id="replicas speed nobody up"),
    ],
)
def test_the_bound(machine: str, wants: VllmWants, bound: float) -> None:
    assert planned(EIGHT, machine, wants)[0].speed.bound_tok_s == pytest.approx(bound, abs=0.05)


def test_an_unknown_bandwidth_bounds_nothing() -> None:
    gpus = [replace(card(24, 23.5, i), bandwidth_gb_s=None if i else 1000.0) for i in range(2)]
    found = {len(each.devices): each.speed for each in vllm_candidates(EIGHT, VllmWants(), gpus, HOST)}
    assert found[1].bound_tok_s
    assert found[2] == Speed(unknown="the memory bandwidth of gpu1 (card) is unknown")


def test_an_unknown_memory_is_no_ground_to_plan_on() -> None:
    (candidate,) = vllm_candidates(EIGHT, VllmWants(), [replace(card(24, 23), total_bytes=None)], HOST)
    assert candidate.reasons == ("gpu0's memory is unknown",)


def test_equal_cards_that_differ_in_memory_are_still_read_at_once_where_nothing_else_fits() -> None:
    gpus = [card(total, free, index) for index, (total, free) in enumerate([(17, 15), (16, 6), (16, 14.5)])]
    best = vllm_candidates(EIGHT, VllmWants(), gpus, HOST)[0]
    assert (best.verdict, best.tensor_parallel, [device.gpu for device in best.devices]) == ("fits", 2, [0, 2])


@pytest.mark.parametrize(
    ("parallel", "replicas", "each_gib"),
    [
        pytest.param(3, 1, 2, id="three users of one replica: 3 x 8192 tokens of 64 KiB are 1.5 GiB on each"),
        pytest.param(6, 2, 2, id="six of two replicas are three of each"),
        pytest.param(5, 2, 2, id="one replica serves three of five"),
        pytest.param(2, 2, 1, id="one user for each"),
    ],
)
def test_the_cpu_build_takes_whole_gibibytes_for_each_worker(parallel: int, replicas: int, each_gib: int) -> None:
    wants = VllmWants(tensor_parallel=2, ctx_tokens=8192, parallel=parallel, replicas=replicas)
    (candidate,) = vllm_candidates(EIGHT, wants, (), HOST)
    assert (candidate.verdict, candidate.devices) == ("fits", ())
    assert candidate.host.kv_bytes == replicas * 2 * each_gib * GIB
    assert planned_kv_tokens(candidate, EIGHT) == each_gib * GIB // 65536


def test_the_cpu_build_counts_the_memory_that_is_available() -> None:
    (large,) = vllm_candidates(SEVENTY, VllmWants(), (), replace(HOST, ram_available_bytes=30 * GIB))
    assert large.verdict == "does-not-fit"
    assert "available" in large.reasons[0]


def test_stages_with_sliding_windows_get_the_blocks_that_all_have_room_for() -> None:
    gpus = [card(16, 15.5, 0), card(24, 11.0, 1)]
    found = vllm_candidates(facts_of(GPT_OSS_20B, 12.8), VllmWants(ctx_tokens=100_000, pipeline_parallel=2), gpus, HOST)
    (pipeline,) = [each for each in found if each.pipeline_parallel == 2]
    assert pipeline.verdict == "does-not-fit"
    assert "KV cache for one request, and" in pipeline.reasons[0]
    assert pipeline.short_bytes > 0


@settings(deadline=None)
@given(
    st.sampled_from([EIGHT, SEVENTY, THIRTY, facts_of(GPT_OSS_20B, 13.7)]),
    st.lists(st.tuples(st.integers(4, 96), st.floats(0.0, 1.0)), min_size=1, max_size=4),
    st.sampled_from([None, 2048, 8192, 100_000]),
    st.integers(1, 8),
)
def test_what_fits_fits(
    facts: ModelFacts, memory: list[tuple[int, float]], ctx_tokens: int | None, parallel: int
) -> None:
    gpus = [card(total, 0.97 * total * free, index) for index, (total, free) in enumerate(memory)]
    wants = VllmWants(ctx_tokens=ctx_tokens, parallel=parallel)
    for candidate in vllm_candidates(facts, wants, gpus, HOST):
        if candidate.verdict != "fits":
            assert candidate.reasons
            continue
        taken = share(candidate)
        assert taken
        assert taken <= 0.90
        assert ctx_tokens in (None, candidate.ctx_tokens)
        assert candidate.max_ctx_tokens
        for device in candidate.devices:
            total = int(visible_bytes(device.card_bytes or 0) * taken)
            assert device.total_bytes <= total <= device.free_bytes - wants.headroom_bytes
            assert device.compute_bytes == OVERHEAD_BYTES
            own = facts.layers[device.first_layer : device.first_layer + device.layers]
            assert device.kv_bytes >= request_bytes(own, candidate.tensor_parallel, "f16", candidate.ctx_tokens)
