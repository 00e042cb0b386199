"""One way to run a model on one set of cards: placement, ledger, verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mgpu.machine.snapshot import Gpu, Host
from mgpu.models.facts import ModelFacts
from mgpu.planning.compute import compute_buffers
from mgpu.planning.ledger import PlannedDevice, PlannedHost
from mgpu.planning.memory import cache_bytes, device_kind, padded_ctx_tokens
from mgpu.planning.speed import Speed
from mgpu.planning.split import split_behind_first, split_by_proportions
from mgpu.planning.tensor_split import problems as tensor_split_problems
from mgpu.planning.tensor_split import tensor_split_bytes
from mgpu.planning.wants import Wants
from mgpu.units import gib

__all__ = [
    "TITLES",
    "Candidate",
    "PlannedDevice",
    "PlannedHost",
    "layer_split",
    "place_layers",
    "place_tensors",
    "planned_on_bytes",
    "with_max_ctx",
]

TITLES = {"llama.cpp": "llama.cpp", "vllm": "vLLM", "ollama": "Ollama"}
"""What engines call themselves, by the names of --backend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to run the model, with its verdict: "fits", "fits-with-offload", "does-not-fit", "illegal" or
    "unavailable". `short_bytes` is by how much it does not fit, 0 when it does. `speed` says nothing until
    `predicted.predicted` has filled it in."""

    backend: str
    split_mode: str
    tensor_parallel: int
    pipeline_parallel: int
    replicas: int
    quant: str | None
    kv_type: str
    ctx_tokens: int
    parallel: int
    verdict: str
    reasons: tuple[str, ...]
    devices: tuple[PlannedDevice, ...]
    host: PlannedHost
    short_bytes: int
    max_ctx_tokens: int | None
    speed: Speed
    wants: Wants

    @property
    def runs(self) -> bool:
        """Whether it can be run as it is: it fits, if need be with layers in host memory where they may be."""
        allowed = self.wants.offload or self.wants.cpu_moe_layers
        return self.verdict == "fits" or (self.verdict == "fits-with-offload" and bool(allowed))

    @property
    def users_per_replica(self) -> int:
        """How many of the users one replica serves at most, where they are dealt evenly."""
        return -(-self.parallel // self.replicas)


def layer_split(facts: ModelFacts, wants: Wants, gpus: Sequence[Gpu], host: Host, ctx_tokens: int) -> Candidate:
    """Return the best llama.cpp layer split of `facts` over `gpus` (all of them, in this order; none: the CPU), or the
    tensor split where `wants` asks for it.

    Without `wants.offload` all layers go to the cards and a split that overflows is returned as "does-not-fit";
    with it, as many as needed stay in host memory: the routed experts of the first layers, which are read least, and
    where that is not enough, whole first layers.
    """
    if not gpus:
        return place_layers(facts, wants, gpus, host, ctx_tokens, host_units=len(facts.layers) + 1)
    if wants.split_mode == "tensor" and len(gpus) > 1:
        return place_tensors(facts, wants, gpus, host, ctx_tokens)
    candidate = place_layers(facts, wants, gpus, host, ctx_tokens, host_units=0)
    if candidate.verdict == "fits" or not wants.offload:
        return candidate
    return _with_offload(facts, wants, gpus, host, ctx_tokens)


def with_max_ctx(candidate: Candidate, facts: ModelFacts, gpus: Sequence[Gpu], host: Host) -> Candidate:
    """Return `candidate` with the largest context per user (a multiple of 256, at most what the model was trained
    on) for which the same cards still fit; 0 when even 256 tokens do not."""
    granule = padded_ctx_tokens(1)
    low, high = 0, (facts.context_length or 1 << 20) // granule
    while low < high:
        middle = (low + high + 1) // 2
        tried = layer_split(facts, replace(candidate.wants, offload=False), gpus, host, middle * granule)
        low, high = (middle, high) if tried.verdict == "fits" else (low, middle - 1)
    return replace(candidate, max_ctx_tokens=low * granule)


def _with_offload(facts: ModelFacts, wants: Wants, gpus: Sequence[Gpu], host: Host, ctx_tokens: int) -> Candidate:
    """The fewest experts, or else the fewest layers, on the host for which the cards hold the rest."""

    def placed(host_units: int, expert_layers: int) -> Candidate:
        return place_layers(facts, wants, gpus, host, ctx_tokens, host_units=host_units, expert_layers=expert_layers)

    def held(candidate: Candidate) -> bool:
        return all(lacking <= 0 for lacking in _lacking_bytes(wants, gpus, candidate.devices))

    def fewest(most: int, tried: Callable[[int], Candidate]) -> int:
        low, high = 1, most
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if held(tried(middle)) else (middle + 1, high)
        return low

    layers = len(facts.layers)
    experts = 0
    if any(layer.expert_bytes for layer in facts.layers):
        least = fewest(layers, lambda count: placed(0, count))
        if held(candidate := placed(0, least)):
            return candidate
        experts = layers
    return placed(fewest(layers + 1, lambda count: placed(count, experts)), experts)


def _lacking_bytes(wants: Wants, gpus: Sequence[Gpu], devices: Sequence[PlannedDevice]) -> tuple[int, ...]:
    """By how much each of `gpus` misses its headroom with what is planned on it; negative where more stays free."""
    return tuple(
        wants.headroom_on(gpu) - device.spare_bytes
        for gpu, device in zip(gpus, devices, strict=bool(devices))
        if not device.idle
    )


def place_layers(
    facts: ModelFacts,
    wants: Wants,
    gpus: Sequence[Gpu],
    host: Host,
    ctx_tokens: int,
    *,
    host_units: int,
    expert_layers: int = 0,
) -> Candidate:
    """Return the candidate with the first `host_units` units (layers, then the head) in host memory, and the rest
    on `gpus` in the proportions of `wants.tensor_split` or, without one, balanced by what each card can take.

    The routed experts of the first `expert_layers` layers stay on the host, too (or of more, if `wants` says so).
    """
    asked, wants = wants, replace(wants, cpu_moe_layers=max(expert_layers, wants.cpu_moe_layers))
    host_experts = [layer.expert_bytes if i < wants.cpu_moe_layers else 0 for i, layer in enumerate(facts.layers)]
    weights = [layer.weights_bytes - experts for layer, experts in zip(facts.layers, host_experts, strict=True)]
    caches = cache_bytes(facts, wants, ctx_tokens)
    host_caches, caches = (caches, (0,) * len(caches)) if wants.kv_on_host else (caches[:host_units], caches)
    total_units = len(weights) + 1
    names = tuple(gpu.engine_devices[0] for gpu in gpus)
    host_layers = min(host_units, len(weights))
    buffers = compute_buffers(facts, wants, ctx_tokens, devices=names, host_layers=host_layers)

    unit_bytes = [w + kv + buffers.layer_bytes for w, kv in zip(weights, caches, strict=True)] + [facts.head_bytes]
    unit_bytes = unit_bytes[host_units:]
    if not gpus or host_units >= total_units:
        counts: tuple[int, ...] = ()
    elif wants.tensor_split:
        counts = split_by_proportions(len(unit_bytes), wants.tensor_split)
    else:
        rooms = [
            planned_on_bytes(gpu) - device_kind(name).runtime_bytes - wants.headroom_on(gpu)
            for gpu, name in zip(gpus, names, strict=True)
        ]
        counts = split_behind_first(
            unit_bytes,
            rooms,
            first_bytes=buffers.first.bytes,
            other_bytes=buffers.other.bytes,
            head_bytes=buffers.head_only.bytes,
        )
    if 0 in counts:
        used = tuple(name for name, count in zip(names, counts, strict=True) if count)
        buffers = compute_buffers(facts, wants, ctx_tokens, devices=used, host_layers=host_layers)

    devices, start = [], host_units
    for gpu, name, count in zip(gpus, names, counts, strict=bool(counts)):  # else layers would be nowhere
        end = start + count
        head = start < total_units <= end
        own = slice(start, min(end, len(weights)))
        compute = buffers.on(facts.layers[own], first=start == host_units, head=head)
        devices.append(
            _device(
                gpu,
                name,
                facts,
                first_layer=start,
                layers=count - head,
                head=head,
                weights_bytes=sum(weights[own]) + (facts.head_bytes if head else 0),
                kv_bytes=sum(caches[own]),
                compute_bytes=compute.bytes,
            )
        )
        start = end
    # A tied head on the host is the embedding itself, not a second copy.
    host_head = facts.head_bytes if host_units >= total_units and not facts.tied else 0
    planned_host = PlannedHost(
        layers=host_layers,
        expert_layers=min(wants.cpu_moe_layers, len(weights)) if any(host_experts[host_layers:]) else 0,
        weights_bytes=facts.embedding_bytes
        + facts.other_bytes
        + sum((*weights[:host_layers], *host_experts, host_head)),
        kv_bytes=sum(host_caches),
        compute_bytes=buffers.host.bytes,
        free_bytes=host.ram_available_bytes,
        basis=f"weights: {facts.weights_basis}, KV: formula, compute: formula",
    )
    return _judged(facts, asked, gpus, ctx_tokens, tuple(devices), planned_host)


def place_tensors(facts: ModelFacts, wants: Wants, gpus: Sequence[Gpu], host: Host, ctx_tokens: int) -> Candidate:
    """Return llama.cpp's tensor split of `facts` over `gpus`, two or more: every card holds a part of every layer.

    In the proportions of `wants.tensor_split`, or equal parts, as llama.cpp makes them without one. It leaves nothing
    on the host but the embedding. A candidate that llama.cpp would refuse is "illegal", with the reasons.
    """
    proportions = wants.tensor_split or (1.0,) * len(gpus)
    names = tuple(gpu.engine_devices[0] for gpu in gpus)
    # Each device computes on buffers of the size that one alone would have.
    buffers = compute_buffers(facts, wants, ctx_tokens, devices=names[:1], host_layers=0)
    parts = tensor_split_bytes(facts, wants, ctx_tokens, proportions)
    devices = tuple(
        _device(
            gpu,
            name,
            facts,
            first_layer=0,
            layers=len(facts.layers),
            head=True,
            weights_bytes=weights,
            kv_bytes=0 if wants.kv_on_host else cache,
            compute_bytes=buffers.on(facts.layers, first=True, head=True).bytes,
        )
        for gpu, name, (weights, cache) in zip(gpus, names, parts, strict=True)
    )
    planned_host = PlannedHost(
        layers=0,
        weights_bytes=facts.embedding_bytes + facts.other_bytes,
        kv_bytes=sum(cache_bytes(facts, wants, ctx_tokens)) if wants.kv_on_host else 0,
        compute_bytes=buffers.host.bytes,
        free_bytes=host.ram_available_bytes,
        basis=f"weights: {facts.weights_basis}, KV: formula, compute: formula",
    )
    candidate = _judged(facts, wants, gpus, ctx_tokens, devices, planned_host)
    candidate = replace(candidate, split_mode="tensor")
    refused = tuple(tensor_split_problems(facts, wants, len(gpus)))
    if refused:
        return replace(candidate, verdict="illegal", reasons=refused)
    return replace(candidate, reasons=(*candidate.reasons, "llama.cpp calls its tensor split experimental"))


def _device(
    gpu: Gpu,
    device: str,
    facts: ModelFacts,
    *,
    first_layer: int,
    layers: int,
    head: bool,
    weights_bytes: int,
    kv_bytes: int,
    compute_bytes: int,
) -> PlannedDevice:
    return PlannedDevice(
        gpu=gpu.index,
        uuid=gpu.uuid,
        name=gpu.name,
        device=device,
        first_layer=first_layer,
        layers=layers,
        head=head,
        weights_bytes=weights_bytes,
        kv_bytes=kv_bytes,
        compute_bytes=compute_bytes,
        runtime_bytes=device_kind(device).runtime_bytes if layers or head else 0,
        card_bytes=gpu.total_bytes,
        free_bytes=planned_on_bytes(gpu),
        basis=f"weights: {facts.weights_basis}, KV: formula, compute: formula, runtime: table",
    )


def planned_on_bytes(gpu: Gpu) -> int:
    """Return the card's free memory; all of it where the driver does not say what is free, 0 where it says nothing."""
    return next((known for known in (gpu.free_bytes, gpu.total_bytes) if known is not None), 0)


