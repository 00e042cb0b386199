"""What escapes as no MgpuError is a bug in mgpu: a log file for the report, and one calm sentence."""

from __future__ import annotations

import os
import platform
import traceback
from datetime import UTC, datetime
from pathlib import Path

from mgpu import __version__
from mgpu.errors import MgpuError

_MOST_REPORTS = 10
_SECRET_OPTIONS = ("--api-key", "--hf-token", "-hft")


def report_bug(bug: BaseException, arguments: list[str]) -> MgpuError:
    """Write a report of `bug` and return the error (exit code 70) that names its path."""
    text = "".join(traceback.format_exception(bug))
    shown = [_hidden(arguments, i) for i in range(len(arguments))]
    report = (
        f"mgpu {__version__}, Python {platform.python_version()}, {platform.platform()}\narguments: {shown}\n\n{text}"
    )
    try:
        path = str(_write(report))
    except (OSError, RuntimeError, MgpuError):
        path = "nowhere (the state folder cannot be written); run with python -X faulthandler -m mgpu"
    return MgpuError(
        f"this is a bug in mgpu ({type(bug).__name__}: {bug})"[:300],
        code="bug",
        hint=f"please report it with {path}",
    )


def _write(report: str) -> Path:
    from mgpu.running.state import state_folder

    folder = state_folder()
    path = folder / _name()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o600), "w", errors="backslashreplace") as file:
        file.write(report)
    for old in sorted(folder.glob("bug-*.log"))[:-_MOST_REPORTS]:
        old.unlink(missing_ok=True)
    return path


def _name() -> str:
    return f"bug-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{os.getpid()}.log"


def _hidden(arguments: list[str], index: int) -> str:
    word = arguments[index]
    if index and arguments[index - 1] in _SECRET_OPTIONS:
        return "***"
    name, equals, _ = word.partition("=")
    return f"{name}=***" if equals and name in _SECRET_OPTIONS else word
