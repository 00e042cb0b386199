"""mgpu's end of the reaper (reaper.py): its start, and the pipe that holds it back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mgpu.errors import EngineFailed, Missing
from mgpu.running import reaper

DEFAULT_GRACE_S = 10.0


class Watch:
    """A running reaper. mgpu's end of the pipe is in here: closing it, or dying with it, sets the reaper to work."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """The reaper's process id."""
        return self._process.pid

    def close(self, *, at_once: bool = False) -> None:
        """End whatever of the engine still runs, `at_once` or after its grace, and remove what it left; blocks until
        that is done.

        After the engine was stopped this takes a moment; else at most the grace period and 23 s. May be called again.
        """
        if self._process.stdin is not None and not self._process.stdin.closed:
            try:
                if at_once:
                    self._process.stdin.write(b"!")
                self._process.stdin.close()
            except OSError:
                pass  # the reaper is gone
        self._process.wait()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def watch(
    engine_pid: int,
    folder: Path | None = None,
    *,
    mark: str = "",
    notes: Path | None = None,
    grace_s: float = DEFAULT_GRACE_S,
) -> Watch:
    """Start a reaper for the engine that leads the process group `engine_pid` and has `folder` as its TMPDIR.

    `mark` is the value of MGPU_INSTANCE that was made for this start of the engine: whatever carries it is the
    engine's, in its group or not. In `notes` the reaper writes down what it has seen of the engine (segments.py), and
    holds that file by flock(2) while it lives: should it be killed, too, others can do the rest.

    Call it at once after the engine's start, before the engine was waited for: what is in /dev/shm by then is taken
    for somebody else's. It blocks until the reaper is awake, some hundredths of a second. When mgpu is gone, the
    engine gets SIGTERM, `grace_s` seconds, and SIGKILL. `folder` is removed then, if it is a folder of this user, and
    the one that is there now. Raises EngineFailed (code "reaper-failed") if no reaper starts.
    """
    started = reaper.started_ticks(engine_pid)
    program = [sys.executable, "-I", "-S", reaper.__file__]
    process = subprocess.Popen(
        [*program, str(engine_pid), str(started), str(grace_s), str(folder or ""), str(notes or ""), mark],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )
    assert process.stdout is not None
    with process.stdout:
        awake = process.stdout.read(1)
    guard = Watch(process)
    if not awake:
        guard.close()
        raise EngineFailed("the program that ends engines when mgpu is gone did not start", code="reaper-failed")
    return guard


def private_folder(path: Path) -> Path:
    """Return `path` as a new and empty folder that this user alone can open, fit to be an engine's TMPDIR.

    What an earlier engine left there is removed. Raises Missing (code "temporary-folder") when it cannot be made, or
    is somebody else's.
    """
    reaper.remove_folder(str(path))
    try:
        path.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise Missing(
            f"{path} cannot be made for the engine's temporary files: {error.strerror}", code="temporary-folder"
        ) from None
    return path
