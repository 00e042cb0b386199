"""Pairs of published rows that differ only in split or engine: what the planner has to choose between."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tests.planning.measured_rows import MeasuredRow, measured_rows

# Closer ones are not told apart by the people who measured them either.
_APART = 0.05
# What "?x" rows may have been: a pair counts as right only if it is for both.
_UNSTATED_CARDS = (2, 4)

Rate = Callable[[MeasuredRow], float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two rows of the same cards, model, quantisation and depth band; `right` says that the faster one is predicted
    to be faster. A row whose speed is not predicted makes the pair wrong."""

    faster: MeasuredRow
    slower: MeasuredRow
    predicted: tuple[float | None, float | None]

    @property
    def right(self) -> bool:
        first, second = self.predicted
        return first is not None and second is not None and first > second


def judged_pairs(rate: Rate) -> list[Pair]:
    """All pairs more than 5 % apart, judged by the speeds that `rate` predicts; of pairs with an unstated number of
    cards the worse judgement."""
    found: dict[tuple[str, str], Pair] = {}
    for cards in _UNSTATED_CARDS:
        for pair in _pairs(rate, cards):
            key = (pair.faster.id, pair.slower.id)
            if key not in found or not pair.right:
                found[key] = pair
    return list(found.values())


def pairs_of(known: Callable[[MeasuredRow], bool]) -> list[tuple[MeasuredRow, MeasuredRow]]:
    """Return (faster, slower) of all pairs more than 5 % apart of rows that are `known`, each once for each number of
    cards that a row may have been measured on."""
    pairs = (pair for cards in _UNSTATED_CARDS for pair in _pairs(lambda _: None, cards))
    found = {(p.faster.id, p.slower.id, p.faster.work, p.slower.work): (p.faster, p.slower) for p in pairs}
    return [(faster, slower) for faster, slower in found.values() if known(faster) and known(slower)]


def choices() -> list[list[list[MeasuredRow]]]:
    """Return what there was to choose from, again and again: the rows of each way, which differ in split or engine."""
    found = {}
    for cards in _UNSTATED_CARDS:
        for rows in _groups(cards):
            ways: dict[tuple[str, str], list[MeasuredRow]] = {}
            for row in rows:
                ways.setdefault((row.engine, row.split), []).append(row)
            if len(ways) > 1:
                found[rows[0].work, rows[0].depth_band] = list(ways.values())
    return list(found.values())


def _pairs(rate: Rate, cards: int) -> Iterator[Pair]:
    for rows in _groups(cards):
        for a, b in itertools.combinations(rows, 2):
            if (a.engine, a.split) == (b.engine, b.split) or abs(a.tok_s / b.tok_s - 1) <= _APART:
                continue
            faster, slower = (a, b) if a.tok_s > b.tok_s else (b, a)
            yield Pair(faster=faster, slower=slower, predicted=(rate(faster), rate(slower)))


def _groups(cards: int) -> list[Sequence[MeasuredRow]]:
    groups: dict[tuple[object, ...], list[MeasuredRow]] = {}
    for row in measured_rows(cards)[0]:
        if row.metric == "steady":
            key = (row.cards, row.model, row.quantisation.lower(), row.depth_band, row.work.users)
            groups.setdefault(key, []).append(row)
    return list(groups.values())
