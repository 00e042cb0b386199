"""A part of the terminal that is redrawn while work goes on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mgpu.cli.output import Output

Draw = Callable[[Callable[[int], "RenderableType"]], None]

# Often enough for a terminal to look alive, seldom enough to cost nothing.
_REDRAW_EVERY_S = 0.1


@contextlib.contextmanager
def live(out: Output, *, error: bool) -> Iterator[Draw]:
    """Redraw a part of stdout, or of stderr; yields what to call with a function from width to lines.

    Where there is no terminal nothing is drawn. What was drawn is cleared at the end. Drawing on a terminal that has
    been closed raises OSError, as all writing does: one that is not mgpu's own sends no SIGHUP.
    """
    if not out.redraws(error=error):
        yield lambda _: None
        return
    from rich.live import Live

    console = out.console(error=error)
    drawn_at = 0.0
    with Live(
        console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
    ) as drawing:

        def draw(lines: Callable[[int], RenderableType]) -> None:
            nonlocal drawn_at
            if time.monotonic() - drawn_at >= _REDRAW_EVERY_S:
                drawing.update(lines(console.width), refresh=True)
                drawn_at = time.monotonic()

        yield draw
