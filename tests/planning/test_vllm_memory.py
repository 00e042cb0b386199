"""vLLM's memory as planned, against what vLLM logged on cards (44 starts of versions 0.11 to 0.13)."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest

from mgpu.machine.snapshot import Gpu, Host
from mgpu.models.facts import Layer, ModelFacts
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
    visible_bytes,
)
from mgpu.planning.vllm_placement import planned_kv_tokens, vllm_candidate
from mgpu.units import GIB
from tests.models.test_hf import DEEPSEEK_V3, GEMMA_12B, GPT_OSS_20B, LLAMA_8B, QWEN_30B_A3B

DATA = Path(__file__).parent.parent / "data" / "vllm_memory.csv"
# What CUDA sees of each card, by the same logs.
VISIBLE_GIB = {"3090": 23.56, "4090": 23.52, "5090": 31.36, "a100": 39.39}

QWEN_14B: dict[str, object] = LLAMA_8B | {
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "hidden_size": 5120,
    "vocab_size": 151936,
}
GEMMA_27B: dict[str, object] = LLAMA_8B | {
    "num_hidden_layers": 62,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
}
CONFIGS: dict[str, dict[str, object]] = {
    "Qwen3-14B-FP8-dynamic": QWEN_14B | {"head_dim": 128},
    "gemma-3-12b-it-FP8-dynamic": GEMMA_12B,
    "gemma-3-27b-it-FP8-dynamic": GEMMA_27B,
    "Qwen3-Coder-30B-A3B-Instruct-GPTQ-4bit": QWEN_30B_A3B,
    "Meta-Llama-3.1-8B-Instruct": LLAMA_8B,
    "gpt-oss-20b": GPT_OSS_20B,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One logged start."""

    gpu: str
    model: str
    tensor_parallel: int
    weights_gib: float
    kv_gib: float
    kv_tokens: int
    ctx_tokens: int
    concurrency: float
    utilisation: float | None


@cache
def starts() -> tuple[Start, ...]:
    with DATA.open(newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return tuple(
            Start(
                gpu=row["gpu"],
                model=row["model"],
                tensor_parallel=int(row["tensor_parallel"]),
                weights_gib=float(row["weights_gib"]),
                kv_gib=float(row["kv_gib"]),
                kv_tokens=int(row["kv_tokens"]),
                ctx_tokens=int(row["ctx_tokens"]),
                concurrency=float(row["concurrency"]),
                utilisation=float(row["utilisation"]) if row["utilisation"] else None,
            )
            for row in rows
        )


def facts_of(model: str, weights_gib: float = 15.0) -> ModelFacts:
    return facts_from_config(CONFIGS[model], round(weights_gib * GIB), name=model, source=model)


@pytest.mark.parametrize("start", starts(), ids=lambda s: f"{s.gpu} {s.model} tp{s.tensor_parallel}")
def test_a_cache_of_known_size_holds_the_tokens_and_requests_vllm_says(start: Start) -> None:
    layers = facts_of(start.model).layers
    cache_bytes = start.kv_gib * GIB  # logged with two decimals
    tokens = cache_bytes / kv_token_bytes(layers, start.tensor_parallel, "f16")
    assert tokens == pytest.approx(start.kv_tokens, rel=0.003)
    requests = cache_bytes / request_bytes(layers, start.tensor_parallel, "f16", start.ctx_tokens)
    assert requests == pytest.approx(start.concurrency, rel=0.004)


# One start stands out: the FP8 model on the 3090, which cannot compute in FP8, left 0.29 GiB beside weights and cache
# where others left 0.4 to 0.5.
KNOWN = [start for start in starts() if start.gpu in VISIBLE_GIB and start.utilisation]
LIMITS = {("3090", "Qwen3-14B-FP8-dynamic"): 0.046}


@pytest.mark.parametrize("start", KNOWN, ids=lambda s: f"{s.gpu} {s.model}")
def test_the_planned_cache_holds_what_vllm_logged(start: Start) -> None:
    facts = facts_of(start.model, start.weights_gib)
    facts = replace(facts, tied=False)
    card = Gpu(
        index=0,
        vendor="nvidia",
        name=start.gpu,
        total_bytes=round(VISIBLE_GIB[start.gpu] * GIB / visible_bytes(GIB) * GIB),
        free_bytes=round(VISIBLE_GIB[start.gpu] * GIB),
    )
    # These versions took CUDA graphs beside their share of the card.
    wants = VllmWants(gpu_memory_utilization=start.utilisation, enforce_eager=True)
    candidate = vllm_candidate(facts, wants, [card], Host(), start.ctx_tokens)
    assert model_bytes(facts) == pytest.approx(start.weights_gib * GIB, rel=1e-6)
    assert candidate.verdict == "fits"
    tokens = planned_kv_tokens(candidate, facts)
    assert tokens == pytest.approx(start.kv_tokens, rel=LIMITS.get((start.gpu, start.model), 0.02))


def test_there_are_starts_to_compare_with() -> None:
    assert len(starts()) == 44
    assert len(KNOWN) == 7


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
