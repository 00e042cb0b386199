"""Deaths of mgpu, of its supervisor, of engines and of their workers, at every moment, and what becomes of the rest."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from socket import socket

from mgpu.running.identity import alive, identity
from mgpu.running.instance import Instance, ProcessId, State
from mgpu.running.registry import Entry, read
from tests.fakes.devices import free_port

from .program import Mgpu, Running, until
from .traces import Held, held, left

NAME = "mortal"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
# A client that hears nothing goes away; the real vLLM waits for it, however long that takes.
_CLIENT_S = 5.0
# One that has answered for so long since it got a signal takes it for nothing.
_UNMOVED_S = 2.0
_ANSWER_S = 30.0
_LEFT_S = 60.0
# A minute until mgpu asks a silent engine for a token, two for its answer, and the start of another engine.
_NOTICED_S = 400.0
_POLL_S = 0.02
# Longer than a first try with what is left of the devices takes.
_WAITS_S = 15.0
# So long it is seen whether what nobody looks after ends by itself.
_ORPHANED_S = 3.0


class Victim(StrEnum):
    """Who gets the signal."""

    MGPU = "mgpu"
    SUPERVISOR = "the supervisor"
    GUARDED = "the supervisor and its reaper"
    ENGINE = "the engine"
    WORKER = "a worker"
    TERMINAL = "the terminal of mgpu"
    TERMINAL_DETACHED = "the terminal of mgpu run -d"


class Moment(StrEnum):
    """What the engine does just then."""

    LOADING = "loading"
    SERVING = "serving"
    ANSWERING = "with a request in flight"


_SURVIVED_BY_ENGINES = (Victim.ENGINE, Victim.WORKER, Victim.TERMINAL_DETACHED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    """An engine on a machine.

    `words` are what `mgpu run` is given, and `slow` makes the first load take some seconds. `ask(url, stream=…)` leaves
    a request open, once the engine works on it. `worker(pid)` finds a helper of the engine with that process. `hold`
    keeps an engine from going on to load while it lasts.
    """

    mgpu: Mgpu
    words: tuple[object, ...]
    ask: Callable[..., socket]
    worker: Callable[[int], int | None]
    slow: Mapping[str, str] = field(default_factory=dict)
    hold: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of an instance: in a word, what was left of it, and whether `mgpu reap` had to clear that."""

    became: str
    left: tuple[str, ...]
    reaped: bool = False
    memory_bytes: int = 0


def death(rig: Rig, victim: Victim, number: signal.Signals, moment: Moment) -> Outcome:
    """Start an instance, signal the victim at that moment, and see that it becomes what it should.

    Whatever goes on is asked for a token, then stopped. Raises AssertionError where it became something else.
    """
    with contextlib.ExitStack() as stack:
        started = _Started(rig, victim, moment, stack)
        engine = started.reach()
        # A stream ends when its client leaves; an answer in one piece does not, which is worse where all shall end.
        stream = victim in _SURVIVED_BY_ENGINES or number == signal.SIGHUP
        client = stack.enter_context(rig.ask(started.url, stream=stream)) if moment is Moment.ANSWERING else None
        with rig.hold() if moment is Moment.LOADING else contextlib.nullcontext():
            before = held(rig.mgpu)
            if moment is Moment.LOADING:
                assert started.instance.state is State.STARTING, "the engine was too fast"
            started.send(victim, number, engine)
        became = started.becomes(victim, number, moment, engine, client)
    return _tidied(rig.mgpu, became, before, _ORPHANED_S if victim is Victim.GUARDED else _LEFT_S)


