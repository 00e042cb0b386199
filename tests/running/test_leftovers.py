"""Before a start: what an earlier engine has left is waited for, removed, or said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from mgpu.errors import NoAnswer
from mgpu.running import leftovers, registry, segments
from mgpu.running.guard import watch
from mgpu.running.identity import MARK
from mgpu.running.leftovers import require_gone
from mgpu.running.state import held_folder
from tests.fakes.engines import until

ROOT = Path(__file__).parents[2]
# An mgpu that is about to be killed, with an engine that takes its time to end.
LAUNCHER = """
import sys, time
from pathlib import Path
from mgpu.running.guard import watch
from mgpu.running.process import EngineProcess
from mgpu.running.registry import engine_environment
folder = Path(sys.argv[1])
env = engine_environment(folder.name)
script = "trap '' TERM; sleep 600 & exec sleep 600"
engine = EngineProcess.start(["/bin/sh", "-c", script], env=env, log_path=folder / "engine.log")
watch(engine.pid, mark=env["MGPU_INSTANCE"], notes=folder / "reaper", grace_s=0.1)
print("up", flush=True)
time.sleep(600)
"""


def test_where_nothing_is_left_nothing_is_waited_for() -> None:
    with held_folder("llama", chosen=True) as held:
        require_gone(held.folder)
        assert sorted(path.name for path in held.folder.iterdir()) == ["lock"]


@pytest.mark.parametrize(
    "ended", [pytest.param(True, id="it works"), pytest.param(False, id="it hangs, or cannot end the engine")]
)
def test_an_earlier_reaper_is_waited_for(ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with held_folder("llama", chosen=True) as held:
        env = registry.engine_environment("llama")
        with subprocess.Popen(["/bin/sleep", "600"], env=env, process_group=0) as engine:
            guard = watch(engine.pid, mark=env[MARK], notes=held.folder / segments.NOTES)
            if ended:
                engine.kill()
                engine.wait()
                process = guard._process
                assert process.stdin
                process.stdin.close()  # as the end of its mgpu
                require_gone(held.folder)
                assert process.wait(0) == 0
            else:
                monkeypatch.setattr(leftovers, "_REAPER_LIMIT_S", 0.1)
                os.kill(guard.pid, signal.SIGSTOP)
                with pytest.raises(NoAnswer) as caught:
                    require_gone(held.folder)
                assert (caught.value.code, caught.value.hint) == ("orphaned", "mgpu reap")
                os.kill(guard.pid, signal.SIGCONT)
                engine.kill()
                guard.close()


def test_an_engine_that_nobody_ends_is_said() -> None:
    with held_folder("llama", chosen=True) as held:
        env = registry.engine_environment("llama")
        with subprocess.Popen(["/bin/sleep", "600"], env=env, start_new_session=True) as engine:
            with pytest.raises(NoAnswer, match=f"pid {engine.pid}") as caught:
                require_gone(held.folder)
            assert caught.value.code == "orphaned"
            engine.kill()
            engine.wait()
        require_gone(held.folder)


def test_shared_memory_that_an_earlier_engine_left_is_removed() -> None:
    segment = Path("/dev/shm") / uuid.uuid4().hex
    segment.touch()
    try:
        with held_folder("llama", chosen=True) as held:
            status = segment.stat()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            line = f"segment {status.st_dev} {status.st_ino} {status.st_ctime_ns} {segment}"
            (held.folder / segments.NOTES).write_text(f"boot {boot}\n{line}\n")
            require_gone(held.folder)
            assert not segment.exists()
    finally:
        segment.unlink(missing_ok=True)


def test_two_engines_of_one_instance_have_one_mark_and_each_its_own_start() -> None:
    with held_folder("llama", chosen=True), held_folder("other", chosen=True):
        first, second = (registry.engine_environment("llama")[MARK] for _ in range(2))
        assert first != second
        assert first.partition(".")[0] == second.partition(".")[0]
        assert registry.engine_environment("other")[MARK].partition(".")[0] != first.partition(".")[0]


@pytest.mark.parametrize("text", ["", "x" * 32, "a" * 31, "a" * 64, "A" * 32, "a" * 32 + "\nb", "\xff" * 32])
def test_a_damaged_mark_is_nobodys_and_made_anew(text: str) -> None:
    with held_folder("llama", chosen=True) as held:
        (held.folder / "mark").write_text(text, encoding="latin-1")
        env = {MARK: f"{text.strip()}.1"} if text.isascii() else {}
        with subprocess.Popen(["/bin/sleep", "600"], env=env, start_new_session=True) as other:
            assert registry.read(held.folder).engine == ()
            made = registry.engine_environment("llama")[MARK]
            assert (held.folder / "mark").read_text().strip() == made.partition(".")[0]
            other.kill()


def test_the_end_of_a_killed_mgpu_is_waited_for_by_the_next_start() -> None:
    with held_folder("llama", chosen=True) as held:
        command = [sys.executable, "-c", LAUNCHER, str(held.folder)]
        with subprocess.Popen(command, stdout=-1, env=os.environ | {"PYTHONPATH": str(ROOT)}) as launcher:
            assert launcher.stdout
            launcher.stdout.readline()
            until(lambda: len(registry.read(held.folder).engine) == 2)
            launcher.kill()
            launcher.wait()
        require_gone(held.folder)
        entry = registry.read(held.folder)
        assert (entry.engine, entry.reaper) == ((), None)
        assert not (held.folder / segments.NOTES).exists()
