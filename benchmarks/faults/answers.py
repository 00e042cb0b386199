"""Engines that answer slowly, partly, with garbage or never; and clocks that jump."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from benchmarks.faults import wire
from benchmarks.faults.ground import Ground
from benchmarks.faults.row import Row
from mgpu.backends.failure import Failure
from mgpu.backends.samples import Sample
from mgpu.running import registry, watchdog
from mgpu.running.client import Canary
from mgpu.running.instance import Instance, ProcessId, Rate, State, instance_from_json, instance_to_json
from mgpu.running.life import EngineEnded, EngineStarted, Event, Loading, Moment, Ready, Sampled, StopAsked, step
from tests.cli.deaths import answers
from tests.cli.program import Mgpu, until
from tests.cli.traces import held, left
from tests.fakes.clock import FakeClock

_AT_ONCE = 3
_NAME = "odd"
_STALL_S = "3"
# What an engine says wrongly, and whether mgpu is to serve with it all the same.
_WORDS = {
    "llama": (
        *("oom-weights", "oom-kv", "oom-compute", "port", "bad-arch", "corrupt", "exit0", "segv", "abort", "empty-log"),
        *("hang-loading", "hang-request", "garbage", "repeat-token", "die-in-request"),
    ),
    "vllm": (
        *("old", "no-such-flag", "port", "kv-too-small", "oom-weights", "oom-compute", "oom-kv", "truncated", "nccl"),
        *("exit0", "hang-loading", "worker-dies-in-request"),
        *("hang-request", "garbage", "nonsense"),
    ),
}
_JUMPS = (
    timedelta(days=3650),
    timedelta(days=-3650),
    timedelta(hours=1),
    timedelta(hours=-1),
    timedelta(microseconds=-1),
)
_WAYS = ", ".join(wire.WAYS)


def rows(ground: Ground) -> Iterator[Row]:
    """Bad wires, engines that fail, jumping clocks."""
    for name in ("llama", "vllm"):
        yield _failing(ground, name)
    yield _from_the_start(ground)
    yield _while_serving(ground)
    yield _clock_of_values()
    yield _clock_of_the_program(ground)


def _failing(ground: Ground, name: str) -> Row:
    engine = "llama-server" if name == "llama" else "vLLM"
    row = Row(fault=f"fake {engine} that fails, hangs or lies, in {len(_WORDS[name])} ways")
    if name == "vllm" and (missing := ground.lacks_for_vllm()):
        row.skipped = missing
        return row

    def fail(word: str) -> None:
        with row.trial(word), getattr(ground, name)() as rig:
            variables = {"FAKE_FAIL": word}
            words = ("run", *rig.words, "-d", "--name", _NAME, "--restart", "no", "--stall-timeout", _STALL_S)
            ended = rig.mgpu(*words, **variables)
            # Ready, or a failure that is named; a bug has a code of its own.
            assert ended.exit_code in (0, 3, 4), ended
            assert (ended.exit_code == 0) == ("ready" in ended.out), ended
            assert ended.exit_code == 0 or "error" in ended.err, ended
            before = held(rig.mgpu)
            _stopped(rig.mgpu)
            row.leaves(word, left(rig.mgpu, before))

    with ThreadPoolExecutor(_AT_ONCE) as threads:
        list(threads.map(fail, _WORDS[name]))
    return row


def _from_the_start(ground: Ground) -> Row:
    row = Row(fault=f"from the start: answers {_WAYS}")

    def start(way: str) -> None:
        with row.trial(way), ground.mgpu() as mgpu:
            _behind(mgpu, way)
            ended = mgpu("run", ground.tiny, "-d", "--name", _NAME, "--restart", "no", "--stall-timeout", _STALL_S)
            assert ended.exit_code == (0 if way == "slowly" else 4), ended
            row.note(f"{way}: {'ready' if ended.exit_code == 0 else _told(mgpu)}")
            before = held(mgpu)
            _stopped(mgpu)
            row.leaves(way, left(mgpu, before))

    with ThreadPoolExecutor(_AT_ONCE) as threads:
        list(threads.map(start, wire.WAYS))
    return row


def _while_serving(ground: Ground) -> Row:
    row = Row(fault=f"for a while: answers {_WAYS}")

    def serve(way: str) -> None:
        with row.trial(way), ground.mgpu() as mgpu:
            path = _behind(mgpu, "well")
            assert mgpu("run", ground.tiny, "-d", "--name", _NAME).exit_code == 0
            before = held(mgpu)
            path.write_text(way)
            if way != "slowly":
                until(lambda: _instance(mgpu).state is State.DEGRADED, "it is said to be degraded")
            assert mgpu("ps").exit_code == 0
            path.write_text("well")
            until(lambda: _instance(mgpu).state is State.READY, "it is ready again")
            assert _instance(mgpu).restarts == 0
            assert answers(_instance(mgpu).url or "")
            path.write_text(way)
            _stopped(mgpu)
            row.leaves(way, left(mgpu, before))

    with ThreadPoolExecutor(_AT_ONCE) as threads:
        list(threads.map(serve, wire.WAYS))
    return row


def _behind(mgpu: Mgpu, way: str) -> Path:
    folder = mgpu.here.parent
    path = folder / "wire"
    path.write_text(way)
    mgpu.environment["MGPU_LLAMA_SERVER"] = str(wire.install(folder, path))
    return path


def _instance(mgpu: Mgpu) -> Instance:
    found = registry.read(mgpu.state / _NAME).instance
    assert found
    return found


def _told(mgpu: Mgpu) -> str:
    last = _instance(mgpu).exit
    assert last
    return last.message or last.cause


def _stopped(mgpu: Mgpu) -> None:
    if registry.read(mgpu.state / _NAME).supervisor:
        ended = mgpu("stop", _NAME, "--grace", "1")
        assert ended.exit_code == 0 or "is not running" in ended.err, ended  # it may have ended meanwhile


def _clock_of_values() -> Row:
    """A life is told with the wall clock jumping between all its events; only what is written of times may differ."""
    row = Row(fault="wall clock jumps between all events of a life (values)")
    plain = _life(())
    for jump in _JUMPS:
        for at in range(len(plain)):
            with row.trial(f"{jump} before event {at}"):
                for now, then in zip(_life(((at, jump),)), plain, strict=True):
                    assert _timeless(now) == _timeless(then), (now, then)
                    assert instance_from_json(json.loads(json.dumps(instance_to_json(now)))) == now
    with row.trial("the watchdog's patience"):
        # Its times are the monotonic clock's, which counts on whatever the wall clock says.
        watch = watchdog.begin(Canary(text="a b", seconds=0.1, generation_tok_s=9.0), 0.0)
        for second in range(600):
            seen = Sample(at=float(second), running=0, waiting=0)
            watch = watchdog.observe(watch, seen, float(second))
            assert watchdog.judge(watch, float(second), watchdog.DEFAULT_PATIENCE) is None
    return row


def _life(jumps: tuple[tuple[int, timedelta], ...]) -> list[Instance]:
    who = ProcessId(pid=77, started_ticks=1, boot_id="b")
    died = EngineEnded(failure=Failure(code="killed", message="killed", deterministic=False), exit_status=-9)
    started = EngineStarted(engine=who, group=77, argv=("x",), url="http://127.0.0.1:1")
    rate = Rate(generation_tok_s=9.0, prompt_tok_s=None, running=1, waiting=0, kv_used=None)
    again: tuple[Event, ...] = (started, Loading(phase="loading"), Ready(), Sampled(rate=rate), Sampled(rate=None))
    events: tuple[Event, ...] = (*again, died, *again, died, *again, StopAsked(grace_s=3), died)
    instance = Instance(
        name="x",
        state=State.STARTING,
        model="m",
        started_at="2026-01-01T00:00:00Z",
        supervisor=who,
        restarts_itself=True,
    )
    wall, lives = datetime(2026, 1, 1, tzinfo=UTC), []
    for number, event in enumerate(events):
        wall += timedelta(minutes=5) + sum((jump for at, jump in jumps if at == number), timedelta())
        instance, _ = step(instance, event, Moment(utc=wall.isoformat(), monotonic_s=300.0 * number))
        lives.append(instance)
    return lives


def _timeless(instance: Instance) -> Instance:
    first, last = (replace(each, at="") if each else None for each in (instance.first_exit, instance.exit))
    return replace(instance, ready_at="" if instance.ready_at else None, first_exit=first, exit=last)


def _clock_of_the_program(ground: Ground) -> Row:
    row = Row(fault="wall clock jumps 10 years and an hour, back and forth (program)")
    if shutil.which("gcc") is None:
        row.skipped = "gcc is not installed, with which the clock is built"
        return row
    with ground.mgpu() as mgpu:
        clock = FakeClock(mgpu.here.parent / "clock")
        mgpu.environment |= clock.environment
        with row.trial("start"):
            assert mgpu("run", ground.tiny, "-d", "--name", _NAME).exit_code == 0
        before = held(mgpu)
        for jump in _JUMPS:
            with row.trial(f"{jump}"):
                restarts = _instance(mgpu).restarts
                clock.jump(int(jump.total_seconds()))
                shown = mgpu("ps", "--json").json["data"]["instances"]
                assert [each["state"] for each in shown] == ["ready"], shown
                assert answers(_instance(mgpu).url or "")
                assert mgpu("ps").exit_code == 0
                assert _instance(mgpu).restarts == restarts
        with row.trial("a crash in another year"):
            clock.jump(int(_JUMPS[1].total_seconds()))
            engine = _instance(mgpu).engine
            assert engine
            mgpu.kill(engine.pid)
            until(lambda: _instance(mgpu).restarts == 1 and _instance(mgpu).state is State.READY, "it is ready again")
            last = _instance(mgpu).exit
            assert last, "the crash is not told of"
            assert datetime.fromisoformat(last.at).year < datetime.now(UTC).year - 5, last
        with row.trial("stop"):
            clock.jump(int(_JUMPS[0].total_seconds()))
            _stopped(mgpu)
            row.leaves("stop", left(mgpu, before))
    return row
