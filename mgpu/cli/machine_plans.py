"""One model planned on one machine, or on one of its cards, in this quantisation or that."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mgpu.planning.advice import EQUAL_SIZE, Choice, Standing
from mgpu.planning.wants import Goal

if TYPE_CHECKING:
    from mgpu.cli.options import PlannerOptions
    from mgpu.cli.prepare import Asked
    from mgpu.cli.prepared import Prepared
    from mgpu.models.forms import Weights
    from mgpu.planning.candidates import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class MachinePlans:
    """The plans of a model on the machine called `name`; `prepared` collects what their candidates are from."""

    name: str
    asked: Asked
    options: PlannerOptions
    prepared: dict[Candidate, Prepared]

    def usual(self) -> Choice:
        """Return what `mgpu plan` says of the machine alone, for one user; where that does not run, what does with
        layers in host memory."""
        asked = _for_users(self.asked, 1, Goal.latency)
        found = self._choice(asked)
        if found.runs:
            return found
        on_host = self._choice(_with_offload(asked))
        return on_host if on_host.runs else found

    def standing(self, usual: Choice, least_bytes: int | None) -> Standing:
        """Return how the machine stands beside others, the smallest of whose files has `least_bytes` (None: none
        fits): in a quantisation of about that size, for one user."""
        one, other = usual, None
        if usual.fits and least_bytes and usual.file_bytes * EQUAL_SIZE > least_bytes:
            asked = _with_ctx(_for_users(self.asked, 1, Goal.latency), usual.candidate.ctx_tokens)
            one = self._about(asked, least_bytes) or usual
            other = usual if one is not usual else None
        return Standing(
            name=self.name,
            machine=self.asked.machine,
            one=one,
            usual=other,
            largest=self._other_size(one),
            one_card=self._on_one_card(one) if one.fits else None,
            offload=self.options.offload == "allow",
        )

    def together(self, one: Choice, users: int, *, ctx_tokens: int | None = None) -> Choice | None:
        """Return the best way for several users, in about the same size as `one`; None where it does not fit."""
        asked = self.asked if ctx_tokens is None else _with_ctx(self.asked, ctx_tokens)
        asked = _for_users(asked, users, self.options.goal or Goal.throughput)
        return self._about(asked, one.file_bytes)

    def _other_size(self, one: Choice) -> Choice | None:
        """The largest quantisation that fits with the same context: larger than that of `one` or, where that does not
        fit, smaller."""
        asked = _with_ctx(_for_users(self.asked, 1, Goal.latency), one.candidate.ctx_tokens)
        if one.fits:
            return self._largest(asked, at_least=one.file_bytes / EQUAL_SIZE)
        return self._largest(asked, at_most=one.file_bytes * EQUAL_SIZE)

    def _on_one_card(self, several: Choice) -> Choice | None:
        """The best way on a single card, where several are used; of each kind of card one is tried."""
        gpus = self.asked.machine.gpus
        kinds = {(gpu.name, gpu.total_bytes, gpu.free_bytes): gpu for gpu in gpus}
        if len(gpus) < 2 or several.cards < 2:
            return None
        alone = [self.asked.on((gpu,), self.asked.machine.host) for gpu in kinds.values()]
        found = [self._no_larger(each, several) for each in alone if each]
        return max((each for each in found if each), key=_rank, default=None)

    def _no_larger(self, asked: Asked, several: Choice) -> Choice | None:
        """The largest quantisation that fits these cards, none larger than that of `several` (about as large is
        equal); else the largest such one with layers in host memory."""
        asked = _with_ctx(_for_users(asked, 1, Goal.latency), several.candidate.ctx_tokens)
        smaller = several.file_bytes * EQUAL_SIZE
        if found := self._about(asked, several.file_bytes) or self._largest(asked, at_most=smaller):
            return found
        spilled = _with_offload(asked)
        return self._about(spilled, several.file_bytes, runs=True) or self._largest(spilled, at_most=smaller, runs=True)

    def _about(self, asked: Asked, file_bytes: int, *, runs: bool = False) -> Choice | None:
        """The best way in a quantisation of about that size which fits the cards, or `runs` at least; each engine has
        its preferred one first. None where there is none."""
        least, most = file_bytes * EQUAL_SIZE, file_bytes / EQUAL_SIZE
        forms = [(name, form) for name, form in _forms(asked) if least <= form.facts.file_bytes <= most]
        choice = self._choice(_with_forms(asked, forms)) if forms else None
        return choice if choice and (choice.fits or (runs and choice.runs)) else None

    def _largest(
        self, asked: Asked, *, at_least: float = 0, at_most: float = math.inf, runs: bool = False
    ) -> Choice | None:
        """The way in the largest quantisation of these sizes that fits the cards, or `runs` at least; None where none
        does."""
        forms = [(name, form) for name, form in _forms(asked) if at_least <= form.facts.file_bytes <= at_most]
        room = sum(gpu.free_bytes or gpu.total_bytes or 0 for gpu in asked.machine.gpus)
        if not any(way.gpus for way in asked.ways.values()):
            return None
        sizes = {form.facts.file_bytes for _, form in forms}
        for size in sorted((size for size in sizes if runs or size <= room), reverse=True):
            equal = [(name, form) for name, form in forms if size * EQUAL_SIZE <= form.facts.file_bytes <= size]
            choice = self._choice(_with_forms(asked, equal))
            if choice.fits or (runs and choice.runs):
                return choice
        return None

    def _choice(self, asked: Asked) -> Choice:
        prepared = asked.planned(fixes=False)
        choice = Choice(candidate=prepared.plan.chosen, file_bytes=prepared.plan.model.file_bytes)
        self.prepared[choice.candidate] = prepared
        return choice


def _rank(choice: Choice) -> tuple[bool, bool, int, float]:
    return choice.fits, choice.runs, choice.file_bytes, choice.sure_tokens_s or 0.0


def _for_users(asked: Asked, users: int, goal: Goal) -> Asked:
    from mgpu.planning.vllm_memory import VllmWants

    ways = {}
    for name, way in asked.ways.items():
        wants = replace(way.wants, parallel=users)
        ways[name] = replace(way, wants=replace(wants, goal=goal) if isinstance(wants, VllmWants) else wants)
    return replace(asked, options=replace(asked.options, parallel=users, goal=goal), ways=ways)


def _with_ctx(asked: Asked, ctx_tokens: int) -> Asked:
    ways = {name: replace(way, wants=replace(way.wants, ctx_tokens=ctx_tokens)) for name, way in asked.ways.items()}
    return replace(asked, ways=ways)


def _with_offload(asked: Asked) -> Asked:
    """Layers may stay in host memory, with the engines that can do that."""
    ways = {
        name: replace(way, wants=replace(way.wants, offload=True)) for name, way in asked.ways.items() if name != "vllm"
    }
    return replace(asked, ways=ways or asked.ways)


def _with_forms(asked: Asked, forms: Sequence[tuple[str, Weights]]) -> Asked:
    """No other forms of the model than these: the preferred one first, then the largest."""

    def place(owned: tuple[str, Weights]) -> tuple[bool, int]:
        name, form = owned
        preferred = asked.ways[name].weights[0].facts.quantisation
        return form.facts.quantisation != preferred, -form.facts.file_bytes

    ordered = sorted(forms, key=place)
    weights = {name: tuple(form for owner, form in ordered if owner == name) for name in asked.ways}
    ways = {name: replace(way, weights=weights[name]) for name, way in asked.ways.items() if weights[name]}
    return replace(asked, ways=ways or asked.ways)


def _forms(asked: Asked) -> Iterator[tuple[str, Weights]]:
    """The model in all its quantisations, by engine; with --quant, and for what is no profile, in that one. Ollama adds
    nothing but time: it runs llama.cpp's files."""
    for backend, way in asked.ways.items():
        if backend == "ollama" and "llama.cpp" in asked.ways:
            continue
        preferred = way.weights
        profile = asked.model.profile
        if profile and asked.options.quant is None and backend != "vllm":
            preferred = tuple(asked.model.in_quantisation(backend, name) for name in profile.quantisations)
        # A file on this machine's disk is no reason for another machine to take it.
        yield from ((backend, replace(form, path=None) if profile else form) for form in preferred)
