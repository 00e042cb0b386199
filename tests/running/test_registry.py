"""Instances on disk: whole or not at all, found whatever happened, and never somebody else's."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mgpu.errors import Missing, NoAnswer, UsageError
from mgpu.running import registry
from mgpu.running.identity import alive, identity
from mgpu.running.instance import ProcessId, State, instance_to_json
from mgpu.running.process import EngineProcess
from mgpu.running.state import instance_folder, rotate, state_folder
from tests.fakes.engines import until
from tests.running.crashing_supervisor import starting

ROOT = Path(__file__).parents[2]


def written(name: str = "llama") -> Path:
    """The folder of an instance whose supervisor is dead."""
    dead = ProcessId(pid=2**22, started_ticks=1, boot_id="")
    registry.write(replace(starting(name), supervisor=dead))
    return state_folder() / name


def sleeper(folder: Path, program: str = "exec sleep 600") -> EngineProcess:
    env = registry.engine_environment(folder.name)
    engine = EngineProcess.start(["/bin/sh", "-c", program], env=env, log_path=folder / "engine.log")
    own = Path(f"/proc/{engine.pid}")
    # While a program is replaced by another (execve) it has no environment to be read.
    until(lambda: (own / "cmdline").read_bytes().startswith(b"sleep") and bool((own / "environ").read_bytes()))
    return engine


def test_what_was_written_is_read() -> None:
    with instance_folder("llama", chosen=True):
        registry.write(starting())
        (entry,) = registry.instances()
        assert (entry.name, entry.instance, entry.problem) == ("llama", starting(), None)
        assert (entry.supervisor, entry.engine) == (identity(os.getpid()), ())
        assert {path.name: path.stat().st_mode & 0o777 for path in entry.folder.iterdir()} == {
            "lock": 0o600,
            "instance.json": 0o600,
        }
    registry.write(replace(starting(), state=State.STOPPED))
    assert registry.read(entry.folder).is_over


def test_a_supervisor_that_is_killed_at_any_step_leaves_a_record_and_no_engine_that_is_not_found() -> None:
    command = [sys.executable, "-m", "tests.running.crashing_supervisor"]
    out = subprocess.run(command, cwd=ROOT, check=True, stdout=-1, timeout=120).stdout
    deaths = [json.loads(line) for line in out.splitlines()]
    assert len(deaths) > 30
    assert [death["killed"] for death in deaths] == [True] * (len(deaths) - 1) + [False]
    for death in deaths:
        assert death["problem"] is None, death
        assert death["found"] == death["engines"], death
        assert not death["supervised"], death
        assert death["state"] or not death["engines"], death
        assert len([name for name in death["files"] if name.endswith(".new")]) <= death["killed"], death
    # Every stage was died in, with an engine that nothing on the disk tells of among them.
    assert {death["state"] for death in deaths} == {None, "starting", "ready", "degraded"}
    assert any(death["engines"] and "engine.pid" not in death["files"] for death in deaths)
    assert (deaths[-1]["state"], len(deaths[-1]["engines"])) == ("degraded", 1)


def test_a_record_cut_off_at_any_byte_is_a_problem_and_no_more() -> None:
    whole = (written() / "instance.json").read_bytes()
    for size in range(len(whole)):
        folder = state_folder() / f"cut-{size}"
        folder.mkdir()
        (folder / "instance.json").write_bytes(whole[:size])
    found = {entry.name: entry for entry in registry.instances()}
    assert len(found) == len(whole) + 1
    assert found.pop("llama").instance
    last = f"cut-{len(whole) - 1}"  # without its line end: whole, and not that instance's
    assert found.pop(last).problem == "the record is another instance's: llama"
    assert all("damaged" in (entry.problem or "") and entry.instance is None for entry in found.values())


NEWER = json.dumps(instance_to_json(starting()) | {"schema_version": 99}).encode()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        pytest.param(b"", "damaged", id="empty"),
        pytest.param(os.urandom(4096), "damaged", id="binary"),
        pytest.param(b" " * (1 << 20) + b"1", "too large", id="huge"),
        pytest.param(b"[" * 100_000, "damaged", id="deep"),
        pytest.param(b"9" * 10_000, "damaged", id="a number without end"),
        pytest.param(b"[]", "damaged", id="a list"),
        pytest.param(NEWER, "newer mgpu", id="of a newer mgpu"),
    ],
)
def test_a_live_engine_is_found_although_the_record_is_damaged(content: bytes, problem: str) -> None:
    folder = written()
    (folder / "instance.json").write_bytes(content)
    with sleeper(folder) as engine:
        (entry,) = registry.instances()
        assert problem in (entry.problem or "")
        assert (entry.instance, entry.is_orphaned) == (None, True)
        assert [process.pid for process in entry.engine] == [engine.pid]
    assert registry.read(folder).is_over


def test_the_orphans_of_a_dead_leader_are_found_by_their_group_although_they_write_elsewhere() -> None:
    folder = written()
    with sleeper(folder, "sleep 600 >/dev/null 2>&1 & echo $!; exec sleep 600") as engine:
        started = identity(engine.pid)
        assert started
        registry.write_engine("llama", started)
        (folder / "instance.json").write_bytes(b"damaged")
        (entry,) = iter([registry.read(folder)])
        while len(entry.engine) < 2:  # the shell has not begun yet
            entry = registry.read(folder)
        os.kill(engine.pid, signal.SIGKILL)
        while alive(started):
            pass
        (orphan,) = registry.read(folder).engine
        assert (alive(orphan), orphan.pid != engine.pid) == (True, True)


def test_a_process_with_the_number_of_an_engine_is_not_the_engine() -> None:
    folder = written()
    with EngineProcess.start(["/bin/sleep", "600"], env={}, log_path=folder.parent / "log") as stranger:
        now = identity(stranger.pid)
        assert now
        for other in (replace(now, started_ticks=now.started_ticks - 1), replace(now, boot_id="an earlier boot")):
            registry.write_engine("llama", other)
            assert not alive(other)
            assert registry.read(folder).engine == ()
        registry.write_engine("llama", now)
        assert registry.read(folder).engine == (now,)


@contextlib.contextmanager
def left_behind(mark: str | None, out: Path) -> Iterator[tuple[int, ...]]:
    """Two processes in a group whose leader is gone, started with the mark of an instance, and what they write to.

    That `engine.pid` names is somebody who had the leader's number before.
    """
    env = registry.engine_environment(mark) if mark else {}
    script = 'for _ in 1 2; do sleep 600 >>"$0" 2>&1 & echo $!; done; read -r _'
    command = ["/bin/sh", "-c", script, str(out)]
    with subprocess.Popen(command, env=env, stdin=-1, stdout=-1, start_new_session=True) as leader:
        assert leader.stdin
        assert leader.stdout
        pids = tuple(int(leader.stdout.readline()) for _ in range(2))
        now = identity(leader.pid)
        assert now
        leader.stdin.close()
        leader.wait()
    registry.write_engine("llama", replace(now, started_ticks=5000))
    try:
        yield pids
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("mark", "out", "is_engine"),
    [
        pytest.param("llama", "/dev/null", True, id="what carries the instance's mark is its engine"),
        pytest.param(None, "llama/engine.log", True, id="what lost its mark and writes to the log is, too"),
        pytest.param(None, "/dev/null", False, id="a stranger has got the number of the group"),
        pytest.param("other", "/dev/null", False, id="another instance has got the number of the group"),
    ],
)
def test_a_group_without_its_leader_proves_nothing(mark: str | None, out: str, is_engine: bool) -> None:
    for name in ("other", "llama"):
        (written(name) / "engine.log").touch()
    path = Path(out) if out.startswith("/") else state_folder() / out
    with left_behind(mark, path) as pids:
        entry = registry.read(state_folder() / "llama")
        engine, unproven = ({process.pid for process in each} for each in (entry.engine, entry.unproven))
        assert (engine, unproven) == ((set(pids), set()) if is_engine else (set(), set(pids)))
        assert entry.is_orphaned == is_engine
        if mark == "other":
            other = registry.read(state_folder() / "other")
            assert {process.pid for process in other.engine} == set(pids)


def test_whoever_writes_to_the_log_is_shown_and_is_not_the_engine() -> None:
    folder = state_folder() / "llama"
    folder.mkdir()
    with EngineProcess.start(["/bin/sleep", "600"], env={}, log_path=folder / "engine.log") as writer:
        entry = registry.read(folder)
        assert (entry.engine, [process.pid for process in entry.unproven]) == ((), [writer.pid])
        assert entry.is_over


def test_an_engine_is_found_whatever_was_written_since_of_others() -> None:
    folder = written()
    with sleeper(folder) as orphan:
        for number in range(3):  # as many starts, each with its log and its line
            rotate(folder / "engine.log")
            (folder / "engine.log").touch()
            registry.write_engine("llama", ProcessId(pid=2**22, started_ticks=number, boot_id=""))
        assert [process.pid for process in registry.read(folder).engine] == [orphan.pid]


@pytest.mark.parametrize("line", ["", "x", "1 2 b\n", "-5 2 b\n", "99999999999 2 b\n", "9 9\n", "3 4 5 6\n", "é 1 1\n"])
def test_a_damaged_line_names_nobody(line: str) -> None:
    folder = written()
    (folder / "engine.pid").write_text(line)
    assert registry.read(folder).engine == ()


def test_a_zombie_is_dead_and_nobody_has_no_identity() -> None:
    process = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE)
    found = identity(process.pid)
    assert found
    assert alive(found)
    process.kill()
    while alive(found):  # it is not waited for
        pass
    assert identity(process.pid) is None
    process.communicate()
    assert [identity(pid) for pid in (0, -1, 2**22 + 1, 10**30)] == [None] * 4


def spoil(folder: Path, how: str) -> None:
    record = folder / "instance.json"
    kept = record.rename(folder.parent.parent / "kept.json")
    if how == "a link to a record":
        record.symlink_to(kept)
    elif how == "a pipe":
        os.mkfifo(record)
    elif how == "a folder":
        record.mkdir()
    elif how == "somebody else's record":
        kept.rename(record)
        os.chown(record, 65534, 65534)
    else:
        kept.rename(record)
        elsewhere = folder.rename(folder.parent.parent / "elsewhere")
        if how == "a link to a folder":
            folder.symlink_to(elsewhere)
        elif how == "somebody else's folder":
            elsewhere.rename(folder)
            os.chown(folder, 65534, 65534)


OTHERS = ("somebody else's record", "somebody else's folder")


@pytest.mark.parametrize("how", ["a link to a record", "a pipe", "a folder", "a link to a folder", *OTHERS])
def test_what_is_not_ours_is_not_seen(how: str) -> None:
    folder = written()
    if how in OTHERS and os.geteuid() != 0:
        return  # nobody but root can give a file away
    spoil(folder, how)
    assert registry.instances() == ()
    if "folder" in how and how != "a folder":
        with pytest.raises(NoAnswer):
            registry.clear("llama")


def test_folders_that_hold_nothing_of_an_instance_are_left_out() -> None:
    assert registry.instances() == ()
    for name in (".hidden", "no name", "empty", "logs"):
        (state_folder() / name).mkdir()
    (state_folder() / "logs" / "engine.log").touch()
    (state_folder() / "file").touch()
    assert registry.instances() == ()
    assert [folder.name for folder in registry.folders()] == ["empty", "logs"]


Full = Callable[[Path], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def small_files(_: Path) -> Iterator[None]:
    """While this lasts, no file can have more than 100 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """While this lasts, the disk that `folder` is on is full."""
    with (folder / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(4096))
    try:
        yield
    finally:
        (folder / "ballast").unlink()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A disk of 64 KiB at `folder`, if this user may mount one: root may."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("full", [small_files, full_disk])
