"""Machines side by side: what each makes of one model, what that costs, and where less serves as well.

Every statement here compares plans that were made; nothing is said of what was not planned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mgpu.machine.cards import card_for_name
from mgpu.machine.snapshot import Gpu, Machine
from mgpu.planning.candidates import Candidate
from mgpu.planning.ranking import AS_FAST
from mgpu.planning.speed import Range, interval

# Files of one model whose sizes are nearer than that hold it equally well: AWQ and Q4_K_M, FP8 and Q8_0.
EQUAL_SIZE = 0.9
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A way to run the model that was planned, and the size of the file that it runs."""

    candidate: Candidate
    file_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the cards hold all of it."""
        return self.candidate.verdict == "fits"

    @property
    def tokens_s(self) -> Range | None:
        """What one user gets; None where it cannot be run or nothing is predicted."""
        return self.candidate.speed.decode_tok_s if self.runs else None

    @property
    def all_tokens_s(self) -> Range | None:
        """What all users get together; None where it cannot be run or nothing is predicted."""
        together = self.candidate.speed.aggregate_tok_s if self.runs else None
        alone = self.candidate.parallel == 1 or (self.fits and self.candidate.backend == "vllm")
        return together or (self.tokens_s if alone else None)  # vLLM lets users wait where it has room for one

    @property
    def users(self) -> int:
        """How many users have room at once; the others wait."""
        return (self.candidate.speed.aggregate_users or 1) if self.candidate.parallel > 1 else 1

    @property
    def some_wait(self) -> bool:
        """Whether not all users have room at once."""
        waiting = any(reason.endswith("others wait") for reason in self.candidate.reasons)
        return waiting or (self.all_tokens_s is not None and self.users < self.candidate.parallel)

    @property
    def sure_tokens_s(self) -> float | None:
        """What counts of one user's speed: the likely rate or, where the host's memory decides, the least."""
        return self._sure(self.tokens_s)

    @property
    def all_sure_tokens_s(self) -> float | None:
        """The same of what all users get together."""
        return self._sure(self.all_tokens_s)

    def _sure(self, rates: Range | None) -> float | None:
        return None if rates is None else rates.likely if self.fits else rates.low

    @property
    def runs(self) -> bool:
        """Whether it could be started, if need be with layers in host memory."""
        return self.candidate.verdict in ("fits", "fits-with-offload")

    @property
    def cards(self) -> int:
        """How many cards it uses."""
        return len([device for device in self.candidate.devices if not device.idle])


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What one machine makes of the model. `name` is the machine as it was typed.

    `one` is the best way for one user, as `mgpu plan` would have it in the quantisation that all are compared in: where
    it does not fit, with layers in host memory (which the user allows where `offload` is set) or as it misses. `usual`
    is what `mgpu plan` takes where that has another quantisation. `largest` is the largest quantisation that fits with
    the same context: a larger one or, where `one` does not fit, a smaller one. `many` is the best way for several
    users, None where none were asked for or it does not fit. `one_card` is the best way on one of several cards, in no
    larger a quantisation than `one` (`EQUAL_SIZE`).
    """

    name: str
    machine: Machine
    one: Choice
    usual: Choice | None = None
    largest: Choice | None = None
    many: Choice | None = None
    one_card: Choice | None = None
    price: float | None = None
    offload: bool = False

    @property
    def runs(self) -> bool:
        """Whether the model runs there, as far as the user allows."""
        return self.one.fits or (self.offload and self.one.runs)

    @property
    def watts(self) -> float | None:
        """The power limits of all cards together (`watts_of`)."""
        return watts_of(self.machine.gpus)

    @property
    def one_per_1000(self) -> float | None:
        """The tokens per second of one user for each 1000 that the machine costs; None where it does not run."""
        return per_1000(self.one.sure_tokens_s if self.runs else None, self.price)

    @property
    def many_per_1000(self) -> float | None:
        """The tokens per second of all users together for each 1000."""
        return per_1000(self.many.all_sure_tokens_s if self.many else None, self.price)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """A sentence about `machine`. `kind` is "one-card", "one-card-smaller", "one-card-offload", "other-machine" or
    "money"; `as_well` says that the lesser thing serves one user as well, None where no speed is known."""

    kind: str
    machine: str
    as_well: bool | None
    text: str


