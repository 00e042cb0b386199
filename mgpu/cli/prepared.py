"""A plan with all it was made of: what `plan` shows and `run` carries out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mgpu.backends.backend import Serving
from mgpu.backends.engine import Engine
from mgpu.cli.engines import Way
from mgpu.models.forms import Model, Weights
from mgpu.planning.choice import TITLES, Preference, choose
from mgpu.planning.plan import Plan

if TYPE_CHECKING:
    from mgpu.planning.measurements import Setting
    from mgpu.running.ollama_attach import Attached, Foreign

_PROGRAMS = {"llama.cpp": "llama-server", "vllm": "vllm", "ollama": "ollama"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A plan and all it was made of: the `ways` by engine and the `weights` each would load.

    `argument` is MODEL as typed; `preferred` is what the engines' ways were ranked by.
    """

    argument: str
    model: Model
    plan: Plan
    preferred: Preference
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
    def to_install(self) -> str | None:
        """How to install the chosen engine of another machine's plan, where it is not here either; in words."""
        way = self.ways[self.backend]
        if way.available or not self.simulated:
            return None
        return f"{TITLES[way.backend]} is not installed here: {way.install.removeprefix('install it from ')}"

    @property
    def running(self) -> Attached | Foreign | None:
        """What already answers at Ollama's address, where Ollama was chosen."""
        return self.ways[self.backend].running

    @property
    def weights(self) -> Weights:
        """The form of the model that the chosen engine loads."""
        return self.weights_by_engine[self.backend]

    @property
    def setting(self) -> Setting | None:
        """What the speed of the chosen way depends on; None where that cannot be recognised again."""
        way = self.ways[self.backend]
        return None if self.simulated else way.setting(self.plan.chosen, self.weights, self.plan.machine.host)

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
        plan = choose([offer], self.preferred, self.plan.machine)
        return replace(
            self,
            plan=replace(plan, why=self.plan.why),
            ways={self.backend: way},
            weights_by_engine={self.backend: weights},
        )
