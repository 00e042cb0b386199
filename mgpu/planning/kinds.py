"""Cards of one kind, and which of unlike cards are worth using without the others."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from mgpu.machine.snapshot import Gpu
from mgpu.planning.links import is_slow
from mgpu.units import GIB

# Each set is planned, which takes milliseconds.
_MOST_SETS = 2


def kinds(gpus: Sequence[Gpu]) -> tuple[tuple[Gpu, ...], ...]:
    """Return the cards in groups of one model and size, the groups in the order of their first cards."""
    return _grouped(gpus, [_model_and_size(gpu) for gpu in gpus])


def alike(gpus: Sequence[Gpu]) -> bool:
    """Return whether the cards are of one model and size."""
    return len(kinds(gpus)) == 1


def largest_kind(gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Return the largest group of cards of one model and size, the first of several."""
    return max(kinds(gpus), key=len)


def without_slow(gpus: Sequence[Gpu], *, least_bytes: int) -> tuple[tuple[Gpu, ...], ...]:
    """Return the fewest of the fastest kinds of `gpus` that have `least_bytes` free, and a kind more: what works in
    turn is faster without slow cards. Cards behind slow links or mostly taken by others are slow.

    Two cards at least and not all; empty where there are no such.
    """
    fastest: tuple[Gpu, ...] = ()
    found = []
    for group in _fastest_first(gpus):
        fastest += group
        found.append(tuple(gpu for gpu in gpus if gpu in fastest))
    return tuple(some for some in found if _is_part(some, gpus, least_bytes))[:_MOST_SETS]


def groups_alike(gpus: Sequence[Gpu], *, least_bytes: int) -> tuple[tuple[Gpu, ...], ...]:
    """Return the groups of `gpus` of one kind that have `least_bytes` free, the fastest two: what works at the same
    time waits for the slowest. Two cards at least and not all; empty where there are no such."""
    return tuple(some for some in _fastest_first(gpus) if _is_part(some, gpus, least_bytes))[:_MOST_SETS]


def _is_part(some: Sequence[Gpu], gpus: Sequence[Gpu], least_bytes: int) -> bool:
    return 1 < len(some) < len(gpus) and sum(gpu.free_bytes or 0 for gpu in some) >= least_bytes


def _fastest_first(gpus: Sequence[Gpu]) -> list[tuple[Gpu, ...]]:
    traits = [(_model_and_size(gpu), is_slow(gpu), _is_mostly_taken(gpu)) for gpu in gpus]
    return sorted(_grouped(gpus, traits), key=_slowness)


def _slowness(group: tuple[Gpu, ...]) -> tuple[bool, bool, float]:
    first = group[0]
    return is_slow(first), _is_mostly_taken(first), -(first.bandwidth_gb_s or 0)


def _grouped(gpus: Sequence[Gpu], traits: Sequence[Hashable]) -> tuple[tuple[Gpu, ...], ...]:
    groups: dict[Hashable, list[Gpu]] = {}
    for gpu, trait in zip(gpus, traits, strict=True):
        groups.setdefault(trait, []).append(gpu)
    return tuple(map(tuple, groups.values()))


def _model_and_size(gpu: Gpu) -> Hashable:
    return gpu.name, round(gpu.total_bytes / GIB) if gpu.total_bytes else None


def _is_mostly_taken(gpu: Gpu) -> bool:
    return (gpu.free_bytes or 0) * 2 < (gpu.total_bytes or 0)
