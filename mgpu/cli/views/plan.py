"""The plan's screen: the answer, the ledger card by card, the speed, the other ways."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mgpu.cli.views.sums import explanation
from mgpu.cli.views.ways import other_ways, shape_words, split_words, tokens_words, waiting, ways_out
from mgpu.cli.views.words import card_name, cell_gib, closing_gib, hanging, plain_table, width_of
from mgpu.planning.candidates import Candidate, PlannedDevice
from mgpu.planning.choice import TITLES
from mgpu.planning.plan import Plan
from mgpu.planning.speed import interval
from mgpu.units import gib

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

VERDICT_WORDS = {
    "fits": ("FITS", "bold green"),
    "fits-with-offload": ("FITS WITH OFFLOAD", "bold yellow"),
    "does-not-fit": ("DOES NOT FIT", "bold red"),
    "illegal": ("ILLEGAL", "bold red"),
    "unavailable": ("UNAVAILABLE", "bold red"),
}


def plan_screen(name: str, plan: Plan, width: int, *, explain: bool = False) -> Iterator[RenderableType]:
    """Yield the whole screen of `mgpu plan`."""
    chosen = plan.chosen
    yield from _heading(name, plan, width)
    yield ""
    yield from ledger(chosen, width)
    yield ""
    for label, text in _facts(plan, chosen):
        yield from hanging(label, text, width)
    if explain:
        yield ""
        for label, text in explanation(plan, chosen):
            yield from hanging(label, text, width)
    if len(plan.candidates) > 1:
        yield ""
        yield from other_ways(plan, width)
    if plan.left_out:
        yield ""
        for place, engine in enumerate(plan.left_out):
            yield from hanging("left out" if place == 0 else "", engine.reason, width)
    if plan.fixes:
        yield ""
        yield from ways_out(plan, width)


def _heading(name: str, plan: Plan, width: int) -> Iterator[RenderableType]:
    """The verdict and what it is of. A verdict with a condition has a line of its own."""
    from rich.text import Text

    word, style = VERDICT_WORDS[plan.chosen.verdict]
    simulated = "   SIMULATED" if plan.machine.source == "simulated" else ""
    indent = len(word) + 3
    if condition := _condition(plan.chosen):
        yield Text.assemble((word, style), condition, (simulated, "bold"))
        yield from (f"{'':{indent}}{line}" for line in _broken(headline(name, plan), width - indent, 0))
        return
    first, *more = _broken(headline(name, plan), width - indent, len(simulated))
    yield Text.assemble((word, style), f"   {first}", (simulated, "bold"))
    yield from (f"{'':{indent}}{line}" for line in more)


def _condition(candidate: Candidate) -> str:
    """What the verdict depends on, or whom it is not for; "" where it stands as it is."""
    if not candidate.runs:
        return ""
    if waiting(candidate):
        return f", {candidate.speed.aggregate_users} of {candidate.parallel} users at a time"
    host = candidate.host
    on_host = not candidate.devices or candidate.verdict == "fits-with-offload"
    return f" if the host has {gib(host.total_bytes)} of RAM" if on_host and host.free_bytes is None else ""


def _broken(text: str, width: int, less_in_first: int) -> list[str]:
    """A headline on as many lines as it needs, broken between its parts."""
    lines = [""]
    for part in text.split(" · "):
        longer = f"{lines[-1]} · {part}" if lines[-1] else part
        if lines[-1] and len(longer) > width - (less_in_first if len(lines) == 1 else 0):
            lines.append(part)
        else:
            lines[-1] = longer
    return lines


def headline(name: str, plan: Plan) -> str:
    """Return the chosen way in one line: model, quantisation, context, users, engine and split."""
    chosen = plan.chosen
    users = "1 user" if chosen.parallel == 1 else f"{chosen.parallel} users"
    each = "" if chosen.parallel == 1 else " each"
    parts = (name, chosen.quant or "?", f"{tokens_words(plan, chosen)}{each}", users, TITLES[chosen.backend])
    return " · ".join((*parts, split_words(chosen)))


# What the ledger has from left to right, and what it leaves out on a narrow terminal, in this order.
_FIGURES = ("weights", "KV", "compute", "runtime", "total", "free", "spare")
_LEFT_OUT: tuple[tuple[str, ...], ...] = ((), ("weights", "KV", "compute", "runtime"))
# The number of a card tells it from the others; of its name this many characters are left at least.
_SHORTEST_CARD = 16


def ledger(candidate: Candidate, width: int) -> Iterator[RenderableType]:
    """Yield the table of memory by card, in GiB; on a narrow terminal with shorter names of cards, or without the parts
    of each sum, which is said. Its cells add up as they are printed."""
    longest = max(len(_card(device)) for device in candidate.devices) if candidate.devices else 0
    for left_out in (*_LEFT_OUT, (*_LEFT_OUT[-1], "free")):
        figures = tuple(figure for figure in _FIGURES if figure not in left_out)
        table = _ledger(candidate, figures, longest)
        over = width_of(table) - width
        if over > 0 and longest - over >= _SHORTEST_CARD:
            table = _ledger(candidate, figures, longest - over)
        if width_of(table) <= width:
            break
    yield table
    if left_out:
        yield from hanging("narrow", f"{', '.join(left_out)}: in a wider terminal, or --json", width)


def _ledger(candidate: Candidate, figures: Sequence[str], longest: int) -> Table:
    columns = [("GiB", "left"), *((figure, "right") for figure in figures), ("layers", "left")]
    table = plain_table(columns, wrapping="GiB")

    def row(name: str, parts: Sequence[int], free_bytes: int | None, layers: str) -> None:
        cells = dict(zip(_FIGURES, (*map(cell_gib, parts), *closing_gib(parts, free_bytes)), strict=True))
        table.add_row(name, *(cells[figure] for figure in figures), layers)

    for device in candidate.devices:
        parts = (device.weights_bytes, device.kv_bytes, device.compute_bytes, device.runtime_bytes)
        name = _card(device)
        short = name if len(name) <= longest else f"{name[: longest - 1]}…"
        row(short, parts, device.free_bytes, _layers(device, candidate))
    host = candidate.host
    rest = "-" if candidate.backend == "vllm" else "embeddings"
    held = f"0-{host.layers - 1}" if host.layers else rest
    if host.expert_layers:
        held = f"{f'{held}, ' if host.layers else ''}experts 0-{host.expert_layers - 1}"
    parts = (host.weights_bytes, host.kv_bytes, host.compute_bytes, 0)
    row("host", parts, host.free_bytes, held if candidate.devices else "all")
    return table


def _card(device: PlannedDevice) -> str:
    return f"gpu{device.gpu} {card_name(device.name)}"


def _layers(device: PlannedDevice, candidate: Candidate) -> str:
    if candidate.split_mode == "tensor" and candidate.backend != "vllm":
        return "a part of all"
    if not device.layers:
        return "head" if device.head else "nothing"
    last = device.first_layer + device.layers - 1
    span = f"{device.first_layer}-{last}" if device.layers > 1 else f"{last}"
    return f"{span} +head" if device.head else span


def _facts(plan: Plan, candidate: Candidate) -> Iterator[tuple[str, str]]:
    if plan.why:
        yield "engine", plan.why
    yield from (("speed" if place == 0 else "", line) for place, line in enumerate(speed_lines(candidate)))
    if candidate.max_ctx_tokens:
        yield "context", _context(plan, candidate, candidate.max_ctx_tokens)
    for reason in candidate.reasons:
        yield "note", reason


def _context(plan: Plan, candidate: Candidate, most_tokens: int) -> str:
    """The largest context on these cards, with this split and with the one that has most room."""
    where = "these cards" if len(candidate.devices) > 1 else "this card" if candidate.devices else "the CPU"
    each = " each" if candidate.parallel > 1 else ""
    trained = " (all the model was trained for)" if most_tokens == plan.model.context_length else ""
    if candidate.backend == "vllm" and candidate.parallel > 1:
        return f"up to {most_tokens} tokens on {where}{trained}, shared by those who run at once"
    others = [
        each
        for each in plan.candidates
        if each.backend == candidate.backend
        and len(each.devices) == len(candidate.devices)
        and each.verdict != "illegal"
        and (each.max_ctx_tokens or 0) > most_tokens
    ]
    if not others:
        return f"up to {most_tokens} tokens{each} on {where}{trained}"
    best = max(others, key=lambda other: other.max_ctx_tokens or 0)
    own, other = shape_words(candidate), shape_words(best)
    return f"up to {most_tokens} tokens{each} with this {own}, {best.max_ctx_tokens} with a {other}"


def speed_lines(candidate: Candidate) -> Iterator[str]:
    """Yield what is predicted of a candidate's speed, or was measured here, the rate that counts first; or why nothing
    is."""
    speed = candidate.speed
    if speed.decode_tok_s is None or speed.decode_start_tok_s is None:
        yield from _lines_of_one_end(candidate)
        return
    decode = interval(speed.decode_tok_s, speed.bound_tok_s)
    start = interval(speed.decode_start_tok_s, speed.bound_tok_s)
    if speed.aggregate_tok_s:
        who = f"{candidate.parallel} users together"
        if waiting(candidate):
            who = f"{speed.aggregate_users} of {candidate.parallel} users at a time"
        yield f"{interval(speed.aggregate_tok_s)} tokens/s, {who}"
    who = "one user alone" if candidate.parallel > 1 else "one user"
    parts = [f"{decode} tokens/s, {who}"]
    if start != decode:
        parts = [f"{parts[0]} at {candidate.ctx_tokens} tokens", f"{start} at the start"]
    if speed.prefill_tok_s:
        parts.append(f"{interval(speed.prefill_tok_s)} prompt tokens/s")
    yield "; ".join(parts)
    if speed.basis:
        yield speed.basis
    if speed.thin:
        yield f"thin evidence: {'; '.join(speed.thin)}; mgpu run --ask measures it for the next plan"
    if speed.unknown and candidate.parallel > 1:
        yield f"all users together: not predicted: {speed.unknown}"


def _lines_of_one_end(candidate: Candidate) -> Iterator[str]:
    """Where nothing is predicted: what was measured, with the context full or empty, or neither."""
    speed = candidate.speed
    who = "one user alone" if candidate.parallel > 1 else "one user"
    if known := speed.decode_tok_s or speed.decode_start_tok_s:
        where = f"at {candidate.ctx_tokens} tokens" if speed.decode_tok_s else "at the start"
        yield f"{interval(known, speed.bound_tok_s)} tokens/s, {who} {where}"
    if speed.basis:
        yield speed.basis
    if speed.unknown:
        yield f"not predicted{f' at {candidate.ctx_tokens} tokens' if known else ''}: {speed.unknown}"
