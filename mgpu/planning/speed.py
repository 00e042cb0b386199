"""Speed as a candidate carries it, and as it is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """An interval with its most likely value, in tokens per second."""

    low: float
    likely: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What is predicted of a plan's speed; None where nothing honest can be said.

    `decode_tok_s` is one user's rate with the context full, `decode_start_tok_s` with an empty one, `aggregate_tok_s`
    that of `aggregate_users` together (those of the users asked for whose context finds room at once), `prefill_tok_s`
    the prompt's. `basis` is one line, `sums` are the sums line by line. `thin` are the reasons why the evidence is
    thin, `unknown` is the reason why there is no prediction.
    """

    decode_tok_s: Range | None = None
    decode_start_tok_s: Range | None = None
    aggregate_tok_s: Range | None = None
    aggregate_users: int | None = None
    prefill_tok_s: Range | None = None
    bound_tok_s: float | None = None
    basis: str | None = None
    sums: tuple[str, ...] = ()
    thin: tuple[str, ...] = ()
    unknown: str | None = None


def interval(rates: Range, bound_tok_s: float | None = None) -> str:
    """Return rates as people write them, "17-22", "2.1-3.4", "150-210": two digits that count, the lower end rounded
    down, and no end above `bound_tok_s`."""
    low, high = _rounded(rates.low, math.floor), _rounded(rates.high, round)
    if bound_tok_s is not None and float(high) > bound_tok_s:
        high = _rounded(rates.high, math.floor)
    return low if low == high else f"{low}-{high}"


def floored(bound_tok_s: float) -> str:
    """Return a bound as it is written, rounded down: what is printed as a bound must not be above it."""
    return f"{math.floor(bound_tok_s * 10) / 10:.1f}" if bound_tok_s < 100 else f"{math.floor(bound_tok_s)}"


def _rounded(rate: float, rounding: Callable[[float], float]) -> str:
    """Two digits that count; of small rates one behind the point, or two."""
    digits = 2 if rate < 1 else 1 if rate < 10 else 0 if rate < 100 else 1 - math.floor(math.log10(rate))
    unit: float = 10**digits
    return f"{rounding(rate * unit) / unit:.{max(0, digits)}f}"
