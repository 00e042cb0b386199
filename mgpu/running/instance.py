"""An instance as a value: what `mgpu ps` shows of it and what recovery has to remember, with JSON both ways.

What becomes of it is `mgpu.running.life`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from mgpu.backends.failure import Failure
from mgpu.errors import UsageError
from mgpu.machine.snapshot import to_json, value_from_json
from mgpu.running.recovery import Change, Setup
from mgpu.running.state import check_name

SCHEMA_VERSION = 1

_LARGEST_PID = 1 << 22  # linux/threads.h: PID_MAX_LIMIT on 64 bits


class State(StrEnum):
    """Where an instance is in its life."""

    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def is_over(self) -> bool:
        """Whether nothing of it will happen any more."""
        return self in (State.STOPPED, State.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessId:
    """A process, once and for all: numbers are given again, but not with the same start (`started_ticks`, field 22 of
    /proc/PID/stat: clock ticks since the boot that `boot_id` names)."""

    pid: int
    started_ticks: int
    boot_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuShare:
    """What a card was planned to hold of the instance, and what its driver says that it holds; None when unknown."""

    uuid: str | None
    index: int
    planned_bytes: int | None = None
    actual_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """What the engine did lately: tokens per second, requests, and the fraction of the KV cache in use."""

    generation_tok_s: float | None = None
    prompt_tok_s: float | None = None
    running: int | None = None
    waiting: int | None = None
    kv_used: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """How the last engine ended: its status or the signal, the code of the cause ("asked" after a stop), when, its
    last lines, and what it means with what to type next."""

    code: int | None
    signal: int | None
    cause: str
    at: str
    last_lines: tuple[str, ...] = ()
    message: str | None = None
    hint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """The record of an instance.

    `started_at` is when it began, `ready_at` when its engine last became ready (None: never); both ISO 8601 UTC.
    `restarts` counts the engines that were started after another and became ready. `engine` is there from its start
    until it is known to be gone, with its process `group`. `first_exit` is the first failure since it was last healthy
    for long: the later ones may tell less. `command` is the argv of mgpu that starts it again, without any key;
    `pinned` what of it the user typed. `changes` are all that recovery has tried, oldest first. `restarts_itself` says
    whether anything is tried at all when an engine ends. `exit_code` is what mgpu itself ended with, and
    `log_reference` where in the log the reason stands. `served_as` is the name that clients must ask for, where it is
    not the instance's, and `warnings` are what was not as planned when it became ready.

    For recovery alone: `setup` is what runs, `broken` why mgpu is ending the engine, `trouble` the failure that the
    restart is for, `on_trial` says that the last change has not been proven, `recent_restarts` are those since the
    engine was last healthy for long, and `healthy_since_s` is the supervisor's monotonic clock.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    state: State
    backend: str | None = None
    model: str
    url: str | None = None
    started_at: str
    ready_at: str | None = None
    gpus: tuple[GpuShare, ...] = ()
    rate: Rate | None = None
    restarts: int = 0
    exit: Exit | None = None
    first_exit: Exit | None = None
    log_path: str | None = None
    argv: tuple[str, ...] = ()
    phase: str | None = None
    remaining_s: float | None = None
    supervisor: ProcessId
    engine: ProcessId | None = None
    group: int | None = None
    changes: tuple[Change, ...] = ()
    command: tuple[str, ...] = ()
    pinned: tuple[str, ...] = ()
    mgpu_version: str | None = None
    served_as: str | None = None
    warnings: tuple[str, ...] = ()
    restarts_itself: bool = True
    exit_code: int | None = None
    log_reference: str | None = None
    setup: Setup | None = None
    broken: Failure | None = None
    trouble: Failure | None = None
    on_trial: bool = False
    recent_restarts: int = 0
    healthy_since_s: float | None = None


def instance_to_json(instance: Instance) -> dict[str, Any]:
    """Return the record as plain dicts, lists and scalars; `pid` is the engine's."""
    data = to_json(instance)
    assert isinstance(data, dict)
    return {**data, "pid": instance.engine.pid if instance.engine else None}


def instance_from_json(data: object) -> Instance:
    """Rebuild an instance from `instance_to_json`'s output.

    Unknown keys are ignored. Raises ValueError naming the path of the first value that is missing, of a wrong type,
    or no name, time or process that there can be: what is read is signalled later.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"instance: expected an object, found {type(data).__name__}")
    version = data.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ValueError(f"the record was written by a newer mgpu (version {version}, newest known {SCHEMA_VERSION})")
    try:
        state = State(data["state"])
    except KeyError:
        raise ValueError("instance.state: missing") from None
    except (ValueError, TypeError):
        raise ValueError(f"instance.state: {str(data['state'])[:40]!r} is no state") from None
    instance = value_from_json(Instance, {**data, "state": state}, "instance")
    _check(instance)
    return instance


def _check(instance: Instance) -> None:
    """Raise ValueError for what has the right type and cannot be."""
    try:
        check_name(instance.name)
    except UsageError:
        raise ValueError(f"instance.name: {instance.name[:40]!r} is no name") from None
    _check_time(instance.started_at, "instance.started_at")
    _check_time(instance.ready_at, "instance.ready_at")
    _check_time(instance.exit.at if instance.exit else None, "instance.exit.at")
    _check_time(instance.first_exit.at if instance.first_exit else None, "instance.first_exit.at")
    for place, change in enumerate(instance.changes):
        _check_time(change.at, f"instance.changes[{place}].at")
    # In a container mgpu itself may be the first process; 0 and 1 as a group would mean everybody.
    _check_pid(instance.supervisor.pid, "instance.supervisor.pid", least=1)
    _check_pid(instance.engine.pid if instance.engine else None, "instance.engine.pid", least=2)
    _check_pid(instance.group, "instance.group", least=2)


def _check_time(text: str | None, path: str) -> None:
    if text is None:
        return
    try:
        known = datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"{path}: {text[:40]!r} is no time with its zone (ISO 8601)")


def _check_pid(pid: int | None, path: str, *, least: int) -> None:
    if pid is not None and not least <= pid <= _LARGEST_PID:
        raise ValueError(f"{path}: no process has that number")
