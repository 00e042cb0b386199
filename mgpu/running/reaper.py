"""The reaper: a tiny program that outlives mgpu, so that no engine does.

It holds one end of a pipe whose other end is in mgpu. When that closes, however mgpu ended, the reaper ends what is
left of the engine's process group and removes what the engine left in its temporary folder and in /dev/shm. The
kernel's own way (PR_SET_PDEATHSIG) ends the engine's first process alone, and vLLM's workers then live on with the
cards' memory in their hands.

It is started (guard.py) as `python -I -S reaper.py` and imports nothing but small modules of the standard library: it
has 5 MiB of its own, once an engine.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import stat
import sys
import time

TYPE_CHECKING = False  # without importing typing, which would cost a megabyte
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

# What the engine made less than this before a sudden end cannot be told to be its own any more, and stays.
_LOOK_EVERY_S = 0.5
_MOST_LOOKS = 20
_POLL_S = 0.05
# Nobody tells those to end whose leader was killed; what it had told is gone by then.
_ORPHANS_S = 1.0
# A killed process that computes on a card may take seconds to leave the driver.
_KILL_LIMIT_S = 10.0
# Python's resource tracker unlinks what the killed left in /dev/shm once their ends of its pipe have closed.
_TRACKER_LIMIT_S = 3.0
# All of that: the orphans', twice the kill's, and the tracker's. What was a grace period before comes on top.
LONGEST_S = _ORPHANS_S + 2 * _KILL_LIMIT_S + _TRACKER_LIMIT_S
_RECORD = "instance.json"
_SHARED_MEMORY = "/dev/shm"  # noqa: S108  only ever read, and emptied of what is known to be the engine's


def main(argv: list[str]) -> int:
    """The reaper itself: ENGINE_PID START_TIME GRACE_S FOLDER NOTES MARK, with the pipe as standard input."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    grace_s, folder, notes, mark = float(argv[2]), argv[3], _Notes(argv[4]), argv[5]
    group = _Group(int(argv[0]), int(argv[1]), mark)
    inode = _inode(folder)
    segments = _Segments(group, notes)
    os.write(1, b"!")
    os.close(1)
    while (heard := _heard(_LOOK_EVERY_S)) != b"":
        grace_s = 0.0 if heard else grace_s
        segments.look()
        group.look()
    notes.tell_time()
    segments.look(last=True)
    group.end(grace_s)
    segments.remove()
    if inode is not None and _inode(folder) == inode:  # else it is a later engine's
        remove_folder(folder)
    if not group.members():
        notes.remove()
    return 0


class _Process:
    """A process, told apart from later ones of the same number by when it started (in clock ticks since boot)."""

    __slots__ = ("group", "pid", "started", "zombie")

    def __init__(self, pid: int, group: int, started: int, zombie: bool) -> None:
        self.pid = pid
        self.group = group
        self.started = started
        self.zombie = zombie

    @property
    def tracker(self) -> bool:
        """Whether it is Python's resource tracker, which cleans up after its parent's death and then ends."""
        return b"multiprocessing.resource_tracker" in _read(f"/proc/{self.pid}/cmdline")


