"""The instances on disk: a folder for each, with its record, readable after any crash.

    NAME/lock            held by the supervisor while it lives (state.py)
    NAME/instance.json   the record, replaced as a whole
    NAME/engine.pid      who the engine is, on a line of its own: found although the record is damaged
    NAME/engine.log      what the engine writes, which also tells who it is (identity.py)
    NAME/supervisor.log  what mgpu itself says, where nobody sees it

A supervisor starts the engine, then writes down who it is. Should it be killed between the two, the engine is still
found as the one that writes to the log.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mgpu.errors import Missing, NoAnswer, UsageError
from mgpu.running.identity import File, alive, in_groups, lock_holders, writers
from mgpu.running.instance import Instance, ProcessId, instance_from_json, instance_to_json
from mgpu.running.state import check_name, state_folder, state_path

RECORD = "instance.json"
ENGINE = "engine.pid"
LOG = "engine.log"
SUPERVISOR_LOG = "supervisor.log"
LOCK = "lock"

_LOGS = (LOG, f"{LOG}.1")
_LARGEST_RECORD_BYTES = 1 << 20
_LARGEST_PID = 1 << 22  # linux/threads.h: PID_MAX_LIMIT on 64 bits
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What is known of an instance: its record, and who lives of it now.

    `instance` is None where the record cannot be used, for the reason `problem`: its state is unknown then.
    `supervisor` is who looks after it; `engine` are the processes of its engine that live, the first one first.
    """

    name: str
    folder: Path
    instance: Instance | None
    problem: str | None
    supervisor: ProcessId | None
    engine: tuple[ProcessId, ...]

    @property
    def is_over(self) -> bool:
        """Whether nothing of it lives any more."""
        return self.supervisor is None and not self.engine

    @property
    def is_orphaned(self) -> bool:
        """Whether its engine lives and nobody looks after it."""
        return self.supervisor is None and bool(self.engine)


def write(instance: Instance) -> None:
    """Replace the record, as a whole or not at all; blocks until it is on the disk. For the holder of the lock alone.

    Raises Missing (code "disk-full" or "state-folder") and leaves the record before as it was.
    """
    text = json.dumps(instance_to_json(instance), indent=1, allow_nan=False)
    _replace(state_folder() / check_name(instance.name), RECORD, text.encode(errors="replace") + b"\n")


def write_engine(name: str, engine: ProcessId) -> None:
    """Write down who the engine is; to be called at once after its start. As `write`, otherwise."""
    line = f"{engine.pid} {engine.started_ticks} {engine.boot_id}\n"
    _replace(state_folder() / check_name(name), ENGINE, line.encode())


def read(folder: Path) -> Entry:
    """Return what is known of the instance in `folder`; never raises, whatever is in there."""
    return _entries([folder])[0]


def instances() -> tuple[Entry, ...]:
    """Return this user's instances by name: those that live, and the dead that were not cleared. Folders that are
    links, somebody else's, or hold nothing of an instance are left out. Raises Missing where there is no home."""
    found = _entries(folders())
    return tuple(entry for entry in found if entry.instance or entry.problem or not entry.is_over)


def folders() -> tuple[Path, ...]:
    """Return this user's folders of instances by name, those without a record too. Raises Missing."""
    try:
        with os.scandir(state_path()) as entries:
            names = [entry.name for entry in entries if _is_name(entry.name) and _is_own_folder(Path(entry.path))]
    except OSError:
        return ()
    return tuple(state_path() / name for name in sorted(names))


def clear(name: str) -> None:
    """Forget a dead instance: remove its record, its logs and what its engine left in its folder.

    The lock stays: removed, it could be held by two. Raises NoAnswer when there is none of that name (code
    "unknown-instance") or it lives (code "instance-lives"), Missing when something cannot be removed.
    """
    folder = state_path() / check_name(name)
    if not _is_own_folder(folder):
        raise NoAnswer(f"there is no instance named {name}", code="unknown-instance", hint="mgpu ps lists them")
    if read(folder).engine:
        raise _living(name, "its engine still runs", hint=f"mgpu stop {name}   or   mgpu reap")
    try:
        with _locked(folder):
            for entry in list(os.scandir(folder)):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                elif entry.name != LOCK:
                    Path(entry.path).unlink(missing_ok=True)
    except BlockingIOError:
        raise _living(name, "it is running", hint=f"mgpu stop {name}") from None
    except OSError as error:
        raise Missing(f"{folder} cannot be cleared: {error.strerror}", code="state-folder") from None


def forget(name: str) -> None:
    """Remove the record of an instance that ended as it was asked to, and keep its logs. For the holder of the lock."""
    folder = state_path() / check_name(name)
    for file in (RECORD, ENGINE):
        with contextlib.suppress(OSError):
            (folder / file).unlink()


