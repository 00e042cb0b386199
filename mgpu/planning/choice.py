"""The choice among engines: which to prefer for these users and cards, and what runs when that one cannot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mgpu.machine.snapshot import Gpu, Machine
from mgpu.models.facts import ModelFacts
from mgpu.planning.candidates import Candidate
from mgpu.planning.plan import Fix, Plan
from mgpu.planning.wants import Goal
from mgpu.units import GIB

_LINE = 88  # what the screens have for it in 100 columns
# The verdicts from best to worst; the first two can run.
_RANKS = ("fits", "fits-with-offload", "unavailable", "does-not-fit", "illegal")

TITLES = {"llama.cpp": "llama.cpp", "vllm": "vLLM", "ollama": "Ollama"}
"""What engines call themselves, by the names of --backend."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """Engines, the best one first, and why that is so."""

    order: tuple[str, ...]
    why: str


def preference(goal: Goal, parallel: int, gpus: Sequence[Gpu], offers: Sequence[Offer]) -> Preference:
    """Return which of the engines to prefer for `parallel` users on `gpus` (none: the CPU).

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
    return Preference(order=order, why=why)


def choose(offers: Sequence[Offer], preferred: Preference, machine: Machine) -> Plan:
    """Return the plan made of all engines' offers: what can run comes first, by preference among equals.

    An engine that is not installed is not chosen where another one is; its ways that would fit are then "unavailable",
    and when nothing else fits, the command that installs it is a way out. `why` says in one line of at most 88
    characters how it came about. There must be at least one offer, and a candidate in each.
    """
    offers = sorted(offers, key=lambda offer: preferred.order.index(offer.backend))
    if not any(offer.install is None for offer in offers):
        offers = [replace(offer, install=None) for offer in offers]  # planned as if they were
    pairs = [(offer, candidate) for offer in offers for candidate in _available(offer)]
    # Of what cannot run, the installed come first: to say of an engine that is not there what it lacks helps nobody.
    pairs.sort(key=lambda pair: (_RANKS.index(pair[1].verdict), pair[0].install is not None))
    best = 0 if pairs[0][1].runs else None
    chosen = pairs[0][0]
    return Plan(
        model=chosen.facts,
        machine=machine,
        candidates=tuple(candidate for _, candidate in pairs),
        best=best,
        fixes=() if best is not None else tuple(_fixes(chosen, offers)),
        why=_why(chosen, offers, preferred) if best is not None else None,
    )


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
    if len(gpus) == 1:
        return _LLAMA_FIRST, "llama.cpp has the smallest files for one user on one card"
    if not _alike(gpus):
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
            prefix = "" if offer is chosen else f"--backend {offer.backend} "
            found += [replace(fix, change=f"{prefix}{fix.change}") for fix in offer.fixes]
        elif (way := next((each for each in offer.candidates if each.runs), None)) is not None:
            found.append(Fix(change=offer.install, candidate=way))
    yield from found
    if not found:
        for offer in offers:
            prefix = f"{offer.install}, then --backend {offer.backend} "
            yield from (replace(fix, change=f"{prefix}{fix.change}") for fix in offer.fixes)


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


def _alike(gpus: Sequence[Gpu]) -> bool:
    """Whether the cards are of one model and size."""
    kinds = {(gpu.name, round(gpu.total_bytes / GIB) if gpu.total_bytes else None) for gpu in gpus}
    return len(kinds) == 1
