"""Who a process is, and which processes belong to an engine: asked of the kernel, never of names.

An engine is started with a mark in its environment, which everything inherits that it starts. While its first process
is there, so is its process group: the system gives a number to nobody else before that is gone. Once it is gone, the
number may be anybody's, and whoever is in a group of that number has to be known by more than that.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
from collections.abc import Collection, Iterator
from pathlib import Path

from mgpu.running.instance import ProcessId

_PROC = Path("/proc")
_GONE = ("Z", "X")
_ACCESS_MODE = 3  # the bits of open(2)'s flags that tell reading from writing

MARK = "MGPU_INSTANCE"
"""The variable in an engine's environment that says whose it is: the instance's mark, a dot, and which start it was."""

File = tuple[int, int]
"""A file by its device and inode."""


@functools.cache
def boot_id() -> str:
    """Return what the system calls its time since it was started; empty where that is hidden, in some containers."""
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def identity(pid: int) -> ProcessId | None:
    """Return who has the number `pid` now; None for nobody, and for a zombie, who is dead."""
    found = _stat(pid)
    if found is None:
        return None
    state, _, started_ticks = found
    return None if state in _GONE else ProcessId(pid=pid, started_ticks=started_ticks, boot_id=boot_id())


def alive(process: ProcessId) -> bool:
    """Whether exactly this process still runs: a zombie is dead, and another process with its number is not it."""
    return identity(process.pid) == process


def is_stopped(process: ProcessId) -> bool:
    """Whether this process runs and does nothing, by SIGSTOP or Ctrl-Z."""
    found = _stat(process.pid)
    return found is not None and found[0] == "T" and alive(process)


def send(process: ProcessId, number: int) -> bool:
    """Signal exactly this process, and never another one that has got its number; returns whether it was there.

    Raises PermissionError when it is another user's.
    """
    try:
        handle = os.pidfd_open(process.pid)
    except OSError as error:
        if error.errno != errno.ENOSYS:  # there are no handles before Linux 5.3, and in some sandboxes
            return False
        handle = None
    try:
        # Looked at after the handle was taken: whoever it is for then, the signal is for nobody else.
        if not alive(process):
            return False
        if _user(process.pid) != os.geteuid():
            raise PermissionError(errno.EPERM, "it is another user's")
        if handle is None:
            os.kill(process.pid, number)
        else:
            signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    finally:
        if handle is not None:
            os.close(handle)
    return True


def is_there(process: ProcessId) -> bool:
    """Whether the number is still this process's: it lives, or is dead and was not waited for."""
    found = _stat(process.pid)
    return found is not None and found[2] == process.started_ticks and process.boot_id == boot_id()


def in_groups(leaders: Collection[ProcessId]) -> dict[ProcessId, tuple[ProcessId, ...]]:
    """Return who lives in the process group with the number of each of `leaders`, and has not begun before it.

    They are its own while `is_there` says so of it afterwards. Else they may be another group's that has got the
    number since, and whose leader has ended, too.
    """
    stats = {pid: stat for pid in (_processes() if leaders else ()) if (stat := _stat(pid))}
    found: dict[ProcessId, tuple[ProcessId, ...]] = {}
    for leader in leaders:
        now = stats.get(leader.pid)
        lost = leader.boot_id != boot_id() or (now and now[2] != leader.started_ticks)
        found[leader] = tuple(
            ProcessId(pid=pid, started_ticks=started_ticks, boot_id=leader.boot_id)
            for pid, (state, group, started_ticks) in stats.items()
            if not lost and state not in _GONE and group == leader.pid and started_ticks >= leader.started_ticks
        )
    return found


def marked(marks: Collection[str]) -> dict[str, tuple[ProcessId, ...]]:
    """Return who of this user was started with each of `marks`, by the `MARK` in their environments: all that comes
    before its first dot. Those that nobody has are left out."""
    found: dict[str, tuple[ProcessId, ...]] = {}
    for pid in _own_processes() if marks else ():
        before = identity(pid)
        mark = _mark(pid)
        # Asked twice: the number may have gone to somebody else between the two.
        if mark in marks and before and identity(pid) == before:
            found[mark] = (*found.get(mark, ()), before)
    return found


