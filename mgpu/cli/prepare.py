"""From words on the command line to a plan: model, machine, cards, wishes. Shared by `plan` and `run`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mgpu.backends.engine import INSTALL_LLAMA_CPP, DeviceQuery, Engine, find_llama_server, stray_variables
from mgpu.backends.llama_cpp import EngineArguments, read_engine_arguments
from mgpu.cli.options import PlannerOptions
from mgpu.errors import BadModel, EngineFailed, MgpuError, Missing, UsageError
from mgpu.machine.probe import probe, select_gpus, with_engine_devices
from mgpu.machine.simulate import simulate
from mgpu.machine.snapshot import Gpu, Machine
from mgpu.models.facts import ModelFacts
from mgpu.models.source import GgufFile, HubRepository, ModelFolder, ProfileName, in_quantisation, parse_model
from mgpu.planning.plan import Plan, make_plan
from mgpu.planning.wants import Wants

if TYPE_CHECKING:
    from mgpu.models.hub import HubFiles
    from mgpu.models.remote import RemoteGguf
    from mgpu.profile import GgufSource, Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedModel:
    """A model as it was found: by a `profile`, on disk at `path`, or on the hub (`remote`)."""

    name: str
    facts: ModelFacts
    profile: Profile | None = None
    path: Path | None = None
    remote: RemoteGguf | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A plan and all it was made of. `engine` is None when none is installed or the machine is simulated;
    `path` is the model's file when it is on disk, else `source` says where to get it. `argument` is MODEL as typed."""

    name: str
    argument: str
    model: PreparedModel
    plan: Plan
    wants: Wants
    gpus: tuple[Gpu, ...]
    arguments: EngineArguments
    engine: Engine | None
    source: GgufSource | HubFiles | None
    path: Path | None
    warnings: tuple[str, ...]

    def planned_again(self, path: Path) -> Prepared:
        """Return the same plan made from the header of the file that is now at `path`."""
        from mgpu.models.gguf_facts import facts_from_gguf

        facts = replace(facts_from_gguf(path), name=self.name)
        return replace(self, path=path, plan=make_plan(facts, self.plan.machine, self.gpus, self.wants))


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
    arguments, wants = read_engine_arguments(engine_arguments, options.wants())
    # The engine takes as long to list its devices as all the rest: it is asked first and heard last.
    simulated = machine is not None
    engine = None if simulated else find_llama_server()
    query = DeviceQuery(engine, rpc=arguments.rpc) if engine else None
    try:
        found = probe() if machine is None else simulate(machine)
        prepared_model = _model(source, options.quant)
        facts, profile = prepared_model.facts, prepared_model.profile
        warnings = []
        if query:
            assert engine
            try:
                found = with_engine_devices(found, query.devices(), backend=engine.backend)
            except EngineFailed as error:
                if must_run:
                    raise
                found = _assumed_names(found)
                warnings.append(f"planned as if llama.cpp saw every card: {error.message}")
        else:
            found = _assumed_names(found)
            if not simulated:
                warnings.append(f"llama.cpp is not installed (planned as if it saw every card): {INSTALL_LLAMA_CPP}")
        if prepared_model.remote and prepared_model.remote.unconfirmed:
            warnings.append(f"planned from what was read of {source} before: {prepared_model.remote.unconfirmed}")
        if found.driver and found.driver.problem:
            warnings.append(found.driver.problem)
        if stray := [name for name in stray_variables() if name != "LLAMA_ARG_RPC"]:
            warnings.append(f"not passed to the engine: {', '.join(stray)}; give its own flags after --")
        if profile and _shadows_shipped(profile.name):
            warnings.append(f"your own profile {profile.name} is used instead of the one that ships with mgpu")
        if unplanned := arguments.unplanned:
            warnings.append(f"the memory that {', '.join(unplanned)} takes is not in the plan")
        gpus, remarks = _cards(found, options.gpus, simulated=simulated)
        warnings += remarks
    finally:
        if query:
            query.close()
    if wants.tensor_split and len(wants.tensor_split) != len(gpus):
        raise UsageError(
            f"--tensor-split has {len(wants.tensor_split)} proportions for {len(gpus)} cards",
            hint="give one for each card that --gpus chooses",
        )
    if profile:
        wants = replace(
            wants,
            ctx_tokens=wants.ctx_tokens or profile.ctx,
            parallel=options.parallel or profile.parallel,
        )
    plan = make_plan(facts, found, gpus, wants)
    if plan.best is None and profile:
        plan = make_plan(facts, found, gpus, wants, other_quantisations=tuple(_others(profile, facts)))
    return Prepared(
        name=prepared_model.name,
        argument=model,
        model=prepared_model,
        plan=plan,
        wants=wants,
        gpus=gpus,
        arguments=arguments,
        engine=engine,
        source=_source(prepared_model),
        path=prepared_model.path,
        warnings=tuple(warnings),
    )


def _model(source: object, quant: str | None) -> PreparedModel:
    match source:
        case ProfileName(name):
            return _profiled(name, quant)
        case GgufFile(path) | ModelFolder(path):
            return _from_file(path, quant)
        case HubRepository():
            return _on_hub(source, quant)
        case _:
            raise Missing(
                f"{source} is not supported by this version of mgpu",
                code="source-unsupported",
                hint="use a profile (mgpu profiles list) or the path of a .gguf file",
            )


