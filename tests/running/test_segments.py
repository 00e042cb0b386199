"""Shared memory that outlived its engine and the reaper: found by what the reaper wrote down, and by nothing else."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mgpu.running import segments
from mgpu.running.guard import watch
from mgpu.running.identity import identity, lock_holders
from tests.fakes.engines import until

SHARED_MEMORY = Path("/dev/shm")
MAPS = """
import mmap, os, signal, sys
sys.stdin.readline()
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
os.truncate(file, 4096)
held = mmap.mmap(file, 4096)
print("up", flush=True); signal.pause()"""


@contextlib.contextmanager
def engine(folder: Path, segment: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """An engine that has made a segment which its reaper has seen, and that reaper's pid."""
    command = [sys.executable, "-ISc", MAPS, str(segment)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, process_group=0) as process:
        guard = watch(process.pid, notes=folder / segments.NOTES)
        try:
            assert process.stdin
            assert process.stdout
            process.stdin.write(b"\n")
            process.stdin.flush()
            process.stdout.readline()
            until(lambda: b"\nsegment " in (folder / segments.NOTES).read_bytes())
            yield process, guard.pid
        finally:
            process.kill()
            guard.close()
            segment.unlink(missing_ok=True)


def made() -> Path:
    return SHARED_MEMORY / uuid.uuid4().hex


def kill_all(process: subprocess.Popen[bytes], reaper_pid: int) -> None:
    reaper = identity(reaper_pid)
    os.kill(reaper_pid, signal.SIGKILL)
    until(lambda: identity(reaper_pid) != reaper)
    process.kill()
    process.wait()


def as_it_is(folder: Path, segment: Path) -> None:
    pass


def replaced(folder: Path, segment: Path) -> None:
    new = segment.with_name(f"{segment.name}.new")
    new.touch()
    new.replace(segment)


def cut_off(folder: Path, segment: Path) -> None:
    notes = folder / segments.NOTES
    notes.write_bytes(notes.read_bytes()[:-2])


def of_an_earlier_boot(folder: Path, segment: Path) -> None:
    notes = folder / segments.NOTES
    notes.write_bytes(b"boot earlier\n" + notes.read_bytes().partition(b"\n")[2])


def garbage(folder: Path, segment: Path) -> None:
    with (folder / segments.NOTES).open("ab") as notes:
        notes.write(b"segment x y\nsegment 1\n\xff\x00 1 2\nbefore 1 -\nsegment 1 2 3\n")


def a_link(folder: Path, segment: Path) -> None:
    (folder / segments.NOTES).rename(folder / "elsewhere")
    (folder / segments.NOTES).symlink_to(folder / "elsewhere")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        pytest.param(as_it_is, True, id="what the reaper has seen"),
        pytest.param(garbage, True, id="with garbage behind it"),
        pytest.param(replaced, False, id="not another file of that name"),
        pytest.param(cut_off, False, id="not by a line that was not written whole"),
        pytest.param(of_an_earlier_boot, False, id="not what was seen before a reboot"),
        pytest.param(a_link, False, id="not by notes that are a link"),
    ],
)
def test_segments_are_found_when_the_reaper_is_killed_too(
    change: Callable[[Path, Path], None], found: bool, tmp_path: Path
) -> None:
    segment = made()
    with engine(tmp_path, segment) as (process, reaper_pid):
        kill_all(process, reaper_pid)
        change(tmp_path, segment)
        left = segments.segments(tmp_path, ())
        assert [each.path for each in left] == ([str(segment)] if found else [])
        segments.remove(left)
        assert segment.exists() == (not found)


def test_what_somebody_else_has_in_memory_stays(tmp_path: Path) -> None:
    segment = made()
    with engine(tmp_path, segment) as (process, reaper_pid):
        kill_all(process, reaper_pid)
        with segment.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
            segments.remove(segments.segments(tmp_path, ()))
            assert segment.exists()


@pytest.mark.parametrize("older", [False, True])
def test_what_is_the_engines_does_not_depend_on_the_clock(older: bool, tmp_path: Path) -> None:
    segment, late = made(), made()
    with engine(tmp_path, segment) as (_, reaper_pid):
        os.kill(reaper_pid, signal.SIGSTOP)  # it sees no more
        command = [sys.executable, "-ISc", MAPS, str(late)]
        if older:  # it was there before the engine
            notes = tmp_path / segments.NOTES
            late.touch()
            status = late.stat()
            with notes.open("a") as file:
                file.write(f"before {status.st_dev} {status.st_ino}\n")
        with subprocess.Popen(command, stdin=-1, stdout=-1) as child:
            assert child.stdin
            assert child.stdout
            child.stdin.write(b"\n")
            child.stdin.flush()
            child.stdout.readline()
            me = identity(child.pid)
            assert me
            # A process that began long after its files did, as after a change of the clock.
            found = segments.segments(tmp_path, [type(me)(pid=me.pid, started_ticks=10**9, boot_id=me.boot_id)])
            assert (str(late) in [each.path for each in found]) == (not older)
            child.kill()
        late.unlink()
        os.kill(reaper_pid, signal.SIGCONT)


def test_the_reaper_holds_its_notes_while_it_lives_and_removes_them_when_nothing_is_left(tmp_path: Path) -> None:
    notes = tmp_path / segments.NOTES
    with engine(tmp_path, made()) as (_, reaper_pid):
        status = notes.stat()
        file = (status.st_dev, status.st_ino)
        assert lock_holders({file}) == {file: identity(reaper_pid)}
        assert status.st_mode & 0o777 == 0o600
    assert not notes.exists()
