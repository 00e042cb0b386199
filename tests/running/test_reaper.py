"""The reaper with small real engines: whatever happens to mgpu, nothing of an engine is left."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgpu.errors import EngineFailed, Missing
from mgpu.running import reaper
from mgpu.running.guard import private_folder, watch
from mgpu.running.process import EngineProcess
from tests.fakes.engines import LIMIT_S, until

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = Path("/dev/shm")

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
# What vLLM does: a worker that does not hear, sockets in TMPDIR, shared memory, a semaphore nobody unlinks.
ENGINE = f"""
import multiprocessing, os, pathlib, socket, subprocess, sys, time
from multiprocessing import shared_memory
folder = pathlib.Path(os.environ["TMPDIR"])
while not (folder.parent / "go").exists(): time.sleep(0.01)  # what was there before the reaper is not the engine's
listener = socket.socket(socket.AF_UNIX); listener.bind(str(folder / "socket"))
(folder / "cache").mkdir(); (folder / "cache" / "file").write_text("x"); (folder / "link").symlink_to("cache")
untracked = os.open("/dev/shm/mgpu-test-" + str(os.getpid()), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
os.truncate(untracked, 4096)
import mmap
mapped = mmap.mmap(untracked, 4096)
segment = shared_memory.SharedMemory(create=True, size=4096)
semaphore = multiprocessing.get_context("spawn").Semaphore()
worker = subprocess.Popen([sys.executable, "-ISc", {DEAF!r}], stdout=subprocess.PIPE)
worker.stdout.readline()
names = [f"mgpu-test-{os.getpid()}", segment.name.strip("/"), "sem." + semaphore._semlock.name.strip("/")]
print("worker", worker.pid, *names, flush=True)
time.sleep(600)
"""
# mgpu, as far as the reaper is concerned.
LAUNCHER = """
import os, pathlib, sys, time
from mgpu.running.process import EngineProcess
from mgpu.running.guard import watch
folder = pathlib.Path(sys.argv[1])
(folder / "tmp").mkdir()
env = {**os.environ, "TMPDIR": str(folder / "tmp")}
engine = EngineProcess.start([sys.executable, "-c", sys.argv[2]], env=env, log_path=folder / "engine.log")
reaper = watch(engine.pid, folder / "tmp", grace_s=0.2)
(folder / "go").touch()
print(engine.pid, reaper.pid, flush=True)
sys.stdin.read()
reaper.close() if sys.argv[3] == "close" else os._exit(3)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def sleeps_of(pid: int) -> int:
    """How often a process has gone to sleep by itself."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def shared_files(folder: Path) -> list[Path]:
    """What of the engine's shared memory has a name: Python unlinks that of a semaphore at once."""
    names = (folder / "engine.log").read_text().split()[2:]
    return [path for name in names if (path := SHARED_MEMORY / name).exists()]


@contextlib.contextmanager
def launcher(folder: Path, end: str = "") -> Iterator[tuple[subprocess.Popen[str], int, int, int]]:
    """A launcher whose engine is up and was looked at by the reaper, with the pids of engine, worker and reaper."""
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(folder), ENGINE, end],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    with process:
        try:
            assert process.stdout
            engine, reaper_pid = map(int, process.stdout.readline().split())
            log = folder / "engine.log"
            until(lambda: "worker" in log.read_text())
            worker = int(log.read_text().split()[1])
            # The files of what is gone at once must have been seen before: the reaper has looked again, twice.
            looked = sleeps_of(reaper_pid)
            until(lambda: sleeps_of(reaper_pid) >= looked + 3)
            assert alive(engine)
            assert alive(worker)
            yield process, engine, worker, reaper_pid
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("end", "how"),
    [
        pytest.param("", "kill", id="mgpu is killed"),
        pytest.param("", "exit", id="mgpu ends without stopping it"),
        pytest.param("close", "exit", id="mgpu leaves the end to the reaper"),
    ],
)
def test_nothing_outlives_mgpu(end: str, how: str, tmp_path: Path) -> None:
    with launcher(tmp_path, end) as (process, engine, worker, reaper_pid):
        assert len(shared_files(tmp_path)) >= 2, "the engine has made no shared memory"
        assert process.stdin
        process.kill() if how == "kill" else process.stdin.close()
        until(lambda: not alive(engine) and not alive(worker))
        until(lambda: not alive(reaper_pid))
        assert not (tmp_path / "tmp").exists()
        assert not shared_files(tmp_path)
        assert (tmp_path / "engine.log").exists(), "only TMPDIR is the engine's"


