"""Which layers attend to everything, which to a window, and what a token's cache in each of them holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One layer's KV cache: per token `kv_heads * key_length` K and `kv_heads * value_length` V values.

    `kv_heads` is 0 where a layer keeps no cache of its own; `sliding_window` is None for full attention.
    """

    kv_heads: int
    key_length: int
    value_length: int
    sliding_window: int | None = None


def windows(
    architecture: str, layers: int, window: int | None, pattern: int | Sequence[int] | None = None
) -> tuple[int | None, ...]:
    """The sliding window of each layer in tokens, None for a layer with full attention.

    `pattern` N means that every N-th layer is global (layer i is local unless (i + 1) % N == 0); a sequence
    says of each layer whether it is local. Where the model does not tell, the pattern is what llama.cpp
    builds in for the architecture (`set_swa_pattern`). An architecture without one gets full attention
    everywhere, as llama.cpp gives it: Mistral's and Qwen's windows are ignored there.
    """
    if not window:
        return (None,) * layers
    if isinstance(pattern, Sequence):
        return tuple(window if local else None for local in pattern)
    every = pattern or _PATTERNS.get(architecture)
    if not every:
        return (None,) * layers
    if architecture in _GLOBAL_FIRST:
        return tuple(window if i % every else None for i in range(layers))
    return tuple(None if (i + 1) % every == 0 else window for i in range(layers))


_PATTERNS = {
    "afmoe": 4,
    "cohere2": 4,
    "exaone4": 4,
    "gemma-embedding": 6,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "llama4": 4,
    "olmo2": 4,
    "smallthinker": 4,
}
_GLOBAL_FIRST = ("smallthinker",)
