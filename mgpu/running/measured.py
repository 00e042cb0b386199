"""What runs have measured of this machine, remembered for the plans that come: a line of JSON each, the oldest first.

They are in the state folder, under a name that no instance can have. Nothing depends on them: what cannot be written
or read is as if it had not been measured.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import stat
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from mgpu.errors import Missing
from mgpu.planning.measurements import Measurement, Setting, measurement_from_json, measurement_to_json
from mgpu.running.state import state_folder, state_path

if TYPE_CHECKING:
    from mgpu.running.client import Answer

FILE = ".measurements.jsonl"
"""No instance is named so: their names begin with a letter or a digit."""

# A shorter answer is no measurement: its first token and the clock weigh too much.
_FEWEST_TOKENS = 32
_LARGEST_BYTES = 1 << 20
_KEPT, _KEPT_BYTES = 1000, 3 << 18
# Others hold the lock for milliseconds; who holds it for longer hangs.
_PATIENCE_S = 2.0
_POLL_S = 0.01


def measured(setting: Setting, answer: Answer) -> Measurement | None:
    """Return what an engine's answer to one user tells of its speed in `setting`; None where that is nothing: it is
    too short, or the engine did not time it itself (a reader that is slow would slow our clock)."""
    rate, generated = answer.generation_tok_s, answer.generated_tokens
    if not answer.timed_by_engine or rate is None or generated is None or answer.prompt_tokens is None:
        return None
    if generated < _FEWEST_TOKENS or answer.prompt_tokens < 0 or not 0 < rate < math.inf:
        return None
    return Measurement(
        setting=setting,
        depth_tokens=answer.prompt_tokens + generated // 2,
        users=1,
        tok_s=rate,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    )


def remember(measurement: Measurement) -> None:
    """Write a measurement behind the others, of which the oldest are forgotten when they are many. Never raises: on a
    full disk it is lost."""
    with contextlib.suppress(OSError, ValueError, Missing):
        line = json.dumps(measurement_to_json(measurement), allow_nan=False, separators=(",", ":")).encode() + b"\n"
        _append(state_folder() / FILE, line)


def remembered(models: Sequence[str]) -> tuple[Measurement, ...]:
    """Return what was measured of models whose setting has one of these texts in it, the oldest first. Never raises:
    damaged lines count for nothing."""
    try:
        return tuple(measurement for _, measurement in _read(state_path() / FILE, models))
    except (OSError, Missing):
        return ()


def _append(path: Path, line: bytes) -> None:
    with _locked(path) as file:
        size = os.fstat(file).st_size
        # Behind a line that was cut off, by a full disk or a crash, begins a new one.
        whole = not size or os.pread(file, 1, size - 1) == b"\n"
        os.write(file, line if whole else b"\n" + line)
        if size + len(line) > _LARGEST_BYTES:
            _forget_oldest(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The file, open for one writer alone. Raises OSError."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            if _is_locked(file) and os.path.samestat(os.fstat(file), os.lstat(path)):  # it may have been replaced
                yield file
                return
        finally:
            os.close(file)
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(_POLL_S)


def _is_locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _forget_oldest(path: Path) -> None:
    """Replace the file, as a whole or not at all, by its last lines."""
    kept: list[bytes] = []
    size = 0
    for line, _ in reversed(_read(path)[-_KEPT:]):
        size += len(line) + 1
        if size > _KEPT_BYTES:
            break
        kept.append(line + b"\n")
    new = path.with_name(path.name + ".new")
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        text = b"".join(reversed(kept))
        if os.write(file, text) != len(text):
            return
        os.fsync(file)
    finally:
        os.close(file)
    new.replace(path)


def _read(path: Path, models: Sequence[str] = ("",)) -> list[tuple[bytes, Measurement]]:
    """The lines that are understood and have one of these texts in their model, and what they say. Raises OSError."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode):
            return []
        text = os.pread(file, 2 * _LARGEST_BYTES, max(0, about.st_size - 2 * _LARGEST_BYTES))
    finally:
        os.close(file)
    found = []
    # Most lines are of other models: to read only those in question takes a tenth of the time.
    written = [json.dumps(model)[1:-1].encode() for model in models]
    for line in text.split(b"\n"):
        if not any(words in line for words in written):
            continue
        with contextlib.suppress(ValueError, RecursionError):
            measurement = measurement_from_json(json.loads(line))
            if any(model in measurement.setting.model for model in models):
                found.append((line, measurement))
    return found
