"""Lives of instances: histories of events replayed with a clock of their own, and what holds of all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgpu.backends.failure import Failure
from mgpu.running.causes import KINDS
from mgpu.running.instance import (
    GpuShare,
    Instance,
    ProcessId,
    Rate,
    State,
    instance_from_json,
    instance_to_json,
)
from mgpu.running.life import (
    MOST_LAST_LINES,
    Action,
    Broken,
    CannotGoOn,
    Draining,
    End,
    EngineEnded,
    EngineStarted,
    Event,
    Loading,
    Moment,
    Planned,
    PlanRefused,
    Ready,
    Sampled,
    Start,
    StopAsked,
    step,
)
from mgpu.running.recovery import HEALTHY_S, MOST_RESTARTS, Card, Setup

SHARES = (GpuShare(uuid="GPU-a", index=0, planned_bytes=20, actual_bytes=21), GpuShare(uuid=None, index=1))
SETUP = Setup(
    backend="vllm",
    ctx_tokens=8192,
    parallel=1,
    kv_type="f16",
    split_mode="tensor",
    tensor_parallel=2,
    utilisation=0.9,
    cards=(Card(index=0, uuid="GPU-a", device="CUDA0"), Card(index=1, device="CUDA1")),
    port=8080,
)
NEW = Instance(
    name="llama",
    state=State.STARTING,
    model="llama-8b",
    started_at="2026-01-01T00:00:00+00:00",
    supervisor=ProcessId(pid=4000, started_ticks=7, boot_id="b"),
    command=("mgpu", "run", "llama-8b", "--ctx", "8k"),
)
PLANNED = Planned(setup=SETUP, gpus=SHARES)
STARTED = EngineStarted(
    engine=ProcessId(pid=4711, started_ticks=9, boot_id="b"),
    group=4711,
    argv=("vllm", "serve"),
    url="http://127.0.0.1:8080",
)
LOADING = Loading(phase="loading weights", remaining_s=40.0)
READY, BUSY, SILENT = Ready(), Sampled(rate=Rate(running=1)), Sampled(rate=None)
UP: tuple[Event, ...] = (PLANNED, STARTED, READY)


def failure(code: str, **more: Any) -> Failure:
    return Failure(code=code, message=f"it was {code}", hint="a hint", **{"deterministic": False, **more})


def ended(code: str, status: int | None = 1, **more: Any) -> EngineEnded:
    return EngineEnded(failure=failure(code, **more), exit_status=status, last_lines=("bye",))


def broken(code: str) -> Broken:
    return Broken(failure=failure(code))


def refused(code: str = "does-not-fit") -> PlanRefused:
    return PlanRefused(failure=failure(code))


def at(second: float) -> Moment:
    return Moment(utc=f"2026-01-01T00:{int(second) // 60 % 60:02}:{int(second) % 60:02}+00:00", monotonic_s=second)


def replayed(
    events: Sequence[Event | float], instance: Instance = NEW
) -> tuple[Instance, list[State], list[tuple[Action, ...]]]:
    """The instance after `events`, the states and the actions on the way; a number is seconds that pass."""
    now = 1000.0
    states, actions = [], []
    for event in events:
        if isinstance(event, (int, float)):
            now += event
            continue
        instance, do = step(instance, event, at(now))
        states.append(instance.state)
        actions.append(do)
    return instance, states, actions


END, AGAIN = End(grace_s=0.0), Start(after_s=1.0)


@pytest.mark.parametrize(
    ("events", "states", "actions"),
    [
        pytest.param(UP, "starting starting ready", [], id="a start"),
        pytest.param((*UP, SILENT, BUSY), "starting starting ready degraded ready", [], id="counters go and come"),
        pytest.param(
            (*UP, StopAsked(grace_s=30), ended("stopped", 0)),
            "starting starting ready stopping stopped",
            [End(grace_s=30)],
            id="a stop lets answers finish",
        ),
        pytest.param(
            (*UP, StopAsked(grace_s=30), StopAsked(grace_s=30), ended("killed", -9)),
            "starting starting ready stopping stopping stopped",
            [End(grace_s=30), END],
            id="asked twice, it ends at once",
        ),
        pytest.param(
            (*UP, CannotGoOn(failure=failure("bug")), ended("exited"), READY),
            "starting starting ready failed failed failed",
            [],
            id="mgpu itself has failed, which is final",
        ),
        pytest.param(
            (*UP, StopAsked(), ended("stopped", 0), CannotGoOn(failure=failure("bug"))),
            "starting starting ready stopping stopped stopped",
            [END],
            id="what has ended as asked stays so, whatever fails then",
        ),
        pytest.param((StopAsked(),), "stopped", [], id="a stop before anything was started"),
        pytest.param(
            (PLANNED, StopAsked(), STARTED, ended("killed", -9)),
            "starting stopped stopping stopped",
            [END],
            id="an engine that was on its way when the stop came",
        ),
        pytest.param(
            (*UP, ended("exited", 0), PLANNED, STARTED, READY),
            "starting starting ready restarting restarting restarting ready",
            [AGAIN],
            id="an end by itself with status 0 is a crash",
        ),
        pytest.param((*UP, ended("stopped", 0)), "starting starting ready restarting", [AGAIN], id="a kill by others"),
        pytest.param(
            (*UP, ended("killed", -9), StopAsked()),
            "starting starting ready restarting stopped",
            [AGAIN],
            id="a stop while it waits to restart calls that off",
        ),
        pytest.param(
            (*UP, ended("crashed", -6), PLANNED, STARTED, ended("crashed", -6), PLANNED, STARTED, ended("crashed", -6)),
            "starting starting ready" + " restarting" * 7,
            [AGAIN, Start(after_s=2), Start(after_s=4)],
            id="restarts back off",
        ),
        pytest.param(
            (*UP, ended("killed"), *UP, 599, ended("killed"), *UP, 600, ended("killed")),
            "starting starting ready" + " restarting restarting restarting ready" * 2 + " restarting",
            [AGAIN, Start(after_s=2), AGAIN],
            id="what was healthy for ten minutes is forgiven",
        ),
        pytest.param(
            (PLANNED, STARTED, LOADING, ended("crashed", -6)),
            "starting starting starting failed",
            [],
            id="a crash before it ever worked",
        ),
        pytest.param(
            (PLANNED, STARTED, ended("bad-flag", deterministic=True)),
            "starting starting failed",
            [],
            id="a wrong flag",
        ),
        pytest.param((refused(),), "failed", [], id="a first plan that does not fit"),
        pytest.param((ended("hub-unreachable", None),), "failed", [], id="a model that cannot be fetched"),
        pytest.param(
            (PLANNED, STARTED, ended("out-of-memory", deterministic=True), PLANNED, STARTED, READY),
            "starting starting restarting restarting restarting ready",
            [AGAIN],
            id="out of memory while loading, then with less",
        ),
        pytest.param(
            (PLANNED, STARTED, ended("out-of-memory"), refused(), PLANNED, STARTED, READY),
            "starting starting restarting restarting restarting restarting ready",
            [AGAIN, Start(after_s=0)],
            id="a change that the plan refuses is followed by the next at once",
        ),
        pytest.param(
            (*UP, broken("hung"), ended("killed", -9), PLANNED, STARTED, READY),
            "starting starting ready restarting restarting restarting restarting ready",
            [END, AGAIN],
            id="a hang is ended, then restarted",
        ),
        pytest.param(
            (*UP, broken("hung"), StopAsked(grace_s=9), ended("killed", -9)),
            "starting starting ready restarting stopping stopped",
            [END, End(grace_s=9)],
            id="a stop while a hang is ended",
        ),
        pytest.param(
            (*UP, broken("hung"), READY, BUSY, LOADING, broken("garbage")),
            "starting starting ready" + " restarting" * 5,
            [END],
            id="nothing that comes late saves an engine that is being ended",
        ),
        pytest.param(
            (*UP, broken("hung"), replace(ended("killed", None), is_gone=False)),
            "starting starting ready restarting failed",
            [END],
            id="an engine that outlives SIGKILL",
        ),
        pytest.param(
            (*UP, ended("killed"), refused("gpu-missing"), PLANNED, STARTED, READY),
            "starting starting ready restarting restarting restarting restarting ready",
            [AGAIN, Start(after_s=2)],
            id="no plan for now, where it has worked before",
        ),
        pytest.param(
            (READY, broken("hung"), READY, StopAsked()),
            "ready restarting ready stopped",
            [AGAIN],
            id="somebody else's engine is never ended",
        ),
        pytest.param(
            (*UP, StopAsked(), ended("stopped", 0), READY, SILENT, PLANNED, refused(), broken("hung"), StopAsked()),
            "starting starting ready stopping" + " stopped" * 7,
            [End(grace_s=0)],
            id="nothing happens after the end",
        ),
    ],
)
def test_lives(events: tuple[Event | float, ...], states: str, actions: list[Action]) -> None:
    _, found_states, found_actions = replayed(events)
    assert " ".join(found_states) == states
    assert [action for each in found_actions for action in each] == actions


def test_what_is_recorded_of_a_start() -> None:
    loading, *_ = replayed((PLANNED, STARTED, LOADING))
    assert (loading.phase, loading.remaining_s) == ("loading weights", 40.0)
    ready, *_ = replayed((7, READY), loading)
    assert (ready.backend, ready.gpus, ready.url) == ("vllm", SHARES, "http://127.0.0.1:8080")
    assert (ready.engine, ready.group, ready.argv) == (STARTED.engine, 4711, ("vllm", "serve"))
    assert (ready.ready_at, ready.phase, ready.remaining_s) == (at(1007).utc, None, None)
    assert replayed((LOADING, replace(PLANNED, gpus=())), ready)[0] == ready, "what is late is of no interest"
    measured, *_ = replayed((Sampled(rate=Rate(generation_tok_s=19.0), gpus=SHARES[:1]),), ready)
    assert (measured.gpus, measured.rate) == (SHARES[:1], Rate(generation_tok_s=19.0))


def test_the_dead_keep_their_reason() -> None:
    lines = tuple(f"line {i}" for i in range(100))
    died, *_ = replayed((PLANNED, STARTED, replace(ended("killed", -9), last_lines=lines)))
    assert died.exit is not None
    assert (died.exit.code, died.exit.signal, died.exit.cause) == (None, 9, "killed")
    assert (died.exit.at, died.exit.last_lines) == (at(1000).utc, lines[-MOST_LAST_LINES:])
    assert (died.exit.message, died.exit.hint) == ("it was killed", "a hint")
    assert (died.url, died.engine, died.rate) == (None, None, None)
    assert [share.actual_bytes for share in died.gpus] == [None, None]


def test_a_stop_that_was_asked_for_is_no_failure() -> None:
    stopped, *_ = replayed((*UP, StopAsked(), ended("crashed", -6)))
    assert stopped.exit is not None
    assert (stopped.exit.cause, stopped.exit.signal, stopped.exit.hint) == ("asked", 6, None)


@pytest.mark.parametrize(
    ("event", "phase", "remaining_s", "message"),
    [
        pytest.param(Draining(answers=1, left_s=7.04), "1 answer is being given", 7.0, None, id="one answer"),
        pytest.param(Draining(answers=2, left_s=3), "2 answers are being given", 3, None, id="two answers"),
        pytest.param(Draining(answers=1, left_s=0), "1 answer was cut off", None, "1 answer was cut off", id="cut off"),
        pytest.param(
            Draining(answers=2, left_s=0), "2 answers were cut off", None, "2 answers were cut off", id="both"
        ),
    ],
)
def test_what_a_stop_waits_for_is_told(
    event: Draining, phase: str, remaining_s: float | None, message: str | None
) -> None:
    stopping, *_ = replayed((*UP, StopAsked(grace_s=30), event))
    assert (stopping.state, stopping.phase, stopping.remaining_s) == (State.STOPPING, phase, remaining_s)
    stopped, *_ = replayed((*UP, StopAsked(grace_s=30), event, ended("stopped", 0)))
    assert stopped.exit
    assert (stopped.exit.message, stopped.phase) == (message, None)
    ready, *_ = replayed((*UP, event))
    assert (ready.state, ready.phase) == (State.READY, None)


def test_a_hang_is_told_by_what_was_seen_not_by_the_signal_that_ended_it() -> None:
    instance, *_ = replayed((*UP, broken("nccl-hang"), ended("killed", -9)))
    assert instance.exit is not None
    assert (instance.exit.cause, instance.exit.signal) == ("nccl-hang", 9)
    assert [change.words for change in instance.changes] == ["NCCL_P2P_DISABLE=1"]
    assert (instance.changes[0].cause, instance.changes[0].at) == ("nccl-hang", at(1000).utc)


def test_one_that_outlived_sigkill_can_still_be_found() -> None:
    stuck, *_ = replayed((*UP, StopAsked(), replace(ended("killed", None), is_gone=False)))
    assert (stuck.state, stuck.engine, stuck.group) == (State.FAILED, STARTED.engine, 4711)
    assert stuck.exit is not None
    assert stuck.exit.cause == "stuck"


def test_every_change_is_remembered_and_one_the_engine_does_not_know_is_taken_back() -> None:
    instance, *_ = replayed(
        (*UP, broken("hung"), ended("killed", -9), *UP, broken("hung"), ended("killed", -9), PLANNED, STARTED)
    )
    assert [change.words for change in instance.changes] == [
        "NCCL_P2P_DISABLE=1",
        "-- --disable-custom-all-reduce",
    ]
    instance, *_ = replayed((ended("bad-flag", 2, deterministic=True),), instance)
    assert [change.refused for change in instance.changes] == [None, "it was bad-flag"]
    assert instance.state is State.RESTARTING, "a flag of mgpu's own is no reason to give up"
    assert (instance.restarts, instance.recent_restarts) == (1, 3), "tries are no restarts"


def test_a_change_that_was_proven_is_not_blamed_for_what_comes_later() -> None:
    instance, *_ = replayed((*UP, broken("hung"), ended("killed", -9), *UP, ended("killed", -9), PLANNED, STARTED))
    instance, *_ = replayed((ended("model-missing", 1, deterministic=True),), instance)
    assert (instance.state, instance.changes[0].refused) == (State.FAILED, None)


def test_a_restart_that_comes_to_no_plan_tells_that() -> None:
    instance, *_ = replayed((*UP, ended("killed", -9), PlanRefused(failure=failure("illegal", deterministic=True))))
    assert instance.exit is not None
    assert (instance.exit.cause, instance.exit.message, instance.exit.signal) == ("illegal", "it was illegal", 9)


def test_a_start_that_the_plan_refused_does_not_count() -> None:
    instance, *_ = replayed((PLANNED, STARTED, ended("out-of-memory"), refused(), refused(), PLANNED, STARTED, READY))
    assert (instance.restarts, instance.recent_restarts) == (1, 1)
    assert [change.refused is None for change in instance.changes] == [False, False, True]


def test_only_what_became_ready_again_counts_as_a_restart() -> None:
    taken = (*UP, ended("killed", -9), PLANNED, STARTED, ended("port-in-use"))
    waiting, *_ = replayed(taken)
    assert (waiting.restarts, waiting.recent_restarts, waiting.phase) == (0, 2, "waits for port 8080")
    again, *_ = replayed((*taken, *UP, ended("killed", -9), *UP))
    assert (again.restarts, again.recent_restarts) == (2, 3)


def test_what_the_user_pinned_fails_with_the_fix_as_a_command() -> None:
    pinned = replace(NEW, pinned=("--ctx", "--kv-type", "--gpu-memory-utilization"))
    instance, *_ = replayed((PLANNED, STARTED, ended("out-of-memory", part="kv")), pinned)
    assert (instance.state, instance.changes) == (State.FAILED, ())
    assert instance.exit is not None
    assert instance.exit.hint == "mgpu run llama-8b --ctx 4096"


def test_the_budget_ends() -> None:
    life: list[Event | float] = [*UP]
    for _ in range(MOST_RESTARTS):
        life += [ended("killed", -9), PLANNED, STARTED]
    instance, *_ = replayed(life)
    assert (instance.state, instance.restarts) == (State.RESTARTING, 0), "none became ready"
    assert instance.recent_restarts == MOST_RESTARTS
    instance, *_ = replayed((ended("killed", -9),), instance)
    assert instance.state is State.FAILED
    assert instance.exit is not None
    assert instance.exit.message == f"it was killed; given up after {MOST_RESTARTS} restarts"


@pytest.mark.parametrize(
    ("events", "first", "last"),
    [
        pytest.param((*UP,), None, None, id="none"),
        pytest.param((*UP, ended("crashed")), "crashed", "crashed", id="one"),
        pytest.param((*UP, ended("crashed"), PLANNED, STARTED, ended("killed")), "crashed", "killed", id="two"),
        pytest.param(
            (*UP, ended("crashed"), refused("disk-full")), "crashed", "disk-full", id="a plan that fails then"
        ),
        pytest.param(
            (*UP, ended("crashed"), PLANNED, STARTED, READY, HEALTHY_S, ended("killed")),
            "killed",
            "killed",
            id="healthy for long between them",
        ),
        pytest.param((PLANNED, STARTED, ended("bad-flag", deterministic=True)), "bad-flag", "bad-flag", id="the end"),
    ],
)
def test_the_first_failure_since_it_was_healthy_is_kept(
    events: Sequence[Event | float], first: str | None, last: str | None
) -> None:
    instance, *_ = replayed(events)
    assert (instance.first_exit and instance.first_exit.cause) == first
    told = instance.trouble.code if instance.trouble else instance.exit and instance.exit.cause
    assert told == last


FAILURES = st.builds(
    failure,
    st.sampled_from(sorted(KINDS)),
    deterministic=st.booleans(),
    part=st.sampled_from([None, "weights", "kv"]),
    device=st.sampled_from([None, "CUDA0"]),
)
EVENTS = st.one_of(
    st.sampled_from([PLANNED, STARTED, LOADING, READY, BUSY, SILENT]),
    st.builds(PlanRefused, failure=FAILURES),
    st.builds(Broken, failure=FAILURES),
    st.builds(EngineEnded, failure=FAILURES, exit_status=st.none() | st.integers(-9, 3)),
)
LIVES = st.lists(EVENTS | st.floats(0, 2000), max_size=60)
PINNED = st.frozensets(st.sampled_from(["--ctx", "--kv-type", "--gpus", "--port", "NCCL_P2P_DISABLE"])).map(sorted)


@settings(max_examples=300)
@given(life=LIVES, pinned=PINNED)
def test_whatever_happens(life: list[Event | float], pinned: list[str]) -> None:
    instance = replace(NEW, pinned=tuple(pinned))
    now = 1000.0
    for event in life:
        if isinstance(event, float):
            now += event
            continue
        before = instance
        instance, actions = step(instance, event, at(now))
        assert instance_from_json(json.loads(json.dumps(instance_to_json(instance)))) == instance
        assert 0 <= instance.recent_restarts <= MOST_RESTARTS
        assert not {change.setting for change in instance.changes} & set(pinned)
        assert instance.changes[: len(before.changes)] == before.changes or event.__class__ in (
            PlanRefused,
            EngineEnded,
        )
        assert len(actions) <= 1
        assert not (instance.state.is_over and actions), "nothing is to be done for what is over"
        assert not any(isinstance(action, Start) and instance.engine for action in actions), "one engine at a time"

    stopped, actions = step(instance, StopAsked(grace_s=3), at(now))
    assert instance.state.is_over or bool(actions) == (instance.engine is not None)
    if actions:
        assert stopped.state is State.STOPPING
        stopped, actions = step(stopped, ended("killed", -9), at(now))
    assert stopped.state.is_over
    assert actions == ()


@given(failures=st.lists(FAILURES, min_size=40, max_size=40), pinned=PINNED)
def test_an_engine_that_always_fails_is_given_up_in_the_end(failures: list[Failure], pinned: list[str]) -> None:
    instance, *_ = replayed(UP, replace(NEW, pinned=tuple(pinned)))
    starts = 0
    for each in failures:
        instance, actions = step(instance, EngineEnded(failure=each, exit_status=1), at(1000))
        starts += len(actions)
        if instance.state is State.RESTARTING:
            instance, *_ = replayed((PLANNED, STARTED), instance)
    assert instance.state is State.FAILED
    assert starts == instance.recent_restarts <= MOST_RESTARTS
