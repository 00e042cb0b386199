"""Letting answers end before their engine is told to: on its first SIGTERM llama-server begins no answer that waits and
breaks off the others, and a vLLM with a request in flight hangs. So the engine is left alone, and its counters are
watched, until it gives no answer any more or the time for that is over."""

from __future__ import annotations

import time
from collections.abc import Callable

from mgpu.backends.samples import Sample

# For whoever has not said how long: a short answer may end, and nobody waits for a long one who only typed Ctrl-C.
DRAIN_S = 10.0
_LOOK_EVERY_S = 0.25


def answers_in(sample: Sample | None) -> int | None:
    """Return how many requests an engine works on or keeps waiting, None where its counters do not tell."""
    if sample is None or (sample.running is None and sample.waiting is None):
        return None
    return (sample.running or 0) + (sample.waiting or 0)


def drain(
    look: Callable[[], int | None],
    has_ended: Callable[[float], bool],
    on_look: Callable[[int, float], None],
    grace_s: float,
    *,
    known: int = 0,
) -> int:
    """Block until the engine gives no answer any more, for `grace_s` at most; returns how many it still gives then.

    `look` counts its answers, and returns None where it cannot: they are as many as they were then, at first `known`.
    `has_ended` waits so many seconds for the engine's end, and `on_look` is told of answers and the seconds they have
    left. A KeyboardInterrupt ends the wait at once.
    """
    deadline = time.monotonic() + grace_s
    answers = known
    try:
        while True:
            counted = look()
            answers = answers if counted is None else counted
            left_s = deadline - time.monotonic()
            if not answers or left_s <= 0:
                return answers
            on_look(answers, left_s)
            if has_ended(min(left_s, _LOOK_EVERY_S)):
                return 0
    except KeyboardInterrupt:
        return answers