class _Started:
    """A run that has begun."""

    def __init__(self, rig: Rig, victim: Victim, moment: Moment, stack: contextlib.ExitStack) -> None:
        self._rig = rig
        self._mgpu = rig.mgpu
        self._moment = moment
        self._victim = victim
        self._detached = victim not in (Victim.MGPU, Victim.TERMINAL)
        words = (*rig.words[:1], "--name", NAME, "--port", free_port(), *(["-d"] if self._detached else []))
        slow = rig.slow if moment is Moment.LOADING else {}
        words = ("run", *words, *rig.words[1:])
        self._terminal: _Terminal | None = None
        self._running: Running | None = None
        if victim in (Victim.TERMINAL, Victim.TERMINAL_DETACHED):
            self._terminal = stack.enter_context(_Terminal.of(self._mgpu, words, slow))
        else:
            self._running = self._mgpu.start(*words, **slow)

    @property
    def entry(self) -> Entry:
        return read(self._mgpu.state / NAME)

    @property
    def instance(self) -> Instance:
        entry = self.entry
        assert entry.instance, (entry.problem, self.said)
        return entry.instance

    @property
    def url(self) -> str:
        url = self.instance.url
        assert url, self.instance
        return url

    @property
    def said(self) -> str:
        if self._running:
            return self._running.out + self._running.err
        return self._terminal.said if self._terminal else ""

    def reach(self) -> ProcessId:
        """Wait for the moment; returns who the engine is."""
        wanted = (State.STARTING,) if self._moment is Moment.LOADING else (State.READY,)

        def reached() -> bool:
            ended = self._status() not in (None, 0)
            found = self.entry.instance
            assert not ended, f"it did not start:\n{self.said}"
            assert not (found and found.state.is_over), f"it did not start:\n{self.said}"
            if not (found and found.state in wanted and found.engine):
                return False
            log = (self._mgpu.state / NAME / "engine.log").read_text(errors="replace")
            # A process that has said nothing yet has not put its handlers of signals in place.
            return bool(log) and (self._victim is not Victim.WORKER or self._rig.worker(found.engine.pid) is not None)

        until(reached, f"{self._moment}")
        if self._detached and self._moment is not Moment.LOADING:
            assert self._wait() == 0, self.said
        engine = self.instance.engine
        assert engine
        return engine

    def send(self, victim: Victim, number: signal.Signals, engine: ProcessId) -> None:
        match victim:
            case Victim.MGPU:
                assert self._running
                self._running.process.send_signal(number)
            case Victim.TERMINAL | Victim.TERMINAL_DETACHED:
                assert self._terminal
                self._terminal.close()
            case Victim.SUPERVISOR:
                self._mgpu.kill(self.instance.supervisor.pid, number)
            case Victim.GUARDED:
                for pid in (*_reapers(self._mgpu), self.instance.supervisor.pid):
                    self._mgpu.kill(pid, number)
            case Victim.ENGINE:
                self._mgpu.kill(engine.pid, number)
            case Victim.WORKER:
                worker = self._rig.worker(engine.pid)
                assert worker
                os.kill(worker, number)

    def becomes(
        self, victim: Victim, number: signal.Signals, moment: Moment, engine: ProcessId, client: socket | None
    ) -> str:
        """Wait for what it has to become, and say what that is."""
        loading = moment is Moment.LOADING
        if victim in (Victim.MGPU, Victim.TERMINAL) or (victim is Victim.TERMINAL_DETACHED and loading):
            status = self._wait()
            # Where nobody reads any more, that may be noticed before the signal is; then nobody asks for the status.
            expected = (137,) if number == signal.SIGKILL else (130,) if self._running else (0, 130)
            assert status in expected, f"exit code {status}: {self.said}"
            return "went on" if self.entry.supervisor else "ended"
        if victim is Victim.TERMINAL_DETACHED or (victim is Victim.SUPERVISOR and number == signal.SIGHUP):
            if client:
                client.close()
            until(lambda: self.instance.state is State.READY, "it is ready")
            assert answers(self.url), "it does not answer"
            assert not loading or self._wait() == 0, self.said
            return "went on"
        if victim in (Victim.SUPERVISOR, Victim.GUARDED):
            until(lambda: self.entry.supervisor is None, "the supervisor is gone")
            if number != signal.SIGKILL:
                assert self.instance.state is State.STOPPED, self.instance
            assert not loading or self._wait() == (4 if number == signal.SIGKILL else 130), self.said
            return "ended"
        if client:
            gives_up_at = time.monotonic() + _CLIENT_S
            until(lambda: not alive(engine) or time.monotonic() > gives_up_at, "the client has an answer, or enough")
            client.close()
        became = self._settled(engine)
        assert not loading or self._wait() == (4 if became.startswith("failed") else 0), self.said
        return became

    def _settled(self, engine: ProcessId) -> str:
        """Wait until an engine that was hurt answers again, or is told to have failed."""
        answered_since: list[float] = []
        waited_since: list[float] = []
        became: list[str] = []

        def settled() -> bool:
            found = self.instance
            if found.state is State.FAILED:
                assert found.exit
                assert found.exit.cause
                became.append(f"failed: {found.exit.cause}")
            elif found.state in (State.READY, State.DEGRADED) and found.url and found.engine and alive(found.engine):
                # One that hangs is noticed by what it owes, so this client is patient.
                answered = answers(found.url, within_s=_NOTICED_S)
                answered_since[:] = [*answered_since, time.monotonic()] if answered else []
                moved = found.engine != engine or found.restarts
                if answered_since and (moved or answered_since[-1] - answered_since[0] > _UNMOVED_S):
                    became.append("restarted" if moved else "went on")
            else:
                answered_since.clear()
            # A device that the user has named is not done without, and may come back for as long as mgpu tries.
            waits = found.state is State.RESTARTING and found.exit and found.exit.cause == "device-lost"
            waited_since[:] = [*waited_since[:1], time.monotonic()] if waits else []
            if waited_since and waited_since[-1] - waited_since[0] > _WAITS_S:
                became.append("waits for its device")
            return bool(became)

        deadline = time.monotonic() + _NOTICED_S
        while not settled():
            assert time.monotonic() < deadline, f"it neither answers nor has failed: {self.instance}"
            time.sleep(_POLL_S)
        return became[0]

    def _status(self) -> int | None:
        if self._running:
            return self._running.process.poll()
        return self._terminal.poll() if self._terminal else None

    def _wait(self) -> int:
        return self._running.end().exit_code if self._running else self._terminal.wait() if self._terminal else 0


