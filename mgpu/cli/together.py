"""`mgpu plan MODEL MODEL…`: several models at once on one machine."""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mgpu.cli.options import PlannerOptions
from mgpu.cli.result import Result
from mgpu.errors import Missing, UsageError

if TYPE_CHECKING:
    from mgpu.cli.prepare import Asked, Prepared
    from mgpu.machine.snapshot import Gpu, Host
    from mgpu.planning.assignment import Contender
    from mgpu.planning.candidates import Candidate
    from mgpu.planning.together import Placement, Together

MOST_MODELS = 64
# The flags whose names are not those of their fields.
_FLAGS = {"goal": "--for"}
# What the placement decides for each model by itself.
_PLACED = ("backend", "gpus", "tensor_parallel", "pipeline_parallel", "replicas")


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One of the models, as it is to be started: `prepared` says with what (None where nothing can use any card that
    is left), `command` is the `mgpu run` line, and `why` says why it found no room. Both are empty where they do not
    apply."""

    name: str
    argument: str
    placement: Placement
    prepared: Prepared | None
    port: int | None
    command: tuple[str, ...]
    why: str

    @property
    def verdict(self) -> str:
        """Its verdict; "does-not-fit" where no engine could even be asked."""
        return self.placement.candidate.verdict if self.placement.candidate else "does-not-fit"


def plan_together(
    models: Sequence[str],
    options: PlannerOptions,
    *,
    machine: str | None,
    engine_arguments: Sequence[str],
    explain: bool,
    exact: bool,
) -> Result:
    """Return the answer for several models. Raises UsageError for what goes with one model only, and what `prepare`
    raises."""
    from mgpu.cli.prepare import ask_about
    from mgpu.cli.views.together import together_screen
    from mgpu.planning.together import place_together

    _refuse(models, options, explain=explain, exact=exact)
    asked = ask_about(models, options, machine=machine, engine_arguments=engine_arguments)
    wanting = contenders(asked)
    together = place_together(wanting, asked[0].machine)
    by_name = {contender.name: each for contender, each in zip(wanting, asked, strict=True)}
    instances = tuple(_instances(together, by_name))
    shown = asked[0].machine
    return Result(
        command="plan",
        data=_data(together, instances, asked[0]),
        screen=lambda width: together_screen(together, instances, shown, width),
        exit_code=0 if together.placed else 1,
        simulated=shown.source == "simulated",
        warnings=tuple(dict.fromkeys(_warnings(instances, asked))),
    )


def contenders(asked: Sequence[Asked]) -> tuple[Contender, ...]:
    """Return what wants cards: each model under a name of its own."""
    names = _names([each.model.name for each in asked])
    return tuple(_contender(each, name) for each, name in zip(asked, names, strict=True))


def _refuse(models: Sequence[str], options: PlannerOptions, *, explain: bool, exact: bool) -> None:
    if len(models) > MOST_MODELS:
        raise UsageError(f"{len(models)} models are more than the {MOST_MODELS} that are placed together")
    first = shlex.quote(models[0])
    if exact:
        raise UsageError(
            "--exact asks the engine about one model: the memory that the others take is not in its answer",
            hint=f"mgpu plan {first} --exact",
        )
    if explain:
        raise UsageError(
            "--explain shows the sums of one model, not of several together", hint=f"mgpu plan {first} --explain"
        )
    if options.tensor_split is not None:
        raise UsageError(
            "--tensor-split deals the layers of one model; several are dealt by what the others leave",
            hint="leave --tensor-split out",
        )


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
    if llama and ollama and (llama.available or not ollama.available):
        on_disk = any(weights.path for weights in llama.weights), any(weights.path for weights in ollama.weights)
        if on_disk[0] or not on_disk[1]:
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


def _instances(together: Together, asked: dict[str, Asked]) -> Iterator[Instance]:
    ports = _free_ports(simulated=next(iter(asked.values())).simulated)
    uses = Counter(gpu for placement in together.placements for gpu in placement.gpus)
    for placement in together.placements:
        each = asked[placement.contender.name]
        candidate = placement.candidate
        prepared = _prepared(each, candidate) if candidate else None
        port = next(ports) if placement.placed else None
        shares = any(uses[gpu] > 1 for gpu in placement.gpus)
        yield Instance(
            name=placement.contender.name,
            argument=each.argument,
            placement=placement,
            prepared=prepared,
            port=port,
            command=_command(each, placement, candidate, port, shares=shares) if candidate and port else (),
            why="" if placement.placed else _why(placement),
        )


def _prepared(asked: Asked, candidate: Candidate) -> Prepared:
    """What the candidate is started from: the form of the model that has its quantisation."""
    from mgpu.cli.prepare import Prepared
    from mgpu.planning.plan import Plan

    forms = asked.ways[candidate.backend].weights
    weights = next((form for form in forms if form.facts.quantisation == candidate.quant), forms[0])
    return Prepared(
        argument=asked.argument,
        model=asked.model,
        plan=Plan(model=weights.facts, machine=asked.machine, candidates=(candidate,), best=0, fixes=()),
        ways=asked.ways,
        weights_by_engine={candidate.backend: weights},
        simulated=asked.simulated,
        warnings=(),
    )


def _free_ports(*, simulated: bool) -> Iterator[int]:
    """Ports for one instance after the other, on this machine those that are free now."""
    from mgpu.running.ports import FIRST_PORT, choose_port

    for port in range(FIRST_PORT, FIRST_PORT + 10 * MOST_MODELS):
        if not simulated:
            try:
                choose_port("127.0.0.1", port)
            except Missing:
                continue
        yield port


def _command(asked: Asked, placement: Placement, candidate: Candidate, port: int, *, shares: bool) -> tuple[str, ...]:
    """The `mgpu run` line that starts the instance as it was placed, with the options that were given; a vLLM that
    `shares` a card is told how much of it is its own."""
    from mgpu.planning.vllm_memory import VllmWants

    cards = ",".join(f"gpu{index}" for index in placement.gpus) or "none"
    words = ["mgpu", "run", asked.argument, "--backend", candidate.backend, "--gpus", cards, "--port", str(port)]
    if placement.contender.name != asked.model.name:
        words += ["--name", placement.contender.name]
    given = {name: value for name, value in _given(asked.options) if name not in _PLACED}
    if candidate.ctx_tokens < placement.contender.ctx_tokens:
        given["ctx"] = str(candidate.ctx_tokens)
    for name, value in given.items():
        words += [_FLAGS.get(name, f"--{name.replace('_', '-')}"), value]
    if candidate.backend == "vllm":
        shape = ("tensor_parallel", "pipeline_parallel", "replicas")
        for name in shape:
            if (size := getattr(candidate, name)) > 1:
                words += [f"--{name.replace('_', '-')}", str(size)]
    behind = list(asked.engine_arguments)
    own = asked.ways[candidate.backend].wants
    if (
        shares
        and isinstance(candidate.wants, VllmWants)
        and isinstance(own, VllmWants)
        and own.gpu_memory_utilization is None
    ):
        share = candidate.wants.gpu_memory_utilization
        behind += ["--gpu-memory-utilization", f"{share:g}"] if share else []
    return (*words, *(["--", *behind] if behind else []))


def _given(options: PlannerOptions) -> Iterator[tuple[str, str]]:
    """The options that were given, by field, as they were typed."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value != field.default:
            yield field.name, str(value)


