"""Words and numbers as every screen writes them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from mgpu.units import GIB

if TYPE_CHECKING:
    from rich.table import Table

# Where facts begin, behind their labels.
_INDENT = 12
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


def closing_gib(parts_bytes: Sequence[int], free_bytes: int | None) -> tuple[str, str, str]:
    """Return total, free and spare as cells that close with the cells of the parts: each part is rounded, and the total
    is the sum of what is printed. It may differ from the rounded total by 0.01 for two parts."""
    total = sum(round(size / GIB * 100) for size in parts_bytes)
    if free_bytes is None:
        return _hundredths(total), "?", "?"
    free = round(free_bytes / GIB * 100)
    return _hundredths(total), _hundredths(free), _hundredths(free - total)


def sizes(*sizes_bytes: int) -> str:
    """Return sizes of files as they are sold and downloaded, the unit once: `98.4 MB`, `26.4/42.5 GB`."""
    unit, name = (1e9, "GB") if max(sizes_bytes) >= 1e9 else (1e6, "MB")
    return "/".join(f"{size / unit:.1f}" for size in sizes_bytes) + f" {name}"


def unknown(value: object, unit: str = "") -> str:
    """Return a value with its unit, or `?`."""
    return "?" if value is None else f"{value}{unit}"


def hanging(label: str, text: str, width: int) -> Iterator[str]:
    """Yield a fact with its label, on as many lines as it needs."""
    first, *more = textwrap.wrap(text, max(width - _INDENT, 20), break_on_hyphens=False, break_long_words=False) or [""]
    yield f"  {label:<9} {first}"
    yield from (f"{'':{_INDENT}}{line}" for line in more)


def plain_table(columns: Sequence[tuple[str, str]], *, wrapping: str | None = None, last_wraps: bool = True) -> Table:
    """Return a borderless table with (heading, justification) columns; where it is too wide, the one headed `wrapping`
    wraps, and the last one if it may."""
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
        wraps = heading == wrapping or (last_wraps and place == len(columns))
        overflow = "fold" if wraps else "ellipsis"
        # Rich wants its own literals, of which the words in `columns` are.
        table.add_column(heading, justify=justify, no_wrap=not wraps, overflow=overflow)  # type: ignore[arg-type]
    return table


def fitting(width: int, *tables: Callable[[], Table]) -> Table:
    """Return the first of the tables that is no wider than `width`, else the last."""
    for make in tables[:-1]:
        table = make()
        if width_of(table) <= width:
            return table
    return tables[-1]()


def width_of(table: Table) -> int:
    """Return how many columns of a terminal a table takes where nothing wraps."""
    from rich.console import Console

    return Console(width=1000, markup=False, emoji=False).measure(table).maximum


def _hundredths(count: int) -> str:
    return f"{count / 100:.2f}" if count else "-"
