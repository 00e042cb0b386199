"""Models that want cards, from what was typed: each under a name of its own, with its engines and forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mgpu.cli.prepare import Asked
    from mgpu.cli.prepared import Prepared
    from mgpu.machine.snapshot import Gpu, Host
    from mgpu.planning.assignment import Contender
    from mgpu.planning.candidates import Candidate


def contenders(asked: Sequence[Asked]) -> tuple[Contender, ...]:
    """Return what wants cards: each model under a name of its own."""
    names = _names([each.model.name for each in asked])
    return tuple(_contender(each, name) for each, name in zip(asked, names, strict=True))


@dataclass(frozen=True, slots=True)
class _Planner:
    """Plans one model on the cards it is given (`mgpu.planning.assignment.PlanOn`)."""

    asked: Asked

    def __call__(self, gpus: tuple[Gpu, ...], host: Host, *, least: bool) -> Candidate | None:
        asked = self.asked.on(gpus, host)
        if asked is None:
            return None
        if len(asked.ways) > 1 and not _is_for_vllm(asked, gpus):
            asked = replace(asked, ways={name: way for name, way in asked.ways.items() if name != "vllm"})
        prepared = asked.planned(fixes=False)
        plan = prepared.plan
        on_all = (each for each in plan.candidates if each.runs and _cards(each) == len(gpus))
        candidate = next(on_all, plan.chosen)
        return _with_least(asked, prepared, candidate) if least and candidate.runs else candidate


def _is_for_vllm(asked: Asked, gpus: tuple[Gpu, ...]) -> bool:
    """Whether vLLM could be preferred to other engines on these cards: for many users, or where it reads all of them
    at once (`mgpu.planning.choice`). Planning what will not be chosen takes most of the time."""
    from mgpu.planning.tensor_parallel import tensor_problems

    way = asked.ways.get("vllm")
    if way is None or way.wants.parallel > 1 or len(gpus) < 2:
        return True
    alike = len({(gpu.name, gpu.total_bytes) for gpu in gpus}) == 1
    return alike and any(not any(tensor_problems(weights.facts, len(gpus))) for weights in way.weights)


def _cards(candidate: Candidate) -> int:
    return len([device for device in candidate.devices if not device.idle])


def _with_least(asked: Asked, prepared: Prepared, candidate: Candidate) -> Candidate:
    """The same way with no more of each card than its users need. llama.cpp takes no more anyway."""
    from mgpu.planning.vllm_candidates import with_least_share
    from mgpu.planning.vllm_memory import VllmWants

    way = asked.ways[candidate.backend]
    if not candidate.devices or not isinstance(way.wants, VllmWants) or way.wants.gpu_memory_utilization is not None:
        return candidate
    facts, machine = prepared.weights_by_engine["vllm"].facts, asked.machine
    return with_least_share(facts, candidate, way.gpus, machine.host, machine.links)


def _contender(asked: Asked, name: str) -> Contender:
    from mgpu.planning.assignment import Contender
    from mgpu.planning.vllm_memory import VllmWants
    from mgpu.planning.wants import DEFAULT_CTX_TOKENS

    # Ollama runs llama.cpp, on fewer cards: it adds nothing but time where that can be taken.
    ways = dict(asked.ways)
    llama, ollama = ways.get("llama.cpp"), ways.get("ollama")
    if llama and ollama and (asked.simulated or llama.available or not ollama.available):
        on_disk = any(weights.path for weights in llama.weights), any(weights.path for weights in ollama.weights)
        if asked.simulated or on_disk[0] or not on_disk[1]:
            del ways["ollama"]
    for backend, way in ways.items():
        if isinstance(way.wants, VllmWants):  # it is to use all the cards that it is given, and no others
            ways[backend] = replace(way, wants=replace(way.wants, all_cards=True))
    forms = [weights.facts for way in ways.values() for weights in way.weights]
    sizes = [sum(layer.weights_bytes for layer in facts.layers) for facts in forms]
    spills = any(way.wants.offload or way.wants.cpu_moe_layers for way in ways.values())
    cards = frozenset(gpu.index for way in ways.values() for gpu in way.gpus)
    wanted = max(way.wants.ctx_tokens or 0 for way in ways.values())
    longest = min(facts.context_length or DEFAULT_CTX_TOKENS for facts in forms)
    return Contender(
        name=name,
        kind=str(asked.source),
        plan_on=_Planner(replace(asked, ways=ways)),
        cards=cards,
        size_bytes=min(sizes),
        ctx_tokens=wanted or min(DEFAULT_CTX_TOKENS, longest),
        ctx_fixed=bool(wanted),
        spills=spills,
    )


def _names(models: Sequence[str]) -> list[str]:
    """A name for each instance: the model's, and a number from the second of the same on."""
    from mgpu.running.state import name_from

    names: list[str] = []
    for model in models:
        base, number = name_from(model), 1
        while (name := base if number == 1 else f"{base}-{number}") in names:
            number += 1
        names.append(name)
    return names
