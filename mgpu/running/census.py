"""What runs on this machine now: this user's instances with what they really hold, and engines of others."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from mgpu.machine.probe import probe
from mgpu.machine.snapshot import Gpu, Machine
from mgpu.running.identity import is_stopped
from mgpu.running.instance import Exit, GpuShare, Instance, ProcessId, State
from mgpu.running.logs import follow
from mgpu.running.registry import LOG, RECORD, SUPERVISOR_LOG, Entry, instances
from mgpu.running.strangers import Stranger, owner_of, strangers

SUPERVISOR_DIED = "supervisor-died"
"""The cause of an end that no supervisor has written down."""

_LAST_LINES = 3
# A supervisor hears at once of the end of its engine, and has written so long before.
_HEARD_S = 5.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """The instances by name, as they are now, the cards, and the engines that mgpu has not started.

    Of an instance that lives, `gpus` tell what its processes hold just now, where the driver says so. One whose
    supervisor is gone without a word is `failed`, whatever its record says.
    """

    entries: tuple[Entry, ...]
    machine: Machine
    strangers: tuple[Stranger, ...]

    @property
    def orphaned(self) -> tuple[Entry, ...]:
        """The instances whose engine lives and nobody looks after it."""
        return tuple(entry for entry in self.entries if entry.is_orphaned)

    @property
    def cards(self) -> tuple[Gpu, ...]:
        """The machine's cards by index, and those that only an engine knows of (RPC devices) without their memory."""
        known = {gpu.index: gpu for gpu in self.machine.gpus}
        for entry in self.entries:
            for share in entry.instance.gpus if entry.instance and not entry.is_over else ():
                if card_of(share, self.machine) is None:
                    known.setdefault(share.index, Gpu(index=share.index, vendor="other", name="?", uuid=share.uuid))
        return tuple(known[index] for index in sorted(known))


def census() -> Census:
    """Look at this machine now; blocks while the cards' driver answers. Raises Missing where there is no home."""
    root = Path(os.environ.get("MGPU_ROOT") or "/")
    # The cards first: what has ended meanwhile holds nothing any more, and is not taken for a stranger.
    machine = probe(root)
    return census_of(heeded_instances(), machine, root)


def heeded_instances() -> tuple[Entry, ...]:
    """Return this user's instances, as `registry.instances`; one whose engine is gone although its supervisor still
    calls it well is degraded, with that as its problem. Blocks for seconds where there is such a one, to see whether
    the supervisor only has not heard of it yet. Raises Missing."""
    entries = instances()
    unheard = {each for entry in entries if (each := _unheard(entry))}
    deadline = time.monotonic() + _HEARD_S
    while not all(is_stopped(supervisor) for supervisor, _ in unheard) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        entries = instances()
        unheard &= {each for entry in entries if (each := _unheard(entry))}
    return tuple(_unheeded(entry) if _unheard(entry) in unheard else entry for entry in entries)


def census_of(entries: Sequence[Entry], machine: Machine, root: Path) -> Census:
    """Return what these instances are on `machine`, whose /proc is under `root`."""
    owners = {process.pid: entry.name for entry in entries for process in _processes(entry)}
    holders = {process.pid for gpu in machine.gpus for process in gpu.used_by}
    owners |= {pid: owner for pid in holders if (owner := owner_of(pid, owners, root))}
    own_ports = {port_of(entry.instance.url) for entry in entries if entry.instance and not entry.is_over}
    return Census(
        entries=tuple(as_found(entry, machine, owners) for entry in entries),
        machine=machine,
        strangers=strangers(machine, owners, own_ports - {None}, root),
    )


def as_found(entry: Entry, machine: Machine, owners: Mapping[int, str]) -> Entry:
    """Return an instance as it is now on `machine`, where processes on the cards belong to instances as `owners` says:
    one whose supervisor is gone has failed, and what a live one holds is what the driver says."""
    instance = entry.instance
    if instance is None:
        return entry
    if entry.supervisor is None and not instance.state.is_over:
        instance = _lost(entry, instance)
    shares = tuple(_measured(share, machine, entry, owners) for share in instance.gpus)
    return replace(entry, instance=replace(instance, gpus=shares))


