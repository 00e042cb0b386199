"""How well published rows are predicted, and the bars for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mgpu.planning.batching import aggregate_tok_s
from mgpu.planning.decode import decode_seconds
from mgpu.planning.prediction import predict, slowed
from mgpu.planning.prefill import prefill_tok_s
from mgpu.planning.speed_constants import VALUES, Values
from tests.planning.measured_rows import MeasuredRow, many_users, measured_rows, single_stream

SINGLE_BAR = 0.07
SINGLE_WITHOUT_LARGEST_BAR = 0.10
COVERAGE_BAR = 0.80
AGGREGATE_BAR = 0.16
PAIRS_BAR = 0.90
REACHED_BAR = 0.97


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """By what share of the measured speed the likely one is off, and whether the interval holds the measured one."""

    error: float
    inside: bool


def score_single(row: MeasuredRow, values: Values = VALUES) -> Score:
    """Judge the decode rate of one user; a row without a prediction is infinitely far off."""
    predicted = predict(row.work, values)
    if predicted is None:
        return Score(error=math.inf, inside=False)
    interval = predicted.decode
    return Score(error=abs(interval.likely / row.tok_s - 1), inside=interval.low <= row.tok_s <= interval.high)


def score_many(row: MeasuredRow) -> Score:
    """Judge all users' rate together, with the prompts' time where the row has it inside."""
    predicted = predict(row.work)
    if predicted is None or predicted.aggregate is None:
        return Score(error=math.inf, inside=False)
    likely = aggregate_tok_s(row.work, prompt_tokens=row.prompt_tokens, answer_tokens=row.answer_tokens)
    likely /= slowed(row.work, VALUES)
    decoding = predicted.aggregate
    inside = decoding.low <= row.tok_s * decoding.likely / likely <= decoding.high
    return Score(error=abs(likely / row.tok_s - 1), inside=inside)


def decode_rate(row: MeasuredRow, values: Values = VALUES) -> float | None:
    """The likely rate that a choice goes by: one user's, or all users' together."""
    predicted = predict(row.work, values)
    if predicted is None:
        return None
    return (predicted.aggregate or predicted.decode).likely


def evidence() -> dict[str, tuple[int, int]]:
    """How many rows of how many sources each constant takes part in: rows of one user's decoding, else of prompts,
    else of many users."""
    found: dict[str, tuple[int, int]] = {}
    prompts = tuple(row for row in measured_rows()[0] if row.prefill_tok_s and row.work.users == 1)
    for rows, compute in ((single_stream(), _decode), (prompts, _prefill), (many_users(), _aggregate)):
        sources: dict[str, list[str]] = {}
        for row in rows:
            recorder = Recorder(VALUES)
            compute(row, recorder)
            for name in recorder.read:
                sources.setdefault(name, []).append(row.source)
        found = {name: (len(some), len(set(some))) for name, some in sources.items()} | found
    return found


class Recorder(dict[str, float]):
    """Constants that remember which were asked for."""

    def __init__(self, values: Mapping[str, float]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> float:
        self.read.add(name)
        return super().__getitem__(name)


def _decode(row: MeasuredRow, values: Values) -> object:
    limited = any(chip.power < 1 for chip in row.work.chips)
    return decode_seconds(row.work, values), limited and slowed(row.work, values)


def _prefill(row: MeasuredRow, values: Values) -> object:
    return prefill_tok_s(row.work, values)


def _aggregate(row: MeasuredRow, values: Values) -> object:
    return aggregate_tok_s(row.work, values)