def test_a_full_disk_leaves_the_record_that_was(full: Full) -> None:
    with small_disk(state_folder()) as mounted:
        if full is full_disk and not mounted:
            return
        folder = written()
        before = registry.read(folder).instance
        with full(state_folder()), pytest.raises(Missing) as missing:
            registry.write(replace(starting(), state=State.READY))
        assert missing.value.code == "disk-full"
        assert registry.read(folder).instance == before
        assert [path.name for path in folder.iterdir()] == ["instance.json"]
        registry.write(replace(starting(), state=State.READY))


@pytest.mark.parametrize("name", ["..", "a/b", "", "/etc"])
def test_names_cannot_leave_the_state_folder(name: str) -> None:
    with pytest.raises(UsageError):
        registry.clear(name)
    with pytest.raises(UsageError):
        registry.write_engine(name, ProcessId(pid=2, started_ticks=1, boot_id=""))


def test_what_was_left_by_a_writer_or_an_enemy_is_no_hindrance(tmp_path: Path) -> None:
    folder = written()
    victim = tmp_path / "victim"
    victim.write_text("whole")
    (folder / "instance.json.new").symlink_to(victim)
    registry.write(replace(starting(), state=State.READY))
    assert victim.read_text() == "whole"
    (folder / "instance.json").unlink()
    (folder / "instance.json").mkdir()
    with pytest.raises(Missing):
        registry.write(starting())


def test_the_dead_can_be_cleared_and_the_living_not() -> None:
    folder = written()
    with instance_folder("llama", chosen=True), pytest.raises(NoAnswer, match="it is running"):
        registry.clear("llama")
    with sleeper(folder), pytest.raises(NoAnswer, match="its engine still runs"):
        registry.clear("llama")
    (folder / "tmp" / "sockets").mkdir(parents=True)
    registry.clear("llama")
    assert not folder.exists()
    assert registry.instances() == ()
    with pytest.raises(NoAnswer, match="no instance named other"):
        registry.clear("other")
