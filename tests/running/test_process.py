"""Engines as processes, with small real programs: they end, are ended, and leave nothing behind."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mgpu.errors import EngineFailed, Missing
from mgpu.running.process import EngineProcess

LIMIT_S = 120
ROOT = Path(__file__).parents[2]
# Asked to end, it lets its child finish what it is at.
WAITS_FOR_ITS_CHILD = """
import signal, subprocess, sys, time
work = "import sys, time; print('busy', flush=True); sys.stdin.read(); time.sleep(0.2); print('finished', flush=True)"
child = subprocess.Popen([sys.executable, '-ISc', work], stdin=subprocess.PIPE)
def end(*_):
    child.stdin.close()
    sys.exit(child.wait())
signal.signal(signal.SIGTERM, end)
print('ready', flush=True)
while True: time.sleep(60)"""
IMPATIENT = ((signal.SIGTERM, 0.1), (signal.SIGTERM, 0.1), (signal.SIGKILL, LIMIT_S))

POLITE = "import time; print('ready', flush=True); time.sleep(60)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True)); {POLITE}"
INSISTS_ON_A_SECOND_TIME = f"""
import os, signal
def once(*_): signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
signal.signal(signal.SIGTERM, once); {POLITE}"""
WITH_A_DEAF_CHILD = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, '-ISc', {DEAF!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print('child', child.pid, flush=True); """


def python(script: str) -> list[str]:
    return [sys.executable, "-ISc", script]


def start(script: str, log_path: Path, *, ready: bool = True) -> EngineProcess:
    engine = EngineProcess.start(python(script), env={}, log_path=log_path)
    until(lambda: bool(engine.log_lines()) or not ready)
    return engine


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "engine.log"


@pytest.mark.parametrize(
    ("script", "status"),
    [
        pytest.param("", 0, id="with success"),
        pytest.param("raise SystemExit(3)", 3, id="with a status"),
        pytest.param("import os; os.kill(os.getpid(), 11)", -11, id="by a signal"),
    ],
)
def test_an_engine_that_ends_by_itself_says_how(script: str, status: int, log: Path) -> None:
    with start(script, log, ready=False) as engine:
        assert engine.wait(LIMIT_S) == status
        assert engine.poll() == status
        assert engine.stop() == status


def test_a_running_engine_has_no_status(log: Path) -> None:
    with start(POLITE, log) as engine:
        assert engine.poll() is None
        assert engine.wait(0.01) is None
        assert os.getpgid(engine.pid) == engine.pid


@pytest.mark.parametrize(
    ("script", "stages", "status"),
    [
        pytest.param(POLITE, ((signal.SIGTERM, LIMIT_S),), -signal.SIGTERM, id="a polite one goes when first asked"),
        pytest.param(
            INSISTS_ON_A_SECOND_TIME, ((signal.SIGTERM, 0.1), (signal.SIGTERM, LIMIT_S)), 1, id="one is asked twice"
        ),
        pytest.param(DEAF, IMPATIENT, -signal.SIGKILL, id="one that does not hear is killed"),
    ],
)
def test_stop(script: str, stages: tuple[tuple[signal.Signals, float], ...], status: int, log: Path) -> None:
    engine = start(script, log)
    begun = time.monotonic()
    assert engine.stop(stages) == status
    assert time.monotonic() - begun < LIMIT_S, "it waited on although the engine was gone"
    assert not alive(engine.pid)
    assert engine.stop(stages) == status, "a second stop has nothing to do"


@pytest.mark.parametrize(("leader_first", "finished"), [(True, True), (False, False)])
def test_an_engine_may_be_left_to_end_its_own_processes(leader_first: bool, finished: bool, log: Path) -> None:
    engine = start(WAITS_FOR_ITS_CHILD, log)
    until(lambda: {"busy", "ready"} <= set(engine.log_lines()))
    engine.stop(((signal.SIGTERM, LIMIT_S),), leader_first=leader_first)
    assert ("finished" in engine.log_lines()) == finished


def test_an_engine_that_outlives_all_stages_has_no_status_and_can_be_stopped_again(log: Path) -> None:
    engine = start(DEAF, log)
    assert engine.stop(IMPATIENT[:1]) is None
    assert alive(engine.pid)
    assert engine.stop(IMPATIENT) == -signal.SIGKILL


def child_of(engine: EngineProcess) -> int:
    word, pid = engine.log_lines()[0].split()
    assert (word, alive(int(pid))) == ("child", True)
    return int(pid)


def test_a_child_that_does_not_hear_goes_with_its_engine(log: Path) -> None:
    engine = start(WITH_A_DEAF_CHILD + "time.sleep(60)", log)
    child = child_of(engine)
    assert engine.stop() == -signal.SIGTERM
    until(lambda: not alive(child))


