"""Asking an instance's supervisor to end it: SIGTERM, and beside it a wish how long answers may take.

NAME/stop   "GRACE_S PID STARTED_TICKS": the seconds, and which supervisor is meant
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
from pathlib import Path

from mgpu.errors import Missing, NoAnswer
from mgpu.running.identity import identity, send
from mgpu.running.registry import Entry

WISH = "stop"

_LONGEST_WISH_BYTES = 200


def ask_to_stop(entry: Entry, grace_s: float | None) -> bool:
    """Ask the supervisor of `entry` to end it, answers that are being given taking `grace_s` seconds at most (None: as
    long as its engine usually has). Returns whether the supervisor was there; does not wait.

    Raises NoAnswer (code "not-yours") for another user's, Missing when the wish cannot be written.
    """
    if entry.supervisor is None:
        return False
    if grace_s is not None:
        _write(entry.folder, f"{grace_s} {entry.supervisor.pid} {entry.supervisor.started_ticks}\n")
    try:
        return send(entry.supervisor, signal.SIGTERM)
    except PermissionError:
        pid = entry.supervisor.pid
        raise NoAnswer(f"{entry.name} is another user's (pid {pid}): it is left alone", code="not-yours") from None


def asked_grace_s(folder: Path) -> float | None:
    """Return the seconds that whoever asked for the end wishes to give to answers, for the supervisor of the instance
    in `folder` alone; None when nothing was said to it. Never raises."""
    me = identity(os.getpid())
    try:
        file = os.open(folder / WISH, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(file, "rb") as opened:
            text = opened.read(_LONGEST_WISH_BYTES).decode("ascii")
        grace_s, pid, started_ticks = text.split()
        meant = me is not None and (int(pid), int(started_ticks)) == (me.pid, me.started_ticks)
        seconds = float(grace_s)
    except (OSError, ValueError):
        return None
    return seconds if meant and math.isfinite(seconds) and seconds >= 0 else None


def _write(folder: Path, text: str) -> None:
    temporary = folder / f"{WISH}.{os.getpid()}.new"
    try:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(file, "w") as opened:
            opened.write(text)
        temporary.replace(folder / WISH)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise Missing(f"{folder / WISH} cannot be written: {error.strerror}", code="state-folder") from None
