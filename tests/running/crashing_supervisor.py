"""A supervisor that is killed at every step, one after the other: `python -m tests.running.crashing_supervisor`.

Each line of its output says what a reader finds after one such death, and what is true. The calls to the system that
are counted as steps are those of starting an engine and writing it down; of a write half is done.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mgpu.running import registry
from mgpu.running.identity import identity
from mgpu.running.instance import Instance, State
from mgpu.running.state import instance_folder, state_folder

NAME = "llama"
STEPS = ("mkdir", "open", "read", "write", "fsync", "rename", "unlink", "close")
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def starting(name: str = NAME) -> Instance:
    me = identity(os.getpid())
    assert me
    return Instance(
        name=name, state=State.STARTING, model="a model", started_at="2026-01-02T03:04:05Z", supervisor=me, argv=("é",)
    )


def supervise() -> None:
    """What a supervisor does with the registry; the engine outlives it."""
    with instance_folder(NAME, chosen=True) as (name, folder):
        registry.write(starting())
        env = registry.engine_environment(name)
        log = os.open(folder / registry.LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        process = subprocess.Popen(["/bin/sleep", "600"], env=env, stdin=-3, stdout=log, stderr=log, process_group=0)
        os.close(log)
        engine = identity(process.pid)
        assert engine
        registry.write_engine(name, engine)
        ready = replace(starting(), state=State.READY, engine=engine, group=process.pid)
        registry.write(ready)
        registry.write(replace(ready, state=State.DEGRADED))
        os._exit(0)


def die_at(step: int) -> None:
    """Have this process killed at its `step`-th call to the system."""
    left = step

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*words: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                if name == "write":
                    call(words[0], words[1][: len(words[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*words, **named)

        return counting

    for name in STEPS:
        setattr(os, name, counted(name, getattr(os, name)))


def orphans() -> list[int]:
    """The children of the dead, which are this process's by now, once they are the programs they shall be."""
    children = [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    for pid in children:
        deadline = time.monotonic() + 30
        while b"sleep" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.005)
    return children


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    killed, step = True, 0
    while killed:
        step += 1
        child = os.fork()
        if child == 0:
            die_at(step)
            supervise()
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        engines = orphans()
        entry = registry.read(state_folder() / NAME)
        found = {
            "step": step,
            "killed": killed,
            "state": entry.instance.state if entry.instance else None,
            "problem": entry.problem,
            "supervised": entry.supervisor is not None,
            "engines": engines,
            "found": [process.pid for process in entry.engine],
            "files": sorted(path.name for path in entry.folder.glob("*")),
        }
        sys.stdout.write(json.dumps(found) + "\n")
        for pid in engines:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if killed and step % 2:  # the next one finds what this one left, or nothing
            for path in entry.folder.glob("*"):
                path.unlink()


if __name__ == "__main__":
    main()
