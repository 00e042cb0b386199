from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.backends.llama_cpp_metrics import SlotUse, parse_slots, sample_from_text
from mgpu.backends.samples import Rates, Sample, parse_metrics, rates

from . import recorded


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("a:b_total 69\n", {"a:b_total": 69.0}, id="a counter"),
        pytest.param("a 1.5e3 1700000000", {"a": 1500.0}, id="a value with a time stamp"),
        pytest.param('a{x="b c",y="}"} 2', {'a{x="b c",y="}"}': 2.0}, id="labels with spaces and braces"),
        pytest.param("# HELP a 1\n# TYPE a counter", {}, id="comments"),
        pytest.param("a NaN\nb +Inf\nc -Inf\nd 1", {"d": 1.0}, id="values that are not finite"),
        pytest.param("a\n\n b\na b\n{} \n 1", {}, id="garbage"),
        pytest.param("<html>502 Bad Gateway</html>", {}, id="another server's page"),
    ],
)
def test_prometheus_text_is_read_tolerantly(text: str, expected: dict[str, float]) -> None:
    assert parse_metrics(text) == expected


@given(st.text())
def test_any_text_is_survived(text: str) -> None:
    parse_metrics(text)
    parse_slots(text)


def slot(**values: object) -> dict[str, object]:
    return {"id": 0, "n_ctx": 1000, "is_processing": True, **values}


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        pytest.param(
            [slot(n_prompt_tokens=100, next_token=[{"n_decoded": 40}]), slot(n_prompt_tokens=300)],
            SlotUse(busy=2, unfinished_tokens=40, kv_used=0.2),
            id="two busy slots",
        ),
        pytest.param(
            [slot(n_prompt_tokens=500, is_processing=False), slot(is_processing=False)],
            SlotUse(busy=0, unfinished_tokens=0, kv_used=0.0),
            id="a finished request's prompt is not in use",
        ),
        pytest.param(
            [slot(n_prompt_tokens=9999, next_token={"n_decoded": 3})],
            SlotUse(busy=1, unfinished_tokens=3, kv_used=1.0),
            id="never more than full; older versions have one object for next_token",
        ),
        pytest.param(
            [slot(n_ctx=None, n_prompt_tokens="many", next_token=[None, {"n_decoded": -5}])],
            SlotUse(busy=1, unfinished_tokens=0, kv_used=None),
            id="values of the wrong type",
        ),
        pytest.param([], SlotUse(busy=0, unfinished_tokens=0, kv_used=None), id="no slots"),
        pytest.param({"error": {"code": 501}}, None, id="an error instead of slots"),
        pytest.param([1, 2], None, id="a list of something else"),
    ],
)
def test_slots_tell_how_full_the_cache_is(slots: object, expected: SlotUse | None) -> None:
    assert parse_slots(json.dumps(slots)) == expected


def test_deeply_nested_json_is_survived() -> None:
    assert parse_slots("[" * 100_000) is None


def test_a_recorded_busy_engine_becomes_a_sample() -> None:
    taken = sample_from_text(12.5, recorded.text("metrics_busy.txt"), recorded.text("slots_busy.json"))
    assert taken == Sample(
        at=12.5,
        running=1,
        waiting=0,
        prompt_tokens_total=69,
        prompt_seconds_total=0.281645,
        generation_tokens_total=41,
        generation_seconds_total=0.29206,
        unfinished_tokens=61,
        kv_used=63 / 4096,
    )


def test_the_end_of_a_request_moves_its_tokens_without_a_jump() -> None:
    busy = sample_from_text(0.0, recorded.text("metrics_busy.txt"), recorded.text("slots_busy.json"))
    done = sample_from_text(10.0, recorded.text("metrics.txt"), "[]")
    # 41 + 61 unfinished became 241: 139 tokens in 10 s, not 200.
    assert rates(busy, done).generation_tok_s == pytest.approx(13.9)


def reading(at: float, generated: float | None = 0, unfinished: int = 0, prompt: float = 0) -> Sample:
    return Sample(
        at=at,
        generation_tokens_total=generated,
        unfinished_tokens=unfinished,
        prompt_tokens_total=prompt,
        prompt_seconds_total=prompt / 500,
    )


@pytest.mark.parametrize(
    ("previous", "current", "expected"),
    [
        pytest.param(
            reading(0, 100),
            reading(2, 100, unfinished=40),
            Rates(prompt_tok_s=0.0, generation_tok_s=20.0),
            id="in the middle of a long answer",
        ),
        pytest.param(
            reading(0), reading(2, prompt=600), Rates(prompt_tok_s=300, generation_tok_s=0, prompt_speed_tok_s=500),
            id="a prompt finished",
        ),
        pytest.param(reading(0, 7), reading(2, 7), Rates(prompt_tok_s=0, generation_tok_s=0), id="idle"),
        pytest.param(reading(0, 100), reading(2, 20), Rates(prompt_tok_s=0.0), id="the engine was restarted"),
        pytest.param(reading(5, 0), reading(5, 10), Rates(), id="no time passed"),
        pytest.param(reading(5, 0), reading(4, 10), Rates(), id="samples in the wrong order"),
        pytest.param(reading(0, None), reading(1, None), Rates(prompt_tok_s=0), id="an unknown counter"),
        pytest.param(
            reading(0, 100, unfinished=50), reading(1, 100), Rates(prompt_tok_s=0, generation_tok_s=0),
            id="a request that ended between the two answers of one sample",
        ),
    ],
)  # fmt: skip
def test_two_samples_give_rates(previous: Sample, current: Sample, expected: Rates) -> None:
    assert rates(previous, current) == expected


def test_an_engine_that_answers_nothing_useful_gives_an_empty_sample() -> None:
    assert sample_from_text(1.0, "garbage", "garbage") == Sample(at=1.0)
