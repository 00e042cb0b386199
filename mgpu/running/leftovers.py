"""What engines left behind whose supervisor is gone: processes, temporary folders, shared memory. All of it is known by
what was written down of it or by what its processes hold, never by names."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from mgpu.backends import load_backend
from mgpu.backends.engine import PROGRAMS
from mgpu.errors import MgpuError
from mgpu.machine.sysfs import process_name
from mgpu.running import reaper, registry
from mgpu.running.census import SUPERVISOR_DIED, Census
from mgpu.running.identity import alive, send
from mgpu.running.instance import Exit, GpuShare, ProcessId, State
from mgpu.running.registry import Entry
from mgpu.running.state import held_folder
from mgpu.units import seconds

_POLL_S = 0.05
# Nobody tells those to end whose leader is gone; what it had told is gone by then.
_ORPHANS_S = 1.0
# A killed process that computes on a card may take seconds to leave the driver.
_KILL_LIMIT_S = 10.0
_SECTOR_BYTES = 512  # stat(2)'s st_blocks, whatever the file system's own

File = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """A process of an engine that nobody looks after: what its program is called, and what it holds of the cards."""

    process: ProcessId
    name: str
    gpus: tuple[GpuShare, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A file in /dev/shm that an engine's processes have in their memory; `file` is its device and inode."""

    path: str
    file: File
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """What is left of one instance. `folders` are for temporary files."""

    entry: Entry
    orphans: tuple[Orphan, ...] = ()
    folders: tuple[Path, ...] = ()
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Remaining:
    """A process that could not be ended, and why; a clause for the user."""

    pid: int
    why: str


def leftovers(found: Census) -> tuple[Leftover, ...]:
    """Return what is left of instances that nobody looks after."""
    all_left = []
    for entry in found.entries:
        if entry.supervisor:
            continue
        orphans = tuple(_orphan(process, found) for process in entry.engine if process.pid != os.getpid())
        left = Leftover(
            entry=entry,
            orphans=orphans,
            folders=temporary_folders(entry.folder),
            segments=_segments([orphan.process for orphan in orphans]),
        )
        if left.orphans or left.folders:
            all_left.append(left)
    return tuple(all_left)


def temporary_folders(folder: Path) -> tuple[Path, ...]:
    """Return the folders for temporary files that engines of the instance in `folder` have now; this user's alone."""
    found = {choose(folder) for name in PROGRAMS if (choose := load_backend(name).temporary_folder)}
    return tuple(sorted(path for path in found if _is_own_folder(path)))


def end(left: Leftover, grace_s: float, say: Callable[[str], None] = lambda _: None) -> tuple[Remaining, ...]:
    """End the processes, remove what they left and write down that the instance is over; blocks `grace_s` and 12
    seconds at most. Returns the processes that could not be ended: everything else of them stays, too.

    Who they are is looked at again before each signal. Of an instance that has a supervisor again nothing is ended.
    """
    untouchable: dict[ProcessId, str] = {}

    def living() -> tuple[ProcessId, ...]:
        now = registry.read(left.entry.folder)
        if now.supervisor:
            return ()
        known = [*(orphan.process for orphan in left.orphans), *now.engine]
        return tuple(each for each in dict.fromkeys(known) if each.pid != os.getpid() and alive(each))

    def tell(number: signal.Signals) -> None:
        for process in living():
            try:
                send(process, number)
            except OSError as error:
                untouchable[process] = error.strerror or "it may not be signalled"

    def gone() -> bool:
        return not set(living()) - set(untouchable)

    if living():
        say(f"SIGTERM to {_pids(living())}, {seconds(grace_s)} to end")
        leaders = {each for each in living() if _leads(each)}
        tell(signal.SIGTERM)
        _wait(lambda: gone() or not any(alive(each) for each in leaders), grace_s)
        _wait(gone, min(grace_s, _ORPHANS_S))
        if not gone():
            say(f"SIGKILL to {_pids(living())}")
            tell(signal.SIGKILL)
            _wait(gone, _KILL_LIMIT_S)
    if registry.read(left.entry.folder).supervisor:
        return ()
    remaining = tuple(Remaining(pid=each.pid, why=untouchable.get(each) or _why(each)) for each in living())
    if not remaining:
        _remove(left.segments)
        for folder in temporary_folders(left.entry.folder):
            reaper.remove_folder(str(folder))
        _write_down(left.entry, ended=bool(left.orphans))
    return remaining


