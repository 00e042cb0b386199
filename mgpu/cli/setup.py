"""What of a plan recovery can change, and a change of it as if it had been typed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mgpu.cli.options import Backend, KvType, PlannerOptions, SplitMode
from mgpu.running.instance import GpuShare
from mgpu.running.recovery import Card, Setup

if TYPE_CHECKING:
    from mgpu.backends.backend import Launch
    from mgpu.cli.prepared import Prepared
    from mgpu.planning.candidates import Candidate

_FIELDS: dict[str, tuple[str, type[Any]]] = {
    "--backend": ("backend", Backend),
    "--gpus": ("gpus", str),
    "--ctx": ("ctx", str),
    "--parallel": ("parallel", int),
    "--quant": ("quant", str),
    "--kv-type": ("kv_type", KvType),
    "--split-mode": ("split_mode", SplitMode),
}
_MASKS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def with_changes(options: PlannerOptions, changes: Mapping[str, str]) -> PlannerOptions:
    """Return the planner's options with `changes` by name, as if they had been typed; other options are left out."""
    known = {_FIELDS[name][0]: _FIELDS[name][1](value) for name, value in changes.items() if name in _FIELDS}
    return replace(options, **known)


def shares_of(prepared: Prepared) -> tuple[GpuShare, ...]:
    """Return what each card is to hold; several replicas on a card are one share."""
    planned: dict[int, GpuShare] = {}
    for device in prepared.plan.chosen.devices:
        if not device.idle:
            before = planned.get(device.gpu)
            total = device.total_bytes + ((before.planned_bytes or 0) if before else 0)
            planned[device.gpu] = GpuShare(uuid=device.uuid, index=device.gpu, planned_bytes=total)
    return tuple(planned.values())


def setup_of(prepared: Prepared, launch: Launch | None, *, port: int | None) -> Setup:
    """Return what recovery may change of the plan, which `launch` would start (None: mgpu starts nothing)."""
    candidate = prepared.plan.chosen
    way = prepared.ways[prepared.backend]
    cards = _cards(candidate, launch)
    used = {card.index for card in cards}
    return Setup(
        backend=candidate.backend,
        ctx_tokens=candidate.ctx_tokens,
        parallel=candidate.parallel,
        kv_type=candidate.kv_type,
        split_mode=candidate.split_mode,
        tensor_parallel=candidate.tensor_parallel,
        utilisation=_utilisation(candidate),
        cards=cards,
        other_cards=tuple(Card(index=gpu.index, uuid=gpu.uuid) for gpu in way.gpus if gpu.index not in used),
        smaller_quants=_smaller_quants(prepared),
        other_backends=() if way.arguments else _other_backends(prepared),
        port=port,
    )


def _cards(candidate: Candidate, launch: Launch | None) -> tuple[Card, ...]:
    """The cards by the names that the engine's log has for them: it counts only those that it is shown."""
    shown = [device for device in candidate.devices if not device.idle]
    masked = launch is not None and any(mask in launch.env for mask in _MASKS) and candidate.replicas == 1
    cards: dict[int, Card] = {}
    for place, device in enumerate(shown):
        name = re.sub(r"\d+$", str(place), device.device) if masked else device.device
        cards.setdefault(device.gpu, Card(index=device.gpu, uuid=device.uuid, device=name))
    return tuple(cards.values())


def _utilisation(candidate: Candidate) -> float | None:
    if candidate.backend != Backend.vllm or not candidate.devices:
        return None
    from mgpu.planning.vllm_memory import DEFAULT_UTILISATION, VllmWants

    wants = candidate.wants
    return (wants.gpu_memory_utilization if isinstance(wants, VllmWants) else None) or DEFAULT_UTILISATION


def _smaller_quants(prepared: Prepared) -> tuple[str, ...]:
    """Those of a profile; any other MODEL says itself which quantisation it is."""
    now = prepared.weights.facts
    if prepared.model.profile is None or now.file_bytes is None:
        return ()
    others = [facts for facts in prepared.model.other_quantisations(prepared.weights) if facts.quantisation]
    smaller = [facts for facts in others if facts.file_bytes is not None and facts.file_bytes < now.file_bytes]
    return tuple(
        str(facts.quantisation) for facts in sorted(smaller, key=lambda facts: facts.file_bytes or 0, reverse=True)
    )


def _other_backends(prepared: Prepared) -> tuple[str, ...]:
    """Installed engines that could run the model as well, in the plan's order."""
    found = (
        candidate.backend
        for candidate in prepared.plan.candidates
        if candidate.runs and candidate.backend != prepared.backend and prepared.ways[candidate.backend].engine
    )
    return tuple(dict.fromkeys(found))
