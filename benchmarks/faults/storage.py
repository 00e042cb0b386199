"""A disk that is full, and records that are damaged."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.ground import Ground
from benchmarks.faults.row import Row
from mgpu.machine.snapshot import Machine
from mgpu.running import registry
from mgpu.running.census import Census
from mgpu.running.instance import State
from mgpu.running.leftovers import leftovers
from mgpu.running.state import state_folder
from tests.cli.deaths import answers
from tests.cli.program import Mgpu, Running, until
from tests.cli.records import engine, sleeper, who
from tests.cli.traces import held, left
from tests.cli.vllm_rig import members
from tests.fakes.devices import free_port

_DISK = "4m"
_NAME = "damaged"
_SAMPLE = 12
_NO_CARDS = Machine(captured_at="", source="probed")


def rows(ground: Ground) -> Iterator[Row]:
    """Full disks, then damaged records."""
    yield from _full_disks(ground)
    yield _every_truncation(ground)
    yield _every_flip(ground)
    yield _by_the_program(ground)


def _full_disks(ground: Ground) -> Iterator[Row]:
    row = Row(fault="disk full: start, serve, restart, stop")
    with ground.mgpu() as mgpu:
        mgpu.state.mkdir(mode=0o700)
        mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "none", mgpu.state], capture_output=True)
        if mount.returncode:
            row.skipped = f"this user cannot mount a small disk: {mount.stderr.decode(errors='replace').strip()}"
            yield row
            return
        try:
            with row.trial("starting on a full disk"):
                _start_on_a_full_disk(row, mgpu, ground.tiny)
            for detached in (True, False):
                with row.trial(f"serving on a disk that fills up, {'detached' if detached else 'in the foreground'}"):
                    _serve_on_a_full_disk(row, mgpu, ground.tiny, detached=detached)
        finally:
            mgpu.end_all()
            subprocess.run(["umount", mgpu.state], check=True)
    yield row


def _start_on_a_full_disk(row: Row, mgpu: Mgpu, model: Path) -> None:
    with _full(mgpu):
        for words in ((), ("-d",)):
            ended = mgpu("run", model, *words, "--name", "first")
            assert ended.exit_code == 3, ended
            assert "No space left" in ended.err, ended
        row.leaves("starting on a full disk", left(mgpu, held(mgpu)))
        assert mgpu("ps").exit_code == 0


def _serve_on_a_full_disk(row: Row, mgpu: Mgpu, model: Path, *, detached: bool) -> None:
    name = "detached" if detached else "foreground"
    words = ("run", model, "--name", name, "--restart", "on-failure", "--interval", "0.1", "--port", free_port())
    running = mgpu.start(*words, *(["-d"] if detached else []))
    running.url()
    entry = registry.read(mgpu.state / name)
    assert entry.instance
    assert entry.instance.url
    url, before = entry.instance.url, held(mgpu)
    with _full(mgpu):
        assert answers(url), "it serves no more"
        assert entry.instance.engine
        mgpu.kill(entry.instance.engine.pid)
        until(lambda: not answers(url), "the engine is gone")
        until(lambda: answers(url) or not registry.read(mgpu.state / name).supervisor, "it was started again")
        shown = mgpu("ps")
        assert shown.exit_code == 0, shown
        assert answers(url), f"a full disk ended it: {_said(mgpu, name, running)}"
    # What could not be written down is, once there is room.
    until(lambda: _restarts(mgpu, name), "the restart is written down")
    with _full(mgpu):
        ended = mgpu("stop", name)
        assert ended.exit_code == 0, ended
        if not detached:
            assert running.end().exit_code == 130
    row.leaves("serving on a full disk", left(mgpu, before))


def _said(mgpu: Mgpu, name: str, running: Running) -> str:
    log = mgpu.state / name / registry.SUPERVISOR_LOG
    return log.read_text()[-1000:] if log.exists() else running.err[-1000:]


def _restarts(mgpu: Mgpu, name: str) -> int | None:
    found = registry.read(mgpu.state / name).instance
    return found.restarts if found and found.state is State.READY else None


@contextlib.contextmanager
def _full(mgpu: Mgpu) -> Iterator[None]:
    """A disk without a byte left while it lasts."""
    ballast = mgpu.state / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        ballast.unlink()


def _every_truncation(ground: Ground) -> Row:
    row = Row(fault="record truncated at every byte, its engine orphaned")
    with _orphan(ground) as (group, record):
        whole = record.read_bytes()
        for size in range(len(whole)):
            _damage(row, group, record, whole[:size], f"{size} of {len(whole)} bytes")
    return row


def _every_flip(ground: Ground) -> Row:
    row = Row(fault="record with a bit of every byte flipped, its engine orphaned")
    with _orphan(ground) as (group, record):
        whole = record.read_bytes()
        for at in range(len(whole)):
            flipped = bytes([whole[at] ^ 1 << (at % 8)])
            _damage(row, group, record, whole[:at] + flipped + whole[at + 1 :], f"byte {at}, bit {at % 8}")
    return row


@contextlib.contextmanager
def _orphan(ground: Ground) -> Iterator[tuple[set[int], Path]]:
    """The processes of an engine whose supervisor is gone, its record, and a stranger who is nobody's to end."""
    with ground.mgpu() as mgpu, sleeper(mgpu), engine(mgpu, _NAME) as process:
        folder = state_folder() / _NAME
        registry.write_engine(_NAME, who(process.pid))
        try:
            yield set(members(process.pid)), folder / registry.RECORD
        finally:
            (folder / registry.RECORD).unlink()


