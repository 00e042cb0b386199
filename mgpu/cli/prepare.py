"""From words on the command line to a plan: model, machine, engines, cards, wishes. Shared by `plan` and `run`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mgpu.backends.engine import LLAMA_CPP, PROGRAMS, DeviceQuery, Engine, find, find_llama_server
from mgpu.cli.engines import Way, eligible, find_way, read_arguments
from mgpu.cli.options import BACKENDS, Backend, PlannerOptions
from mgpu.cli.prepared import Prepared
from mgpu.errors import EngineFailed, MgpuError, Missing, UsageError
from mgpu.machine.probe import probe, with_assumed_devices, with_engine_devices
from mgpu.machine.simulate import simulate
from mgpu.machine.snapshot import Gpu, Host, Machine
from mgpu.models.forms import Model, find_model
from mgpu.models.source import ModelFolder, ModelSource, parse_model
from mgpu.planning.choice import TITLES, Offer, Preference, choose, preference
from mgpu.planning.plan import LeftOut
from mgpu.planning.wants import Goal

if TYPE_CHECKING:
    from mgpu.planning.measurements import Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A model and the engines that could run it on this machine, each in its `ways`: what a plan is made of."""

    argument: str
    source: ModelSource
    model: Model
    machine: Machine
    options: PlannerOptions
    backends: tuple[str, ...]
    ways: Mapping[str, Way]
    engine_arguments: tuple[str, ...]
    simulated: bool
    warnings: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()

    def on(self, gpus: Sequence[Gpu], host: Host) -> Asked | None:
        """Return it for exactly these cards (none: the CPU), whose free memory is what others leave, and for a host of
        which others leave as much; None where no engine can use them together."""
        ways = {}
        for backend, way in self.ways.items():
            own = {gpu.index: gpu for gpu in way.gpus}
            if bool(own) == bool(gpus) and all(gpu.index in own for gpu in gpus):
                left = tuple(replace(own[gpu.index], free_bytes=gpu.free_bytes) for gpu in gpus)
                ways[backend] = replace(way, gpus=left)
        return replace(self, machine=replace(self.machine, host=host), ways=ways) if ways else None

    def planned(self, *, fixes: bool = True) -> Prepared:
        """Return the plan on the cards of each way; with ways out where it does not fit, unless they are of no use."""
        offers, weights = {}, {}
        for backend, way in self.ways.items():
            offer, weights[backend] = way.offer(self.machine, self.model, fixes=fixes)
            offers[backend] = offer.elsewhere() if self.simulated else offer
        preferred = _preferred(self.ways, tuple(offers.values()), self.options)
        plan = choose(tuple(offers.values()), preferred, self.machine)
        if len(offers) == 1:
            told = self.options.backend == Backend.auto and not self.engine_arguments and plan.best is not None
            why = _only_choice(plan.chosen.backend, self.model, self.options, self.backends) if told else None
            plan = replace(plan, why=why)
        plan = replace(plan, left_out=self.left_out)
        chosen = plan.chosen.backend
        warnings = [*self.warnings]
        if not self.simulated and not self.ways[chosen].available:
            warnings.append(f"{TITLES[chosen]} is not installed (planned as if it were): {self.ways[chosen].install}")
        if unconfirmed := weights[chosen].unconfirmed:
            warnings.append(f"planned from what was read of {self.source} before: {unconfirmed}")
        if remark := weights[chosen].remark:
            warnings.append(remark)
        return Prepared(
            argument=self.argument,
            model=self.model,
            plan=plan,
            preferred=preferred,
            ways=self.ways,
            weights_by_engine=weights,
            simulated=self.simulated,
            warnings=(*warnings, *self.ways[chosen].remarks),
        )


