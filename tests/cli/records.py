"""Records of instances made without a model: their supervisors and engines are real processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mgpu.running import registry
from mgpu.running.identity import identity
from mgpu.running.instance import Instance, ProcessId, State
from mgpu.running.state import state_folder

from .program import ROOT, Mgpu, until

NOBODY = ProcessId(pid=2**22, started_ticks=1, boot_id="")
"""A process that is gone."""

# A shell that ignores SIGTERM as its children do, one of which leaves the log alone.
DEAF = "trap '' TERM; sleep 600 >/dev/null 2>&1 & sleep 600 & echo up $!; wait"
# It hears of a stop, and ends when there is a file `go`.
SUPERVISOR = """
import fcntl, os, signal, sys, time
from pathlib import Path
from mgpu.running.stopping import asked_grace_s
folder = Path(sys.argv[1])
lock = open(folder / "lock", "a")
fcntl.flock(lock, fcntl.LOCK_EX)
def hear(*_):
    (folder / "heard").write_text(str(asked_grace_s(folder)))
signal.signal(signal.SIGTERM, hear)
(folder / "up").touch()
while not ((folder / "heard").exists() and (folder / "go").exists()):
    time.sleep(0.01)
exec((folder / "go").read_text())
"""


def record(name: str, supervisor: ProcessId = NOBODY, state: State = State.READY, **more: Any) -> Path:
    """Write a record; returns the instance's folder."""
    instance = Instance(
        name=name,
        state=state,
        backend="llama.cpp",
        model="a model",
        url="http://127.0.0.1:8080",
        started_at="2026-01-02T03:04:05Z",
        ready_at="2026-01-02T03:04:15Z",
        supervisor=supervisor,
    )
    folder = state_folder() / name
    folder.mkdir(mode=0o700, exist_ok=True)
    registry.write(replace(instance, **more))
    return folder


def who(pid: int) -> ProcessId:
    found = identity(pid)
    assert found, f"{pid} is gone"
    return found


def reused(pid: int) -> ProcessId:
    """Somebody who had this number before."""
    now = who(pid)
    return replace(now, started_ticks=now.started_ticks - 1)


@contextmanager
def engine(mgpu: Mgpu, name: str, script: str = DEAF, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """An engine that leads a group of its own and is up, with a record; it is killed in the end."""
    folder = record(name, **more)
    with (folder / "engine.log").open("wb") as log:
        process = subprocess.Popen(
            ["/bin/sh", "-c", script], stdout=log, stderr=log, process_group=0, env=mgpu.environment, cwd="/"
        )
    try:
        until(lambda: b"up" in (folder / "engine.log").read_bytes(), "the engine is up")
        record(name, engine=who(process.pid), group=process.pid, **more)
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def supervisor(mgpu: Mgpu, name: str, **more: Any) -> Iterator[Path]:
    """An instance without an engine whose supervisor is there, and its folder."""
    folder = record(name, **more)
    environment = mgpu.environment | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(folder)], env=environment, cwd="/")
    try:
        until((folder / "up").exists, "the supervisor is up")
        record(name, who(process.pid), **more)
        yield folder
    finally:
        process.kill()
        process.wait()


@contextmanager
def sleeper(mgpu: Mgpu, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with any instance; nobody must have ended it."""
    process = subprocess.Popen(["/bin/sleep", "600"], process_group=0, env=mgpu.environment, cwd="/", **more)
    try:
        yield process
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def is_alive(pid: int) -> bool:
    return identity(pid) is not None


def go(folder: Path, program: str = "") -> None:
    """Let a supervisor end, after it has done what `program` says."""
    new = folder / "go.new"
    new.write_text(program)
    new.replace(folder / "go")
