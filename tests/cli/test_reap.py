"""`mgpu reap`: what nobody looks after is shown, then ended with all that it left; nobody else is touched."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from mgpu.machine.host import read_host
from mgpu.machine.probe import machine_of
from mgpu.running import registry
from mgpu.running.census import census_of
from mgpu.running.instance import State
from mgpu.running.leftovers import end, leftovers
from mgpu.running.state import held_folder

from .contract import REAP, checked
from .program import LIMIT_S, Mgpu, until
from .records import DEAF, engine, is_alive, record, reused, sleeper, supervisor, who
from .test_contract import TWO_CARDS

SHARED_MEMORY = Path("/dev/shm")
# An engine with shared memory under a name that tells nothing.
SHARING = f"""exec {sys.executable} -c '
import mmap, os, sys, time
file = open("/dev/shm/NAME", "w+b")
file.write(bytes(4096)); file.flush()
held = mmap.mmap(file.fileno(), 4096)
print("up", flush=True)
time.sleep(600)'"""


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def shared(name: str) -> Iterator[Path]:
    """The path of a segment, which is removed in the end."""
    path = SHARED_MEMORY / name
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("with_json", [False, True])
def test_nothing_to_do_is_one_sentence(mgpu: Mgpu, with_json: bool) -> None:
    with supervisor(mgpu, "llama") as folder:
        record("dead", state=State.FAILED)
        ended = mgpu("reap", *(["--json"] if with_json else []))
        assert (ended.exit_code, ended.err) == (0, "")
        if with_json:
            assert checked(ended.json, "reap", REAP) == {"reaped": []}
        else:
            assert ended.out == "nothing to reap: every engine of mgpu's has its mgpu\n"
        assert not (folder / "heard").exists()


def test_an_orphan_and_its_deaf_children_are_shown_and_ended(mgpu: Mgpu) -> None:
    with engine(mgpu, "llama") as process:
        everybody = [process.pid, *children(process.pid)]
        assert len(everybody) == 3
        folder = registry.read(record_folder("llama")).folder
        (folder / "tmp" / "deep").mkdir(parents=True)
        (folder / "tmp" / "deep" / "socket").touch()
        unasked = mgpu("reap")
        assert unasked.exit_code == 2
        assert "mgpu reap --yes" in unasked.err
        for words in ("llama: nobody looks after it", *(f"pid {pid}" for pid in everybody), "/tmp"):
            assert words in unasked.out, words
        assert all(map(is_alive, everybody))
        ended = mgpu("reap", "--yes", "--grace", "0.1")
        assert ended.exit_code == 0
        assert ended.out.endswith("llama: 3 processes ended, its temporary folder removed\n")
        assert not any(map(is_alive, everybody))
        assert sorted(path.name for path in folder.iterdir()) == ["engine.log", "instance.json", "lock"]
        entry = registry.read(folder)
        assert entry.instance
        assert (entry.instance.state, entry.instance.engine, entry.is_over) == (State.FAILED, None, True)
        assert "mgpu reap ended its engine" in mgpu("ps").out
        assert mgpu("reap").out.startswith("nothing to reap")


def record_folder(name: str) -> Path:
    from mgpu.running.state import state_folder

    return state_folder() / name


def test_the_named_alone_are_ended(mgpu: Mgpu) -> None:
    with engine(mgpu, "one") as one, engine(mgpu, "two") as two, supervisor(mgpu, "live"):
        unknown = mgpu("reap", "one", "nobody", "--yes", "--json").json["errors"][0]
        assert (unknown["code"], "nothing was ended" in unknown["message"]) == ("unknown-instance", True)
        assert mgpu("reap", "live", "--yes").out == "nothing to reap of live: its mgpu looks after it\n"
        assert "next     mgpu reap one --yes\n" in mgpu("reap", "one").err
        assert all(is_alive(process.pid) for process in (one, two))
        assert mgpu("reap", "one", "--yes", "--grace", "0").exit_code == 0
        assert (is_alive(one.pid), is_alive(two.pid)) == (False, True)
        assert mgpu("reap", "one", "--yes").out == "nothing to reap of one: nothing is left\n"


