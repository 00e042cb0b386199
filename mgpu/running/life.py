"""The life of an instance: `step(instance, event, now)` says what it becomes and what is to be done. Nothing here
reads a clock, a file or a process; a driver does what the actions say and reports what happens as events.

    starting ──Ready──▶ ready ◀──Sampled──▶ degraded
        │                 └───────┬───────────┘
        │  EngineEnded, Broken    ▼                        StopAsked, wherever it is
        └──────────────────▶ restarting ──Ready──▶ ready   ──▶ stopping ──EngineEnded──▶ stopped
                                  └── nothing left ──▶ failed
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mgpu.backends.failure import Failure
from mgpu.running.causes import Kind, kind_of
from mgpu.running.instance import Exit, GpuShare, Instance, ProcessId, Rate, State
from mgpu.running.recovery import HEALTHY_S, Change, Setup, Stop, delay_s, next_step, with_change

MOST_LAST_LINES = 20
# What ends the phase, and later the message, of an instance whose stop did not let all answers end.
CUT_OFF = "cut off"


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A time: `utc` for people (ISO 8601 with its zone), `monotonic_s` for counting seconds, which no clock that is
    set disturbs."""

    utc: str
    monotonic_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """There is a plan that can run, the first one or one with the changes."""

    setup: Setup
    gpus: tuple[GpuShare, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRefused:
    """There is no plan that can run."""

    failure: Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """What is being done until it is ready, fetching included, and the seconds it may still take."""

    phase: str
    remaining_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStarted:
    """There is a process, with what it was started by and where it will listen."""

    engine: ProcessId
    group: int
    argv: tuple[str, ...]
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The engine has proven that it answers; `url` is where, of one that mgpu has not started. `served_as` is what
    clients must ask it for, and `warnings` what is not as planned."""

    url: str | None = None
    served_as: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A look at the engine: its rate (None: it did not answer), and what it holds of the cards (None: not looked)."""

    rate: Rate | None
    gpus: tuple[GpuShare, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """The engine is there but no good: it stalls, hangs, or answers with garbage."""

    failure: Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEnded:
    """The engine is gone, or could not be fetched or started at all; `failure` is what its log says of it.

    `exit_status` is as Popen has it. `is_gone` is False for one that outlived SIGKILL (stuck in the kernel).
    `asked_because` is why it was stopped, None where somebody said so.
    """

    failure: Failure
    exit_status: int | None = None
    last_lines: tuple[str, ...] = ()
    is_gone: bool = True
    asked_because: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StopAsked:
    """The user, the system or mgpu itself wants it to end; answers that are being given may take `grace_s`. `because`
    is what asked, None where somebody said so."""

    grace_s: float = 0.0
    because: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Draining:
    """While it is being stopped `answers` are still being given, which may take `left_s`; 0: they are cut off."""

    answers: int
    left_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CannotGoOn:
    """mgpu itself has failed, in a way that nobody expected: nothing more will be done for the instance."""

    failure: Failure


Event = (
    Planned
    | PlanRefused
    | Loading
    | EngineStarted
    | Ready
    | Sampled
    | Broken
    | EngineEnded
    | StopAsked
    | Draining
    | CannotGoOn
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """After `after_s`: plan with the instance's changes, fetch, start, prove. A stop in between calls it off."""

    after_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """End the engine and report it with EngineEnded; answers that are being given may take `grace_s`."""

    grace_s: float


Action = Start | End


def step(instance: Instance, event: Event, now: Moment) -> tuple[Instance, tuple[Action, ...]]:
    """Return what `instance` becomes by `event`, and what is to be done, in order.

    Any event may come in any state: what is no longer of interest changes nothing. The first start needs no action;
    an event of a plan or an engine that is late for a stop leads to that engine's end.
    """
    if isinstance(event, StopAsked):
        return _stop(instance, event, now)
    if isinstance(event, EngineStarted):
        return _engine_started(instance, event)
    if instance.state.is_over:
        return instance, ()
    if isinstance(event, EngineEnded):
        return _ended(instance, event, now)
    if isinstance(event, CannotGoOn):
        last = replace(_no_exit(event.failure, now), last_lines=instance.exit.last_lines if instance.exit else ())
        return _over(instance, State.FAILED, last), ()
    if isinstance(event, Sampled):
        return _sampled(instance, event), ()
    if isinstance(event, Draining):
        return _draining(instance, event), ()
    if instance.state is State.STOPPING or instance.broken:
        return instance, ()
    loads = instance.state in (State.STARTING, State.RESTARTING)
    match event:
        case Ready():
            return _ready(instance, event, now), ()
        case Broken():
            return _broken(instance, event.failure, now)
        case Loading() if loads:
            return replace(instance, phase=event.phase, remaining_s=event.remaining_s), ()
        case Planned() if loads and instance.engine is None:
            return replace(instance, setup=event.setup, backend=event.setup.backend, gpus=event.gpus), ()
        case PlanRefused() if loads and instance.engine is None:
            return _refused(instance, event.failure, now)
        case _:
            return instance, ()


def _stop(instance: Instance, event: StopAsked, now: Moment) -> tuple[Instance, tuple[Action, ...]]:
    if instance.state.is_over:
        return instance, ()
    if instance.engine is not None:
        # Asked twice, it ends at once.
        grace_s = 0.0 if instance.state is State.STOPPING else event.grace_s
        return replace(instance, state=State.STOPPING, phase=None, remaining_s=None), (End(grace_s=grace_s),)
    asked = Exit(code=None, signal=None, cause="asked", at=now.utc, message=event.because)
    return _over(instance, State.STOPPED, asked), ()


def _engine_started(instance: Instance, event: EngineStarted) -> tuple[Instance, tuple[Action, ...]]:
    started = replace(instance, engine=event.engine, group=event.group, argv=event.argv, url=event.url)
    if instance.state.is_over or instance.state is State.STOPPING:  # it was on its way when the stop came
        return replace(started, state=State.STOPPING, phase=None), (End(grace_s=0.0),)
    return replace(started, phase="starting", remaining_s=None), ()


def _sampled(instance: Instance, event: Sampled) -> Instance:
    instance = replace(instance, gpus=instance.gpus if event.gpus is None else event.gpus)
    if instance.state not in (State.READY, State.DEGRADED):
        return instance
    return replace(instance, state=State.READY if event.rate else State.DEGRADED, rate=event.rate)


def _ready(instance: Instance, event: Ready, now: Moment) -> Instance:
    if instance.state in (State.READY, State.DEGRADED):
        return instance
    return replace(
        instance,
        state=State.READY,
        restarts=instance.restarts + (instance.state is State.RESTARTING),
        url=event.url or instance.url,
        served_as=event.served_as,
        warnings=event.warnings,
        ready_at=now.utc,
        healthy_since_s=now.monotonic_s,
        phase=None,
        remaining_s=None,
        trouble=None,
        on_trial=False,
    )


def _draining(instance: Instance, event: Draining) -> Instance:
    if instance.state is not State.STOPPING:
        return instance
    several = event.answers > 1
    words = f"{event.answers} answer{'s' if several else ''}"
    if event.left_s <= 0:
        return replace(instance, phase=f"{words} {'were' if several else 'was'} {CUT_OFF}", remaining_s=None)
    phase = f"{words} {'are' if several else 'is'} being given"
    return replace(instance, phase=phase, remaining_s=round(event.left_s, 1))


def _interrupted(instance: Instance, now: Moment) -> Instance:
    """The instance, no longer healthy: restarts of long ago are forgiven."""
    since = instance.healthy_since_s
    forgiven = since is not None and now.monotonic_s - since >= HEALTHY_S
    return replace(
        instance,
        rate=None,
        phase=None,
        remaining_s=None,
        healthy_since_s=None,
        recent_restarts=0 if forgiven else instance.recent_restarts,
    )


def _broken(instance: Instance, failure: Failure, now: Moment) -> tuple[Instance, tuple[Action, ...]]:
    instance = _interrupted(instance, now)
    if instance.engine is None:  # somebody else's, which is not ended
        return _recover(instance, failure, now)
    # What comes next is decided when it is gone; its exit status will tell nothing then.
    return replace(instance, state=State.RESTARTING, broken=failure, phase="ending"), (End(grace_s=0.0),)


def _ended(instance: Instance, event: EngineEnded, now: Moment) -> tuple[Instance, tuple[Action, ...]]:
    failure, stopping = instance.broken or event.failure, instance.state is State.STOPPING
    ended = _exit(event, failure, now)
    if not event.is_gone:
        message = "the engine outlived SIGKILL: it is stuck in the kernel, and keeps its memory"
        hint = "mgpu reap ends it when it comes back; if it does not, only a reboot helps"
        return _over(instance, State.FAILED, replace(ended, cause="stuck", message=message, hint=hint)), ()
    cut_off = instance.phase if stopping and instance.phase and instance.phase.endswith(CUT_OFF) else None
    instance = replace(
        _interrupted(instance, now),
        engine=None,
        group=None,
        broken=None,
        exit=ended,
        gpus=tuple(replace(share, actual_bytes=None) for share in instance.gpus),
    )
    if stopping:
        told = ", ".join(filter(None, (event.asked_because, cut_off))) or None
        return _over(instance, State.STOPPED, replace(ended, cause="asked", message=told, hint=None)), ()
    if instance.on_trial and instance.trouble and kind_of(failure) is Kind.DETERMINISTIC:
        # Such as a flag that this engine does not know: the change is to blame, and what it was for is still there.
        return _recover(_last_refused(instance, failure), instance.trouble, now)
    return _recover(instance, failure, now)


def _refused(instance: Instance, failure: Failure, now: Moment) -> tuple[Instance, tuple[Action, ...]]:
    if instance.on_trial and instance.trouble:
        instance = _last_refused(instance, failure)
        # The start was not made, so that it does not count.
        instance = replace(instance, recent_restarts=max(instance.recent_restarts - 1, 0))
        return _recover(instance, instance.trouble or failure, now, at_once=True)
    return _recover(instance, failure, now)


def _last_refused(instance: Instance, failure: Failure) -> Instance:
    *others, last = instance.changes
    return replace(instance, changes=(*others, replace(last, refused=failure.message)), on_trial=False)


def _recover(
    instance: Instance, failure: Failure, now: Moment, *, at_once: bool = False
) -> tuple[Instance, tuple[Action, ...]]:
    """The next step of the ladder; a change of the plan alone need not wait."""
    last = instance.exit or _no_exit(failure, now)
    told = replace(last, cause=failure.code, message=failure.message, hint=failure.hint)
    if not instance.recent_restarts:
        instance = replace(instance, first_exit=told)
    if not instance.restarts_itself:
        return _over(instance, State.FAILED, told), ()
    found = next_step(
        failure,
        instance.setup,
        instance.changes,
        frozenset(instance.pinned),
        proven=instance.ready_at is not None,
        restarts=instance.recent_restarts,
    )
    if isinstance(found, Stop):
        fix = with_change(instance.command, found.fix) if found.fix and instance.command else failure.hint
        return _over(instance, State.FAILED, replace(last, cause=failure.code, message=found.reason, hint=fix)), ()
    after_s = delay_s(instance.recent_restarts)
    if isinstance(found, Change):
        after_s = 0.0 if at_once else after_s
        instance = replace(instance, changes=(*instance.changes, replace(found, at=now.utc)), on_trial=True)
    port = instance.url.rpartition(":")[2] if failure.code == "port-in-use" and instance.url else None
    restarting = replace(
        instance,
        state=State.RESTARTING,
        phase=f"waits for port {port}" if port else "waiting",
        remaining_s=after_s,
        trouble=failure,
        recent_restarts=instance.recent_restarts + 1,
    )
    return restarting, (Start(after_s=after_s),)


def _over(instance: Instance, state: State, last: Exit) -> Instance:
    return replace(
        instance,
        state=state,
        exit=last,
        url=None,
        rate=None,
        phase=None,
        remaining_s=None,
        trouble=None,
        broken=None,
        on_trial=False,
        healthy_since_s=None,
    )


def _exit(event: EngineEnded, failure: Failure, now: Moment) -> Exit:
    status = event.exit_status
    return Exit(
        code=status if status is not None and status >= 0 else None,
        signal=-status if status is not None and status < 0 else None,
        cause=failure.code,
        at=now.utc,
        last_lines=event.last_lines[-MOST_LAST_LINES:],
        message=failure.message,
        hint=failure.hint,
    )


def _no_exit(failure: Failure, now: Moment) -> Exit:
    """What is told where no engine ended."""
    return Exit(code=None, signal=None, cause=failure.code, at=now.utc, message=failure.message, hint=failure.hint)
