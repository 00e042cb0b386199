"""However `mgpu run` ends, its engine ends with it: signals at every moment, a stubborn engine, a sudden death."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import socket
import subprocess
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes.devices import free_port

from .program import LIMIT_S, Mgpu, Running, request, until

ENDLESS = {"messages": [{"role": "user", "content": "Go on"}], "max_tokens": 100_000, "ignore_eos": True}
SIGNALS = [
    pytest.param((signal.SIGINT,), id="ctrl-c"),
    pytest.param((signal.SIGTERM,), id="sigterm"),
    pytest.param((signal.SIGHUP,), id="sighup"),
    pytest.param((signal.SIGINT, signal.SIGINT), id="ctrl-c twice"),
    pytest.param((signal.SIGTERM, signal.SIGINT, signal.SIGTERM), id="three signals at once"),
]


@pytest.fixture
def slow_to_ask(tmp_path: Path) -> Path:
    """An engine that does not answer what devices there are."""
    engine = tmp_path / "slow"
    engine.write_text(f"#!/bin/sh\ntouch {tmp_path / 'asked'}\nsleep 600 & wait\n")
    engine.chmod(0o755)
    return engine


def open_request(url: str, **more: object) -> socket.socket:
    """Send an endless request, and return its connection once the engine works on it."""
    host, _, port = url.removeprefix("http://").removesuffix("/v1").rpartition(":")
    body = json.dumps({**ENDLESS, **more}).encode()
    connection = socket.create_connection((host, int(port)), timeout=60)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    root = url.removesuffix("/v1")
    until(lambda: '"is_processing":true' in request(root, "/slots")[1], "the engine works on a request")
    return connection


@pytest.mark.parametrize("signals", SIGNALS)
def test_while_planning(
    mgpu: Mgpu, tiny: Path, tmp_path: Path, slow_to_ask: Path, signals: tuple[signal.Signals, ...]
) -> None:
    running = mgpu.start("run", tiny, MGPU_LLAMA_SERVER=str(slow_to_ask))
    until((tmp_path / "asked").exists, "the engine was asked")
    assert running.end(*signals).exit_code == 130
    mgpu.assert_nothing_left()


@pytest.mark.parametrize("signals", SIGNALS)
def test_while_loading(mgpu: Mgpu, tiny: Path, signals: tuple[signal.Signals, ...]) -> None:
    running = mgpu.start("run", tiny, FAKE_FAIL="hang-loading")
    running.line("start ")
    assert running.end(*signals).exit_code == 130
    mgpu.assert_nothing_left()


@pytest.mark.parametrize("signals", SIGNALS[2:4])
def test_while_proving(mgpu: Mgpu, tiny: Path, signals: tuple[signal.Signals, ...]) -> None:
    running = mgpu.start("run", tiny, FAKE_FAIL="hang-request")
    log = mgpu.state / "tiny" / "engine.log"
    until(lambda: log.exists() and "listening on" in log.read_text(), "the engine listens")
    assert running.end(*signals).exit_code == 130
    mgpu.assert_nothing_left()


@pytest.mark.parametrize("signals", SIGNALS)
def test_while_serving(mgpu: Mgpu, tiny: Path, signals: tuple[signal.Signals, ...]) -> None:
    running = mgpu.start("run", tiny, "--port", free_port())
    url = running.url()
    ended = running.end(*signals)
    assert ended.exit_code == 130
    assert "stopped in" in ended.err
    mgpu.assert_nothing_left()
    assert port_is_free(url)


@pytest.mark.parametrize(
    ("stream", "signals"),
    [
        *(pytest.param(True, *each.values, id=f"streaming, {each.id}") for each in SIGNALS),
        *(pytest.param(False, *each.values, id=f"in one piece, {each.id}") for each in SIGNALS[1:4:2]),
    ],
)
def test_with_a_request_in_flight(mgpu: Mgpu, tiny: Path, stream: bool, signals: tuple[signal.Signals, ...]) -> None:
    running = mgpu.start("run", tiny, "--interval", "0.1", "--port", free_port())
    url = running.url()
    with open_request(url, stream=stream):
        running.line("ready .* 1 running")
        assert running.end(*signals).exit_code == 130
        mgpu.assert_nothing_left()
    assert port_is_free(url)


@pytest.mark.parametrize("signals", SIGNALS[:3])
def test_while_answering(mgpu: Mgpu, tiny: Path, signals: tuple[signal.Signals, ...]) -> None:
    running = mgpu.start("run", tiny, "--ask", "Go on", FAKE_FAIL="repeat-token")
    running.line("the the")
    ended = running.end(*signals)
    assert ended.exit_code == 130
    assert ended.out.endswith("\n")
    mgpu.assert_nothing_left()


@pytest.mark.parametrize("fault", ["ignore-term", "spawn-child"])
def test_an_engine_that_is_hard_to_stop(mgpu: Mgpu, tiny: Path, fault: str) -> None:
    running = mgpu.start("run", tiny, FAKE_FAIL=fault)
    running.url()
    assert running.end(signal.SIGINT).exit_code == 130
    mgpu.assert_nothing_left()


def test_an_engine_that_is_frozen_is_said_to_be_degraded_and_can_be_stopped(mgpu: Mgpu, tiny: Path) -> None:
    running = mgpu.start("run", tiny, "--interval", "0.1")
    running.url()
    mgpu.kill(running.engine_pid(), signal.SIGSTOP)
    running.line("degraded .* the engine does not answer")
    assert running.end(signal.SIGINT).exit_code == 130
    mgpu.assert_nothing_left()


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(lambda running: running.line("start "), id="while loading"),
        pytest.param(lambda running: running.url(), id="while serving"),
    ],
)
def test_the_engine_ends_when_mgpu_is_killed(mgpu: Mgpu, tiny: Path, moment: Callable[[Running], object]) -> None:
    running = mgpu.start("run", tiny, FAKE_FAIL="slow-load:1")
    moment(running)
    assert mgpu.processes()
    running.process.kill()
    running.process.wait()
    mgpu.assert_nothing_left()


def test_a_closed_terminal_does_not_end_what_nohup_started(mgpu: Mgpu, tiny: Path) -> None:
    command = mgpu.command
    mgpu.command = lambda *words: ["nohup", *command(*words)]  # type: ignore[method-assign]
    running = mgpu.start("run", tiny, "--interval", "0.1")
    running.url()
    before = running.out.count("\n")
    running.process.send_signal(signal.SIGHUP)
    until(lambda: running.out.count("\n") > before + 3, "mgpu goes on")
    assert running.end(signal.SIGTERM).exit_code == 130
    mgpu.assert_nothing_left()


@pytest.mark.parametrize("seen", [pytest.param(b"ready: ", id="at once"), pytest.param("●".encode(), id="later")])
@pytest.mark.parametrize("is_told", [True, False])
def test_a_closed_terminal_is_a_stop_and_no_bug(mgpu: Mgpu, tiny: Path, is_told: bool, seen: bytes) -> None:
    mine, theirs = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        if is_told:
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        mgpu.command("run", tiny, "--interval", "0.1"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=mgpu.here,
        env=mgpu.with_variables(TERM="xterm"),
        preexec_fn=take_terminal,
    )
    os.close(theirs)
    shown = b""
    while seen not in shown:
        shown += os.read(mine, 4096)
    os.close(mine)
    try:
        process.wait(LIMIT_S)
    finally:
        process.kill()
    mgpu.assert_nothing_left()
    (instance,) = mgpu("ps", "--json").json["data"]["instances"]
    assert (instance["state"], instance["exit"]["cause"]) == ("stopped", "asked")
    assert instance["exit"]["message"] == "its terminal was closed"
    assert not list(mgpu.state.glob("bug-*"))


@pytest.mark.parametrize("words", [pytest.param((), id="in words"), pytest.param(("--json",), id="as JSON")])
def test_a_reader_that_takes_nothing_does_not_keep_it_from_ending(
    mgpu: Mgpu, tiny: Path, words: tuple[str, ...]
) -> None:
    reader, stream = os.pipe()
    fcntl.fcntl(stream, fcntl.F_SETPIPE_SZ, 4096)
    process = subprocess.Popen(
        mgpu.command("run", tiny, "--interval", "0.1", *words),
        stdin=subprocess.DEVNULL,
        stdout=stream,
        stderr=stream,
        cwd=mgpu.here,
        env=mgpu.with_variables(),
    )
    waiting = Path(f"/proc/{process.pid}/wchan")
    until(lambda: "pipe_write" in waiting.read_text(), "nothing more can be said")
    process.terminate()
    assert process.wait(LIMIT_S) == 130
    mgpu.assert_nothing_left()
    os.close(reader)
    os.close(stream)


def port_is_free(url: str) -> bool:
    port = int(url.removesuffix("/v1").rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
