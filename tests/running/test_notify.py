"""What a service manager hears, over a real datagram socket."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgpu.running.notify import ServiceManager


class Ear:
    """The service manager's end of the socket."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.setblocking(False)

    def heard(self) -> list[str]:
        messages = []
        while True:
            try:
                messages.append(self.socket.recv(65536).decode())
            except BlockingIOError:
                return messages


@pytest.fixture(params=["a path", "an abstract name"])
def ear(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ear]:
    ear = Ear(str(tmp_path / "notify") if request.param == "a path" else f"@mgpu-test-{os.getpid()}")
    yield ear
    ear.socket.close()


def manager(ear: Ear, **variables: str) -> ServiceManager:
    return ServiceManager.of({"NOTIFY_SOCKET": ear.address, **variables})


def test_what_is_said_is_heard(ear: Ear) -> None:
    systemd = manager(ear)
    assert systemd
    assert systemd.status("fetching")
    assert systemd.progress("loading, 3 of 40 GB", 100.0)
    assert systemd.ready("llama-8b on http://127.0.0.1:8080/v1")
    assert systemd.stopping("stopping", within_s=2.5)
    assert ear.heard() == [
        "STATUS=fetching",
        "STATUS=loading, 3 of 40 GB\nEXTEND_TIMEOUT_USEC=600000000",
        "READY=1\nSTATUS=llama-8b on http://127.0.0.1:8080/v1",
        "STOPPING=1\nSTATUS=stopping\nEXTEND_TIMEOUT_USEC=2500000",
    ]


@pytest.mark.parametrize(
    ("status", "line"),
    [
        pytest.param("a\nREADY=1\r\n\0b", "STATUS=a READY=1 b", id="a line break begins no other assignment"),
        pytest.param("x" * 99999, "STATUS=" + "x" * 200, id="a long one is cut"),
        pytest.param("\udcff and é", "STATUS=and é", id="what is no text"),
    ],
)
def test_a_status_is_one_short_line(ear: Ear, status: str, line: str) -> None:
    manager(ear).status(status)
    assert ear.heard() == [line]


def test_the_watchdog_hears_of_life_each_half_of_its_time(ear: Ear) -> None:
    systemd = manager(ear, WATCHDOG_USEC="20000000", WATCHDOG_PID=str(os.getpid()))
    assert systemd.watchdog_s == 20
    said = [now for now in (5, 6, 14, 15, 16, 25, 40) if systemd.alive(now)]
    assert (said, ear.heard()) == ([5, 15, 25, 40], ["WATCHDOG=1"] * 4)


def test_progress_is_passed_on_now_and_then(ear: Ear) -> None:
    systemd = manager(ear)
    assert [now for now in (5, 6, 14, 15, 24, 25) if systemd.progress("loading", now)] == [5, 15, 25]
    assert len(ear.heard()) == 3


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({}, id="none is set"),
        pytest.param({"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}, id="another process's"),
        pytest.param({"WATCHDOG_USEC": "0"}, id="zero"),
        pytest.param({"WATCHDOG_USEC": "-5"}, id="negative"),
        pytest.param({"WATCHDOG_USEC": "٣"}, id="no ASCII digits"),
        pytest.param({"WATCHDOG_USEC": "9" * 99}, id="beyond 64 bits"),
        pytest.param({"WATCHDOG_USEC": "20s"}, id="not a number"),
    ],
)
def test_where_no_watchdog_waits_nothing_is_said(ear: Ear, variables: dict[str, str]) -> None:
    systemd = manager(ear, **variables)
    assert not systemd.alive(0.0)
    assert (systemd.watchdog_s, ear.heard()) == (None, [])


def test_a_watchdog_without_a_process_is_for_whoever_is_told(ear: Ear) -> None:
    assert manager(ear, WATCHDOG_USEC="1000000").alive(0.0)


@pytest.mark.parametrize(
    "address",
    [None, "", "/", "@", "relative", "vsock:2:1234", "/nowhere/at/all", "/" + "x" * 500, "@gone", "/a\0b", "/\udcff"],
)
def test_where_nobody_listens_all_is_silent(address: str | None) -> None:
    systemd = ServiceManager(address, watchdog_s=1.0)
    said = [systemd.ready("x"), systemd.status("x"), systemd.progress("x", 0), systemd.alive(0)]
    assert not any([*said, systemd.stopping("x", within_s=1)])


def test_a_manager_that_hangs_holds_nothing_up_for_long(ear: Ear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgpu.running.notify._PATIENCE_S", 0.01)
    systemd = manager(ear)
    sent = 0
    while systemd.status("x"):  # until its queue is full
        sent += 1
        assert sent < 100_000
    assert len(ear.heard()) == sent
    assert systemd.status("again")


@pytest.mark.parametrize("ends", [pytest.param(None, id="it ends"), pytest.param(KeyError("no"), id="it fails")])
def test_the_watchdog_hears_of_life_while_something_takes_long(ear: Ear, ends: Exception | None) -> None:
    systemd = manager(ear, WATCHDOG_USEC="40000")
    before = set(threading.enumerate())
    with contextlib.suppress(KeyError), systemd.busy():
        heard: list[str] = []
        deadline = time.monotonic() + 30
        while len(heard) < 3:
            assert time.monotonic() < deadline, "it fell silent"
            heard += ear.heard()
            time.sleep(0.005)
        if ends:
            raise ends
    assert set(heard) == {"WATCHDOG=1"}
    ear.heard()
    assert set(threading.enumerate()) <= before, "nobody speaks any more"


def test_without_a_watchdog_nobody_speaks_meanwhile(ear: Ear) -> None:
    before = threading.active_count()
    with manager(ear).busy():
        assert threading.active_count() == before
    assert ear.heard() == []
