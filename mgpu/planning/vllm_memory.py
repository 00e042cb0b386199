"""vLLM's memory, card by card, computed before anything runs.

vLLM takes a fixed share of each card's whole memory (`--gpu-memory-utilization`): the weights, what one batch needs
beside them, and all that is left as KV cache. `tests/planning/test_vllm_memory.py` holds the formulas against what
vLLM logged on cards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from mgpu.models.facts import Layer, ModelFacts
from mgpu.planning.wants import Goal, Wants
from mgpu.units import GIB, MIB

DEFAULT_UTILISATION = 0.90
BLOCK_TOKENS = 16  # vLLM's KV cache is dealt in blocks of so many tokens
# Activations of the largest batch and what CUDA and NCCL hold: 0.29 to 0.70 GiB in 18 starts of 8 to 30 GB models.
OVERHEAD_BYTES = GIB // 2
# CUDA graphs on cards of 24 to 32 GB: 0.1 to 0.7 GiB. From 0.21 on vLLM takes them out of its share before it sizes
# the KV cache; earlier versions took them beside it.
GRAPH_BYTES = 400 * MIB
# What a sliding-window layer holds beside its window: the tokens of one batch (--max-num-batched-tokens).
_BATCHED_TOKENS = 2048
# CUDA sees less than the driver's total: 23.56 of 24.00 GiB (RTX 3090), 31.36 of 31.84 (5090), 39.39 of 40.00 (A100).
_VISIBLE_SHARE = 0.98
# Norms and padding that every rank holds whole: 7.58 instead of 7.53 GiB (8B on two cards).
REPLICATED_SHARE = 1.01

KV_BYTES = {"f16": 2, "bf16": 2, "fp8": 1}
"""Bytes per element of the KV cache types that vLLM has on every card it supports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmWants(Wants):
    """The planner's options with vLLM's own: the shape (None: mgpu chooses), the share of each card's memory (None:
    0.90, or less where less is free), and whether CUDA graphs are left out.

    `all_cards` says that the user named or counted the cards: fewer of them that are faster come after all of them.
    `goal` is what the user asked for, None where the number of users tells.
    """

    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    replicas: int = 1
    gpu_memory_utilization: float | None = None
    enforce_eager: bool = False
    all_cards: bool = False
    goal: Goal | None = None

    @property
    def for_many(self) -> bool:
        """Whether the tokens of all users together count, rather than the wait of each."""
        return self.parallel > 1 and self.goal is not Goal.latency

    @property
    def graph_bytes(self) -> int:
        """What CUDA graphs will take of each card."""
        return 0 if self.enforce_eager else GRAPH_BYTES


def visible_bytes(total_bytes: int) -> int:
    """Return how much of a card's memory, as its driver counts it, a CUDA program sees."""
    return int(total_bytes * _VISIBLE_SHARE)


def model_bytes(facts: ModelFacts) -> int:
    """Return the bytes of all weights on one card. Unlike llama.cpp, vLLM holds tied embeddings once."""
    head = 0 if facts.tied else facts.head_bytes
    return facts.embedding_bytes + facts.other_bytes + sum(layer.weights_bytes for layer in facts.layers) + head


def shard_bytes(weights_bytes: int, tensor_parallel: int) -> int:
    """Return what each of `tensor_parallel` cards holds of `weights_bytes`."""
    return weights_bytes if tensor_parallel == 1 else int(weights_bytes / tensor_parallel * REPLICATED_SHARE)


def stage_bytes(facts: ModelFacts, first_layer: int, layers: int) -> int:
    """Return the weights of a pipeline stage: its layers, on the first one the embedding, on the last the head."""
    own = facts.layers[first_layer : first_layer + layers]
    size = sum(layer.weights_bytes for layer in own)
    size += facts.embedding_bytes + facts.other_bytes if first_layer == 0 else 0
    last = first_layer + layers == len(facts.layers)
    if last and not (facts.tied and first_layer == 0):
        size += facts.head_bytes
    return size


def kv_token_bytes(layers: Sequence[Layer], tensor_parallel: int, kv_type: str) -> int:
    """Return the KV cache's bytes per token in `layers` on one card of a tensor-parallel group.

    Heads are dealt to the cards; with more cards than heads they are held several times, and so is the one latent
    head of multi-head latent attention.
    """
    return sum(count * kind.token_bytes(tensor_parallel, kv_type) for kind, count in _kinds(layers).items())


def request_bytes(layers: Sequence[Layer], tensor_parallel: int, kv_type: str, ctx_tokens: int) -> int:
    """Return the KV cache that one request of `ctx_tokens` needs in `layers` on one card.

    A layer with a sliding window of w tokens holds the window and one batch, rounded up to whole blocks and one
    more: (ceil((w - 1 + 2048) / 16) + 1) * 16 tokens (`SlidingWindowSpec.max_memory_usage_bytes`).
    """
    return sum(
        count * kind.token_bytes(tensor_parallel, kv_type) * kind.held_tokens(ctx_tokens)
        for kind, count in _kinds(layers).items()
    )


# Asked thousands of times for a plan on many cards.
_CACHE_SHAPE = attrgetter("kv_heads", "key_length", "value_length", "sliding_window")


@dataclass(frozen=True, slots=True)
class _Kind:
    """Layers whose caches are alike."""

    kv_heads: int
    length: int
    window: int | None

    def token_bytes(self, tensor_parallel: int, kv_type: str) -> int:
        return max(1, self.kv_heads // tensor_parallel) * self.length * KV_BYTES[kv_type]

    def held_tokens(self, ctx_tokens: int) -> int:
        blocks = _blocks(ctx_tokens)
        if self.window is not None:
            blocks = min(blocks, _blocks(self.window - 1 + _BATCHED_TOKENS) + 1)
        return blocks * BLOCK_TOKENS


def _kinds(layers: Sequence[Layer]) -> dict[_Kind, int]:
    """How many layers of each kind vLLM makes caches for.

    Several kinds share one pool of blocks in groups of equal size, that of the rarest kind (or of the commonest,
    where they differ by less than a quarter); a kind that is no multiple of it is filled up
    (`_get_kv_cache_groups_uniform_page_size`): Gemma 3 27B's 10 + 52 layers cost as much as 10 + 60.
    """
    counts: dict[_Kind, int] = {}
    for (kv_heads, key, value, window), count in Counter(map(_CACHE_SHAPE, layers)).items():
        if kv_heads:
            kind = _Kind(kv_heads, key + value, window)
            counts[kind] = counts.get(kind, 0) + count
    if len(counts) < 2:
        return counts
    group, most = min(counts.values()), max(counts.values())
    if most < 1.25 * group:
        group = most
    return {kind: -(-count // group) * group for kind, count in counts.items()}


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)
