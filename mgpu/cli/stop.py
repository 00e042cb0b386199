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
_SPEAK_EVERY_S = 5.0
# What an engine may take when it was not said: its own grace, the harsher signals after it, and the tidying up.
_LIMIT_S = 120.0
# A driver frees a killed process's memory in pieces, some seconds after its end.
_GIVING_BACK_S = 10.0
_STILL_S = 0.5


def stop(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME…", help="The instances' names.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All instances that run.")] = False,
    grace: Annotated[
        float | None,
        typer.Option("--grace", help="Seconds for answers that are being given (default: the engine's).", min=0),
    ] = None,
    json: JsonOption = False,
) -> Result:
    """End instances: answers that are being given may end first, then the engine is stopped and its memory freed."""
    from mgpu.cli.named import named
    from mgpu.running.census import census
    from mgpu.running.interrupts import interrupts

    if bool(names) == everything:
        raise UsageError("give the NAMEs of instances, or --all", hint="mgpu ps shows them")
    before = census()
    meant = [entry.name for entry in before.entries if entry.supervisor] if everything else names or []
    entries = named(meant, "mgpu stop")
    measured = _Measured.before(entries, before)
    errors: list[MgpuError] = []
    outcomes = []
    asked = []
    limit_s = _LIMIT_S + (grace or 0.0)
    try:
        with interrupts.held():  # all are asked, or none
            for entry in entries:
                try:
                    if _asked(entry, grace):
                        asked.append(entry)
                    else:
                        outcomes.append(_outcome(entry, "over"))
                        output.note(f"{entry.name} is not running")
                except MgpuError as error:
                    outcomes.append(_outcome(entry, "left"))
                    errors.append(error)
        took_s = _wait(asked, limit_s)
    except KeyboardInterrupt:
        if asked:
            output.note("the stop goes on: mgpu ps shows how far it is")
        raise Interrupted("interrupted while waiting: the stop goes on") from None
    errors += [_still_there(entry, limit_s) for entry in asked if entry.name not in took_s]
    outcomes += [_outcome(entry, "stopped" if entry.name in took_s else "stopping") for entry in asked]
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
        screen=lambda _: tuple(_lines(took_s, freed)),
        exit_code=NoAnswer.exit_code if errors else 0,
        errors=tuple(errors),
    )


def _asked(entry: Entry, grace_s: float | None) -> bool:
    """Ask for the end; False where it is over already."""
    from mgpu.running.registry import read
    from mgpu.running.stopping import ask_to_stop

    if entry.supervisor and ask_to_stop(entry, grace_s):
        pid = entry.supervisor.pid
        output.note(f"{'stop':<8} {entry.name}: asked the mgpu that looks after it (pid {pid})")
        return True
    if read(entry.folder).is_orphaned:
        pids = ", ".join(str(each.pid) for each in entry.engine)
        raise NoAnswer(
            f"the mgpu that looked after {entry.name} is gone, and its engine still runs (pid {pids})",
            code="orphaned",
            hint="mgpu reap",
        )
    return False


def _wait(entries: Sequence[Entry], limit_s: float) -> dict[str, float]:
    """Wait until all are over; returns the seconds of those that are."""
    from mgpu.running.registry import read

    begun = spoke_at = time.monotonic()
    took_s: dict[str, float] = {}
    while waiting := [entry for entry in entries if entry.name not in took_s]:
        now = time.monotonic()
        found = [read(entry.folder) for entry in waiting]
        # Whoever has the name by now is somebody else.
        over = [
            new.name
            for old, new in zip(waiting, found, strict=True)
            if new.is_over or new.supervisor not in (old.supervisor, None)
        ]
        took_s |= dict.fromkeys(over, round(now - begun, 3))
        if now - begun > limit_s:
            break
        if now - spoke_at > _SPEAK_EVERY_S:
            spoke_at = now
            for each in found:
                output.note(f"{'wait':<8} {_awaited(each)}")
        if not over:
            time.sleep(_POLL_S)
    return took_s


def _awaited(entry: Entry) -> str:
    if entry.engine:
        pids = ", ".join(str(each.pid) for each in entry.engine[:4])
        return f"{entry.name}: its engine is ending (pid {pids})"
    pid = entry.supervisor.pid if entry.supervisor else "?"
    return f"{entry.name}: its engine is gone, mgpu tidies up (pid {pid})"


def _still_there(entry: Entry, limit_s: float) -> NoAnswer:
    from mgpu.running.registry import read

    return NoAnswer(
        f"after {limit_s:.0f} s still: {_awaited(read(entry.folder))}",
        code="still-stopping",
        hint=f"mgpu logs {entry.name} --supervisor   or   mgpu stop {entry.name} --grace 0",
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


def _lines(took_s: dict[str, float], freed: dict[int, int]) -> list[str]:
    from mgpu.units import gib, seconds

    if not took_s:
        return []
    where = ", ".join(f"gpu{index}" for index in sorted(freed) if index >= 0) or "RAM"
    back = f"{gib(sum(freed.values()))} of {where} given back" if freed else ""
    if len(took_s) == 1:
        ((name, duration_s),) = took_s.items()
        return [", ".join(filter(None, (f"{name} stopped in {seconds(duration_s)}", back)))]
    return [f"{name} stopped in {seconds(duration_s)}" for name, duration_s in took_s.items()] + (
        [back] if back else []
    )
