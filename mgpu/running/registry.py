"""The instances on disk: a folder for each, with its record, readable after any crash.

    NAME/lock            held by the supervisor while it lives (state.py)
    NAME/instance.json   the record, replaced as a whole
    NAME/engine.pid      who the engine is, on a line of its own: found although the record is damaged
    NAME/mark            what every engine of it has in its environment (identity.py): written before the first one
    NAME/engine.log      what the engine writes
    NAME/supervisor.log  what mgpu itself says, where nobody sees it
    NAME/reaper          held by the reaper while it lives, and what that has seen (segments.py)

A supervisor starts the engine, then writes down who it is. Should it be killed between the two, or the record be
replaced, the engine is still found by its mark.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mgpu.errors import Missing, NoAnswer, UsageError
from mgpu.running import segments
from mgpu.running.files import file_of, is_own_folder, read_file, replace_file
from mgpu.running.identity import (
    MARK,
    File,
    alive,
    in_groups,
    is_there,
    lock_holders,
    marked,
    writers,
    writes_out_to,
)
from mgpu.running.instance import Instance, ProcessId, instance_from_json, instance_to_json
from mgpu.running.state import check_name, is_at, is_state_folder, state_folder, state_path

RECORD = "instance.json"
ENGINE = "engine.pid"
MARKED = "mark"
LOG = "engine.log"
SUPERVISOR_LOG = "supervisor.log"
LOCK = "lock"

_LOGS = (LOG, f"{LOG}.1")
_MARK = re.compile(r"[0-9a-f]{32}")
_LARGEST_RECORD_BYTES = 1 << 20
_LONGEST_LINE_BYTES = 200
_LARGEST_PID = 1 << 22  # linux/threads.h: PID_MAX_LIMIT on 64 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What is known of an instance: its record, and who lives of it now.

    `instance` is None where the record cannot be used, for the reason `problem`: its state is unknown then.
    `supervisor` is who looks after it; `engine` are the processes of its engine that live, the first one first.
    `reaper` is who would end the engine in the supervisor's place, and `unproven` are processes of which something
    speaks for being the engine's, and not enough to end them.
    """

    name: str
    folder: Path
    instance: Instance | None
    problem: str | None
    supervisor: ProcessId | None
    engine: tuple[ProcessId, ...]
    reaper: ProcessId | None = None
    unproven: tuple[ProcessId, ...] = ()

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
    replace_file(state_folder() / check_name(instance.name), RECORD, text.encode(errors="replace") + b"\n")


def write_engine(name: str, engine: ProcessId) -> None:
    """Write down who the engine is; to be called at once after its start. As `write`, otherwise."""
    line = f"{engine.pid} {engine.started_ticks} {engine.boot_id}\n"
    replace_file(state_folder() / check_name(name), ENGINE, line.encode())


def forget_engine(name: str) -> None:
    """Remove the line of `write_engine`, once nothing of the engine lives."""
    folder = state_folder() / check_name(name)
    if not read(folder).engine:
        with contextlib.suppress(OSError):
            (folder / ENGINE).unlink()


def engine_environment(name: str) -> dict[str, str]:
    """Return what an engine that is about to be started must have in its environment to be found later, whatever
    happens: the instance's mark and which start it is. For the holder of the lock; raises as `write`."""
    folder = state_folder() / check_name(name)
    mark = _mark(folder)
    if mark is None:
        mark = secrets.token_hex(16)
        replace_file(folder, MARKED, f"{mark}\n".encode())
    # vLLM names its processes, which takes the place of their environments unless it is asked to leave them alone.
    return {MARK: f"{mark}.{secrets.token_hex(4)}", "SPT_NOENV": "1"}


def record(folder: Path) -> Instance | None:
    """Return the record in `folder` alone, which costs little; None where there is none, or a damaged one."""
    return _record(folder)[0]


def read(folder: Path) -> Entry:
    """Return what is known of the instance in `folder`; never raises, whatever is in there."""
    return _entries([folder])[0]


def instances() -> tuple[Entry, ...]:
    """Return this user's instances by name: those that live, and the dead that were not cleared. Folders that are
    links, somebody else's, or hold nothing of an instance are left out. Raises Missing where there is no home."""
    found = _entries(folders())
    return tuple(entry for entry in found if entry.instance or entry.problem or not entry.is_over)


def folders() -> tuple[Path, ...]:
    """Return this user's folders of instances by name, those without a record too. Raises Missing, as the state folder
    does: where it cannot be read, it is not known that nothing runs."""
    if not is_state_folder():
        return ()
    try:
        with os.scandir(state_path()) as entries:
            names = [entry.name for entry in entries if _is_name(entry.name) and is_own_folder(Path(entry.path))]
    except OSError:
        return ()
    return tuple(state_path() / name for name in sorted(names))