def test_after_a_normal_stop_the_reaper_tidies_up_and_ends(tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    env = dict(os.environ) | {"TMPDIR": str(folder)}
    engine = EngineProcess.start([sys.executable, "-c", ENGINE], env=env, log_path=tmp_path / "engine.log")
    with watch(engine.pid, folder) as guard:
        (tmp_path / "go").touch()
        until(lambda: bool(engine.log_lines()))
        assert shared_files(tmp_path)
        time.sleep(2 * reaper._LOOK_EVERY_S)
        engine.stop()
        begun = time.monotonic()
        guard.close()
        assert time.monotonic() - begun < 5, "it waited for an engine that had ended"
        assert not alive(guard.pid)
        assert not folder.exists()
        assert not shared_files(tmp_path)
        guard.close()


POLITE = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("bye", flush=True), sys.exit(0)))
print("up", flush=True); time.sleep(600)"""


@pytest.mark.parametrize(
    ("script", "grace_s", "status"),
    [
        pytest.param(POLITE, LIMIT_S, 0, id="a polite engine may end by itself"),
        pytest.param(DEAF, 0.1, -signal.SIGKILL, id="one that does not hear is killed"),
    ],
)
def test_an_engine_is_asked_before_it_is_killed(script: str, grace_s: float, status: int) -> None:
    with subprocess.Popen([sys.executable, "-ISc", script], stdout=subprocess.PIPE, process_group=0) as engine:
        assert engine.stdout
        engine.stdout.readline()
        watch(engine.pid, grace_s=grace_s).close()
        assert engine.wait(LIMIT_S) == status
        assert (engine.stdout.read() == b"bye\n") == (status == 0)


def test_an_engine_that_is_gone_already_leaves_nothing_to_do(tmp_path: Path) -> None:
    with subprocess.Popen(["/bin/true"], process_group=0) as engine:
        engine.wait()
        with watch(engine.pid, tmp_path / "never made") as guard:
            pass
        assert not alive(guard.pid)


def run_reaper(pid: int, started: int, mark: str = "") -> None:
    command = [sys.executable, "-IS", reaper.__file__, str(pid), str(started), "0.1", "", "", mark]
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=LIMIT_S, check=True)


def test_a_reaper_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EngineFailed) as caught:
        watch(os.getpid())
    assert caught.value.code == "reaper-failed"


def test_a_process_that_got_the_engines_number_later_is_left_alone() -> None:
    with subprocess.Popen(["/bin/sleep", "600"], process_group=0) as stranger:
        found = reaper._find(stranger.pid)
        assert found
        run_reaper(stranger.pid, found.started - 1)
        assert stranger.poll() is None
        run_reaper(stranger.pid, found.started)
        assert stranger.wait(LIMIT_S) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("mark", "ends"),
    [
        pytest.param("a1.b2", True, id="of this start"),
        pytest.param("a1.c3", False, id="of a later start of the instance"),
        pytest.param("", False, id="of nobody"),
    ],
)
def test_what_has_left_the_group_is_known_by_its_mark(mark: str, ends: bool) -> None:
    env = {"MGPU_INSTANCE": mark} if mark else {}
    with (
        subprocess.Popen(["/bin/sleep", "600"], process_group=0) as engine,
        subprocess.Popen(["/bin/sleep", "600"], env=env, start_new_session=True) as other,
    ):
        run_reaper(engine.pid, reaper.started_ticks(engine.pid), "a1.b2")
        assert engine.wait(LIMIT_S) == -signal.SIGTERM
        if ends:
            assert other.wait(LIMIT_S) == -signal.SIGKILL
        assert other.poll() == (-signal.SIGKILL if ends else None)
        other.kill()


def test_the_temporary_folder_of_a_later_engine_stays(tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    with subprocess.Popen(["/bin/true"], process_group=0) as engine, watch(engine.pid, folder):
        folder.rename(tmp_path / "before")
        folder.mkdir()
        (folder / "socket").touch()
    assert (folder / "socket").exists()


def test_signals_do_not_keep_the_reaper_from_its_work(tmp_path: Path) -> None:
    with subprocess.Popen(["/bin/sleep", "600"], process_group=0) as engine, watch(engine.pid) as guard:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(guard.pid, number)
        guard.close()
        assert engine.wait(LIMIT_S) == -signal.SIGTERM


@contextlib.contextmanager
def shared_file(name: str) -> Iterator[Path]:
    path = SHARED_MEMORY / f"mgpu-test-{os.getpid()}-{name}"
    path.write_bytes(bytes(4096))
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


MAPS = """
import mmap, os, signal, sys
sys.stdin.readline()
maps = []
for path in sys.argv[1:]:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.truncate(file, 4096)
    maps.append(mmap.mmap(file, 4096))
