"""Models that want cards, and where they went."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from mgpu.machine.snapshot import Gpu, Host
from mgpu.planning.candidates import Candidate


class PlanOn(Protocol):
    """Plans one model on exactly these cards (none: on the CPU), whose `free_bytes` are what is left for it.

    With `least` an engine that would take all it can get is given what its users need. None where no engine can use
    these cards together.
    """

    def __call__(self, gpus: tuple[Gpu, ...], host: Host, *, least: bool) -> Candidate | None:
        """Return the best candidate, whatever its verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A model that wants cards. Those of one `kind` are planned alike; `cards` are the indices of the cards that some
    engine can use for it, none: it runs on the CPU. `size_bytes` are its weights' in its smallest form, which may be in
    host memory where it `spills`; `ctx_tokens` is the context that each user should get, at least where `ctx_fixed`."""

    name: str
    kind: str
    plan_on: PlanOn
    cards: frozenset[int]
    size_bytes: int
    ctx_tokens: int
    ctx_fixed: bool = False
    spills: bool = False

    @property
    def least_bytes(self) -> int:
        """What it takes of the cards at least."""
        return 0 if self.spills or not self.cards else self.size_bytes


@dataclass(frozen=True, slots=True)
class Placed:
    """One model on its cards. `taken` holds (position of the card, bytes), `lost` is the part of its context that it
    had to give up, `speed` in tokens per second is 1 where it is unknown."""

    candidate: Candidate
    taken: tuple[tuple[int, int], ...]
    offloaded: bool
    lost: float
    slow_links: int
    nvlinks: int
    speed: float


def named_weight(model: int) -> float:
    """Return what counts for the model that was named at this place: more than all that were named after it."""
    return 2.0**-model


@dataclass(frozen=True)
class Assignment:
    """Where the models of `order` went (None in `placed`: nowhere), and what they leave of each card and of the host.
    `users` counts the models on each card."""

    free: tuple[int, ...]
    users: tuple[int, ...]
    host_free: int | None
    order: tuple[int, ...] = ()
    placed: tuple[Placed | None, ...] = ()

    @cached_property
    def logarithm(self) -> float:
        """The logarithm of all models' speeds multiplied, those of models that share a card divided by their number."""
        there = (each for each in self.placed if each)
        return sum(math.log(each.speed / max([1, *(self.users[card] for card, _ in each.taken)])) for each in there)

    @cached_property
    def score(self) -> tuple[float, ...]:
        """How good it is, the larger the better: what counts most comes first."""
        there = [each for each in self.placed if each]
        return (
            len(there),
            sum(named_weight(model) for model, each in zip(self.order, self.placed, strict=True) if each),
            -sum(each.offloaded for each in there),
            -round(sum(each.lost for each in there), 3),
            # Engines on one card take turns: nobody measured how well, so that it is avoided before speed is compared.
            -sum(users - 1 for users in self.users if users > 1),
            -sum(each.slow_links for each in there),
            round(self.logarithm, 3),
            sum(each.nvlinks for each in there),
            min((free for free, users in zip(self.free, self.users, strict=True) if users), default=math.inf),
        )

    def with_model(self, model: int, placed: Placed | None) -> Assignment:
        """Return it with one model more."""
        free, users, host_free = list(self.free), list(self.users), self.host_free
        for card, taken in placed.taken if placed else ():
            free[card] -= taken
            users[card] += 1
        if host_free is not None and placed:
            host_free -= placed.candidate.host.total_bytes
        return Assignment(tuple(free), tuple(users), host_free, (*self.order, model), (*self.placed, placed))