def test_one_that_hears_is_given_its_time(mgpu: Mgpu) -> None:
    script = "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.02; done"
    with engine(mgpu, "llama", script) as process:
        assert mgpu("reap", "--yes").exit_code == 0
        assert process.wait(LIMIT_S) == 0
        assert (record_folder("llama") / "engine.log").read_text().endswith("bye\n")


def test_the_shared_memory_of_an_orphan_goes_with_it_and_no_other(mgpu: Mgpu) -> None:
    mine, others = uuid.uuid4().hex, f"vllm_dist_{uuid.uuid4().hex}"
    with shared(mine) as segment, shared(others) as other:
        other.touch()
        with engine(mgpu, "llama", SHARING.replace("NAME", mine)):
            data = checked(mgpu("reap", "--yes", "--json").json, "reap", REAP)
            assert [each["path"] for each in data["reaped"][0]["segments"]] == [str(segment)]
            assert not segment.exists()
            assert other.exists()


def test_shared_memory_that_somebody_else_has_too_stays(mgpu: Mgpu) -> None:
    name = uuid.uuid4().hex
    with shared(name) as segment, engine(mgpu, "llama", SHARING.replace("NAME", name)):
        reader = (
            f"import mmap, time; file = open({str(segment)!r}, 'r+b'); held = mmap.mmap(file.fileno(), 0); "
            "print(flush=True); time.sleep(600)"
        )
        with subprocess.Popen([sys.executable, "-c", reader], stdout=-1, env=mgpu.environment) as other:
            assert other.stdout
            other.stdout.readline()
            assert mgpu("reap", "--yes").exit_code == 0
            assert segment.exists()
            other.kill()


def test_shared_memory_that_is_older_than_the_engine_stays(mgpu: Mgpu) -> None:
    name = uuid.uuid4().hex
    with shared(name) as segment:
        segment.write_bytes(bytes(4096))
        before = segment.stat().st_ctime
        script = (
            SHARING.replace("NAME", name).replace("w+b", "r+b").replace("file.write(bytes(4096)); file.flush()", "")
        )
        until(lambda: time.time() - before > 2.5, "it is older")
        with engine(mgpu, "llama", script):
            assert mgpu("reap", "--yes").exit_code == 0
        assert segment.exists()


def test_who_may_be_somebody_else_is_shown_and_left_alone(mgpu: Mgpu) -> None:
    folder = record("llama")
    with (folder / "engine.log").open("ab") as log, sleeper(mgpu, stdout=log) as writer:
        ended = mgpu("reap", "--yes")
        assert ended.exit_code == 0
        assert f"pid {writer.pid}: it may be somebody else's, and is left alone" in ended.out
        assert "nothing to reap" in ended.out
        (left,) = checked(mgpu("reap", "--yes", "--json").json, "reap", REAP)["reaped"]
        assert (writer.pid in [each["pid"] for each in left["unproven"]], left["processes"]) == (True, [])
        (folder / "tmp").mkdir()
        assert mgpu("reap", "--yes").exit_code == 0
        assert not (folder / "tmp").exists()


def test_an_orphan_is_not_lost_by_starts_under_its_name(mgpu: Mgpu, tiny: Path) -> None:
    (mgpu.state / "tiny").mkdir(parents=True, mode=0o700)
    environment = mgpu.environment | registry.engine_environment("tiny")
    with subprocess.Popen(["/bin/sleep", "600"], env=environment, start_new_session=True) as orphan:
        for words in (("-d",), ("--ask", "Hello")):
            ended = mgpu("run", tiny, *words, "--json")
            assert (ended.exit_code, ended.stream[-1]["errors"][0]["code"]) == (1, "orphaned"), ended
            assert ended.stream[-1]["errors"][0]["hint"] == "mgpu reap"
        assert is_alive(orphan.pid)
        assert mgpu("reap", "--yes").exit_code == 0
        assert orphan.wait(LIMIT_S) == -signal.SIGTERM


