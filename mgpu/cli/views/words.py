"""Words and numbers as every screen writes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mgpu.units import GIB

if TYPE_CHECKING:
    from rich.table import Table

_MAKERS = re.compile(r"^(NVIDIA|AMD|Intel\(R\)|GeForce|Radeon|Graphics)\s+")


def card_name(name: str) -> str:
    """Return a card's name without its maker: `RTX 4090`, `RX 7900 XTX`; software devices lose their versions."""
    while (shorter := _MAKERS.sub("", name)) != name:
        name = shorter
    return name.split(" (")[0]


def cell_gib(size_bytes: int | None, digits: int = 2) -> str:
    """Return bytes as a bare number of GiB for a table: `19.57`, `-` for nothing, `?` for unknown."""
    if size_bytes is None:
        return "?"
    return f"{size_bytes / GIB:.{digits}f}" if abs(size_bytes) >= GIB / 200 else "-"


def sizes(*sizes_bytes: int) -> str:
    """Return sizes of files as they are sold and downloaded, the unit once: `98.4 MB`, `26.4/42.5 GB`."""
    unit, name = (1e9, "GB") if max(sizes_bytes) >= 1e9 else (1e6, "MB")
    return "/".join(f"{size / unit:.1f}" for size in sizes_bytes) + f" {name}"


def unknown(value: object, unit: str = "") -> str:
    """Return a value with its unit, or `?`."""
    return "?" if value is None else f"{value}{unit}"


def plain_table(columns: Sequence[tuple[str, str]], *, wrapping: str | None = None) -> Table:
    """Return a borderless table with (heading, justification) columns; where it is too wide, the last one wraps, and
    the one headed `wrapping`."""
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="dim",
        collapse_padding=True,
    )
    for place, (heading, justify) in enumerate(columns, start=1):
        wraps = heading == wrapping or place == len(columns)
        overflow = "fold" if wraps else "ellipsis"
        # Rich wants its own literals, of which the words in `columns` are.
        table.add_column(heading, justify=justify, no_wrap=not wraps, overflow=overflow)  # type: ignore[arg-type]
    return table


def fitting(width: int, *tables: Callable[[], Table]) -> Table:
    """Return the first of the tables that is no wider than `width`, else the last."""
    from rich.console import Console

    console = Console(width=1000, markup=False, emoji=False)
    for make in tables[:-1]:
        table = make()
        if console.measure(table).maximum <= width:
            return table
    return tables[-1]()