def writes_out_to(process: ProcessId, files: Collection[File]) -> bool:
    """Whether the standard output or error of a process of this user is one of `files`."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            folder = _PROC / str(process.pid)
            status = (folder / "fd" / str(number)).stat()
            own = folder.stat().st_uid == os.geteuid()
            if own and (status.st_dev, status.st_ino) in files and alive(process):
                return True
    return False


def writers(files: Collection[File]) -> dict[File, tuple[ProcessId, ...]]:
    """Return who of this user has each of `files` open for writing; those that nobody has are left out."""
    found: dict[File, tuple[ProcessId, ...]] = {}
    for pid in _own_processes() if files else ():
        held = {file for file, flags, _ in _open_files(pid, files) if flags & _ACCESS_MODE in (os.O_WRONLY, os.O_RDWR)}
        process = identity(pid) if held else None
        if process:
            found |= {file: (*found.get(file, ()), process) for file in held}
    return found


def lock_holders(files: Collection[File]) -> dict[File, ProcessId]:
    """Return who of this user holds each of `files` with flock(2). Whoever has opened it with O_NONBLOCK holds it for a
    moment only and is left out. Nothing is locked to find out, so nobody who wants a lock just then is disturbed."""
    found: dict[File, ProcessId] = {}
    for pid in _lockers() if files else ():
        held = {file for file, flags, locked in _open_files(pid, files) if locked and not flags & os.O_NONBLOCK}
        process = identity(pid) if held else None
        if process:
            found |= dict.fromkeys(held, process)
    return found


def _stat(pid: int) -> tuple[str, int, int] | None:
    """State, process group and start (proc(5): the name stands in brackets and may hold anything)."""
    try:
        fields = (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[2]), int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def _mark(pid: int) -> str:
    try:
        variables = (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:  # gone, or nobody's to look into
        return ""
    begin = f"{MARK}=".encode()
    value = next((each[len(begin) :] for each in variables if each.startswith(begin)), b"")
    return value.partition(b".")[0].decode(errors="replace")


def _user(pid: int) -> int | None:
    """Who a process acts for. Its folder's owner is root where it may not be looked into."""
    try:
        lines = (_PROC / str(pid) / "status").read_text(errors="replace").splitlines()
        return next(int(line.split()[2]) for line in lines if line.startswith("Uid:"))
    except (OSError, ValueError, StopIteration):
        return None


def _processes() -> Iterator[int]:
    yield from (int(name) for name in os.listdir(_PROC) if name.isdecimal())  # noqa: PTH208  names, not paths


def _own_processes() -> Iterator[int]:
    user = os.geteuid()
    for pid in _processes():
        with contextlib.suppress(OSError):
            if (_PROC / str(pid)).stat().st_uid == user:
                yield pid


def _lockers() -> set[int]:
    """Whoever of this user has taken a lock by flock(2): `1: FLOCK  ADVISORY  WRITE 7016 fe:00:2850831 0 EOF`. The
    file's device is not what stat(2) says on some file systems, so it is not looked at."""
    try:
        lines = (_PROC / "locks").read_text().splitlines()
    except OSError:
        return set()
    fields = (line.split() for line in lines)
    pids = {int(each[4]) for each in fields if len(each) > 4 and each[1] == "FLOCK" and each[4].isdecimal()}
    return pids.intersection(_own_processes())


def _open_files(pid: int, files: Collection[File]) -> Iterator[tuple[File, int, bool]]:
    """Which of `files` a process has open, with which flags, and whether it holds a lock by that."""
    folder = _PROC / str(pid)
    try:
        numbers = os.listdir(folder / "fd")  # noqa: PTH208  names, not paths
    except OSError:  # gone, or nobody's to look into
        return
    for number in numbers:
        try:
            status = os.stat(folder / "fd" / number)  # noqa: PTH116  as many as there are open files on the machine
            if (status.st_dev, status.st_ino) not in files:
                continue
            info = (folder / "fdinfo" / number).read_text()
        except OSError:
            continue
        flags = next((line.split()[1] for line in info.splitlines() if line.startswith("flags:")), "0")
        yield (status.st_dev, status.st_ino), int(flags, 8), "\nlock:" in info
