"""When waiting is hopeless: histories of a loading engine, replayed with a clock of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.running.readiness import DEFAULT_STALL_S, Signs, begin, observe, stalled

GIB = 1 << 30
HOUR_S = 3600.0
LIMIT_S = DEFAULT_STALL_S
History = Callable[[float], Signs]


def given_up(
    history: History, *, until_s: float, step_s: float = 1.0, limit_s: float = LIMIT_S
) -> tuple[float, str] | None:
    """When and why waiting is given up, looking every `step_s` seconds at an engine that `history` describes."""
    watch = begin(Signs(), 0.0)
    for look in range(1, int(until_s / step_s) + 1):
        now = look * step_s
        watch = observe(watch, history(now), now)
        if why := stalled(watch, now, limit_s):
            return now, why
    return None


@pytest.mark.parametrize(
    "history",
    [
        pytest.param(lambda now: Signs(read_bytes=int(now) * 20_000_000), id="a large model from a slow disk"),
        pytest.param(lambda now: Signs(resident_bytes=int(now) * 65_536), id="a few pages mapped now and then"),
        pytest.param(lambda now: Signs(log_bytes=int(now / 100) * 80), id="a log line every 100 seconds"),
        pytest.param(lambda now: Signs(log_bytes=int(now / 500), cpu_s=now), id="kernels compiled, 500 seconds each"),
        pytest.param(
            lambda now: Signs(
                read_bytes=int(min(now, 1800)) * GIB, cpu_s=max(0, now - 1800) * 0.9, log_bytes=int(now / 599)
            ),
            id="half an hour of reading, then half an hour of work",
        ),
    ],
)
def test_an_engine_that_makes_progress_may_take_an_hour(history: History) -> None:
    assert given_up(history, until_s=HOUR_S) is None


@pytest.mark.parametrize(
    ("history", "at_s", "why"),
    [
        pytest.param(lambda now: Signs(), LIMIT_S, "no sign of work for 120 s", id="nothing at all"),
        pytest.param(
            lambda now: Signs(log_bytes=100, read_bytes=GIB, resident_bytes=GIB),
            LIMIT_S + 1,
            "no sign of work for 120 s",
            id="a start, and then nothing",
        ),
        pytest.param(
            lambda now: Signs(read_bytes=int(min(now, 1000))),
            1000 + LIMIT_S,
            "no sign of work for 120 s",
            id="the time counts from the last progress",
        ),
        pytest.param(
            lambda now: Signs(resident_bytes=10 * GIB - int(now) * 4096),
            LIMIT_S + 1,
            "no sign of work for 120 s",
            id="memory given back is no progress",
        ),
        pytest.param(
            lambda now: Signs(cpu_s=0.01 * now),
            LIMIT_S,
            "no sign of work for 120 s",
            id="timers of idle threads are no work",
        ),
        pytest.param(
            lambda now: Signs(resident_bytes=GIB + int(now / 5) * 100_000),
            LIMIT_S + 1,
            "no sign of work for 120 s",
            id="a thread for each question that is left unanswered is no progress",
        ),
        pytest.param(
            lambda now: Signs(cpu_s=now),
            5 * LIMIT_S,
            "busy, but nothing read or logged for 600 s",
            id="spinning on a dead card",
        ),
        pytest.param(
            lambda now: Signs(cpu_s=now, resident_bytes=GIB - int(now) % 2 * 4096),
            5 * LIMIT_S,
            "busy, but nothing read or logged for 600 s",
            id="spinning while the kernel takes pages away and gives them back",
        ),
        pytest.param(
            lambda now: Signs(cpu_s=min(now, 300.0)),
            300 + LIMIT_S,
            "no sign of work for 120 s",
            id="work that ended in nothing",
        ),
    ],
)
def test_an_engine_that_makes_none_is_given_up(history: History, at_s: float, why: str) -> None:
    found = given_up(history, until_s=HOUR_S)
    assert found is not None
    assert found[0] == pytest.approx(at_s, abs=2)
    assert found[1] == why


@pytest.mark.parametrize("step_s", [0.05, 1.0, 30.0])
def test_how_often_one_looks_does_not_matter(step_s: float) -> None:
    busy = given_up(lambda now: Signs(cpu_s=now), until_s=200, step_s=step_s, limit_s=30)
    idle = given_up(lambda now: Signs(cpu_s=0.01 * now), until_s=200, step_s=step_s, limit_s=30)
    assert busy is not None
    assert idle is not None
    assert busy[0] == pytest.approx(150, abs=step_s + 1)
    assert idle[0] == pytest.approx(30, abs=step_s + 1)


SIGNS = st.builds(
    Signs,
    log_bytes=st.integers(0, 3),
    read_bytes=st.integers(0, 3),
    resident_bytes=st.integers(0, 3),
    cpu_s=st.floats(0, 100),
)
STEPS = st.lists(st.tuples(st.floats(0.01, 100), SIGNS), max_size=30)


@given(steps=STEPS, limit_s=st.floats(1, 200))
def test_nothing_is_given_up_within_the_limit_of_a_log_line(
    steps: Iterable[tuple[float, Signs]], limit_s: float
) -> None:
    now, changed_at, before = 0.0, 0.0, Signs()
    watch = begin(before, now)
    for passed_s, signs in steps:
        now += passed_s
        watch = observe(watch, signs, now)
        if (signs.log_bytes, signs.read_bytes) != (before.log_bytes, before.read_bytes):
            changed_at = now
        before = signs
        assert now - changed_at >= limit_s or stalled(watch, now, limit_s) is None
        assert watch.moved_at <= watch.worked_at <= now