def _living(name: str, why: str, *, hint: str) -> NoAnswer:
    return NoAnswer(f"{name} cannot be cleared: {why}", code="instance-lives", hint=hint)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def _entries(paths: Sequence[Path]) -> list[Entry]:
    """All at once: the kernel's lists are read once for all of them."""
    records = {path: _record(path) for path in paths}
    locks = {path: file for path in paths if (file := _file(path / LOCK))}
    holders = lock_holders(set(locks.values()))
    supervisors = {path: holders.get(locks[path]) if path in locks else None for path in paths}
    for path, (instance, _) in records.items():
        # Its folder may have been removed under it, and the lock with that.
        if instance and not instance.state.is_over and supervisors[path] is None and alive(instance.supervisor):
            supervisors[path] = instance.supervisor
    # What a sound record of a living supervisor says is enough.
    unsure = [path for path in paths if supervisors[path] is None or records[path][0] is None]
    logs = {path: [file for name in _LOGS if (file := _file(path / name))] for path in unsure}
    writing = writers({file for files in logs.values() for file in files})

    leaders = {path: _leaders(path, records[path][0]) for path in paths}
    groups = in_groups({leader for each in leaders.values() for leader in each})

    def engine(path: Path) -> tuple[ProcessId, ...]:
        found = [leader for leader in leaders[path] if alive(leader)]
        found += [each for leader in leaders[path] for each in groups[leader]]
        found += [each for file in logs.get(path, ()) for each in writing.get(file, ())]
        # Between an engine's start and its program's begin the log is open in the supervisor, too.
        return tuple(each for each in dict.fromkeys(found) if each != supervisors[path])

    return [
        Entry(
            name=path.name,
            folder=path,
            instance=records[path][0],
            problem=records[path][1],
            supervisor=supervisors[path],
            engine=engine(path),
        )
        for path in paths
    ]


def _leaders(folder: Path, instance: Instance | None) -> list[ProcessId]:
    """Who is written down as the engine: the record and the line may be a restart apart."""
    return list(dict.fromkeys(each for each in (instance.engine if instance else None, _engine(folder)) if each))


def _record(folder: Path) -> tuple[Instance | None, str | None]:
    """The record, or why it cannot be used; neither where there is none."""
    try:
        text = _read(folder, RECORD)
        if text is None:
            return None, None
        if len(text) > _LARGEST_RECORD_BYTES:
            raise ValueError("it is too large")
        instance = instance_from_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        return None, f"the record is damaged: {str(error)[:200] or type(error).__name__}"
    except OSError as error:
        return None, f"the record cannot be read: {error.strerror}"
    if instance.name != folder.name:
        return None, f"the record is another instance's: {instance.name}"
    return instance, None


def _engine(folder: Path) -> ProcessId | None:
    """Who the engine is by its line; None unless that is whole and can be."""
    try:
        text = (_read(folder, ENGINE) or b"")[:200].decode("ascii")
        pid, started_ticks, boot_id = text.removesuffix("\n").split(" ") if text.endswith("\n") else ("", "", "")
        engine = ProcessId(pid=int(pid), started_ticks=int(started_ticks), boot_id=boot_id)
    except (OSError, ValueError):
        return None
    return engine if 1 < engine.pid <= _LARGEST_PID else None


def _read(folder: Path, name: str) -> bytes | None:
    """A file of this user in a folder of this user, neither of them a link; None where that is not what is there.
    Reads at most a byte more than a record may have. Raises OSError."""
    try:
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            # A pipe in its place must not be waited for.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.open(name, flags, dir_fd=directory)
        finally:
            os.close(directory)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            return None
        raise
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return None
        with os.fdopen(file, "rb", closefd=False) as opened:
            return opened.read(_LARGEST_RECORD_BYTES + 1)
    finally:
        os.close(file)


def _replace(folder: Path, name: str, content: bytes) -> None:
    """Put a file in place, whole: the one before it stays until this one is on the disk."""
    temporary = f"{name}.new"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            with contextlib.suppress(FileNotFoundError):  # left by one who was killed
                os.unlink(temporary, dir_fd=directory)
            try:
                _write(temporary, directory, content)
                os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=directory)
                raise
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        code = "disk-full" if error.errno in _DISK_FULL else "state-folder"
        raise Missing(f"{folder / name} cannot be written: {error.strerror}", code=code) from None


def _write(name: str, directory: int, content: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(name, flags, 0o600, dir_fd=directory)
    try:
        while content:
            content = content[os.write(file, content) :]
        os.fsync(file)
    finally:
        os.close(file)


def _file(path: Path) -> File | None:
    """The device and inode of a file of this user; None for links and what else there may be."""
    try:
        status = path.lstat()
    except OSError:
        return None
    own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
    return (status.st_dev, status.st_ino) if own else None


def _is_own_folder(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def _is_name(text: str) -> bool:
    try:
        return bool(check_name(text))
    except UsageError:
        return False
