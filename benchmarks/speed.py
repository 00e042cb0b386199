"""How far predicted speed is from what people measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.speed_fit import in_parts, left_out
from benchmarks.timing import verdict
from mgpu.planning.prediction import predict
from mgpu.planning.speed_constants import VALUES, Values
from tests.planning.measured_choice import judged_pairs
from tests.planning.measured_plan import chosen_pairs, reached
from tests.planning.measured_rows import MeasuredRow, largest_source, many_users, measured_rows, single_stream
from tests.planning.measured_scores import (
    AGGREGATE_BAR,
    COVERAGE_BAR,
    PAIRS_BAR,
    REACHED_BAR,
    SINGLE_BAR,
    SINGLE_WITHOUT_LARGEST_BAR,
    Score,
    decode_rate,
    score_many,
    score_single,
)


def main() -> None:
    """Predicted against measured speed: errors by class, the choice between splits, and every source left out once."""
    rows, many = single_stream(), many_users()
    largest = largest_source(rows)
    reasons = ", ".join(f"{count} {reason}" for reason, count in measured_rows()[1].items())
    print(f"one user: {len(rows)} rows of {len({row.source for row in rows})} sources (left out: {reasons})\n")
    scores = [score_single(row) for row in rows]
    _table(rows, scores)
    others = [score for row, score in zip(rows, scores, strict=True) if row.source != largest]
    _bar("median error", _median(scores), SINGLE_BAR)
    _bar(f"  without {largest}", _median(others), SINGLE_WITHOUT_LARGEST_BAR)
    _at_least("inside the interval", _inside(scores), COVERAGE_BAR)
    print(f"{'  without the same':58} {_inside(others):6.1%}")

    print(f"\nseveral users, vLLM: {len(many)} rows of {len({row.source for row in many})} sources\n")
    many_scores = [score_many(row) for row in many]
    _table(many, many_scores)
    _bar("median error", _median(many_scores), AGGREGATE_BAR)
    print(f"{'inside the interval':58} {_inside(many_scores):6.1%}")
    _choice()
    _prompts()
    _in_parts(rows, largest)
    _leaving_out(rows)


def _choice() -> None:
    pairs = judged_pairs(decode_rate)
    print(f"\nchoice: {len(pairs)} pairs that differ in split or engine only\n")
    for pair in pairs:
        row, other = pair.faster, pair.slower
        first, second = (rate or 0 for rate in pair.predicted)
        ways = f"{row.engine} {row.split} > {other.engine} {other.split}"
        measured = f"measured {row.tok_s:6.1f} > {other.tok_s:6.1f}, predicted {first:6.1f}, {second:6.1f}"
        what = f"{row.cards} {row.model} {row.quantisation} at {row.depth_tokens:.0f}"
        print(f"{'right' if pair.right else 'WRONG'}  {what:52.52} {ways:36.36} {measured}")
    _at_least("pairs in the right order", sum(pair.right for pair in pairs) / len(pairs), PAIRS_BAR)
    right, shares = chosen_pairs(), reached()
    print(f"what the plan's own ranking puts first: {len(right)} pairs, {len(shares)} choices")
    _at_least("pairs with the faster way first", statistics.mean(right), PAIRS_BAR)
    _at_least("of the best measured, by what is picked", statistics.mean(shares), REACHED_BAR)


def _prompts() -> None:
    rows = [row for row in measured_rows()[0] if row.prefill_tok_s and row.work.users == 1]
    found = [(row.prefill_tok_s or 0, p.prefill) for row in rows if (p := predict(row.work)) and p.prefill]
    off = statistics.median(abs(interval.likely / measured - 1) for measured, interval in found)
    inside = statistics.mean(interval.low <= measured <= interval.high for measured, interval in found)
    print(f"\nprompts: {len(found)} rows, median error {off:.1%}, inside the interval {inside:.1%} (no bar)")


def _in_parts(rows: Sequence[MeasuredRow], largest: str) -> None:
    """A fifth of the configurations predicted from the others: what to expect of one more of the same people's."""
    found = [(row, score_single(row, values)) for part, values in in_parts(rows) for row in part]
    scores = [score for _, score in found]
    others = [score for row, score in found if row.source != largest]
    print("\neach fifth of the configurations by constants fitted to the other four\n")
    print(f"{'median error':58} {_median(scores):6.1%}, inside {_inside(scores):.1%}")
    print(f"{f'  without {largest}':58} {_median(others):6.1%}, inside {_inside(others):.1%}")


def _leaving_out(rows: Sequence[MeasuredRow]) -> None:
    """Every source predicted from the others: what to expect of a machine nobody has measured."""
    print("\neach source by constants fitted to all others, from a start that knows no kind of card or build\n")
    scores: list[Score] = []
    without: dict[str, Values] = {}
    for source, values in left_out(rows):
        without[source] = values
        own = [score_single(row, values) for row in rows if row.source == source]
        print(f"{source:58.58} {len(own):3} rows, median error {_median(own):6.1%}")
        scores += own
    print(f"{'all':58} {len(scores):3} rows, median error {_median(scores):6.1%}, inside {_inside(scores):.1%}")
    pairs = judged_pairs(lambda row: decode_rate(row, without.get(row.source, VALUES)))
    print(f"{'pairs in the right order':58} {sum(pair.right for pair in pairs)} of {len(pairs)}")


def _table(rows: Sequence[MeasuredRow], scores: Sequence[Score]) -> None:
    groups: dict[str, list[Score]] = {}
    for row, score in zip(rows, scores, strict=True):
        groups.setdefault(row.group, []).append(score)
    for group, some in sorted(groups.items()):
        print(f"{group:32} {len(some):3} rows, median error {_median(some):6.1%}, inside {_inside(some):4.0%}")


def _median(scores: Sequence[Score]) -> float:
    return statistics.median(score.error for score in scores)


def _inside(scores: Sequence[Score]) -> float:
    return statistics.mean(score.inside for score in scores)


def _bar(what: str, value: float, bar: float) -> None:
    print(f"{what:58} {value:6.1%}   bar {bar:.0%}: {verdict(value, bar)}")


def _at_least(what: str, value: float, bar: float) -> None:
    print(f"{what:58} {value:6.1%}   bar {bar:.0%}: {verdict(-value, -bar)}")