def card_of(share: GpuShare, machine: Machine) -> Gpu | None:
    """Return the card that a share is of: by UUID, else by index; None for one that only an engine knows."""
    if share.uuid:
        return next((gpu for gpu in machine.gpus if gpu.uuid == share.uuid), None)
    return next((gpu for gpu in machine.gpus if gpu.index == share.index and gpu.uuid is None), None)


def ram_bytes(processes: Iterable[ProcessId]) -> int | None:
    """Return what processes hold of the computer's memory, what they share counted once (smaps_rollup's Pss), with the
    files they have mapped; None where none of them tells."""
    known = []
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            known += [int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")]
        except (OSError, ValueError):
            continue
    return sum(known) if known else None


def port_of(url: str | None) -> int | None:
    """Return the port of an address, None where it names none."""
    from urllib.parse import urlsplit

    try:
        return urlsplit(url or "").port
    except ValueError:
        return None


def _unheard(entry: Entry) -> tuple[ProcessId, ProcessId] | None:
    """The supervisor and the engine, where that is gone and the record does not say so. What is stopping may have
    ended its engine."""
    instance = entry.instance
    if instance is None or instance.engine is None or entry.supervisor is None or entry.engine:
        return None
    if instance.state.is_over or instance.state is State.STOPPING:
        return None
    return entry.supervisor, instance.engine


def _unheeded(entry: Entry) -> Entry:
    assert entry.instance
    assert entry.supervisor
    does = "is stopped" if is_stopped(entry.supervisor) else "does not notice"
    problem = (
        f"its engine is gone, and the mgpu that looks after it (pid {entry.supervisor.pid}) {does}: "
        f"mgpu stop {entry.name} --force"
    )
    instance = replace(
        entry.instance, state=State.DEGRADED, engine=None, group=None, url=None, rate=None, phase=None, remaining_s=None
    )
    return replace(entry, instance=instance, problem=problem)


def _processes(entry: Entry) -> tuple[ProcessId, ...]:
    return (*((entry.supervisor,) if entry.supervisor else ()), *entry.engine)


def _measured(share: GpuShare, machine: Machine, entry: Entry, owners: Mapping[int, str]) -> GpuShare:
    if entry.is_over:
        return replace(share, actual_bytes=None)
    card = card_of(share, machine)
    held = [process.bytes for process in card.used_by if owners.get(process.pid) == entry.name] if card else []
    known = [size for size in held if size is not None]
    # A driver that tells of its processes at all tells of every card: there it holds nothing.
    told = card and not held and any(owners.get(each.pid) == entry.name for gpu in machine.gpus for each in gpu.used_by)
    return replace(share, actual_bytes=sum(known)) if known or told else share


def _lost(entry: Entry, instance: Instance) -> Instance:
    """The instance whose supervisor was killed: when it was last heard of is when its record was written, which its
    reaper says of it, too, or its logs. An engine that lives goes on writing into its own."""
    files = (RECORD, SUPERVISOR_LOG, *(() if entry.engine else (LOG,)))
    written = max(_changed_at(entry.folder / name) for name in files)
    try:
        lines = tuple(line.rstrip() for line in follow(entry.folder / LOG, lambda: True, last_lines=_LAST_LINES))
    except OSError:
        lines = ()
    orphaned = bool(entry.engine)
    last = Exit(
        code=None,
        signal=None,
        cause=SUPERVISOR_DIED,
        at=datetime.fromtimestamp(written, UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        last_lines=lines,
        message="the mgpu that looked after it is gone"
        + (", its engine is not" if orphaned else ", and its engine too"),
        hint="mgpu reap ends it" if orphaned else None,
    )
    url = instance.url if orphaned else None
    return replace(instance, state=State.FAILED, exit=last, url=url, rate=None, phase=None, remaining_s=None)


def _changed_at(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0