def prepare(
    model: str,
    options: PlannerOptions,
    *,
    machine: str | None = None,
    engine_arguments: Sequence[str] = (),
    must_run: bool = False,
    without: Callable[[Machine], Machine] | None = None,
) -> Prepared:
    """Return the plan for `model` on this machine, or on the simulated one that `machine` describes.

    With `must_run` an engine that cannot start is an error. `without` takes from the machine what is not to be counted
    on. Raises MgpuError: UsageError for what was typed, Missing for what is not there.
    """
    (asked,) = ask_about(
        (model,), options, machine=machine, engine_arguments=engine_arguments, must_run=must_run, without=without
    )
    return asked.planned()


def ask_about(
    models: Sequence[str],
    options: PlannerOptions,
    *,
    machine: str | None = None,
    engine_arguments: Sequence[str] = (),
    must_run: bool = False,
    without: Callable[[Machine], Machine] | None = None,
) -> tuple[Asked, ...]:
    """Return what the plans for `models` are made of; the machine and its engines are asked once. Raises as `prepare`
    does."""
    sources = [parse_model(model) for model in models]
    options.wants()  # what was typed wrong is said first
    simulated = machine is not None
    with _asked_for_devices(sources, options, engine_arguments, simulated=simulated) as query:
        found = probe() if machine is None else simulate(machine)
        known = {source: find_model(source, options.quant, backend=options.backend.value) for source in sources}
        left_out: dict[ModelSource, list[LeftOut]] = {source: [] for source in sources}
        eligibles = {
            source: eligible(known[source], options, engine_arguments, _noting(left_out[source])) for source in left_out
        }
        engines = _installed(tuple(dict.fromkeys(itertools.chain(*eligibles.values()))), simulated=simulated)
        found, warnings = _with_devices(found, query, engines, tuple(engines), must_run=must_run)
    found = without(found) if without else found
    if found.driver and found.driver.problem:
        warnings.append(found.driver.problem)
    measurements = () if simulated else _measurements(tuple(known.values()))
    ways = {
        source: _ways(
            eligibles[source],
            known[source],
            found,
            options,
            engine_arguments,
            engines,
            measurements,
            _noting(left_out[source]),
        )
        for source in dict.fromkeys(sources)
    }
    return tuple(
        Asked(
            argument=argument,
            source=source,
            model=known[source],
            machine=found,
            options=options,
            backends=eligibles[source],
            ways=ways[source],
            engine_arguments=tuple(engine_arguments),
            simulated=simulated,
            warnings=(*warnings, *_shadowing(known[source])),
            left_out=tuple(left_out[source]),
        )
        for argument, source in zip(models, sources, strict=True)
    )


@contextlib.contextmanager
def _asked_for_devices(
    sources: Sequence[ModelSource], options: PlannerOptions, engine_arguments: Sequence[str], *, simulated: bool
) -> Iterator[DeviceQuery | None]:
    """A query for llama.cpp's devices, which takes as long as all the rest: asked first and heard last. None where
    nobody needs its answer."""
    engine = None
    if (
        not simulated
        and options.backend != Backend.vllm
        and not all(isinstance(source, ModelFolder) for source in sources)
    ):
        engine = find_llama_server()
    if engine is None:
        yield None
        return
    query = DeviceQuery(engine, rpc=read_arguments(LLAMA_CPP, engine_arguments, options).rpc)
    with contextlib.closing(query):
        yield query


def _installed(backends: Sequence[str], *, simulated: bool) -> dict[str, Engine | None]:
    """The engines that are installed. A setting that names none is an error only where it matters."""
    engines: dict[str, Engine | None] = {}
    for backend in backends:
        try:
            engines[backend] = find(PROGRAMS[backend])
        except Missing:
            if not simulated:
                raise
            engines[backend] = None
    return engines


