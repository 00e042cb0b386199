"""The buffers that llama.cpp computes in, term by term, before anything runs.

A buffer holds the inputs of a micro-batch and the activations that are alive at once in the widest stage of a layer.
The stages were read off the graphs that llama-server b10434 builds (`GGML_SCHED_DEBUG=2`; src/llama-graph.cpp and
src/models/*.cpp), the sizes fitted to what it projects: never more than 1 MiB below it, and mostly exact. Where its
allocator reuses memory better than the sum of a stage, the sum is an upper bound.
`tests/planning/test_memory_against_engine.py` holds them against the engine's numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mgpu.models.facts import Layer, ModelFacts
from mgpu.planning.memory import cache_bytes, device_kind, kv_cells, ubatch_tokens
from mgpu.planning.wants import Wants

# Copies of a micro-batch's inputs in flight when layers on several devices work as a pipeline
# (GGML_SCHED_MAX_COPIES in ggml-backend.cpp).
_PIPELINE_COPIES = 4
_F32 = 4
_F16 = 2
# A token's position (32 bits) and where its K and V go (64 bits each), for each kind of cache, in 32-bit values.
_PLACES = 10
_ANY = -1
_REORDERED_BESIDES = 5  # layers' worth that come on top of a device's own; see `_Batch.reordered`
# The matrices by which a quantised KV cache is rotated: 64 values of V, and of K the largest power of two that
# divides a head (llama-kv-cache.cpp, `attn_rot`).
_ROTATION = 64

# Attention and the feed-forward network read the same input, which stays alive for both (src/models).
_PARALLEL = ("cohere2", "command-r", "falcon", "gptneox", "phi2")
# Queries come with a gate of their own width (src/models/qwen35.cpp, qwen3next.cpp).
_GATED = ("qwen3next", "qwen35", "qwen35moe")


@dataclass(frozen=True, slots=True)
class Term:
    """One line of a buffer's sum; a mask is needed only by layers with its `window`."""

    name: str
    bytes: int
    window: int | None = _ANY


@dataclass(frozen=True, slots=True)
class Buffer:
    """What is alive at once in a compute buffer."""

    terms: tuple[Term, ...] = ()

    @property
    def bytes(self) -> int:
        """The sum of the terms."""
        return sum(term.bytes for term in self.terms)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeBuffers:
    """Compute buffers: on the `first` device, on each `other`, on one that carries only the last layer and the output
    head (`tail`) or the head alone, and on the host.

    `head` takes the place of the others on the device with the head where it is larger; `layer_bytes` come on top for
    each layer of a device.
    """

    first: Buffer
    other: Buffer
    tail: Buffer
    head: Buffer
    head_only: Buffer
    host: Buffer
    layer_bytes: int = 0

    def on(self, layers: Sequence[Layer], *, first: bool, head: bool) -> Buffer:
        """The buffer of a device that holds `layers` and perhaps the head: with masks for their kinds of cache only."""
        if not layers:
            return self.head_only if head else Buffer()
        own = self.first if first else self.tail if head and len(layers) == 1 else self.other
        own = max(own, self.head, key=lambda buffer: buffer.bytes) if head else own
        if self.layer_bytes:
            kept = (len(layers) + _REORDERED_BESIDES) * self.layer_bytes
            own = Buffer((*own.terms, Term("kept by Vulkan's order of operations", kept)))
        if first:  # it may compute layers of the host, too
            return own
        windows = {layer.sliding_window for layer in layers if layer.kv_heads}
        return Buffer(tuple(term for term in own.terms if term.window in (_ANY, *windows)))


