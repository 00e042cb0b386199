"""Engines that are started and stopped again and again, and many at once: nothing may grow, nothing may be lost."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.faults.ground import Ground
from benchmarks.faults.row import Row
from mgpu.running import registry
from mgpu.running.instance import Instance, State
from mgpu.units import MIB
from tests.cli.deaths import answers
from tests.cli.program import Mgpu, until
from tests.cli.traces import held, left
from tests.fakes.devices import free_port

CYCLES = "MGPU_FAULT_CYCLES"
INSTANCES = "MGPU_FAULT_INSTANCES"
_CYCLES = 500
_INSTANCES = 50
_THROUGH_THE_PROGRAM = 10  # of so many cycles, one
_NAME = "cycled"
_PATIENT = Path(__file__).with_name("patient.py")
# What an allocator keeps differs from look to look; a leak of 4 KiB a cycle would be 2 MiB.
_MEMORY_BYTES = 2 * MIB
# All start at once, on however few processors.
_STARTING_S = 1200.0
_POLL_S = 0.1


def rows(ground: Ground) -> Iterator[Row]:
    """Cycles of one supervisor, cycles of the program, a crowd."""
    yield _one_supervisor(ground, _number(CYCLES, _CYCLES))
    yield _the_program(ground, max(_number(CYCLES, _CYCLES) // _THROUGH_THE_PROGRAM, 2))
    yield _crowd(ground, _number(INSTANCES, _INSTANCES))


def _number(variable: str, otherwise: int) -> int:
    return int(os.environ.get(variable) or otherwise)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Size:
    """What a process, and a state folder, have grown to."""

    memory_bytes: int
    descriptors: int
    threads: int
    files: int
    children: int

    @staticmethod
    def of(pid: int, mgpu: Mgpu) -> _Size:
        process = psutil.Process(pid)
        return _Size(
            memory_bytes=process.memory_full_info().uss,
            descriptors=process.num_fds(),
            threads=process.num_threads(),
            files=_files(mgpu),
            children=len(process.children()),
        )


def _one_supervisor(ground: Ground, cycles: int) -> Row:
    """Crash the engine of one supervisor as soon as it is ready, again and again, with the first fifth to warm up."""
    row = Row(fault=f"one supervisor, its engine killed {cycles} times and started again")
    with ground.mgpu() as mgpu:
        command = mgpu.command
        mgpu.command = lambda *words: [sys.executable, "-P", str(_PATIENT), *command(*words)[3:]]  # type: ignore[method-assign]
        words = ("--restart", "on-failure", "--interval", "0.1", "--port", free_port())
        running = mgpu.start("run", ground.tiny, "--name", _NAME, *words)
        supervisor = running.process.pid
        with row.trial("start"):
            running.url()
        sizes: list[_Size] = []
        for cycle in range(1, cycles + 1):
            if running.process.poll() is not None:
                row.lost.append(f"mgpu ended in cycle {cycle}: {running.err[-1000:]}")
                break
            with row.trial(f"cycle {cycle}"):
                engine = _instance(mgpu).engine
                assert engine
                mgpu.kill(engine.pid)
                _ready_after(mgpu, cycle)
                sizes.append(_Size.of(supervisor, mgpu))
        before = held(mgpu)
        with row.trial("what it has grown by"):
            row.note(_grown(sizes))
        with row.trial("end"):
            assert running.end(signal.SIGINT).exit_code == 130
        row.leaves("end", left(mgpu, before))
    return row


def _grown(sizes: list[_Size]) -> str:
    """In words, what became more since the first fifth; raises AssertionError if that is too much."""
    fifth = len(sizes) // 5
    # The least of some looks: between two of them there may be a thread or an answer on its way.
    early, late = (_least(some) for some in (sizes[fifth : 2 * fifth + 1], sizes[-fifth - 1 :]))
    grown = late.memory_bytes - early.memory_bytes
    told = (
        f"from the second fifth to the last: {grown / 1024:+.0f} KiB of {late.memory_bytes / MIB:.1f} MiB,"
        f" descriptors {early.descriptors} to {late.descriptors}, threads {early.threads} to {late.threads},"
        f" children {early.children} to {late.children}, files {early.files} to {late.files}"
    )
    assert grown <= _MEMORY_BYTES, told
    assert late.descriptors <= early.descriptors, told
    assert late.threads <= early.threads, told
    assert late.children <= early.children, told
    assert late.files <= early.files, told
    return told


def _least(sizes: list[_Size]) -> _Size:
    return _Size(
        memory_bytes=min(each.memory_bytes for each in sizes),
        descriptors=min(each.descriptors for each in sizes),
        threads=min(each.threads for each in sizes),
        files=min(each.files for each in sizes),
        children=min(each.children for each in sizes),
    )


def _the_program(ground: Ground, cycles: int) -> Row:
    row = Row(fault=f"mgpu run -d and mgpu stop, {cycles} times under one name")
    with ground.mgpu() as mgpu:
        counts = []
        for cycle in range(1, cycles + 1):
            with row.trial(f"cycle {cycle}"):
                assert mgpu("run", ground.tiny, "-d", "--name", _NAME).exit_code == 0
                before = held(mgpu)
                assert mgpu("stop", _NAME).exit_code == 0
                row.leaves(f"cycle {cycle}", left(mgpu, before))
                counts.append(_files(mgpu))
        with row.trial("files"):
            assert counts[1] == counts[-1], counts
            row.note(f"files in the state folder: {counts[1]} after the second cycle, {counts[-1]} after the last")
    return row


def _crowd(ground: Ground, count: int) -> Row:
    row = Row(fault=f"{count} instances at once: started together, listed, asked, stopped together")
    with ground.mgpu() as mgpu:
        names = [f"crowd-{number}" for number in range(count)]
        ports = _free_ports(count)
        started = [
            mgpu.start("run", ground.tiny, "-d", "--name", name, "--port", port)
            for name, port in zip(names, ports, strict=True)
        ]
        for name, running in zip(names, started, strict=True):
            with row.trial(f"start of {name}"):
                _wait_long(running.process.pid)
                assert running.end().exit_code == 0, running.err
        before = held(mgpu)
        row.note(f"{before.memory_bytes / MIB:.0f} MiB held by all together, on {len(before.ports)} ports")
        with row.trial("ps"):
            shown = mgpu("ps", "--json").json["data"]["instances"]
            assert sorted(each["name"] for each in shown) == sorted(names)
            assert {each["state"] for each in shown} <= {"ready", "degraded"}, shown
            assert len({each["url"] for each in shown}) == count
        with row.trial("an answer of each"), ThreadPoolExecutor(8) as threads:
            urls = [each["url"] for each in shown]
            assert all(threads.map(answers, urls))
        with row.trial("stop --all"):
            ended = mgpu("stop", "--all")
            assert ended.exit_code == 0, ended
        row.leaves("stop --all", left(mgpu, before))
        with row.trial("all stopped"):
            shown = mgpu("ps", "--json").json["data"]["instances"]
            assert {each["state"] for each in shown} == {"stopped"}, shown
    return row


def _wait_long(pid: int) -> None:
    deadline = time.monotonic() + _STARTING_S
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "it is not ready"
        time.sleep(_POLL_S)


def _free_ports(count: int) -> list[int]:
    found: set[int] = set()
    while len(found) < count:
        found.add(free_port())
    return sorted(found)


def _ready_after(mgpu: Mgpu, restarts: int) -> None:
    def ready() -> bool:
        found = registry.read(mgpu.state / _NAME).instance
        assert not (found and found.state.is_over), found
        return bool(found and found.state is State.READY and found.restarts >= restarts)

    until(ready, f"it is ready after {restarts} restarts")


def _instance(mgpu: Mgpu) -> Instance:
    found = registry.read(mgpu.state / _NAME).instance
    assert found
    return found


def _files(mgpu: Mgpu) -> int:
    return sum(
        path.is_file() for folder in (mgpu.state, Path(mgpu.environment["TMPDIR"])) for path in folder.rglob("*")
    )
