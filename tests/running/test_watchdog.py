"""Engines that stopped computing: histories of their counters, replayed with a clock of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.backends.failure import LONGEST_MESSAGE, Failure
from mgpu.backends.samples import Sample
from mgpu.running.client import Canary
from mgpu.running.watchdog import Ask, Patience, Watch, answered, asked, begin, garbage_at_first, judge, observe

SANE = Canary(text=" John and I am", seconds=0.5, generation_tok_s=None)
SPOILT = Canary(text="!!!!!!!!", seconds=0.5, generation_tok_s=None)
PATIENCE = Patience(still_s=60, idle_s=900, answer_s=120, queued_answer_s=600)
Percents = Callable[[float], tuple[int | None, ...]]
History = Callable[[float], Sample | None]


def sample(tokens: float | None = 0, *, running: int | None = 0, waiting: int = 0, unfinished: int = 0) -> Sample:
    return Sample(
        at=0, running=running, waiting=waiting, generation_tokens_total=tokens, unfinished_tokens=unfinished, kv_used=0
    )


def replayed(
    history: History,
    *,
    until_s: float,
    answers: bool = False,
    patience: Patience = PATIENCE,
    utilisation: Percents = lambda now: (),
    signs: Callable[[float], tuple[float, ...]] = lambda now: (),
    **begun: int | bool,
) -> tuple[list[float], tuple[float, Failure] | None]:
    """When a token was asked for, and when and why the engine was given up, looking every five seconds."""
    watch = begin(SANE, 0.0, slots=4, exchanges_data=bool(begun.get("exchanges_data")))
    questions: list[float] = []
    for look in range(int(until_s / 5) + 1):
        now = look * 5.0
        watch = observe(watch, history(now), now, utilisation_percent=utilisation(now), other_signs=signs(now))
        found = judge(watch, now, patience)
        if isinstance(found, Failure):
            return questions, (now, found)
        if isinstance(found, Ask):
            questions.append(now)
            watch = asked(watch, now, found.answer_s)
            if answers:
                watch = answered(watch, SANE, now + 1)
    return questions, None


@pytest.mark.parametrize(
    ("history", "options", "questions"),
    [
        pytest.param(lambda now: sample(now * 20, running=1), {}, [], id="tokens are counted"),
        pytest.param(lambda now: sample(unfinished=int(now), running=1), {}, [], id="a long answer grows"),
        pytest.param(lambda now: sample(now // 55, running=4, waiting=9), {}, [], id="a token every 55 seconds"),
        pytest.param(lambda now: sample(), {"patience": replace(PATIENCE, idle_s=None)}, [], id="nobody asks for it"),
        pytest.param(
            lambda now: sample(running=4), {"signs": lambda now: (now // 30,)}, [], id="the log tells of a long prompt"
        ),
        pytest.param(lambda now: sample(), {"answers": True}, [900, 1805], id="asked now and then when idle"),
        pytest.param(
            lambda now: Sample(at=0), {"answers": True}, [900, 1805], id="an engine without counters is asked, too"
        ),
        pytest.param(
            lambda now: sample(running=1), {"answers": True, "until_s": 190}, [60, 125, 190], id="asked, and it answers"
        ),
        pytest.param(
            lambda now: None if now < 300 else sample(now),
            {"until_s": 400, "answers": True},
            [60, 125, 190, 255],
            id="counters that come back",
        ),
        pytest.param(
            lambda now: sample(max(0, now - 500), running=4, waiting=3),
            {},
            [60],
            id="a prompt of minutes in every slot: the question queues, then counters move",
        ),
        pytest.param(
            lambda now: sample(running=1 if 1000 <= now < 1050 else 0),
            {"patience": replace(PATIENCE, idle_s=None)},
            [],
            id="what nobody asked for is not counted as standing still",
        ),
    ],
)
def test_an_engine_that_computes_is_left_alone(
    history: History, options: dict[str, object], questions: list[float]
) -> None:
    found = replayed(history, **{"until_s": 2000, **options})  # type: ignore[arg-type]
    assert found == (questions, None)


@pytest.mark.parametrize(
    ("history", "options", "at_s", "code", "words"),
    [
        pytest.param(
            lambda now: sample(min(now, 100), running=2),
            {},
            100 + 60 + 120,
            "hung",
            "no token for 180 s with 2 requests running",
            id="requests, no movement, no answer",
        ),
        pytest.param(
            lambda now: sample(now if now <= 100 else 100, running=2, waiting=int(now)),
            {},
            100 + 60 + 600,
            "hung",
            "no token for 660 s",
            id="requests that come are no movement; the question queues behind them",
        ),
        pytest.param(
            lambda now: sample(running=0, waiting=2),
            {},
            180,
            "hung",
            "no token for 180 s",
            id="requests wait, and none is worked on: there is nothing to queue behind",
        ),
        pytest.param(lambda now: None, {}, 180, "hung", "no token for 180 s", id="it does not even tell its counters"),
        pytest.param(lambda now: sample(), {}, 1020, "hung", "no token", id="nobody asked for long, and it is dead"),
        pytest.param(
            lambda now: sample(running=1),
            {"utilisation": lambda now: (100, 99), "exchanges_data": True},
            180,
            "nccl-hang",
            "all 2 cards at 100 % and no token for 180 s (NCCL hang)",
            id="cards that wait for each other",
        ),
        pytest.param(
            lambda now: sample(running=1),
            {"utilisation": lambda now: (100, 3), "exchanges_data": True},
            180,
            "hung",
            "no token",
            id="one busy card is no NCCL hang",
        ),
        pytest.param(
            lambda now: sample(running=1),
            {"utilisation": lambda now: (100,), "exchanges_data": True},
            180,
            "hung",
            "no token",
            id="one card alone waits for no other",
        ),
        pytest.param(
            lambda now: sample(running=1),
            {"utilisation": lambda now: (100, 100) if now > 170 else (0, 0), "exchanges_data": True},
            180,
            "hung",
            "no token",
            id="cards that were idle until a moment ago",
        ),
        pytest.param(
            lambda now: sample(running=4), {}, 660, "hung", "no token", id="the question queues behind full slots"
        ),
        pytest.param(
            lambda now: sample(now, running=4, waiting=3) if now <= 100 else None,
            {},
            280,
            "hung",
            "no token",
            id="what was full long ago says nothing of an engine that is silent",
        ),
        pytest.param(
            lambda now: sample(None if now % 10 else 0, running=1),
            {},
            180,
            "hung",
            "no token",
            id="a counter that comes and goes does not move",
        ),
        pytest.param(
            lambda now: sample(running=1),
            {"utilisation": lambda now: (100, None), "exchanges_data": True},
            180,
            "hung",
            "no token",
            id="nor is one whose use is not known",
        ),
        pytest.param(
            lambda now: sample(running=1),
            {"utilisation": lambda now: (100, 100)},
            180,
            "hung",
            "no token",
            id="cards that exchange nothing cannot wait for each other",
        ),
    ],
)
def test_one_that_does_not_is_given_up(
    history: History, options: dict[str, object], at_s: float, code: str, words: str
) -> None:
    questions, given_up = replayed(history, until_s=2000, **options)  # type: ignore[arg-type]
    assert given_up is not None
    assert (given_up[0], given_up[1].code) == (at_s, code)
    assert words in given_up[1].message
    assert len(questions) == 1
    assert not given_up[1].deterministic


@pytest.mark.parametrize(
    ("first", "later", "is_garbage"),
    [
        pytest.param(SANE, SPOILT, True, id="it began to"),
        pytest.param(SPOILT, SPOILT, False, id="the model has always done so"),
        pytest.param(SANE, SANE, False, id="it does not"),
    ],
)
def test_repeating_one_token_is_garbage(first: Canary, later: Canary, is_garbage: bool) -> None:
    found = judge(answered(begin(first, 0), later, 10), 10)
    assert isinstance(found, Failure) == is_garbage
    if isinstance(found, Failure):
        assert found.code == "garbage"
        assert "'!!!!!!!!'" in found.message


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        pytest.param("!!!!!!!!", "!!!!!!", "one token ('!') again and again", id="the same token"),
        pytest.param("the the the the", " the the the the", "one token ('the')", id="the same word"),
        pytest.param("", "", "without any text", id="tokens without text"),
        pytest.param("________", " Paris, which", None, id="a model that leaves a blank for a name"),
        pytest.param("________", "........", None, id="two tokens"),
        pytest.param("!!!!!!!!", "", None, id="now this, now that"),
        pytest.param(" Alex, and I", "!!!!!!!!", None, id="a real answer first"),
    ],
)
def test_one_token_in_answer_to_everything_is_garbage(first: str, second: str, words: str | None) -> None:
    found = garbage_at_first(replace(SANE, text=first, cut_off=True), replace(SANE, text=second, cut_off=True))
    assert (found is None) == (words is None)
    if found and words:
        assert (found.code, found.deterministic) == ("garbage", False)
        assert words in found.message


def test_an_answer_that_ends_at_once_is_no_garbage() -> None:
    ended = replace(SANE, text="", cut_off=False)
    assert garbage_at_first(ended, ended) is None


def test_garbage_keeps_to_one_line_whatever_was_said() -> None:
    text = "\x1b[2J\n" * 500
    found = judge(answered(begin(SANE, 0), replace(SPOILT, text=text), 10), 10)
    assert isinstance(found, Failure)
    assert found.message.isprintable()
    assert len(found.message) <= LONGEST_MESSAGE


@given(
    looks=st.lists(
        st.tuples(st.floats(0.1, 200), st.none() | st.builds(sample, st.integers(0, 3), running=st.integers(0, 9))),
        max_size=40,
    )
)
def test_no_engine_is_given_up_before_it_was_asked_and_given_its_time(looks: list[tuple[float, Sample | None]]) -> None:
    now, question_at = 0.0, None
    watch: Watch = begin(SANE, now)
    for passed_s, reading in looks:
        now += passed_s
        watch = observe(watch, reading, now)
        found = judge(watch, now, PATIENCE)
        if isinstance(found, Failure):
            assert question_at is not None
            assert now - question_at >= PATIENCE.answer_s
            assert now - watch.moved_at >= PATIENCE.answer_s + PATIENCE.still_s
            return
        if isinstance(found, Ask):
            question_at = now
            watch = asked(watch, now, found.answer_s)
