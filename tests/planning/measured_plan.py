"""What the plan puts first of ways that were measured: its own ranking, engines and thin evidence included."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from mgpu.machine.simulate import simulate
from mgpu.planning.candidates import Candidate
from mgpu.planning.choice import Offer, Preference, choose
from mgpu.planning.prediction import predict
from mgpu.planning.speed import Speed
from tests.planning.measured_choice import choices, pairs_of
from tests.planning.measured_rows import MeasuredRow
from tests.planning.test_choice import way
from tests.planning.test_plan import facts


def chosen_pairs() -> list[bool]:
    """Return for each pair of rows more than 5 % apart whether the plan puts the faster way first."""
    pairs = pairs_of(lambda row: predict(row.work) is not None)
    return [_planned_rows([slower, faster])[0] is faster for faster, slower in pairs]


def reached() -> list[float]:
    """Return for each choice between splits or engines the share of the best measured speed that the plan's first way
    reached. Several measurements of one way count by their median."""
    shares = []
    for ways in choices():
        first = _planned_rows([rows[0] for rows in ways])[0]
        measured = [statistics.median(row.tok_s for row in rows) for rows in ways]
        chosen = next(rate for rate, rows in zip(measured, ways, strict=True) if rows[0] is first)
        shares.append(chosen / max(measured))
    return shares


def _planned_rows(rows: Sequence[MeasuredRow]) -> list[MeasuredRow]:
    """The rows in the order in which a plan has them, were they all ways to run one model."""
    offers = []
    place: dict[str, list[MeasuredRow]] = {}
    for row in rows:
        place.setdefault(row.engine, []).append(row)
    for engine, own in place.items():
        candidates = tuple(_candidate_of(row, number) for number, row in enumerate(own))
        offers.append(Offer(backend=engine, facts=facts("llama-3.1-8b"), candidates=candidates))
    many = max(row.work.users for row in rows) > 1
    preferred = Preference(order=tuple(place), why="", for_many=many)
    plan = choose(offers, preferred, simulate("2x4090"))
    return [place[each.backend][int(each.reasons[0])] for each in plan.candidates]


def _candidate_of(row: MeasuredRow, number: int) -> Candidate:
    found = predict(row.work)
    assert found
    speed = Speed(decode_tok_s=found.decode, aggregate_tok_s=found.aggregate, thin=found.thin)
    split = row.split if row.split != "row" else "layer"
    return replace(way(row.engine), split_mode=split, reasons=(str(number),), speed=speed)
