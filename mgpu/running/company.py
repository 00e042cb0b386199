"""The other instances of this user, as far as a new one must know of them: who has planned memory that is not taken
yet, and whose memory comes back.

A plan is made, and its memory claimed by a record, while `planning` is held: two never plan with the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from mgpu.errors import Missing
from mgpu.machine.snapshot import Gpu, Machine
from mgpu.running.instance import GpuShare, State
from mgpu.running.registry import Entry, instances
from mgpu.running.state import state_folder

_POLL_S = 0.05
# A plan takes seconds, or as long as a hub does not answer; who holds it for longer hangs, and must not hold up others.
_PATIENCE_S = 120.0
# A driver frees a killed process's memory in pieces: what has not risen for so long will not.
_STILL_S = 0.5
_LONGEST_WAIT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What an instance will hold of a card, and the processes (`pids`) by which it holds some of that already."""

    share: GpuShare
    pids: frozenset[int]

    def outstanding_bytes(self, gpu: Gpu) -> int:
        """What of it is still counted as free on `gpu`; 0 where that is another card."""
        share = self.share
        same = share.uuid == gpu.uuid if share.uuid or gpu.uuid else share.index == gpu.index
        if not same:
            return 0
        held = sum(process.bytes or 0 for process in gpu.used_by if process.pid in self.pids)
        return max((share.planned_bytes or 0) - held, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Company:
    """The claims of those that start, and whether somebody is ending and will give memory back. `unknown` names those
    that live and may start, and whose claims nobody knows since their records are damaged."""

    claims: tuple[Claim, ...] = ()
    gives_back: bool = False
    unknown: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a plan beside them cannot be sure of."""
        return tuple(
            f"the record of {name} is damaged: if it is starting, the memory it is going to take counts as free"
            for name in self.unknown
        )

    def without_claimed(self, machine: Machine) -> Machine:
        """Return the machine with what others have claimed no longer free."""
        gpus = []
        for gpu in machine.gpus:
            claimed = sum(claim.outstanding_bytes(gpu) for claim in self.claims)
            if claimed and gpu.free_bytes is not None:
                gpu = replace(gpu, free_bytes=max(gpu.free_bytes - claimed, 0))
            gpus.append(gpu)
        return replace(machine, gpus=tuple(gpus))


def company(*, without: str | None = None) -> Company:
    """Return what is known of the other instances that live; the one named `without` is left out."""
    return company_of([entry for entry in instances() if entry.name != without])


def company_of(entries: Sequence[Entry]) -> Company:
    """Return what of these instances a new one must know. What one that is ready holds is not free any more."""
    claims: list[Claim] = []
    unknown: list[str] = []
    gives_back = False
    for entry in entries:
        instance = entry.instance
        if instance is None and entry.supervisor:
            unknown.append(entry.name)
        if instance is None or entry.is_over:
            continue
        dying = entry.supervisor is None and entry.reaper is not None  # its supervisor was killed
        gives_back |= dying or instance.state is State.STOPPING or instance.state.is_over
        if instance.state in (State.STARTING, State.RESTARTING) and entry.supervisor:
            pids = frozenset(process.pid for process in entry.engine)
            claims += [Claim(share=share, pids=pids) for share in instance.gpus if share.planned_bytes]
    return Company(claims=tuple(claims), gives_back=gives_back, unknown=tuple(unknown))


@contextlib.contextmanager
def planning() -> Iterator[bool]:
    """Be the only one of this user that plans; blocks while others do, for two minutes at most. Yields whether it is:
    otherwise somebody holds on to a plan, and may claim the same memory. Raises Missing."""
    path = state_folder() / ".planning.lock"  # no instance can be called so
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise Missing(f"{path} cannot be written: {error.strerror}", code="state-folder") from None
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while not (alone := _locked(lock)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        yield alone
    finally:
        os.close(lock)


def wait_for_memory(free_bytes: Callable[[], int | None], gives_back: Callable[[], bool]) -> bool:
    """Block while free memory rises or somebody is ending, for a minute at most; returns whether any came back.

    `free_bytes` is all that is free on the cards now, None where nothing tells.
    """
    begun = most_at = time.monotonic()
    first = most = free_bytes() or 0
    waited = gives_back()
    # Where nothing tells what is free there is nothing to look at but who is ending.
    while (now := time.monotonic()) - begun < _LONGEST_WAIT_S and (
        (first and now - most_at < _STILL_S) or gives_back()
    ):
        time.sleep(_POLL_S)
        free = free_bytes() or 0
        if free > most:
            most, most_at = free, time.monotonic()
    return most > first or waited


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: as before there were any
        return True
    return True
