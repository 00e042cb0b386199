"""`mgpu run -d`: a supervisor in a session of its own, and the mgpu that waits until it is ready."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import mgpu
from mgpu.cli.narration import keep_talking
from mgpu.cli.result import Result
from mgpu.errors import EngineFailed, Interrupted, MgpuError, Missing
from mgpu.interrupts import interrupts
from mgpu.running import registry
from mgpu.running.audience import has_left
from mgpu.running.identity import identity
from mgpu.running.instance import Instance, State, instance_to_json
from mgpu.running.notify import ServiceManager
from mgpu.running.scope import scoped
from mgpu.running.shortage import shortage
from mgpu.running.state import Held, inherited_folder, rotate
from mgpu.running.supervisor import Supervisor, error_of

if TYPE_CHECKING:
    from mgpu.cli.asked import Asked
    from mgpu.cli.screens import RunScreen

_POLL_S = 0.05
_SAMPLE_EVERY_S = 2.0
# Whom a service manager waits for is the mgpu that it started.
_NOT_INHERITED = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")


def run_detached(wanted: Asked, held: Held, screen: RunScreen) -> Result:
    """Start the supervisor of what was planned, hand it the name that is `held`, and wait until it is ready.

    Raises what it failed with, as `mgpu run` would have. Ctrl-C stops it (Interrupted); a terminal that is closed does
    not: what takes an hour to fetch was to go on by itself.
    """
    from mgpu.cli.serving import reach

    begun = time.monotonic()
    _leave_when_hung_up()
    process: subprocess.Popen[bytes] | None = None
    try:
        with interrupts.held():
            process = _started(wanted, held)
        instance = _until_ready(process, held, screen)
    except _HungUp:
        raise Interrupted("the terminal was closed; it goes on by itself", hint="mgpu ps") from None
    except KeyboardInterrupt:
        if process is None:
            raise
        asked_at = time.monotonic()
        screen.stopping(held.name)
        _end(process)
        screen.stopped(held.name, time.monotonic() - asked_at, early=True)
        raise Interrupted("interrupted; it was stopped") from None
    try:
        screen.left_running(instance, time.monotonic() - begun, reach(wanted.endpoint))
    except OSError as error:
        process.returncode = 0
        if has_left(error):
            raise
        raise Missing(
            f"{held.name} is ready and goes on, but that cannot be written: {error.strerror}",
            code="output-unwritable",
            hint=f"mgpu stop {held.name}",
        ) from None
    process.returncode = 0  # it goes on, and is not this process's to wait for
    return Result(
        command="run",
        data=instance_to_json(instance),
        # Said already, where people read.
        warnings=instance.warnings if screen.as_json else (),
    )


def supervise_detached(wanted: Asked, lock: int, screen: RunScreen) -> None:
    """Be the supervisor that `run_detached` starts; blocks until the instance is over. Raises what it failed with."""
    from mgpu.cli.serving import follow_session
    from mgpu.cli.starts import Starts

    keep_talking()
    signal.signal(signal.SIGHUP, lambda *_: None)  # no terminal is this process's; not handed on, as SIG_IGN would be
    with inherited_folder(wanted.endpoint.name, lock) as held:
        supervisor = Supervisor(_own(wanted, held), on_change=screen.became, service=ServiceManager.of())
        supervisor.begin()
        starts = Starts(wanted, screen, supervisor, None)

        supervisor.live(
            starts.plan, starts.start, lambda session: follow_session(session, screen, supervisor, _SAMPLE_EVERY_S)
        )


class _HungUp(BaseException):
    """The terminal was closed."""


def _leave_when_hung_up() -> None:
    """Have a closed terminal end this process alone, unless it is not to be heard of (nohup)."""

    def hung_up(*_: object) -> None:
        raise _HungUp

    if signal.getsignal(signal.SIGHUP) is interrupts:
        signal.signal(signal.SIGHUP, hung_up)


def _own(wanted: Asked, held: Held) -> Instance:
    """The record that the parent began, as this process's own: what it claims stays claimed."""
    new = wanted.instance(wanted.model, held)
    begun = registry.record(held.folder)
    if begun is None or begun.state is not State.STARTING:
        return new
    return replace(begun, supervisor=new.supervisor, phase=new.phase)


def _started(wanted: Asked, held: Held) -> subprocess.Popen[bytes]:
    try:
        return _begun(wanted, held)
    except MgpuError:
        registry.forget(held.name)  # nobody will go on with what is written there
        raise


def _begun(wanted: Asked, held: Held) -> subprocess.Popen[bytes]:
    log_path = held.folder / registry.SUPERVISOR_LOG
    rotate(log_path)
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    if wanted.endpoint.api_key:
        environment["MGPU_API_KEY"] = wanted.endpoint.api_key
    # What lies in the current folder is not to be taken for a part of Python.
    safely = () if Path(mgpu.__file__).parents[1] == Path.cwd() else ("-P",)
    _, *words = wanted.command(held.name)
    at = words.index("--") if "--" in words else len(words)
    words[at:at] = ["--supervise", str(held.lock)]
    log: int | None = None
    try:
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        return subprocess.Popen(
            [*scoped(held.name), sys.executable, *safely, "-m", "mgpu", *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(held.lock,),
        )
    except OSError as error:
        what = f"the supervisor of {held.name} could not be started"
        raise shortage(error, what) or Missing(f"{what}: {error.strerror}", code="state-folder") from None
    finally:
        if log is not None:
            os.close(log)


def _until_ready(process: subprocess.Popen[bytes], held: Held, screen: RunScreen) -> Instance:
    me = identity(process.pid)
    with screen.waiting() as show:
        while True:
            ended = process.poll() is not None  # asked before the last look at what it wrote
            instance = registry.record(held.folder)
            if instance and me and instance.supervisor == me:
                show(instance)
                if instance.state in (State.READY, State.DEGRADED):
                    return instance
                if instance.state is State.STOPPED:
                    process.wait()
                    raise Interrupted("it was stopped before it was ready")
                if instance.state is State.FAILED and (ended or instance.exit_code is not None):
                    process.wait()
                    raise error_of(instance)
            if ended:
                error = EngineFailed(
                    f"the supervisor of {held.name} ended with status {process.returncode}",
                    code="supervisor-died",
                    hint=f"mgpu logs {held.name} --supervisor",
                )
                raise error
            time.sleep(_POLL_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Have the supervisor stop its engine; asked again, it makes haste."""
    while process.poll() is None:
        with suppress(KeyboardInterrupt):
            process.send_signal(signal.SIGTERM)
            process.wait()
