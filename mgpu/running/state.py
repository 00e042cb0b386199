"""The state folder: one folder a running instance, held by a lock, with the engine's log."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mgpu.errors import Missing, UsageError

PREVIOUS = ".1"
"""What the name of the log of the run before ends with."""

# Whoever clears an instance removes its folder while it is held.
_MOST_REMOVALS = 100
_OURS_ALONE = 0o700
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
    """Return the folder of all instances, which this user alone can open: made so, or changed. Raises Missing where
    that cannot be, and where it is a link or somebody else's."""
    folder = state_path()
    try:
        os.close(_opened(folder))
    except OSError as error:
        raise _unusable(folder, error) from None
    return folder


def is_state_folder() -> bool:
    """Return whether there is a folder of all instances, and make none. Raises Missing, as `state_folder`, for what is
    there and cannot be looked into: nobody knows what runs then."""
    folder = state_path()
    try:
        directory = _open_own(folder)
        try:
            os.scandir(directory).close()
        finally:
            os.close(directory)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _unusable(folder, error) from None
    return True


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
        lock = _locked(folder)
        if lock is None:
            if chosen:
                raise _taken(name)
            continue
        try:
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


def is_at(file: int, path: Path) -> bool:
    """Return whether the open `file` is the one at `path`: a lock that was removed meanwhile holds nothing."""
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except OSError:
        return False


def _unusable(folder: Path, error: OSError) -> Missing:
    return Missing(
        f"the state folder {folder} cannot be used: {error.strerror}",
        code="state-folder",
        hint="set XDG_STATE_HOME to a folder of your own that can be written",
    )


def _opened(folder: Path) -> int:
    """A folder, made if need be, that this user alone can open. Raises OSError, for a link and somebody else's too."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory = _open_own(folder)
    try:
        if stat.S_IMODE(os.fstat(directory).st_mode) != _OURS_ALONE:
            os.fchmod(directory, _OURS_ALONE)
    except OSError:
        os.close(directory)
        raise
    return directory


def _open_own(folder: Path) -> int:
    """A folder of this user's as it is. Raises OSError, for a link and somebody else's too."""
    try:
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise OSError(error.errno, "it is a link, or no folder") from None
        raise
    if os.fstat(directory).st_uid != os.geteuid():
        os.close(directory)
        raise PermissionError(errno.EPERM, "it is another user's")
    return directory


def _locked(folder: Path) -> int | None:
    """The lock of an instance, open and held; None when somebody has it. Raises Missing."""
    for _ in range(_MOST_REMOVALS):
        try:
            directory = _opened(folder)
            try:
                lock = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
            finally:
                os.close(directory)
        except FileNotFoundError:  # cleared just then
            continue
        except OSError as error:
            raise Missing(f"{folder} cannot be written: {error.strerror}", code="state-folder") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if isinstance(error, BlockingIOError):
                return None
            raise Missing(f"{folder} cannot be locked: {error.strerror}", code="state-folder") from None
        if is_at(lock, folder / "lock"):
            return lock
        os.close(lock)
    raise Missing(f"{folder} is removed again and again", code="state-folder")


def _taken(name: str) -> UsageError:
    return UsageError(
        f"an instance named {name} is already running", hint=f"choose another --name, or mgpu stop {name}"
    )


def rotate(log_path: Path) -> None:
    """Keep the log of the run before as `engine.log.1`, unless it is empty: that tells less than the one before it.
    Raises Missing when the folder cannot be written."""
    try:
        if not log_path.lstat().st_size:
            return
        log_path.replace(log_path.with_name(log_path.name + PREVIOUS))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise Missing(f"{log_path} cannot be kept: {error.strerror}", code="state-folder") from None
