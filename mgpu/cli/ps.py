"""`mgpu ps` and `mgpu top`: what runs, what it holds of the cards, and why the dead are dead."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from mgpu.cli.options import JsonOption
from mgpu.cli.output import Output
from mgpu.cli.result import Result, envelope
from mgpu.errors import Interrupted, NoAnswer

if TYPE_CHECKING:
    from mgpu.running.census import Census

# Set by the main program before the command is called: `top` speaks while it works.
output = Output(as_json=False)


def ps(
    everything: Annotated[bool, typer.Option("--all", help="Also those of which only logs are left.")] = False,
    clear: Annotated[
        list[str] | None, typer.Option("--clear", metavar="NAME", help="Forget a dead instance, its logs too.")
    ] = None,
    clear_dead: Annotated[
        bool, typer.Option("--clear-dead", help="Forget all dead instances, and logs that are left.")
    ] = False,
    json: JsonOption = False,
) -> Result:
    """Show the instances: state, address, memory of each card, rate; the dead with their reason."""
    from mgpu.cli.views.instances import driver_problem, instances_data, instances_screen, now
    from mgpu.running.census import census

    forgotten = _forget(clear or (), all_dead=clear_dead) if clear or clear_dead else None
    found = census()
    logs = _only_logs(found) if everything else None
    problem = driver_problem(found)
    return Result(
        command="ps",
        data=instances_data(found, logs) | ({} if forgotten is None else {"forgotten": list(forgotten)}),
        screen=lambda width: instances_screen(found, now(), width, logs=logs or (), forgotten=forgotten),
        warnings=(problem,) if problem and output.as_json else (),
    )


def top(
    interval: Annotated[float, typer.Option("--interval", help="Seconds between two looks.", min=0.1)] = 2.0,
    json: JsonOption = False,
) -> None:
    """Show the instances until Ctrl-C, looked at again and again."""
    from rich.console import Group

    from mgpu.cli.live import live
    from mgpu.cli.views.instances import instances_data, instances_screen, now
    from mgpu.running.census import census

    redraws = output.redraws()
    try:
        with live(output, error=False) as draw:
            while True:
                found, at = census(), now()
                if output.as_json:
                    output.json_line(envelope(Result(command="top", data=instances_data(found))))
                elif redraws:
                    draw(lambda width: Group(*instances_screen(found, at, width)))  # noqa: B023  drawn at once
                else:
                    for part in instances_screen(found, at, output.console().width):
                        output.lines(part)
                    output.write_text("\n")
                time.sleep(interval)
    except KeyboardInterrupt:
        raise Interrupted("stopped by request") from None


def _forget(names: Sequence[str], *, all_dead: bool) -> tuple[str, ...]:
    """Forget these, and the dead with what is left of those that have no record any more; returns who was forgotten."""
    from mgpu.cli.named import named, remains
    from mgpu.running.registry import clear, instances, read

    dead: list[str] = []
    if all_dead:
        known = {entry.name: entry for entry in instances()}
        entries = [*known.values(), *map(read, remains(known).values())]
        dead = sorted(entry.name for entry in entries if entry.is_over)
    typed = [entry.name for entry in named(names, "mgpu ps --clear", undone="nothing was forgotten")]
    forgotten = []
    for name in dict.fromkeys((*typed, *dead)):
        try:
            clear(name)
        except NoAnswer:
            if name in typed:
                raise
            continue  # somebody else does so just now, or has begun with it anew
        forgotten.append(name)
    return tuple(forgotten)


def _only_logs(found: Census) -> list[str]:
    from mgpu.cli.named import remains
    from mgpu.running.registry import LOG

    known = {entry.name for entry in found.entries}
    return [name for name, folder in remains(known).items() if (folder / LOG).is_file()]
