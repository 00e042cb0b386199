"""The table of `mgpu ps`: as much of its columns as the terminal is wide."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mgpu.cli.views.words import plain_table
from mgpu.units import GIB

if TYPE_CHECKING:
    from rich.table import Table

    from mgpu.machine.snapshot import Gpu

FOREIGN = "(foreign)"
"""The name of a row that is no instance's."""

OF_PLANNED = "/"
"""What a cell has between what is held and what was planned."""

ASTRAY = "!"
"""What a cell has after both where they are further apart than a plan should be."""

# What is left out to fit, in this order.
_LEFT_OUT = ("details", "rates", "each card", "cards", "addresses")
_LEAST_NAME = len("free GiB")
# A column of words that wraps is readable from here on.
_LEAST_WORDS = 18
_LEAST_UP = len("2 restarts,")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An instance, or an engine of somebody else: what stands in each column, `cards` a cell for each of them."""

    name: str
    state: str
    engine: str
    endpoint: str
    cards: tuple[str, ...]
    rate: str
    users: str
    up: str


def fitting(rows: Sequence[Row], cards: Sequence[Gpu], width: int) -> Table:
    """Return the fullest table that fits `width` columns, states always whole: names are shortened before cards and
    addresses are left out."""
    from rich.console import Console

    def minimum() -> int:
        return console.measure(table).minimum

    console = Console(width=1000, markup=False, emoji=False)
    longest_name = max(len(row.name) for row in rows)
    for count in range(len(_LEFT_OUT) + 1):
        left_out = _LEFT_OUT[:count]
        table = _table(rows, cards, left_out)
        over = minimum() - width
        if over > 0 and "each card" in left_out:
            least = _LEAST_NAME if count < len(_LEFT_OUT) else 1
            table.columns[0].max_width = max(max(longest_name, _LEAST_NAME) - over, least)
            over = minimum() - width
        if over <= 0:
            break
    # Rich parts a number from its unit where it wraps a cell: what is wrapped before is left alone.
    others = console.measure(table).maximum - max(2, *(len(row.up) for row in rows))
    up_width = max(width - others, _LEAST_UP)
    wrapped = _table([replace(row, up=_wrapped(row.up, up_width)) for row in rows], cards, left_out)
    wrapped.columns[0].max_width = table.columns[0].max_width
    return wrapped


def _table(rows: Sequence[Row], cards: Sequence[Gpu], left_out: Sequence[str]) -> Table:
    """The table without what is `left_out`; the details are engines, users, plans where it is known what is held, and
    what is the same of all addresses."""
    short, each_card = "details" in left_out, "each card" not in left_out
    rates, endpoints = "rates" not in left_out, "addresses" not in left_out
    cards = () if "cards" in left_out else cards
    headings = [("NAME", "left"), ("STATE", "left"), *([] if short else [("ENGINE", "left")])]
    headings += [("ENDPOINT", "left")] if endpoints else []
    if cards:
        headings += [(f"GPU{card.index}", "right") for card in cards] if each_card else [("GPUS", "right")]
    headings += [("TOK/S", "right")] if rates else []
    headings += [] if short else [("USERS", "right")]
    table = plain_table([*headings, ("UP", "left")])
    table.columns[1].min_width = max((len(row.state) for row in rows), default=0)
    longest = max((len(row.up) for row in rows), default=0)
    table.columns[-1].min_width = min(longest, _LEAST_UP if short else _LEAST_WORDS)

    def add(row: Row, style: str | None = None) -> None:
        name, state, endpoint = row.name, row.state, row.endpoint
        if short:
            endpoint = f":{endpoint.rpartition(':')[2]}" if ":" in endpoint else endpoint
            name, state = (row.engine, "foreign") if name == FOREIGN else (name, state)
        held = tuple(map(_without_plan, row.cards)) if short else row.cards
        held = () if not cards else held if each_card else (_together(held),)
        engine, users = ((), ()) if short else ((row.engine,), (row.users,))
        address, rate = (endpoint,) if endpoints else (), (row.rate,) if rates else ()
        table.add_row(name, state, *engine, *address, *held, *rate, *users, row.up, style=style)

    for row in rows:
        add(row, "bold red" if row.state in ("failed", "orphaned", "damaged") else None)
    if any(card.free_bytes is not None for card in cards):
        totals = {f"{card.total_bytes / GIB:.1f}" for card in cards if card.total_bytes}
        free = tuple("?" if card.free_bytes is None else f"{card.free_bytes / GIB:.1f}" for card in cards)
        of = f"of {totals.pop()}" if len(totals) == 1 else ""
        add(Row(name="free GiB", state="", engine="", endpoint="", cards=free, rate="", users="", up=of), "dim")
    return table


def _wrapped(text: str, width: int) -> str:
    """The text on lines no longer than `width`, numbers never parted from what they count."""
    kept = re.sub(r"(?<=\d) (?=[a-z])", "\N{NO-BREAK SPACE}", text)
    return "\n".join(textwrap.wrap(kept, width)).replace("\N{NO-BREAK SPACE}", " ")


def _together(cells: Sequence[str]) -> str:
    held = [cell for cell in cells if cell != "-"]
    return "+".join(held) or "-"


def _without_plan(cell: str) -> str:
    """What of a cell is there, or else planned, with the mark of what is not as planned."""
    held, _, planned = cell.partition(OF_PLANNED)
    return held + (ASTRAY if planned.endswith(ASTRAY) else "")
