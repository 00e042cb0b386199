"""The instances in rows, what is to be said of single ones, and both as JSON."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mgpu.cli.views.instances_table import ASTRAY, FOREIGN, OF_PLANNED, Row, fitting
from mgpu.cli.views.words import cell_gib
from mgpu.machine.snapshot import to_json
from mgpu.running.census import SUPERVISOR_DIED, Census, card_of
from mgpu.running.instance import Instance, State, instance_to_json
from mgpu.running.ports import shown_url
from mgpu.units import GIB, gib, seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mgpu.machine.snapshot import Gpu
    from mgpu.running.instance import GpuShare
    from mgpu.running.registry import Entry
    from mgpu.running.strangers import Stranger

# The record's keys that scripts may rely on; the others are mgpu's own.
_KEYS = (
    *("name", "state", "backend", "model", "url", "pid", "started_at", "ready_at", "gpus", "rate", "restarts"),
    *("exit", "first_exit", "log_path", "argv", "phase", "remaining_s", "changes"),
)
_NO_RECORD: dict[str, Any] = dict.fromkeys(_KEYS) | {"gpus": [], "restarts": 0, "argv": [], "changes": []}
_LONGEST_LINE = 200
_LONGEST_ADDRESS = 60
_LONGEST_WORD = 24
_MOST_LINES = 6
_MOST_NAMED = 3
# How far apart what is held and what was planned may be.
_TOLERANCE = 0.05


def instances_screen(
    census: Census, now: datetime, width: int, *, logs: Sequence[str] = (), forgotten: Sequence[str] | None = None
) -> Iterator[RenderableType]:
    """Yield the screen of `mgpu ps`; `logs` are the names of which only logs are left, `forgotten` those that were
    cleared just now, where that was asked for."""
    cards = census.cards
    rows = [_row(entry, cards, census, now) for entry in census.entries]
    rows += [_stranger_row(stranger, cards) for stranger in census.strangers]
    if problem := driver_problem(census):
        yield f"driver: {problem}"
    if forgotten is not None:
        yield f"forgot {', '.join(forgotten)}" if forgotten else "nothing was there to forget"
    if not rows and forgotten is None:
        yield _nothing(census)
    elif rows:
        yield fitting(rows, cards, width)
        yield from _notes(census)
    if logs:
        yield f"only logs are left of {', '.join(logs)}: mgpu logs NAME shows them"


def instances_data(census: Census, logs: Sequence[str] | None = None) -> dict[str, Any]:
    """Return what `mgpu ps --json` has under `data`."""
    data: dict[str, Any] = {
        "instances": [_instance_data(entry) for entry in census.entries],
        "orphaned": [{"name": entry.name, "pids": [each.pid for each in entry.engine]} for entry in census.orphaned],
        "foreign": [
            {"pid": each.pid, "name": each.name, "url": each.url, "gpus": to_json(each.gpus)}
            for each in census.strangers
        ],
        "cards": [
            {
                "index": card.index,
                "uuid": card.uuid,
                "name": None if card.name == "?" else card.name,
                "total_bytes": card.total_bytes,
                "free_bytes": card.free_bytes,
                "used_by": to_json(card.used_by),
            }
            for card in census.cards
        ],
    }
    return data if logs is None else data | {"logs": list(logs)}


def driver_problem(census: Census) -> str | None:
    """Return what is wrong with the cards' driver, if anything."""
    return census.machine.driver.problem if census.machine.driver else None


def running_words(entries: Sequence[Entry]) -> str:
    """Return what runs in a few words: `llama-70b ready, coder failed`."""
    more = f", {len(entries) - _MOST_NAMED} more" if len(entries) > _MOST_NAMED else ""
    return ", ".join(f"{entry.name} {_state(entry)}" for entry in entries[:_MOST_NAMED]) + more or "nothing running"


def _nothing(census: Census) -> str:
    free = [f"gpu{card.index} {gib(card.free_bytes)}" for card in census.cards if card.free_bytes is not None]
    return (
        "nothing is running" + (f", free are {', '.join(free)}" if free else "") + ": mgpu run MODEL starts an engine"
    )


