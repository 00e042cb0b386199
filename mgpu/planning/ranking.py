"""Which of several ways to run a model comes first: the fastest for whom it serves, as far as that is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from mgpu.planning.candidates import Candidate
from mgpu.planning.speed import Range

# Closer ones are not told apart by those who measure them either; of many users' rates the predictions are less certain
# (16 % in the median), and depend on what they ask.
AS_FAST = 0.95
"""What reaches this share of the other's rate is as fast."""
_AS_FAST_FOR_MANY = 0.75
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
    the simpler one. What rests on thinner evidence than another way, for all its reasons and more (those that its
    split adds), is better only if its low end is above what is likely of that one.
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
    return a is not None and b is not None and a.low <= b.high and b.low <= a.high


def _first(ways: Sequence[Way], *, for_many: bool) -> Way:
    rates = {id(way): found for way in ways if (found := rate(way.candidate, for_many=for_many))}

    def likely(way: Way) -> float:
        return rates[id(way)].likely

    def surer(way: Way) -> float:
        """What is likely of the best way that lacks some of this one's reasons to doubt it, and has no others."""
        reasons = set(way.candidate.speed.thin)
        return max((likely(other) for other in ways if set(other.candidate.speed.thin) < reasons), default=0.0)

    eligible = [way for way in ways if rates[id(way)].low >= surer(way)]
    best_of_engine: dict[bool, float] = {}
    for way in eligible:
        best_of_engine[_is_vllm(way)] = max(likely(way), best_of_engine.get(_is_vllm(way), 0.0))
    top = rates[id(max(eligible, key=likely))]
    as_fast = _AS_FAST_FOR_MANY if for_many else AS_FAST
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