class _Group:
    """The engine's process group, and what else carries its mark. A group's number cannot go to another one while
    somebody is in it, so it is the engine's until it has been seen empty, or led by a process that started at another
    time."""

    def __init__(self, leader_pid: int, leader_started: int, mark: str = "") -> None:
        self._pid = leader_pid
        self._started = leader_started
        self._over = not leader_started
        self._mark = f"MGPU_INSTANCE={mark}".encode() if mark else b""

    def look(self) -> None:
        """Take notice of the group's end: checked once the leader is gone."""
        if not self._over and not self._led():
            self.members()

    def members(self) -> list[_Process]:
        """Who is in the group or carries the mark now, zombies not counted."""
        processes = [process for process in _processes() if not process.zombie and process.started >= self._started]
        leader = _find(self._pid)
        found = []
        if not self._over and (leader is None or leader.started == self._started):
            found = [process for process in processes if self._pid in (process.group, process.pid)]
        self._over = not found
        grouped = {process.pid for process in found}
        return found + [process for process in processes if process.pid not in grouped and self._carries(process.pid)]

    def _carries(self, pid: int) -> bool:
        return self._mark in _read(f"/proc/{pid}/environ").split(b"\0") if self._mark and _is_own(pid) else False

    def end(self, grace_s: float) -> None:
        """End everybody in the group: the leader politely, the others with it or by force."""
        leader = _find(self._pid)
        if leader is not None and self._led() and not self._over:
            _send(leader, signal.SIGTERM)
            _wait(lambda: not self._led(), grace_s)
            _wait(lambda: not self.members(), min(grace_s, _ORPHANS_S))
        self._kill(spare_trackers=True)
        _wait(lambda: not self.members(), _TRACKER_LIMIT_S)
        self._kill(spare_trackers=False)

    def _led(self) -> bool:
        """Whether the leader is there, who ends the others."""
        leader = _find(self._pid)
        return leader is not None and leader.started == self._started and not leader.zombie

    def _kill(self, *, spare_trackers: bool) -> None:
        def all_gone() -> bool:
            targets = [process for process in self.members() if not (spare_trackers and process.tracker)]
            for process in targets:
                _send(process, signal.SIGKILL)
            return not targets

        _wait(all_gone, _KILL_LIMIT_S)


class _Segments:
    """Shared memory that belongs to the engine: files in /dev/shm that were not there when it started, belong to
    this user, and were seen in the memory of a process of its group. Never known by their names."""

    def __init__(self, group: _Group, notes: _Notes | None = None) -> None:
        self._group = group
        self._notes = notes or _Notes("")
        self._before = set(shared_files())
        self._notes.write(f"before {device} {inode}" for device, inode in self._before)
        self._engines: dict[tuple[int, int], str] = {}
        self._looks: dict[tuple[int, int], int] = {}

    def look(self, *, last: bool = False) -> None:
        """Find out whose the new files are. One that is nobody's for some seconds is left alone until the `last` look,
        so that what others share costs nothing."""
        files = shared_files()
        new = {key: path for key, path in files.items() if key not in self._before and key not in self._engines}
        if not last:
            new = {key: path for key, path in new.items() if self._looks.get(key, 0) < _MOST_LOOKS}
        if not new:
            return
        self._looks = {key: self._looks.get(key, 0) + (key in new) for key in files}
        for process in self._group.members():
            for key in mapped(process.pid):
                if key in new and key not in self._engines:
                    self._engines[key] = new[key]
                    self._notes.write([f"segment {key[0]} {key[1]} {_changed_ns(new[key])} {new[key]}"])

    def remove(self) -> None:
        """Remove the engine's files that nobody has in memory any more."""
        files = shared_files()
        left = {key: files[key] for key in self._engines if key in files}
        if not left:
            return
        for process in _processes():
            for key in mapped(process.pid):
                left.pop(key, None)
        for path in left.values():
            _quietly(os.unlink, path)


