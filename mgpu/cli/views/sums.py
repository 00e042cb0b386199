"""The sums behind a plan, as `mgpu plan --explain` shows them: each can be redone with a pencil."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mgpu.cli.views.words import closing_gib
from mgpu.models.facts import Layer, ModelFacts
from mgpu.planning.candidates import Candidate, PlannedDevice
from mgpu.planning.compute import Buffer, ComputeBuffers, compute_buffers
from mgpu.planning.memory import cache_bytes, kv_cells, ubatch_tokens
from mgpu.planning.plan import Plan
from mgpu.planning.vllm_memory import (
    DEFAULT_UTILISATION,
    KV_BYTES,
    REPLICATED_SHARE,
    VllmWants,
    kv_token_bytes,
    model_bytes,
    stage_bytes,
    visible_bytes,
)
from mgpu.planning.vllm_placement import own_layers, planned_kv_tokens
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
    yield from _labelled("total", _totals(plan, candidate))
    where = "where "
    sums = candidate.speed.sums
    yield from _labelled(
        "speed", [*_read(plan.model, candidate), *(line for line in sums if not line.startswith(where))]
    )
    yield from _labelled("where", [line.removeprefix(where) for line in sums if line.startswith(where)])


def _labelled(label: str, lines: Sequence[str] | Iterator[str]) -> Iterator[tuple[str, str]]:
    yield from ((label if place == 0 else "", line) for place, line in enumerate(lines))


def _weights(facts: ModelFacts, candidate: Candidate) -> Iterator[str]:
    used = [device for device in candidate.devices if not device.idle]
    head = f" + head {_gib(facts.head_bytes)} GiB"
    if candidate.split_mode == "tensor":
        total = sum(layer.weights_bytes for layer in facts.layers)
        cut = f"cut over {len(used)} cards"
        both = f"{head}, each {cut}" if facts.head_cut else f" {cut}{head} whole on each"
        yield f"{len(facts.layers)} layers {_gib(total)} GiB{both} (from {facts.source})"
        for device in used:
            yield f"gpu{device.gpu}: its part {_gib(device.weights_bytes)} GiB"
        parts, whole = sum(device.weights_bytes for device in used), total + facts.head_bytes
        if parts - whole > GIB // 200:
            copies = f"{_gib(parts - whole)} GiB more than the model's {_gib(whole)}"
            yield f"all parts: {_gib(parts)} GiB, {copies}: what cannot be cut is whole on each"
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
    if candidate.host.layers and candidate.devices:
        yield f"host: {_caches_of(each_size[: candidate.host.layers])} MiB = {_gib(candidate.host.kv_bytes)} GiB"
    for device in candidate.devices:
        if device.idle:
            continue
        own = each_size[device.first_layer : device.first_layer + device.layers]
        cut = f" × {device.kv_bytes / max(1, sum(own)):.3g} of it here" if tensor else ""
        yield f"gpu{device.gpu}: {_caches_of(own)} MiB{cut} = {_gib(device.kv_bytes)} GiB"


def _caches_of(sizes: Sequence[int]) -> str:
    kinds = Counter(size for size in sizes if size)
    words = " + ".join(f"{count} × {size / MIB:.2f}" for size, count in kinds.items()) or "0"
    return f"({words})" if len(kinds) > 1 else words


def _compute(facts: ModelFacts, candidate: Candidate) -> Iterator[str]:
    """The terms of each card's buffer, those of cards with the same buffer once."""
    wants, used = candidate.wants, [device for device in candidate.devices if not device.idle]
    tokens = ubatch_tokens(wants, candidate.ctx_tokens)
    yield f"what is alive at once, in 32-bit values for each of the {tokens} tokens of a micro-batch"
    buffers = _buffers(facts, candidate, used)
    told: dict[str, list[str]] = {}
    for place, device in enumerate(used):
        tensor = candidate.split_mode == "tensor"
        own = facts.layers[device.first_layer : device.first_layer + device.layers]
        buffer = buffers.on(own, first=tensor or place == 0, head=device.head)
        words = _terms(buffer, tokens) if buffer.bytes == device.compute_bytes else "as llama.cpp allocates it"
        told.setdefault(f"{words} = {device.compute_bytes / MIB:.2f} MiB", []).append(f"gpu{device.gpu}")
    for words, names in told.items():
        yield f"{', '.join(names)}: {words}"


