"""The driver around `mgpu.running.life`: it does what the actions say and reports what happens. It decides nothing.

One supervisor looks after one instance: it holds the instance's folder, writes its record at every change, and is the
parent of its engine. How a plan is made and an engine started is handed in.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mgpu.backends import load_backend
from mgpu.backends.failure import Failure
from mgpu.errors import EngineFailed, Interrupted, MgpuError, Missing, NoAnswer, UsageError
from mgpu.interrupts import interrupts
from mgpu.running import registry
from mgpu.running.audience import fall_silent, has_left
from mgpu.running.causes import failure_from
from mgpu.running.identity import identity
from mgpu.running.instance import Instance, State
from mgpu.running.life import (
    MOST_LAST_LINES,
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
    Start,
    StopAsked,
    step,
)
from mgpu.running.logs import keep_first, keep_small
from mgpu.running.notify import ServiceManager
from mgpu.running.recovery import Settings, in_effect
from mgpu.running.shortage import shortage
from mgpu.running.state import state_folder, state_path
from mgpu.running.stopping import asked_grace_s

if TYPE_CHECKING:
    from mgpu.running.process import EngineProcess

# What changes with every look is written so often at most: each time the disk is waited for.
_WRITE_EVERY_S = 2.0
_TIDY_EVERY_S = 60.0
_POLL_S = 0.2
# mgpu's own stages of stopping an engine and the reaper's after it.
_STOP_S = 60.0
_LONGEST_MESSAGE = 300
_ERRORS: dict[int, type[MgpuError]] = {
    error.exit_code: error for error in (UsageError, NoAnswer, Missing, EngineFailed, Interrupted, MgpuError)
}

P = TypeVar("P")
S = TypeVar("S")


class Supervisor:
    """The life of one instance. `on_change(before, after)` is told what becomes of it, after that has been written."""

    def __init__(
        self,
        instance: Instance,
        *,
        on_change: Callable[[Instance, Instance], None] = lambda _, __: None,
        service: ServiceManager | None = None,
    ) -> None:
        self.instance = instance
        self.process: EngineProcess | None = None
        self._on_change = on_change
        self._service = service or ServiceManager(None)
        self._start: Start | None = None
        self._end: End | None = None
        self._because: str | None = None
        self._written: Instance | None = None
        self._written_at = 0.0
        self._tidied_at = time.monotonic()

    @property
    def folder(self) -> Path:
        """The instance's own folder, where its logs are."""
        return state_folder() / self.instance.name

    def live(
        self,
        plan: Callable[[Settings], P],
        start: Callable[[P], AbstractContextManager[S]],
        use: Callable[[S], None],
    ) -> None:
        """Plan, start an engine and use it; again as long as `step` says so. Blocks until the instance is over.

        `plan` returns a plan with the changes and reports Planned; `start` gives an engine that has been proven, and
        reports how that goes on; `use` returns when there is nothing left to do. What they raise is how it ended.
        Raises an MgpuError when the instance has failed. A KeyboardInterrupt stops it and goes on to the caller, and so
        does an exception that nobody expected: then the instance has failed with the code "bug" or "os-error".
        """
        after_s: float | None = 0.0
        try:
            while after_s is not None:
                self._pause(after_s)
                after_s = self._one_engine(plan, start, use)
        except Exception as problem:
            if has_left(problem):
                self._ask_to_stop()
            else:
                self._give_up(problem)
            raise
        except BaseException:
            self._ask_to_stop()  # nothing of it runs any more
            raise

    def report(self, event: Event) -> None:
        """Take in what has happened, write the record, and remember what is to be done."""
        with interrupts.held():
            before = self.instance
            self.instance, actions = step(before, event, _now())
            for action in actions:
                if isinstance(action, Start):
                    self._start = action
                else:
                    self._end = action
            if self.instance.first_exit is not before.first_exit and self.process is not None:
                keep_first(self.folder / registry.LOG)
            must = isinstance(event, (Planned, EngineStarted)) and before.ready_at is None
            self._write(required=must)
            self._tell_service(event, before)
        # Who reads that may not: an interrupt comes here, too.
        if self.instance != before:
            self._tell(before)
        self.tick()

    def begin(self) -> None:
        """Write the first record. Raises Missing."""
        self._write(required=True)

    def tick(self) -> None:
        """What is due now and then, whatever happens."""
        now = time.monotonic()
        self._service.alive(now)
        if now - self._tidied_at >= _TIDY_EVERY_S:
            self._tidied_at = now
            for name in (registry.LOG, registry.SUPERVISOR_LOG):
                keep_small(self.folder / name)

    def kept_alive(self, task: Callable[[], P]) -> P:
        """Do a `task` that may take minutes, while whoever watches over this process is told that it is well. Returns
        and raises what the task does."""
        with self._service.busy():
            return task()

    def started(self, process: EngineProcess, *, argv: tuple[str, ...], url: str) -> None:
        """Take in that there is an engine; to be called at once after its start."""
        self.process = process
        engine = identity(process.pid)
        if engine is None:  # it is gone already, which is found out next
            return
        try:
            with interrupts.held():
                registry.write_engine(self.instance.name, engine)
        except Missing:
            # A full disk keeps nobody from coming back: the engine is found by the log it writes to, too.
            if self.instance.ready_at is None:
                raise
        self.report(EngineStarted(engine=engine, group=process.pid, argv=argv, url=url))

    def ending(self, error: BaseException | None, grace_s: float) -> float:
        """Take in that the engine, which lives, is about to be ended: because of an error of its own, or else as asked,
        with `grace_s` for the answers it gives unless whoever asked wished otherwise. Returns the seconds it has."""
        self._end = None
        if isinstance(error, Exception) and not has_left(error):
            self.report(Broken(failure=_failure(error)))
        else:
            wished_s = asked_grace_s(self.folder)
            self._ask_to_stop(grace_s if wished_s is None else wished_s)
        return self._end.grace_s if self._end else 0.0

    def _one_engine(
        self,
        plan: Callable[[Settings], P],
        start: Callable[[P], AbstractContextManager[S]],
        use: Callable[[S], None],
    ) -> float | None:
        """Returns the seconds until the next start, None when there will be none."""
        self.process, self._start = None, None
        error: MgpuError | None = None
        try:
            with self._service.busy():
                planned = plan(in_effect(self.instance.changes))
        except Exception as refusal:
            error = _expected(refusal, "it could not be planned")
            self.report(PlanRefused(failure=failure_from(error)))
        else:
            try:
                with start(planned) as session:
                    use(session)
            except Exception as problem:
                self._over(None if has_left(problem) else problem)
                if has_left(problem):
                    raise
                error = _expected(problem, "it could not be run")
            except BaseException:
                self._over(None)
                raise
            else:
                self._over(None)
        if self.instance.state is State.FAILED:
            raise self._failed(error)
        return self._start.after_s if self._start and not self.instance.state.is_over else None

    def _ask_to_stop(self, grace_s: float = 0.0) -> None:
        """Report that it is to end, and have nothing fail on the way there since nobody reads any more."""
        self._because = self._because or fall_silent()
        self.report(StopAsked(grace_s=grace_s, because=self._because))

    def _give_up(self, problem: Exception) -> None:
        """Report what nobody expected; the caller goes on with it."""
        error = _unexpected(problem)
        self.report(CannotGoOn(failure=_failure(problem)))
        if self.instance.state is State.FAILED and self.instance.exit_code is None:
            self._failed(error)

    def _over(self, error: Exception | None) -> None:
        """Report the end of an engine, or that there never was one."""
        process = self.process
        if process is None:
            if error:
                self.report(EngineEnded(failure=_failure(error)))
            else:
                self._ask_to_stop()
            return
        status = process.poll()
        self.report(
            EngineEnded(
                failure=_failure(error),
                exit_status=status,
                last_lines=tuple(self._worth_telling(process.log_lines())[-MOST_LAST_LINES:]),
                is_gone=status is not None,
                asked_because=self._because,
            )
        )
        registry.forget_engine(self.instance.name)

    def _worth_telling(self, lines: list[str]) -> list[str]:
        """The engine's lines without those by which it only tells that mgpu has looked at it."""
        try:
            is_chatter = load_backend(self.instance.backend or "").is_chatter
        except KeyError:  # never planned
            return lines
        return [line for line in lines if not is_chatter(line)]

    def _failed(self, error: MgpuError | None) -> MgpuError:
        """The error that the command ends with, which the record has, too."""
        last = self.instance.exit
        if error is None or (last and (self.instance.restarts_itself or last.cause == "stuck")):
            told = error_of(replace(self.instance, exit_code=error.exit_code if error else None))
            told.log_reference = error.log_reference if error else None
            error = told
        ended = replace(last, cause=error.code, message=error.message, hint=error.hint) if last else None
        self.instance = replace(self.instance, exit=ended, exit_code=error.exit_code, log_reference=error.log_reference)
        with interrupts.held():
            self._write()
        return error

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_S))
            self.tick()

    def _write(self, *, required: bool = False) -> None:
        """Write the record if it has changed; a full disk must not end an engine that serves."""
        if self.instance == self._written:
            return
        now = time.monotonic()
        if not required and now - self._written_at < _WRITE_EVERY_S and _same_at_a_glance(self.instance, self._written):
            return
        try:
            registry.write(self.instance)
        except Missing:
            if required:
                raise
            return
        self._written, self._written_at = self.instance, now

    def _tell(self, before: Instance) -> None:
        """Tell what became of it; that a disk is full where this is written to must not end an engine that serves."""
        try:
            self._on_change(before, self.instance)
        except OSError as error:
            if not shortage(error, "nothing can be told"):
                raise

    def _tell_service(self, event: Event, before: Instance) -> None:
        now = self.instance
        if not self._service:
            return
        if now.state is not before.state:
            if now.state is State.READY:
                self._service.ready(f"{now.name} on {now.url}/v1")
            elif now.state is State.STOPPING or now.state.is_over:
                grace_s = self._end.grace_s if self._end else 0.0
                self._service.stopping(f"{now.name} is {now.state}", within_s=grace_s + _STOP_S)
            else:
                why = f": {now.trouble.message}" if now.trouble else ""
                self._service.status(f"{now.name} is {now.state}{why}")
        elif isinstance(event, Loading):
            self._service.progress(f"{now.name}: {now.phase}", time.monotonic())
        elif isinstance(event, Draining) and now.phase != before.phase:
            self._service.stopping(f"{now.name}: {now.phase}", within_s=event.left_s + _STOP_S)


