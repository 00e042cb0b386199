"""The sums behind a plan, as `mgpu plan --explain` shows them: each can be redone with a pencil."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mgpu.models.facts import Layer, ModelFacts
from mgpu.planning.candidates import Candidate, PlannedDevice
from mgpu.planning.compute import ComputeBuffers, compute_buffers
from mgpu.planning.memory import cache_bytes, kv_cells
from mgpu.planning.plan import Plan
from mgpu.planning.vllm_memory import DEFAULT_UTILISATION, KV_BYTES, VllmWants, model_bytes, visible_bytes
from mgpu.planning.vllm_placement import planned_kv_tokens
from mgpu.planning.wants import KV_ELEMENT_BYTES
from mgpu.units import GIB, MIB


def explanation(plan: Plan, candidate: Candidate) -> Iterator[tuple[str, str]]:
    """Yield label and sum, line by line: weights, KV cache, compute buffers, the total of each card, the speed. A line
    without a label goes on with the one before."""
    if candidate.backend == "vllm":
        yield from _vllm(plan.model, candidate)
    else:
        yield from _labelled("weights", _weights(plan.model, candidate))
        yield from _labelled("KV", _caches(plan.model, candidate))
        yield from _labelled("compute", _compute(plan.model, candidate))
        if candidate.devices:
            yield "runtime", "the driver's context on each card, from a table: no driver tells beforehand"
    yield from _labelled("total", _totals(candidate))
    yield from _labelled("speed", candidate.speed.sums)


def _labelled(label: str, lines: Sequence[str] | Iterator[str]) -> Iterator[tuple[str, str]]:
    yield from ((label if place == 0 else "", line) for place, line in enumerate(lines))


def _weights(facts: ModelFacts, candidate: Candidate) -> Iterator[str]:
    used = [device for device in candidate.devices if not device.idle]
    head = f" + head {_gib(facts.head_bytes)} GiB"
    if candidate.split_mode == "tensor":
        total = sum(layer.weights_bytes for layer in facts.layers)
        cut = f"each cut over {len(used)} cards (from {facts.source})"
        yield f"{len(facts.layers)} layers {_gib(total)} GiB{head}, {cut}"
        for device in used:
            yield f"gpu{device.gpu}: its part {_gib(device.weights_bytes)} GiB"
    else:
        for device in used:
            own = device.weights_bytes - (facts.head_bytes if device.head else 0)
            both = f"{head} = {_gib(device.weights_bytes)} GiB" if device.head else ""
            yield f"gpu{device.gpu}: {_layers(device.layers)} {_gib(own)} GiB{both}"
        yield f"all sizes from {facts.source}"
    host, words = candidate.host, candidate.host.words(len(facts.layers))
    kept = (
        f"{words} and the embeddings" if words and candidate.devices else "embeddings" if candidate.devices else "all"
    )
    yield f"host: {kept} {_gib(host.weights_bytes)} GiB"


def _caches(facts: ModelFacts, candidate: Candidate) -> Iterator[str]:
    """The cache of each kind of layer, and how many of them each card has."""
    wants, tensor = candidate.wants, candidate.split_mode == "tensor"
    each_size = cache_bytes(facts, wants, candidate.ctx_tokens)
    size_of = dict(zip(map(_kind, facts.layers), each_size, strict=True))
    for layer, count in Counter(_kind(layer) for layer in facts.layers).items():
        parts = []
        if layer.kv_heads:
            values = f"{layer.value_length} V × {_bytes(wants.kv_type_v)} B"
            cells = kv_cells(layer, wants, candidate.ctx_tokens)
            window = f" (a window of {layer.sliding_window} tokens, and a batch)" if layer.sliding_window else ""
            caches = 1 if wants.kv_unified else candidate.parallel
            parts.append(
                f"{_counted(layer.kv_heads, 'head')} × ({layer.key_length} K × {_bytes(wants.kv_type_k)} B + {values})"
                f" × {cells} tokens{window} × {_counted(caches, 'user')}"
            )
        if layer.state_bytes:
            parts.append(f"{layer.state_bytes / MIB:.2f} MiB of state × {_counted(candidate.parallel, 'user')}")
        if parts:
            yield f"{_layers(count)}, each {' + '.join(parts)} = {size_of[layer] / MIB:.2f} MiB"
    if wants.kv_on_host:
        yield "all of it in host memory"
        return
    for device in candidate.devices:
        if device.idle:
            continue
        kinds = Counter(each_size[device.first_layer : device.first_layer + device.layers])
        sums = " + ".join(f"{count} × {size / MIB:.2f}" for size, count in kinds.items() if size) or "0"
        cut = f", {device.kv_bytes / max(1, sum(s * n for s, n in kinds.items())):.3f} of it here" if tensor else ""
        yield f"gpu{device.gpu}: {sums} MiB{cut} = {_gib(device.kv_bytes)} GiB"


def _compute(facts: ModelFacts, candidate: Candidate) -> Iterator[str]:
    """The terms of each card's buffer, those of cards with the same buffer once."""
    wants, used = candidate.wants, [device for device in candidate.devices if not device.idle]
    yield f"what is alive at once of a micro-batch of {wants.ubatch} tokens"
    buffers = _buffers(facts, candidate, used)
    told: dict[str, list[str]] = {}
    for place, device in enumerate(used):
        tensor = candidate.split_mode == "tensor"
        own = facts.layers[device.first_layer : device.first_layer + device.layers]
        buffer = buffers.on(own, first=tensor or place == 0, head=device.head)
        terms = " + ".join(f"{term.name} {term.bytes / MIB:.2f}" for term in buffer.terms if term.bytes)
        words = terms if buffer.bytes == device.compute_bytes else "as llama.cpp allocates it"
        told.setdefault(f"{words} = {device.compute_bytes / MIB:.2f} MiB", []).append(f"gpu{device.gpu}")
    for words, names in told.items():
        yield f"{', '.join(names)}: {words}"


