"""The screen for several models on one machine: who is where, what stays free, and the commands."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mgpu.cli.views.plan import VERDICT_WORDS
from mgpu.cli.views.ways import split_words
from mgpu.cli.views.words import card_name, cell_gib, fitting, plain_table
from mgpu.planning.choice import TITLES
from mgpu.planning.speed import Speed, floored, interval

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
        others = [other for other in placed if other is not each]
        yield from _hanging(f"{each.name:<{longest}}", _words(each, others), width)
    for each in missing:
        yield ""
        yield from _hanging("no room", f"{each.name}: {each.why}", width)
        quoted = shlex.quote(each.argument)
        options = f"{'beside the others' if placed else 'by itself'} with {', or '.join(each.ways_out)}"
        yield from _hanging("       ", options if each.ways_out else f"mgpu plan {quoted} shows ways out", width)
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


def _words(each: Instance, others: Sequence[Instance]) -> str:
    """What a model gets, in one line, beside the `others`."""
    candidate = each.placement.candidate
    assert candidate
    users = "" if candidate.parallel == 1 else f" each of {candidate.parallel} users"
    parts = [candidate.quant or "?", f"{candidate.ctx_tokens} tokens{users}", TITLES[candidate.backend]]
    parts.append(split_words(candidate))
    parts += _speed(candidate.speed, candidate.parallel)
    notes = [reason for reason in candidate.reasons if _is_told(reason)]
    if candidate.speed.decode_tok_s and (shared := _shared(each, others)):
        notes.append(f"that fast while it is alone at work: {shared}")
    return "; ".join([" · ".join(parts), *notes])


def _shared(each: Instance, others: Sequence[Instance]) -> str:
    """What it reads from in turns with others: cards, and the host's memory where layers of both are there; "" for
    nothing."""
    own = {*each.placement.gpus}
    cards = [f"gpu{gpu}" for gpu in sorted(own & {gpu for other in others for gpu in other.placement.gpus})]
    host = ["the host's memory"] if _reads_host(each) and any(map(_reads_host, others)) else []
    shared = [*([", ".join(cards)] if cards else []), *host]
    return f"{' and '.join(shared)} {'is' if len(cards) + len(host) == 1 else 'are'} shared" if shared else ""


def _reads_host(each: Instance) -> bool:
    """Whether layers of it lie in the host's memory."""
    candidate = each.placement.candidate
    return candidate is not None and (not each.placement.gpus or candidate.verdict == "fits-with-offload")


def _speed(speed: Speed, parallel: int) -> Iterator[str]:
    """The rate that counts: that of all users together, where there are several."""
    if together := speed.aggregate_tok_s:
        of = "" if speed.aggregate_users == parallel else f" of {parallel}"
        yield f"{interval(together)} tokens/s, {speed.aggregate_users}{of} users together"
    elif speed.decode_tok_s:
        alone = ", one user alone" if parallel > 1 else ""
        yield f"{interval(speed.decode_tok_s, speed.bound_tok_s)} tokens/s{alone}"
    elif speed.bound_tok_s:
        yield f"at most {floored(speed.bound_tok_s)} tokens/s"


def _is_told(reason: str) -> bool:
    return reason.startswith("context lowered") or "stay in host" in reason or reason.endswith("others wait")


def _hanging(label: str, text: str, width: int) -> Iterator[str]:
    """A model's line, broken at its label's width where it is too long."""
    indent = " " * (len(label) + 5)
    wrapped = textwrap.wrap(text, max(width - len(indent), 30), break_on_hyphens=False, break_long_words=False)
    first, *more = wrapped or [""]
    yield f"  {label}   {first}"
    yield from (f"{indent}{line}" for line in more)
