"""`mgpu stop`: end instances, and say what came back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgpu.cli.options import JsonOption
from mgpu.cli.output import Output
from mgpu.cli.result import Result
from mgpu.errors import Interrupted, MgpuError, NoAnswer, UsageError

if TYPE_CHECKING:
    from mgpu.running.census import Census
    from mgpu.running.registry import Entry

# Set by the main program before the command is called: `stop` speaks while it works.
output = Output(as_json=False)

_POLL_S = 0.05
# To look at all processes that there are costs more than to look at one.
_LOOK_EVERY_S = 0.5
# What its own end, or its parent's, has killed may take a moment to be gone.
_DYING_S = 1.0
_SPEAK_EVERY_S = 2.0
# What an engine may take when it was not said: its own grace, the harsher signals after it, and the tidying up.
_LIMIT_S = 120.0
_FORCED_LIMIT_S = 60.0
# A driver frees a killed process's memory in pieces, some seconds after its end.
_GIVING_BACK_S = 10.0
_STILL_S = 0.5


def stop(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME…", help="The instances' names.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All instances that run.")] = False,
    grace: Annotated[
        float | None,
        typer.Option("--grace", help="Seconds for answers that are being given (default: 10).", min=0),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Kill the mgpu that looks after it: for one that hangs. Nothing is asked.")
    ] = False,
    json: JsonOption = False,
) -> Result:
    """End instances: answers that are being given may end first, then the engine is stopped and its memory freed."""
    from mgpu.cli.named import named
    from mgpu.interrupts import interrupts
    from mgpu.running.census import census
    from mgpu.running.registry import read
    from mgpu.running.stopping import write_down_killed

    if names and everything:
        raise UsageError("NAMEs and --all were both given", hint=f"mgpu stop --all   or   {_command(names)}")
    if not names and not everything:
        raise UsageError("give the NAMEs of instances, or --all", hint="mgpu ps shows them")
    before = census()
    meant = [entry.name for entry in before.entries if not entry.is_over] if everything else names or []
    entries = named(meant, "mgpu stop", living=True, undone="nothing was stopped")
    measured = _Measured.before(entries, before)
    errors: list[MgpuError] = []
    outcomes = []
    asked = []
    limit_s = _FORCED_LIMIT_S if force else _LIMIT_S + (grace or 0.0)
    try:
        with interrupts.held():  # all are asked, or none
            for entry in entries:
                try:
                    if _asked(entry, grace, force=force):
                        asked.append(entry)
                    else:
                        outcomes.append(_outcome(entry, "over"))
                        errors.append(_not_running(entry))
                except MgpuError as error:
                    outcomes.append(_outcome(entry, "left"))
                    errors.append(error)
        took_s, orphaned, cut_off = _wait(asked, limit_s)
    except KeyboardInterrupt:
        if asked:
            output.note("the stop goes on: mgpu ps shows how far it is")
        raise Interrupted("interrupted while waiting: the stop goes on") from None
    for entry in asked:
        if entry.name in took_s:
            outcomes.append(_outcome(entry, "stopped"))
            if force:
                write_down_killed(entry)
        elif entry.name in orphaned:
            outcomes.append(_outcome(entry, "left"))
            errors.append(_orphaned(read(entry.folder)))
        else:
            outcomes.append(_outcome(entry, "stopping"))
            errors.append(_still_there(entry, limit_s, force=force))
    freed = measured.after() if took_s else {}
    if everything and not entries:
        output.note("nothing is running")
    return Result(
        command="stop",
        data={
            "instances": [each | {"seconds": took_s.get(str(each["name"]))} for each in outcomes],
            "freed": [{"index": index, "bytes": size} for index, size in sorted(freed.items()) if index >= 0],
            "freed_ram_bytes": freed.get(-1),
        },
        screen=lambda _: tuple(_lines(took_s, freed, cut_off)),
        exit_code=NoAnswer.exit_code if errors else 0,
        errors=tuple(errors),
    )


def _asked(entry: Entry, grace_s: float | None, *, force: bool) -> bool:
    """Ask for the end, or kill; False where it is over already."""
    from mgpu.running.registry import read
    from mgpu.running.stopping import ask_to_stop, kill

    pid = entry.supervisor.pid if entry.supervisor else None
    if kill(entry) if force else ask_to_stop(entry, grace_s):
        what = "killed" if force else "asked"
        output.note(f"{'stop':<8} {entry.name}: {what} the mgpu that looks after it (pid {pid})")
        return True
    now = read(entry.folder)
    if now.is_orphaned and now.reaper:
        output.note(f"{'stop':<8} {entry.name}: its engine is being ended already")
        return True
    if now.is_orphaned:
        raise _orphaned(now)
    return entry.supervisor is not None  # it was there a moment ago


def _orphaned(entry: Entry) -> NoAnswer:
    pids = ", ".join(str(each.pid) for each in entry.engine)
    return NoAnswer(
        f"the mgpu that looked after {entry.name} is gone, and its engine still runs (pid {pids})",
        code="orphaned",
        hint="mgpu reap",
    )


def _command(names: Sequence[str]) -> str:
    import shlex

    return shlex.join(["mgpu", "stop", *names])


def _not_running(entry: Entry) -> NoAnswer:
    if entry.instance is None and entry.problem is None:
        hint = f"mgpu logs {entry.name} shows them, mgpu ps --clear {entry.name} forgets them"
        return NoAnswer(f"{entry.name} is not running: only its logs are left", code="not-running", hint=hint)
    hint = f"mgpu ps shows how it ended, mgpu ps --clear {entry.name} forgets it"
    return NoAnswer(f"{entry.name} is not running", code="not-running", hint=hint)


def _wait(entries: Sequence[Entry], limit_s: float) -> tuple[dict[str, float], frozenset[str], dict[str, str]]:
    """Wait until all are over; returns the seconds of those that are, those that nobody ends any more, and in words
    the answers that were cut off."""
    from mgpu.running.identity import alive
    from mgpu.running.life import CUT_OFF
    from mgpu.running.registry import read, record
    from mgpu.running.stopping import Progress, progress

    begun = spoke_at = time.monotonic()
    took_s: dict[str, float] = {}
    orphaned: set[str] = set()
    look_at: dict[str, float] = {}
    alone_since: dict[str, float] = {}
    cut_off: dict[str, str] = {}
    while waiting := [entry for entry in entries if entry.name not in took_s and entry.name not in orphaned]:
        now = time.monotonic()
        for entry in waiting:
            name = entry.name
            # Of one in the foreground the record goes with it.
            told = record(entry.folder) if name not in cut_off else None
            if told and told.supervisor == entry.supervisor and (told.phase or "").endswith(CUT_OFF):
                cut_off[name] = told.phase or ""
            if (entry.supervisor and alive(entry.supervisor)) or now < look_at.get(name, 0.0):
                continue
            look_at[name] = now + _LOOK_EVERY_S
            match progress(entry):
                case Progress.OVER:
                    took_s[name] = round(now - begun, 3)
                case Progress.ORPHANED if now - alone_since.setdefault(name, now) >= _DYING_S:
                    orphaned.add(name)
        if now - begun > limit_s:
            break
        if now - spoke_at > _SPEAK_EVERY_S:
            spoke_at = now
            for entry in waiting:
                output.note(f"{'wait':<8} {_awaited(read(entry.folder))}")
        time.sleep(_POLL_S)
    took_s = {entry.name: took_s[entry.name] for entry in entries if entry.name in took_s}
    return took_s, frozenset(orphaned), cut_off


def _awaited(entry: Entry) -> str:
    from mgpu.running.instance import State

    instance = entry.instance
    if entry.engine and instance and instance.phase and instance.state is State.STOPPING:
        left = "" if instance.remaining_s is None else f", {instance.remaining_s:.0f} s left"
        return f"{entry.name}: {instance.phase}{left}"
    if entry.engine:
        pids = ", ".join(str(each.pid) for each in entry.engine[:4])
        return f"{entry.name}: its engine is ending (pid {pids})"
    last = entry.supervisor or entry.reaper
    pid = last.pid if last else "?"
    return f"{entry.name}: its engine is gone, mgpu tidies up (pid {pid})"


def _still_there(entry: Entry, limit_s: float, *, force: bool) -> NoAnswer:
    from mgpu.running.registry import read

    return NoAnswer(
        f"after {limit_s:.0f} s still: {_awaited(read(entry.folder))}",
        code="still-stopping",
        hint="mgpu reap, later" if force else f"mgpu stop {entry.name} --force",
    )


def _outcome(entry: Entry, what: str) -> dict[str, Any]:
    return {"name": entry.name, "result": what}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """What was free and held before. Cards by index; -1 stands for the computer's own memory."""

    cards: frozenset[int]
    free: dict[int, int]
    held_bytes: int
    ram_bytes: int | None

    @staticmethod
    def before(entries: Sequence[Entry], found: Census) -> _Measured:
        from mgpu.running.census import card_of, ram_bytes

        names = {entry.name for entry in entries}
        shares = [
            share for entry in found.entries if entry.name in names and entry.instance for share in entry.instance.gpus
        ]
        cards = frozenset(card.index for share in shares if (card := card_of(share, found.machine)))
        return _Measured(
            cards=cards,
            free={card.index: card.free_bytes for card in found.machine.gpus if card.free_bytes is not None},
            held_bytes=sum(share.actual_bytes or 0 for share in shares),
            ram_bytes=ram_bytes(process for entry in entries for process in entry.engine),
        )

    def after(self) -> dict[int, int]:
        """What is free now that was not: of the cards, where their driver tells, else of RAM."""
        from mgpu.machine.probe import probe

        def risen() -> dict[int, int]:
            now = {card.index: card.free_bytes or 0 for card in probe().gpus}
            rises = {index: now.get(index, 0) - self.free[index] for index in self.cards if index in self.free}
            return {index: size for index, size in rises.items() if size > 0}

        freed = _settled(risen, self.held_bytes) if self.cards & set(self.free) else {}
        return freed or ({-1: self.ram_bytes} if self.ram_bytes else {})


