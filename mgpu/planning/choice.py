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
    engines = [offer.backend for offer in offers]
    if "vllm" not in engines:
        order, why = _LLAMA_FIRST, "llama.cpp runs a GGUF file exactly as planned; Ollama decides the split by itself"
    elif not gpus:
        order, why = _LLAMA_FIRST, "llama.cpp is made for machines without a card, too"
    elif goal is Goal.throughput:
        users = "many users" if parallel == 1 else f"{parallel} users"
        order, why = _VLLM_FIRST, f"vLLM serves {users} fastest (batching)"
    elif len(gpus) == 1:
        order, why = _LLAMA_FIRST, "llama.cpp starts soonest and has the smallest files, for one user on one card"
    elif not _alike(gpus):
        order, why = _LLAMA_FIRST, "llama.cpp deals layers to unequal cards by their memory"
    elif (cards := _read_at_once(offers)) > 1:
        order, why = _VLLM_FIRST, f"vLLM reads {cards} equal cards at once"
    else:
        order, why = _LLAMA_FIRST, f"vLLM could not read these {len(gpus)} cards at once, so that llama.cpp is as fast"
    on_disk = {offer.backend for offer in offers if offer.on_disk}
    order = tuple(engine for engine in order if engine in engines)
    there = tuple(engine for engine in order if engine in on_disk)
    if there and order[0] not in there:
        why += f"; the model is on disk for {' and '.join(TITLES[engine] for engine in there)} only"
        order = (*there, *(engine for engine in order if engine not in there))
    return Preference(order=order, why=why)


def choose(offers: Sequence[Offer], preferred: Preference, machine: Machine) -> Plan:
    """Return the plan made of all engines' offers: what can run comes first, by preference among equals.

    An engine that is not installed is not chosen where another one is; its ways that would fit are then "unavailable",
    and when nothing else fits, the command that installs it is a way out. `why` says in one line how it came about.
    There must be at least one offer, and a candidate in each.
    """
    offers = sorted(offers, key=lambda offer: preferred.order.index(offer.backend))
    if any(offer.install is None for offer in offers):
        offers = [_not_installed(offer) if offer.install else offer for offer in offers]
    pairs = [(offer, candidate) for offer in offers for candidate in offer.candidates]
    pairs.sort(key=lambda pair: _RANKS.index(pair[1].verdict))
    best = 0 if _runs(pairs[0][1]) else None
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


def _runs(candidate: Candidate) -> bool:
    return candidate.verdict == "fits" or (candidate.verdict == "fits-with-offload" and candidate.wants.offload)


def _not_installed(offer: Offer) -> Offer:
    note = f"not installed: {offer.install}"
    return replace(
        offer,
        candidates=tuple(
            replace(each, verdict="unavailable", reasons=(note, *each.reasons)) if _runs(each) else each
            for each in offer.candidates
        ),
    )


def _fixes(chosen: Offer, offers: Sequence[Offer]) -> Iterator[Fix]:
    """Ways out of all engines; those of others than the chosen one name theirs."""
    for offer in sorted(offers, key=lambda offer: offer is not chosen):
        for fix in offer.fixes:
            yield fix if offer is chosen else replace(fix, change=f"--backend {offer.backend} {fix.change}")
        if offer.install and (possible := [each for each in offer.candidates if each.verdict == "unavailable"]):
            yield Fix(change=offer.install, candidate=replace(possible[0], verdict="fits"))


def _why(chosen: Offer, offers: Sequence[Offer], preferred: Preference) -> str:
    """The choice in one line: what is preferred and why, and what kept those before the chosen one from being it."""
    kept = []
    for offer in offers:
        if offer is chosen:
            break
        verdicts = {candidate.verdict for candidate in offer.candidates}
        title = "" if offer.backend == preferred.order[0] else f"{TITLES[offer.backend]} "
        if "unavailable" in verdicts and offer.install:
            kept.append(f"; {title}not installed: {offer.install}")
        elif "does-not-fit" in verdicts:
            kept.append(f"; {title}does not fit")
        else:
            kept.append(f"; {title}cannot run it here")
    return preferred.why + "".join(kept)


def _read_at_once(offers: Sequence[Offer]) -> int:
    """Over how many cards vLLM would cut each layer."""
    possible = (each for offer in offers if offer.backend == "vllm" for each in offer.candidates if _runs(each))
    return next((each.tensor_parallel for each in possible), 1)


def _alike(gpus: Sequence[Gpu]) -> bool:
    """Whether the cards are of one model and size."""
    kinds = {(gpu.name, round(gpu.total_bytes / GIB) if gpu.total_bytes else None) for gpu in gpus}
    return len(kinds) == 1
