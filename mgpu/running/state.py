"""The state folder: one folder a running instance, held by a lock, with the engine's log."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mgpu.errors import Missing, UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def check_name(name: str) -> str:
    """Return `name` if it can name an instance: letters, digits, dot, dash and underscore, and no way out of the
    state folder. Raises UsageError otherwise."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise UsageError(
            f"--name {name[:80]!r} cannot name an instance",
            hint="use up to 63 letters, digits, dots, dashes and underscores, beginning with a letter or digit",
        )
    return name


def name_from(text: str) -> str:
    """Return an instance name made of a model's name, whatever it contains."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("._-")
    return re.sub(r"\.{2,}", ".", cleaned)[:56].rstrip("._-") or "model"


def state_path() -> Path:
    """Return where the folder of all instances is (XDG state folder), whether it is there or not. Raises Missing."""
    import platformdirs

    try:
        return platformdirs.user_state_path("mgpu")
    except RuntimeError:  # no HOME, and no entry for this user
        raise Missing(
            "this user has no home folder to keep state in", code="state-folder", hint="set HOME or XDG_STATE_HOME"
        ) from None


def state_folder() -> Path:
    """Return the folder of all instances, created with mode 0700. Raises Missing where that cannot be."""
    folder = state_path()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise Missing(
            f"the state folder {folder} cannot be made: {error.strerror}",
            code="state-folder",
            hint="set XDG_STATE_HOME to a folder that can be written",
        ) from None
    return folder


@contextlib.contextmanager
def instance_folder(name: str, *, chosen: bool) -> Iterator[tuple[str, Path]]:
    """Hold the folder of an instance: yields its name and folder, locked until the end.

    A name in use gets a number (`llama-8b-2`), unless the user has `chosen` it: then UsageError is raised.
    """
    with held_folder(name, chosen=chosen) as held:
        yield held.name, held.folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """An instance's name and folder, and the open file by which its lock is held."""

    name: str
    folder: Path
    lock: int


@contextlib.contextmanager
def held_folder(name: str, *, chosen: bool) -> Iterator[Held]:
    """As `instance_folder`, with the lock, to be handed on to a child (`inherited_folder`)."""
    base = state_folder()
    for attempt in range(1, 100):
        candidate = name if attempt == 1 else f"{name}-{attempt}"
        folder = base / candidate
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise Missing(f"{folder} cannot be written: {error.strerror}", code="state-folder") from None
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if chosen:
                    raise _taken(name) from None
                continue
            except OSError as error:
                raise Missing(f"{folder} cannot be locked: {error.strerror}", code="state-folder") from None
            yield Held(name=candidate, folder=folder, lock=lock)
            return
        finally:
            os.close(lock)
    raise Missing(f"a hundred instances named {name} are running", code="state-folder")


@contextlib.contextmanager
def inherited_folder(name: str, lock: int) -> Iterator[Held]:
    """Hold the folder of an instance whose lock the parent has handed on, open as `lock`.

    Raises UsageError when that is not its lock, or somebody was faster.
    """
    folder = state_folder() / check_name(name)
    try:
        if not os.path.samestat(os.fstat(lock), os.lstat(folder / "lock")):
            raise _taken(name)
        os.set_inheritable(lock, False)
        # The system says of a lock who took it, which was the parent: taken anew, it is ours.
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise _taken(name) from None
    try:
        yield Held(name=name, folder=folder, lock=lock)
    finally:
        os.close(lock)


def _taken(name: str) -> UsageError:
    return UsageError(f"an instance named {name} is already running", hint="choose another --name, or stop that one")


def rotate(log_path: Path) -> None:
    """Keep the log of the run before as `engine.log.1`. Raises Missing when the folder cannot be written."""
    try:
        log_path.replace(log_path.with_name(log_path.name + ".1"))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise Missing(f"{log_path} cannot be kept: {error.strerror}", code="state-folder") from None
