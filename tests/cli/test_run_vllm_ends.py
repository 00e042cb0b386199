"""However `mgpu run` ends, nothing of vLLM outlives it: no worker, no temporary folder, no shared memory."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path

import pytest

from tests.fakes.tiny_llama import make_tiny_llama

from .program import Mgpu, Running, until
from .vllm_rig import Holdings, holdings, open_request, with_vllm

TWO = ("--gpus", "2")
CTRL_C = signal.SIGINT


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def on_two(mgpu: Mgpu, nvml: dict[str, Path], tmp_path: Path) -> Mgpu:
    return with_vllm(mgpu, nvml, tmp_path)


def assert_nothing_left(mgpu: Mgpu, held: Holdings) -> None:
    held.assert_given_back()
    mgpu.assert_nothing_left()


def loading(mgpu: Mgpu, model: Path, fault: str = "hang-loading") -> tuple[Running, Holdings]:
    """A run whose engine has started its workers and loads."""
    running = mgpu.start("run", model, *TWO, FAKE_FAIL=fault)
    pid = int(running.line(r"start .* pid (\d+)")[1])
    log = mgpu.state / "tiny" / "engine.log"
    until(lambda: "Starting to load model" in log.read_text(), "the weights are being loaded")
    return running, holdings(pid)


def serving(mgpu: Mgpu, model: Path) -> tuple[Running, Holdings, str]:
    """A run whose engine answers, and its address."""
    running = mgpu.start("run", model, *TWO, "--interval", "0.1", FAKE_TOKENS_PER_SECOND="50")
    url = running.url()
    running.line("ready .* 0 running")
    return running, holdings(running.engine_pid()), url


@pytest.mark.parametrize("number", [CTRL_C, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_while_nobody_asks(on_two: Mgpu, model: Path, number: signal.Signals) -> None:
    running, held, _ = serving(on_two, model)
    ended = running.end(number)
    assert ended.exit_code == 130
    assert "GiB given back" in ended.err
    assert_nothing_left(on_two, held)


@pytest.mark.parametrize("number", [CTRL_C, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_with_requests_in_flight(on_two: Mgpu, model: Path, number: signal.Signals) -> None:
    """vLLM waits for clients that wait for it; it is given some seconds, and not more."""
    running, held, url = serving(on_two, model)
    with open_request(url), open_request(url, stream=False):
        assert running.end(number).exit_code == 130
        assert_nothing_left(on_two, held)


def test_who_presses_ctrl_c_again_and_again_waits_no_longer(on_two: Mgpu, model: Path) -> None:
    running, held, url = serving(on_two, model)
    with open_request(url):
        begun = time.monotonic()
        until(lambda: pressed(running), "mgpu has ended")
        assert time.monotonic() - begun < 8, "less than a single Ctrl-C takes"
        assert running.end().exit_code == 130
        assert_nothing_left(on_two, held)


def pressed(running: Running) -> bool:
    running.process.send_signal(CTRL_C)
    return running.process.poll() is not None


@pytest.mark.parametrize("signals", [(CTRL_C,), (CTRL_C, CTRL_C), (signal.SIGTERM,)], ids=["once", "twice", "sigterm"])
def test_while_it_loads(on_two: Mgpu, model: Path, signals: tuple[signal.Signals, ...]) -> None:
    running, held = loading(on_two, model)
    assert running.end(*signals).exit_code == 130
    assert_nothing_left(on_two, held)


def test_while_it_proves_that_it_answers(on_two: Mgpu, model: Path) -> None:
    running = on_two.start("run", model, *TWO, FAKE_FAIL="hang-request")
    pid = int(running.line(r"start .* pid (\d+)")[1])
    log = on_two.state / "tiny" / "engine.log"
    until(lambda: "POST" in log.read_text() or "startup complete" in log.read_text(), "the engine listens")
    held = holdings(pid)
    assert running.end(CTRL_C).exit_code == 130
    assert_nothing_left(on_two, held)


def test_while_it_is_asked_for_its_flags(on_two: Mgpu, model: Path, tmp_path: Path) -> None:
    program = tmp_path / "slow"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\nsleep 600 & wait\n")
    program.chmod(0o755)
    running = on_two.start("run", model, *TWO, MGPU_VLLM=str(program))
    until((tmp_path / "asked").exists, "it was asked")
    assert running.end(CTRL_C).exit_code == 130
    on_two.assert_nothing_left()


@pytest.mark.parametrize("moment", ["loading", "serving", "a request in flight"])
def test_when_mgpu_itself_is_killed(on_two: Mgpu, model: Path, moment: str) -> None:
    with contextlib.ExitStack() as stack:
        if moment == "loading":
            running, held = loading(on_two, model, "slow-load:60")
        else:
            running, held, url = serving(on_two, model)
        if moment == "a request in flight":
            stack.enter_context(open_request(url))
        running.process.kill()
        running.process.wait()
        assert_nothing_left(on_two, held)
