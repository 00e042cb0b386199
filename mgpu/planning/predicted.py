"""The speed of a candidate: what its engine reads on which card for a token, and what is predicted of that."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mgpu.machine.snapshot import Gpu, Host, Link
from mgpu.models.facts import Layer, ModelFacts
from mgpu.planning.candidates import TITLES, Candidate
from mgpu.planning.ledger import PlannedDevice
from mgpu.planning.links import link_gb_s
from mgpu.planning.memory import cache_bytes
from mgpu.planning.prediction import Prediction, predict
from mgpu.planning.speed import Speed, floored
from mgpu.planning.speed_constants import VALUES
from mgpu.planning.vllm_memory import KV_BYTES
from mgpu.planning.vllm_room import users_at_once
from mgpu.planning.wants import KV_ELEMENT_BYTES
from mgpu.planning.work import HostPart, Share, Stage, Work, chip_of, is_quantised, link_between, share_of

_UNKNOWN_TOGETHER = "nobody measured several users at once with layers in host memory"
# Fewer cores cannot read memory as fast as it is: the published rates are of desktops and servers.
_FEWEST_CORES = 6
# Below this share of the bound, other things than reading take the time.
_HARDLY = 0.1
# Cards whose makers allow no peer access over PCIe.
_WITHOUT_PEERS = ("NVIDIA GeForce", "AMD Radeon RX", "Intel")


def predicted(
    candidate: Candidate, facts: ModelFacts, gpus: Sequence[Gpu], host: Host, links: Sequence[Link] = ()
) -> Candidate:
    """Return `candidate` with its speed at its context, where it can run; `gpus` are those it was planned on.

    Where nothing honest can be said, its speed says why.
    """
    if candidate.verdict not in ("fits", "fits-with-offload"):
        return replace(candidate, speed=Speed())
    by_index = {gpu.index: gpu for gpu in gpus}
    used = [by_index[device.gpu] for device in candidate.devices if not device.idle]
    unknown = _unknown(candidate, used, host)
    work = None if unknown else work_of(candidate, facts, used, links)
    found = predict(work) if work else None
    if work is None or found is None:
        return replace(candidate, speed=Speed(unknown=unknown or "nothing is known of what it reads"))
    # Where one user's context is all that finds room, the others wait for it.
    together = found.decode if candidate.parallel > 1 and work.users == 1 else found.aggregate
    speed = Speed(
        decode_tok_s=found.decode,
        decode_start_tok_s=found.start,
        aggregate_tok_s=together,
        aggregate_users=round(work.users) if together else None,
        prefill_tok_s=found.prefill,
        bound_tok_s=found.bound,
        basis=_basis(candidate, work, found),
        sums=found.basis,
        thin=found.thin,
        unknown=_UNKNOWN_TOGETHER if candidate.parallel > 1 and together is None else None,
    )
    return replace(candidate, speed=speed)


def work_of(candidate: Candidate, facts: ModelFacts, used: Sequence[Gpu], links: Sequence[Link] = ()) -> Work:
    """Return what a token of `candidate` takes with its context full; `used` are the cards that hold something, in
    the order of its devices."""
    devices = [device for device in candidate.devices if not device.idle]
    users = candidate.parallel
    if candidate.backend == "vllm" and devices:
        users = max(1, users_at_once(candidate, facts))
    elements = _element_bytes(candidate)
    if candidate.split_mode == "tensor" and candidate.backend != "vllm":
        stages: tuple[Stage, ...] = (_cut_stage(candidate, facts, devices, used, elements),)
    else:
        stages = tuple(_stages(candidate, facts, devices, used, elements))
    return Work(
        engine=candidate.backend,
        library=devices[0].device.rstrip("0123456789") if devices else "CPU",
        stages=stages,
        quantised=is_quantised(facts),
        experts=facts.experts,
        experts_used=facts.experts_used,
        active_parameters=_computed_parameters(facts),
        embedding_length=facts.embedding_length,
        users=users,
        replicas=candidate.replicas,
        flash_attention=candidate.wants.uses_flash_attention,
        link=(link := _link(used, links)),
        link_gb_s=None if link == "nvlink" else min(filter(None, map(link_gb_s, used)), default=None),
        host=_host_part(candidate, facts, elements),
    )


def _computed_parameters(facts: ModelFacts) -> int:
    """The parameters a token is multiplied with: those of the embedding are looked up, unless they are the head's."""
    looked_up = 0 if facts.tied else facts.vocabulary * facts.embedding_length
    return max(0, (facts.active_parameters or facts.parameters) - looked_up)


