"""An engine's shared memory: files in /dev/shm, known by what the reaper wrote down of them and by whose memory they
are in, never by their names.

NAME/reaper is held by the reaper (flock) while it lives. It begins with the boot and with what was in /dev/shm before
the engine; each file that the engine was seen to have is a line more:

    boot ID
    before DEVICE INODE
    segment DEVICE INODE CHANGED_NS PATH
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mgpu.running import reaper
from mgpu.running.files import read_file
from mgpu.running.identity import File, boot_id
from mgpu.running.instance import ProcessId

NOTES = "reaper"
"""The name of the reaper's file in an instance's folder."""

_LONGEST_NOTES_BYTES = 1 << 22
_SECTOR_BYTES = 512  # stat(2)'s st_blocks, whatever the file system's own


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A file in /dev/shm that is an engine's; `file` is its device and inode."""

    path: str
    file: File
    bytes: int


def segments(folder: Path, processes: Collection[ProcessId]) -> tuple[Segment, ...]:
    """Return the shared memory of the engine of the instance in `folder`: what its reaper has seen of it, and what its
    `processes` that live have in their memory and was not there before them. Files of this user alone; never raises.
    """
    notes = _notes(folder)
    mapped = {file for each in processes for file in reaper.mapped(each.pid)}
    begun = min((_started_at(each) for each in processes), default=0.0)
    found = []
    for file, path in reaper.shared_files().items():
        with contextlib.suppress(OSError):
            status = os.lstat(path)
            # Clocks may be set: they are asked where nothing was written down, and to a second.
            younger = status.st_ctime >= begun - 1 if notes.before is None else file not in notes.before
            noted = path == notes.path_of.get(file) and status.st_ctime_ns >= notes.changed_ns[file]
            if (file in mapped and younger) or noted:
                found.append(Segment(path=path, file=file, bytes=status.st_blocks * _SECTOR_BYTES))
    return tuple(found)


def remove(found: Collection[Segment]) -> None:
    """Remove segments that nobody has in memory any more. Never raises."""
    if not found:
        return
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]  # noqa: PTH208  names, not paths
    in_use = {file for pid in pids for file in reaper.mapped(pid)}
    now = {path: file for file, path in reaper.shared_files().items()}
    for segment in found:
        if segment.file not in in_use and now.get(segment.path) == segment.file:
            with contextlib.suppress(OSError):
                Path(segment.path).unlink()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Notes:
    """What a reaper wrote down since this boot. `before` is None where it has not."""

    before: frozenset[File] | None = None
    path_of: Mapping[File, str] = field(default_factory=dict)
    changed_ns: Mapping[File, int] = field(default_factory=dict)


def _notes(folder: Path) -> _Notes:
    try:
        text = read_file(folder, NOTES, _LONGEST_NOTES_BYTES) or b""
    except OSError:
        return _Notes()
    # A line without its end was being written when the reaper was killed.
    lines = os.fsdecode(text.rpartition(b"\n")[0]).split("\n")
    if lines[0] != f"boot {boot_id()}":
        return _Notes()
    before: set[File] = set()
    path_of: dict[File, str] = {}
    changed_ns: dict[File, int] = {}
    for line in lines[1:]:
        with contextlib.suppress(ValueError):
            kind, device, inode, *rest = line.split(" ", 4)
            file_id = int(device), int(inode)
            if kind == "before":
                before.add(file_id)
            elif kind == "segment" and len(rest) == 2:
                changed_ns[file_id], path_of[file_id] = int(rest[0]), rest[1]
    return _Notes(before=frozenset(before), path_of=path_of, changed_ns=changed_ns)


def _started_at(process: ProcessId) -> float:
    """When a process began, in seconds since 1970; 0 where the system does not tell."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        booted_at = next(int(line.split()[1]) for line in lines if line.startswith("btime"))
    except (OSError, ValueError, StopIteration):
        return 0.0
    return booted_at + process.started_ticks / os.sysconf("SC_CLK_TCK")