@pytest.mark.parametrize("with_record", [True, False])
def test_shared_memory_is_found_when_the_reaper_is_killed_too(mgpu: Mgpu, with_record: bool) -> None:
    folder = record("llama")
    with shared(uuid.uuid4().hex) as segment:
        segment.write_bytes(bytes(4096))
        status = segment.stat()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        (folder / "reaper").write_text(
            f"boot {boot}\nsegment {status.st_dev} {status.st_ino} {status.st_ctime_ns} {segment}\n"
        )
        if not with_record:
            (folder / "instance.json").write_text("damaged")
        data = checked(mgpu("reap", "--yes", "--json").json, "reap", REAP)
        assert [each["path"] for each in data["reaped"][0]["segments"]] == [str(segment)]
        assert not segment.exists()
        assert not (folder / "reaper").exists()


def test_what_somebody_has_begun_with_anew_is_left_to_him(mgpu: Mgpu) -> None:
    root = Path("/")
    folder = record("llama")
    (folder / "tmp").mkdir()
    (left,) = leftovers(census_of(registry.instances(), machine_of(read_host(root), (None, (), ()), ()), root))
    with held_folder("llama", chosen=True):
        kept = end(left, 0.0)
    assert (kept.folders, kept.kept_because) == ((), "somebody has begun with it anew")
    with registry.locked(folder):
        assert end(left, 0.0).kept_because == "somebody has its name just now"
    assert (folder / "tmp").exists()
    done = end(left, 0.0)
    assert (done.folders, done.kept_because) == ((folder / "tmp",), None)
    assert not (folder / "tmp").exists()


def test_a_damaged_record_hides_no_engine(mgpu: Mgpu) -> None:
    with engine(mgpu, "llama") as process:
        everybody = [process.pid, *children(process.pid)]
        (record_folder("llama") / "instance.json").write_text("damaged")
        (record_folder("llama") / "engine.pid").write_text(
            "{0.pid} {0.started_ticks} {0.boot_id}\n".format(who(process.pid))
        )
        assert mgpu("reap", "--yes", "--grace", "0").exit_code == 0
        assert not any(map(is_alive, everybody))
        assert "damaged" in mgpu("ps").out


