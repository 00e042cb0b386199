"""What a command returns: data for machines, a screen for people, and an exit code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mgpu.errors import MgpuError

if TYPE_CHECKING:
    from rich.console import RenderableType

Screen = Callable[[int], "Iterable[RenderableType]"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One command's outcome.

    `data` is what `--json` prints under that key; `screen`, given the terminal's width in columns, yields what a
    person sees. `errors` explain an exit code other than 0; `told` says that the screen does so by itself.
    """

    command: str
    data: Any = None
    screen: Screen = field(default=lambda _: ())
    exit_code: int = 0
    simulated: bool = False
    warnings: tuple[str, ...] = ()
    errors: tuple[MgpuError, ...] = ()
    told: bool = False


def envelope(result: Result) -> dict[str, Any]:
    """Return the JSON object every command prints; its keys are an interface."""
    return {
        "schema": f"mgpu.{result.command}/1",
        "command": result.command,
        "ok": result.exit_code == 0,
        "exit_code": result.exit_code,
        "simulated": result.simulated,
        "data": result.data,
        "warnings": list(result.warnings),
        "errors": [{"code": e.code, "message": e.message, "hint": e.hint} for e in result.errors],
    }


def failure(command: str, error: MgpuError, *, simulated: bool = False) -> Result:
    """Return the Result of a command that ended with `error`."""
    return Result(command=command, exit_code=error.exit_code, errors=(error,), simulated=simulated)
