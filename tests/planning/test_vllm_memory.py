"""vLLM's memory as planned, against what vLLM logged on cards (44 starts of versions 0.11 to 0.13)."""

from __future__ import annotations

import pytest

from mgpu.models.facts import Layer
from mgpu.models.hf import facts_from_config
from mgpu.planning.vllm_memory import (
    BLOCK_TOKENS,
    GRAPH_BYTES,
    VllmWants,
    kv_token_bytes,
    model_bytes,
    request_bytes,
    shard_bytes,
    stage_bytes,
)
from mgpu.planning.vllm_placement import planned_kv_tokens
from mgpu.units import GIB
from tests.models.test_hf import DEEPSEEK_V3, LLAMA_8B
from tests.planning.vllm_starts import BAR, EXCEPTIONS, Start, facts_of, on_cuda, planned, starts


@pytest.mark.parametrize("start", starts(), ids=lambda s: f"{s.gpu} {s.model} tp{s.tensor_parallel}")
def test_a_cache_of_known_size_holds_the_tokens_and_requests_vllm_says(start: Start) -> None:
    layers = facts_of(start.model).layers
    cache_bytes = start.kv_gib * GIB  # logged with two decimals
    tokens = cache_bytes / kv_token_bytes(layers, start.tensor_parallel, "f16")
    assert tokens == pytest.approx(start.kv_tokens, rel=0.003)
    requests = cache_bytes / request_bytes(layers, start.tensor_parallel, "f16", start.ctx_tokens)
    assert requests == pytest.approx(start.concurrency, rel=0.004)


@pytest.mark.parametrize("start", on_cuda(), ids=lambda s: f"{s.gpu} {s.model}")
def test_the_planned_cache_holds_what_vllm_logged(start: Start) -> None:
    candidate, facts = planned(start)
    assert model_bytes(facts) == pytest.approx(start.weights_gib * GIB, rel=1e-6)
    assert candidate.verdict == "fits"
    assert planned_kv_tokens(candidate, facts) == pytest.approx(start.kv_tokens, rel=EXCEPTIONS.get(start.name, BAR))


@pytest.mark.parametrize("start", on_cuda(), ids=lambda s: f"{s.gpu} {s.model}")
def test_with_its_graphs_inside_the_share_it_holds_less_and_never_more_than_was_logged(start: Start) -> None:
    candidate, facts = planned(start, enforce_eager=False)
    assert planned_kv_tokens(candidate, facts) < start.kv_tokens


def test_there_are_starts_to_compare_with() -> None:
    assert len(starts()) == 44
    assert len(on_cuda()) == 20
    dense = [start for start in on_cuda() if not facts_of(start.model).layers[0].sliding_window]
    assert len([start for start in dense if start.name not in EXCEPTIONS]) == len(dense) - 1 == 14


@pytest.mark.parametrize(
    ("model", "within"),
    [
        pytest.param("Meta-Llama-3.1-8B-Instruct", 0.01, id="plain"),
        pytest.param("Qwen3-14B-FP8-dynamic", 0.01, id="FP8"),
        pytest.param("Qwen3-Coder-30B-A3B-Instruct-GPTQ-4bit", 0.01, id="a mixture in four bits"),
        pytest.param("gpt-oss-20b", 0.035, id="MXFP4, which is padded"),
        pytest.param("gemma-3-12b-it-FP8-dynamic", 0.045, id="one that sees: every card has the whole eye"),
    ],
)
def test_two_cards_hold_half_each_and_a_little(model: str, within: float) -> None:
    of = {
        start.tensor_parallel: start.weights_gib for start in starts() if start.model == model and "r9700" in start.gpu
    }
    assert shard_bytes(round(of[1] * GIB), 2) == pytest.approx(of[2] * GIB, rel=within)


def test_latent_attention_is_held_by_every_card() -> None:
    facts = facts_from_config(DEEPSEEK_V3, GIB, name="r1", source="r1")
    assert kv_token_bytes(facts.layers, 1, "f16") == 70_272
    assert kv_token_bytes(facts.layers, 8, "f16") == 70_272


@pytest.mark.parametrize(
    ("tensor_parallel", "kv_type", "share"),
    [(1, "f16", 1), (2, "f16", 2), (8, "f16", 8), (16, "f16", 8), (2, "fp8", 4)],
)
def test_heads_are_dealt_to_the_cards_until_there_is_one_on_each(
    tensor_parallel: int, kv_type: str, share: int
) -> None:
    layers = facts_of("Meta-Llama-3.1-8B-Instruct").layers
    assert kv_token_bytes(layers, tensor_parallel, kv_type) == 131_072 // share


@pytest.mark.parametrize(
    ("window", "ctx_tokens", "held"),
    [
        pytest.param(None, 1, 16, id="a block at least"),
        pytest.param(None, 8192, 8192, id="all of it"),
        pytest.param(128, 1024, 1024, id="less than the window and a batch"),
        pytest.param(128, 131_072, 2192, id="the window, a batch, and a block"),
    ],
)
def test_what_a_layer_holds_of_a_request(window: int | None, ctx_tokens: int, held: int) -> None:
    layer = Layer(weights_bytes=1, kv_heads=1, key_length=1, value_length=0, sliding_window=window)
    assert request_bytes((layer,), 1, "fp8", ctx_tokens) == held
    assert held % BLOCK_TOKENS == 0


@pytest.mark.parametrize("tied", [False, True])
def test_stages_hold_together_what_one_card_would(tied: bool) -> None:
    facts = facts_from_config(LLAMA_8B | {"tie_word_embeddings": tied}, 10 * GIB, name="m", source="m")
    assert facts.tied is tied
    parts = stage_bytes(facts, 0, 20) + stage_bytes(facts, 20, 12)
    embedding_again = facts.embedding_bytes if tied else 0  # the last stage needs it for its head
    assert parts == model_bytes(facts) + embedding_again
    assert stage_bytes(facts, 0, 32) == model_bytes(facts)


def test_graphs_are_left_out_when_asked() -> None:
    assert VllmWants().graph_bytes == GRAPH_BYTES
    assert VllmWants(enforce_eager=True).graph_bytes == 0