def error_of(instance: Instance) -> MgpuError:
    """Return the error that an instance which has failed ended with, as `mgpu run` raises it."""
    kind = _ERRORS.get(instance.exit_code or 0, EngineFailed)
    last = instance.exit
    if last is None:
        return kind(f"{instance.name} has failed, and nothing tells why")
    error = kind(last.message or f"{instance.name} has failed: {last.cause}", code=last.cause, hint=last.hint)
    error.log_reference = instance.log_reference
    return error


def _failure(error: Exception | None) -> Failure:
    own = getattr(error, "failure", None)  # EngineDied and GivenUp know better than their words
    if isinstance(own, Failure):
        return own
    if error:
        return failure_from(_told(error, "it could not be run") or _unexpected(error))
    return Failure(code="stopped", message="the engine was stopped", deterministic=False)


def _told(problem: Exception, what: str) -> MgpuError | None:
    """The problem as an error that can be told; None for a bug."""
    return problem if isinstance(problem, MgpuError) else shortage(problem, what)


def _expected(problem: Exception, what: str) -> MgpuError:
    """The problem as an error that can be told. Raises it where it is a bug."""
    if error := _told(problem, what):
        return error
    raise problem


def _unexpected(problem: Exception) -> MgpuError:
    """A bug, or something that the system refused where nobody expected it, as an error."""
    code = "os-error" if isinstance(problem, OSError) else "bug"
    return MgpuError(
        f"mgpu itself failed ({type(problem).__name__}: {problem})"[:_LONGEST_MESSAGE],
        code=code,
        # Of what looks like a reader who has left no report is written.
        hint=None
        if isinstance(problem, OSError) and problem.errno == errno.EIO
        else f"the newest bug-*.log in {state_path()} tells more",
    )


def _same_at_a_glance(now: Instance, before: Instance | None) -> bool:
    """Whether nothing has changed but what changes all the time: rates, and how far a phase is."""
    if before is None:
        return False
    phases = [(each.phase or "").partition(",")[0] for each in (now, before)]
    return phases[0] == phases[1] and now == replace(
        before, rate=now.rate, gpus=now.gpus, phase=now.phase, remaining_s=now.remaining_s
    )


def _now() -> Moment:
    utc = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return Moment(utc=utc, monotonic_s=time.monotonic())
