"""A plan beside the engine's own projection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from mgpu.cli.views.words import card_name, plain_table
from mgpu.units import MIB, seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mgpu.cli.exact import Compared, Exact

    Screen = Callable[[int], Iterable[RenderableType]]

# Below this only the sums have room.
_NARROW_COLUMNS = 84


def above_exact(screen: Screen, exact: Exact) -> Screen:
    """Return a plan's screen with the comparison below it."""

    def both(width: int) -> Iterator[RenderableType]:
        yield from screen(width)
        yield ""
        yield from exact_screen(exact, width)

    return both


def exact_screen(exact: Exact, width: int) -> Iterator[RenderableType]:
    """Yield planned and projected memory by card, in MiB: the engine prints no finer."""
    yield f"  {exact.program.name} was asked what it would hold; it answered in {seconds(exact.seconds)}:"
    yield ""
    headings = ["weights", "KV", "compute", "total"][3 if width < _NARROW_COLUMNS else 0 :]
    table = plain_table([("MiB planned/projected", "left"), *((heading, "right") for heading in [*headings, "off"])])
    for each in exact.compared:
        name = f"gpu{each.device.gpu} {card_name(each.device.name)}" if each.device else "host"
        off = each.difference_bytes
        table.add_row(name, *_cells(each)[-len(headings) :], "?" if off is None else f"{round(off / MIB):+d}")
    yield table


def _cells(each: Compared) -> list[str]:
    planned, projected = each.planned, each.projected
    if projected is None:
        return ["?"] * 4
    pairs = (
        (planned.weights_bytes, projected.weights_bytes),
        (planned.kv_bytes, projected.kv_bytes),
        (planned.compute_bytes, projected.compute_bytes),
        (planned.total_bytes, projected.total_bytes),
    )
    return [f"{one / MIB:.0f}/{other / MIB:.0f}" for one, other in pairs]