def watts_of(gpus: Sequence[Gpu]) -> float | None:
    """Return the cards' power limits together: each as the machine has it, or its default from the catalogue; None
    where one is unknown."""
    limits = [gpu.power_limit_w or _default_limit(gpu) for gpu in gpus]
    return sum(limit for limit in limits if limit) if all(limits) else None


def price_of(gpus: Sequence[Gpu], prices: Mapping[str, float]) -> float | None:
    """Return what the cards cost together, by `prices` (by the catalogue's names, or else the driver's); None where a
    card's price is unknown, or there is no card."""
    each = [prices.get(price_key(gpu)) for gpu in gpus]
    return sum(price for price in each if price is not None) if each and None not in each else None


def price_key(gpu: Gpu) -> str:
    """Return the name under which a card's price is looked up: the catalogue's, or else the driver's."""
    card = card_for_name(gpu.name, gpu.total_bytes)
    return card.name if card else gpu.name


def per_1000(tokens_s: float | None, price: float | None) -> float | None:
    """Return the tokens per second for each 1000 of a price; None where either is unknown, and for what costs
    nothing."""
    return tokens_s / price * 1000 if tokens_s and price else None


def alike(one: Choice, other: Choice) -> bool:
    """Return whether two ways can be compared: about the same quantisation, the same context and as many users."""
    small, large = sorted((one.file_bytes, other.file_bytes))
    same = one.candidate.ctx_tokens == other.candidate.ctx_tokens and one.users == other.users
    return same and small >= large * EQUAL_SIZE


def statements(standings: Sequence[Standing], users: int) -> tuple[Statement, ...]:
    """Return what can be said of these machines: where one card serves as well as several (in a smaller quantisation
    or with layers in host memory, if need be), where another machine that takes less does, and which gives most for
    the money; of machines only where they do the same (`alike`). `users` is how many `many` is for."""
    found: list[Statement] = []
    for standing in standings:
        found += _one_card(standing)
        found += _other_machine(standing, standings)
    found += _money(standings, users)
    return tuple(found)


def _one_card(standing: Standing) -> Iterator[Statement]:
    """What one of several cards makes of it."""
    several, single = standing.one, standing.one_card
    count = len(standing.machine.gpus)
    if count < 2 or not several.fits:
        return
    cards = _NUMBERS[count] if count < len(_NUMBERS) else f"{count}"
    if several.cards == 1:
        name = _card_name(standing, several)
        text = f"one of the {cards} cards is enough for one user: {_spoken(several)} on one {name}"
        yield Statement(kind="one-card", machine=standing.name, as_well=True, text=text)
        return
    if single is None or not single.runs:
        return
    name, all_cards = _card_name(standing, single), "both cards" if several.cards == 2 else f"{several.cards} cards"
    fast, slow = several.tokens_s, single.tokens_s
    as_well = _as_well(single, several)
    beside = f"{_spoken(single)}, and {_spoken(several)} on {all_cards}"
    share = f"{slow.likely / fast.likely:.0%} of the speed" if fast and slow else ""
    if single.fits and single.file_bytes >= several.file_bytes * EQUAL_SIZE:
        kind = "one-card"
        text = f"one of the {cards} cards serves one user as fast: {beside}"
        if not as_well:
            text = f"one {name} holds it too" + (f", at {share}: {beside}" if share else "")
    elif single.fits:
        kind = "one-card-smaller"
        text = f"one {name} with {single.candidate.quant} serves one user as fast: {beside}"
        if not as_well:
            text = f"one {name} holds no more than {single.candidate.quant}" + (f": {beside}" if share else "")
    else:
        kind = "one-card-offload"
        text = f"one {name} with layers in host memory serves one user as fast: {beside}"
        if not as_well:
            kept = next((reason for reason in single.candidate.reasons if "stay in host memory" in reason), "")
            text = f"with one {name}, {kept.partition(':')[0]}" + (f": {beside}" if share else "")
    yield Statement(kind=kind, machine=standing.name, as_well=as_well, text=text)


