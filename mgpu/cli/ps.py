"""`mgpu ps` and `mgpu top`: what runs, what it holds of the cards, and why the dead are dead."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from mgpu.cli.options import JsonOption
from mgpu.cli.output import Output
from mgpu.cli.result import Result, envelope
from mgpu.errors import Interrupted

if TYPE_CHECKING:
    from mgpu.running.census import Census

# Set by the main program before the command is called: `top` speaks while it works.
output = Output(as_json=False)


def ps(
    everything: Annotated[bool, typer.Option("--all", help="Also those of which only logs are left.")] = False,
    clear: Annotated[
        list[str] | None, typer.Option("--clear", metavar="NAME", help="Forget a dead instance, its logs too.")
    ] = None,
    clear_dead: Annotated[bool, typer.Option("--clear-dead", help="Forget all dead instances.")] = False,
    json: JsonOption = False,
) -> Result:
    """Show the instances: state, address, memory of each card, rate; the dead with their reason."""
    from mgpu.cli.named import named
    from mgpu.cli.views.instances import driver_problem, instances_data, instances_screen, now
    from mgpu.running.census import census
    from mgpu.running.registry import clear as forget
    from mgpu.running.registry import instances

    dead = [entry.name for entry in instances() if entry.is_over] if clear_dead else []
    for entry in named([*(clear or ()), *dead], "mgpu ps --clear"):
        forget(entry.name)
    found = census()
    logs = _only_logs(found) if everything else None
    problem = driver_problem(found)
    return Result(
        command="ps",
        data=instances_data(found, logs),
        screen=lambda width: instances_screen(found, now(), width, logs=logs or ()),
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


def _only_logs(found: Census) -> list[str]:
    from mgpu.running.registry import LOG, folders

    known = {entry.name for entry in found.entries}
    return [folder.name for folder in folders() if folder.name not in known and (folder / LOG).is_file()]
