"""Other programs that mgpu starts, and that are never to outlive it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from mgpu.interrupts import interrupts

HEARD: Mapping[str, Any] = {
    "stdout": subprocess.PIPE,
    "stderr": subprocess.STDOUT,
    "text": True,
    "errors": "replace",
}
"""The streams of a program whose words are read, errors among them."""

_AT_END_S = 2.0
_started: set[subprocess.Popen[Any]] = set()


def start_program(command: Sequence[str], environment: Mapping[str, str], **streams: Any) -> subprocess.Popen[Any]:
    """Start a program without input, in a session of its own: a Ctrl-C is for mgpu, and none asks at the terminal.

    `streams` are Popen's: `stdout`, `stderr`, `text`, `errors`, or all of `HEARD`. `kill_group` ends it and all that it
    has started, and is called at mgpu's end for what an interrupt kept from being ended. Raises OSError.
    """
    return start_group(command, env=dict(environment), stdin=subprocess.DEVNULL, start_new_session=True, **streams)


def start_group(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a program that leads a process group of its own, as `options` for Popen say; else as `start_program`."""
    with interrupts.held():  # one that came while the program starts would leave it to nobody
        process = subprocess.Popen(list(command), **options)
        _started.difference_update([known for known in _started if known.returncode is not None])
        _started.add(process)
    return process


def kill_group(process: subprocess.Popen[Any], limit_s: float | None = None) -> None:
    """End a program and what it has started: a script's child would keep the output open, and us waiting.

    Blocks until it is gone, `limit_s` at most: one that hangs in a driver cannot be killed.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(limit_s)
    if process.stdout:
        process.stdout.close()


def _kill_all() -> None:
    for process in _started:
        if process.returncode is None:  # else its number may be another's
            kill_group(process, _AT_END_S)


interrupts.at_end(_kill_all)
