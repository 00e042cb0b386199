"""From words on the command line to a plan: model, machine, engines, cards, wishes. Shared by `plan` and `run`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mgpu.backends.backend import Serving
from mgpu.backends.engine import LLAMA_CPP, PROGRAMS, DeviceQuery, Engine, find, find_llama_server
from mgpu.cli.engines import Way, eligible, find_way, read_arguments
from mgpu.cli.options import BACKENDS, Backend, PlannerOptions
from mgpu.errors import EngineFailed, MgpuError, Missing, UsageError
from mgpu.machine.probe import probe, with_engine_devices
from mgpu.machine.simulate import simulate
from mgpu.machine.snapshot import Machine
from mgpu.models.forms import Model, Weights, find_model
from mgpu.models.source import ModelFolder, ModelSource, parse_model
from mgpu.planning.choice import TITLES, Offer, Preference, choose, preference
from mgpu.planning.plan import Plan
from mgpu.planning.wants import Goal

if TYPE_CHECKING:
    from mgpu.running.ollama_attach import Attached, Foreign


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A plan and all it was made of: the `ways` by engine and the `weights` each would load.

    `argument` is MODEL as typed. `engines` are the installed ones (none where the machine is simulated).
    """

    argument: str
    model: Model
    plan: Plan
    ways: Mapping[str, Way]
    weights_by_engine: Mapping[str, Weights]
    simulated: bool
    warnings: tuple[str, ...]

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.name

    @property
    def backend(self) -> str:
        """The engine that was chosen."""
        return self.plan.chosen.backend

    @property
    def engine(self) -> Engine | None:
        """The chosen engine's program; None when it is not installed, or the machine is simulated."""
        return None if self.simulated else self.ways[self.backend].engine

    @property
    def running(self) -> Attached | Foreign | None:
        """What already answers at Ollama's address, where Ollama was chosen."""
        return self.ways[self.backend].running

    @property
    def weights(self) -> Weights:
        """The form of the model that the chosen engine loads."""
        return self.weights_by_engine[self.backend]

    def serving(self, backend: str, *, name: str, host: str, port: int, folder: Path, api_key: str | None) -> Serving:
        """Return what the engine called `backend` is to serve, and where."""
        engine = None if self.simulated else self.ways[backend].engine
        return Serving(
            program=engine.path if engine else Path(_PROGRAMS[backend]),
            model=self.weights_by_engine[backend].label,
            name=name,
            host=host,
            port=port,
            folder=folder,
            arguments=self.ways[backend].arguments,
            api_key=api_key,
        )

    def left_to_itself(self) -> Prepared:
        """Return the plan for an Ollama that is used as it is: it takes one card where that is enough."""
        own = min(self.plan.candidates, key=lambda each: (each.backend != self.backend, len(each.devices)))
        if own is self.plan.chosen or own.verdict != "fits":
            return self
        return replace(self, plan=replace(self.plan, candidates=(own,), best=0))

    def fetched(self, path: Path) -> Prepared:
        """Return the same plan for the chosen engine, made from the model that is now at `path`."""
        from mgpu.models.gguf_facts import facts_from_gguf
        from mgpu.models.hf import facts_from_folder

        facts = facts_from_folder(path) if path.is_dir() else facts_from_gguf(path)
        weights = replace(self.weights, facts=replace(facts, name=self.name), path=path)
        way = replace(self.ways[self.backend], weights=(weights,))
        offer, _ = way.offer(self.plan.machine, self.model)
        plan = choose([offer], Preference(order=(self.backend,), why=""), self.plan.machine)
        return replace(
            self,
            plan=replace(plan, why=self.plan.why),
            ways={self.backend: way},
            weights_by_engine={self.backend: weights},
        )


_PROGRAMS = {"llama.cpp": "llama-server", "vllm": "vllm", "ollama": "ollama"}


def prepare(
    model: str,
    options: PlannerOptions,
    *,
    machine: str | None = None,
    engine_arguments: Sequence[str] = (),
    must_run: bool = False,
) -> Prepared:
    """Return the plan for `model` on this machine, or on the simulated one that `machine` describes.

    With `must_run` an engine that cannot start is an error. Raises MgpuError: UsageError for what was typed, Missing
    for what is not there.
    """
    source = parse_model(model)
    options.wants()  # what was typed wrong is said first
    with _asked_for_devices(source, options, engine_arguments, simulated=machine is not None) as query:
        found = probe() if machine is None else simulate(machine)
        prepared = find_model(source, options.quant, safetensors=options.backend == Backend.vllm)
        backends = eligible(prepared, options, engine_arguments)
        engines = _installed(backends, simulated=machine is not None)
        found, warnings = _with_devices(found, query, engines, backends, must_run=must_run)
    if found.driver and found.driver.problem:
        warnings.append(found.driver.problem)
    if prepared.profile and _shadows_shipped(prepared.profile.name):
        warnings.append(f"your own profile {prepared.profile.name} is used instead of the one that ships with mgpu")
    ways = _ways(backends, prepared, found, options, engine_arguments, engines)
    offers, weights = {}, {}
    for backend, way in ways.items():
        offers[backend], weights[backend] = way.offer(found, prepared)
    plan = choose(tuple(offers.values()), _preferred(ways, tuple(offers.values()), options), found)
    if len(offers) == 1:
        told = options.backend == Backend.auto and not engine_arguments and plan.best is not None
        plan = replace(plan, why=_only_choice(plan.chosen.backend, prepared, options, backends) if told else None)
    chosen = plan.chosen.backend
    if machine is None and not ways[chosen].available:
        warnings.append(f"{TITLES[chosen]} is not installed (planned as if it were): {ways[chosen].install}")
    if unconfirmed := weights[chosen].unconfirmed:
        warnings.append(f"planned from what was read of {source} before: {unconfirmed}")
    if remark := weights[chosen].remark:
        warnings.append(remark)
    return Prepared(
        argument=model,
        model=prepared,
        plan=plan,
        ways=ways,
        weights_by_engine=weights,
        simulated=machine is not None,
        warnings=(*warnings, *ways[chosen].remarks),
    )


