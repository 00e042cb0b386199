"""However `mgpu run` ends, its Ollama ends with it, and so do the llama-servers that Ollama started."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import pytest

from .program import Mgpu, Running, request, until
from .two_cards import runners, with_two_cards

ON_TWO = ("--backend", "ollama", "--gpus", "2")
SIGNALS = [
    pytest.param((signal.SIGINT,), id="ctrl-c"),
    pytest.param((signal.SIGTERM,), id="sigterm"),
    pytest.param((signal.SIGINT, signal.SIGINT), id="ctrl-c twice"),
]


@pytest.fixture
def on_two(mgpu: Mgpu, nvml: dict[str, Path], tmp_path: Path) -> Mgpu:
    return with_two_cards(mgpu, nvml, tmp_path)


def loading(mgpu: Mgpu, running: Running) -> None:
    until(lambda: runners(mgpu), "Ollama starts a runner")


def serving(mgpu: Mgpu, running: Running) -> None:
    running.url()


def computing(mgpu: Mgpu, running: Running) -> None:
    """A client waits for its answer."""
    url = running.url()
    model = running.line(r"model +clients ask for (\S+)")[1]
    body = {"model": model, "messages": [{"role": "user", "content": "Go on"}]}

    def ask() -> None:
        with suppress(OSError, HTTPException):
            request(url, "/v1/chat/completions", body)

    threading.Thread(target=ask, daemon=True).start()
    running.line("ready .* 1 running")


MOMENTS = [
    pytest.param(loading, {"FAKE_FAIL": "slow-load:60"}, id="while loading"),
    pytest.param(serving, {}, id="while serving"),
    pytest.param(computing, {"FAKE_TOKENS_PER_SECOND": "20"}, id="with a request in flight"),
]


@pytest.mark.parametrize("signals", SIGNALS)
@pytest.mark.parametrize(("moment", "variables"), MOMENTS)
def test_signals_end_everything(
    on_two: Mgpu,
    tiny: Path,
    moment: Callable[[Mgpu, Running], None],
    variables: dict[str, str],
    signals: tuple[signal.Signals, ...],
) -> None:
    running = on_two.start("run", tiny, *ON_TWO, "--interval", "0.1", **variables)
    moment(on_two, running)
    assert runners(on_two)
    assert running.end(*signals).exit_code == 130
    on_two.assert_nothing_left()


@pytest.mark.parametrize(("moment", "variables"), MOMENTS[:2])
def test_nothing_outlives_an_mgpu_that_is_killed(
    on_two: Mgpu, tiny: Path, moment: Callable[[Mgpu, Running], None], variables: dict[str, str]
) -> None:
    running = on_two.start("run", tiny, *ON_TWO, **variables)
    moment(on_two, running)
    assert runners(on_two)
    running.process.kill()
    running.process.wait()
    on_two.assert_nothing_left()