def _buffers(facts: ModelFacts, candidate: Candidate, used: Sequence[PlannedDevice]) -> ComputeBuffers:
    wants = candidate.wants
    wants = replace(wants, cpu_moe_layers=max(candidate.host.expert_layers, wants.cpu_moe_layers))
    names = tuple(device.device for device in used)
    names = names[:1] if candidate.split_mode == "tensor" else names
    return compute_buffers(facts, wants, candidate.ctx_tokens, devices=names, host_layers=candidate.host.layers)


def _totals(candidate: Candidate) -> Iterator[str]:
    for device in candidate.devices:
        if device.total_bytes:
            parts = (device.weights_bytes, device.kv_bytes, device.compute_bytes, device.runtime_bytes)
            sum_ = f"{' + '.join(map(_gib, parts))} = {_gib(device.total_bytes)}"
            rest = f"{_gib(device.free_bytes)} free - {_gib(device.total_bytes)} = {_gib(device.spare_bytes)} spare"
            yield f"gpu{device.gpu}: {sum_}; {rest}"
    if candidate.backend != "vllm" and candidate.devices:
        yield f"{_gib(candidate.wants.headroom_bytes)} GiB of the spare memory are kept free on each card"


def _vllm(facts: ModelFacts, candidate: Candidate) -> Iterator[tuple[str, str]]:
    wants = candidate.wants
    assert isinstance(wants, VllmWants)
    parts = candidate.tensor_parallel
    cut = f", each layer cut into {parts} parts" if parts > 1 else ""
    yield "weights", f"{_gib(model_bytes(facts))} GiB in all{cut} (from {facts.source})"
    kinds = Counter(_kind(layer) for layer in facts.layers)
    for place, (layer, count) in enumerate(kinds.items()):
        heads = _counted(max(1, layer.kv_heads // parts), "head")
        window = f" in a window of {layer.sliding_window}" if layer.sliding_window else ""
        each = KV_BYTES.get(candidate.kv_type, 2)
        values = f"({layer.key_length} K + {layer.value_length} V) {candidate.kv_type} × {each} B"
        cache = f"per layer and token {heads} on each card × {values}, {_layers(count)}{window}"
        yield "KV" if place == 0 else "", cache
    held = f"{planned_kv_tokens(candidate, facts)} tokens in all"
    each_user = "the user" if candidate.parallel == 1 else f"each of {candidate.parallel} users"
    yield "", f"{held}, {candidate.ctx_tokens} for {each_user} at most"
    if not candidate.devices:
        return
    share = wants.gpu_memory_utilization or DEFAULT_UTILISATION
    yield "share", f"vLLM takes {share:g} of what CUDA sees of a card (98 % of the driver's figure)"
    for device in candidate.devices:
        taken = int(visible_bytes(device.card_bytes or 0) * share)
        rest = taken - device.weights_bytes - device.compute_bytes - device.runtime_bytes
        had = f"{share:g} × 0.98 × {_gib(device.card_bytes or 0)} = {_gib(taken)} GiB"
        less = " - ".join(map(_gib, (taken, device.weights_bytes, device.compute_bytes, device.runtime_bytes)))
        yield "", f"gpu{device.gpu}: {had}; {less} = {_gib(rest)} GiB for the KV cache"
    yield "compute", "activations of a batch and what CUDA and NCCL hold, measured: 0.3 to 0.7 GiB"
    yield "runtime", "CUDA graphs, measured: 0.1 to 0.7 GiB; none with -- --enforce-eager"


def _kind(layer: Layer) -> Layer:
    """The layer as far as its cache goes."""
    return replace(layer, weights_bytes=0, expert_bytes=0, cuts=())


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f}"


def _bytes(kv_type: str) -> str:
    return f"{KV_ELEMENT_BYTES[kv_type]:g}"


def _layers(count: int) -> str:
    return _counted(count, "layer")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
