"""Asking an engine what it would hold: started, heard, and ended before it loads anything."""

from __future__ import annotations

import contextlib
import errno
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from mgpu.backends.backend import Launch
from mgpu.backends.engine import engine_environment
from mgpu.backends.llama_cpp_failure import diagnose
from mgpu.backends.llama_cpp_log import DeviceBuffers
from mgpu.backends.llama_cpp_projection import projecting, projection, refusal
from mgpu.errors import EngineFailed, Missing
from mgpu.running.process import EngineProcess

# A 120B mixture of experts takes 5 s on two slow cores; a driver that wakes sleeping cards some seconds more.
_LIMIT_S = 60.0
_POLL_S = 0.02


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """A folder for headers and logs that is gone afterwards. Raises Missing where there is no room for them."""
    try:
        with tempfile.TemporaryDirectory(prefix="mgpu-") as folder:
            yield Path(folder)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise Missing(
            f"the model's header cannot be written to {error.filename or 'the temporary folder'}: "
            f"{error.strerror or error}",
            code="disk-full" if full else "folder-unwritable",
            hint="set TMPDIR to a folder with some megabytes of room",
        ) from error


def project(launch: Launch, folder: Path) -> Mapping[str, DeviceBuffers]:
    """Return what the engine says each of its devices and the host would hold with `launch`.

    Its log goes to `folder`. The engine is gone when this returns, however it does. Raises EngineFailed: code
    "projection-refused" if it projects nothing for such a launch, "stalled" if it says nothing for a minute, and
    the cause's own code if it ended.
    """
    process = EngineProcess.start(
        projecting(launch.argv), env=engine_environment() | dict(launch.env), log_path=folder / "engine.log"
    )
    try:
        return _heard(process)
    finally:
        process.stop(((signal.SIGKILL, 10.0),))


def _heard(process: EngineProcess) -> Mapping[str, DeviceBuffers]:
    deadline = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline:
        status = process.poll()  # before the log is read: what it wrote last is then in it
        lines = process.log_lines()
        if found := projection(lines):
            return found
        if status is not None:
            failure = diagnose(lines, status)
            hint = "leave --exact out" if failure.code == "crashed" else failure.hint
            raise EngineFailed(failure.message, code=failure.code, hint=hint)
        if why := refusal(lines):
            raise EngineFailed(
                f"llama-server does not project the memory of this plan: {why}",
                code="projection-refused",
                hint="leave --exact out, or ask it with other options",
            )
        time.sleep(_POLL_S)
    raise EngineFailed(
        f"llama-server said nothing of its memory within {_LIMIT_S:.0f} s",
        code="stalled",
        hint="a card or RPC server that hangs looks like this; mgpu backends shows whether each still answers",
    )
