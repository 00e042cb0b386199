"""What measurements of this machine say of the speed of a plan.

Within a setting a measurement at one depth shifts the prediction for another by the same factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from mgpu.planning.candidates import Candidate
from mgpu.planning.measurements import Measurement, Setting
from mgpu.planning.speed import Range, Speed

# What runs of one setting differ by from time to time, where only one was made.
_REPEATABLE = 0.03
# How much less is known for each doubling of the depth away from where it was measured.
_PER_DOUBLING = 0.02
# The first tokens are alike: so short a context is read in next to no time.
_ALIKE_TOKENS = 512
# Measurements no further apart than this are of one depth.
_SAME_DOUBLINGS = 0.5
# The last ones count: drivers are renewed, and fans gather dust.
_LATEST = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Narrowed:
    """A range at `depth_tokens` after measurements.

    `near` are those that count, the least of its prediction first, `typical` is the one in their middle, and
    `there_tok_s` what was predicted for its depth. `factors` are measured over predicted of the first, the typical and
    the last one, and `predicted_tok_s` is what the typical one is applied to; all three are None where nothing is
    predicted. The range goes down by a factor of 1 + `below` and up by 1 + `above`, to each of which the
    `doublings` of the depth between it and what was measured have added.
    """

    rate: Range
    depth_tokens: int
    near: tuple[Measurement, ...]
    typical: Measurement
    there_tok_s: float | None
    factors: tuple[float, float, float] | None
    predicted_tok_s: float | None
    doublings: float
    below: float
    above: float


def with_measured(candidate: Candidate, setting: Setting | None, measurements: Sequence[Measurement]) -> Candidate:
    """Return `candidate` with its speed after what was measured in its `setting`; as it is where nothing was.

    Ranges are shifted and as wide as measurements differ (`narrowed`), never above the bound; evidence is not thin
    where every rate is measured. Where nothing is predicted, a rate measured within one doubling of a depth is the
    range for that depth; `unknown` goes on to say why there is none with the context full, if there is none. `sums`
    and `basis` tell what was measured.
    """
    speed, ctx_tokens = candidate.speed, candidate.ctx_tokens
    if setting is None or candidate.verdict not in ("fits", "fits-with-offload"):
        return candidate
    bound, users = speed.bound_tok_s, speed.aggregate_users or 0
    alone = _between(speed, ctx_tokens)
    decode = narrowed(alone, measurements, setting, depth_tokens=ctx_tokens, users=1, bound_tok_s=bound)
    start = narrowed(alone, measurements, setting, depth_tokens=0, users=1, bound_tok_s=bound)
    together = None
    if speed.aggregate_tok_s:
        all_users, most = _together(speed, ctx_tokens, candidate.replicas), bound and bound * users
        together = narrowed(all_users, measurements, setting, depth_tokens=ctx_tokens, users=users, bound_tok_s=most)
    found = [each for each in (decode, start, together) if each]
    if not found:
        return candidate
    complete = (decode or start) and (together or not speed.aggregate_tok_s)
    return replace(
        candidate,
        speed=replace(
            speed,
            decode_tok_s=decode.rate if decode else speed.decode_tok_s,
            decode_start_tok_s=start.rate if start else speed.decode_start_tok_s,
            aggregate_tok_s=together.rate if together else speed.aggregate_tok_s,
            basis=_basis(found[0], speed.basis),
            sums=(*speed.sums, *_sums(found, speed, ctx_tokens)),
            thin=() if complete else speed.thin,
            unknown=None if decode else speed.unknown,
        ),
    )


def narrowed(
    predict: Callable[[int], Range | None],
    measurements: Sequence[Measurement],
    setting: Setting,
    *,
    depth_tokens: int,
    users: int,
    bound_tok_s: float | None,
) -> Narrowed | None:
    """Return the range for `depth_tokens` after what was measured in the same `setting` with as many `users`; None
    where nothing was. Of `measurements`, the oldest first, the last ten near the nearest depth count.

    `predict` gives the prediction at a depth; it is shifted by measured over predicted at the nearest depth (the
    median of several), and is as wide as these differ, wider the further the depth. Where it says nothing, the median
    itself is the range, if the depth is not further away than one doubling. No end exceeds `bound_tok_s`, of all users
    together.
    """
    own = [
        each
        for each in measurements
        if setting.certain and each.setting == setting and each.users == users and each.tok_s > 0
    ]
    predicted = predict(depth_tokens)
    if predicted is not None:
        own = [each for each in own if predict(each.depth_tokens) is not None]
    if not own:
        return None
    nearest = min(own, key=lambda each: _doublings(each.depth_tokens, depth_tokens))
    away = _doublings(nearest.depth_tokens, depth_tokens)
    near = [each for each in own if _doublings(each.depth_tokens, nearest.depth_tokens) <= _SAME_DOUBLINGS][-_LATEST:]
    if predicted is None and away > 1:
        return None

    def ratio(each: Measurement) -> float:
        """Measured over predicted; without a prediction the rate itself."""
        there = predict(each.depth_tokens)
        return each.tok_s / (there.likely if there else 1.0)

    near.sort(key=ratio)
    typical = near[(len(near) - 1) // 2]
    factor = ratio(typical)
    further = _PER_DOUBLING * away
    below = max(_REPEATABLE, factor / ratio(near[0]) - 1) + further
    above = max(_REPEATABLE, ratio(near[-1]) / factor - 1) + further
    likely = predicted.likely * factor if predicted else factor
    most = math.inf if bound_tok_s is None else bound_tok_s
    there = predict(typical.depth_tokens)
    return Narrowed(
        rate=Range(low=min(most, likely / (1 + below)), likely=min(most, likely), high=min(most, likely * (1 + above))),
        depth_tokens=depth_tokens,
        near=tuple(near),
        typical=typical,
        there_tok_s=there.likely if there else None,
        factors=(ratio(near[0]), factor, ratio(near[-1])) if predicted else None,
        predicted_tok_s=predicted.likely if predicted else None,
        doublings=away,
        below=below,
        above=above,
    )


def _between(speed: Speed, ctx_tokens: int) -> Callable[[int], Range | None]:
    """One user's prediction at a depth: the time of a token grows evenly from an empty context to a full one."""
    start, full = speed.decode_start_tok_s, speed.decode_tok_s

    def predict(depth_tokens: int) -> Range | None:
        if start is None or full is None:
            return None
        share = depth_tokens / ctx_tokens

        def at(empty: float, filled: float) -> float:
            return 1 / (1 / empty + max(0.0, 1 / filled - 1 / empty) * share)

        return Range(low=at(start.low, full.low), likely=at(start.likely, full.likely), high=at(start.high, full.high))

    return predict