def _orphan(process: ProcessId, found: Census) -> Orphan:
    shares = [
        GpuShare(uuid=gpu.uuid, index=gpu.index, actual_bytes=holder.bytes)
        for gpu in found.machine.gpus
        for holder in gpu.used_by
        if holder.pid == process.pid
    ]
    return Orphan(process=process, name=process_name(Path("/"), process.pid) or "?", gpus=tuple(shares))


def _segments(processes: Collection[ProcessId]) -> tuple[Segment, ...]:
    """The shared memory of the processes: files of this user that they have in memory, and not older than they are."""
    begun = min((_started_at(each) for each in processes), default=0.0)
    mapped = {file for each in processes for file in reaper.mapped(each.pid)}
    found = []
    for file, path in reaper.shared_files().items() if mapped else ():
        with contextlib.suppress(OSError):
            status = os.lstat(path)
            if file in mapped and status.st_ctime >= begun - 1:  # a tick, and clocks that are read one after the other
                found.append(Segment(path=path, file=file, bytes=status.st_blocks * _SECTOR_BYTES))
    return tuple(found)


def _remove(segments: Collection[Segment]) -> None:
    """Remove segments that nobody has in memory any more."""
    in_use = {file for name in os.listdir("/proc") if name.isdecimal() for file in reaper.mapped(int(name))}  # noqa: PTH208
    now = {path: file for file, path in reaper.shared_files().items()}
    for segment in segments:
        if segment.file not in in_use and now.get(segment.path) == segment.file:
            with contextlib.suppress(OSError):
                Path(segment.path).unlink()


def _started_at(process: ProcessId) -> float:
    """When a process began, in seconds since 1970; 0 where the system does not tell."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        booted_at = next(int(line.split()[1]) for line in lines if line.startswith("btime"))
    except (OSError, ValueError, StopIteration):
        return 0.0
    return booted_at + process.started_ticks / os.sysconf("SC_CLK_TCK")


def _write_down(entry: Entry, *, ended: bool) -> None:
    """Write that it is over, unless somebody has taken its name meanwhile; without a record there is nothing to say."""
    instance = entry.instance
    if instance is None or not (ended or instance.engine):
        return
    last = instance.exit or Exit(code=None, signal=None, cause=SUPERVISOR_DIED, at=instance.started_at)
    if last.cause in (SUPERVISOR_DIED, "stuck"):
        last = replace(last, message="the mgpu that looked after it was gone; mgpu reap ended its engine", hint=None)
    gpus = tuple(replace(share, actual_bytes=None) for share in instance.gpus)
    over = replace(
        instance, state=State.FAILED, exit=last, engine=None, group=None, url=None, rate=None, gpus=gpus, phase=None
    )
    with contextlib.suppress(MgpuError), held_folder(entry.name, chosen=True):
        registry.write(over)


def _leads(process: ProcessId) -> bool:
    try:
        return os.getpgid(process.pid) == process.pid
    except OSError:  # gone
        return False


def _why(process: ProcessId) -> str:
    try:
        state = Path(f"/proc/{process.pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        state = "?"
    if state == "D":
        return "it is stuck in the kernel, and ends when that lets it go; if it does not, only a reboot helps"
    return "it outlived SIGKILL"


def _pids(processes: Collection[ProcessId]) -> str:
    return ", ".join(f"pid {each.pid}" for each in processes)


def _wait(done: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not done() and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _is_own_folder(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return (status.st_mode & 0o170000) == 0o040000 and status.st_uid == os.geteuid()
