"""`mgpu logs`: what the engine of an instance has written, and writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from mgpu.cli.options import JsonOption
from mgpu.cli.output import Output
from mgpu.cli.result import Result, envelope
from mgpu.errors import Missing, NoAnswer, UsageError

# Set by the main program before the command is called: `logs` speaks while it works.
output = Output(as_json=False)

# A following reader wants to see where things are, not months of lines.
_LINES_BEFORE_FOLLOWING = 100


def logs(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An instance's name.", show_default=False)],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the instance is over or Ctrl-C.")] = False,
    lines: Annotated[
        int | None,
        typer.Option("--lines", "-n", help="Only the last so many lines (default: all; 100 with -f).", min=0),
    ] = None,
    supervisor: Annotated[bool, typer.Option("--supervisor", help="What mgpu itself said of a detached one.")] = False,
    first: Annotated[
        bool, typer.Option("--first", help="Of the engine that failed first, before any restart.")
    ] = False,
    previous: Annotated[bool, typer.Option("--previous", help="The log before this one.")] = False,
    json: JsonOption = False,
) -> Result | None:
    """Show what the engine of an instance wrote, the dead included."""
    from mgpu.cli.named import named
    from mgpu.running.identity import alive
    from mgpu.running.logs import FIRST
    from mgpu.running.logs import follow as lines_of
    from mgpu.running.registry import LOG, SUPERVISOR_LOG
    from mgpu.running.state import PREVIOUS

    if first and (supervisor or previous):
        other = "--supervisor" if supervisor else "--previous"
        raise UsageError(f"--first and {other} were both given", hint=f"mgpu logs {name} --first")
    (entry,) = named([name], "mgpu logs")
    # An orphan's engine writes although nobody looks after it.
    watched = ((entry.supervisor,) if entry.supervisor else entry.engine) if follow else ()
    path = entry.folder / (SUPERVISOR_LOG if supervisor else LOG)
    if first or previous:  # to which nobody writes any more
        watched, path = (), path.with_name(path.name + (FIRST if first else PREVIOUS))
    if not watched and not path.is_file():
        of_mgpu = supervisor if previous else not (supervisor or first)
        hint = f"mgpu logs {name}" + (" --supervisor" if of_mgpu else "")
        what = "has not failed yet" if first else "had no log before this one" if previous else f"has no {path.name}"
        raise NoAnswer(f"{name} {what}", code="no-log", hint=hint)
    if lines is None and follow:
        lines = _LINES_BEFORE_FOLLOWING
    found = _readable(lines_of(path, lambda: not any(map(alive, watched)), last_lines=lines), str(path))
    if output.as_json and not follow:
        data = {"name": name, "log_path": str(path), "lines": [line.rstrip("\r\n") for line in found]}
        return Result(command="logs", data=data)
    for line in found:
        if output.as_json:
            data = {"name": name, "line": line.rstrip("\r\n")}
            output.json_line(envelope(Result(command="logs", data=data)))
        else:
            output.write_text(line)
    return None


def _readable(lines: Iterator[str], path: str) -> Iterator[str]:
    try:
        yield from lines
    except OSError as error:
        raise Missing(f"{path} cannot be read: {error.strerror}", code="log-unreadable") from None