class _Notes:
    """The file in which the reaper writes down what it has seen, held while it lives. Without a path there is none."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = _held(path) if path else None
        self.write(["boot " + _read("/proc/sys/kernel/random/boot_id").decode().strip()])

    def write(self, lines: Iterable[str]) -> None:
        """Add whole lines; on a full disk as much of them as there is room for."""
        text = "".join(f"{line}\n" for line in lines if "\n" not in line)
        try:
            if self._file is not None:
                os.write(self._file, os.fsencode(text))
        except OSError:
            pass

    def tell_time(self) -> None:
        """Have the record beside the file say by its own time when mgpu was last there: nobody else can tell later when
        one was killed that had nothing to write down for long."""
        if self._file is not None:
            folder = os.path.dirname(self._path)  # noqa: PTH120  pathlib is not imported here
            _quietly(os.utime, f"{folder}/{_RECORD}")

    def remove(self) -> None:
        """Remove the file: nothing is left to tell of."""
        if self._file is not None and _inode(self._path) == _inode(self._file):
            _quietly(os.unlink, self._path)


def _heard(timeout_s: float) -> bytes | None:
    """What mgpu says within `timeout_s`: nothing (None), to make haste, or nothing any more (empty)."""
    readable, _, _ = select.select([0], [], [], timeout_s)
    return os.read(0, 4096) if readable else None


def _wait(done: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not done() and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _send(process: _Process, number: signal.Signals) -> None:
    """Signal exactly this process, and not another one that has got its number meanwhile."""
    handle = None
    try:
        if hasattr(os, "pidfd_open"):
            handle = os.pidfd_open(process.pid)
        now = _find(process.pid)
        if now is not None and now.started == process.started:
            if handle is None:
                os.kill(process.pid, number)
            else:
                signal.pidfd_send_signal(handle, number)
    except OSError:
        pass  # gone, or not ours to signal
    finally:
        if handle is not None:
            os.close(handle)


def _processes() -> Iterator[_Process]:
    for name in os.listdir("/proc"):  # noqa: PTH208  pathlib is not imported here
        if name.isdecimal() and (process := _find(int(name))):
            yield process


def _find(pid: int) -> _Process | None:
    """The process with this number now (proc(5): the name stands in brackets and may hold anything)."""
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    if len(fields) < 20:
        return None
    return _Process(pid, int(fields[2]), int(fields[19]), fields[0] in (b"Z", b"X"))


def started_ticks(pid: int) -> int:
    """When the process with this number started, in clock ticks since boot; 0 when it is gone."""
    found = _find(pid)
    return found.started if found else 0


def mapped(pid: int) -> set[tuple[int, int]]:
    """The files of /dev/shm in a process's memory, by device and inode: semaphores are mapped under another name."""
    found = set()
    for line in _read(f"/proc/{pid}/maps").splitlines():
        if b" /dev/shm/" in line:
            _, _, _, device, inode, _ = line.split(None, 5)
            major, _, minor = device.partition(b":")
            found.add((os.makedev(int(major, 16), int(minor, 16)), int(inode)))
    return found


def shared_files() -> dict[tuple[int, int], str]:
    """This user's files in /dev/shm, by device and inode."""
    found = {}
    try:
        with os.scandir(_SHARED_MEMORY) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                    found[status.st_dev, status.st_ino] = entry.path
    except OSError:
        pass
    return found


def remove_folder(folder: str) -> None:
    """Remove a folder of this user with all that is in it; what is a link or somebody else's stays. Never raises."""
    try:
        status = os.lstat(folder)
    except OSError:
        return
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return
    for root, folders, files in os.walk(folder, topdown=False):
        for name in files:
            _quietly(os.unlink, f"{root}/{name}")
        for name in folders:
            _quietly(os.rmdir, f"{root}/{name}")
            _quietly(os.unlink, f"{root}/{name}")  # a link to a folder
    _quietly(os.rmdir, folder)


def _held(path: str) -> int | None:
    """A new and empty file that is held by a lock; None where that cannot be: what is to be done is done without."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(file, 0)
    except OSError:
        return None
    return file


def _inode(path: str | int) -> tuple[int, int] | None:
    """Which file or folder is there now, by device and inode."""
    try:
        status = os.lstat(path) if isinstance(path, str) else os.fstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _changed_ns(path: str) -> int:
    try:
        return os.lstat(path).st_ctime_ns
    except OSError:  # gone already
        return 0


def _is_own(pid: int) -> bool:
    try:
        return os.stat(f"/proc/{pid}").st_uid == os.geteuid()  # noqa: PTH116  nor here
    except OSError:
        return False


def _quietly(remove: Callable[[str], None], path: str) -> None:
    try:  # noqa: SIM105  nor this
        remove(path)
    except OSError:
        pass


def _read(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123  nor here
            return file.read()
    except OSError:
        return b""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