def _unknown(candidate: Candidate, used: Sequence[Gpu], host: Host) -> str | None:
    """Why no speed can be predicted, None where it can."""
    nameless = [f"gpu{gpu.index} ({gpu.name})" for gpu in used if not gpu.bandwidth_gb_s]
    if nameless:
        return f"the memory bandwidth of {', '.join(nameless)} is unknown"
    if candidate.wants.kv_on_host:
        return "the KV cache is in host memory, which nobody measured"
    on_host = not used or candidate.host.layers or candidate.host.expert_layers
    if not used and candidate.backend == "vllm":
        return "nobody measured vLLM on processors"
    if on_host and host.cores is not None and host.cores < _FEWEST_CORES:
        return f"{host.cores} cores of the processor are too few for what was measured with layers in host memory"
    return None


def _element_bytes(candidate: Candidate) -> tuple[float, float]:
    """The bytes of a K and of a V value."""
    key, value = candidate.wants.kv_type_k, candidate.wants.kv_type_v
    sizes: dict[str, float] = {**KV_ELEMENT_BYTES, **(KV_BYTES if candidate.backend == "vllm" else {})}
    return sizes[key], sizes[value]


def _stages(
    candidate: Candidate,
    facts: ModelFacts,
    devices: Sequence[PlannedDevice],
    used: Sequence[Gpu],
    elements: tuple[float, float],
) -> Iterator[Stage]:
    """The stages of one replica, each of as many cards as each layer is cut over."""
    size = candidate.tensor_parallel
    for start in range(0, len(devices) // candidate.replicas, size):
        device = devices[start]
        layers = _kept_layers(candidate, facts, device)
        shares = tuple(
            _with_repeated_cache(
                share_of(
                    facts,
                    layers,
                    chip_of(gpu),
                    head=device.head,
                    depth_tokens=candidate.ctx_tokens,
                    kv_element_bytes=elements,
                    cards=size,
                ),
                size,
                facts,
            )
            for gpu in used[start : start + size]
        )
        yield Stage(layers=device.layers, shares=shares)


def _kept_layers(candidate: Candidate, facts: ModelFacts, device: PlannedDevice) -> tuple[Layer, ...]:
    """The layers on a card, without the experts that stay on the host."""
    own = range(device.first_layer, device.first_layer + device.layers)
    kept = candidate.host.expert_layers
    return tuple(_without_experts(facts.layers[i]) if i < kept else facts.layers[i] for i in own)


def _without_experts(layer: Layer) -> Layer:
    return replace(layer, weights_bytes=layer.weights_bytes - layer.expert_bytes, expert_bytes=0)


def _with_repeated_cache(share: Share, cards: int, facts: ModelFacts) -> Share:
    """Cards that are more than the KV heads hold some of them several times, and all of them a latent one."""
    heads = 1 if facts.kv_lora_rank is not None else max((layer.kv_heads for layer in facts.layers), default=1) or 1
    return replace(share, kv_bytes=share.kv_bytes * cards / min(cards, heads))


def _cut_stage(
    candidate: Candidate,
    facts: ModelFacts,
    devices: Sequence[PlannedDevice],
    used: Sequence[Gpu],
    elements: tuple[float, float],
) -> Stage:
    """llama.cpp's tensor split: of each layer every card reads what it holds of it, as the ledger has it; what is not
    cut it holds, and reads, whole."""
    wants = candidate.wants
    proportions = wants.tensor_split or (1.0,) * len(used)
    held = sum(cache_bytes(facts, wants, candidate.ctx_tokens))
    shares = []
    for device, gpu, proportion in zip(devices, used, proportions, strict=True):
        whole = share_of(
            facts,
            facts.layers,
            chip_of(gpu),
            head=True,
            depth_tokens=candidate.ctx_tokens,
            kv_element_bytes=elements,
        )
        experts = whole.expert_bytes * proportion / sum(proportions)
        unused = 1 - facts.experts_used / facts.experts if facts.experts else 0.0
        shares.append(
            replace(
                whole,
                weights_bytes=device.weights_bytes - experts * unused,
                expert_bytes=experts,
                kv_bytes=whole.kv_bytes * device.kv_bytes / held if held else 0.0,
            )
        )
    return Stage(layers=len(facts.layers), shares=tuple(shares))


def _host_part(candidate: Candidate, facts: ModelFacts, elements: tuple[float, float]) -> HostPart | None:
    """What is read in host memory: whole layers, routed experts, and on the CPU all of it."""
    host = candidate.host
    if candidate.devices and not (host.layers or host.expert_layers):
        return None
    whole = facts.layers[: host.layers]
    share = share_of(
        facts,
        whole,
        chip_of(Gpu(index=0, vendor="", name="")),
        head=all(device.idle for device in candidate.devices),
        depth_tokens=candidate.ctx_tokens,
        kv_element_bytes=elements,
    )
    used = facts.experts_used / facts.experts if facts.experts else 0.0
    in_layers = sum(layer.expert_bytes for layer in whole) * used
    beside = sum(layer.expert_bytes for layer in facts.layers[host.layers : host.expert_layers]) * used
    return HostPart(
        layers=host.layers,
        weights_bytes=share.weights_bytes - in_layers,
        expert_bytes=in_layers + beside,
        kv_bytes=share.kv_bytes,
    )


def _link(gpus: Sequence[Gpu], links: Sequence[Link]) -> str:
    """How the cards exchange large results: what the driver says, else what the maker allows."""
    indices = {gpu.index for gpu in gpus}
    own = [link for link in links if {link.a, link.b} <= indices]
    told = len(own) == math.comb(len(gpus), 2) and all(link.p2p is not None or link.kind == "NVLink" for link in own)
    if told or any(gpu.name.startswith(_WITHOUT_PEERS) for gpu in gpus):
        return link_between(gpus, links)
    return "peer"


def _basis(candidate: Candidate, work: Work, found: Prediction) -> str:
    """The bound as a sum, and how much of it is reached; with layers on the host what is assumed of its memory."""
    if found.bound is None:
        host = work.host
        assert host is not None
        read = host.weights_bytes + host.expert_bytes
        rates = f"{VALUES['host bandwidth low']:.0f}-{VALUES['host bandwidth high']:.0f} GB/s"
        return f"{_gb(read)} GB a token in host memory, two channels of DDR5 assumed ({rates})"
    shares = [max(stage.shares, key=_seconds) for stage in work.stages]
    read_by_rate: dict[float, float] = {}
    for share in shares:
        rate = share.chip.bandwidth_gb_s or math.nan
        read_by_rate[rate] = read_by_rate.get(rate, 0.0) + share.weights_bytes
    where = f" on each of {work.width} cards" if work.width > 1 else ""
    in_turn = f", {len(shares)} {'stages' if work.width > 1 else 'cards'} in turn" if len(shares) > 1 else ""
    if len(read_by_rate) == 1:
        ((rate, read),) = read_by_rate.items()
        sum_ = f"{rate:.4g} GB/s ÷ {_gb(read)} GB{where}"
    else:
        sum_ = f"1 ÷ ({' + '.join(f'{_gb(read)} GB ÷ {rate:.4g} GB/s' for rate, read in read_by_rate.items())}){where}"
    reached = [end / found.bound for end in (found.decode.low, found.decode.high)]
    title = TITLES[candidate.backend]
    told = f"{title} reaches {reached[0]:.2f}-{reached[1]:.2f}"
    if reached[1] < _HARDLY:
        told = "reading is the least of it: --explain"
    return f"{sum_} = {floored(found.bound)} at most{in_turn}; {told}"


def _gb(read_bytes: float) -> str:
    return f"{read_bytes / 1e9:.1f}" if read_bytes >= 1e10 else f"{read_bytes / 1e9:.3g}"


def _seconds(share: Share) -> float:
    return share.weights_bytes / (share.chip.bandwidth_gb_s or math.inf)
