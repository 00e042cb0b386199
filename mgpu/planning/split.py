"""Layers over unequal cards: who holds which, balanced by what each card can take.

A model of L layers has L + 1 units: its layers in order and, last, the output head. A split gives each card a
contiguous run of units; units before the first card's run stay in host memory.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

_BALANCE_STEPS = 48  # halvings of the fill level; 2^-48 of a whole model is far below one byte


def balanced_split(unit_bytes: Sequence[int], capacity_bytes: Sequence[int]) -> tuple[int, ...]:
    """Return how many units each card takes so that the fullest card is as empty as possible.

    No card is filled above the lowest common fraction of capacity at which the cards hold all units; within that, each
    takes its share, so that none is left idle where it need not be. A card with no capacity gets none. The fraction may
    pass 1: then no split fits, and this one overflows least. Where no card has any capacity, everything goes to the one
    that lacks least.
    """
    prefix = [0, *itertools.accumulate(unit_bytes)]
    capacities = [max(capacity, 0) for capacity in capacity_bytes]
    if not any(capacities):
        largest = capacity_bytes.index(max(capacity_bytes))
        capacities = [int(i == largest) for i in range(len(capacities))]
    sizes = _lowest_sizes(prefix, capacities)
    # What the cards after each one can hold has to begin no later than this.
    backwards = [prefix[-1] - edge for edge in reversed(prefix)]
    earliest = [len(unit_bytes) - end for end in reversed([0, *_filled(backwards, sizes[:0:-1])])]

    ends, start = [], 0
    for size, least, share in zip(sizes, earliest, itertools.accumulate(capacities), strict=True):
        fair = bisect_left(prefix, -(-prefix[-1] * share // sum(capacities)))
        start = min(max(fair, least, start), _full(prefix, start, size))
        ends.append(start)
    return tuple(end - start for start, end in zip((0, *ends), ends, strict=False))


def _lowest_sizes(prefix: Sequence[int], capacities: Sequence[int]) -> list[int]:
    """The lowest common fraction of every card's capacity that holds all units, in bytes of each card."""
    low, high = 0.0, prefix[-1] / max(capacities) + 1.0  # there, the largest card alone holds everything
    for _ in range(_BALANCE_STEPS):
        level = (low + high) / 2
        if _filled(prefix, [int(level * capacity) for capacity in capacities])[-1] == len(prefix) - 1:
            high = level
        else:
            low = level
    return [int(high * capacity) for capacity in capacities]


def _filled(prefix: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """The unit each card ends before when every card is filled up to its size."""
    ends, start = [], 0
    for size in sizes:
        start = _full(prefix, start, size)
        ends.append(start)
    return ends


def _full(prefix: Sequence[int], start: int, size: int) -> int:
    """The unit before which a card of `size` bytes is full when it begins with unit `start`."""
    return bisect_right(prefix, prefix[start] + size) - 1


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
