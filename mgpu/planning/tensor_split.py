"""llama.cpp's tensor split (`--split-mode tensor`): every card holds a part of every layer, and all work at once.

Which part is llama.cpp's own arithmetic (`llama_meta_device_get_split_state` in src/llama-model.cpp, read in build
b10434): each matrix is cut in proportion to `--tensor-split`, each cut rounded down to a whole number of head groups or
quantisation blocks, and the card that gets the remainder rotates from layer to layer.
`tests/planning/test_tensor_split.py` holds it against what llama-server allocated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import lcm

from mgpu.models.facts import Cut, ModelFacts
from mgpu.planning.memory import cache_bytes
from mgpu.planning.wants import Wants

# llama.cpp refuses the tensor split for these (`llm_arch_supports_sm_tensor` in src/llama-arch.cpp; docs/multi-gpu.md).
_UNSUPPORTED = (
    "deepseek2", "deepseek32", "deepseek4", "falcon-h1", "gemma3n", "glm-dsa", "granitehybrid", "jamba", "kimi-linear",
    "mamba", "mamba2", "minimax-m2", "nemotron_h", "nemotron_h_moe", "plamo2", "rwkv6", "rwkv7",
)  # fmt: skip
_MOST_DEVICES = 16  # GGML_BACKEND_META_MAX_DEVICES
_EFFICIENT = 128  # cuts fall on a power of two of values up to this where the cards leave room for it


def problems(facts: ModelFacts, wants: Wants, devices: int) -> Iterator[str]:
    """Yield why llama.cpp would refuse to cut `facts` over `devices`; nothing where it would not."""
    if not wants.knows_tensor_split:
        yield "the llama-server that is installed is too old for --split-mode tensor"
    if facts.architecture in _UNSUPPORTED:
        yield f"llama.cpp has no tensor split for the architecture {facts.architecture}"
    if not wants.uses_flash_attention:
        yield "llama.cpp's tensor split needs flash attention"
    if devices > _MOST_DEVICES:
        yield f"llama.cpp's tensor split takes {_MOST_DEVICES} cards at most, not {devices}"


def tensor_split_bytes(
    facts: ModelFacts, wants: Wants, ctx_tokens: int, proportions: Sequence[float]
) -> tuple[tuple[int, int], ...]:
    """Return the bytes of weights and of caches on each of the devices that share `facts` in these `proportions`.

    What a file gives no cuts for is held whole by every device.
    """
    devices = len(proportions)
    weights, caches = [0] * devices, [0] * devices
    seen: dict[tuple[bool, int | None], int] = {}
    for layer, cache in zip(facts.layers, cache_bytes(facts, wants, ctx_tokens), strict=True):
        # The remainder rotates among layers of the same kind.
        kind = bool(layer.state_bytes), layer.sliding_window
        rotation = seen.get(kind, 0)
        seen[kind] = rotation + 1
        whole = layer.weights_bytes - sum(cut.bytes for cut in layer.cuts)
        for cut in layer.cuts:
            _add(weights, cut, cut.bytes, proportions, rotation)
        cached = _cache_cut(layer.cuts, layer.kv_heads * (layer.value_length or layer.key_length))
        if cached:
            _add(caches, cached, cache, proportions, rotation)
        for device in range(devices):
            weights[device] += whole
            caches[device] += 0 if cached else cache
    head = facts.head_cut
    if head:
        _add(weights, head, head.bytes, proportions, len(facts.layers))
    for device in range(devices):
        weights[device] += facts.head_bytes - (head.bytes if head else 0)
    return tuple(zip(weights, caches, strict=True))


def _cache_cut(cuts: Sequence[Cut], length: int) -> Cut | None:
    """How the cache of a layer is cut: as its values, or as the output of a recurrent layer."""
    same = [cut for cut in cuts if cut.length == length and cut.grain != _EFFICIENT]
    return next(iter(same), None)


def _add(totals: list[int], cut: Cut, size: int, proportions: Sequence[float], rotation: int) -> None:
    """Add each device's part of `size` bytes to `totals`."""
    devices = len(proportions)
    grain = _grain(cut, devices)
    turned = [proportions[(place + rotation) % devices] for place in range(devices)]
    shares = list(accumulate(turned))
    low = 0
    for place, share in enumerate(shares):
        high = cut.length
        if place < devices - 1:
            high = int(cut.length * share / shares[-1])
            high -= high % grain
        totals[(place + rotation) % devices] += size * (high - low) // cut.length
        low = high


def _grain(cut: Cut, devices: int) -> int:
    block = cut.block
    while block < _EFFICIENT and block * devices < cut.grain:
        block *= 2
    return max(1, lcm(cut.grain, block) // cut.share)
