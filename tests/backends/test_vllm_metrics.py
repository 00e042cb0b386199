from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.backends.samples import Sample
from mgpu.backends.vllm_metrics import sample, sample_from_text

from . import recorded_vllm as recorded


def test_a_busy_engine() -> None:
    found = sample_from_text(7.0, recorded.text("metrics_busy.txt"))
    assert (found.at, found.running, found.waiting, found.unfinished_tokens) == (7.0, 4, 0, 0)
    assert (found.prompt_tokens_total, found.generation_tokens_total) == (120.0, 1615.0)
    assert found.prompt_seconds_total == pytest.approx(3.33, abs=0.01)
    assert found.generation_seconds_total == pytest.approx(6.19, abs=0.01)
    assert found.kv_used == pytest.approx(0.000488, rel=0.01)


def test_an_idle_engine() -> None:
    found = sample_from_text(0.0, recorded.text("metrics_idle.txt"))
    assert (found.running, found.waiting, found.kv_used) == (0, 0, 0.0)
    assert found.generation_tokens_total is not None


def test_recorded_replicas_are_added_up() -> None:
    found = sample_from_text(0.0, recorded.text("metrics_dp2.txt"))
    assert (found.running, found.generation_tokens_total, found.kv_used) == (0, 8.0 + 16.0, 0.0)


def test_busy_replicas_are_added_up() -> None:
    text = recorded.text("metrics_busy.txt")
    one = sample_from_text(0.0, text)
    both = sample_from_text(0.0, text + text.replace('engine="0"', 'engine="1"'))
    assert both.running == 8
    assert both.generation_tokens_total == 2 * 1615.0
    assert both.kv_used == one.kv_used, "a mean, not a sum"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("", Sample(at=1.0), id="nothing"),
        pytest.param('vllm:gpu_cache_usage_perc{model_name="x"} 0.5', Sample(at=1.0, kv_used=0.5), id="an older name"),
        pytest.param("vllm:kv_cache_usage_perc 1.5", Sample(at=1.0, kv_used=1.0), id="more than all"),
        pytest.param(
            'vllm:num_requests_running{model_name="a b} c",engine="0"} 3',
            Sample(at=1.0, running=3),
            id="a strange name",
        ),
        pytest.param("vllm:num_requests_running NaN", Sample(at=1.0), id="not a number"),
        pytest.param("vllm:num_requests_running_total 3", Sample(at=1.0), id="another series"),
    ],
)
def test_what_is_not_there_is_unknown(text: str, expected: Sample) -> None:
    assert sample_from_text(1.0, text) == expected


def test_the_engine_is_asked_for_its_metrics() -> None:
    asked: list[str] = []

    def get(path: str) -> str | None:
        asked.append(path)
        return None

    assert sample(1.0, get) is None
    assert asked == ["/metrics"]
    assert sample(1.0, lambda _: "vllm:num_requests_waiting 2") == Sample(at=1.0, waiting=2)


@given(st.text())
def test_any_text_is_read(text: str) -> None:
    assert sample_from_text(0.0, text).at == 0.0
