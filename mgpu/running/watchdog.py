"""Does a running engine still compute? Its /health says yes long after it has stopped to.

While its counters move, it does. When they stand still although requests are there, or nobody has asked for long, it
is asked for a token; only when that brings neither an answer nor a movement is it given up. A long prompt on slow
cards moves no counter either, so that an engine with every slot taken is given more time: the question has to queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mgpu.backends.failure import Failure, shorten
from mgpu.backends.samples import Sample
from mgpu.running.client import Canary

# What a driver calls 100 % of a second without a gap.
_FULL_PERCENT = 99
_DOCTOR = "mgpu doctor --probe tests whether the cards reach each other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Seconds: `still_s` with requests and no movement before a token is asked for, `idle_s` without requests (None:
    never, since cards that sleep are woken by it), `answer_s` for the answer, `queued_answer_s` where it has to wait
    for others."""

    still_s: float = 60.0
    idle_s: float | None = 900.0
    answer_s: float = 120.0
    queued_answer_s: float = 900.0


DEFAULT_PATIENCE = Patience()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """The engine is to be asked for a token, which is to come within `answer_s` seconds."""

    answer_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What was last seen of an engine, and when (monotonic seconds).

    `moved_at` is when it last proved that it computes; `still_since` when what it owes began to stand still.
    `pegged_since` is since when every card is fully busy, `answer_by` until when a token must come.
    """

    slots: int | None
    exchanges_data: bool
    repeats_itself: bool
    moved_at: float
    still_since: float
    counters: tuple[float | None, ...] | None = None
    sample: Sample | None = None
    silent: bool = False
    pegged_since: float | None = None
    pegged_cards: int = 0
    asked_at: float | None = None
    answer_by: float | None = None
    garbage: str | None = None


def begin(first: Canary, now: float, *, slots: int | None = None, exchanges_data: bool = False) -> Watch:
    """Return a watch over an engine that has just given its `first` answer.

    `slots` is how many requests it works on at a time; `exchanges_data` says that its cards wait for each other.
    """
    return Watch(
        slots=slots,
        exchanges_data=exchanges_data,
        repeats_itself=first.one_token_repeated,
        moved_at=now,
        still_since=now,
    )


def garbage_at_first(first: Canary, second: Canary) -> Failure | None:
    """Return the Failure (code "garbage") of an engine whose first answers, to two questions that have nothing to do
    with each other, are one and the same token; None where that cannot be said. A healthy model may repeat itself in
    one of them ("Hello, my name is ____"); numbers that were spoilt between two cards are spoilt in both."""
    if first.repeated is None or first.repeated != second.repeated:
        return None
    token = f"one token ({shorten(first.repeated, 24)!r}) again and again" if first.repeated else "without any text"
    message = f"every answer is {token}: the results are garbage"
    return Failure(code="garbage", message=shorten(message), hint=_DOCTOR, deterministic=False)


def observe(
    watch: Watch,
    sample: Sample | None,
    now: float,
    *,
    utilisation_percent: Sequence[int | None] = (),
    other_signs: tuple[float, ...] = (),
) -> Watch:
    """Return the watch after a look at the engine's counters (None: it did not tell them).

    `utilisation_percent` is that of the cards it runs on. `other_signs` are numbers that move only while it computes,
    such as the count of the log's lines on how far a prompt is.
    """
    pegged = len(utilisation_percent) > 0 and all((u or 0) >= _FULL_PERCENT for u in utilisation_percent)
    watch = replace(
        watch,
        silent=sample is None,
        sample=sample or watch.sample,
        pegged_since=(watch.pegged_since if watch.pegged_since is not None else now) if pegged else None,
        pegged_cards=len(utilisation_percent),
    )
    counters = (*_counters(sample), *other_signs) if sample else watch.counters
    moved = _moved(watch.counters or (), counters or ())
    watch = replace(watch, counters=counters)
    if moved:
        return replace(watch, moved_at=now, still_since=now, asked_at=None, answer_by=None)
    if watch.asked_at is None and not _owes(watch):
        return replace(watch, still_since=now)
    return watch


def asked(watch: Watch, now: float, answer_s: float) -> Watch:
    """Return the watch after the engine was asked for a token, as `judge` wanted."""
    return replace(watch, asked_at=now, answer_by=now + answer_s)


def answered(watch: Watch, canary: Canary, now: float) -> Watch:
    """Return the watch after an answer; whatever is no completion is none, and is not told."""
    spoilt = canary.one_token_repeated and not watch.repeats_itself
    watch = replace(watch, garbage=canary.text if spoilt else None, moved_at=now, still_since=now)
    return replace(watch, asked_at=None, answer_by=None)


def judge(watch: Watch, now: float, patience: Patience = DEFAULT_PATIENCE) -> Ask | Failure | None:
    """Return what to do: nothing (None), ask for a token, or end the engine because of a Failure with the code "hung",
    "nccl-hang" (all cards busy, and nothing comes of it) or "garbage" (it repeats one token, as it did not at first).
    """
    if watch.garbage is not None:
        return _garbage(watch.garbage)
    if watch.answer_by is not None:
        return _hung(watch, now) if now >= watch.answer_by else None
    owes = _owes(watch)
    limit_s, since = (patience.still_s, watch.still_since) if owes else (patience.idle_s, watch.moved_at)
    if limit_s is None or now - since < limit_s:
        return None
    return Ask(answer_s=patience.queued_answer_s if owes and _is_full(watch) else patience.answer_s)


def _counters(sample: Sample) -> tuple[float | None, ...]:
    """What moves only when something is computed; requests come and go without that."""
    return (
        sample.prompt_tokens_total,
        sample.prompt_seconds_total,
        sample.generation_tokens_total,
        sample.generation_seconds_total,
        sample.unfinished_tokens,
        sample.kv_used,
    )


def _moved(before: tuple[float | None, ...], after: tuple[float | None, ...]) -> bool:
    """Whether a counter that is known both times is another one; that one appears is no sign of work."""
    return any(None not in (was, now) and was != now for was, now in zip(before, after, strict=False))


def _owes(watch: Watch) -> bool:
    """Whether somebody waits for the engine: requests are there, or mgpu for its counters."""
    return watch.silent or (watch.sample is not None and bool(watch.sample.running or watch.sample.waiting))


def _is_full(watch: Watch) -> bool:
    if watch.silent or watch.sample is None:
        return False
    running, waiting = watch.sample.running or 0, watch.sample.waiting or 0
    # Where requests wait and none is worked on, there is nothing that they would wait for.
    return running > 0 and (waiting > 0 or (watch.slots is not None and running >= watch.slots))


def _hung(watch: Watch, now: float) -> Failure:
    still_s = now - watch.moved_at
    asked_at = watch.asked_at if watch.asked_at is not None else now
    spinning = watch.pegged_since is not None and watch.pegged_since <= asked_at
    if spinning and watch.exchanges_data and watch.pegged_cards > 1:
        message = f"all {watch.pegged_cards} cards at 100 % and no token for {still_s:.0f} s (NCCL hang)"
        return Failure(code="nccl-hang", message=shorten(message), hint=_DOCTOR, deterministic=False)
    running = watch.sample.running if watch.sample else None
    with_whom = f" with {running} request{'s' if running > 1 else ''} running" if running else ""
    message = f"the engine gave no token for {still_s:.0f} s{with_whom}, nor when it was asked for one"
    return Failure(
        code="hung", message=shorten(message), hint="mgpu doctor looks for a card that hangs", deterministic=False
    )


def _garbage(text: str) -> Failure:
    message = f"the engine began to repeat one token ({shorten(text, 24)!r}): the results are garbage"
    return Failure(code="garbage", message=shorten(message), hint=_DOCTOR, deterministic=False)
