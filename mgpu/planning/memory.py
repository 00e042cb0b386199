"""llama.cpp's memory, device by device, computed before anything runs.

The rules reproduce llama-server's own projection (`common_memory_breakdown_print`, build b10434): weights
and KV cache to the byte, compute buffers from the activations that are alive at once in the widest stage of
a layer. `tests/planning/test_memory_against_engine.py` holds them against the engine's numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from mgpu.models.facts import Layer, ModelFacts
from mgpu.planning.wants import KV_ELEMENT_BYTES, Wants
from mgpu.units import MIB

CTX_GRANULARITY = 256  # llama.cpp pads every KV cache to 256 cells (llama-kv-cache.cpp)
_F32 = 4
_F16 = 2
# Copies of a micro-batch's inputs in flight when layers on several devices work as a pipeline
# (GGML_SCHED_MAX_COPIES).
_PIPELINE_COPIES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceKind:
    """What a family of llama.cpp devices costs beside the model.

    `runtime_bytes` is the driver's context. `pipeline`: it supports events, so several of them overlap
    micro-batches. `computes_host_layers`: large batches of layers kept in host memory are computed on it.
    """

    runtime_bytes: int
    pipeline: bool
    computes_host_layers: bool


# CUDA contexts hold 0.5 to 0.7 GB per process and card; Ollama reserves 457 MiB on any card. No driver tells
# beforehand. An RPC device's context belongs to the RPC server, which reports free memory without it.
_KINDS = {
    "CUDA": DeviceKind(runtime_bytes=600 * MIB, pipeline=True, computes_host_layers=True),
    "ROCm": DeviceKind(runtime_bytes=600 * MIB, pipeline=True, computes_host_layers=True),
    "Vulkan": DeviceKind(runtime_bytes=457 * MIB, pipeline=True, computes_host_layers=True),
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


def kv_bytes(layer: Layer, wants: Wants, ctx_tokens: int) -> int:
    """Return the bytes of one layer's KV cache for all users together."""
    caches = 1 if wants.kv_unified else wants.parallel
    per_cell = layer.kv_heads * (
        layer.key_length * KV_ELEMENT_BYTES[wants.kv_type_k] + layer.value_length * KV_ELEMENT_BYTES[wants.kv_type_v]
    )
    return int(kv_cells(layer, wants, ctx_tokens) * caches * per_cell)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeBuffers:
    """Compute buffer sizes in bytes: on the `first` device, on each `other`, on one that carries only the
    output head, and on the host."""

    first: int
    other: int
    head_only: int
    host: int


def compute_buffers(
    facts: ModelFacts, wants: Wants, ctx_tokens: int, *, devices: tuple[str, ...], host_layers: int
) -> ComputeBuffers:
    """Return the compute buffers for a layer split of `facts` over `devices`, first `host_layers` on the host.

    One activation vector of a micro-batch is `4 * ubatch * length` bytes. The widest stages are the feed-forward
    network (gate, up and their product, the residual stream, attention's output) and, without flash attention, the
    full `heads x ubatch x context` matrix of attention scores. Sizes as projected by llama-server b10434.
    """
    ubatch = ubatch_tokens(wants, ctx_tokens)
    row = _F32 * ubatch
    embedding = row * facts.embedding_length
    attention_output = row * facts.heads * facts.head_dim
    mask = _attention_mask_bytes(facts, wants, ctx_tokens)
    stage = _feed_forward_activations(facts, row) + embedding + attention_output
    if not wants.uses_flash_attention:
        mask *= 2  # the mask is kept as 32-bit floats, too
        key_value = 2 * row * facts.kv_heads * facts.head_dim
        cells = max(kv_cells(layer, wants, ctx_tokens) for layer in facts.layers)
        scores = row * facts.heads * cells + 2 * embedding + key_value
        stage = max(stage, scores + embedding + attention_output)

    kinds = [device_kind(device) for device in devices]
    host = 2 * embedding + mask
    if host_layers and not any(kind.computes_host_layers for kind in kinds):
        host += stage
    on_devices = not host_layers and not wants.kv_on_host
    if len(devices) > 1 and on_devices and all(kind.pipeline for kind in kinds):
        copies = _PIPELINE_COPIES
        first = stage + copies * (mask + embedding)
        return ComputeBuffers(
            first=first,
            other=first + copies * embedding,
            head_only=first,
            host=2 * embedding + copies * mask,
        )
    first = other = stage + embedding + mask
    if wants.kv_on_host:
        first = other = max(first, _computing_host_kv(facts, wants, ctx_tokens, embedding, mask, len(facts.layers)))
    elif host_layers and kinds and kinds[0].computes_host_layers:
        # Upper bound fitted to Vulkan devices: within 3 % of the device's total wherever it was measured.
        widest_matrix = max(layer.weights_bytes - layer.expert_bytes for layer in facts.layers[:host_layers]) // 4
        host_kv = _computing_host_kv(facts, wants, ctx_tokens, embedding, mask, host_layers)
        first = max(stage + mask + widest_matrix, host_kv)
    head_only = row // ubatch * wants.parallel * (facts.vocabulary + 2 * facts.embedding_length)
    if host_layers == len(facts.layers) and kinds and kinds[0].computes_host_layers:
        head_only = first  # the device with the head is the first one, and computes the layers of the host
    return ComputeBuffers(first=first, other=other, head_only=head_only, host=host)


def _attention_mask_bytes(facts: ModelFacts, wants: Wants, ctx_tokens: int) -> int:
    """A 16-bit mask of ubatch x cells for full attention and, where some layers have windows, one for those."""
    kinds = {layer.sliding_window: layer for layer in facts.layers}.values()
    return _F16 * ubatch_tokens(wants, ctx_tokens) * sum(kv_cells(layer, wants, ctx_tokens) for layer in kinds)


def _feed_forward_activations(facts: ModelFacts, row: int) -> int:
    dense = 3 * facts.feed_forward_length
    if not facts.experts:
        return row * dense
    width = facts.experts_used * (facts.expert_feed_forward_length or facts.feed_forward_length)
    shared = 3 * (facts.shared_expert_feed_forward_length or 0)
    gate_and_up = 3 * width
    # Each chosen expert's output and its weighted copy are alive together before they are summed.
    down = width + 2 * facts.experts_used * facts.embedding_length
    has_dense_layers = any(not layer.expert_bytes for layer in facts.layers)
    return row * max(gate_and_up + shared, down, dense if has_dense_layers else 0)


def _computing_host_kv(facts: ModelFacts, wants: Wants, ctx_tokens: int, embedding: int, mask: int, layers: int) -> int:
    """A device that computes attention over a KV cache in host memory holds a copy of the widest layer's."""
    return 3 * (embedding + mask) + max(kv_bytes(layer, wants, ctx_tokens) for layer in facts.layers[:layers])