def _other_machine(standing: Standing, standings: Sequence[Standing]) -> Iterator[Statement]:
    """The machine that serves one user as well and takes least, where it takes less of something and more of
    nothing."""
    better = [other for other in standings if other is not standing and _takes_less(other, standing)]
    if not better:
        return
    least = min(better, key=lambda other: (other.price or 0, other.watts or 0, len(other.machine.gpus)))
    mine, theirs = standing.one, least.one
    assert mine.tokens_s
    assert theirs.tokens_s
    named = theirs.candidate.quant != mine.candidate.quant
    quants = (f" with {theirs.candidate.quant}", f" with {mine.candidate.quant}") if named else ("", "")
    how = "faster than" if theirs.tokens_s.likely * AS_FAST > mine.tokens_s.likely else "as fast as"
    counts = [len(each.machine.gpus) for each in (least, standing)]
    facts = [f"{counts[0]} card{'s' if counts[0] > 1 else ''} instead of {counts[1]}"] if counts[0] < counts[1] else []
    if least.watts and standing.watts and least.watts < standing.watts:
        facts.append(f"{least.watts:.0f} W instead of {standing.watts:.0f}")
    if least.price is not None and standing.price is not None and least.price < standing.price:
        facts.append(f"{least.price:g} instead of {standing.price:g}")
    text = (
        f"{least.name}{quants[0]} serves one user {how} {standing.name}{quants[1]} "
        f"({interval(theirs.tokens_s)} and {interval(mine.tokens_s)} tokens/s): {', '.join(facts)}"
    )
    yield Statement(kind="other-machine", machine=standing.name, as_well=True, text=text)


def _takes_less(other: Standing, standing: Standing) -> bool:
    fit = other.one.fits and standing.one.fits
    if not (fit and alike(other.one, standing.one) and _as_well(other.one, standing.one)):
        return False
    known = [
        (float(len(other.machine.gpus)), float(len(standing.machine.gpus))),
        (other.watts, standing.watts),
        (other.price, standing.price),
    ]
    pairs = [(theirs, mine) for theirs, mine in known if theirs is not None and mine is not None]
    return all(theirs <= mine for theirs, mine in pairs) and any(theirs < mine for theirs, mine in pairs)


def _money(standings: Sequence[Standing], users: int) -> Iterator[Statement]:
    """Which machine gives most tokens per second for its price; of several that fit and do the same."""
    for many in (False, True) if users > 1 else (False,):
        ways = [(each.many if many else each.one, each) for each in standings]
        rated = [
            (way, rate, each.name)
            for way, each in ways
            if way and way.fits and (rate := each.many_per_1000 if many else each.one_per_1000)
        ]
        known = [(rate, name) for _, rate, name in rated]
        if len(known) < 2 or not all(alike(rated[0][0], way) for way, *_ in rated):
            continue
        rate, name = max(known)
        whom = f"{users} users together" if many else "one user"
        text = f"most for the money, {whom}: {name}, {rate:.{0 if rate >= 99.5 else 1}f} tokens/s per 1000"
        yield Statement(kind="money", machine=name, as_well=None, text=text)


def _as_well(lesser: Choice, more: Choice) -> bool | None:
    """Whether one user is served as fast. Of what depends on the host's memory only the least counts."""
    if lesser.tokens_s is None or more.tokens_s is None:
        return None
    return (lesser.sure_tokens_s or 0) >= more.tokens_s.likely * AS_FAST


def _spoken(choice: Choice) -> str:
    """A choice's quantisation and speed: "Q4_K_M 34-40 tokens/s"."""
    speed = f" {interval(choice.tokens_s)} tokens/s" if choice.tokens_s else ""
    return f"{choice.candidate.quant or 'it'}{speed}"


def _card_name(standing: Standing, choice: Choice) -> str:
    used = {device.gpu for device in choice.candidate.devices if not device.idle}
    names = Counter(price_key(gpu) for gpu in standing.machine.gpus if gpu.index in used)
    return next(iter(names), "card").removeprefix("GeForce ").removeprefix("Radeon ")


def _default_limit(gpu: Gpu) -> float | None:
    card = card_for_name(gpu.name, gpu.total_bytes)
    return card.tdp_w if card else None
