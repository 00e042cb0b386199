"""How well published rows are predicted, and the bars for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mgpu.planning.batching import aggregate_tok_s
from mgpu.planning.prediction import predict, slowed
from mgpu.planning.speed_constants import VALUES, Values
from tests.planning.measured_rows import MeasuredRow

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


def with_bandwidth(row: MeasuredRow, factor: float) -> MeasuredRow:
    """The row on cards whose memory is `factor` times as fast."""
    stages = tuple(
        replace(
            stage,
            shares=tuple(
                replace(share, chip=replace(share.chip, bandwidth_gb_s=(share.chip.bandwidth_gb_s or 0) * factor))
                for share in stage.shares
            ),
        )
        for stage in row.work.stages
    )
    return replace(row, work=replace(row.work, stages=stages))
