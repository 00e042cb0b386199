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


def split_behind_first(
    unit_bytes: Sequence[int], room_bytes: Sequence[int], *, first_bytes: int, other_bytes: int, head_bytes: int
) -> tuple[int, ...]:
    """Return a `balanced_split` over cards of which the first one that holds anything computes in `first_bytes`, each
    one after it in `other_bytes`, and one with the head alone in `head_bytes`.

    The first one is the foremost card behind which everything has room; those before it stay idle. Where no card is,
    the head goes to the last card that can hold it alone if the rest then has room before that, and else the first one
    is that behind which most has room.
    """
    capacities, held = _behind_first(unit_bytes, room_bytes, first_bytes, other_bytes)
    layers = unit_bytes[:-1]
    if held < len(unit_bytes):
        for last in reversed(range(len(room_bytes))):
            if room_bytes[last] - head_bytes >= unit_bytes[-1]:
                front, held = _behind_first(layers, room_bytes[:last], first_bytes, other_bytes)
                if held == len(layers):
                    counts = _balanced_behind_first(layers, front) if layers else (0,) * last
                    return (*counts, 1, *(0,) * (len(room_bytes) - last - 1))
    return _balanced_behind_first(unit_bytes, capacities)


def _balanced_behind_first(unit_bytes: Sequence[int], capacity_bytes: Sequence[int]) -> tuple[int, ...]:
    """A balanced split in which the first card with room for a unit takes one: the others count on not being first."""
    counts = balanced_split(unit_bytes, capacity_bytes)
    first = next((i for i, capacity in enumerate(capacity_bytes) if capacity >= unit_bytes[0]), None)
    if first is None or counts[first]:
        return counts
    left = [capacity - (unit_bytes[0] if i == first else 0) for i, capacity in enumerate(capacity_bytes)]
    rest = balanced_split(unit_bytes[1:], left)
    return tuple(count + (i == first) for i, count in enumerate(rest))


def _behind_first(
    unit_bytes: Sequence[int], room_bytes: Sequence[int], first_bytes: int, other_bytes: int
) -> tuple[list[int], int]:
    """What each card can take behind the best first one, and how many units that holds."""
    prefix = [0, *itertools.accumulate(unit_bytes)]
    best, most = [], -1
    for first in range(len(room_bytes)):
        # Nothing may lie before the first card: those lack more than any other.
        lacking = min(0, *room_bytes) - first_bytes - other_bytes - 1
        rest = (room - other_bytes for room in room_bytes[first + 1 :])
        capacities = [*[lacking] * first, room_bytes[first] - first_bytes, *rest]
        held = _filled(prefix, [max(capacity, 0) for capacity in capacities])[-1]
        if capacities[first] < next(iter(unit_bytes), 0):
            held = 0  # it would hold nothing, and another one be first
        if held > most:
            best, most = capacities, held
        if held == len(unit_bytes):
            break
    return best, max(most, 0)


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