def _terms(buffer: Buffer, tokens: int) -> str:
    """The sum of a buffer: what grows with the tokens as values of each, the rest in MiB."""
    each = 4 * tokens
    values = [(term.name, term.bytes // each) for term in buffer.terms if term.bytes and term.bytes % each == 0]
    others = [f"{term.name} {term.bytes / MIB:.2f} MiB" for term in buffer.terms if term.bytes % each]
    many = " + ".join(f"{name} {count}" for name, count in values)
    sums = [f"({many} = {sum(count for _, count in values)}) × {tokens} × 4 B"] if values else []
    return " + ".join(sums + others)


def _read(facts: ModelFacts, candidate: Candidate) -> Iterator[str]:
    """What a token reads of the weights, in the units of bandwidths."""
    if not candidate.speed.sums:
        return
    experts = sum(layer.expert_bytes for layer in facts.layers) if facts.experts else 0
    layers, head = sum(layer.weights_bytes for layer in facts.layers) - experts, facts.head_bytes
    words = f"{layers / 1e9:.2f} GB of layers + {head / 1e9:.2f} GB of the head"
    read = layers + head
    if experts:
        words += f" + {experts / 1e9:.2f} GB of experts × {facts.experts_used} ÷ {facts.experts}"
        read += experts * facts.experts_used // facts.experts
    cut = candidate.split_mode == "tensor"
    several = f", dealt to {candidate.tensor_parallel} cards"
    if candidate.backend != "vllm":
        several = f", dealt to {len(candidate.devices)} cards, on each with what cannot be cut"
    yield f"a token reads {words} = {read / 1e9:.2f} GB{several if cut else ''}; the embedding is looked up, not read"


def _buffers(facts: ModelFacts, candidate: Candidate, used: Sequence[PlannedDevice]) -> ComputeBuffers:
    wants = candidate.wants
    wants = replace(wants, cpu_moe_layers=max(candidate.host.expert_layers, wants.cpu_moe_layers))
    names = tuple(device.device for device in used)
    names = names[:1] if candidate.split_mode == "tensor" else names
    return compute_buffers(facts, wants, candidate.ctx_tokens, devices=names, host_layers=candidate.host.layers)


def _totals(plan: Plan, candidate: Candidate) -> Iterator[str]:
    for device in candidate.devices:
        if device.total_bytes:
            parts = (device.weights_bytes, device.kv_bytes, device.compute_bytes, device.runtime_bytes)
            total, free, spare = (
                cell.replace("-", "0.00") if cell == "-" else cell for cell in closing_gib(parts, device.free_bytes)
            )
            yield f"gpu{device.gpu}: {' + '.join(map(_gib, parts))} = {total}; {free} free - {total} = {spare} spare"
    if candidate.backend != "vllm":
        used = {device.gpu for device in candidate.devices if not device.idle}
        kept: dict[int, list[str]] = {}
        for gpu in plan.machine.gpus:
            if gpu.index in used:
                kept.setdefault(candidate.wants.headroom_on(gpu), []).append(f"gpu{gpu.index}")
        for size, names in kept.items():
            where = "each card" if len(kept) == 1 else ", ".join(names)
            yield f"{_gib(size)} GiB of the spare memory are kept free on {where} (--headroom)"


def _vllm(facts: ModelFacts, candidate: Candidate) -> Iterator[tuple[str, str]]:
    wants = candidate.wants
    assert isinstance(wants, VllmWants)
    parts = candidate.tensor_parallel
    cut = f", each layer cut into {parts} parts" if parts > 1 else ""
    yield "weights", f"{_gib(model_bytes(facts))} GiB in all{cut} (from {facts.source})"
    for names, device in _by_stage(candidate):
        stage = stage_bytes(facts, device.first_layer, device.layers)
        whole = f" ÷ {parts} × {REPLICATED_SHARE} (norms and padding are whole on each)" if parts > 1 else ""
        own = f"{_layers(device.layers)}{_besides(facts, device)} {_gib(stage)} GiB{whole}"
        yield "", f"{names}: {own} = {_gib(device.weights_bytes)} GiB"
    kinds = Counter(_kind(layer) for layer in facts.layers)
    for place, (layer, count) in enumerate(kinds.items()):
        heads = _counted(max(1, layer.kv_heads // parts), "head")
        window = f" in a window of {layer.sliding_window}" if layer.sliding_window else ""
        each = KV_BYTES.get(candidate.kv_type, 2)
        values = f"({layer.key_length} K + {layer.value_length} V) {candidate.kv_type} × {each} B"
        cache = f"per layer and token {heads} on each card × {values}, {_layers(count)}{window}"
        yield "KV" if place == 0 else "", cache
    for names, device in _by_stage(candidate):
        each = kv_token_bytes(own_layers(facts, device), parts, candidate.kv_type)
        yield "", f"{names}: {_layers(device.layers)}, {each} B for a token"
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
    first = candidate.devices[0]
    held = "activations of a batch and what CUDA and NCCL hold: 0.29 to 0.70 GiB were measured in 18 starts"
    yield "compute", f"{_gib(first.compute_bytes)} GiB on each card for {held}"
    graphs = "CUDA graphs: 0.1 to 0.7 GiB were measured; none with -- --enforce-eager"
    yield "runtime", f"{_gib(first.runtime_bytes)} GiB on each card for {graphs}"


def _by_stage(candidate: Candidate) -> Iterator[tuple[str, PlannedDevice]]:
    """The cards that hold the same layers, by their names, and the first of them."""
    stages: dict[tuple[int, int, int], list[PlannedDevice]] = {}
    for device in candidate.devices:
        if not device.idle:
            stages.setdefault((device.first_layer, device.layers, device.weights_bytes), []).append(device)
    for devices in stages.values():
        yield ", ".join(f"gpu{device.gpu}" for device in devices), devices[0]


def _besides(facts: ModelFacts, device: PlannedDevice) -> str:
    parts = [" + embedding"] if device.first_layer == 0 else []
    parts += [" + head"] if device.head and not (facts.tied and device.first_layer == 0) else []
    return "".join(parts)


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
