"""A candidate's speed: from what it puts where to what its engine reads, and when nothing is predicted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mgpu.machine.simulate import simulate
from mgpu.machine.snapshot import Gpu, Host, Link
from mgpu.models.facts import ModelFacts
from mgpu.models.shape import facts_from_shape
from mgpu.planning.candidates import Candidate, layer_split
from mgpu.planning.predicted import predicted, work_of
from mgpu.planning.speed import Range, Speed, floored, interval
from mgpu.planning.vllm_memory import VllmWants
from mgpu.planning.vllm_placement import vllm_candidate
from mgpu.planning.wants import Wants
from tests.fakes.shapes import SHAPES

HOST = Host(cores=16)


def facts(model: str = "llama-3.3-70b", quantisation: str = "Q4_K_M") -> ModelFacts:
    return facts_from_shape(model, SHAPES[model], quantisation)


def llama_cpp(machine: str, wants: Wants | None = None, model: ModelFacts | None = None, ctx: int = 8192) -> Candidate:
    model, gpus = model or facts(), simulate(machine).gpus
    return predicted(layer_split(model, wants or Wants(), gpus, HOST, ctx), model, gpus, HOST)


def vllm(machine: str, size: int, stages: int = 1, wants: VllmWants | None = None) -> Candidate:
    gpus = simulate(machine).gpus
    shaped = vllm_candidate(
        facts(), wants or VllmWants(), gpus, HOST, 4096, tensor_parallel=size, pipeline_parallel=stages
    )
    return predicted(shaped, facts(), gpus, HOST)


def decode(candidate: Candidate) -> Range:
    assert candidate.speed.decode_tok_s
    return candidate.speed.decode_tok_s


def test_a_layer_split_of_70b_over_two_4090_holds_what_was_measured() -> None:
    speed = llama_cpp("2x4090", ctx=512).speed
    assert speed.decode_tok_s
    assert speed.decode_tok_s.low <= 19.06 <= speed.decode_tok_s.high
    assert speed.basis == "1008 GB/s ÷ 41.9 GB = 24.0 at most, 2 cards in turn; llama.cpp reaches 0.72-0.93"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(llama_cpp("2x4090", Wants(split_mode="tensor")), llama_cpp("2x4090"), id="cards at once, in turn"),
        pytest.param(llama_cpp("2x5090"), llama_cpp("2x4090"), id="a faster memory"),
        pytest.param(llama_cpp("5090+4090"), llama_cpp("2x4090"), id="one of two cards is faster"),
        pytest.param(llama_cpp("2x4090", ctx=1024), llama_cpp("2x4090"), id="less context"),
        pytest.param(
            llama_cpp("2x4090", Wants(kv_type_k="q8_0", kv_type_v="q8_0")), llama_cpp("2x4090"), id="a smaller cache"
        ),
        pytest.param(vllm("4x5090", 4), vllm("4x5090", 1, 4), id="tensor parallel, a pipeline"),
        pytest.param(vllm("4x5090", 4), vllm("4x5090", 2, wants=VllmWants(replicas=2)), id="all cards for one"),
        pytest.param(llama_cpp("2x4090"), llama_cpp("4090", Wants(offload=True)), id="layers on a card, on the host"),
    ],
)
def test_one_users_speed_is_higher_with(one: Candidate, other: Candidate) -> None:
    assert decode(one).likely > decode(other).likely


def test_replicas_serve_more_users_than_one() -> None:
    wants = VllmWants(parallel=16, ctx_tokens=1024)
    one, two = vllm("4x5090", 2, 2, wants), vllm("4x5090", 2, wants=replace(wants, replicas=2))
    assert one.speed.aggregate_tok_s
    assert two.speed.aggregate_tok_s
    assert two.speed.aggregate_tok_s.likely > one.speed.aggregate_tok_s.likely


def test_users_are_capped_by_the_cache() -> None:
    wants = VllmWants(parallel=64)
    candidate = vllm("2x5090", 2, wants=wants)
    speed = candidate.speed
    assert speed.aggregate_users is not None
    assert 0 < speed.aggregate_users < 64
    assert f"{speed.aggregate_users} of 64 users" in " ".join(candidate.reasons)


def test_cards_beyond_the_kv_heads_read_no_less_of_the_cache() -> None:
    gpus = simulate("16x4090").gpus
    eight, sixteen = (
        work_of(vllm_candidate(facts(), VllmWants(), gpus[:n], HOST, 4096, tensor_parallel=n), facts(), gpus[:n])
        for n in (8, 16)
    )
    assert eight.stages[0].shares[0].kv_bytes == pytest.approx(sixteen.stages[0].shares[0].kv_bytes)


def test_experts_on_the_host_are_not_read_on_the_cards() -> None:
    model = facts("gpt-oss-120b", "MXFP4")
    gpus = simulate("2x4090").gpus
    candidate = layer_split(model, Wants(offload=True), gpus, HOST, 8192)
    assert candidate.host.expert_layers
    work = work_of(candidate, model, gpus)
    assert work.host
    on_host = sum(layer.expert_bytes for layer in model.layers[: candidate.host.expert_layers])
    assert work.host.expert_bytes == pytest.approx(on_host * model.experts_used / model.experts)
    on_cards = sum(share.expert_bytes for stage in work.stages for share in stage.shares)
    assert on_cards + on_host == sum(layer.expert_bytes for layer in model.layers)
    assert "DDR5 assumed (60-75 GB/s)" in (predicted(candidate, model, gpus, HOST).speed.basis or "")


@pytest.mark.parametrize(
    ("model", "quantisation", "head_is_cut"),
    [
        pytest.param("llama-3.3-70b", "Q4_K_M", True, id="a head of its own is cut"),
        pytest.param("gemma-3-27b", "Q4_K_M", False, id="a head that is the embedding is whole on each card"),
        pytest.param("gpt-oss-120b", "MXFP4", True, id="experts"),
    ],
)
@pytest.mark.parametrize("proportions", [None, (2.0, 3.0)])
def test_in_a_tensor_split_each_card_reads_what_it_holds(
    model: str, quantisation: str, head_is_cut: bool, proportions: tuple[float, ...] | None
) -> None:
    known = facts(model, quantisation)
    gpus = simulate("2xA100-80").gpus
    candidate = layer_split(known, Wants(split_mode="tensor", tensor_split=proportions), gpus, HOST, 8192)
    (stage,) = work_of(candidate, known, gpus).stages
    used = known.experts_used / known.experts if known.experts else 1.0
    for device, share in zip(candidate.devices, stage.shares, strict=True):
        assert share.weights_bytes == pytest.approx(device.weights_bytes - share.expert_bytes * (1 - used))
        if not any(layer.sliding_window for layer in known.layers):
            assert share.kv_bytes == pytest.approx(device.kv_bytes)
    repeated = sum(share.weights_bytes for share in stage.shares) - sum(
        layer.weights_bytes - layer.expert_bytes * (1 - used) for layer in known.layers
    )
    assert repeated / known.head_bytes == pytest.approx(1 if head_is_cut else 2, rel=0.2)  # and norms and biases


def test_unequal_parts_of_a_tensor_split_wait_for_the_larger_one() -> None:
    even = llama_cpp("2x5090", Wants(split_mode="tensor"))
    uneven = llama_cpp("2x5090", Wants(split_mode="tensor", tensor_split=(2, 3)))
    assert decode(uneven).likely < decode(even).likely


@pytest.mark.parametrize(
    ("machine", "links", "expected"),
    [
        pytest.param("2x4090", (), "host", id="GeForce has no peer access"),
        pytest.param("2xL40S", (), "peer", id="a professional card has"),
        pytest.param("2xL40S", (Link(a=0, b=1, kind="PHB", p2p=False),), "host", id="unless the driver says no"),
        pytest.param("2x3090", (Link(a=0, b=1, kind="NVLink"),), "nvlink", id="a bridge"),
    ],
)
def test_cards_exchange_results_as_the_driver_says_or_the_maker_allows(
    machine: str, links: tuple[Link, ...], expected: str
) -> None:
    gpus = simulate(machine).gpus
    candidate = layer_split(facts("llama-3.1-8b"), Wants(), gpus, HOST, 8192)
    assert work_of(candidate, facts("llama-3.1-8b"), gpus, links).link == expected


def unknown(candidate: Candidate, gpus: tuple[Gpu, ...], host: Host) -> str | None:
    found = predicted(candidate, facts("llama-3.1-8b"), gpus, host).speed
    assert found == Speed(unknown=found.unknown)
    return found.unknown


def test_what_is_not_known_is_not_predicted_but_said() -> None:
    model, (card,) = facts("llama-3.1-8b"), simulate("4090").gpus
    strange = replace(card, name="RTX 9999", bandwidth_gb_s=None)
    on = layer_split(model, Wants(), [strange], HOST, 8192)
    assert unknown(on, (strange,), HOST) == "the memory bandwidth of gpu0 (RTX 9999) is unknown"
    aside = layer_split(model, Wants(kv_on_host=True), [card], HOST, 8192)
    assert "KV cache is in host memory" in (unknown(aside, (card,), HOST) or "")
    on_cpu = layer_split(model, Wants(), (), HOST, 8192)
    assert "2 cores" in (unknown(on_cpu, (), Host(cores=2)) or "")
    with_vllm = vllm_candidate(model, VllmWants(), (), HOST, 8192)
    assert "vLLM" in (unknown(with_vllm, (), HOST) or "")


def test_of_several_users_with_layers_on_the_host_it_is_said_why_nothing_is_predicted() -> None:
    for users, why in ((1, None), (8, "nobody measured several users at once with layers in host memory")):
        speed = llama_cpp("4090", Wants(offload=True, parallel=users), ctx=2048).speed
        assert speed.decode_tok_s
        assert speed.aggregate_tok_s is None
        assert speed.unknown == why
    assert llama_cpp("2x4090", Wants(parallel=8), ctx=512).speed.unknown is None


def test_what_cannot_run_has_no_speed() -> None:
    assert llama_cpp("4090").speed == Speed()
    assert vllm("3x4090", 3).speed == Speed()


@pytest.mark.parametrize(
    ("low", "high", "bound", "expected"),
    [
        pytest.param(16.3, 21.2, 24.04, "16-21", id="tens"),
        pytest.param(2.16, 3.44, None, "2.1-3.4", id="a few"),
        pytest.param(0.512, 0.92, None, "0.51-0.92", id="less than one"),
        pytest.param(153.0, 214.0, None, "150-210", id="hundreds"),
        pytest.param(1234.0, 5678.0, None, "1200-5700", id="thousands"),
        pytest.param(9.71, 12.4, None, "9.7-12", id="around ten"),
        pytest.param(20.1, 24.6, 24.6, "20-24", id="not above the bound"),
        pytest.param(20.1, 20.4, None, "20", id="the same"),
    ],
)
def test_rates_are_written_with_the_digits_that_count(
    low: float, high: float, bound: float | None, expected: str
) -> None:
    assert interval(Range(low=low, likely=(low + high) / 2, high=high), bound) == expected


@pytest.mark.parametrize(("bound", "expected"), [(24.09, "24.0"), (5.99, "5.9"), (123.9, "123")])
def test_a_bound_is_rounded_down(bound: float, expected: str) -> None:
    assert floored(bound) == expected
