"""Answers end before their engine is told to, within the time that they have."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from mgpu.backends.samples import Sample
from mgpu.running.draining import answers_in, drain

LONG_S = 600.0
Count = int | None | type[BaseException]


@pytest.mark.parametrize(
    ("sample", "answers"),
    [
        pytest.param(Sample(at=0.0, running=0, waiting=0), 0, id="nobody asks"),
        pytest.param(Sample(at=0.0, running=2, waiting=1), 3, id="who waits is waited for"),
        pytest.param(Sample(at=0.0, running=1), 1, id="who waits is not told"),
        pytest.param(Sample(at=0.0), None, id="no counters"),
        pytest.param(None, None, id="no answer"),
    ],
)
def test_answers_are_counted(sample: Sample | None, answers: int | None) -> None:
    assert answers_in(sample) == answers


def counts(*values: Count) -> Callable[[], int | None]:
    """A look that counts so many, one after the other, and the last of them ever after."""
    left = list(values)

    def look() -> int | None:
        value = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(value, type):
            raise value
        return value

    return look


@pytest.mark.parametrize(
    ("looks", "known", "grace_s", "cut_off", "told"),
    [
        pytest.param((0,), 0, LONG_S, 0, [], id="an idle engine is not waited for"),
        pytest.param((2, 1, 0), 0, LONG_S, 0, [2, 1], id="until the last answer has ended"),
        pytest.param((1,), 0, 0.05, 1, [1], id="no longer than the grace"),
        pytest.param((None,), 0, LONG_S, 0, [], id="whose counters nobody knows is not waited for"),
        pytest.param((None, 0), 1, LONG_S, 0, [1], id="too busy to tell, it is as busy as it was"),
        pytest.param((1, None, 0), 0, LONG_S, 0, [1, 1], id="too busy to tell later"),
        pytest.param((2, KeyboardInterrupt), 0, LONG_S, 2, [2], id="asked again, at once"),
    ],
)
def test_the_wait_ends(looks: tuple[Count, ...], known: int, grace_s: float, cut_off: int, told: list[int]) -> None:
    heard: list[int] = []
    deadline = time.monotonic() + grace_s

    def on_look(answers: int, left_s: float) -> None:
        assert left_s <= grace_s
        if answers not in heard[-1:] or grace_s == LONG_S:
            heard.append(answers)

    found = drain(counts(*looks), lambda _: False, on_look, grace_s, known=known)
    assert (found, heard) == (cut_off, told)
    assert grace_s == LONG_S or time.monotonic() >= deadline


def test_an_engine_that_ends_meanwhile_is_not_waited_for() -> None:
    assert drain(counts(1), lambda _: True, lambda *_: None, LONG_S) == 0
