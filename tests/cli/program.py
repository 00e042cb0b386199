"""The `mgpu` program as its users have it: a process with an environment, a current folder and signals."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# For a machine that many share; nothing waits that long where all is well.
LIMIT_S = 180
_POLL_S = 0.02
_MARK = "MGPU_TEST_MARK"


def until(condition: Callable[[], object], what: str) -> None:
    """Wait until `condition` is true; fails after `LIMIT_S` seconds."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"after {LIMIT_S} s still not: {what}"
        time.sleep(_POLL_S)


def parse(line: str) -> dict[str, Any]:
    """One JSON object of a strict reader: no NaN, no infinity."""

    def refuse(constant: str) -> object:
        raise AssertionError(f"{constant} is no JSON")

    value = json.loads(line, parse_constant=refuse)
    assert isinstance(value, dict)
    return value


def request(url: str, path: str, body: object = None, *, key: str | None = None) -> tuple[int, str]:
    """Status and text of an engine's answer."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=LIMIT_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@dataclass(frozen=True, slots=True)
class Ended:
    """What a program left: its exit code as a shell shows it, and its words."""

    exit_code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout."""
        assert self.out.endswith("\n"), self
        assert len(self.out.splitlines()) == 1, self
        return parse(self.out)

    @property
    def stream(self) -> list[dict[str, Any]]:
        """The objects on stdout, one a line."""
        return [parse(line) for line in self.out.splitlines()]

    @property
    def events(self) -> list[str]:
        """The names of the events of a stream, in order."""
        return [entry["data"]["event"] for entry in self.stream if entry["data"]]

    def event(self, name: str) -> dict[str, Any]:
        """The data of the last event of that name."""
        found = [entry["data"] for entry in self.stream if entry["data"] and entry["data"]["event"] == name]
        assert found, (name, self)
        return dict(found[-1])


class Running:
    """A started `mgpu` whose output is read while it works."""

    def __init__(self, process: subprocess.Popen[bytes], out: Path, err: Path) -> None:
        self.process = process
        self._out, self._err = out, err

    @property
    def out(self) -> str:
        return self._out.read_text(encoding="utf-8", errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(encoding="utf-8", errors="replace")

    def line(self, pattern: str) -> re.Match[str]:
        """Wait for a line of stdout or stderr that begins with `pattern`."""
        found: list[re.Match[str]] = []

        def seen() -> bool:
            ended = self.process.poll() is not None
            match = re.search(rf"(?m)^{pattern}", self.out + self.err)
            found.extend([match] if match else [])
            assert match or not ended, f"mgpu ended without {pattern!r}:\n{self.out}{self.err}"
            return match is not None

        until(seen, f"a line {pattern!r}")
        return found[-1]

    def event(self, name: str) -> dict[str, Any]:
        """Wait for an event of `run --json` and return its data."""
        line = self.line(rf'(\{{.*"event": "{name}".*\}})$')
        return dict(parse(line[1])["data"])

    def url(self) -> str:
        """Wait until the engine is ready, and return its address."""
        return self.line(r'(?:ready: .* on |.*"event": "ready".*"url": ")(http://[^ "/]+)')[1]

    def engine_pid(self) -> int:
        """Wait until the engine is ready, and return its process."""
        return int(self.line(r'(?:ready: .*, pid |.*"event": "ready".*"pid": )(\d+)')[1])

    def end(self, *signals: int) -> Ended:
        """Send the signals, wait for the end, and see that it was none with a traceback."""
        for number in signals:
            self.process.send_signal(number)
        try:
            status = self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired as problem:
            raise AssertionError(f"mgpu did not end:\n{self.out}{self.err}") from problem
        ended = Ended(status if status >= 0 else 128 - status, self.out, self.err)
        assert not re.search(r"(?m)^Traceback", ended.out + ended.err), ended  # an engine's own is in its last lines
        return ended


class Mgpu:
    """Runs `mgpu` in an empty folder. All it starts carries a mark in its environment, so that nothing gets lost."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.here = folder / "here"
        self.here.mkdir()
        self.state = Path(os.environ["XDG_STATE_HOME"]) / "mgpu"
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment, _MARK: uuid.uuid4().hex}
        self._outputs = folder / "outputs"
        self._outputs.mkdir()
        self._started: list[subprocess.Popen[bytes]] = []

    def __call__(self, *words: object, **variables: str | None) -> Ended:
        """Run to the end."""
        return self.start(*words, **variables).end()

    def start(self, *words: object, **variables: str | None) -> Running:
        """Start with more environment variables, or without those that are None."""
        out, err = (self._outputs / f"{len(self._started)}.{name}" for name in ("out", "err"))
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                self.command(*words),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=self.here,
                env=self.with_variables(**variables),
            )
        self._started.append(process)
        return Running(process, out, err)

    def piped(self, *words: object, **variables: str | None) -> subprocess.Popen[bytes]:
        """Start with pipes to read from."""
        return subprocess.Popen(
            self.command(*words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.here,
            env=self.with_variables(**variables),
        )

    def command(self, *words: object) -> list[str]:
        return [sys.executable, "-m", "mgpu", *map(str, words)]

    def with_variables(self, **variables: str | None) -> dict[str, str]:
        merged: dict[str, str | None] = {**self.environment, **variables}
        return {name: value for name, value in merged.items() if value is not None}

    def processes(self) -> list[int]:
        """The processes that were started and are still there."""
        wanted = f"{_MARK}={self.environment[_MARK]}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    environment = (folder / "environ").read_bytes()
                except OSError:  # gone, or somebody else's
                    continue
                if wanted in environment.split(b"\0"):
                    found.append(int(folder.name))
        return found

    def locks_held(self) -> list[Path]:
        """The instances whose lock somebody holds."""
        return [path for path in self.state.glob("*/lock") if not _can_be_locked(path)]

    def assert_nothing_left(self) -> None:
        """See that no process and no lock is left, and that nothing was written into the current folder."""
        until(lambda: not self.processes(), "all that mgpu started is gone")
        assert self.locks_held() == []
        assert list(self.here.iterdir()) == []

    def kill(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a process that was started here, and to no other."""
        assert pid in self.processes()
        os.kill(pid, number)

    def end_all(self) -> None:
        """Kill what a failed test left behind."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in self._started:
            process.wait()


def _can_be_locked(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