def test_what_a_dead_engine_left_behind_goes_when_its_death_is_seen(log: Path) -> None:
    with start(WITH_A_DEAF_CHILD + "input()", log) as engine:  # ends: its standard input is empty
        child = int(engine.log_lines()[0].split()[1])
        assert engine.wait(LIMIT_S) == 1
        until(lambda: not alive(child))


def test_an_engine_whose_death_was_seen_is_never_signalled_again(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start("", log, ready=False) as engine:
        engine.wait(LIMIT_S)
        # By now its number may be another's.
        monkeypatch.setattr(os, "killpg", lambda *_: pytest.fail("it was signalled"))
        engine.stop()


def test_an_interrupt_while_stopping_goes_on_to_the_next_stage(log: Path) -> None:
    engine = start(DEAF, log)

    def interrupt_when_asked() -> None:
        until(lambda: "asked" in engine.log_lines())
        os.kill(os.getpid(), signal.SIGINT)

    user = threading.Thread(target=interrupt_when_asked)
    user.start()
    begun = time.monotonic()
    status = engine.stop(((signal.SIGTERM, 10 * LIMIT_S), (signal.SIGKILL, LIMIT_S)))
    user.join()
    assert status == -signal.SIGKILL
    assert time.monotonic() - begun < 5 * LIMIT_S


def test_an_engine_is_stopped_whatever_happens_inside(log: Path) -> None:
    with pytest.raises(ZeroDivisionError), start(POLITE, log) as engine:
        raise ZeroDivisionError
    assert engine.poll() == -signal.SIGTERM


def test_the_log_is_the_users_alone_and_holds_both_streams(log: Path) -> None:
    before = os.umask(0)
    try:
        with start("import sys; print('out', flush=True); print('err\\n\\xff', file=sys.stderr)", log) as engine:
            assert engine.wait(LIMIT_S) == 0
    finally:
        os.umask(before)
    assert log.stat().st_mode & 0o777 == 0o600
    assert engine.log_lines()[:2] == ["out", "err"]


def test_a_log_begins_anew_and_bytes_that_are_no_text_are_replaced(log: Path) -> None:
    log.write_text("of the run before\n")
    with start("import os; os.write(1, b'\\xff\\n')", log, ready=False) as engine:
        engine.wait(LIMIT_S)
        assert engine.log_lines() == ["\N{REPLACEMENT CHARACTER}"]
    log.unlink()
    assert engine.log_lines() == []


def test_the_environment_is_exactly_what_was_given(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with EngineProcess.start(["/usr/bin/env"], env={"ONE": "1", "TWO": "a b"}, log_path=log) as engine:
        engine.wait(LIMIT_S)
    assert sorted(engine.log_lines()) == ["ONE=1", "TWO=a b"]


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        pytest.param(None, 0, id="missing"),
        pytest.param("#!/bin/sh\n", 0o644, id="not executable"),
        pytest.param("#!/no/such/interpreter\n", 0o755, id="interpreter missing"),
        pytest.param("no program", 0o755, id="no program"),
    ],
)
def test_a_program_that_cannot_run_is_a_broken_engine(content: str | None, mode: int, log: Path) -> None:
    program = log.with_name("program")
    if content is not None:
        program.write_text(content)
        program.chmod(mode)
    with pytest.raises(EngineFailed) as failed:
        EngineProcess.start([str(program)], env={}, log_path=log)
    assert failed.value.code == "engine-broken"
    assert str(program) in failed.value.message


def test_a_log_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(Missing) as missing:
        EngineProcess.start(python(POLITE), env={}, log_path=tmp_path)
    assert missing.value.code == "state-folder"


def test_the_engine_dies_with_a_killed_parent(log: Path) -> None:
    script = f"""
import sys, time
from pathlib import Path
from mgpu.running.process import EngineProcess
engine = EngineProcess.start([sys.executable, "-ISc", {DEAF!r}], env={{}}, log_path=Path({str(log)!r}))
while not engine.log_lines(): time.sleep(0.01)
print(engine.pid, flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(ROOT)}) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
        until(lambda: not alive(pid))


@pytest.fixture
def one_more_file() -> Iterator[None]:
    """This process may open one file more than it has, and then none."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("one_more_file")
def test_a_process_that_the_system_has_none_for_is_no_broken_engine(log: Path) -> None:
    with pytest.raises(Missing) as missing:
        EngineProcess.start([sys.executable], env={}, log_path=log)
    assert missing.value.code == "no-resources"
    assert sys.executable in missing.value.message