def _together(speed: Speed, ctx_tokens: int, replicas: int) -> Callable[[int], Range | None]:
    """All users' prediction at a depth: a step takes as much less time as each one's cache, read once, is shorter;
    replicas read at the same time."""
    full, users = speed.aggregate_tok_s, speed.aggregate_users
    start, decode = speed.decode_start_tok_s, speed.decode_tok_s
    assert full
    assert users
    cache_s = max(0.0, 1 / decode.likely - 1 / start.likely) if start and decode else 0.0

    def predict(depth_tokens: int) -> Range | None:
        less_s = cache_s * (1 - depth_tokens / ctx_tokens) / replicas
        if less_s >= 1 / full.high:  # then it is not so simple
            return None
        return Range(
            low=1 / (1 / full.low - less_s), likely=1 / (1 / full.likely - less_s), high=1 / (1 / full.high - less_s)
        )

    return predict


def _doublings(a_tokens: int, b_tokens: int) -> float:
    """How often one depth has to be doubled to be the other."""
    return abs(math.log2(max(_ALIKE_TOKENS, a_tokens) / max(_ALIKE_TOKENS, b_tokens)))


def _basis(found: Narrowed, predicted: str | None) -> str:
    times = "once" if len(found.near) == 1 else f"{len(found.near)} times"
    told = f"measured here {times}: {found.typical.tok_s:.1f} tokens/s at {found.typical.depth_tokens} tokens"
    if found.factors is None:
        return told
    return f"{told}, the prediction × {found.factors[1]:.2f}{f' ({predicted})' if predicted else ''}"


def _sums(found: Sequence[Narrowed], speed: Speed, ctx_tokens: int) -> Iterator[str]:
    """What was measured, once for all the ranges it is good for, and each of these."""
    told: list[tuple[Measurement, ...]] = []
    for each in found:
        if each.near not in told:
            told.append(each.near)
            yield f"{_measured_words(each)}{_there_words(each, speed, ctx_tokens)}"
        yield _applied_words(each)


def _measured_words(found: Narrowed) -> str:
    typical, many = found.typical, len(found.near) > 1
    users = f"{typical.users} users, " if typical.users > 1 else ""
    times = f"{users}{len(found.near)} times, median " if many else f"{users}once, "
    told = f"measured here: {times}{typical.tok_s:.1f} tokens/s at {typical.depth_tokens} tokens"
    if found.factors is None or found.there_tok_s is None:
        rates = sorted(each.tok_s for each in found.near)
        return f"{told}{f' ({rates[0]:.1f} to {rates[-1]:.1f})' if many else ''}; nothing is predicted"
    least, factor, most = found.factors
    apart = f" ({least:.3f} to {most:.3f})" if many else ""
    return f"{told}, predicted {found.there_tok_s:.1f}: the prediction × {factor:.3f}{apart}"


def _there_words(found: Narrowed, speed: Speed, ctx_tokens: int) -> str:
    """How a prediction for the depth that was measured follows from those for an empty context and a full one."""
    start, full, depth_tokens = speed.decode_start_tok_s, speed.decode_tok_s, found.typical.depth_tokens
    if found.there_tok_s is None or start is None or full is None or found.typical.users > 1:
        return ""
    empty = f"1 ÷ {start.likely:.1f}"
    grown = f"(1 ÷ {full.likely:.1f} − {empty}) × {depth_tokens} ÷ {ctx_tokens}"
    return f"; {found.there_tok_s:.1f} = 1 ÷ ({empty} + {grown})"


def _applied_words(found: Narrowed) -> str:
    rate = found.rate
    width = f"÷ {1 + found.below:.2f} and × {1 + found.above:.2f}"
    why = f"as far as they lie apart, {_REPEATABLE:g} at least" if len(found.near) > 1 else f"{_REPEATABLE:g}"
    where = f"at {found.depth_tokens} tokens" if found.depth_tokens else "at the start"
    if found.doublings:
        why += f", and {_PER_DOUBLING:g} for each of {found.doublings:.1f} doublings of the depth"
    told = f"{rate.likely:.1f} tokens/s, {rate.low:.1f} to {rate.high:.1f} ({width}: {why})"
    if found.factors is None or found.predicted_tok_s is None:
        return f"{where}: {told}"
    return f"{where}: {found.predicted_tok_s:.1f} × {found.factors[1]:.3f} = {told}"
