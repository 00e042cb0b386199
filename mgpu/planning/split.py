"""Layers over unequal cards: who holds which, balanced by what each card can take.

A model of L layers has L + 1 units: its layers in order and, last, the output head. A split gives each card a
contiguous run of units; units before the first card's run stay in host memory.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence

_BALANCE_STEPS = 40  # halvings of the fill level; 2^-40 of a card is far below one byte


def balanced_split(unit_bytes: Sequence[int], capacity_bytes: Sequence[int]) -> tuple[int, ...]:
    """Return how many units each card takes so that the fullest card is as empty as possible.

    Cards are filled in order to the lowest common fraction of their capacity that holds all units; a card with no
    capacity gets none. The fraction may pass 1: then no split fits, and this one overflows least. Cards without any
    capacity at all leave everything to the largest.
    """
    prefix = [0, *itertools.accumulate(unit_bytes)]
    capacities = [max(capacity, 0) for capacity in capacity_bytes]
    if not any(capacities):
        capacities = [int(i == len(capacities) - 1) for i in range(len(capacities))]
    low, high = 0.0, prefix[-1] / min(c for c in capacities if c) + 1.0
    for _ in range(_BALANCE_STEPS):
        level = (low + high) / 2
        if _filled(prefix, capacities, level)[-1] == len(unit_bytes):
            high = level
        else:
            low = level
    ends = _filled(prefix, capacities, high)
    return tuple(end - start for start, end in zip((0, *ends), ends, strict=False))


def _filled(prefix: Sequence[int], capacities: Sequence[int], level: float) -> list[int]:
    """The unit each card ends before when every card is filled to `level` of its capacity."""
    ends, start = [], 0
    for capacity in capacities:
        start = max(start, bisect_right(prefix, prefix[start] + level * capacity) - 1)
        ends.append(start)
    return ends


def split_by_proportions(units: int, proportions: Sequence[float]) -> tuple[int, ...]:
    """Return how many of `units` each card takes for `--tensor-split` proportions, as llama.cpp deals them:
    unit i goes to the first card with i / units < its cumulated share (llama-model.cpp)."""
    total = sum(proportions)
    shares = [share / total for share in itertools.accumulate(proportions)]
    counts = [0] * len(shares)
    for unit in range(units):
        # The last share may round to just below 1; it takes what is left.
        counts[min(bisect_right(shares, unit / units), len(shares) - 1)] += 1
    return tuple(counts)
