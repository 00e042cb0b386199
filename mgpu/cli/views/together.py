"""The screen for several models on one machine: who is where, what stays free, and the commands."""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mgpu.cli.views.plan import VERDICT_WORDS, split_words
from mgpu.cli.views.words import card_name, cell_gib, fitting, plain_table
from mgpu.planning.choice import TITLES

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from mgpu.cli.together import Instance
    from mgpu.machine.snapshot import Machine
    from mgpu.planning.together import Together


def together_screen(
    together: Together, instances: Sequence[Instance], machine: Machine, width: int
) -> Iterator[RenderableType]:
    """Yield the whole screen: the verdict, the memory by model and card, what each model gets, who found no room, and
    the commands in the order in which to type them."""
    from rich.text import Text

    word, style = VERDICT_WORDS[together.verdict]
    simulated = "   SIMULATED" if machine.source == "simulated" else ""
    placed = [each for each in instances if each.placement.placed]
    missing = [each for each in instances if not each.placement.placed]
    found = f"{len(placed)} of {len(instances)} models" if missing else f"{len(instances)} models"
    cards = len(together.cards)
    where = f"{cards} {'card' if cards == 1 else 'cards'}" if cards else "the CPU"
    yield Text.assemble((word, style), f"   {found} on {where}", (simulated, "bold"))
    yield ""
    yield fitting(width, lambda: _by_model(together, placed, machine), lambda: _by_card(together, placed, machine))
    if placed:
        yield ""
    longest = max((len(each.name) for each in placed), default=0)
    for each in placed:
        yield from _hanging(f"{each.name:<{longest}}", _words(each), width)
    for each in missing:
        yield ""
        yield from _hanging("no room", f"{each.name}: {each.why}", width)
    if placed:
        yield ""
        yield "  start them in this order:" if len(placed) > 1 else "  start it:"
        yield from (f"  {shlex.join(each.command)}" for each in placed)


def _by_model(together: Together, placed: Sequence[Instance], machine: Machine) -> Table:
    """A row for each model and a column for each card."""
    names = [f"gpu{use.gpu.index} {card_name(use.gpu.name)}" for use in together.cards]
    table = plain_table([("GiB", "left"), *((name, "right") for name in names), ("host", "right")])
    for each in placed:
        candidate = each.placement.candidate
        assert candidate
        taken = {device.gpu: device.total_bytes for device in candidate.devices}
        cells = [cell_gib(taken.get(use.gpu.index, 0)) for use in together.cards]
        table.add_row(each.name, *cells, cell_gib(candidate.host.total_bytes))
    table.add_section()
    free, spare = _host(placed, machine)
    table.add_row("free before", *(cell_gib(use.free_bytes) for use in together.cards), cell_gib(free))
    table.add_row("stays free", *(cell_gib(use.spare_bytes) for use in together.cards), cell_gib(spare))
    return table


def _by_card(together: Together, placed: Sequence[Instance], machine: Machine) -> Table:
    """A row for each card, with the models on it."""
    table = plain_table([("GiB", "left"), ("free", "right"), ("spare", "right"), ("models", "left")])
    for use in together.cards:
        taken = [
            f"{each.name} {cell_gib(device.total_bytes)}"
            for each in placed
            for device in (each.placement.candidate.devices if each.placement.candidate else ())
            if device.gpu == use.gpu.index and device.total_bytes
        ]
        sums = (cell_gib(use.free_bytes), cell_gib(use.spare_bytes))
        table.add_row(f"gpu{use.gpu.index} {card_name(use.gpu.name)}", *sums, ", ".join(taken) or "-")
    free, spare = _host(placed, machine)
    table.add_row("host", cell_gib(free), cell_gib(spare), "-")
    return table


def _host(placed: Sequence[Instance], machine: Machine) -> tuple[int | None, int | None]:
    """What is free of the host's memory, and what stays so."""
    free = machine.host.ram_available_bytes
    taken = sum(each.placement.candidate.host.total_bytes for each in placed if each.placement.candidate)
    return free, None if free is None else free - taken


def _words(each: Instance) -> str:
    """What a model gets, in one line."""
    candidate = each.placement.candidate
    assert candidate
    users = "" if candidate.parallel == 1 else f" each of {candidate.parallel} users"
    parts = [candidate.quant or "?", f"{candidate.ctx_tokens} tokens{users}", TITLES[candidate.backend]]
    parts.append(split_words(candidate))
    predicted, bound = candidate.speed.decode_tok_s, candidate.speed.bound_tok_s
    if predicted:
        parts.append(f"{predicted.low:.0f} to {predicted.high:.0f} tokens/s")
    elif bound:
        parts.append(f"at most {math.floor(bound)} tokens/s")
    notes = [reason for reason in candidate.reasons if reason.startswith("context lowered") or "stay in host" in reason]
    return "; ".join([" · ".join(parts), *notes])


def _hanging(label: str, text: str, width: int) -> Iterator[str]:
    """A model's line, broken at its label's width where it is too long."""
    indent = " " * (len(label) + 5)
    wrapped = textwrap.wrap(text, max(width - len(indent), 30), break_on_hyphens=False, break_long_words=False)
    first, *more = wrapped or [""]
    yield f"  {label}   {first}"
    yield from (f"{indent}{line}" for line in more)
