"""One way to run a model on one set of cards: placement, ledger, verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mgpu.machine.snapshot import Gpu, Host
from mgpu.models.facts import ModelFacts
from mgpu.planning.memory import compute_buffers, device_kind, kv_bytes, padded_ctx_tokens
from mgpu.planning.speed import Speed, active_bytes, layer_split_bound
from mgpu.planning.split import balanced_split, split_by_proportions
from mgpu.planning.wants import Wants
from mgpu.units import gib


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedDevice:
    """One card's ledger. `device` is the engine's name for it; `layers` counts the repeating layers from
    `first_layer` on; `head` says that it also holds the output head. `card_bytes` is the card's
    whole memory, `total_bytes` what is planned on it, `spare_bytes` what then stays free."""

    gpu: int
    uuid: str | None
    name: str
    device: str
    first_layer: int
    layers: int
    head: bool
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    runtime_bytes: int
    card_bytes: int | None
    free_bytes: int
    basis: str

    @property
    def idle(self) -> bool:
        """Whether nothing of the model is on this card: the engine is then started without it."""
        return not self.layers and not self.head

    @property
    def total_bytes(self) -> int:
        """Everything the engine will hold on this card."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.runtime_bytes

    @property
    def spare_bytes(self) -> int:
        """What stays free; negative when the card overflows."""
        return self.free_bytes - self.total_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedHost:
    """The host memory's ledger; `free_bytes` is None when unknown."""

    layers: int
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    free_bytes: int | None

    @property
    def total_bytes(self) -> int:
        """Everything the engine will hold in host memory (mapped weights included)."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes

    @property
    def spare_bytes(self) -> int | None:
        """What stays available, None when unknown."""
        return None if self.free_bytes is None else self.free_bytes - self.total_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to run the model, with its verdict: "fits", "fits-with-offload", "does-not-fit", "illegal" or
    "unavailable". `short_bytes` is by how much it does not fit, 0 when it does."""

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
        return self.verdict == "fits" or (self.verdict == "fits-with-offload" and self.wants.offload)


def layer_split(facts: ModelFacts, wants: Wants, gpus: Sequence[Gpu], host: Host, ctx_tokens: int) -> Candidate:
    """Return the best llama.cpp layer split of `facts` over `gpus` (all of them, in this order; none: the CPU).

    Without `wants.offload` all layers go to the cards and a split that overflows is returned as "does-not-fit";
    with it, as many first layers as needed stay in host memory.
    """
    if not gpus:
        return place_layers(facts, wants, gpus, host, ctx_tokens, host_units=len(facts.layers) + 1)
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
    """The fewest layers on the host for which the cards hold the rest."""
    low, high = 1, len(facts.layers) + 1
    while low < high:
        middle = (low + high) // 2
        tried = place_layers(facts, wants, gpus, host, ctx_tokens, host_units=middle)
        low, high = (low, middle) if _cards_hold(tried) else (middle + 1, high)
    return place_layers(facts, wants, gpus, host, ctx_tokens, host_units=low)


def _cards_hold(candidate: Candidate) -> bool:
    headroom_bytes = candidate.wants.headroom_bytes
    return all(device.idle or device.spare_bytes >= headroom_bytes for device in candidate.devices)