print("up", flush=True); signal.pause()"""


def test_only_what_is_the_engines_alone_is_removed() -> None:
    names = [SHARED_MEMORY / f"mgpu-test-{os.getpid()}-{name}" for name in ("own", "shared")]
    with (
        shared_file("before") as before,
        subprocess.Popen(
            [sys.executable, "-ISc", MAPS, str(before), *map(str, names)],
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            process_group=0,
        ) as engine,
    ):
        guard = watch(engine.pid)
        assert engine.stdin
        assert engine.stdout
        engine.stdin.write(b"\n")
        engine.stdin.flush()
        engine.stdout.readline()
        with shared_file("strangers") as strangers, names[1].open("r+b") as file, mmap.mmap(file.fileno(), 4096):
            guard.close()
            engine.wait(LIMIT_S)
            assert not names[0].exists()
            assert before.exists(), "it was there before the engine"
            assert strangers.exists(), "the engine never had it"
            assert names[1].exists(), "somebody else still uses it"
            names[1].unlink()


def test_what_others_share_costs_nothing_in_the_long_run(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def mapped(pid: int) -> set[tuple[int, int]]:
        looks.append(pid)
        return set()

    monkeypatch.setattr(reaper, "mapped", mapped)
    with subprocess.Popen(["/bin/sleep", "600"], process_group=0) as engine:
        found = reaper._find(engine.pid)
        assert found
        segments = reaper._Segments(reaper._Group(engine.pid, found.started))
        segments.look()
        assert looks == [], "nothing is new"
        with shared_file("strangers"):
            for _ in range(100):
                segments.look()
            assert 0 < len(looks) <= reaper._MOST_LOOKS
            looks.clear()
            segments.look(last=True)
            assert looks == [engine.pid]
        engine.kill()


def test_a_link_in_place_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").touch()
    (tmp_path / "tmp").symlink_to(target)
    with subprocess.Popen(["/bin/true"], process_group=0) as engine, watch(engine.pid, tmp_path / "tmp"):
        pass
    assert (target / "precious").exists()


def test_a_private_folder_is_new_empty_and_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "instance" / "tmp"
    for _ in range(2):
        assert private_folder(path) == path
        assert path.stat().st_mode & 0o777 == 0o700
        assert not list(path.iterdir())
        (path / "left").touch()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_private_folder_is_never_in_the_place_of_something_else(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tmp"
    path.touch() if kind == "file" else path.symlink_to(tmp_path)
    with pytest.raises(Missing) as caught:
        private_folder(path)
    assert caught.value.code == "temporary-folder"


def test_it_is_small() -> None:
    with subprocess.Popen(["/bin/sleep", "600"], process_group=0) as engine, watch(engine.pid) as guard:
        rollup = Path(f"/proc/{guard.pid}/smaps_rollup").read_text().splitlines()
        own = sum(int(line.split()[1]) for line in rollup if line.startswith("Private_"))
        assert own < 10 * 1024, f"{own} KiB"


def test_in_haste_nothing_is_asked(tmp_path: Path) -> None:
    engine = EngineProcess.start([sys.executable, "-ISc", DEAF], env={}, log_path=tmp_path / "engine.log")
    until(lambda: engine.log_lines() == ["up"])
    watch(engine.pid, grace_s=3600).close(at_once=True)
    assert engine.wait(LIMIT_S) == -signal.SIGKILL