def _instance_data(entry: Entry) -> dict[str, Any]:
    own = {
        "slots": entry.instance.setup.parallel if entry.instance and entry.instance.setup else None,
        "supervisor_pid": entry.supervisor.pid if entry.supervisor else None,
        "problem": entry.problem,
    }
    if entry.instance is None:
        pid = entry.engine[0].pid if entry.engine else None
        return {**_NO_RECORD, "name": entry.name, "pid": pid, **own}
    record = instance_to_json(entry.instance)
    return {key: record[key] for key in _KEYS} | own


def _row(entry: Entry, cards: Sequence[Gpu], census: Census, now: datetime) -> Row:
    instance = entry.instance
    if instance is None:
        held = ("?" if entry.engine else "-",) * len(cards)
        word = "its processes live" if not entry.is_over else "see below"
        return Row(
            name=entry.name,
            state=_state(entry),
            engine="-",
            endpoint="-",
            cards=held,
            rate="-",
            users="-",
            up=word,
        )
    between = instance.state is State.RESTARTING and instance.engine is None
    rate, slots = instance.rate, instance.setup.parallel if instance.setup else None
    return Row(
        name=entry.name,
        state=_state(entry),
        engine=printable(instance.backend or "-")[:_LONGEST_WORD],
        endpoint="-" if entry.is_over or between else _endpoint(shown_url(instance.url, instance.command)),
        cards=tuple("-" if entry.is_over else _held(instance, card, census) for card in cards),
        rate="-" if rate is None or rate.generation_tok_s is None else f"{rate.generation_tok_s:.1f}",
        users="-" if rate is None or rate.running is None else f"{rate.running}/{slots or '?'}",
        up=_up(entry, instance, now),
    )


def _stranger_row(stranger: Stranger, cards: Sequence[Gpu]) -> Row:
    held = {share.index: cell_gib(share.actual_bytes, 1) for share in stranger.gpus}
    return Row(
        name=FOREIGN,
        state="-",
        engine=printable(stranger.name)[:_LONGEST_WORD],
        endpoint=_endpoint(stranger.url),
        cards=tuple(held.get(card.index, "-") for card in cards),
        rate="-",
        users="-",
        up="not mgpu's" + (f", pid {stranger.pid}" if stranger.pid else ""),
    )


def _state(entry: Entry) -> str:
    if entry.is_orphaned:
        return "orphaned"
    if entry.instance is None:
        return "damaged"
    return str(entry.instance.state)


def _held(instance: Instance, card: Gpu, census: Census) -> str:
    """What an instance holds of a card, and what it was planned to hold; the plan alone stands in brackets."""
    share = next((share for share in instance.gpus if _is_of(share, card, census)), None)
    if share is None:
        return "-"
    actual, planned = share.actual_bytes, share.planned_bytes
    if actual is None:
        return "?" if planned is None else f"({planned / GIB:.1f})"
    if planned is None:
        return cell_gib(actual, 1)
    astray = ASTRAY if abs(actual - planned) > _TOLERANCE * planned else ""
    return f"{actual / GIB:.1f}{OF_PLANNED}{planned / GIB:.1f}{astray}"


def _is_of(share: GpuShare, card: Gpu, census: Census) -> bool:
    known = card_of(share, census.machine)
    return known.index == card.index if known else share.index == card.index


def _up(entry: Entry, instance: Instance, now: datetime) -> str:
    last = instance.exit
    if instance.state.is_over and last:
        lived = _seconds_between(instance.started_at, last.at)
        after = f" after {seconds(lived)}" if lived is not None else ""
        if instance.state is State.STOPPED:
            # However the engine answered to its signals: that it stopped is what was wanted.
            killed = "killed after the grace" if last.signal == signal.SIGKILL else ""
            note = printable(last.message or killed)[:_LONGEST_ADDRESS]
            return f"stopped{' by you' if last.cause == 'asked' else ''}{after}" + (f" ({note})" if note else "")
        return f"{_ending(instance)}{after}"
    since = instance.ready_at if str(instance.state) in ("ready", "degraded") else instance.started_at
    lived = _seconds_between(since, now.isoformat())
    words = [seconds(lived) if lived is not None else "?"]
    if instance.restarts:
        words.append(f"{instance.restarts} restart" + ("s" if instance.restarts > 1 else ""))
    if instance.phase:
        words.append(printable(instance.phase)[:_LONGEST_WORD])
    return ", ".join(words)


