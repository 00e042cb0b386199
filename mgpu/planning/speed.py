"""Speed, as far as arithmetic alone can tell: the physical bound.

Each generated token reads every active weight once, so a card's memory bandwidth bounds its part of the time.
With a layer split the cards work one after the other: the times add up.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from mgpu.models.facts import Layer, ModelFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """An interval with its most likely value, in tokens per second."""

    low: float
    likely: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What is predicted of a plan's speed; None where nothing honest can be said."""

    decode_tok_s: Range | None = None
    aggregate_tok_s: Range | None = None
    prefill_tok_s: Range | None = None
    bound_tok_s: float | None = None
    basis: str | None = None


def active_bytes(layer: Layer, facts: ModelFacts) -> int:
    """Return the bytes of one layer that one token reads: of its routed experts only those used."""
    if not facts.experts or not layer.expert_bytes:
        return layer.weights_bytes
    return layer.weights_bytes - layer.expert_bytes + layer.expert_bytes * facts.experts_used // facts.experts


def layer_split_bound(reads: Iterable[tuple[int, float | None]]) -> Speed:
    """Return the bound for cards that work in turn, given (bytes read per token, bandwidth in GB/s) of each.

    Unknown where one bandwidth is unknown (or given as zero), or where nothing is read.
    """
    reads = tuple(reads)
    seconds = 0.0
    for read_bytes, bandwidth_gb_s in reads:
        if not bandwidth_gb_s:
            return Speed()
        seconds += read_bytes / (bandwidth_gb_s * 1e9)
    if not seconds:
        return Speed()
    total_gb = sum(read_bytes for read_bytes, _ in reads) / 1e9
    groups = [(len(list(group)), rate) for rate, group in itertools.groupby(rate for _, rate in reads)]
    rates = " + ".join(f"{count} × {rate:.0f}" if count > 1 else f"{rate:.0f}" for count, rate in groups)
    in_turn = " in turn" if len(reads) > 1 else ""
    return Speed(bound_tok_s=1 / seconds, basis=f"{total_gb:.2f} GB read per token at {rates} GB/s{in_turn}")
