"""Plans: their verdicts, their arithmetic, what they never do, and the ways out they propose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise, zip_longest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgpu.machine.simulate import simulate
from mgpu.machine.snapshot import Gpu, Host, Machine
from mgpu.models.facts import ModelFacts
from mgpu.models.shape import facts_from_shape
from mgpu.planning.candidates import Candidate, layer_split, place_layers
from mgpu.planning.plan import Plan, make_plan
from mgpu.planning.predicted import predicted
from mgpu.planning.speed import Speed
from mgpu.planning.wants import Wants
from mgpu.units import GIB, MIB
from tests.fakes.shapes import SHAPES

GRANULE = 256


@cache
def facts(model: str, quantisation: str = "Q4_K_M") -> ModelFacts:
    return facts_from_shape(model, SHAPES[model], quantisation)


def cards(*free_gib: float, bandwidths_gb_s: Sequence[float | None] = ()) -> tuple[Gpu, ...]:
    return tuple(
        Gpu(
            index=index,
            vendor="nvidia",
            name="card",
            total_bytes=round((free + 0.5) * GIB),
            free_bytes=round(free * GIB),
            bandwidth_gb_s=bandwidth,
            engine_devices=(f"CUDA{index}",),
        )
        for index, (free, bandwidth) in enumerate(zip_longest(free_gib, bandwidths_gb_s, fillvalue=1000.0))
    )


def machine_of(gpus: Sequence[Gpu], ram_gib: float | None = None) -> Machine:
    ram = None if ram_gib is None else round(ram_gib * GIB)
    host = Host(ram_bytes=ram, ram_available_bytes=ram)
    return Machine(captured_at="2025-01-01T00:00:00Z", source="simulated", host=host, gpus=tuple(gpus))


def planned(model: str, machine: Machine | str, wants: Wants | None = None, quantisation: str = "Q4_K_M") -> Plan:
    machine = simulate(machine) if isinstance(machine, str) else machine
    return make_plan(facts(model, quantisation), machine, machine.gpus, wants or Wants())


def test_70b_in_four_bits_fits_two_4090() -> None:
    plan = planned("llama-3.3-70b", "2x4090", Wants(ctx_tokens=8192))
    assert (plan.best, plan.chosen.verdict, plan.chosen.reasons, plan.fixes) == (0, "fits", (), ())
    assert [f"{device.total_bytes / GIB:.1f}" for device in plan.chosen.devices] == ["21.7", "21.6"]
    assert [device.layers for device in plan.chosen.devices] == [41, 39]


@pytest.mark.parametrize(
    ("model", "quantisation", "verdict"),
    [
        pytest.param("llama-3.1-8b", "F16", "fits", id="8B in 16 bits"),
        pytest.param("gpt-oss-20b", "MXFP4", "fits", id="20B mixture in 4 bits"),
        pytest.param("qwen3-30b-a3b", "Q8_0", "fits", id="30B mixture in 8 bits"),
        pytest.param("gemma-3-27b", "Q8_0", "fits", id="27B in 8 bits"),
        pytest.param("qwen3-32b", "Q8_0", "fits", id="32B in 8 bits"),
        pytest.param("mixtral-8x7b", "Q4_K_M", "fits", id="8x7B in 4 bits"),
        pytest.param("mixtral-8x7b", "Q8_0", "does-not-fit", id="8x7B in 8 bits"),
        pytest.param("llama-3.3-70b", "Q4_K_M", "does-not-fit", id="70B in 4 bits"),
        pytest.param("gpt-oss-120b", "MXFP4", "does-not-fit", id="120B mixture in 4 bits"),
    ],
)
def test_known_models_on_a_4090_and_a_4080(model: str, quantisation: str, verdict: str) -> None:
    chosen = planned(model, "4090+4080", Wants(ctx_tokens=8192), quantisation).chosen
    assert chosen.verdict == verdict
    larger, smaller = chosen.devices
    assert larger.layers > smaller.layers > 0


def test_what_does_not_fit_says_by_how_much_and_where() -> None:
    plan = planned("llama-3.3-70b", "2x4090", Wants(ctx_tokens=8192), "Q8_0")
    assert plan.best is None
    over = [256 * MIB - device.spare_bytes for device in plan.chosen.devices]
    assert plan.chosen.short_bytes == sum(over)
    assert plan.chosen.short_bytes / GIB == pytest.approx(26.6, abs=0.05)
    (reason,) = plan.chosen.reasons
    assert reason == (
        "73.6 GiB needed on the cards, 47.0 GiB free: short on gpu0 by 13.6 GiB, gpu1 by 13.0 GiB "
        "(0.25 GiB headroom on each included)"
    )


@pytest.mark.parametrize(
    ("total_gib", "verdict", "reasons"),
    [
        pytest.param(24, "fits", ("free memory of gpu0 is unknown: planned on its whole memory",), id="free unknown"),
        pytest.param(None, "does-not-fit", ("memory of gpu0 is unknown",), id="all unknown"),
    ],
)
def test_unknown_memory_is_said_and_not_planned_as_none(
    total_gib: int | None, verdict: str, reasons: tuple[str, ...]
) -> None:
    total_bytes = None if total_gib is None else total_gib * GIB
    card = replace(cards(20)[0], total_bytes=total_bytes, free_bytes=None)
    chosen = planned("llama-3.1-8b", machine_of([card]), Wants(ctx_tokens=8192)).chosen
    assert (chosen.verdict, chosen.reasons) == (verdict, reasons)


def test_405b_never_fits_four_4090_whatever_the_context() -> None:
    wants = Wants(ctx_tokens=GRANULE, kv_type_k="q4_0", kv_type_v="q4_0", headroom_bytes=0)
    plan = planned("llama-3.1-405b", "4x4090", wants)
    assert (plan.best, plan.chosen.verdict, plan.chosen.max_ctx_tokens) == (None, "does-not-fit", 0)


WANTS = st.builds(
    Wants,
    ctx_tokens=st.integers(1, 40_000),
    parallel=st.integers(1, 6),
    kv_type_k=st.sampled_from(("f16", "q8_0")),
    flash_attention=st.sampled_from(("auto", "off")),
    headroom_bytes=st.integers(0, GIB),
    kv_unified=st.booleans(),
    kv_on_host=st.booleans(),
    swa_full=st.booleans(),
    cpu_moe_layers=st.sampled_from((0, 0, 7, 1000)),
    offload=st.booleans(),
)
MODELS = st.builds(facts, st.sampled_from(sorted(SHAPES)))
FREE_GIB = st.lists(st.one_of(st.floats(0, 3), st.floats(4, 90)), min_size=1, max_size=4)
HOST = st.builds(Host, ram_available_bytes=st.one_of(st.none(), st.integers(0, 400 * GIB)))


@given(model=MODELS, wants=WANTS, free_gib=FREE_GIB, host=HOST)
@settings(max_examples=150, deadline=None)
def test_every_ledger_adds_up(model: ModelFacts, wants: Wants, free_gib: list[float], host: Host) -> None:
    gpus = cards(*free_gib)
    candidate = layer_split(model, wants, gpus, host, wants.ctx_tokens or 0)
    devices, on_host = candidate.devices, candidate.host

    used = [device for device in devices if not device.idle]
    ends = [on_host.layers, *(device.first_layer + device.layers for device in used)]
    assert [device.first_layer for device in used] == ends[:-1]
    assert on_host.layers + sum(device.layers for device in devices) == len(model.layers)
    assert [device.head for device in used] == [False] * (len(used) - 1) + [True] * bool(used)

    weights = model.embedding_bytes + model.other_bytes + sum(layer.weights_bytes for layer in model.layers)
    head = 0 if model.tied and not used else model.head_bytes  # tied and on the host: the embedding itself
    assert on_host.weights_bytes + sum(device.weights_bytes for device in devices) == weights + head

    for device in devices:
        parts = (device.weights_bytes, device.kv_bytes, device.compute_bytes, device.runtime_bytes)
        assert device.total_bytes == sum(parts)
        assert device.idle == (device.total_bytes == 0)
        assert device.total_bytes + device.spare_bytes == device.free_bytes
        assert min(parts) >= 0
    assert on_host.total_bytes == on_host.weights_bytes + on_host.kv_bytes + on_host.compute_bytes

    short = sum(max(0, wants.headroom_bytes - device.spare_bytes) for device in used)
    short += max(0, -(on_host.spare_bytes or 0))
    assert candidate.short_bytes == short
    fits = "fits-with-offload" if on_host.layers or on_host.expert_layers else "fits"
    assert candidate.verdict == ("does-not-fit" if short else fits)


@given(model=MODELS, wants=WANTS, free_gib=FREE_GIB, more_tokens=st.integers(1, 40_000))
@settings(max_examples=100, deadline=None)
def test_more_context_never_takes_less_memory(
    model: ModelFacts, wants: Wants, free_gib: list[float], more_tokens: int
) -> None:
    gpus, ctx_tokens = cards(*free_gib), wants.ctx_tokens or 0
    wants = replace(wants, tensor_split=(1.0,) * len(gpus))
    less = place_layers(model, wants, gpus, Host(), ctx_tokens, host_units=0)
    more = place_layers(model, wants, gpus, Host(), ctx_tokens + more_tokens, host_units=0)
    assert all(one <= other for one, other in zip(totals(less), totals(more), strict=True))


def totals(candidate: Candidate) -> list[int]:
    return [*(device.total_bytes for device in candidate.devices), candidate.host.total_bytes]


def test_a_card_that_drives_a_display_keeps_more_free() -> None:
    gpus = tuple(replace(gpu, display=gpu.index == 0) for gpu in cards(3, 3))
    left = [
        [device.spare_bytes for device in planned("llama-3.1-8b", machine_of(gpus), wants).chosen.devices]
        for wants in (Wants(ctx_tokens=4096, offload=True), Wants(ctx_tokens=4096, offload=True, headroom_bytes=0))
    ]
    assert left[0][0] >= GIB > left[0][1] >= 256 * MIB
    assert left[1][0] < GIB
    (short,) = planned("llama-3.1-8b", machine_of(gpus[:1]), Wants(ctx_tokens=4096)).candidates
    assert short.short_bytes == GIB - short.devices[0].spare_bytes


@given(model=MODELS, wants=WANTS, free_gib=FREE_GIB, larger=st.integers(0, 3), by_gib=st.floats(0, 40))
@settings(max_examples=150, deadline=None)
def test_a_larger_card_never_turns_fits_into_does_not_fit(
    model: ModelFacts, wants: Wants, free_gib: list[float], larger: int, by_gib: float
) -> None:
    ctx_tokens = wants.ctx_tokens or 0
    before = layer_split(model, wants, cards(*free_gib), Host(), ctx_tokens)
    free_gib[larger % len(free_gib)] += by_gib
    after = layer_split(model, wants, cards(*free_gib), Host(), ctx_tokens)
    ranks = ("fits", "fits-with-offload", "does-not-fit")
    assert ranks.index(after.verdict) <= ranks.index(before.verdict)
    assert after.host.layers <= before.host.layers


@given(model=MODELS, wants=WANTS, free_gib=FREE_GIB)
@settings(max_examples=50, deadline=None)
def test_swapping_equal_cards_changes_nothing(model: ModelFacts, wants: Wants, free_gib: list[float]) -> None:
    gpus = cards(*free_gib, free_gib[-1])
    ctx_tokens = wants.ctx_tokens or 0
    swapped = (*gpus[:-2], replace(gpus[-1], index=gpus[-2].index), replace(gpus[-2], index=gpus[-1].index))
    swapped = tuple(replace(gpu, engine_devices=(f"CUDA{gpu.index}",)) for gpu in swapped)
    assert layer_split(model, wants, swapped, Host(), ctx_tokens) == layer_split(model, wants, gpus, Host(), ctx_tokens)


@given(model=MODELS, wants=WANTS, rates=st.lists(st.floats(50, 8000), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_the_bound_is_never_above_bandwidth_over_bytes(model: ModelFacts, wants: Wants, rates: list[float]) -> None:
    gpus = cards(*[900] * len(rates), bandwidths_gb_s=rates)
    candidate = layer_split(model, replace(wants, offload=False), gpus, Host(), wants.ctx_tokens or 0)
    bound = predicted(candidate, model, gpus, Host()).speed.bound_tok_s
    if candidate.host.expert_layers or wants.kv_on_host:
        assert bound is None  # what is in the host's memory is read at an unknown speed
        return
    used = model.experts_used / model.experts if model.experts else 0
    read_bytes = sum(each.weights_bytes - each.expert_bytes * (1 - used) for each in model.layers) + model.head_bytes
    assert bound is not None
    assert min(rates) * 1e9 / read_bytes <= bound * (1 + 1e-9)
    assert bound <= max(rates) * 1e9 / read_bytes * (1 + 1e-9)


@pytest.mark.parametrize("bandwidth_gb_s", [None, 0.0])
def test_no_speed_without_a_bandwidth_and_the_card_is_named(bandwidth_gb_s: float | None) -> None:
    speed = planned("llama-3.1-8b", machine_of(cards(24, bandwidths_gb_s=[bandwidth_gb_s]))).chosen.speed
    assert speed == Speed(unknown="the memory bandwidth of gpu0 (card) is unknown")


@pytest.mark.parametrize(
    ("model", "machine", "wants"),
    [
        pytest.param("llama-3.3-70b", "2x4090", Wants(), id="70B"),
        pytest.param("llama-3.3-70b", "2x4090", Wants(parallel=4), id="for each of four users"),
        pytest.param("llama-3.3-70b", "2x4090", Wants(kv_type_k="q8_0", kv_type_v="q8_0"), id="quantised cache"),
        pytest.param("gemma-3-27b", "4090", Wants(), id="sliding windows"),
        pytest.param("qwen3-32b", "4090+4080", Wants(flash_attention="off"), id="without flash attention"),
        pytest.param("qwen3-32b", "4090+4080", Wants(tensor_split=(3, 1)), id="proportions given"),
        pytest.param("llama-3.1-8b", "4090+4080", Wants(ctx_tokens=1000), id="also when another context is asked for"),
    ],
)
def test_the_largest_context_fits_and_256_tokens_more_do_not(model: str, machine: str, wants: Wants) -> None:
    plan = planned(model, machine, wants)
    largest, gpus = plan.chosen.max_ctx_tokens, plan.machine.gpus
    assert largest is not None
    assert largest % GRANULE == 0
    assert layer_split(facts(model), wants, gpus, Host(), largest).verdict == "fits"
    if largest < (facts(model).context_length or 0):
        assert layer_split(facts(model), wants, gpus, Host(), largest + GRANULE).verdict == "does-not-fit"


def test_the_largest_context_is_at_most_what_the_model_was_trained_on() -> None:
    assert planned("llama-3.1-8b", "8xH100").chosen.max_ctx_tokens == 131072


def test_an_unset_context_is_lowered_with_a_reason() -> None:
    chosen = planned("qwen3-32b", machine_of(cards(12.0, 10.0))).chosen
    assert chosen.verdict == "fits"
    assert 2048 <= chosen.ctx_tokens < 8192
    assert chosen.ctx_tokens == chosen.max_ctx_tokens
    assert chosen.reasons[0] == f"context lowered from 8192 to {chosen.ctx_tokens} tokens, the most that fits"


def test_an_unset_context_is_not_more_than_the_model_knows() -> None:
    short = replace(facts("smollm2-135m"), context_length=2048)
    machine = simulate("4090")
    chosen = make_plan(short, machine, machine.gpus, Wants()).chosen
    assert (chosen.ctx_tokens, chosen.reasons) == (2048, ())


def test_a_context_that_was_set_is_never_lowered() -> None:
    plan = planned("qwen3-32b", machine_of(cards(12.0, 10.0)), Wants(ctx_tokens=8192))
    assert (plan.best, plan.chosen.verdict, plan.chosen.ctx_tokens) == (None, "does-not-fit", 8192)
    assert 2048 <= (plan.chosen.max_ctx_tokens or 0) < 8192


@pytest.mark.parametrize(
    ("model", "machine"),
    [
        pytest.param("llama-3.3-70b", "4090+4080", id="dense"),
        pytest.param("llama-3.1-8b", machine_of(cards(6.2)), id="a single layer"),
        pytest.param("qwen3-32b", machine_of(cards(0.1, 16)), id="a full card beside it"),
        pytest.param("gemma-3-27b", "4060", id="windows of unequal cost and a tied head"),
        pytest.param("gpt-oss-120b", "2x4090", id="mixture"),
        pytest.param("qwen3-30b-a3b", "4060", id="most experts of a mixture"),
        pytest.param("deepseek-v3", machine_of(cards(9)), id="all experts of a mixture, and layers"),
        pytest.param("llama-3.1-405b", "4090+4080", id="most of it on the host"),
        pytest.param("llama-3.1-405b", "4060", id="all but a few layers"),
    ],
)
def test_offload_keeps_the_fewest_layers_on_the_host(model: str, machine: Machine | str) -> None:
    allowed = Wants(ctx_tokens=8192, offload=True)
    plan = planned(model, machine, allowed)
    chosen, gpus = plan.chosen, plan.machine.gpus
    assert (plan.best, chosen.verdict) == (0, "fits-with-offload")
    layers = f"{chosen.host.layers} of {len(facts(model).layers)} layers"
    routed = f"the experts of the first {chosen.host.expert_layers} layers"
    kept = [*([layers] if chosen.host.layers else []), *([routed] if chosen.host.expert_layers else [])]
    assert chosen.reasons[0] == f"{' and '.join(kept)} stay in host memory: slow"
    assert chosen.speed.bound_tok_s is None
    assert chosen.devices
    experts = chosen.host.expert_layers
    for fewer in range(chosen.host.layers):
        tried = place_layers(facts(model), allowed, gpus, Host(), 8192, host_units=fewer, expert_layers=experts)
        assert tried.verdict == "does-not-fit"
    for fewer in range(0 if chosen.host.layers else experts):
        tried = place_layers(facts(model), allowed, gpus, Host(), 8192, host_units=0, expert_layers=fewer)
        assert tried.verdict == "does-not-fit"
    forbidden = planned(model, machine, replace(allowed, offload=False))
    assert (forbidden.best, forbidden.chosen.verdict, forbidden.chosen.host.layers) == (None, "does-not-fit", 0)


def test_experts_go_to_the_host_before_layers() -> None:
    chosen = planned("qwen3-30b-a3b", machine_of(cards(12), ram_gib=64), Wants(ctx_tokens=8192, offload=True)).chosen
    assert (chosen.verdict, chosen.host.layers) == ("fits-with-offload", 0)
    assert 0 < chosen.host.expert_layers < 48
    experts = sum(layer.expert_bytes for layer in facts("qwen3-30b-a3b").layers[: chosen.host.expert_layers])
    assert chosen.host.weights_bytes == facts("qwen3-30b-a3b").embedding_bytes + experts
    too_little = planned("qwen3-30b-a3b", machine_of(cards(12), ram_gib=4), Wants(ctx_tokens=8192, offload=True)).chosen
    assert (too_little.verdict, "in host memory" in too_little.reasons[-1]) == ("does-not-fit", True)


def test_experts_that_the_user_keeps_on_the_host_are_never_called_a_fit() -> None:
    chosen = planned("qwen3-30b-a3b", "4090", Wants(ctx_tokens=8192, cpu_moe_layers=10)).chosen
    assert (chosen.verdict, chosen.host.expert_layers, chosen.runs) == ("fits-with-offload", 10, True)
    dense = planned("llama-3.1-8b", "4090", Wants(ctx_tokens=8192, cpu_moe_layers=10)).chosen
    assert (dense.verdict, dense.host.expert_layers) == ("fits", 0)


@pytest.mark.parametrize("wants", [Wants(), Wants(split_mode="tensor")], ids=["layers", "tensors"])
def test_every_line_of_a_ledger_says_what_it_rests_on(wants: Wants) -> None:
    chosen = planned("llama-3.1-8b", "2x4090", wants).chosen
    assert {device.basis for device in chosen.devices} == {
        "weights: table, KV: formula, compute: formula, runtime: table"
    }
    assert chosen.host.basis == "weights: table, KV: formula, compute: formula"


def test_a_tensor_split_gives_each_card_its_part_of_every_layer() -> None:
    chosen = planned("llama-3.3-70b", "2x4090", Wants(ctx_tokens=8192, split_mode="tensor")).chosen
    assert (chosen.verdict, chosen.split_mode) == ("fits", "tensor")
    assert [(device.layers, device.head) for device in chosen.devices] == [(80, True)] * 2
    one, other = chosen.devices
    assert one.kv_bytes == other.kv_bytes
    whole = sum(layer.weights_bytes for layer in facts("llama-3.3-70b").layers) + facts("llama-3.3-70b").head_bytes
    assert 0 <= one.weights_bytes + other.weights_bytes - whole < 8 * MIB  # norms are held twice


def test_offload_is_not_used_where_all_fits() -> None:
    chosen = planned("llama-3.3-70b", "2x4090", Wants(offload=True)).chosen
    assert (chosen.verdict, chosen.host.layers) == ("fits", 0)


def test_a_card_that_computes_the_hosts_layers_needs_the_memory_for_it_with_the_head_alone_too() -> None:
    model, gpus = facts("llama-3.1-8b"), cards(24)
    alone, with_a_layer = (place_layers(model, Wants(), gpus, Host(), 8192, host_units=units) for units in (32, 31))
    assert (alone.devices[0].layers, alone.devices[0].head) == (0, True)
    # As a Vulkan device was seen to do: 135 MiB with `-ngl 1`, 2 and 3 alike.
    assert alone.devices[0].compute_bytes == with_a_layer.devices[0].compute_bytes
    assert 135 <= alone.devices[0].compute_bytes / MIB < 160


@pytest.mark.parametrize(
    ("gpus", "ram_gib", "wants", "verdict"),
    [
        pytest.param("none", 64, Wants(), "fits", id="the CPU has room"),
        pytest.param("none", 20, Wants(ctx_tokens=8192), "does-not-fit", id="the CPU has too little"),
        pytest.param("none", None, Wants(), "fits", id="unknown memory is not refused"),
        pytest.param("4060", 64, Wants(offload=True), "fits-with-offload", id="the host takes what the card cannot"),
        pytest.param("4060", 12, Wants(offload=True), "does-not-fit", id="the host cannot take it either"),
        pytest.param("4090", 0.1, Wants(), "does-not-fit", id="the embedding always stays on the host"),
        pytest.param("4090", 4, Wants(), "fits", id="a card alone needs little of the host"),
        pytest.param("4090", 4, Wants(kv_on_host=True, ctx_tokens=40960), "does-not-fit", id="a cache on the host"),
    ],
)
def test_host_memory_is_checked_where_it_is_known(gpus: str, ram_gib: float | None, wants: Wants, verdict: str) -> None:
    machine = machine_of(simulate(gpus).gpus, ram_gib)
    plan = planned("qwen3-32b", machine, wants)
    assert plan.chosen.verdict == verdict
    assert (plan.best is None) == (verdict == "does-not-fit")
    unchecked = "the host's memory is unknown, so it was not checked"
    assert (unchecked in plan.chosen.reasons) == (ram_gib is None)
    if verdict == "does-not-fit":
        assert "in host memory" in plan.chosen.reasons[-1]
        assert plan.chosen.short_bytes == -(plan.chosen.host.spare_bytes or 0)


def test_on_the_cpu_all_layers_are_the_hosts() -> None:
    chosen = planned("llama-3.1-8b", "none").chosen
    assert (chosen.devices, chosen.host.layers, chosen.split_mode) == ((), 32, "none")
    assert chosen.host.kv_bytes == 1 * GIB


@pytest.mark.parametrize(
    ("split", "layers"),
    [
        pytest.param((3, 1), [61, 19], id="three to one"),
        pytest.param((1, 3), [21, 59], id="against what the cards could take"),
        pytest.param((1, 0), [80, 0], id="nothing for the second"),
    ],
)
def test_proportions_are_obeyed_whether_they_fit_or_not(split: tuple[float, ...], layers: list[int]) -> None:
    plan = planned("llama-3.3-70b", "4090+4080", Wants(tensor_split=split))
    assert [device.layers for device in plan.chosen.devices] == layers
    assert len(plan.candidates) == 1


@pytest.mark.parametrize(
    ("free_gib", "idle"),
    [
        pytest.param((24, 0.3, 24), [1], id="a full card between two others"),
        pytest.param((0, 24, 24), [0], id="the first card"),
        pytest.param((24, 24, 1.0), [2], id="the last card"),
        pytest.param((24, 0.3), [1], id="the only other card"),
    ],
)
def test_a_full_card_holds_nothing_and_spoils_nothing(free_gib: tuple[float, ...], idle: list[int]) -> None:
    model, wants = facts("qwen3-32b"), Wants(ctx_tokens=8192)
    chosen = planned("qwen3-32b", machine_of(cards(*free_gib)), wants).chosen
    assert chosen.verdict == "fits"
    assert [device.gpu for device in chosen.devices if device.idle] == idle
    assert chosen.reasons == (f"gpu{idle[0]} would hold nothing",)
    others = layer_split(model, wants, cards(*(free for free in free_gib if free == 24)), Host(), 8192)
    used = [device.compute_bytes for device in chosen.devices if not device.idle]
    assert used == [device.compute_bytes for device in others.devices]


def test_a_model_that_fits_one_card_is_offered_on_it() -> None:
    plan = planned("llama-3.1-8b", "4080+4090")
    both, cut, single = plan.candidates
    assert (plan.best, len(both.devices)) == (0, 2)
    assert (cut.split_mode, cut.verdict, len(cut.devices)) == ("tensor", "fits", 2)
    assert [device.name for device in single.devices] == ["NVIDIA GeForce RTX 4090"]


@pytest.mark.parametrize(
    ("model", "offload", "verdict", "card"),
    [
        pytest.param("llama-3.1-8b", False, "fits", 0, id="the faster one"),
        pytest.param("qwen3-32b", False, "fits", 1, id="the only one that can hold it"),
        pytest.param("llama-3.3-70b", False, "does-not-fit", 1, id="the one that misses it by least"),
        pytest.param("llama-3.3-70b", True, "fits-with-offload", 1, id="the one that leaves least to the host"),
    ],
)
def test_without_a_split_one_card_is_used(model: str, offload: bool, verdict: str, card: int) -> None:
    machine = machine_of(cards(15, 24, bandwidths_gb_s=(1000, 500)))
    plan = planned(model, machine, Wants(split_mode="none", offload=offload, tensor_split=(1, 1)))
    assert len(plan.candidates) == 1
    assert (plan.chosen.verdict, plan.chosen.split_mode) == (verdict, "none")
    assert [device.gpu for device in plan.chosen.devices] == [card]
    assert sum(device.layers for device in plan.chosen.devices) + plan.chosen.host.layers == len(facts(model).layers)


def test_a_layer_split_that_was_asked_for_has_no_rivals() -> None:
    plan = planned("llama-3.1-8b", "2x4090", Wants(split_mode="layer"))
    assert [candidate.split_mode for candidate in plan.candidates] == ["layer"]


@pytest.mark.parametrize(
    ("model", "gpus", "wants", "changes"),
    [
        pytest.param(
            "qwen3-32b",
            cards(12.0, 10.0),
            Wants(ctx_tokens=8192),
            ["--ctx 6400", "--kv-type q8_0", "--quant Q3_K_M", "1 more card", "--offload allow"],
            id="mildest first",
        ),
        pytest.param(
            "qwen3-32b",
            cards(12.0, 3.0),
            Wants(),
            ["1 more card", "--offload allow", "--quant Q2_K"],
            id="far too small: what lowers the context tacitly comes last",
        ),
        pytest.param("qwen3-32b", cards(4.0), Wants(), ["6 more card", "--offload allow"], id="one small card"),
        pytest.param(
            "qwen3-32b",
            cards(24.0, 24.0),
            Wants(headroom_bytes=20 * GIB),
            ["without --headroom", "--offload allow", "4 more card"],
            id="a headroom that was asked for",
        ),
        pytest.param("qwen3-32b", cards(24.0), Wants(), [], id="nothing to mend"),
    ],
)
def test_fixes_are_planned_again_and_fit(model: str, gpus: tuple[Gpu, ...], wants: Wants, changes: list[str]) -> None:
    others = [facts(model, quantisation) for quantisation in ("Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M")]
    plan = make_plan(facts(model), machine_of(gpus), gpus, wants, other_quantisations=others)
    assert [fix.change for fix in plan.fixes] == changes
    for fix in plan.fixes:
        assert fix.candidate.short_bytes == 0
        assert fix.candidate.verdict == ("fits-with-offload" if "offload" in fix.change else "fits")
        assert fix.candidate.quant == (fix.change.split()[1] if "quant" in fix.change else "Q4_K_M")


def test_offload_is_no_way_out_where_the_host_is_too_small() -> None:
    plan = planned("qwen3-32b", machine_of(cards(4.0), ram_gib=8))
    assert [fix.change for fix in plan.fixes] == ["6 more card"]


def test_cards_that_lie_idle_are_a_way_out_before_more_are_bought() -> None:
    machine = machine_of(cards(12.0, 12.0, 12.0))
    for source, change in (("probed", "--gpus gpu0,gpu1"), ("simulated", "--gpus gpu0,gpu1")):
        plan = make_plan(facts("qwen3-32b"), replace(machine, source=source), machine.gpus[:1], Wants(ctx_tokens=1024))
        assert [fix.change for fix in plan.fixes] == [change, "--offload allow"]
        assert len(plan.fixes[0].candidate.devices) == 2
    probed = replace(machine_of(cards(12.0)), source="probed")
    plan = make_plan(facts("qwen3-32b"), probed, probed.gpus, Wants(ctx_tokens=1024))
    assert [fix.change for fix in plan.fixes] == ["--offload allow"]


def test_plans_keep_their_order_of_cards() -> None:
    candidate = planned("llama-3.3-70b", "4090+4080+4090").chosen
    assert [device.gpu for device in candidate.devices] == [0, 1, 2]
    assert all(one.first_layer < other.first_layer for one, other in pairwise(candidate.devices))
