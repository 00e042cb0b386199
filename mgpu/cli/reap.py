"""`mgpu reap`: end engines that nobody looks after any more."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgpu.cli.options import JsonOption
from mgpu.cli.output import Output
from mgpu.cli.result import Result
from mgpu.errors import Interrupted, NoAnswer, UsageError

if TYPE_CHECKING:
    from mgpu.running.leftovers import Leftover, Outcome
    from mgpu.running.registry import Entry

# Set by the main program before the command is called: `reap` speaks while it works.
output = Output(as_json=False)


def reap(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]…", help="These instances alone.", show_default=False)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    grace: Annotated[float, typer.Option("--grace", help="Seconds between SIGTERM and SIGKILL.", min=0)] = 10.0,
    json: JsonOption = False,
) -> Result:
    """End engines whose mgpu is gone, and remove what they left, after showing it. Nothing is known by its name."""
    from mgpu.cli.named import named
    from mgpu.running.census import census
    from mgpu.running.leftovers import end, leftovers

    meant = named(names or (), "mgpu reap", undone="nothing was ended")
    found = leftovers(census())
    if names:
        found = tuple(left for left in found if left.entry.name in names)
    if not output.as_json:
        for line in _shown(found):
            output.lines(line)
    ours = [left for left in found if left.is_ours]
    if not ours:
        return Result(command="reap", data=_data(found, {}), screen=lambda _: _nothing(meant))
    if not yes and output.as_json:
        refusal = _unasked(ours, names or ())
        return Result(command="reap", data=_data(found, {}), exit_code=refusal.exit_code, errors=(refusal,))
    if not yes:
        _ask(ours, names or ())
    outcomes: dict[str, Outcome] = {}
    try:
        for left in ours:
            outcomes[left.entry.name] = end(left, grace, partial(_note, left.entry.name))
    except KeyboardInterrupt:
        raise Interrupted("interrupted: mgpu reap does the rest") from None
    errors = tuple(_errors(outcomes))
    return Result(
        command="reap",
        data=_data(found, outcomes),
        screen=lambda _: tuple(_done(outcomes)),
        exit_code=NoAnswer.exit_code if errors else 0,
        errors=errors,
    )


def _nothing(meant: Sequence[Entry]) -> tuple[str, ...]:
    if not meant:
        return ("nothing to reap: every engine of mgpu's has its mgpu",)
    return tuple(
        f"nothing to reap of {entry.name}: " + ("its mgpu looks after it" if entry.supervisor else "nothing is left")
        for entry in meant
    )


def _errors(outcomes: Mapping[str, Outcome]) -> Iterator[NoAnswer]:
    for name, outcome in outcomes.items():
        for each in outcome.remaining:
            what = f"pid {each.pid} of {name} could not be ended: {each.why}"
            yield NoAnswer(what, code="not-ended", hint="mgpu reap, later")
        if outcome.kept_because:
            what = f"what is left of {name} was not removed: {outcome.kept_because}"
            yield NoAnswer(what, code="not-removed", hint="mgpu ps")


def _note(name: str, text: str) -> None:
    output.note(f"{'reap':<8} {name}: {text}")


def _unasked(found: Sequence[Leftover], named: Sequence[str]) -> UsageError:
    names = ", ".join(left.entry.name for left in found)
    return UsageError(f"what is left of {names} is not ended unasked", hint=" ".join(["mgpu reap", *named, "--yes"]))


def _ask(found: Sequence[Leftover], named: Sequence[str]) -> None:
    """Raise UsageError where nobody can be asked, NoAnswer where the answer is no."""
    if not (sys.stdin and sys.stdin.isatty() and output.console(error=True).is_terminal):
        raise _unasked(found, named)
    if not output.agrees("end and remove this?"):
        raise NoAnswer("nothing was ended", code="not-confirmed")


def _shown(found: Sequence[Leftover]) -> Iterator[str]:
    from mgpu.cli.views.instances import printable
    from mgpu.cli.views.status import home_path
    from mgpu.units import gib

    for left in found:
        title = "nobody looks after it" if left.is_ours else "nothing of it is known to live"
        yield f"{left.entry.name}: {title}   {home_path(left.entry.folder)}"
        for orphan in left.orphans:
            held = ", ".join(
                f"gpu{share.index} {gib(share.actual_bytes) if share.actual_bytes is not None else '? GiB'}"
                for share in orphan.gpus
            )
            yield f"  process  {printable(orphan.name)}, pid {orphan.process.pid}" + (f", holds {held}" if held else "")
        for other in left.unproven:
            who = f"{printable(other.name)}, pid {other.process.pid}"
            yield f"  (left)   {who}: it may be somebody else's, and is left alone"
        for folder in left.folders:
            yield f"  folder   {home_path(folder)}"
        for segment in left.segments:
            yield f"  memory   {segment.path}, {gib(segment.bytes)}"


def _done(outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    for name, outcome in outcomes.items():
        count = len(outcome.ended)
        if not count and (outcome.remaining or outcome.kept_because):
            continue
        ended = f"{count} process{'es' if count > 1 else ''} ended" if count else "no process was left"
        removed = ["its temporary folder"] if outcome.folders else []
        removed += ["shared memory"] if outcome.segments else []
        yield f"{name}: {ended}" + (f", {' and '.join(removed)} removed" if removed else "")


def _data(found: Sequence[Leftover], outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """What was ended and removed; of those without an outcome, what would be."""
    from mgpu.machine.snapshot import to_json

    reaped = []
    for left in found:
        outcome = outcomes.get(left.entry.name)
        ended, gone = (outcome.ended, outcome) if outcome else (left.orphans, left)
        reaped.append(
            {
                "name": left.entry.name,
                "processes": [
                    {"pid": each.process.pid, "name": each.name, "gpus": to_json(each.gpus)} for each in ended
                ],
                "folders": [str(folder) for folder in gone.folders],
                "segments": [{"path": each.path, "bytes": each.bytes} for each in gone.segments],
                "unproven": [{"pid": each.process.pid, "name": each.name} for each in left.unproven],
                "remaining": [{"pid": each.pid, "why": each.why} for each in (outcome.remaining if outcome else ())],
            }
        )
    return {"reaped": reaped}
