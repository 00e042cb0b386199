"""Waiting for an engine: until it is ready, dead, or makes no progress any more."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from mgpu.backends.llama_cpp import BACKEND
from mgpu.backends.llama_cpp_log import PHASES
from mgpu.errors import EngineFailed
from mgpu.running import readiness
from mgpu.running.process import EngineProcess
from mgpu.running.start import EngineDied, Loading, death, wait_for_a_strangers, wait_until_ready
from tests.fakes.devices import free_port
from tests.fakes.engines import LIMIT_S, connect, fake_engine
from tests.fakes.llama_server import LOSE_DEVICE

TWO_CARDS = "CUDA0: RTX 4090 (24081 MiB, 23600 MiB free); CUDA1: RTX 4090 (24081 MiB, 23600 MiB free)"


def test_waiting_ends_when_the_model_is_loaded(tmp_path: Path) -> None:
    seen: list[Loading] = []
    with fake_engine(tmp_path, FAKE_FAIL="slow-load:0.5") as (process, client):
        wait_until_ready(process, client, BACKEND, seen.append)
        assert client.is_up()
        assert process.poll() is None
    assert {loading.phase for loading in seen} <= {"starting", *PHASES}
    assert seen[-1].mapped_bytes > 0
    assert [loading.seconds for loading in seen] == sorted(loading.seconds for loading in seen)
    assert 0 < seen[-1].seconds < LIMIT_S


@pytest.mark.parametrize(
    ("fault", "code", "status", "line"),
    [
        pytest.param("oom-weights", "out-of-memory", 1, "failed to allocate CUDA1 buffer", id="a card is too small"),
        pytest.param("port", "port-in-use", 1, "couldn't bind HTTP server socket", id="the port was lost"),
        pytest.param("corrupt", "model-corrupt", 1, "not within the file bounds", id="half a model"),
        pytest.param("bad-arch", "architecture-unknown", 1, "unknown model architecture", id="too new a model"),
        pytest.param("segv", "crashed", -11, None, id="a crash"),
        pytest.param("exit0", "exited", 0, None, id="an end without a reason is a failure, too"),
        pytest.param("empty-log", "exited", 1, None, id="an end without a word"),
    ],
)
def test_a_death_while_loading_is_explained(
    fault: str, code: str, status: int, line: str | None, tmp_path: Path
) -> None:
    with fake_engine(tmp_path, FAKE_FAIL=fault, FAKE_DEVICES=TWO_CARDS) as (process, client):
        with pytest.raises(EngineDied) as died:
            wait_until_ready(process, client, BACKEND, lambda _: None)
        lines = process.log_lines()
    error = died.value
    assert (error.code, error.exit_status, error.exit_code) == (code, status, 4)
    number = error.failure.line_number
    assert error.log_reference == f"{process.log_path}" + (f", line {number}" if number else "")
    assert (line is None) == (number is None)
    if line and number:
        assert line in lines[number - 1]


def test_a_death_while_serving_is_explained(tmp_path: Path) -> None:
    with fake_engine(tmp_path, FAKE_DEVICES=TWO_CARDS) as (process, client):
        wait_until_ready(process, client, BACKEND, lambda _: None)
        os.kill(process.pid, LOSE_DEVICE)
        assert process.wait(LIMIT_S) == -6
        died = death(process, BACKEND)
    assert (died.code, died.failure.device) == ("device-lost", "CUDA1")


@pytest.mark.parametrize(
    ("script", "stall_s", "why"),
    [
        pytest.param("import time; time.sleep(600)", 0.3, "no sign of work", id="one that does nothing"),
        # It may have to wait for the processor: that is not to be taken for doing nothing.
        pytest.param("while True: pass", 60.0, "busy, but nothing read or logged", id="one that spins"),
    ],
)
def test_an_engine_that_makes_no_progress_is_given_up(
    monkeypatch: pytest.MonkeyPatch, script: str, stall_s: float, why: str, tmp_path: Path
) -> None:
    monkeypatch.setattr(readiness, "BUSY_STALL_FACTOR", 2 if stall_s < 1 else 1 / 60)
    command = [sys.executable, "-ISc", script]
    with (
        EngineProcess.start(command, env={}, log_path=tmp_path / "engine.log") as process,
        connect(f"http://127.0.0.1:{free_port()}") as client,
    ):
        with pytest.raises(EngineFailed, match=f"while starting: {why}") as failed:
            wait_until_ready(process, client, BACKEND, lambda _: None, stall_s=stall_s)
        assert failed.value.code == "stalled"
        assert process.poll() is None, "stopping it is the caller's part"


def test_the_phase_that_hangs_is_named(tmp_path: Path) -> None:
    seen: list[Loading] = []
    with (
        fake_engine(tmp_path, FAKE_FAIL="hang-loading") as (process, client),
        pytest.raises(EngineFailed, match="stopped making progress while devices") as failed,
    ):
        wait_until_ready(process, client, BACKEND, seen.append, stall_s=0.5)
    assert failed.value.code == "stalled"
    assert seen[-1].phase == "devices"


def test_while_a_strangers_engine_works_whoever_waits_hears_of_it(tmp_path: Path) -> None:
    heard = threading.Event()

    def task() -> None:
        assert heard.wait(LIMIT_S)

    with fake_engine(tmp_path) as (_, client):
        wait_for_a_strangers(task, client, heard.set)
