"""`mgpu reap`: end engines that nobody looks after any more."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgpu.cli.options import JsonOption
from mgpu.cli.output import Output
from mgpu.cli.result import Result
from mgpu.errors import Interrupted, NoAnswer, UsageError

if TYPE_CHECKING:
    from mgpu.running.leftovers import Leftover, Remaining

# Set by the main program before the command is called: `reap` speaks while it works.
output = Output(as_json=False)


def reap(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    grace: Annotated[float, typer.Option("--grace", help="Seconds between SIGTERM and SIGKILL.", min=0)] = 10.0,
    json: JsonOption = False,
) -> Result:
    """End engines whose mgpu is gone, and remove what they left, after showing it. Nothing is known by its name."""
    from mgpu.running.census import census
    from mgpu.running.leftovers import end, leftovers

    found = leftovers(census())
    if not found:
        nothing = "nothing to reap: every engine of mgpu's has its mgpu"
        return Result(command="reap", data=_data((), {}), screen=lambda _: (nothing,))
    if not output.as_json:
        for line in _shown(found):
            output.lines(line)
    if not yes:
        _ask(found)
    remaining: dict[str, tuple[Remaining, ...]] = {}
    try:
        for left in found:
            name = left.entry.name
            remaining[name] = end(left, grace, lambda text, name=name: output.note(f"{'reap':<8} {name}: {text}"))  # type: ignore[misc]
    except KeyboardInterrupt:
        raise Interrupted("interrupted: mgpu reap does the rest") from None
    errors = tuple(
        NoAnswer(f"pid {each.pid} of {name} could not be ended: {each.why}", code="not-ended", hint="mgpu reap, later")
        for name, those in remaining.items()
        for each in those
    )
    return Result(
        command="reap",
        data=_data(found, remaining),
        screen=lambda _: tuple(_done(found, remaining)),
        exit_code=NoAnswer.exit_code if errors else 0,
        errors=errors,
    )


def _ask(found: Sequence[Leftover]) -> None:
    """Raise UsageError where nobody can be asked, Interrupted where the answer is no."""
    if output.as_json or not (sys.stdin and sys.stdin.isatty() and output.console(error=True).is_terminal):
        names = ", ".join(left.entry.name for left in found)
        raise UsageError(f"what is left of {names} is not ended unasked", hint="mgpu reap --yes")
    if not typer.confirm("end and remove this?", default=False, err=True):
        raise NoAnswer("nothing was ended", code="not-confirmed")


def _shown(found: Sequence[Leftover]) -> Iterator[str]:
    from mgpu.cli.views.instances import printable
    from mgpu.cli.views.status import home_path
    from mgpu.units import gib

    for left in found:
        yield f"{left.entry.name}: nobody looks after it   {home_path(left.entry.folder)}"
        for orphan in left.orphans:
            held = ", ".join(
                f"gpu{share.index} {gib(share.actual_bytes) if share.actual_bytes is not None else '? GiB'}"
                for share in orphan.gpus
            )
            yield f"  process  {printable(orphan.name)}, pid {orphan.process.pid}" + (f", holds {held}" if held else "")
        for folder in left.folders:
            yield f"  folder   {home_path(folder)}"
        for segment in left.segments:
            yield f"  memory   {segment.path}, {gib(segment.bytes)}"


def _done(found: Sequence[Leftover], remaining: dict[str, tuple[Remaining, ...]]) -> Iterator[str]:
    for left in found:
        if remaining.get(left.entry.name):
            continue
        count = len(left.orphans)
        ended = f"{count} process{'es' if count > 1 else ''} ended" if count else "no process was left"
        removed = [*(["its temporary folder"] if left.folders else []), *(["shared memory"] if left.segments else [])]
        yield f"{left.entry.name}: {ended}" + (f", {' and '.join(removed)} removed" if removed else "")


def _data(found: Sequence[Leftover], remaining: dict[str, tuple[Remaining, ...]]) -> dict[str, Any]:
    from mgpu.machine.snapshot import to_json

    return {
        "reaped": [
            {
                "name": left.entry.name,
                "processes": [
                    {"pid": each.process.pid, "name": each.name, "gpus": to_json(each.gpus)} for each in left.orphans
                ],
                "folders": [str(folder) for folder in left.folders],
                "segments": [{"path": each.path, "bytes": each.bytes} for each in left.segments],
                "remaining": [{"pid": each.pid, "why": each.why} for each in remaining.get(left.entry.name, ())],
            }
            for left in found
        ]
    }
