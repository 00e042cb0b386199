"""The choice among engines: what runs is what is predicted to be fastest for these users, and fits.

Where no speed is known, a rule of thumb by users and cards takes its place (`preference`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mgpu.machine.snapshot import Gpu, Machine
from mgpu.models.facts import ModelFacts
from mgpu.planning.candidates import TITLES, Candidate
from mgpu.planning.kinds import alike
from mgpu.planning.plan import Fix, Plan, mildest_first
from mgpu.planning.ranking import Contestant, in_order, overlap, rate
from mgpu.planning.speed import Range, interval
from mgpu.planning.wants import Goal, asked_ctx_tokens

__all__ = ["TITLES", "Offer", "Preference", "choose", "preference"]

_LINE = 88  # what the screens have for it in 100 columns
# The verdicts from best to worst; the first two can run.
_RANKS = ("fits", "fits-with-offload", "unavailable", "does-not-fit", "illegal")


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What one engine can make of a model: the ways it can run it, the one asked for first, in the form whose `facts`
    these are. `install` is the command that installs the engine, None where it is installed; `on_disk` says that
    nothing needs to be fetched."""

    backend: str
    facts: ModelFacts
    candidates: tuple[Candidate, ...]
    fixes: tuple[Fix, ...] = ()
    install: str | None = None
    on_disk: bool = True

    def elsewhere(self) -> Offer:
        """Return the offer for another machine than this one: what is installed and on disk here says nothing of it."""
        return replace(self, install=None, on_disk=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """What the user prefers, and engines, the best one first where no speed is known, and why that is so.

    `for_many` says that the tokens of all users together count, `all_cards` that the user named or counted the cards:
    ways that use fewer come after."""

    order: tuple[str, ...]
    why: str
    for_many: bool = False
    all_cards: bool = False


def preference(
    goal: Goal, parallel: int, gpus: Sequence[Gpu], offers: Sequence[Offer], *, all_cards: bool = False
) -> Preference:
    """Return which of the engines to prefer for `parallel` users on `gpus` (none: the CPU) where no speed is known.

    vLLM's tensor parallelism reads all cards at the same time, where a layer split reads them in turn, but needs
    equal cards and a model that can be cut so; its batching serves many users best on any. Elsewhere llama.cpp has
    the smallest files and starts soonest, and fits unequal cards. Engines whose form of the model is on disk go first
    where others would have to fetch gigabytes.
    """
    order, why = _by_users_and_cards(goal, parallel, gpus, offers)
    engines = {offer.backend: offer for offer in offers}
    if order[0] not in engines:
        why = f"{TITLES[order[0]]} would be first, but cannot be used here"
    order = tuple(engine for engine in order if engine in engines)
    there = tuple(engine for engine in order if engines[engine].on_disk)
    if there and order[0] not in there:
        on_disk = f"the model is on disk for {' and '.join(TITLES[engine] for engine in there)} only"
        both = f"{why}; {on_disk}"
        why = both if len(both) <= _LINE else on_disk
        order = (*there, *(engine for engine in order if engine not in there))
    for_many = goal is Goal.throughput and parallel > 1
    return Preference(order=order, why=why, for_many=for_many, all_cards=all_cards)


def choose(offers: Sequence[Offer], preferred: Preference, machine: Machine) -> Plan:
    """Return the plan made of all engines' offers: what can run comes first, what fits the cards before what needs host
    memory, and the context asked for before a lower one; of those the fastest (`ranking`).

    An engine that is not installed is not chosen where another one is; its ways that would fit are then "unavailable",
    and when nothing else fits, the command that installs it is a way out. `why` says in one line of at most 88
    characters how it came about. There must be at least one offer, and a candidate in each.
    """
    offers = sorted(offers, key=lambda offer: preferred.order.index(offer.backend))
    if not any(offer.install is None for offer in offers):
        offers = [replace(offer, install=None) for offer in offers]  # planned as if they were
    ways = [
        _Way(candidate=candidate, on_disk=offer.on_disk, offer=offer)
        for offer in offers
        for candidate in _available(offer)
    ]
    ways = _ranked(ways, preferred)
    best = 0 if ways[0].candidate.runs else None
    chosen = ways[0].offer
    return Plan(
        model=chosen.facts,
        machine=machine,
        candidates=tuple(way.candidate for way in ways),
        best=best,
        fixes=() if best is not None else _mildest(chosen, offers),
        why=(_by_speed(ways, preferred) or _why(chosen, offers, preferred)) if best is not None else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way(Contestant):
    """A candidate with the offer it is from."""

    offer: Offer


def _ranked(ways: Sequence[_Way], preferred: Preference) -> list[_Way]:
    most = max(len(way.candidate.devices) for way in ways)

    def tier(way: _Way) -> tuple[int, bool, bool, int]:
        candidate = way.candidate
        # Of what cannot run, the installed come first: what an engine lacks that is not there helps nobody.
        missing = way.offer.install is not None
        fewer = preferred.all_cards and len(candidate.devices) < most
        return _RANKS.index(candidate.verdict), missing, fewer, -candidate.ctx_tokens

    tiers = itertools.groupby(sorted(ways, key=tier), key=tier)
    return [way for _, some in tiers for way in in_order(list(some), for_many=preferred.for_many)]


_LLAMA_FIRST: tuple[str, ...] = ("llama.cpp", "ollama", "vllm")
_VLLM_FIRST: tuple[str, ...] = ("vllm", "llama.cpp", "ollama")


def _by_users_and_cards(
    goal: Goal, parallel: int, gpus: Sequence[Gpu], offers: Sequence[Offer]
) -> tuple[tuple[str, ...], str]:
    """All engines in their order, and why."""
    ways = [each for offer in offers if offer.backend == "vllm" for each in offer.candidates]
    if not ways:
        return _LLAMA_FIRST, "llama.cpp runs a GGUF file exactly as planned; Ollama decides the split by itself"
    if not gpus:
        return _LLAMA_FIRST, "llama.cpp is made for machines without a card, too"
    if goal is Goal.throughput:
        return _VLLM_FIRST, f"vLLM serves {'many' if parallel == 1 else parallel} users fastest (batching)"
    split_mode = ways[0].wants.split_mode
    if len(gpus) == 1 or split_mode == "none":
        return _LLAMA_FIRST, "llama.cpp has the smallest files for one user on one card"
    if not alike(gpus):
        if split_mode == "tensor":
            return _LLAMA_FIRST, "llama.cpp cuts each layer over unequal cards, too"
        return _LLAMA_FIRST, "llama.cpp deals layers to unequal cards by their memory"
    if (cards := _read_at_once(ways)) > 1:
        among = f"{cards} of {len(gpus)}" if cards < len(gpus) else f"{cards}"
        return _VLLM_FIRST, f"vLLM reads {among} equal cards at once"
    if any(each.tensor_parallel > 1 and each.verdict == "does-not-fit" for each in ways):
        return _LLAMA_FIRST, "vLLM would read these cards at once, but does not fit on them"
    return _LLAMA_FIRST, f"vLLM cannot read these {len(gpus)} cards at once: llama.cpp is as fast"


def _read_at_once(ways: Sequence[Candidate]) -> int:
    """How many cards the first of vLLM's ways that can run reads at the same time; it is the one that would run."""
    return next((each.tensor_parallel for each in ways if each.runs), 1)


def _available(offer: Offer) -> tuple[Candidate, ...]:
    """The offer's ways; of an engine that is not installed, none that could run."""
    if offer.install is None:
        return offer.candidates
    note = f"not installed: {offer.install}"
    return tuple(
        replace(each, verdict="unavailable", reasons=(note, *each.reasons)) if each.runs else each
        for each in offer.candidates
    )


def _fixes(chosen: Offer, offers: Sequence[Offer]) -> Iterator[Fix]:
    """Ways out of all engines; those of others than the chosen one name theirs. Nobody installs an engine and changes
    an option, too, where less would do."""
    found: list[Fix] = []
    for offer in sorted(offers, key=lambda offer: offer is not chosen):
        if offer.install is None:
            found += [fix if offer is chosen else _of(offer.backend, fix) for fix in offer.fixes]
        elif (way := next((each for each in offer.candidates if each.runs), None)) is not None:
            found.append(Fix(change=offer.install, candidate=way))
    yield from found
    if not found:
        for offer in offers:
            prefix = f"{offer.install}, then --backend {offer.backend} "
            yield from (replace(fix, change=f"{prefix}{fix.change}") for fix in offer.fixes)


def _mildest(chosen: Offer, offers: Sequence[Offer]) -> tuple[Fix, ...]:
    return mildest_first(_fixes(chosen, offers), asked_ctx_tokens(chosen.candidates[0].wants, chosen.facts))


def _of(backend: str, fix: Fix) -> Fix:
    """A way out of another engine than the chosen one, with its name."""
    is_option = fix.change.startswith(("--", "without --"))
    change = f"--backend {backend} {fix.change}" if is_option else f"{fix.change} ({TITLES[backend]})"
    return replace(fix, change=change)


def _by_speed(ways: Sequence[_Way], preferred: Preference) -> str | None:
    """Why the first way is chosen, with the numbers; None where speed did not decide."""
    chosen, *others = ways
    many = preferred.for_many
    own = rate(chosen.candidate, for_many=many)
    # Ollama runs llama.cpp: that it is as fast says nothing.
    twin = {"ollama"} if chosen.candidate.backend == "llama.cpp" else {"llama.cpp"} if _is_ollama(chosen) else set()
    known = [
        (way, found)
        for way in others
        if way.candidate.backend not in twin
        and (way.candidate.runs or way.candidate.verdict == "unavailable")
        and (found := rate(way.candidate, for_many=many))
    ]
    if own is None or not known:
        return None
    users = f"{chosen.candidate.parallel} users: " if many else ""
    better = _better_if_installed(
        chosen, [way for way, _ in known if way.candidate.verdict == "unavailable"], preferred
    )
    if better:
        there = rate(better.candidate, for_many=many)
        assert there
        would = f"{users}{interval(there)} tokens/s with {TITLES[better.candidate.backend]}, not {interval(own)}"
        command = (better.offer.install or "").removeprefix("install it from ")
        return _first_short(f"{would}; not installed: {command}", f"{would}; not installed", would)
    rivals = [(way, found) for way, found in known if way.candidate.runs]
    if not rivals:
        missing, there = max(known, key=lambda pair: pair[1].likely)
        would = f"{interval(there)} with {TITLES[missing.candidate.backend]}"
        both = f"{users}{interval(own)} tokens/s with {_named(chosen, ways)}, {would}"
        return _first_short(
            f"{both}, which is not installed", f"{users}{interval(own)} tokens/s; not installed: {would}"
        )
    rival, theirs = max(
        rivals, key=lambda pair: (pair[0].candidate.backend != chosen.candidate.backend, pair[1].likely)
    )
    against = _named(rival, ways, beside=chosen)
    both = f"{users}{interval(own)} tokens/s with {_named(chosen, ways)}, {interval(theirs)} with {against}"
    rest, alone = _reason(chosen, rival, own, theirs, preferred)
    return _first_short(f"{both}{rest}", alone or both, f"{interval(own)} tokens/s against {interval(theirs)}")


def _reason(chosen: _Way, rival: _Way, own: Range, theirs: Range, preferred: Preference) -> tuple[str, str]:
    """What made the difference besides the numbers, as their end and as a line of its own; "" where they say it."""
    one, other, title = chosen.candidate, rival.candidate, TITLES[rival.candidate.backend]
    apart = one.backend == other.backend or not overlap(one, other, for_many=preferred.for_many)
    if own.likely > theirs.likely and apart:
        return "", ""
    if other.verdict != one.verdict:
        return ", which needs host memory", f"{title} needs host memory"
    if other.ctx_tokens < one.ctx_tokens:
        room = f"room for {other.ctx_tokens} tokens{' each' if other.parallel > 1 else ''}"
        alone = f"{title} ({interval(theirs)} tokens/s) has {room}, not {one.ctx_tokens}"
        return f", which has {room} only", alone
    if preferred.all_cards and len(other.devices) < len(one.devices):
        return ", which leaves cards unused", f"{title} would leave cards unused"
    if other.speed.thin and not one.speed.thin:
        mine, against = _apart(chosen, rival)
        alone = f"{interval(own)} tokens/s with {mine}; {against}'s {interval(theirs)} rest on thin evidence"
        return " on thin evidence", alone
    if one.backend != other.backend:
        if chosen.on_disk and not rival.on_disk:
            on_disk = f"the model is on disk for {TITLES[one.backend]} only"
            return f"; {on_disk}", f"as fast as {title}, and {on_disk}"
        if own.likely < theirs.likely:
            simpler = f"{TITLES[one.backend]} is simpler"
            return f"; {simpler}", f"{interval(own)} tokens/s, {interval(theirs)} with {title}; {simpler}"
    return "", ""


def _better_if_installed(chosen: _Way, missing: Sequence[_Way], preferred: Preference) -> _Way | None:
    """What would be chosen instead, were it installed, and clearly so."""
    if chosen.candidate.verdict != "fits":
        return missing[0] if missing else None
    same = [way for way in missing if way.candidate.ctx_tokens >= chosen.candidate.ctx_tokens]
    first = in_order([chosen, *same], for_many=preferred.for_many)[0]
    return (
        first
        if first is not chosen and not overlap(first.candidate, chosen.candidate, for_many=preferred.for_many)
        else None
    )


def _named(way: _Way, ways: Sequence[_Way], *, beside: _Way | None = None) -> str:
    """The engine, and its split where it has several ways; "its" beside another of the same engine."""
    candidate = way.candidate
    title = TITLES[candidate.backend]
    its = "its" if beside and beside.candidate.backend == candidate.backend else f"{title}'s"
    if sum(each.candidate.backend == candidate.backend for each in ways) == 1:
        return title
    if candidate.replicas > 1:
        return f"{candidate.replicas} replicas"
    if len(candidate.devices) == 1:
        return "one card" if its == "its" else f"{title} on one card"
    if candidate.tensor_parallel > 1:
        return f"{its} tensor parallel {candidate.tensor_parallel}"
    return f"{its} pipeline" if candidate.backend == "vllm" else f"{its} {candidate.split_mode} split"


def _apart(one: _Way, other: _Way) -> tuple[str, str]:
    """What tells the two apart: their engines, or of one engine the splits."""
    backends = {one.candidate.backend, other.candidate.backend}
    if len(backends) == 2 or "none" in (one.candidate.split_mode, other.candidate.split_mode):
        return TITLES[one.candidate.backend], TITLES[other.candidate.backend]
    names = [_named(way, (one, other)).removeprefix(f"{TITLES[way.candidate.backend]}'s ") for way in (one, other)]
    return f"the {names[0]}", f"the {names[1]}"


def _first_short(*lines: str) -> str:
    return next((line for line in lines if len(line) <= _LINE), lines[-1][:_LINE])


def _is_ollama(way: _Way) -> bool:
    return way.candidate.backend == "ollama"


def _why(chosen: Offer, offers: Sequence[Offer], preferred: Preference) -> str:
    """The choice in one line: what is preferred and why, and what kept those before the chosen one from being it.

    Where that is too long, what was preferred is left out before the command that installs the first of them is.
    """
    before = offers[: offers.index(chosen)]
    if not before:
        return preferred.why
    first, others = before[0], before[1:]
    is_subject = preferred.why.startswith(TITLES[first.backend]) and ";" not in preferred.why
    beginning = (preferred.why, _kept(first, titled=not is_subject, command=True))
    names = [_kept(offer) for offer in others]
    lines = (
        (*beginning, *(_kept(offer, command=True) for offer in others)),
        (*beginning, *names),
        (_kept(first, command=True), *names),
        (_kept(first), *names),
    )
    joined = ["; ".join(line) for line in lines]
    return next((line for line in joined if len(line) <= _LINE), joined[-1])


def _kept(offer: Offer, *, titled: bool = True, command: bool = False) -> str:
    """What kept an engine from being chosen."""
    verdicts = {candidate.verdict for candidate in offer.candidates}
    title = f"{TITLES[offer.backend]} " if titled else ""
    if offer.install and any(each.runs for each in offer.candidates):
        how = f": {offer.install.removeprefix('install it from ')}" if command else ""
        return f"{title}{'is ' if titled else ''}not installed{how}"
    if "fits-with-offload" in verdicts:
        return f"{title}needs host memory"
    return f"{title}{'does not fit' if 'does-not-fit' in verdicts else 'cannot run it here'}"
