"""The kernel's messages as systemd's journal keeps them, which more users may read than the kernel's own device."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from mgpu.machine import sysfs
from mgpu.machine.patience import Question

# As many lines as the kernel itself keeps; a journal that is slow to search, on a disk that turns, is left alone.
_NEWEST_LINES = 10_000
PATIENCE_S = 2.0
_FIELDS = "MESSAGE,_SOURCE_MONOTONIC_TIMESTAMP"
# What journalctl says where it shows only a part of what there is, to standard error.
_NOT_ALL = re.compile(rb"not seeing messages from|insufficient permissions|[Pp]ermission denied|Access denied")

Record = tuple[float | None, str]


def kernel_records(root: Path = Path("/")) -> tuple[Record, ...]:
    """Return time (s since this start of the kernel, None: not said) and text of the newest 10,000 messages of the
    kernel, oldest first. journalctl, as PATH has it, is asked; under a replaced root for the journal in there.

    Raises an OSError with a reason in words where that proves nothing: FileNotFoundError where there is no journal or
    no journalctl, PermissionError where this user may not read all of it, TimeoutError where there is no answer in 2 s.
    """
    folders = [root / folder for folder in ("var/log/journal", "run/log/journal") if _has_entries(root / folder)]
    program = shutil.which("journalctl")
    if not folders or program is None:
        raise FileNotFoundError("systemd keeps no journal here" if not folders else "journalctl is not installed")
    place = [] if root == Path("/") else [f"--directory={folders[0]}"]
    options = ["-k", "-b", "-o", "json", "--no-pager", f"--output-fields={_FIELDS}", "-n", str(_NEWEST_LINES)]
    said, complaint = _output([program, *place, *options])
    if _NOT_ALL.search(complaint):
        raise PermissionError("this user is in none of the groups that may read the journal (adm, systemd-journal)")
    records = tuple(record for line in said.split(b"\n") if (record := _record(line)) is not None)
    if not records:  # a kernel always says something when it starts
        raise FileNotFoundError("journalctl has no message of the kernel")
    return records


def _has_entries(folder: Path) -> bool:
    return bool(sysfs.children(folder, ".+"))


def _output(command: list[str]) -> tuple[bytes, bytes]:
    """What a program writes to both of its streams. Raises OSError, TimeoutError among them."""
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}

    def ask() -> tuple[bytes, bytes]:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, timeout=PATIENCE_S
        )
        return done.stdout, done.stderr

    try:
        return Question(ask).answer(PATIENCE_S + 0.5)  # what a disk that hangs holds cannot be killed in time
    except (subprocess.TimeoutExpired, TimeoutError):
        raise TimeoutError(f"journalctl gave no answer in {PATIENCE_S:g} s") from None
    except (ValueError, subprocess.SubprocessError) as error:
        raise FileNotFoundError(f"journalctl cannot be started ({error})") from None


def _record(line: bytes) -> Record | None:
    """Time and text of a line of JSON; a text that is not printable is a list of its bytes there."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    message = entry.get("MESSAGE") if isinstance(entry, dict) else None
    if isinstance(message, list) and all(isinstance(byte, int) and 0 <= byte < 256 for byte in message):
        message = bytes(message).decode("utf-8", "replace")
    if not isinstance(message, str):
        return None
    stamp = entry.get("_SOURCE_MONOTONIC_TIMESTAMP")
    timed = isinstance(stamp, str) and re.fullmatch(r"[0-9]{1,18}", stamp)
    return (int(stamp) / 1e6 if timed else None), message