def _settled(risen: Callable[[], dict[int, int]], held_bytes: int) -> dict[int, int]:
    """What came back, once no more comes."""
    begun = rose_at = time.monotonic()
    freed = risen()
    while (now := time.monotonic()) - begun < _GIVING_BACK_S and now - rose_at < _STILL_S:
        if held_bytes and sum(freed.values()) >= held_bytes:
            break
        time.sleep(_POLL_S)
        more = risen()
        if sum(more.values()) > sum(freed.values()):
            freed, rose_at = more, now
    return freed


def _lines(took_s: dict[str, float], freed: dict[int, int], cut_off: dict[str, str]) -> list[str]:
    from mgpu.units import gib, seconds

    if not took_s:
        return []
    where = ", ".join(f"gpu{index}" for index in sorted(freed) if index >= 0) or "RAM"
    back = f"{gib(sum(freed.values()))} of {where} given back" if freed else ""
    if len(took_s) == 1:
        ((name, duration_s),) = took_s.items()
        return [", ".join(filter(None, (f"{name} stopped in {seconds(duration_s)}", cut_off.get(name), back)))]
    return [
        ", ".join(filter(None, (f"{name} stopped in {seconds(duration_s)}", cut_off.get(name))))
        for name, duration_s in took_s.items()
    ] + ([back] if back else [])