@contextlib.contextmanager
def _asked_for_devices(
    source: ModelSource, options: PlannerOptions, engine_arguments: Sequence[str], *, simulated: bool
) -> Iterator[DeviceQuery | None]:
    """A query for llama.cpp's devices, which takes as long as all the rest: asked first and heard last. None where
    nobody needs its answer."""
    engine = None
    if not simulated and options.backend != Backend.vllm and not isinstance(source, ModelFolder):
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
        return _assumed_names(machine), []
    try:
        return with_engine_devices(machine, query.devices(), backend=LLAMA_CPP), []
    except EngineFailed as error:
        others = [backend for backend in backends if backend != LLAMA_CPP and engines[backend]]
        if must_run and LLAMA_CPP in backends and not others:
            raise
        if others and LLAMA_CPP in engines:
            engines[LLAMA_CPP] = None
        return _assumed_names(machine), [f"planned as if llama.cpp saw every card: {error.message}"]


def _ways(
    backends: Sequence[str],
    model: Model,
    machine: Machine,
    options: PlannerOptions,
    engine_arguments: Sequence[str],
    engines: Mapping[str, Engine | None],
) -> dict[str, Way]:
    """What each engine's plan is made of. Raises what keeps the first one from running where no other can."""
    ways: dict[str, Way] = {}
    problems: list[MgpuError] = []
    for backend in backends:
        try:
            way = find_way(backend, model, machine, options, engine_arguments, engines[backend])
        except (Missing, UsageError) as problem:  # another engine may have nothing against it
            problems.append(problem)
            continue
        ways[backend] = way
    # Nobody installs vLLM for a CPU that others run the model on, or uses its build for CPUs beside cards.
    vllm = ways.get(Backend.vllm)
    if vllm and len(ways) > 1 and not vllm.gpus:
        here = vllm.engine and machine.source != "simulated"
        if not here or any(way.gpus for way in ways.values()):
            del ways[Backend.vllm]
    if not ways:
        raise problems[0]
    return ways


def _preferred(ways: Mapping[str, Way], offers: Sequence[Offer], options: PlannerOptions) -> Preference:
    gpus = max((way.gpus for way in ways.values()), key=len)
    parallel = max(way.wants.parallel for way in ways.values())
    goal = options.goal or (Goal.latency if parallel == 1 else Goal.throughput)
    return preference(goal, parallel, gpus, offers)


def _only_choice(backend: str, model: Model, options: PlannerOptions, eligible_backends: Sequence[str]) -> str:
    """Why there was nothing to choose: the model's form, the options, or else the cards."""
    title = TITLES[backend]
    if sum(bool(model.forms(each)) for each in BACKENDS) == 1:
        return f"{title} alone loads {options.quant}" if model.profile else f"{title} is the engine for {model.kind}"
    if len(eligible_backends) == 1:
        return f"{title} alone knows all the options that were given"
    return f"{title} alone can use these cards"


def _shadows_shipped(name: str) -> bool:
    from mgpu.profile import shipped_profile_folder, user_profile_folder

    return all((folder / f"{name}.yaml").is_file() for folder in (user_profile_folder(), shipped_profile_folder()))


def _assumed_names(machine: Machine) -> Machine:
    """Device names where no engine can be asked: CUDA for NVIDIA, ROCm for AMD, Vulkan for the others, in order."""
    kinds = {"nvidia": "CUDA", "amd": "ROCm"}
    counts: dict[str, int] = {}
    gpus = []
    for gpu in machine.gpus:
        if not gpu.engine_devices and not gpu.problem:
            kind = kinds.get(gpu.vendor, "Vulkan")
            gpu = replace(gpu, engine_devices=(f"{kind}{counts.setdefault(kind, 0)}",))
            counts[kind] += 1
        gpus.append(gpu)
    return replace(machine, gpus=tuple(gpus))