def test_a_supervisor_that_is_killed_leaves_its_engine_to_reap(mgpu: Mgpu, tiny: Path) -> None:
    mgpu("run", "-d", tiny, FAKE_DEVICES=TWO_CARDS)
    (instance,) = mgpu("ps", "--json").json["data"]["instances"]
    reapers = [pid for pid in mgpu.processes() if b"reaper.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    for pid in (*reapers, instance["supervisor_pid"]):
        mgpu.kill(pid)
    until(lambda: not is_alive(instance["supervisor_pid"]), "the supervisor is gone")
    ended = mgpu("reap", "--yes")
    assert ended.exit_code == 0
    assert mgpu("reap").out.startswith("nothing to reap")
    mgpu.assert_nothing_left()
    assert mgpu("ps", "--json").json["data"]["instances"][0]["state"] == "failed"


def test_a_temporary_folder_alone_is_removed(mgpu: Mgpu) -> None:
    folder = record("llama")
    (folder / "tmp").mkdir()
    assert "llama: no process was left, its temporary folder removed" in mgpu("reap", "--yes").out
    assert not (folder / "tmp").exists()


def test_a_temporary_folder_that_is_a_link_is_not_followed(mgpu: Mgpu, tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    (record("llama") / "tmp").symlink_to(tmp_path)
    assert mgpu("reap", "--yes").exit_code == 0
    assert (tmp_path / "kept").exists()


def test_a_number_that_somebody_else_has_now_is_not_signalled(mgpu: Mgpu) -> None:
    with sleeper(mgpu) as other:
        record("llama", reused(other.pid), engine=reused(other.pid), group=other.pid)
        assert mgpu("reap", "--yes").out.startswith("nothing to reap")


def test_a_zombie_is_nothing_to_reap(mgpu: Mgpu) -> None:
    with engine(mgpu, "llama", "echo up; exec sleep 600") as process:
        process.kill()
        until(lambda: not is_alive(process.pid), "the engine is a zombie")
        assert mgpu("reap", "--yes").out.startswith("nothing to reap")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_another_users_process_is_left_alone_and_said(mgpu: Mgpu) -> None:
    with sleeper(mgpu, user=65534) as other:
        (record("llama", engine=who(other.pid), group=other.pid) / "tmp").mkdir()
        ended = mgpu("reap", "--yes", "--json", "--grace", "0.1")
        data = checked(ended.json, "reap", REAP)
        assert (ended.exit_code, ended.json["errors"][0]["code"]) == (1, "not-ended")
        assert data["reaped"][0]["remaining"] == [{"pid": other.pid, "why": "it is another user's"}]
        assert (record_folder("llama") / "tmp").exists()


def test_one_that_has_a_supervisor_again_is_left_alone(mgpu: Mgpu) -> None:
    with engine(mgpu, "llama", DEAF) as process:
        root = Path("/")
        (left,) = leftovers(census_of(registry.instances(), machine_of(read_host(root), (None, (), ()), ()), root))
        record("llama", who(os.getpid()), engine=who(process.pid), group=process.pid)
        outcome = end(left, 0.0)
        assert (outcome.ended, outcome.kept_because) == ((), "somebody has begun with it anew")
        assert is_alive(process.pid)


@pytest.mark.parametrize(
    ("answer", "exit_code"),
    [
        pytest.param("n\n", 1, id="no"),
        pytest.param("\n", 1, id="nothing"),
        pytest.param("\x04", 1, id="the end of the input"),
        pytest.param("\x03", 130, id="Ctrl-C"),
        # What comes when mgpu has not heard of the first for so long that it is told again.
        pytest.param((signal.SIGINT, signal.SIGALRM), 130, id="two signals at once"),
        pytest.param("y\n", 0, id="yes"),
    ],
)
def test_on_a_terminal_it_asks(mgpu: Mgpu, answer: str | tuple[signal.Signals, ...], exit_code: int) -> None:
    with engine(mgpu, "llama") as process:
        mine, theirs = pty.openpty()
        asking = subprocess.Popen(
            mgpu.command("reap", "--grace", "0"),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=mgpu.with_variables(),
            start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # which makes it its terminal
        )
        shown = b""
        deadline = time.monotonic() + LIMIT_S
        while b"[y/N]" not in shown:
            assert time.monotonic() < deadline, shown
            if select.select([mine], [], [], 0.1)[0]:
                shown += os.read(mine, 65536)
        if isinstance(answer, str):
            os.write(mine, answer.encode())
        else:
            until(lambda: psutil.Process(asking.pid).status() == psutil.STATUS_SLEEPING, "it waits for the answer")
            for number in (signal.SIGSTOP, *answer, signal.SIGCONT):
                asking.send_signal(number)
        assert asking.wait(LIMIT_S) == exit_code
        assert is_alive(process.pid) == (exit_code != 0)
        os.close(mine)
        os.close(theirs)


def test_json_never_asks_and_tells_what_would_be_done(mgpu: Mgpu) -> None:
    with engine(mgpu, "llama") as process:
        (record_folder("llama") / "tmp").mkdir()
        ended = mgpu("reap", "--json")
        (would,) = checked(ended.json, "reap", REAP)["reaped"]
        assert {each["pid"] for each in would["processes"]} == {process.pid, *children(process.pid)}
        assert (would["name"], would["folders"]) == ("llama", [str(record_folder("llama") / "tmp")])
        assert (ended.exit_code, ended.json["errors"][0]["hint"]) == (2, "mgpu reap --yes")
        assert is_alive(process.pid)


def test_an_interrupted_reap_can_be_repeated(mgpu: Mgpu) -> None:
    with engine(mgpu, "llama") as process:
        running = mgpu.start("reap", "--yes", "--grace", "500")
        running.line("reap +llama: SIGTERM")
        assert running.end(signal.SIGINT).exit_code == 130
        assert is_alive(process.pid)
        ended = mgpu("reap", "--yes", "--grace", "0", "--json")
        assert json.dumps(ended.json["data"]).count("remaining") == 1
        assert not is_alive(process.pid)