def compute_buffers(
    facts: ModelFacts, wants: Wants, ctx_tokens: int, *, devices: Sequence[str], host_layers: int
) -> ComputeBuffers:
    """Return the compute buffers for `facts` over `devices`, with the first `host_layers` on the host.

    All sizes are those of one micro-batch. With layers of the host computed on a device, or the KV cache in host
    memory, they are upper bounds.
    """
    kinds = [device_kind(device) for device in devices]
    batch = _Batch(facts, wants, ctx_tokens)
    embedding = batch.terms(("embedding of the tokens", facts.embedding_length), ("their places", _PLACES))
    stage = batch.widest(batch.stages())
    mask, rotations = batch.masks(), batch.rotations()
    host = (*batch.terms(("embeddings, read and handed on", 2 * facts.embedding_length)), *mask, *rotations)
    places = () if wants.uses_flash_attention else batch.value_places()
    host += places
    computes_host_layers = any(kind.computes_host_layers for kind in kinds)
    if (host_layers or wants.cpu_moe_layers) and not computes_host_layers:
        host += stage
    if (wants.kv_on_host and devices) or (host_layers and computes_host_layers):
        width = facts.embedding_length + 3 * facts.heads * facts.head_dim
        host += batch.terms(("what is handed between cache and cards", width))

    on_devices = not host_layers and not wants.kv_on_host and not wants.cpu_moe_layers
    if len(devices) > 1 and on_devices and all(kind.pipeline for kind in kinds):
        copies = _times(_PIPELINE_COPIES, (*mask, *embedding, *rotations))
        first = (*stage, *batch.pipeline_terms(), *copies)
        embeddings = _times(_PIPELINE_COPIES, embedding)
        other = (*first, *embeddings)
        tail = (*batch.last_layer(stage), *batch.pipeline_terms(), *copies, *embeddings)
        return ComputeBuffers(
            first=Buffer(first),
            other=Buffer(other),
            tail=Buffer(tail),
            head=Buffer((*batch.head_terms(), *copies)),
            head_only=Buffer(first),
            host=Buffer((*host, *_times(_PIPELINE_COPIES - 1, (*mask, *rotations, *places)))),
            layer_bytes=batch.reordered() if any(kind.reorders for kind in kinds) else 0,
        )
    inputs = (*embedding, *mask, *rotations)
    first = other = (*stage, *inputs)
    tail = (*batch.last_layer(stage), *inputs)
    if host_layers and facts.experts:
        first += batch.terms(("what the host's layers hand on", facts.embedding_length))
    if wants.cpu_moe_layers and facts.experts:
        waiting = facts.embedding_length + (facts.shared_expert_feed_forward_length or 0)
        first += batch.terms(("what waits for the host's experts", waiting))
        other += batch.terms(("what waits for the host's experts", waiting))
        tail += batch.terms(("what waits for the host's experts", waiting))
    if wants.kv_on_host:
        first, other = batch.with_host_cache(facts.layers), batch.with_host_cache(facts.layers, next_keys=True)
        tail = other
    elif (host_layers or wants.cpu_moe_layers) and kinds and kinds[0].computes_host_layers:
        first = batch.computing_host_layers(inputs, host_layers, alone=len(devices) == 1)
    head_only = Buffer(batch.head_terms())
    if host_layers == len(facts.layers) and kinds and kinds[0].computes_host_layers:
        head_only = Buffer(first)  # the device with the head is the first one, and computes the layers of the host
    return ComputeBuffers(
        first=Buffer(first),
        other=Buffer(other),
        tail=Buffer(tail),
        head=head_only,
        head_only=head_only,
        host=Buffer(host),
    )


