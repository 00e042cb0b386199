"""`mgpu plan MODEL MODEL…`: several models at once on one machine."""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mgpu.cli.options import PlannerOptions
from mgpu.cli.result import Result
from mgpu.errors import Missing, NoAnswer, UsageError

if TYPE_CHECKING:
    from mgpu.cli.prepare import Asked
    from mgpu.cli.prepared import Prepared
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
    is left), `command` is the `mgpu run` line, `why` says why it found no room, and `ways_out` are the
    options with which it would, beside the others. They are empty where they do not apply."""

    name: str
    argument: str
    placement: Placement
    prepared: Prepared | None
    port: int | None
    command: tuple[str, ...]
    why: str
    ways_out: tuple[str, ...] = ()

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
    from mgpu.cli.contenders import contenders
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
        errors=tuple(_refusals(instances)),
        told=True,
    )


def _refusals(instances: Sequence[Instance]) -> Iterator[NoAnswer]:
    """Who finds no room beside the others, and why; each alone may have ways out."""
    placed = [each.name for each in instances if each.placement.placed]
    for each in instances:
        if not each.placement.placed:
            options = "   or   ".join(f"mgpu run {shlex.quote(each.argument)} {change}" for change in each.ways_out)
            alone = f"mgpu plan {shlex.quote(each.argument)} shows what it needs, and ways out"
            beside = f", once {' and '.join(placed)} {'run' if len(placed) > 1 else 'runs'}" if placed else ""
            hint = f"{options}{beside}" if options else alone
            yield NoAnswer(f"{each.name} finds no room: {each.why}", code="does-not-fit", hint=hint)


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


def _instances(together: Together, asked: dict[str, Asked]) -> Iterator[Instance]:
    ports = _free_ports(simulated=next(iter(asked.values())).simulated)
    uses = Counter(gpu for placement in together.placements for gpu in placement.gpus)
    outs: dict[str, tuple[str, ...]] = {}
    for placement in together.placements:
        each = asked[placement.contender.name]
        candidate = placement.candidate
        prepared = _prepared(each, candidate) if candidate else None
        port = next(ports) if placement.placed else None
        shares = any(uses[gpu] > 1 for gpu in placement.gpus)
        if placement.contender.kind not in outs and not placement.placed:
            outs[placement.contender.kind] = tuple(_ways_out(each, together))
        yield Instance(
            name=placement.contender.name,
            argument=each.argument,
            placement=placement,
            prepared=prepared,
            port=port,
            command=_command(each, placement, candidate, port, shares=shares) if candidate and port else (),
            why="" if placement.placed else _why(placement),
            ways_out=() if placement.placed else outs[placement.contender.kind],
        )


def _ways_out(asked: Asked, together: Together) -> Iterator[str]:
    """The options with which a model finds room on what the placed ones leave, each planned so."""
    host, taken = asked.machine.host, host_bytes(together)
    left = None if host.ram_available_bytes is None else max(0, host.ram_available_bytes - taken)
    own = {gpu.index for way in asked.ways.values() for gpu in way.gpus}
    gpus = [
        dataclasses.replace(use.gpu, free_bytes=max(0, use.spare_bytes))
        for use in together.cards
        if use.gpu.index in own
    ]
    there = asked.on(gpus, dataclasses.replace(host, ram_available_bytes=left))
    fixes = there.planned().plan.fixes if there else ()
    yield from [fix.change for fix in fixes if fix.change.startswith("--") and "--gpus" not in fix.change][:3]


def _prepared(asked: Asked, candidate: Candidate) -> Prepared:
    """What the candidate is started from: the form of the model that has its quantisation."""
    from mgpu.cli.prepared import Prepared
    from mgpu.planning.choice import Preference
    from mgpu.planning.plan import Plan

    forms = asked.ways[candidate.backend].weights
    weights = next((form for form in forms if form.facts.quantisation == candidate.quant), forms[0])
    return Prepared(
        argument=asked.argument,
        model=asked.model,
        plan=Plan(model=weights.facts, machine=asked.machine, candidates=(candidate,), best=0, fixes=()),
        preferred=Preference(order=(candidate.backend,), why=""),
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
    return f"{reason} beside the others; alone it {_alone(placement, alone)}" if (alone := placement.alone) else reason


def _alone(placement: Placement, alone: Candidate) -> str:
    """What a model would have without the others."""
    words = "fits" if alone.verdict == "fits" else "fits with layers in host memory"
    if waiting := next((reason for reason in alone.reasons if reason.endswith("others wait")), None):
        return f"{words}, with {waiting}"
    if alone.ctx_tokens >= placement.contender.ctx_tokens:
        return words
    users = f" for each of {alone.parallel} users" if alone.parallel > 1 else ""
    return f"{words}, with {alone.ctx_tokens} tokens{users}"


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