def _why(placement: Placement) -> str:
    """Why a model found no room: the arithmetic on what the others leave."""
    candidate = placement.candidate
    if candidate is None:
        return "no engine can use the cards that there are"
    reason = candidate.reasons[0] if candidate.reasons else "it does not fit"
    return f"{reason} beside the others; alone it fits" if placement.fits_alone else reason


def _warnings(instances: Sequence[Instance], asked: Sequence[Asked]) -> Iterator[str]:
    from mgpu.planning.choice import TITLES

    for each in asked:
        yield from each.warnings
    for instance in instances:
        if instance.prepared is None or not instance.placement.placed:
            continue
        way = instance.prepared.ways[instance.prepared.backend]
        if not instance.prepared.simulated and not way.available:
            yield f"{TITLES[way.backend]} is not installed (planned as if it were): {way.install}"
        weights = instance.prepared.weights
        if weights.unconfirmed:
            yield f"planned from what was read of {instance.argument} before: {weights.unconfirmed}"
        yield from [weights.remark] if weights.remark else []
        yield from way.remarks


def _data(together: Together, instances: Sequence[Instance], asked: Asked) -> dict[str, Any]:
    from mgpu.cli.plan import candidate_data
    from mgpu.machine.snapshot import to_json

    models = []
    for instance in instances:
        candidate = instance.placement.candidate
        data = None
        if candidate and instance.prepared:
            data = candidate_data(instance.prepared, candidate, name=instance.name, port=instance.port)
        models.append(
            {
                "name": instance.name,
                "argument": instance.argument,
                "verdict": instance.verdict,
                "gpus": list(instance.placement.gpus),
                "port": instance.port,
                "command": list(instance.command),
                "why": instance.why or None,
                "candidate": data,
            }
        )
    free = asked.machine.host.ram_available_bytes
    planned = host_bytes(together)
    return {
        "machine": to_json(asked.machine),
        "placed": together.placed,
        "verdict": together.verdict,
        "models": models,
        "cards": [
            {
                "gpu": use.gpu.index,
                "uuid": use.gpu.uuid,
                "name": use.gpu.name,
                "total_bytes": use.gpu.total_bytes,
                "free_bytes": use.free_bytes,
                "planned_bytes": use.planned_bytes,
                "spare_bytes": use.spare_bytes,
            }
            for use in together.cards
        ],
        "host": {
            "free_bytes": free,
            "planned_bytes": planned,
            "spare_bytes": None if free is None else free - planned,
        },
    }


def host_bytes(together: Together) -> int:
    """Return what all placed models take of the host's memory."""
    placed = (each.candidate for each in together.placements if each.placed)
    return sum(candidate.host.total_bytes for candidate in placed if candidate)
