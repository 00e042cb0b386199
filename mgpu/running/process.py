"""One engine as a subprocess: it has its own process group, ends with mgpu, and is stopped without leftovers."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from mgpu.errors import EngineFailed, Missing
from mgpu.programs import start_group
from mgpu.running.kernel_kills import KernelKills, kernel_kills
from mgpu.running.shortage import shortage

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_S = 0.02
_LOG_PART_BYTES = 4 << 20
Stages = tuple[tuple[signal.Signals, float], ...]


def stop_stages(grace_s: float) -> Stages:
    """Return the signals that end an engine, each with the seconds it is given: `grace_s` for the first, polite one.

    llama-server waits for a client that never hangs up on a first SIGTERM and leaves at once on a second one; an
    engine stuck in its driver hears only SIGKILL.
    """
    return (signal.SIGTERM, grace_s), (signal.SIGTERM, 2.0), (signal.SIGKILL, 10.0)


STOP_STAGES = stop_stages(3.0)


class EngineProcess:
    """A started engine. As a context manager it is stopped on the way out, whatever happened inside.

    `kills_before` is what the kernel had killed before it was started.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], log_path: Path, *, kills_before: KernelKills | None = None
    ) -> None:
        self._process = process
        self._swept = False
        self.log_path = log_path
        self.kills_before = kills_before

    @classmethod
    def start(cls, argv: Sequence[str], *, env: Mapping[str, str], log_path: Path) -> Self:
        """Start `argv` with exactly `env`, its output going to `log_path` (mode 0600).

        The kernel kills the engine when the calling thread ends, however that happens: call it from the main
        thread. Raises EngineFailed (code "engine-broken") when the program cannot be executed, Missing when the log
        cannot be written (code "state-folder") or the system has no process for it ("no-resources").
        """
        libc = ctypes.CDLL(None, use_errno=True)
        parent = os.getpid()

        def die_with_parent() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:  # it was gone before the kernel was told
                os._exit(1)

        try:
            log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        except OSError as error:
            raise Missing(f"the log {log_path} cannot be written: {error.strerror}", code="state-folder") from None
        kills_before = kernel_kills()
        try:
            process = start_group(
                argv,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
                preexec_fn=die_with_parent,
            )
        except OSError as error:
            if short := shortage(error, f"{argv[0]} could not be started"):
                raise short from None
            raise EngineFailed(f"{argv[0]} could not be started: {error.strerror}", code="engine-broken") from None
        finally:
            os.close(log)
        return cls(process, log_path, kills_before=kills_before)

    @property
    def pid(self) -> int:
        """The engine's process id, also its process group."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit status (negative for a signal), None while it runs.

        An engine that has ended takes with it whatever it left running in its process group.
        """
        status = self._process.poll()
        if status is not None and not self._swept:
            # Once and at once: the system may give the group's number to others later.
            self._swept = True
            self._signal_group(signal.SIGKILL)
        return status

    def wait(self, timeout_s: float) -> int | None:
        """Return the exit status, or None after `timeout_s` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        return self.poll()

    def log_lines(self) -> list[str]:
        """Return what the engine wrote so far, line by line; of a log of months its beginning and its end."""
        try:
            with self.log_path.open("rb") as log:
                text = log.read(_LOG_PART_BYTES)
                end = max(log.seek(0, os.SEEK_END) - _LOG_PART_BYTES, len(text))
                log.seek(end)
                text += log.read()
        except OSError:
            return []
        return text.decode(errors="replace").splitlines()

    def stop(
        self, stages: Sequence[tuple[signal.Signals, float]] = STOP_STAGES, *, leader_first: bool = False
    ) -> int | None:
        """End the engine and everything in its process group; blocks at most the sum of the stages' seconds.

        With `leader_first` only SIGKILL goes to the whole group: the engine's first process ends the others itself,
        when they have done what they were at.
        An interrupt while waiting goes on to the next, harsher stage at once. Returns the exit status, None if the
        engine outlived even SIGKILL (a process stuck in the kernel).
        """
        for number, patience_s in stages:
            if self.poll() is not None:
                break
            if leader_first and number != signal.SIGKILL:
                self._process.send_signal(number)
            else:
                self._signal_group(number)
            _patiently(lambda: self.poll() is not None, patience_s)
        return self.poll()

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _patiently(done: Callable[[], bool], patience_s: float) -> None:
    """Wait until `done`, for `patience_s` at most; an interrupt ends the patience."""
    deadline = time.monotonic() + patience_s
    with contextlib.suppress(KeyboardInterrupt):
        while not done() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
