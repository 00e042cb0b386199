"""Why vLLM ended: the decisive line of its log in one sentence.

The last line is rarely the cause. A failing worker writes its traceback, then the engine core writes one, then the
API server, and at the very end come warnings about leaked semaphores. And the exit status says little: when a worker
or the engine core dies while serving, vLLM ends with status 0.

Beside the codes of `failure.py` there is "cards-unreachable": the cards cannot exchange data.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from mgpu.backends.failure import LONGEST_LINE, Failure, from_exit_status, shorten
from mgpu.backends.vllm_causes import CAUSES, Cause
from mgpu.backends.vllm_log import parse_line, phase, reached

ENGINE = "vLLM"

LINES_READ = 3000
"""A cause is among the last lines: each process writes a traceback of about a hundred."""


def diagnose(lines: Sequence[str], exit_status: int | None) -> Failure:
    """The cause of vLLM's end, from its log and `Popen.returncode` (None when unknown).

    An end is always a failure here, with status 0 too: the caller asks only when nobody stopped the engine. Never
    raises; reads at most the last `LINES_READ` lines.
    """
    begun = reached(lines[-LINES_READ:]) or ("starting" if len(lines) <= LINES_READ else "listening")
    serving = begun == "listening"
    errors = _errors(lines, serving)
    found = _known_cause(errors, begun) or _dead_worker(errors)
    if found is None and (exit_status is None or exit_status >= 0):
        found = _stopped(lines) or (None if exit_status is None else _last_exception(errors, begun))
    if found is None and serving and exit_status == 0:
        message = "vLLM ended by itself while serving: its engine core died"
        return Failure(code="crashed", message=message, hint="read the end of the log", deterministic=False)
    return found or from_exit_status(ENGINE, exit_status, during=_during(begun))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Error:
    """A line that is no information and no warning, without its prefix."""

    number: int
    process: str | None
    logged: bool
    text: str


_EXCEPTION = re.compile(r"(?P<name>(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit))(?:: (?P<what>.+))?")
# What other processes say once one has failed.
_FOLLOWS = re.compile(
    r"EngineDeadError|Engine core initialization failed|WorkerProc initialization failed|RuntimeError: cancelled"
    r"|KeyError: '/psm_|^RuntimeError: Worker failed with error|resource_tracker"
)
_WORKER_DIED = re.compile(r"Worker proc (?P<worker>\S+) died unexpectedly \(exit code: -(?P<signal>\d+)\)")
# While it loads; 1 is of a core that has told why.
_CORE_DIED = re.compile(r"Failed core proc\(s\): \{.*?'(?P<core>EngineCore[^']*)': -(?P<signal>\d+)")
_ASKED_TO_STOP = "API server: shutdown triggered"
_API_SERVER = re.compile(r"(?i)apiserver")
_MARKER = re.compile(r"[\s^~]*")

_PARTS = {"weights": " for the weights", "kv": " for the KV cache", "compute": " while computing"}
_PART_BEING_ALLOCATED = {
    "loading weights": "weights",
    "compiling": "compute",
    "allocating KV cache": "kv",
    "capturing CUDA graphs": "compute",
    "listening": "compute",
}
_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def _errors(lines: Sequence[str], serving: bool) -> list[_Error]:
    """What may be a cause, oldest first. Once vLLM serves, what was logged before was survived, and so were errors
    of single requests: those the API server reports."""
    start = max(0, len(lines) - LINES_READ)
    if serving:
        ready = (number for number in range(len(lines) - 1, start - 1, -1) if phase(lines[number]) == "listening")
        start = next(ready, start - 1) + 1
    found = []
    for number in range(start, len(lines)):
        entry = parse_line(lines[number])
        if entry.level in ("DEBUG", "INFO", "WARNING") or (serving and _API_SERVER.match(entry.process or "")):
            continue
        found.append(
            _Error(number=number + 1, process=entry.process, logged=entry.level is not None, text=entry.text.strip())
        )
    return found


def _known_cause(errors: Sequence[_Error], begun: str) -> Failure | None:
    for cause in CAUSES:
        for error in reversed(errors):
            if match := cause.pattern.search(error.text):
                return _explain(cause, match, error, begun)
    return None


def _explain(cause: Cause, match: re.Match[str], error: _Error, begun: str) -> Failure:
    groups = match.groupdict()
    words = {name: shorten(text or "", 60) for name, text in groups.items()}
    if "file" in words:
        words["file"] = shorten(PurePath(groups["file"] or "").name, 60) or words["file"]
    memory = cause.code.endswith("out-of-memory")
    on_host = cause.code.startswith("host-")
    ordinal = groups.get("ordinal")
    device = f"CUDA{ordinal}" if ordinal else ("host" if on_host else None)
    part = (cause.part or _PART_BEING_ALLOCATED.get(begun)) if memory else None
    message = cause.message.format(device=device or "a card", **words)
    if part and cause.part is None:
        message += _PARTS[part]
    return Failure(
        code=cause.code,
        message=shorten(message),
        hint=cause.hint.format(**words),
        deterministic=cause.deterministic and begun != "listening",
        line_number=error.number,
        line=shorten(error.text, LONGEST_LINE),
        device=device,
        part=part,
        wanted_bytes=_wanted_bytes(groups) if memory else None,
    )


def _dead_worker(errors: Sequence[_Error]) -> Failure | None:
    """A worker that was killed: the engine core notices, and vLLM then ends as if nothing had happened. Or the engine
    core itself."""
    for error in errors:
        worker, core = _WORKER_DIED.search(error.text), _CORE_DIED.search(error.text)
        if match := worker or core:
            who = f"the vLLM worker {worker['worker']}" if worker else "the engine core of vLLM"
            failure = from_exit_status(who, -int(match["signal"][:3]))
            return Failure(
                code=failure.code,
                message=failure.message,
                hint=failure.hint,
                deterministic=False,
                line_number=error.number,
                line=shorten(error.text, LONGEST_LINE),
            )
    return None


def _stopped(lines: Sequence[str]) -> Failure | None:
    for number in range(len(lines) - 1, max(0, len(lines) - LINES_READ) - 1, -1):
        if _ASKED_TO_STOP in lines[number]:
            return Failure(
                code="stopped",
                message="vLLM was asked to stop from outside, and did",
                deterministic=False,
                line_number=number + 1,
                line=shorten(lines[number], LONGEST_LINE),
            )
    return None


def _last_exception(errors: Sequence[_Error], begun: str) -> Failure | None:
    """The last exception that is no consequence of another; of a worker or the core rather than of the server."""
    found = [
        (place, match)
        for place, error in enumerate(errors)
        if (match := _EXCEPTION.fullmatch(error.text)) and not _FOLLOWS.search(error.text)
    ]
    if not found:
        return None
    inner = [(place, match) for place, match in found if errors[place].process is not None]
    place, match = (inner or found)[-1]
    name = match["name"].rpartition(".")[2]
    what = match["what"] or ""
    if name == "ValidationError" and place + 1 < len(errors):
        what = errors[place + 1].text.removeprefix("Value error, ").partition(" [type=")[0]
    if not what:  # such as a bare AssertionError: the line that raised it says more
        what = next((error.text for error in reversed(errors[:place]) if not _MARKER.fullmatch(error.text)), "")
    return Failure(
        code="exited",
        message=shorten(f"vLLM failed while {_during(begun)}: {name}{': ' if what else ''}{what}"),
        hint="read the end of the log",
        deterministic=False,
        line_number=errors[place].number,
        line=shorten(errors[place].text, LONGEST_LINE),
    )


def _during(begun: str) -> str:
    return "serving" if begun == "listening" else begun


def _wanted_bytes(groups: dict[str, str | None]) -> int | None:
    wanted, unit = groups.get("wanted"), groups.get("unit")
    try:
        return round(float(wanted) * _UNITS[unit]) or None if wanted and unit else None
    except (ValueError, OverflowError):
        return None
