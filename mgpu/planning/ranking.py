"""Which of several ways to run a model comes first: the fastest for whom it serves, as far as that is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from mgpu.planning.candidates import Candidate
from mgpu.planning.speed import Range

# Closer ones are not told apart by those who measure them either; of many users' rates the predictions are less certain
# (16 % in the median), and depend on what they ask.
_AS_FAST, _AS_FAST_FOR_MANY = 0.95, 0.75
# The simplest first: llama.cpp does exactly what is planned and starts soonest, Ollama runs it too, vLLM is
# gigabytes of packages, and llama.cpp calls its tensor split experimental.
_SIMPLEST = (("llama.cpp", False), ("ollama", False), ("vllm", True), ("llama.cpp", True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A way to run the model. `on_disk` says that nothing needs to be fetched for it."""

    candidate: Candidate
    on_disk: bool = False


Way = TypeVar("Way", bound=Contestant)


def rate(candidate: Candidate, *, for_many: bool) -> Range | None:
    """Return the rate that counts: that of all users together, where it is `for_many` and predicted, else one
    user's."""
    speed = candidate.speed
    return (speed.aggregate_tok_s if for_many else None) or speed.decode_tok_s


def in_order(ways: Sequence[Way], *, for_many: bool) -> list[Way]:
    """Return the ways, best first, where their speeds are known; the others follow as they came.

    Of one engine the faster one is better, unless they are within 5 % (a quarter for many users): then the simpler one,
    and the one that came first. Of two engines
    the faster one is better where the intervals do not overlap; where they do, the one whose model is on disk, then
    the simpler one. What rests on thin evidence is better only if its low end is above what is likely of the others.
    """
    left = [way for way in ways if rate(way.candidate, for_many=for_many)]
    unknown = [way for way in ways if not rate(way.candidate, for_many=for_many)]
    ordered = []
    while left:
        first = _first(left, for_many=for_many)
        left.remove(first)
        ordered.append(first)
    return ordered + unknown


def overlap(one: Candidate, other: Candidate, *, for_many: bool) -> bool:
    """Return whether the two intervals have a rate in common; False where one is unknown."""
    a, b = rate(one, for_many=for_many), rate(other, for_many=for_many)
    return bool(a and b) and a.low <= b.high and b.low <= a.high  # type: ignore[union-attr]


def _first(ways: Sequence[Way], *, for_many: bool) -> Way:
    rates = {id(way): found for way in ways if (found := rate(way.candidate, for_many=for_many))}

    def likely(way: Way) -> float:
        return rates[id(way)].likely

    solid = [way for way in ways if not way.candidate.speed.thin]
    sure = max(map(likely, solid), default=0.0)
    eligible = solid + [way for way in ways if way.candidate.speed.thin and rates[id(way)].low > sure] or [*ways]
    best_of_engine: dict[bool, float] = {}
    for way in eligible:
        best_of_engine[_is_vllm(way)] = max(likely(way), best_of_engine.get(_is_vllm(way), 0.0))
    top = rates[id(max(eligible, key=likely))]
    as_fast = _AS_FAST_FOR_MANY if for_many else _AS_FAST
    close = [
        way
        for way in eligible
        if rates[id(way)].high >= top.low and likely(way) >= as_fast * best_of_engine[_is_vllm(way)]
    ]
    return min(close, key=lambda way: (not way.on_disk, _simplicity(way.candidate)))


def _is_vllm(way: Contestant) -> bool:
    """Which engine computes: Ollama runs llama.cpp."""
    return way.candidate.backend == "vllm"


def _simplicity(candidate: Candidate) -> int:
    cut = candidate.split_mode == "tensor" or candidate.backend == "vllm"
    return _SIMPLEST.index((candidate.backend, cut))