def place_layers(
    facts: ModelFacts, wants: Wants, gpus: Sequence[Gpu], host: Host, ctx_tokens: int, *, host_units: int
) -> Candidate:
    """Return the candidate with the first `host_units` units (layers, then the head) in host memory, and the rest
    on `gpus` in the proportions of `wants.tensor_split` or, without one, balanced by what each card can take."""
    host_experts = [layer.expert_bytes if i < wants.cpu_moe_layers else 0 for i, layer in enumerate(facts.layers)]
    weights = [layer.weights_bytes - experts for layer, experts in zip(facts.layers, host_experts, strict=True)]
    caches = [kv_bytes(layer, wants, ctx_tokens) for layer in facts.layers]
    host_caches, caches = (caches, [0] * len(caches)) if wants.kv_on_host else (caches[:host_units], caches)
    total_units = len(weights) + 1
    names = tuple(gpu.engine_devices[0] for gpu in gpus)
    host_layers = min(host_units, len(weights))
    buffers = compute_buffers(facts, wants, ctx_tokens, devices=names, host_layers=host_layers)

    unit_bytes = [w + kv for w, kv in zip(weights, caches, strict=True)] + [facts.head_bytes]
    unit_bytes = unit_bytes[host_units:]
    if not gpus or host_units >= total_units:
        counts: tuple[int, ...] = ()
    elif wants.tensor_split:
        counts = split_by_proportions(len(unit_bytes), wants.tensor_split)
    else:
        capacities = [
            _planned_on_bytes(gpu)
            - device_kind(name).runtime_bytes
            - wants.headroom_bytes
            - (buffers.first if i == 0 else buffers.other)
            for i, (gpu, name) in enumerate(zip(gpus, names, strict=True))
        ]
        counts = balanced_split(unit_bytes, capacities)
    if 0 in counts:
        used = tuple(name for name, count in zip(names, counts, strict=True) if count)
        buffers = compute_buffers(facts, wants, ctx_tokens, devices=used, host_layers=host_layers)

    devices, start = [], host_units
    for gpu, name, count in zip(gpus, names, counts, strict=bool(counts)):  # else layers would be nowhere
        end = start + count
        head = start < total_units <= end
        own = slice(start, min(end, len(weights)))
        compute = buffers.first if start == host_units else buffers.other
        if head and count == 1:
            compute = buffers.head_only
        devices.append(
            PlannedDevice(
                gpu=gpu.index,
                uuid=gpu.uuid,
                name=gpu.name,
                device=name,
                first_layer=start,
                layers=count - head,
                head=head,
                weights_bytes=sum(weights[own]) + (facts.head_bytes if head else 0),
                kv_bytes=sum(caches[own]),
                compute_bytes=compute if count else 0,
                runtime_bytes=device_kind(name).runtime_bytes if count else 0,
                card_bytes=gpu.total_bytes,
                free_bytes=_planned_on_bytes(gpu),
                basis="weights and KV by formula from the tensor table, runtime from a table",
            )
        )
        start = end
    # A tied head on the host is the embedding itself, not a second copy.
    host_head = facts.head_bytes if host_units >= total_units and not facts.tied else 0
    planned_host = PlannedHost(
        layers=host_layers,
        weights_bytes=facts.embedding_bytes
        + facts.other_bytes
        + sum(weights[:host_layers])
        + sum(host_experts)
        + host_head,
        kv_bytes=sum(host_caches),
        compute_bytes=buffers.host,
        free_bytes=host.ram_available_bytes,
    )
    return _judged(facts, wants, gpus, ctx_tokens, tuple(devices), planned_host)


def _planned_on_bytes(gpu: Gpu) -> int:
    """The card's free memory; the whole of it where the driver does not say what is free, 0 where it says nothing."""
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
    short = sum(max(wants.headroom_bytes - device.spare_bytes, 0) for device in used)
    unread = {gpu.index: gpu.total_bytes for gpu in gpus if gpu.free_bytes is None}
    unknown = [device.gpu for device in devices if device.gpu in unread and unread[device.gpu] is None]
    assumed = [device.gpu for device in used if device.gpu in unread and unread[device.gpu] is not None]
    reasons = [f"memory of gpu{index} is unknown" for index in unknown]
    reasons += [f"free memory of gpu{index} is unknown: planned on its whole memory" for index in assumed]
    if short and not any(device.gpu in unknown for device in used):
        fullest = min(used, key=lambda device: device.spare_bytes)
        needed = sum(device.total_bytes + wants.headroom_bytes for device in used)
        free = sum(device.free_bytes for device in used)
        reasons.append(
            f"{gib(needed)} needed on the cards, {gib(free)} free; "
            f"gpu{fullest.gpu} is short by {gib(wants.headroom_bytes - fullest.spare_bytes)}"
        )
    if host.spare_bytes is not None and host.spare_bytes < 0:
        short += -host.spare_bytes
        reasons.append(f"{gib(host.total_bytes)} needed in host memory, {gib(host.free_bytes or 0)} available")
    if short:
        verdict = "does-not-fit"
    elif gpus and host.layers:
        verdict = "fits-with-offload"
        reasons.append(f"{host.layers} of {len(facts.layers)} layers stay in host memory: slow")
    else:
        verdict = "fits"
    if host.layers and host.free_bytes is None:
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
        speed=_bound(facts, wants, gpus, devices, host),
        wants=wants,
    )


def _bound(
    facts: ModelFacts, wants: Wants, gpus: Sequence[Gpu], devices: tuple[PlannedDevice, ...], host: PlannedHost
) -> Speed:
    """The physical bound at an empty context; none with layers in host memory, whose bandwidth is unknown."""
    if host.layers or wants.cpu_moe_layers or not devices:
        return Speed()
    reads = []
    for gpu, device in zip(gpus, devices, strict=True):
        layers = facts.layers[device.first_layer : device.first_layer + device.layers]
        read = sum(active_bytes(layer, facts) for layer in layers) + (facts.head_bytes if device.head else 0)
        if read:
            reads.append((read, gpu.bandwidth_gb_s))
    return layer_split_bound(reads)
