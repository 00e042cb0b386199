"""Ending an instance from outside. Its supervisor is asked to, by SIGTERM and beside it a wish how long answers may
take; one that hangs is killed, and its engine ended by the reaper.

NAME/stop   "GRACE_S PID STARTED_TICKS": the seconds, and which supervisor is meant
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
from dataclasses import replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from mgpu.errors import MgpuError, Missing, NoAnswer
from mgpu.running import registry
from mgpu.running.identity import identity, send
from mgpu.running.instance import Exit, ProcessId, State
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
    return _send(entry, entry.supervisor, signal.SIGTERM)


def kill(entry: Entry) -> bool:
    """Kill the supervisor of `entry`, whatever it is at, which sets the reaper to work. Returns whether the supervisor
    was there; does not wait. Raises NoAnswer (code "not-yours") for another user's."""
    return entry.supervisor is not None and _send(entry, entry.supervisor, signal.SIGKILL)


def write_down_killed(entry: Entry) -> None:
    """Write that an instance is stopped whose supervisor was killed, and whose engine is gone. Never raises."""
    instance = registry.record(entry.folder)
    if instance is None or instance.supervisor != entry.supervisor:
        return
    at = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    message = "mgpu stop --force killed the mgpu that looked after it"
    over = replace(
        instance,
        state=State.STOPPED,
        exit=Exit(code=None, signal=signal.SIGKILL, cause="asked", at=at, message=message),
        engine=None,
        group=None,
        url=None,
        rate=None,
        phase=None,
        gpus=tuple(replace(share, actual_bytes=None) for share in instance.gpus),
    )
    # Whoever has taken the name meanwhile has a record of its own.
    with contextlib.suppress(OSError, MgpuError), registry.locked(entry.folder):
        registry.write(over)


class Progress(StrEnum):
    """How far the end of an instance is."""

    OVER = "over"
    ENDING = "ending"
    ORPHANED = "orphaned"


def progress(entry: Entry) -> Progress:
    """Return how far the end of an instance is that was asked to end when it was `entry`: over when nothing of it lives
    or somebody else has its name, orphaned when its engine lives and nobody is left to end that. Looks at all processes
    that there are."""
    now = registry.read(entry.folder)
    if now.supervisor not in (entry.supervisor, None):
        return Progress.OVER
    if now.supervisor or now.reaper:
        return Progress.ENDING
    return Progress.ORPHANED if now.engine else Progress.OVER


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


def _send(entry: Entry, supervisor: ProcessId, number: signal.Signals) -> bool:
    try:
        return send(supervisor, number)
    except PermissionError:
        pid = supervisor.pid
        raise NoAnswer(f"{entry.name} is another user's (pid {pid}): it is left alone", code="not-yours") from None


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