def _damage(row: Row, group: set[int], record: Path, content: bytes, what: str) -> None:
    """See that the orphans are found behind a damaged record, and nobody else."""
    with row.trial(what):
        record.write_bytes(content)
        entry = registry.read(record.parent)
        # Without a look at all other processes of the machine, of which there is one a byte otherwise.
        found = {
            orphan.process.pid
            for each in leftovers(Census(entries=(entry,), machine=_NO_CARDS, strangers=()))
            for orphan in each.orphans
        }
        # A flipped digit may make it a record of somebody who lives, who looks after it then; nobody is ended.
        assert found <= group, f"{found - group} would have been ended"
        assert found == group or entry.supervisor, f"{group - found} were not found"


def _by_the_program(ground: Ground) -> Row:
    row = Row(fault="record damaged under a living instance: ps, reap, stop")
    with ground.mgpu() as mgpu:
        for number in range(_SAMPLE):
            with row.trial(f"damage {number}"), sleeper(mgpu) as stranger:
                assert mgpu("run", ground.tiny, "-d", "--name", _NAME).exit_code == 0
                record = mgpu.state / _NAME / registry.RECORD
                before = held(mgpu)
                record.write_bytes(_damaged(record.read_bytes(), number))
                assert mgpu("ps").exit_code == 0
                (shown,) = mgpu("ps", "--json").json["data"]["instances"]
                reaped = mgpu("reap", "--yes", "--json").json["data"]["reaped"]
                assert not reaped, "a supervised engine was reaped"
                assert stranger.poll() is None
                ended = mgpu("stop", _NAME)
                assert ended.exit_code == 0, (shown, ended)
                until(lambda: len(mgpu.processes()) == 1, "all but the stranger are gone")
                row.leaves(f"damage {number}", _without(left(mgpu, before, limit_s=0), stranger.pid))
    return row


def _without(things: tuple[str, ...], pid: int) -> tuple[str, ...]:
    return tuple(thing for thing in things if not thing.startswith((f"process {pid}:", "memory ")))


def _damaged(whole: bytes, number: int) -> bytes:
    """One of the ways in which a record may be damaged."""
    at = len(whole) * number // _SAMPLE
    if number % 3 == 0:
        return whole[:at]
    if number % 3 == 1:
        return whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]
    record = json.loads(whole)
    keys = sorted(record)
    return json.dumps({**record, keys[number % len(keys)]: [{"pid": 1}]}).encode()
