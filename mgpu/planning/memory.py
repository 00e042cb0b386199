"""What llama.cpp keeps of what it has read, layer by layer, and what its devices cost beside the model.

The rules reproduce llama-server's own projection (`common_memory_breakdown_print`, build b10434) to the byte; the
buffers it computes in are in `compute`. `tests/planning/test_memory_against_engine.py` holds both against the engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from mgpu.models.facts import Layer, ModelFacts
from mgpu.planning.wants import KV_ELEMENT_BYTES, Wants
from mgpu.units import MIB

CTX_GRANULARITY = 256  # llama.cpp pads every KV cache to 256 cells (llama-kv-cache.cpp)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceKind:
    """What a family of llama.cpp devices costs beside the model.

    `runtime_bytes` is the driver's context. `pipeline`: it supports events, so several of them overlap
    micro-batches. `computes_host_layers`: large batches of layers kept in host memory are computed on it.
    `reorders`: the driver changes the order of operations.
    """

    runtime_bytes: int
    pipeline: bool
    computes_host_layers: bool
    reorders: bool = False


# CUDA contexts hold 0.5 to 0.7 GB per process and card; Ollama reserves 457 MiB on any card. No driver tells
# beforehand. An RPC device's context belongs to the RPC server, which reports free memory without it.
_KINDS = {
    "CUDA": DeviceKind(runtime_bytes=600 * MIB, pipeline=True, computes_host_layers=True),
    "ROCm": DeviceKind(runtime_bytes=600 * MIB, pipeline=True, computes_host_layers=True),
    "Vulkan": DeviceKind(runtime_bytes=457 * MIB, pipeline=True, computes_host_layers=True, reorders=True),
    "RPC": DeviceKind(runtime_bytes=0, pipeline=False, computes_host_layers=False),
}
_OTHER_KIND = DeviceKind(runtime_bytes=600 * MIB, pipeline=False, computes_host_layers=True)


def device_kind(device: str) -> DeviceKind:
    """Return the kind of a llama.cpp device by its name, such as "CUDA0" or "RPC1"."""
    return _KINDS.get(device.rstrip("0123456789"), _OTHER_KIND)


def padded_ctx_tokens(ctx_tokens: int) -> int:
    """Return the context the engine really allocates for one user: rounded up to 256 tokens."""
    return -(-ctx_tokens // CTX_GRANULARITY) * CTX_GRANULARITY


def ubatch_tokens(wants: Wants, ctx_tokens: int) -> int:
    """Return the tokens computed at once: no more than all users' context together (llama-context.cpp)."""
    return min(wants.ubatch, padded_ctx_tokens(ctx_tokens) * wants.parallel)


def kv_cells(layer: Layer, wants: Wants, ctx_tokens: int) -> int:
    """Return the cells of one KV cache of a layer: each user has one, or all share one with `kv_unified`.

    A sliding-window layer keeps its window for each user in it plus one micro-batch (llama-kv-cache-iswa.cpp).
    """
    users = wants.parallel if wants.kv_unified else 1
    cells = padded_ctx_tokens(ctx_tokens) * users
    if layer.sliding_window and not wants.swa_full:
        cells = min(cells, padded_ctx_tokens(layer.sliding_window * users + ubatch_tokens(wants, ctx_tokens)))
    return cells


def cache_bytes(facts: ModelFacts, wants: Wants, ctx_tokens: int) -> tuple[int, ...]:
    """Return the bytes that each layer keeps of what it has read, for all users together: its KV cache, and the state
    of a recurrent layer for each user (llama-kv-cache.cpp, llama-memory-recurrent.cpp).

    Without flash attention V lies transposed, and each layer's has the width of the widest (`n_embd_v_gqa_max`).
    """
    caches = 1 if wants.kv_unified else wants.parallel
    widest = max(layer.kv_heads * layer.value_length for layer in facts.layers)
    sizes = []
    for layer in facts.layers:
        values = layer.kv_heads * layer.value_length
        if values and not wants.uses_flash_attention:
            values = widest
        keys = layer.kv_heads * layer.key_length
        cell_bytes = keys * KV_ELEMENT_BYTES[wants.kv_type_k] + values * KV_ELEMENT_BYTES[wants.kv_type_v]
        sizes.append(int(kv_cells(layer, wants, ctx_tokens) * caches * cell_bytes) + layer.state_bytes * wants.parallel)
    return tuple(sizes)