def _judged(
    facts: ModelFacts,
    wants: Wants,
    gpus: Sequence[Gpu],
    ctx_tokens: int,
    devices: tuple[PlannedDevice, ...],
    host: PlannedHost,
) -> Candidate:
    used = [device for device in devices if not device.idle]
    lacking = _lacking_bytes(wants, gpus, devices)
    short = sum(max(each, 0) for each in lacking)
    unread = {gpu.index: gpu.total_bytes for gpu in gpus if gpu.free_bytes is None}
    unknown = [device.gpu for device in devices if device.gpu in unread and unread[device.gpu] is None]
    assumed = [device.gpu for device in used if device.gpu in unread and unread[device.gpu] is not None]
    reasons = [f"memory of gpu{index} is unknown" for index in unknown]
    reasons += [f"free memory of gpu{index} is unknown: planned on its whole memory" for index in assumed]
    if short and not any(device.gpu in unknown for device in used):
        free = sum(device.free_bytes for device in used)
        lacks = [f"gpu{device.gpu} by {gib(each)}" for each, device in zip(lacking, used, strict=True) if each > 0]
        told = f"{gib(free + sum(lacking))} needed on the cards, {gib(free)} free: short on {', '.join(lacks)}"
        kept = sorted({wants.headroom_on(gpu) for gpu in gpus})
        reasons.append(f"{told} ({' to '.join(map(gib, kept))} headroom on each included)" if kept[-1] else told)
    if host.spare_bytes is not None and host.spare_bytes < 0:
        short += -host.spare_bytes
        reasons.append(f"{gib(host.total_bytes)} needed in host memory, {gib(host.free_bytes or 0)} available")
    if short:
        verdict = "does-not-fit"
    elif gpus and (host.layers or host.expert_layers):
        verdict = "fits-with-offload"
        reasons.append(f"{host.words(len(facts.layers))} stay in host memory: slow")
    else:
        verdict = "fits"
    if (host.layers or host.expert_layers) and host.free_bytes is None:
        reasons.append("the host's memory is unknown, so it was not checked")
    if facts.context_length and ctx_tokens > facts.context_length:
        reasons.append(f"{ctx_tokens} tokens are more than the {facts.context_length} the model was trained for")
    idle = [f"gpu{device.gpu}" for device in devices if device.idle]
    if idle:
        reasons.append(f"{', '.join(idle)} would hold nothing")
    return Candidate(
        backend="llama.cpp",
        split_mode="layer" if len(used) > 1 else "none",
        tensor_parallel=1,
        pipeline_parallel=1,
        replicas=1,
        quant=facts.quantisation,
        kv_type=wants.kv_type_k,
        ctx_tokens=ctx_tokens,
        parallel=wants.parallel,
        verdict=verdict,
        reasons=tuple(reasons),
        devices=devices,
        host=host,
        short_bytes=short,
        max_ctx_tokens=None,
        speed=Speed(),
        wants=wants,
    )