def clear(name: str) -> None:
    """Forget a dead instance: remove what its engine left, and its folder with all that is in it.

    Raises NoAnswer when there is none of that name (code "unknown-instance") or it lives (code "instance-lives"),
    Missing when something cannot be removed.
    """
    folder = state_path() / check_name(name)
    if not is_own_folder(folder):
        raise NoAnswer(f"there is no instance named {name}", code="unknown-instance", hint="mgpu ps lists them")
    entry = read(folder)
    if entry.engine:
        raise _living(name, "its engine still runs", hint=f"mgpu stop {name}   or   mgpu reap")
    if entry.reaper:
        raise _living(name, "what its engine left is being removed", hint="once more in a moment")
    try:
        with locked(folder):
            segments.remove(segments.segments(folder, ()))
            for each in list(os.scandir(folder)):
                if each.is_dir(follow_symlinks=False):
                    shutil.rmtree(each.path)
                elif each.name != LOCK:
                    Path(each.path).unlink(missing_ok=True)
            # Last, and while it is held: whoever has opened it by now sees that it is not there any more.
            (folder / LOCK).unlink()
        with contextlib.suppress(OSError):  # unless somebody has begun with it anew
            folder.rmdir()
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
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the instance in `folder` for a moment, and be taken for its supervisor by nobody. Raises
    BlockingIOError when somebody has it, OSError."""
    # To a file O_NONBLOCK means nothing: it is how others see that this is no supervisor, whom they may signal.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    lock = os.open(folder / LOCK, flags, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not is_at(lock, folder / LOCK):
            raise BlockingIOError(errno.EWOULDBLOCK, "it is somebody else's by now")
        yield
    finally:
        os.close(lock)


def _entries(paths: Sequence[Path]) -> list[Entry]:
    """All at once: the kernel's lists are read once for all of them."""
    records = {path: _record(path) for path in paths}
    locks = {path / name: file for path in paths for name in (LOCK, segments.NOTES) if (file := file_of(path / name))}
    holders = lock_holders(set(locks.values()))
    held = {path: holders.get(file) for path, file in locks.items()}
    found = {path: _Found(path, records[path][0], held.get(path / LOCK)) for path in paths}
    everybody = _Everybody.of(found.values())
    entries = []
    for path, each in found.items():
        reaper = held.get(path / segments.NOTES)
        engine, unproven = each.engine(everybody, {each.supervisor, reaper})
        instance, problem = records[path]
        entries.append(
            Entry(
                name=path.name,
                folder=path,
                instance=instance,
                problem=problem,
                supervisor=each.supervisor,
                engine=engine,
                reaper=reaper,
                unproven=unproven,
            )
        )
    return entries


class _Found:
    """What the files of one instance tell of its processes."""

    def __init__(self, folder: Path, instance: Instance | None, holder: ProcessId | None) -> None:
        self.supervisor = holder
        # Its folder may have been removed under it, and the lock with that.
        if instance and not instance.state.is_over and holder is None and alive(instance.supervisor):
            self.supervisor = instance.supervisor
        self.leaders = _leaders(folder, instance)
        self.mark = _mark(folder)
        self.logs = {file for name in _LOGS if (file := file_of(folder / name))}

    def engine(
        self, everybody: _Everybody, others: Collection[ProcessId | None]
    ) -> tuple[tuple[ProcessId, ...], tuple[ProcessId, ...]]:
        """Who is the engine's, and of whom that is not sure; nobody of the `others`."""
        sure: list[ProcessId] = [each for each in self.leaders if alive(each)]
        perhaps: list[ProcessId] = []
        for leader in self.leaders:
            if is_there(leader):
                sure += everybody.groups[leader]
            else:
                perhaps += everybody.groups[leader]
        sure += everybody.marked.get(self.mark or "", ())
        # What has lost its mark still writes where it was told to, in a group with the right number.
        sure += [each for each in perhaps if each not in sure and writes_out_to(each, self.logs)]
        perhaps += [each for log in self.logs for each in everybody.writers.get(log, ())]
        engine = tuple(each for each in dict.fromkeys(sure) if each not in others)
        unproven = tuple(each for each in dict.fromkeys(perhaps) if each not in others and each not in engine)
        return engine, unproven


@dataclass(frozen=True, slots=True, kw_only=True)
class _Everybody:
    """The processes of this machine that some instance's files speak of."""

    groups: dict[ProcessId, tuple[ProcessId, ...]]
    marked: dict[str, tuple[ProcessId, ...]]
    writers: dict[File, tuple[ProcessId, ...]]

    @classmethod
    def of(cls, found: Collection[_Found]) -> _Everybody:
        return cls(
            groups=in_groups({leader for each in found for leader in each.leaders}),
            marked=marked({each.mark for each in found if each.mark}),
            # While somebody looks after it, nobody else writes there.
            writers=writers({log for each in found if each.supervisor is None for log in each.logs}),
        )


def _leaders(folder: Path, instance: Instance | None) -> list[ProcessId]:
    """Who is written down as the engine: the record and the line may be a restart apart."""
    return list(dict.fromkeys(each for each in (instance.engine if instance else None, _engine(folder)) if each))


def _record(folder: Path) -> tuple[Instance | None, str | None]:
    """The record, or why it cannot be used; neither where there is none."""
    try:
        text = read_file(folder, RECORD, _LARGEST_RECORD_BYTES + 1)
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
        text = (read_file(folder, ENGINE, _LONGEST_LINE_BYTES) or b"").decode("ascii")
        pid, started_ticks, boot_id = text.removesuffix("\n").split(" ") if text.endswith("\n") else ("", "", "")
        engine = ProcessId(pid=int(pid), started_ticks=int(started_ticks), boot_id=boot_id)
    except (OSError, ValueError):
        return None
    return engine if 1 < engine.pid <= _LARGEST_PID else None


def _mark(folder: Path) -> str | None:
    try:
        text = (read_file(folder, MARKED, _LONGEST_LINE_BYTES) or b"").decode("ascii").removesuffix("\n")
    except (OSError, ValueError):
        return None
    return text if _MARK.fullmatch(text) else None


def _is_name(text: str) -> bool:
    try:
        return bool(check_name(text))
    except UsageError:
        return False