def _from_file(path: Path, quant: str | None) -> PreparedModel:
    from mgpu.models.gguf_facts import facts_from_gguf

    if path.is_dir():
        raise BadModel(
            f"{path} is a folder; llama.cpp, the engine this version of mgpu starts, wants one .gguf file",
            hint=f"ls {path}/*.gguf",
        )
    if quant:
        raise UsageError(f"--quant {quant} chooses among a profile's files; {path} is one file", hint="leave it out")
    facts = facts_from_gguf(path)
    name = path.name.removesuffix(".gguf")
    return PreparedModel(name=name, facts=replace(facts, name=name), path=path.absolute())


def _on_hub(source: HubRepository, quant: str | None) -> PreparedModel:
    """The model from its file where it is on disk, else from the first megabytes of it on the hub."""
    from mgpu.models.fetch import find_local
    from mgpu.models.gguf_facts import facts_from_gguf
    from mgpu.models.remote import gguf_on_hub

    wanted = in_quantisation(source, quant)
    name = wanted.repository.split("/")[1].removesuffix("-GGUF")
    if path := find_local(wanted):
        return PreparedModel(name=name, facts=replace(facts_from_gguf(path), name=name), path=path)
    remote = gguf_on_hub(wanted)
    return PreparedModel(name=name, facts=replace(remote.facts, name=name), remote=remote)


def _profiled(name: str, quant: str | None) -> PreparedModel:
    from mgpu.models.fetch import find_local
    from mgpu.models.gguf_facts import facts_from_gguf
    from mgpu.models.shape import facts_from_shape
    from mgpu.profile import load_profile

    profile = load_profile(name).profile
    wanted, source = choose_quantisation(profile, quant)
    path = find_local(source, quantisation=wanted)
    facts = replace(facts_from_gguf(path), name=name) if path else facts_from_shape(name, profile.model, wanted)
    return PreparedModel(name=name, facts=facts, profile=profile, path=path)


def choose_quantisation(profile: Profile, quant: str | None) -> tuple[str, GgufSource]:
    """Return the quantisation that `--quant` means (None: the profile's own choice) and where it is to be had.

    Raises UsageError if the profile has none by that name.
    """
    wanted = profile.default_quantisation if quant is None else quant.upper()
    if wanted not in profile.quantisations:
        there = list(profile.quantisations)
        near = difflib.get_close_matches(wanted, there, n=1, cutoff=0.3)
        raise UsageError(
            f"profile {profile.name} has no quantisation {quant}; it has {', '.join(there)}",
            hint=f"--quant {near[0] if near else profile.default_quantisation}",
        )
    return wanted, next(source for name, source in profile.quantisations.items() if name == wanted)


def _source(model: PreparedModel) -> GgufSource | HubFiles | None:
    """Where the model's files are to be had, None if it is a file of the user's."""
    if model.remote:
        return model.remote.files
    files = model.profile.quantisations.items() if model.profile else ()
    return next((source for quantisation, source in files if quantisation == model.facts.quantisation), None)


def _shadows_shipped(name: str) -> bool:
    from mgpu.profile import shipped_profile_folder, user_profile_folder

    return all((folder / f"{name}.yaml").is_file() for folder in (user_profile_folder(), shipped_profile_folder()))


def _others(profile: Profile, facts: ModelFacts) -> Iterator[ModelFacts]:
    from mgpu.models.shape import facts_from_shape

    for quantisation in profile.quantisations:
        if quantisation != facts.quantisation:
            yield facts_from_shape(profile.name, profile.model, quantisation)


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


def _cards(machine: Machine, selection: str | None, *, simulated: bool) -> tuple[tuple[Gpu, ...], list[str]]:
    """The cards to plan on, and what to tell the user about those left out."""
    option, remarks = "--gpus", []
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    if selection is None and mask is not None and not simulated and any(map(_takes_cuda, machine.gpus)):
        option, selection = "CUDA_VISIBLE_DEVICES", _unmasked(mask)
        remarks.append(f"{option}={mask}: planned on {'no card' if selection == 'none' else f'{selection} only'}")
    try:
        chosen = select_gpus(machine, selection)
    except MgpuError as error:
        error.message = error.message.replace("--gpus", option, 1)
        raise
    if selection is None and (left := [gpu for gpu in machine.gpus if gpu.integrated and gpu not in chosen]):
        remarks.append(f"gpu{left[0].index} ({left[0].name}) is integrated and left out; --gpus all includes it")
    unseen = [gpu for gpu in chosen if not gpu.engine_devices]
    if not unseen:
        return chosen, remarks
    names = ", ".join(f"gpu{gpu.index} ({gpu.name})" for gpu in unseen)
    if selection not in (None, "all"):
        raise Missing(
            f"llama.cpp does not see {names}: this build lacks their driver's interface, or it is hidden from it",
            code="gpu-unseen",
            hint="mgpu backends shows what it sees; a build with CUDA or ROCm sees these cards",
        )
    remarks.append(f"llama.cpp does not see {names}; mgpu backends shows what it sees")
    return tuple(gpu for gpu in chosen if gpu.engine_devices), remarks


def _takes_cuda(gpu: Gpu) -> bool:
    return gpu.vendor == "nvidia" or any(device.startswith("CUDA") for device in gpu.engine_devices)


def _unmasked(mask: str) -> str:
    """CUDA_VISIBLE_DEVICES as --gpus takes it: its numbers are indices, and nothing or -1 hides every card."""
    items = [item.strip() for item in mask.split(",")]
    if items[0] in ("", "-1"):
        return "none"
    return ",".join(f"gpu{item}" if item.isdecimal() else item for item in items)
