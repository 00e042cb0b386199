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
from mgpu.errors import MgpuError, NoAnswer
from mgpu.machine.sysfs import process_name
from mgpu.running import reaper, registry, segments
from mgpu.running.census import SUPERVISOR_DIED, Census
from mgpu.running.files import is_own_folder
from mgpu.running.identity import alive, send
from mgpu.running.instance import Exit, GpuShare, ProcessId, State
from mgpu.running.registry import Entry
from mgpu.running.segments import Segment
from mgpu.units import seconds

_POLL_S = 0.05
# Nobody tells those to end whose leader is gone; what it had told is gone by then.
_ORPHANS_S = 1.0
# A killed process that computes on a card may take seconds to leave the driver.
_KILL_LIMIT_S = 10.0
# A reaper's own stages, of which a start that needs its place waits for the end.
_REAPER_LIMIT_S = reaper.LONGEST_S + 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """A process of an engine that nobody looks after: what its program is called, and what it holds of the cards."""

    process: ProcessId
    name: str
    gpus: tuple[GpuShare, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """What is left of one instance. `folders` are for temporary files. The `unproven` may be somebody else's: they are
    shown and left alone."""

    entry: Entry
    orphans: tuple[Orphan, ...] = ()
    unproven: tuple[Orphan, ...] = ()
    folders: tuple[Path, ...] = ()
    segments: tuple[Segment, ...] = ()

    @property
    def is_ours(self) -> bool:
        """Whether any of it is known to be the instance's."""
        return bool(self.orphans or self.folders or self.segments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Remaining:
    """A process that could not be ended, and why; a clause for the user."""

    pid: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a leftover: the processes that were ended, the folders and the shared memory that were removed,
    and the processes that `remaining` says could not be ended. `kept_because` says why anything else was left alone."""

    ended: tuple[Orphan, ...] = ()
    folders: tuple[Path, ...] = ()
    segments: tuple[Segment, ...] = ()
    remaining: tuple[Remaining, ...] = ()
    kept_because: str | None = None


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
            unproven=tuple(_orphan(process, found) for process in entry.unproven),
            folders=temporary_folders(entry.folder),
            segments=segments.segments(entry.folder, entry.engine),
        )
        if left.is_ours or left.unproven:
            all_left.append(left)
    return tuple(all_left)


def temporary_folders(folder: Path) -> tuple[Path, ...]:
    """Return the folders for temporary files that engines of the instance in `folder` have now; this user's alone."""
    found = {choose(folder) for name in PROGRAMS if (choose := load_backend(name).temporary_folder)}
    return tuple(sorted(path for path in found if is_own_folder(path)))


def require_gone(folder: Path) -> None:
    """Have nothing of an earlier engine left of the instance in `folder`: for the holder of its lock, before each
    start. Blocks while that engine's reaper is at work, for half a minute at most.

    Raises NoAnswer (code "orphaned") when the engine, or what is to end it, lives on.
    """
    entry = registry.read(folder)
    if at_work := entry.reaper:
        _wait(lambda: not alive(at_work), _REAPER_LIMIT_S)
        entry = registry.read(folder)
    left = entry.engine or ((entry.reaper,) if entry.reaper else ())
    if left:
        what = "an engine of" if entry.engine else "what ends the engine of"
        raise NoAnswer(f"{what} an earlier {entry.name} still runs ({_pids(left)})", code="orphaned", hint="mgpu reap")
    segments.remove(segments.segments(folder, ()))


def end(left: Leftover, grace_s: float, say: Callable[[str], None] = lambda _: None) -> Outcome:
    """End the processes, remove what they left and write down that the instance is over; blocks `grace_s` and 12
    seconds at most. Where a process could not be ended everything else stays, too.

    Who they are is looked at again before each signal. Of an instance that has a supervisor again nothing is ended.
    """
    untouchable: dict[ProcessId, str] = {}
    known = {orphan.process: orphan for orphan in left.orphans}
    told: set[ProcessId] = set()

    def living() -> tuple[ProcessId, ...]:
        now = registry.read(left.entry.folder)
        if now.supervisor:
            return ()
        for each in now.engine:
            if each.pid != os.getpid() and each not in known:
                known[each] = Orphan(process=each, name=process_name(Path("/"), each.pid) or "?")
        return tuple(each for each in known if alive(each))

    def tell(number: signal.Signals) -> None:
        for process in living():
            try:
                if send(process, number):
                    told.add(process)
            except OSError as error:
                untouchable[process] = error.strerror or "it may not be signalled"

    def gone() -> bool:
        # All processes there are need not be looked at as long as one of these lives.
        return not any(alive(each) for each in known if each not in untouchable) and not set(living()) - set(
            untouchable
        )

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
    ended = tuple(orphan for process, orphan in known.items() if process in told and not alive(process))
    if registry.read(left.entry.folder).supervisor:
        return Outcome(ended=ended, kept_because="somebody has begun with it anew")
    remaining = tuple(Remaining(pid=each.pid, why=untouchable.get(each) or _why(each)) for each in living())
    if remaining:
        return Outcome(ended=ended, remaining=remaining)
    return replace(_tidy(left), ended=ended)


def _tidy(left: Leftover) -> Outcome:
    """Remove what was left and write down that it is over, unless somebody has taken its name meanwhile."""
    folder = left.entry.folder
    found = {each.file: each for each in left.segments}
    folders: tuple[Path, ...] = ()
    problem: str | None = None
    try:
        with registry.locked(folder):
            found |= {each.file: each for each in segments.segments(folder, ())}
            segments.remove(found.values())
            folders = temporary_folders(folder)
            for each in folders:
                reaper.remove_folder(str(each))
            for name in (registry.ENGINE, segments.NOTES):
                with contextlib.suppress(FileNotFoundError):
                    (folder / name).unlink()
            _write_down(left.entry, ended=bool(left.orphans))
    except BlockingIOError:
        return Outcome(kept_because="somebody has its name just now")
    except OSError as error:
        problem = error.strerror or type(error).__name__
    return Outcome(
        folders=tuple(each for each in folders if not each.exists()),
        segments=tuple(each for each in found.values() if not Path(each.path).exists()),
        kept_because=problem,
    )


def _orphan(process: ProcessId, found: Census) -> Orphan:
    shares = [
        GpuShare(uuid=gpu.uuid, index=gpu.index, actual_bytes=holder.bytes)
        for gpu in found.machine.gpus
        for holder in gpu.used_by
        if holder.pid == process.pid
    ]
    return Orphan(process=process, name=process_name(Path("/"), process.pid) or "?", gpus=tuple(shares))


def _write_down(entry: Entry, *, ended: bool) -> None:
    """Write that it is over; without a record there is nothing to say."""
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
    with contextlib.suppress(MgpuError):
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