def _ending(instance: Instance) -> str:
    last = instance.exit
    assert last
    if last.signal is not None:
        try:
            return signal.Signals(last.signal).name
        except ValueError:
            return f"signal {last.signal}"
    if last.code is not None:
        return f"exit {last.code}"
    return "mgpu killed" if last.cause == SUPERVISOR_DIED else printable(last.cause)[:_LONGEST_WORD]


def _seconds_between(earlier: str | None, later: str) -> float | None:
    if earlier is None:
        return None
    passed = (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()
    return max(passed, 0.0)  # a clock was set


def _endpoint(url: str | None) -> str:
    try:
        return printable(urlsplit(url).netloc)[:_LONGEST_ADDRESS] if url else "-"
    except ValueError:
        return "?"


def _notes(census: Census) -> Iterator[str]:
    """What a row has no room for: why the dead are dead, what recovery changed, what is planned only."""
    for entry in census.entries:
        yield from _note(entry)
    cells = tuple(_all_cells(census))
    if any(OF_PLANNED in cell for cell in cells):
        yield "(GiB held/planned" + ("; ! is more than 5 % off)" if any(ASTRAY in cell for cell in cells) else ")")
    if any(cell.startswith("(") for cell in cells):
        yield "(GiB in brackets are planned: the driver does not tell what is held)"
    if dead := [entry.name for entry in census.entries if entry.is_over]:
        every = ", --clear-dead all the dead" if len(dead) > 1 else ""
        yield f"mgpu logs {dead[0]} shows what it wrote, mgpu ps --clear {dead[0]} forgets it{every}"


def _all_cells(census: Census) -> Iterator[str]:
    for entry in census.entries:
        if entry.instance and not entry.is_over:
            yield from (_held(entry.instance, card, census) for card in census.cards)


def _note(entry: Entry) -> Iterator[str]:
    lines: list[tuple[str, str]] = []
    instance = entry.instance
    if entry.problem:
        lines.append(("", entry.problem))
    for change in instance.changes if instance else ():
        tried = f", refused: {change.refused}" if change.refused else ""
        before = f" instead of {change.before}" if change.before is not None else ""
        lines.append(("changed", f"{change.words}{before}, because of {change.cause}{tried}"))
    if instance and instance.state is State.FAILED and instance.exit:
        last = instance.exit
        lines += [("", line) for line in (last.message or last.cause).splitlines()[:_MOST_LINES]]
        lines += [("last", line.strip()) for line in [line for line in last.last_lines if line.strip()][-1:]]
        lines += [("first", line) for line in _began_with(instance)]
        if last.hint and not entry.is_orphaned:
            lines.append(("next", last.hint))
    if entry.is_orphaned:
        pids = ", ".join(str(each.pid) for each in entry.engine[:4]) + (", …" if len(entry.engine) > 4 else "")
        lines.append(("next", f"mgpu reap ends what is left of it (pid {pids})"))
    for place, (label, text) in enumerate(lines):
        name = f"{entry.name}: " if place == 0 else "  "
        yield f"{name}{label:<8}{' ' if label else ''}{printable(text)[:_LONGEST_LINE]}".replace(f": {'':<8}", ": ")


def _began_with(instance: Instance) -> Iterator[str]:
    """What the failures began with, where the last one is another."""
    first, last = instance.first_exit, instance.exit
    if first and last and first.at != last.at and (first.cause, first.message) != (last.cause, last.message):
        yield f"{(first.message or first.cause).splitlines()[0]}; mgpu logs {instance.name} --first shows its log"


def printable(text: str) -> str:
    """Return text of a record or a process without what would command the terminal or cannot be written."""
    return "".join(character if character.isprintable() else " " for character in text)


def now() -> datetime:
    """Return the time now."""
    return datetime.now(UTC)