def _with_devices(
    machine: Machine,
    query: DeviceQuery | None,
    engines: dict[str, Engine | None],
    backends: Sequence[str],
    *,
    must_run: bool,
) -> tuple[Machine, list[str]]:
    """The machine with llama.cpp's names of its cards, or the likely ones where it cannot be asked."""
    if query is None:
        return with_assumed_devices(machine), []
    try:
        return with_engine_devices(machine, query.devices(), backend=LLAMA_CPP), []
    except EngineFailed as error:
        others = [backend for backend in backends if backend != LLAMA_CPP and engines[backend]]
        if must_run and LLAMA_CPP in backends and not others:
            raise
        if others and LLAMA_CPP in engines:
            engines[LLAMA_CPP] = None
        return with_assumed_devices(machine), [f"planned as if llama.cpp saw every card: {error.message}"]


def _ways(
    backends: Sequence[str],
    model: Model,
    machine: Machine,
    options: PlannerOptions,
    engine_arguments: Sequence[str],
    engines: Mapping[str, Engine | None],
    measurements: tuple[Measurement, ...],
    refused: Callable[[str, MgpuError], None],
) -> dict[str, Way]:
    """What each engine's plan is made of; of the others `refused` is told why. Raises what keeps the first one from
    running where no other can."""
    ways: dict[str, Way] = {}
    problems: list[MgpuError] = []
    for backend in backends:
        try:
            way = find_way(backend, model, machine, options, engine_arguments, engines[backend])
        except (Missing, UsageError) as problem:  # another engine may have nothing against it
            problems.append(problem)
            refused(backend, problem)
            continue
        ways[backend] = replace(way, measurements=measurements)
    # Nobody installs vLLM for a CPU that others run the model on, or uses its build for CPUs beside cards.
    vllm = ways.get(Backend.vllm)
    if vllm and len(ways) > 1 and not vllm.gpus:
        here = vllm.engine and machine.source != "simulated"
        if not here or any(way.gpus for way in ways.values()):
            del ways[Backend.vllm]
    if not ways:
        raise problems[0]
    return ways


def _noting(left_out: list[LeftOut]) -> Callable[[str, MgpuError], None]:
    """What writes down an engine that is left out, and why."""

    def note(backend: str, problem: MgpuError) -> None:
        left_out.append(LeftOut(backend=str(backend), reason=problem.message.splitlines()[0]))

    return note


def _measurements(models: Sequence[Model]) -> tuple[Measurement, ...]:
    """What was measured here of these models, of those that are here."""
    from mgpu.running.measured import remembered

    paths = {weights.path for model in models for backend in BACKENDS for weights in model.forms(backend)}
    names = tuple(path.name for path in paths if path)
    return remembered(names) if names else ()


def _preferred(ways: Mapping[str, Way], offers: Sequence[Offer], options: PlannerOptions) -> Preference:
    gpus = max((way.gpus for way in ways.values()), key=len)
    parallel = max(way.wants.parallel for way in ways.values())
    goal = options.goal or (Goal.latency if parallel == 1 else Goal.throughput)
    return preference(goal, parallel, gpus, offers, all_cards=options.gpus is not None)


def _only_choice(backend: str, model: Model, options: PlannerOptions, eligible_backends: Sequence[str]) -> str:
    """Why there was nothing to choose: the model's form, the options, or else the cards."""
    title = TITLES[backend]
    if sum(bool(model.forms(each)) for each in BACKENDS) == 1:
        return f"{title} alone loads {options.quant}" if model.profile else f"{title} is the engine for {model.kind}"
    if len(eligible_backends) == 1:
        told = f"{title} alone knows all the options that were given"
        formless = [TITLES[each] for each in BACKENDS if not model.forms(each)]
        return f"{told}; no form of it is for {formless[0]}" if formless else told
    return f"{title} alone can use these cards"


def _shadowing(model: Model) -> Iterator[str]:
    """Say that a profile of the user's own is used instead of a shipped one."""
    if model.profile is None:
        return
    from mgpu.profile import shipped_profile_folder, user_profile_folder

    name = model.profile.name
    if all((folder / f"{name}.yaml").is_file() for folder in (user_profile_folder(), shipped_profile_folder())):
        yield f"your own profile {name} is used instead of the one that ships with mgpu"
