"""From a command to an engine that answers: start, wait while it loads, find out why it failed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mgpu.backends.backend import Backend
from mgpu.backends.failure import Failure
from mgpu.errors import EngineFailed
from mgpu.running.client import Link
from mgpu.running.kernel_kills import explained, kernel_kills
from mgpu.running.process import EngineProcess
from mgpu.running.readiness import DEFAULT_STALL_S, Signs, begin, observe, stalled

if TYPE_CHECKING:
    import psutil

_POLL_S = 0.05
_ASK_AGAIN_S = 1.0
# The last phase of every engine: it takes requests.
_LISTENING = "listening"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How far loading is: the phase in words, and the bytes of the model that are in memory so far."""

    phase: str
    mapped_bytes: int
    seconds: float


class EngineDied(EngineFailed):
    """The engine ended by itself; `failure` says why and `exit_status` how."""

    def __init__(self, failure: Failure, exit_status: int | None, engine: EngineProcess) -> None:
        where = f", line {failure.line_number}" if failure.line_number else ""
        super().__init__(failure.message, code=failure.code, hint=failure.hint)
        self.failure = failure
        self.exit_status = exit_status
        self.log_reference = f"{engine.log_path}{where}"


def wait_until_ready(
    engine: EngineProcess,
    client: Link,
    backend: Backend,
    on_loading: Callable[[Loading], None],
    *,
    stall_s: float = DEFAULT_STALL_S,
) -> None:
    """Block until the engine says that it can take requests, and it is this engine that says so: another may have
    been faster at the port.

    Raises EngineDied when it ends, EngineFailed (code "stalled") when it makes no progress for `stall_s` seconds.
    """
    _wait(
        engine,
        backend,
        lambda phase: client.is_up() and (phase == _LISTENING or _listens(engine, client.port)),
        on_loading,
        stall_s=stall_s,
    )


def wait_for(
    task: Callable[[], None],
    engine: EngineProcess,
    backend: Backend,
    on_loading: Callable[[Loading], None],
    *,
    stall_s: float = DEFAULT_STALL_S,
) -> None:
    """Do `task`, a request that the engine answers when it has loaded something, while its progress is shown.

    Raises what the task raises, and as `wait_until_ready` does.
    """
    problems, thread = _begun(task)
    _wait(engine, backend, lambda _: not thread.is_alive(), on_loading, stall_s=stall_s)
    if problems:
        raise problems[0]


def wait_for_a_strangers(
    task: Callable[[], None],
    client: Link,
    on_waiting: Callable[[], None],
    *,
    stall_s: float = DEFAULT_STALL_S,
) -> None:
    """Do `task`, a request to an engine that somebody else runs: all that is known of it is whether it answers.
    `on_waiting` is called every few seconds.

    Raises what the task raises, and EngineFailed (code "stalled") when the engine has not answered for `stall_s`.
    """
    problems, thread = _begun(task)
    answered_at = time.monotonic()
    while thread.is_alive():
        thread.join(_ASK_AGAIN_S)
        on_waiting()
        if client.is_up():
            answered_at = time.monotonic()
        elif time.monotonic() - answered_at > stall_s:
            raise EngineFailed("the engine stopped answering while it loaded the model", code="stalled")
    if problems:
        raise problems[0]


def _begun(task: Callable[[], None]) -> tuple[list[BaseException], threading.Thread]:
    """A thread that does `task`, and what the task raised. It is a daemon, since nothing but the engine's answer ends
    it: after Ctrl-C mgpu ends, or stops the engine."""
    problems: list[BaseException] = []

    def do() -> None:
        try:
            task()
        except BaseException as problem:  # it is the caller's, who waits for the end
            problems.append(problem)

    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    return problems, thread


def _wait(
    engine: EngineProcess,
    backend: Backend,
    done: Callable[[str], bool],
    on_loading: Callable[[Loading], None],
    *,
    stall_s: float,
) -> None:
    begun = time.monotonic()
    watch = begin(Signs(), begun)
    log = _Tail(engine, backend)
    while True:
        if engine.poll() is not None:
            raise death(engine, backend)
        log.read()
        if done(log.phase):
            return
        signs = _signs(engine)
        now = time.monotonic()
        watch = observe(watch, signs, now)
        if why := stalled(watch, now, stall_s):
            raise EngineFailed(
                f"the engine stopped making progress while {log.phase}: {why}",
                code="stalled",
                hint="a card or RPC server that hangs looks like this; mgpu backends shows whether each still answers",
            )
        on_loading(Loading(phase=log.phase, mapped_bytes=signs.resident_bytes, seconds=now - begun))
        time.sleep(_POLL_S)


def death(engine: EngineProcess, backend: Backend) -> EngineDied:
    """Return why an engine that has ended did so."""
    status = engine.poll()
    found = backend.diagnose(engine.log_lines(), status)
    failure = explained(found, status, engine.kills_before, kernel_kills())
    return EngineDied(failure, status, engine)


class _Tail:
    """The last phase named in a growing log."""

    def __init__(self, engine: EngineProcess, backend: Backend) -> None:
        self._path = engine.log_path
        self._phase_of = backend.phase
        self._offset = 0
        self.phase = "starting"

    def read(self) -> None:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                new = file.read(1 << 20)
        except OSError:
            return
        whole, newline, _ = new.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        for line in whole.decode(errors="replace").splitlines():
            self.phase = self._phase_of(line) or self.phase


def _listens(engine: EngineProcess, port: int) -> bool:
    """Whether the engine, or what it started, listens on the port; its log may say nothing."""
    import psutil

    try:
        process = psutil.Process(engine.pid)
        sockets = [
            found for each in (process, *process.children(recursive=True)) for found in each.net_connections("tcp")
        ]
    except (psutil.Error, OSError):
        return False
    return any(found.status == psutil.CONN_LISTEN and found.laddr.port == port for found in sockets)


def _signs(engine: EngineProcess) -> Signs:
    """Signs of life of the engine and what it started; all zero when it is just gone."""
    import psutil

    try:
        process = psutil.Process(engine.pid)
        everybody = [process, *process.children(recursive=True)]
        log_bytes = engine.log_path.stat().st_size
    except (psutil.Error, OSError):
        return Signs()
    each = [signs for one in everybody if (signs := _signs_of(one))]
    return Signs(
        log_bytes=log_bytes,
        read_bytes=sum(signs.read_bytes for signs in each),
        resident_bytes=sum(signs.resident_bytes for signs in each),
        cpu_s=sum(signs.cpu_s for signs in each),
    )


def _signs_of(process: psutil.Process) -> Signs | None:
    import psutil

    try:
        with process.oneshot():
            cpu = process.cpu_times()
            return Signs(
                read_bytes=_read_bytes(process),
                resident_bytes=process.memory_info().rss,
                cpu_s=cpu.user + cpu.system,
            )
    except (psutil.Error, OSError):
        return None


def _read_bytes(process: psutil.Process) -> int:
    import psutil

    try:
        counters = process.io_counters()
    except (psutil.Error, AttributeError, OSError):
        return 0
    return int(counters.read_bytes)
