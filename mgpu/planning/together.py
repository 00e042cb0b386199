"""Several models at once: which goes to which cards, so that all find room and none is slower than it must be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

from mgpu.machine.snapshot import Gpu, Machine
from mgpu.planning.assignment import Assignment, Contender
from mgpu.planning.assignment_search import Search
from mgpu.planning.candidates import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a model went: `gpus` in the engine's order, none on the CPU.

    What cannot run (`placed` is False) has no cards; `candidate` is then what it would be on all that the others
    leave, and None where no engine could use that; `alone` is what it would be without them, where it runs then.
    """

    contender: Contender
    gpus: tuple[int, ...]
    placed: bool
    candidate: Candidate | None
    alone: Candidate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CardUse:
    """A card and what all models together take of it. `free_bytes` is what is free before any of them starts."""

    gpu: Gpu
    free_bytes: int
    planned_bytes: int

    @property
    def spare_bytes(self) -> int:
        """What stays free."""
        return self.free_bytes - self.planned_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """All placements, in the order in which the models are to be started: the ledger of each counts on those before it
    being there. `cards` are those that some model could use."""

    placements: tuple[Placement, ...]
    cards: tuple[CardUse, ...]

    @property
    def placed(self) -> bool:
        """Whether every model found room."""
        return all(placement.placed for placement in self.placements)

    @property
    def verdict(self) -> str:
        """The worst verdict: "fits", "fits-with-offload" or "does-not-fit"."""
        if not self.placed:
            return "does-not-fit"
        offloaded = any(each.candidate and each.candidate.verdict != "fits" for each in self.placements)
        return "fits-with-offload" if offloaded else "fits"


def place_together(contenders: Sequence[Contender], machine: Machine) -> Together:
    """Return the best assignment of the models to cards of `machine`, the same for the same input.

    Better is, what counts most first: more models placed; those that were named first; fewer of them with layers in
    host memory; less context lost; fewer shared cards; fewer slow links between cards that work on one layer at once;
    more speed, that of a model which shares a card divided by the number of its users; more NVLink; more memory left on
    the fullest card. Up to 4 models on 4 cards all assignments are looked at. With more, large models come first, the
    best few partial assignments are carried on, and what found no room is tried again in the place of others.
    """
    search = Search(contenders, machine)
    best = search.best()
    left, placements = search.start, list[Placement]()
    for model, placed in zip(best.order, best.placed, strict=True):
        # Planned again: it was planned on the likes of its cards, and what is alone there gets all that they have.
        cards = tuple(card for card, _ in placed.taken) if placed else ()
        alone = all(best.users[card] == 1 for card in cards)
        candidate = search.plan(left, model, cards, least=not alone) if placed else None
        again = search.judged(model, cards, candidate)
        left = left.with_model(model, again)
        used = tuple(device.gpu for device in candidate.devices if not device.idle) if again and candidate else ()
        placements.append(
            Placement(
                contender=contenders[model],
                gpus=used,
                placed=again is not None,
                candidate=candidate if again else None,
            )
        )
    judged = {}  # what found no room, once for all of a kind
    for model, placement in zip(best.order, placements, strict=True):
        if not placement.placed and placement.contender.kind not in judged:
            judged[placement.contender.kind] = _judged_by_the_rest(search, left, model)
    uses = zip(search.gpus, search.start.free, left.free, strict=True)
    return Together(
        placements=tuple(
            placement if placement.placed else replace(placement, **judged[placement.contender.kind])
            for placement in placements
        ),
        cards=tuple(CardUse(gpu=gpu, free_bytes=free, planned_bytes=free - rest) for gpu, free, rest in uses),
    )


class _Judged(TypedDict):
    candidate: Candidate | None
    alone: Candidate | None


def _judged_by_the_rest(search: Search, left: Assignment, model: int) -> _Judged:
    """What a model that found no room would be on all that the others leave, and whether it would run without them."""
    cards = search.usable(model)
    alone = search.plan(search.start, model, cards, least=True)
    return _Judged(candidate=search.plan(left, model, cards, least=True), alone=alone if alone and alone.runs else None)
