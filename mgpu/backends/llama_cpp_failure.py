"""Why llama-server ended: the decisive line of its log in one sentence.

Two facts shape the search. The last lines of a log can be lost when the engine fails fast, so that each
cause is recognised by any of its lines. And what was logged before the engine began to listen did not end
it, nor did a compute buffer that was tried again without pipeline parallelism.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from mgpu.backends.failure import LONGEST_LINE, Failure, from_exit_status, shorten
from mgpu.backends.llama_cpp_causes import CAUSES, INVALID_DEVICE, WHY_INVALID_DEVICE, Cause
from mgpu.backends.llama_cpp_log import HOST, DeviceListed, Part, Phase, device_of, parse_line, rpc_names

ENGINE = "llama-server"

LINES_READ = 2000
"""A cause is among the last lines: a backtrace of every thread takes a few hundred of them."""


def diagnose(lines: Sequence[str], exit_status: int | None) -> Failure:
    """The cause of llama-server's end, from its log and `Popen.returncode` (None when unknown).

    An end is always a failure here, with status 0 too: the caller asks only when nobody stopped the engine.
    Never raises; reads at most the last `LINES_READ` lines closely.
    """
    start = _first_line_that_counts(lines)
    window = [(number + 1, lines[number][:_LONGEST_READ]) for number in range(start, len(lines))]
    window = [(number, line) for number, line in window if not _QUOTED.search(line)]
    found = _out_of_memory(window, lines) or _invalid_device(window) or _first_match(CAUSES, window)
    if found is not None:
        return found
    if exit_status in (-6, 134) and _fit_was_running(window):
        return Failure(
            code="crashed",
            message=f"{ENGINE} aborted while it fitted the model to memory by itself",
            hint="this should not happen: mgpu turns that off; the log shows the command",
            deterministic=True,
        )
    if exit_status == 0 and any("cleaning up before exit" in line for _, line in window):
        message = f"{ENGINE} was asked to stop from outside, and did"
        return Failure(code="stopped", message=message, deterministic=False)
    during = _ACTIVITIES.get(reached := _phase(lines), reached)
    return from_exit_status(ENGINE, exit_status, during=during, last_words=_last_words(window))


_LONGEST_READ = 4096

_ALLOCATION_FAILED = re.compile(
    r"failed to allocate (?P<device>\S+) buffer of size (?P<bytes>\d+)"
    r"|unable to allocate (?P<unable>\S+) buffer"
    r"|allocating (?P<mib>\d+(?:\.\d+)?) MiB on device (?P<ordinal>\d+): cudaMalloc failed"
    r"|(?P<api>CUDA|ROCm|HIP|MUSA) error: out of memory"
    r"|Device memory allocation of size (?P<vulkan_bytes>\d+) failed|OutOfDeviceMemory"
    r"|failed to allocate buffer for (?:kv|rs) cache"
    r"|failed to allocate compute (?:pp |tg )?buffers"
    r"|GGML_ASSERT\(meta_buf_ctx->bufs"
    r"|(?P<ram>ggml_aligned_malloc: insufficient memory|std::bad_alloc|Cannot allocate memory)"
)
_CURRENT_DEVICE = re.compile(r"^ *current device: (?P<ordinal>\d+)")
_SURVIVED = ("listening on http", "retrying without pipeline parallelism")
# Text that the model file brings along is printed too, and could look like anything.
_QUOTED = re.compile(r"\bprint_info: |: - kv +\d+:")

_ERROR_LINE = re.compile(r"^[\d.]+ E (?P<text>.*)")
_LOG_LINE = re.compile(r"^\d+(?:\.\d+){2,3} [A-Z] |^\s")
_FOLLOWS_ANY_ERROR = re.compile(r"exiting due to|failed to load model|failed to create.context")
_DEBUGGER = re.compile(r"^\[New LWP|^#\d+ |^\[Thread debugging|^Using host libthread|^\[Inferior|^0x|^__|^\d+\t")

_PARTS: dict[Part, str] = {"weights": "weights", "kv": "KV cache", "compute": "compute buffers"}
_MEMORY_HINTS: dict[Part, str] = {
    "weights": "a smaller --quant, more cards (--gpus), or --offload allow",
    "kv": "a smaller --ctx or --parallel, or --kv-type q8_0",
    "compute": "a smaller --ubatch or --ctx, or a larger --headroom",
}
_HOST_HINT = "a smaller --ctx or --quant, or close programs that hold RAM"

_PART_BEING_ALLOCATED: dict[str | None, Part] = {
    "allocating KV cache": "kv",
    "reserving compute buffers": "compute",
    "warming up": "compute",
    "listening": "compute",
}
_ACTIVITIES: dict[str | None, str] = {
    "devices": "starting",
    "reading header": "reading the model's header",
    "listening": "serving",
}

_Window = Sequence[tuple[int, str]]


def _first_line_that_counts(lines: Sequence[str]) -> int:
    earliest = max(0, len(lines) - LINES_READ)
    for number in range(len(lines) - 1, earliest - 1, -1):
        if any(sign in lines[number][:_LONGEST_READ] for sign in _SURVIVED):
            return number + 1
    return earliest


def _invalid_device(window: _Window) -> Failure | None:
    found = _first_match((INVALID_DEVICE,), window)
    return found and (_first_match(WHY_INVALID_DEVICE, window) or found)


def _first_match(causes: Iterable[Cause], window: _Window) -> Failure | None:
    for cause in causes:
        for place in range(len(window) - 1, -1, -1):
            if match := cause.pattern.search(window[place][1]):
                return _explain(cause, match, window, place)
    return None


def _explain(cause: Cause, match: re.Match[str], window: _Window, place: int) -> Failure:
    groups = match.groupdict()
    device = _current_device(groups.get("what"), window, place)
    words = {name: shorten(text or "", 60) for name, text in groups.items()}
    if "file" in words:
        words["file"] = shorten(PurePath(groups["file"]).name, 60) or words["file"]
    number, line = window[place]
    return Failure(
        code=cause.code,
        message=shorten(cause.message.format(device=device or "a card", **words)),
        hint=cause.hint.format(**words),
        deterministic=cause.deterministic,
        line_number=number,
        line=shorten(line, LONGEST_LINE),
        device=device,
    )


def _out_of_memory(window: _Window, lines: Sequence[str]) -> Failure | None:
    """All lines of a refused allocation together: one has the size, another what it was for."""
    device: str | None = None
    part: Part | None = None
    wanted_bytes: int | None = None
    decisive: tuple[int, str] | None = None
    for place, (number, line) in enumerate(window):
        match = _ALLOCATION_FAILED.search(line)
        if match is None:
            continue
        part = _part_named(line) or part
        device = _device_named(match, window, place, lines) or device
        size = _size_named(match)
        if decisive is None or size is not None:
            decisive = (number, line)
        wanted_bytes = size if size is not None else wanted_bytes
    if decisive is None:
        return None
    number, line = decisive
    reached = _phase(lines[:number])
    if part is None:
        part = _PART_BEING_ALLOCATED.get(reached, "weights")
    where = "in host RAM" if device == HOST else f"on {device or 'a card'}"
    asked = f": {_readable(wanted_bytes)} asked for the" if wanted_bytes else " for the"
    return Failure(
        code="host-out-of-memory" if device == HOST else "out-of-memory",
        message=shorten(f"out of memory {where}{asked} {_PARTS[part]}"),
        hint=_HOST_HINT if device == HOST else _MEMORY_HINTS[part],
        deterministic=reached != "listening",
        line_number=number,
        line=shorten(line, LONGEST_LINE),
        device=device,
        part=part,
        wanted_bytes=wanted_bytes,
    )


def _part_named(line: str) -> Part | None:
    if "gallocr" in line or "compute" in line or " error: out of memory" in line:
        return "compute"
    if "kv cache" in line or "rs cache" in line:
        return "kv"
    return "weights" if "unable to allocate" in line else None


def _device_named(match: re.Match[str], window: _Window, place: int, lines: Sequence[str]) -> str | None:
    if match["ram"]:
        return HOST
    buffer = match["device"] or match["unable"]
    if buffer is None:
        return _current_device(match["api"], window, place)
    events = (parse_line(line) for line in lines if "MiB free)" in line)
    latest = {event.id: event for event in events if isinstance(event, DeviceListed)}
    return device_of(buffer, rpc_names(latest.values()))


def _current_device(api: str | None, window: _Window, place: int) -> str | None:
    """The card a CUDA or ROCm error is about: its number is on the line after the error."""
    if place + 1 == len(window) or not (match := _CURRENT_DEVICE.search(window[place + 1][1])):
        return None
    return f"{'ROCm' if api == 'HIP' else api or 'CUDA'}{match['ordinal']}"


def _size_named(match: re.Match[str]) -> int | None:
    if digits := match["bytes"] or match["vulkan_bytes"]:
        return int(digits)
    return round(float(match["mib"]) * (1 << 20)) if match["mib"] else None


def _fit_was_running(window: _Window) -> bool:
    running = False
    for _, line in window:
        if "common_params_fit_impl: getting device memory" in line:
            running = True
        elif "fitting params to free memory took" in line:
            running = False
    return running


def _phase(lines: Sequence[str]) -> str | None:
    """The last phase of `PHASES` that was reached; a log too long to say is that of a serving engine."""
    for line in reversed(lines[-LINES_READ:]):
        if isinstance(event := parse_line(line), Phase):
            return event.name
    return "listening" if len(lines) > LINES_READ else None


def _last_words(window: _Window) -> str | None:
    """The last error the engine logged, or the last line that is not part of the log proper."""
    for _, line in reversed(window):
        if match := _ERROR_LINE.match(line):
            if not _FOLLOWS_ANY_ERROR.search(line):
                return shorten(match["text"])
        elif line.strip() and not _LOG_LINE.match(line) and not _DEBUGGER.match(line):
            return shorten(line)
    return None


def _readable(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):.1f} GiB" if size_bytes >= 1 << 30 else f"{size_bytes / (1 << 20):.0f} MiB"