def _tidied(mgpu: Mgpu, became: str, before: Held, limit_s: float) -> Outcome:
    """Stop what lives; what is left then is shown and cleared by `mgpu reap`."""
    if read(mgpu.state / NAME).supervisor:
        ended = mgpu("stop", NAME)
        assert ended.exit_code == 0 or "is not running" in ended.err, ended  # it may have ended meanwhile
    remains = left(mgpu, before, limit_s=limit_s)
    reaped = bool(remains)
    if reaped:
        ended = mgpu("reap", "--yes")
        assert ended.exit_code == 0, (remains, ended)
        remains = left(mgpu, before)
    data = mgpu("ps", "--json").json["data"]
    assert all(each["state"] in ("stopped", "failed") for each in data["instances"]), data
    return Outcome(became=became, left=remains, reaped=reaped, memory_bytes=before.memory_bytes)


def answers(url: str, *, within_s: float = _ANSWER_S) -> bool:
    """Whether a token comes."""
    body = json.dumps({"prompt": "Go", "max_tokens": 2}).encode()
    head = {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}/v1/completions", body, head), timeout=within_s
        ) as answer:
            return "text" in json.loads(answer.read())["choices"][0]
    except (OSError, ValueError, KeyError):
        return False


def _reapers(mgpu: Mgpu) -> list[int]:
    return [pid for pid in mgpu.processes() if b"reaper.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def vllm_worker(pid: int) -> int | None:
    """A worker of the vLLM that leads the process group `pid`: the last one it started."""
    found = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/comm")
        if _read(path).startswith("VLLM::Worker") and os.getpgid(int(path.parent.name)) == pid
    ]
    return max(found, default=None)


def child(pid: int) -> int | None:
    """The first child of a process, once it is ready for what comes."""
    children = _read(Path(f"/proc/{pid}/task/{pid}/children")).split()
    ignored = _read(Path(f"/proc/{children[0]}/status")) if children else ""
    mask = re.search(r"(?m)^SigIgn:\s*([0-9a-f]+)", ignored)
    ready = mask and int(mask[1], 16) >> (signal.SIGTERM - 1) & 1
    return int(children[0]) if ready else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


class _Terminal:
    """A program on a terminal of its own, which somebody reads."""

    def __init__(self, process: subprocess.Popen[bytes], screen: int) -> None:
        self._process = process
        self._screen = screen
        self._closing = threading.Event()
        self.said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @classmethod
    @contextlib.contextmanager
    def of(cls, mgpu: Mgpu, words: tuple[object, ...], variables: Mapping[str, str]) -> Iterator[_Terminal]:
        screen, side = pty.openpty()
        process = subprocess.Popen(
            ["setsid", "--ctty", *mgpu.command(*words)],
            stdin=side,
            stdout=side,
            stderr=side,
            cwd=mgpu.here,
            env=mgpu.with_variables(**variables),
        )
        os.close(side)
        terminal = cls(process, screen)
        try:
            yield terminal
        finally:
            terminal.close()
            if identity(process.pid):
                process.kill()
            process.wait()

    def close(self) -> None:
        """Close the window: who has this terminal is told so by SIGHUP, and can write to it no more."""
        if not self._closing.is_set():
            self._closing.set()
            self._reader.join()
            os.close(self._screen)

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.poll()

    def wait(self) -> int:
        """The exit code as a shell shows it."""
        until(lambda: self._process.poll() is not None, "what ran on the terminal has ended")
        status = self._process.wait()
        return status if status >= 0 else 128 - status

    def _read(self) -> None:
        while not self._closing.is_set():
            if select.select([self._screen], [], [], 0.05)[0]:
                try:
                    self.said += os.read(self._screen, 1 << 16).decode(errors="replace")
                except OSError:  # everybody has left it
                    return
