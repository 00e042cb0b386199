"""From a command to an engine that answers: start, wait while it loads, find out why it failed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from mgpu.backends.failure import Failure
from mgpu.backends.llama_cpp_failure import diagnose
from mgpu.backends.llama_cpp_log import PHASES, Phase, parse_line
from mgpu.errors import EngineFailed
from mgpu.running.client import EngineClient
from mgpu.running.process import EngineProcess
from mgpu.running.readiness import DEFAULT_STALL_S, Signs, begin, observe, stalled

_POLL_S = 0.05


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
    client: EngineClient,
    on_loading: Callable[[Loading], None],
    *,
    stall_s: float = DEFAULT_STALL_S,
) -> None:
    """Block until the engine says that its model is loaded, and it is this engine that says so: another may have
    been faster at the port.

    Raises EngineDied when it ends, EngineFailed (code "stalled") when it makes no progress for `stall_s` seconds.
    """
    begun = time.monotonic()
    watch = begin(Signs(), begun)
    log = _Tail(engine)
    while True:
        if engine.poll() is not None:
            raise death(engine)
        log.read()
        if client.is_up() and (log.phase == PHASES[-1] or _listens(engine)):
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


def death(engine: EngineProcess) -> EngineDied:
    """Return why an engine that has ended did so."""
    status = engine.poll()
    return EngineDied(diagnose(engine.log_lines(), status), status, engine)


class _Tail:
    """The last phase named in a growing log."""

    def __init__(self, engine: EngineProcess) -> None:
        self._path = engine.log_path
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
            event = parse_line(line)
            if isinstance(event, Phase):
                self.phase = event.name


def _listens(engine: EngineProcess) -> bool:
    """Whether the engine, or a program that it is a script for, listens on a port; its log may say nothing."""
    import psutil

    try:
        process = psutil.Process(engine.pid)
        sockets = [
            found for each in (process, *process.children(recursive=True)) for found in each.net_connections("tcp")
        ]
    except (psutil.Error, OSError):
        return False
    return any(found.status == psutil.CONN_LISTEN for found in sockets)


def _signs(engine: EngineProcess) -> Signs:
    """Signs of life; all zero when the engine is just gone."""
    import psutil

    try:
        process = psutil.Process(engine.pid)
        with process.oneshot():
            cpu = process.cpu_times()
            return Signs(
                log_bytes=engine.log_path.stat().st_size,
                read_bytes=_read_bytes(process),
                resident_bytes=process.memory_info().rss,
                cpu_s=cpu.user + cpu.system,
            )
    except (psutil.Error, OSError):
        return Signs()


def _read_bytes(process: object) -> int:
    import psutil

    try:
        counters = process.io_counters()  # type: ignore[attr-defined]  # absent on some systems
    except (psutil.Error, AttributeError, OSError):
        return 0
    return int(counters.read_bytes)
