"""The search for the best assignment of models to cards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace

from mgpu.machine.snapshot import Gpu, Machine
from mgpu.planning.assignment import Assignment, Contender, Placed, named_weight
from mgpu.planning.candidates import Candidate, planned_on_bytes
from mgpu.planning.links import Links, is_slow

# Up to here every assignment is looked at; with more the best few are carried from model to model.
_MODELS_TRIED_ALL = 4
_CARDS_TRIED_ALL = 4
_CARRIED = 4
# A plan takes about a millisecond a card. Each step of the search may plan on so many cards together; after that it
# looks at single cards and what it knows.
_MOST_WORK = 120
_MOST_LOOKS = 20_000
_MOST_REPAIRS = 40


class Search:
    """Models, cards, and every plan that was made so far."""

    def __init__(self, contenders: Sequence[Contender], machine: Machine) -> None:
        usable = frozenset[int]().union(*(contender.cards for contender in contenders))
        self.contenders = tuple(contenders)
        self.gpus = tuple(gpu for gpu in machine.gpus if gpu.index in usable)
        self.host = machine.host
        self.start = Assignment(
            free=tuple(planned_on_bytes(gpu) for gpu in self.gpus),
            users=(0,) * len(self.gpus),
            host_free=machine.host.ram_available_bytes,
        )
        self._links = Links(machine)
        signatures: dict[Hashable, int] = {}
        # Cards of one number are interchangeable.
        self._alike = [signatures.setdefault(self._signature(gpu), len(signatures)) for gpu in self.gpus]
        self._planned: dict[Hashable, Placed | None] = {}
        self._work_left = _MOST_WORK
        self._speeds: dict[tuple[int, int], float] = {}

    def best(self) -> Assignment:
        """Return the best assignment; the same for the same input."""

        def better(*found: Assignment) -> Assignment:
            return max(found, key=lambda each: each.score)

        # Large ones first: what is small finds room between them. But who offloads or lowers its context takes all that
        # is left, and more of the small ones may find room than of the large.
        orders = [self._sorted(-1), self._sorted(1)]
        best = self._carried(orders[0], 1)
        if self._is_whole(best):
            del orders[1]
        best = better(best, *(self._carried(order, _CARRIED) for order in orders))
        self._work_left = _MOST_WORK
        if len(self.contenders) > _MODELS_TRIED_ALL or len(self.gpus) > _CARDS_TRIED_ALL:
            return self._repaired(best)
        for order in orders:
            best = self._every(order, best)
        return best

    def _is_whole(self, found: Assignment) -> bool:
        """Whether all models are placed, on cards alone and with all of their context."""
        placed, _, offloaded, lost, *_ = found.score
        return placed == len(self.contenders) and not offloaded and not lost

    def usable(self, model: int) -> tuple[int, ...]:
        """Return the positions of the cards that the model can use."""
        return tuple(card for card, gpu in enumerate(self.gpus) if gpu.index in self.contenders[model].cards)

    def plan(self, left: Assignment, model: int, cards: tuple[int, ...], *, least: bool) -> Candidate | None:
        """Return the model's plan on these cards as `left` leaves them."""
        gpus = tuple(
            self.gpus[card]
            if left.free[card] == self.start.free[card]
            else replace(self.gpus[card], free_bytes=left.free[card])
            for card in cards
        )
        host = replace(self.host, ram_available_bytes=left.host_free)
        return self.contenders[model].plan_on(gpus, host, least=least)

    def judged(self, model: int, cards: tuple[int, ...], candidate: Candidate | None) -> Placed | None:
        """Return the plan as a placement; None where it does not run, or leaves one of the cards idle."""
        if candidate is None or not candidate.runs:
            return None
        used = [device for device in candidate.devices if not device.idle]
        offloaded = candidate.verdict == "fits-with-offload"
        places = {self.gpus[card].index: card for card in cards}
        if len(used) != len(cards) and not offloaded:
            return None
        at_once = candidate.tensor_parallel > 1 or candidate.split_mode == "tensor"
        gpus = [self.gpus[card] for card in cards]
        predicted = candidate.speed.decode_tok_s
        return Placed(
            candidate=candidate,
            taken=tuple(sorted((places[device.gpu], device.total_bytes) for device in used)),
            offloaded=offloaded,
            lost=max(0.0, 1 - candidate.ctx_tokens / self.contenders[model].ctx_tokens),
            slow_links=self._links.slow(gpus) if at_once else 0,
            nvlinks=self._links.nvlinks(gpus) if at_once else 0,
            speed=(predicted.likely if predicted else candidate.speed.bound_tok_s) or 1.0,
        )

    def _sorted(self, sign: int) -> list[int]:
        """The models by their size; equal ones keep their order."""

        def size(model: int) -> tuple[int, str]:
            return sign * self.contenders[model].size_bytes, self.contenders[model].kind

        return sorted(range(len(self.contenders)), key=size)

    def _carried(self, order: Sequence[int], count: int, work: int = _MOST_WORK) -> Assignment:
        """The best assignment in this order of models, when `count` of the best are carried from one to the next."""
        self._work_left = work
        states = [self.start]
        for step, model in enumerate(order):
            left = len(order) - step
            reached = [
                each for state in states for each in self._next(state, model, self._few_sets(state, model, left))
            ]
            states = self._ranked(reached)[:count]
        return states[0]

    def _every(self, order: Sequence[int], best: Assignment) -> Assignment:
        """The best of all assignments in this order of models, looked for wherever it could still beat `best`."""
        nvlinks = math.inf if any(gpu.nvlink for gpu in self.gpus) else 0
        looks = itertools.count()

        def deeper(state: Assignment, best: Assignment) -> Assignment:
            left = order[len(state.order) :]
            if not left:
                return max(best, state, key=lambda each: each.score)
            size = self._largest(state, len(left), best)
            placed, named, offloaded, lost, shared, slow, _, links, spare = state.score
            speed = math.inf
            if size < len(self.gpus):  # else every set of cards would have to be planned on first
                speed = round(state.logarithm + sum(self._fastest(model, size) for model in left) + 1e-9, 3)
            more = self._at_most(state, left)
            named += sum(named_weight(model) for model in left)
            if (placed + more, named, offloaded, lost, shared, slow, speed, links + nvlinks, spare) <= best.score:
                return best
            sets = self._useful(state, left[0], (cards for cards in self._sets(state) if len(cards) <= size))
            for following in self._ranked(list(self._next(state, left[0], sets))):
                if next(looks) > _MOST_LOOKS:
                    break
                best = deeper(following, best)
            return best

        return deeper(self.start, best)

    def _largest(self, state: Assignment, left: int, best: Assignment) -> int:
        """How many cards one of the `left` models may take where it is to be better than `best`: if that has all
        models on cards of their own, each of the others needs one."""
        if not self._is_whole(best) or best.score[4]:
            return len(self.gpus)
        return max(1, sum(not users for users in state.users) - left + 1)

    def _fastest(self, model: int, size: int) -> float:
        """The logarithm of the model's highest speed on as many of all cards, were it alone."""
        if (model, size) not in self._speeds:
            sets = (cards for cards in self._sets(self.start) if len(cards) <= size)
            on_each = (self._on(self.start, model, cards) for cards in sets)
            self._speeds[model, size] = math.log(max((placed.speed for placed in on_each if placed), default=1.0))
        return self._speeds[model, size]

    def _repaired(self, best: Assignment) -> Assignment:
        """`best` with what found no room put first, and another model last that may find room elsewhere."""
        tried = itertools.count()
        for missing in [model for model, placed in zip(best.order, best.placed, strict=True) if placed is None]:
            if sum(best.free) < self.contenders[missing].least_bytes:
                continue  # one more would not find room in any order
            for other in best.order:
                if next(tried) > _MOST_REPAIRS or self._work_left <= 0:
                    return best
                rest = (model for model in best.order if model not in (missing, other))
                state = self._carried([missing, *rest, *([other] if other != missing else [])], 1, self._work_left)
                if state.score > best.score:
                    best = state
                    break
        return best

    def _next(self, state: Assignment, model: int, sets: Iterator[tuple[int, ...]]) -> Iterator[Assignment]:
        """The assignments with `model` on each of the sets of cards where it runs, and the one without it."""
        for cards in sets:
            if (placed := self._on(state, model, cards)) is not None:
                yield state.with_model(model, placed)
        yield state.with_model(model, None)

    def _ranked(self, states: list[Assignment]) -> list[Assignment]:
        """The best first, and one of those that leave the same cards in the same condition."""
        found: dict[Hashable, Assignment] = {}
        for state in sorted(states, key=lambda state: state.score, reverse=True):
            left = tuple(sorted(zip(self._alike, state.free, state.users, strict=True)))
            found.setdefault((state.score, left, state.host_free), state)
        return list(found.values())

    def _sets(self, state: Assignment) -> Iterator[tuple[int, ...]]:
        """Every set of cards, of those that differ in nothing one."""
        groups: dict[Hashable, list[int]] = {}
        for card, alike in enumerate(self._alike):
            groups.setdefault((alike, state.free[card], state.users[card]), []).append(card)
        for counts in itertools.product(*(range(len(group) + 1) for group in groups.values())):
            cards = (group[:count] for group, count in zip(groups.values(), counts, strict=True))
            yield tuple(sorted(itertools.chain.from_iterable(cards)))

    def _useful(self, state: Assignment, model: int, sets: Iterator[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
        """The sets without those of unlike cards where some of these are enough: with more of them the model is only
        slower, since unlike cards work in turn."""
        enough: list[frozenset[int]] = []
        for cards in sorted(sets, key=len):
            unlike = len({(self.gpus[card].name, self.gpus[card].total_bytes) for card in cards}) > 1
            if unlike and any(fewer.issubset(cards) for fewer in enough):
                continue
            if self._fits_well(state, model, cards):
                enough.append(frozenset(cards))
            yield cards

    def _few_sets(self, state: Assignment, model: int, left: int) -> Iterator[tuple[int, ...]]:
        """Sets of cards worth a look: each single one, then of each size the emptiest until the model has room, then
        larger ones as long as there are empty cards for the `left` models still to come."""
        usable = self.usable(model)
        share = sum(not state.users[card] for card in usable) // left
        singles: dict[Hashable, tuple[int, ...]] = {}
        for card in usable:
            singles.setdefault((self._alike[card], state.free[card], state.users[card]), (card,))
        sets, size, found = list(singles.values()) or [()], 1, False
        while sets:
            yield from sets
            found |= any(self._fits_well(state, model, cards) for cards in sets)
            size = size * 2 if found else size + 1
            sets = [] if found and size > share else list(self._emptiest(state, usable, size))

    def _emptiest(self, state: Assignment, usable: tuple[int, ...], size: int) -> Iterator[tuple[int, ...]]:
        """The emptiest cards that are interchangeable, those of one name, and those of any."""
        emptiest = sorted(usable, key=lambda card: (state.users[card], -state.free[card], card))
        seen = set()
        kinds: tuple[Callable[[int], Hashable], ...]
        kinds = (lambda card: self._alike[card], lambda card: self.gpus[card].name, lambda _: None)
        for kind in kinds:
            groups: dict[Hashable, list[int]] = {}
            for card in emptiest:
                groups.setdefault(kind(card), []).append(card)
            for group in groups.values():
                cards = tuple(sorted(group[:size]))
                if len(cards) == size and cards not in seen:
                    seen.add(cards)
                    yield cards

    def _fits_well(self, state: Assignment, model: int, cards: tuple[int, ...]) -> bool:
        placed = self._on(state, model, cards)
        return placed is not None and not placed.offloaded and not placed.lost

    def _at_most(self, state: Assignment, left: Sequence[int]) -> int:
        """How many of the models that are `left` can find room at best."""
        sizes = itertools.accumulate(sorted(self.contenders[model].least_bytes for model in left))
        return sum(size <= sum(state.free) for size in sizes)

    def _on(self, state: Assignment, model: int, cards: tuple[int, ...]) -> Placed | None:
        """The model on these cards as they are left; None where it does not run, or leaves one of them idle."""
        contender = self.contenders[model]
        if bool(cards) != bool(contender.cards) or not {self.gpus[card].index for card in cards} <= contender.cards:
            return None
        if sum(state.free[card] for card in cards) < contender.least_bytes:
            return None
        whole = self._remembered(self.start, model, cards)
        if whole is None or self._is_hopeless(state, contender, whole):
            return None
        if len(cards) <= 1 and not whole.lost and not whole.offloaded and self._has_room(state, whole):
            return whole  # what it takes of one card does not depend on what else is there
        placed = self._remembered(state, model, cards)
        return placed if placed and self._host_holds(state, placed) else None

    def _is_hopeless(self, state: Assignment, contender: Contender, whole: Placed) -> bool:
        """Whether the model cannot run on what is left of cards that it has room on when they are empty: less than it
        takes there or, where its context may be lowered, than it takes without any."""
        if contender.spills:
            return False
        needed = sum(taken for _, taken in whole.taken)
        if not contender.ctx_fixed:
            needed -= sum(device.kv_bytes for device in whole.candidate.devices)
        return needed > sum(state.free[card] for card, _ in whole.taken)

    def _has_room(self, state: Assignment, placed: Placed) -> bool:
        """Whether what was planned on empty cards fits on these, which keep their headroom."""
        wants = placed.candidate.wants
        on_cards = all(state.free[card] - taken >= wants.headroom_on(self.gpus[card]) for card, taken in placed.taken)
        return on_cards and self._host_holds(state, placed)

    def _host_holds(self, state: Assignment, placed: Placed) -> bool:
        return state.host_free is None or placed.candidate.host.total_bytes <= state.host_free

    def _remembered(self, state: Assignment, model: int, cards: tuple[int, ...]) -> Placed | None:
        left = tuple((self._alike[card], state.free[card]) for card in cards)
        key = (self.contenders[model].kind, left or state.host_free)
        if key not in self._planned:
            self._work_left -= len(cards)
            if self._work_left < 0 and len(cards) > 1:
                return None
            self._planned[key] = self.judged(model, cards, self.plan(state, model, cards, least=True))
        found = self._planned[key]
        if found is None or [card for card, _ in found.taken] == list(cards) or len(found.taken) != len(cards):
            return found
        # It was planned on cards like these.
        return replace(found, taken=tuple((card, size) for card, (_, size) in zip(cards, found.taken, strict=True)))

    def _signature(self, gpu: Gpu) -> Hashable:
        """What makes two cards interchangeable."""
        own = (gpu.vendor, gpu.name, gpu.total_bytes, gpu.bandwidth_gb_s, gpu.display, gpu.compute_capability)
        engines = tuple(name.rstrip("0123456789") for name in gpu.engine_devices)
        users = tuple(gpu.index in contender.cards for contender in self.contenders)
        return own, engines, is_slow(gpu), users, self._links.groups(gpu), gpu.free_bytes is None