class _Batch:
    """The sizes of one micro-batch of a model."""

    def __init__(self, facts: ModelFacts, wants: Wants, ctx_tokens: int) -> None:
        self.facts, self.wants, self.ctx_tokens = facts, wants, ctx_tokens
        self.tokens = ubatch_tokens(wants, ctx_tokens)
        # One layer of each kind of cache.
        self.cached = tuple({layer.sliding_window: layer for layer in facts.layers if layer.kv_heads}.values())

    def terms(self, *lines: tuple[str, int]) -> tuple[Term, ...]:
        """Activations of so many 32-bit values for each token."""
        return tuple(Term(name, _F32 * self.tokens * length) for name, length in lines if length)

    def masks(self) -> tuple[Term, ...]:
        """Who sees whom: tokens x cells for each kind of cache, in 16 bits where flash attention reads it."""
        width = _F16 if self.wants.uses_flash_attention else _F32
        return tuple(
            Term(
                f"mask of the last {layer.sliding_window} tokens" if layer.sliding_window else "attention mask",
                width * self.tokens * kv_cells(layer, self.wants, self.ctx_tokens),
                layer.sliding_window,
            )
            for layer in self.cached
        )

    def rotations(self) -> tuple[Term, ...]:
        """The matrices that rotate what a quantised cache holds; none with heads that are no multiple of 64."""
        found = []
        for layer in self.cached:
            if self.wants.quantised_k and not self.facts.kv_lora_rank and layer.key_length % _ROTATION == 0:
                found.append(Term("rotation of K", _F32 * (layer.key_length & -layer.key_length) ** 2))
            if self.wants.quantised_v and layer.value_length and layer.value_length % _ROTATION == 0:
                found.append(Term("rotation of V", _F32 * _ROTATION**2))
        return tuple(found)

    def value_places(self) -> tuple[Term, ...]:
        """Where each value of V goes, as 64-bit indices: it lies transposed without flash attention."""
        widest = max((layer.kv_heads * layer.value_length for layer in self.facts.layers), default=0)
        return self.terms(*(("places of the values", 2 * widest) for _ in self.cached))

    def stages(self) -> Iterator[tuple[Term, ...]]:
        """What is alive in each stage of a layer, beside the inputs."""
        facts = self.facts
        queries = facts.heads * facts.head_dim
        around = [("residual", facts.embedding_length), ("attention's output", queries)]
        if facts.architecture in _PARALLEL:
            around.append(("attention's input", facts.embedding_length))
            around.append(("keys and values", 2 * facts.kv_heads * facts.head_dim))
        if self.rotations():
            around.append(("rotated queries", queries))
        feed_forward = facts.feed_forward_length
        if not facts.experts or any(not layer.expert_bytes for layer in facts.layers):
            yield self.terms(*around, ("gate", feed_forward), ("up", feed_forward), ("gate x up", feed_forward))
        if facts.experts:
            width = facts.experts_used * (facts.expert_feed_forward_length or feed_forward)
            shared = facts.shared_expert_feed_forward_length or 0
            chosen = facts.experts_used * facts.embedding_length
            gate_and_up = ("experts' gate, up and product", 3 * width)
            yield self.terms(*around, gate_and_up, ("shared expert's", 3 * shared))
            # Each chosen expert's output and its weighted copy are alive together before they are summed.
            yield self.terms(*around, ("experts' product", width), ("experts' outputs, weighted", 2 * chosen))
        yield self._attention()

    def _attention(self) -> tuple[Term, ...]:
        """Queries, keys and values; with latent attention the queries three times: as they come, absorbed, joined."""
        facts, cells = (
            self.facts,
            max((kv_cells(layer, self.wants, self.ctx_tokens) for layer in self.cached), default=0),
        )
        queries, width = facts.heads * facts.head_dim, facts.embedding_length
        lines = [("residual and attention's input", 2 * width)]
        if rank := facts.kv_lora_rank:
            key_length = self.cached[0].key_length
            rope = key_length - rank
            lines += [
                ("queries", queries),
                ("queries in the latent space", facts.heads * rank),
                ("both parts of the queries", facts.heads * key_length),
                ("keys", key_length + rope),
            ]
        elif self.wants.uses_flash_attention:
            keys = facts.kv_heads * facts.head_dim
            lines += [("queries", queries), ("keys and values", 2 * keys), ("attention's output", queries)]
        else:
            gate = queries if facts.architecture in _GATED else 0
            lines += [("queries, and their copy", 2 * queries), ("queries' gate", gate)]
            lines = lines if facts.experts else [("residual", width), *lines[1:]]
        if self.wants.uses_flash_attention:
            return self.terms(*lines)
        return (*self.terms(*lines, ("scores", facts.heads * cells)), *self.value_places())

    def last_layer(self, stage: tuple[Term, ...]) -> tuple[Term, ...]:
        """What is alive in the last layer: after attention it goes on with the tokens to answer only."""
        return stage if self.wants.embeddings else self._attention()

    def head_terms(self) -> tuple[Term, ...]:
        """The output head: of every user's last token or, for embeddings, of all tokens of the micro-batch."""
        facts = self.facts
        rows = self.tokens if self.wants.embeddings else self.wants.parallel
        hidden = 1 if self.wants.embeddings else 2
        return (
            Term("logits", _F32 * rows * facts.vocabulary),
            Term("last layer's output", _F32 * rows * hidden * facts.embedding_length),
        )

    def pipeline_terms(self) -> tuple[Term, ...]:
        """What a pipeline keeps besides where layers are of several kinds."""
        facts = self.facts
        windows, states = len(self.cached) > 1, any(layer.state_bytes for layer in facts.layers)
        keys = max((2 * layer.kv_heads * layer.value_length for layer in facts.layers), default=0)
        queries = facts.heads * facts.head_dim
        kept = self.terms(
            ("input of a layer of another kind", facts.embedding_length if windows or states else 0),
            ("queries or keys of that", max(queries, keys) if windows else 0),
        )
        if self.wants.uses_flash_attention:
            return kept
        more = _times(_PIPELINE_COPIES - 1, self.value_places())
        return (*kept, *more, *self.terms(("queries of two micro-batches", 2 * queries)))

    def reordered(self) -> int:
        """What each layer keeps in a pipeline whose operations Vulkan reorders (ggml-vulkan.cpp, `graph_optimize`):
        the residual and, in every fourth layer, one more. Seen with recurrent layers once the cache is quantised or
        there is no flash attention, and without it with a parallel feed-forward network, too; gone with
        GGML_VK_DISABLE_GRAPH_OPTIMIZE=1. Exact for 16 to 64 layers of one model, an upper bound for two others."""
        facts, wants = self.facts, self.wants
        plain = wants.uses_flash_attention
        states = any(layer.state_bytes for layer in facts.layers)
        kept = states and (not plain or wants.quantised_k or wants.quantised_v)
        kept = kept or (not plain and facts.architecture in _PARALLEL)
        return _F32 * self.tokens * facts.embedding_length * 5 // 4 if kept else 0

    def with_host_cache(self, layers: Iterable[Layer], *, next_keys: bool = False) -> tuple[Term, ...]:
        """What a device holds that computes attention over a KV cache in host memory: a copy of the widest layer's,
        and, with `next_keys` and caches of one kind only, the keys of the layer that follows.

        The feed-forward network reuses the room of the keys where it fits in there.
        """
        facts = self.facts
        sizes = zip(layers, cache_bytes(facts, self.wants, self.ctx_tokens), strict=False)
        widest = max(size - layer.state_bytes * self.wants.parallel for layer, size in sizes)
        cache = [Term("copy of a layer's KV cache", widest)]
        if next_keys and self._of_one_kind():
            cache.append(Term("keys of the next layer", widest // 2))
        inputs = (*self.masks(), *self.rotations())
        stage = self.widest(self.stages())
        residual = self.terms(("residual and embedding", 2 * facts.embedding_length))
        queries = self.terms(("queries, their gate and copies", 4 * facts.heads * facts.head_dim))
        fits_into_keys = 3 * _F32 * self.tokens * facts.feed_forward_length <= widest // 2
        copied = stage if facts.experts or not fits_into_keys else queries
        if not facts.experts and not fits_into_keys:
            residual = ()  # it is in the stage
        embedding = self.terms(("embedding of the tokens", facts.embedding_length))
        return self.widest([(*cache, *copied, *residual, *inputs), (*stage, *embedding, *inputs)])

    def _of_one_kind(self) -> bool:
        """Whether the layers after one with a full cache have one, too, more often than not."""
        full = sum(bool(layer.kv_heads) and not layer.sliding_window for layer in self.facts.layers)
        return 2 * full >= len(self.facts.layers)

    def computing_host_layers(self, inputs: tuple[Term, ...], host_layers: int, *, alone: bool) -> tuple[Term, ...]:
        """What the first device holds that computes large micro-batches of the host's layers or experts: a copy of a
        matrix of theirs at a time (ggml-backend.cpp, `offload_op`), and of a layer's KV cache.

        An upper bound fitted to Vulkan devices; exact for the experts of a single device.
        """
        facts, layers = self.facts, self.facts.layers
        stage = self.widest(self.stages())
        stages = [(*stage, *inputs)]
        if host_layers:
            dense = max(layer.weights_bytes - layer.expert_bytes for layer in layers[:host_layers]) // 4
            stages.append((*stage, *self.masks(), *self.rotations(), Term("copy of a matrix", dense)))
            stages.append(self.with_host_cache(layers[:host_layers], next_keys=True))
        if experts := max(layer.expert_bytes for layer in layers[: max(host_layers, self.wants.cpu_moe_layers)]) // 3:
            copy = Term("copy of an expert matrix", experts)
            width = facts.experts_used * (facts.expert_feed_forward_length or facts.feed_forward_length)
            product = self.terms(
                ("residual", facts.embedding_length),
                ("attention's output", facts.heads * facts.head_dim),
                ("experts' product", width),
                ("experts' outputs", facts.experts_used * facts.embedding_length),
            )
            precise = alone and not host_layers and not facts.shared_expert_feed_forward_length
            stages.append((*(product if precise else stage), copy, *inputs))
        return self.widest(stages)

    @staticmethod
    def widest(stages: Iterable[tuple[Term, ...]]) -> tuple[Term, ...]:
        """The stage that takes most."""
        return max(stages, key=lambda terms: sum(term.bytes for term in terms))


def _times(count: int, terms: Iterable[Term]) -> tuple[Term, ...]:
    return tuple(Term(f"{count} x {term.name}", count * term.bytes, term.window) for term in terms)
