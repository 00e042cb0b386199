"""Shapes of well-known models, as a profile would give them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mgpu.models.shape import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainShape:
    architecture: str
    layers: int
    embedding_length: int
    feed_forward_length: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context_length: int = 131072
    tied_embeddings: bool = False
    rope_freqs: bool = False
    sliding_window: int | None = None
    sliding_window_pattern: int | None = None
    experts: int = 0
    experts_used: int = 0
    expert_feed_forward_length: int | None = None
    shared_expert_feed_forward_length: int | None = None
    leading_dense_layers: int = 0
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    rope_head_dim: int | None = None
    nope_head_dim: int | None = None
    value_head_dim: int | None = None


def resized(shape: Shape, *, layers: int | None = None, vocabulary: int | None = None) -> PlainShape:
    """A copy of `shape` with another number of layers or tokens."""
    plain = PlainShape(**{field.name: getattr(shape, field.name) for field in dataclasses.fields(PlainShape)})
    return dataclasses.replace(
        plain, layers=layers or plain.layers, vocabulary=vocabulary or plain.vocabulary
    )


def _llama(layers: int, width: int, feed_forward: int, heads: int, **rest: int | bool) -> PlainShape:
    return PlainShape(
        architecture="llama",
        layers=layers,
        embedding_length=width,
        feed_forward_length=feed_forward,
        heads=heads,
        kv_heads=8,
        head_dim=width // heads,
        vocabulary=128256,
        rope_freqs=True,
        tied_embeddings=bool(rest.get("tied")),
    )


def _gpt_oss(layers: int, experts: int) -> PlainShape:
    return PlainShape(
        architecture="gpt-oss",
        layers=layers,
        embedding_length=2880,
        feed_forward_length=2880,
        heads=64,
        kv_heads=8,
        head_dim=64,
        vocabulary=201088,
        sliding_window=128,
        experts=experts,
        experts_used=4,
        expert_feed_forward_length=2880,
    )


SHAPES: dict[str, PlainShape] = {
    "smollm2-135m": PlainShape(
        architecture="llama",
        layers=30,
        embedding_length=576,
        feed_forward_length=1536,
        heads=9,
        kv_heads=3,
        head_dim=64,
        vocabulary=49152,
        context_length=8192,
        tied_embeddings=True,
    ),
    "llama-3.2-1b": _llama(16, 2048, 8192, 32, tied=True),
    "llama-3.1-8b": _llama(32, 4096, 14336, 32),
    "llama-3.3-70b": _llama(80, 8192, 28672, 64),
    "llama-3.1-405b": _llama(126, 16384, 53248, 128),
    "mixtral-8x7b": PlainShape(
        architecture="llama",
        layers=32,
        embedding_length=4096,
        feed_forward_length=14336,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocabulary=32000,
        context_length=32768,
        experts=8,
        experts_used=2,
    ),
    "qwen2.5-7b": PlainShape(
        architecture="qwen2",
        layers=28,
        embedding_length=3584,
        feed_forward_length=18944,
        heads=28,
        kv_heads=4,
        head_dim=128,
        vocabulary=152064,
        context_length=32768,
    ),
    "qwen3-32b": PlainShape(
        architecture="qwen3",
        layers=64,
        embedding_length=5120,
        feed_forward_length=25600,
        heads=64,
        kv_heads=8,
        head_dim=128,
        vocabulary=151936,
        context_length=40960,
    ),
    "qwen3-30b-a3b": PlainShape(
        architecture="qwen3moe",
        layers=48,
        embedding_length=2048,
        feed_forward_length=6144,
        heads=32,
        kv_heads=4,
        head_dim=128,
        vocabulary=151936,
        context_length=40960,
        experts=128,
        experts_used=8,
        expert_feed_forward_length=768,
    ),
    "gemma-3-27b": PlainShape(
        architecture="gemma3",
        layers=62,
        embedding_length=5376,
        feed_forward_length=21504,
        heads=32,
        kv_heads=16,
        head_dim=128,
        vocabulary=262208,
        tied_embeddings=True,
        sliding_window=1024,
    ),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "deepseek-v2-lite": PlainShape(
        architecture="deepseek2",
        layers=27,
        embedding_length=2048,
        feed_forward_length=10944,
        heads=16,
        kv_heads=1,
        head_dim=192,
        vocabulary=102400,
        context_length=163840,
        experts=64,
        experts_used=6,
        expert_feed_forward_length=1408,
        shared_expert_feed_forward_length=2816,
        leading_dense_layers=1,
        kv_lora_rank=512,
        rope_head_dim=64,
        nope_head_dim=128,
        value_head_dim=128,
    ),
    "deepseek-v3": PlainShape(
        architecture="deepseek2",
        layers=61,
        embedding_length=7168,
        feed_forward_length=18432,
        heads=128,
        kv_heads=1,
        head_dim=192,
        vocabulary=129280,
        context_length=163840,
        experts=256,
        experts_used=8,
        expert_feed_forward_length=2048,
        shared_expert_feed_forward_length=2048,
        leading_dense_layers=3,
        kv_lora_rank=512,
        q_lora_rank=1536,
        rope_head_dim=64,
        nope_head_dim=128,
        value_head_dim=128,
    ),
}
