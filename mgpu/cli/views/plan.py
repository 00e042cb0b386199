"""The plan's screen: the answer, the ledger card by card, the speed, the other ways."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mgpu.cli.views.sums import explanation
from mgpu.cli.views.words import card_name, cell_gib, fitting, plain_table
from mgpu.planning.candidates import Candidate, PlannedDevice
from mgpu.planning.choice import TITLES
from mgpu.planning.plan import Plan
from mgpu.planning.speed import interval
from mgpu.units import gib

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

# Where facts begin, behind their labels.
_INDENT = 12
VERDICT_WORDS = {
    "fits": ("FITS", "bold green"),
    "fits-with-offload": ("FITS WITH OFFLOAD", "bold yellow"),
    "does-not-fit": ("DOES NOT FIT", "bold red"),
    "illegal": ("ILLEGAL", "bold red"),
    "unavailable": ("UNAVAILABLE", "bold red"),
}
_SHORT_VERDICTS = {
    "fits": "fits",
    "fits-with-offload": "offload",
    "unavailable": "not installed",
    "does-not-fit": "does not fit",
    "illegal": "illegal",
}


def plan_screen(name: str, plan: Plan, width: int, *, explain: bool = False) -> Iterator[RenderableType]:
    """Yield the whole screen of `mgpu plan`."""
    from rich.text import Text

    chosen = plan.chosen
    word, style = VERDICT_WORDS[chosen.verdict]
    simulated = "   SIMULATED" if plan.machine.source == "simulated" else ""
    first, *more = _broken(headline(name, chosen), width - len(word) - 3, len(simulated))
    yield Text.assemble((word, style), f"   {first}", (simulated, "bold"))
    yield from (f"{'':{len(word) + 3}}{line}" for line in more)
    yield ""
    yield ledger(chosen, width)
    yield ""
    for label, text in _facts(plan, chosen):
        yield from _hanging(label, text, width)
    if explain:
        yield ""
        for label, text in explanation(plan, chosen):
            yield from _hanging(label, text, width)
    if len(plan.candidates) > 1:
        yield ""
        yield from _other_ways(plan, width)
    if plan.fixes:
        yield ""
        yield from _fixes(plan)


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


def _hanging(label: str, text: str, width: int) -> Iterator[str]:
    """A fact with its label, on as many lines as it needs."""
    first, *more = textwrap.wrap(text, max(width - _INDENT, 20), break_on_hyphens=False, break_long_words=False) or [""]
    yield f"  {label:<9} {first}"
    yield from (f"{'':{_INDENT}}{line}" for line in more)


def headline(name: str, candidate: Candidate) -> str:
    """Return the plan in one line: model, quantisation, context, users, engine and split."""
    users = "1 user" if candidate.parallel == 1 else f"{candidate.parallel} users"
    each = "" if candidate.parallel == 1 else " each"
    parts = (name, candidate.quant or "?", f"{candidate.ctx_tokens} tokens{each}", users, TITLES[candidate.backend])
    return " · ".join((*parts, split_words(candidate)))


def split_words(candidate: Candidate) -> str:
    """Return how the model lies on the cards: "layer split over 2 cards", "tensor parallel 2", "gpu0 alone", "CPU"."""
    shape, cards = shape_words(candidate), len([device for device in candidate.devices if not device.idle])
    if not candidate.devices or not (cards or candidate.verdict == "illegal"):
        return f"CPU, {shape}" if shape else "CPU"
    if not shape:
        used = [device for device in candidate.devices if not device.idle] or candidate.devices
        return ", ".join(f"gpu{device.gpu}" for device in used) + " alone"
    return f"{shape} over {cards} cards" if candidate.backend != "vllm" else shape


def shape_words(candidate: Candidate) -> str:
    """Return how the model is divided: "layer split", "tensor parallel 2 × pipeline of 2"; "" where it is not."""
    if candidate.backend != "vllm":
        used = [device for device in candidate.devices if not device.idle]
        return f"{candidate.split_mode} split" if len(used) > 1 else ""
    parts = [f"tensor parallel {candidate.tensor_parallel}"] if candidate.tensor_parallel > 1 else []
    parts += [f"pipeline of {candidate.pipeline_parallel}"] if candidate.pipeline_parallel > 1 else []
    parts += [f"{candidate.replicas} replicas"] if candidate.replicas > 1 else []
    return " × ".join(parts)


def ledger(candidate: Candidate, width: int) -> RenderableType:
    """Return the table of memory by card, in GiB; on a narrow terminal without the parts of each sum."""
    return fitting(width, lambda: _ledger(candidate, narrow=False), lambda: _ledger(candidate, narrow=True))


def _ledger(candidate: Candidate, *, narrow: bool) -> Table:
    headings = (
        ["total", "free", "spare"] if narrow else ["weights", "KV", "compute", "runtime", "total", "free", "spare"]
    )
    columns = [("GiB", "left"), *((heading, "right") for heading in headings), ("layers", "left")]
    table = plain_table(columns, wrapping="GiB")

    for device in candidate.devices:
        parts = (device.weights_bytes, device.kv_bytes, device.compute_bytes, device.runtime_bytes)
        sums = (device.total_bytes, device.free_bytes, device.spare_bytes)
        cells = [cell_gib(size) for size in (sums if narrow else (*parts, *sums))]
        table.add_row(f"gpu{device.gpu} {card_name(device.name)}", *cells, _layers(device, candidate))
    host = candidate.host
    parts = (host.weights_bytes, host.kv_bytes, host.compute_bytes, 0)
    cells = [] if narrow else [cell_gib(size) for size in parts]
    cells += [cell_gib(host.total_bytes), cell_gib(host.free_bytes), cell_gib(host.spare_bytes)]
    rest = "-" if candidate.backend == "vllm" else "embeddings"
    held = f"0-{host.layers - 1}" if host.layers else rest
    if host.expert_layers:
        held = f"{f'{held}, ' if host.layers else ''}experts 0-{host.expert_layers - 1}"
    table.add_row("host", *cells, held if candidate.devices else "all")
    return table


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
        where = "these cards" if len(candidate.devices) > 1 else "this card" if candidate.devices else "the CPU"
        trained = " (all the model was trained for)" if candidate.max_ctx_tokens == plan.model.context_length else ""
        yield "context", f"up to {candidate.max_ctx_tokens} tokens each on {where}{trained}"
    for reason in candidate.reasons:
        yield "note", reason


def speed_lines(candidate: Candidate) -> Iterator[str]:
    """Yield what is predicted of a candidate's speed, the rate that counts first, or why nothing is."""
    speed = candidate.speed
    if speed.decode_tok_s is None or speed.decode_start_tok_s is None:
        if speed.unknown:
            yield f"not predicted: {speed.unknown}"
        return
    decode = interval(speed.decode_tok_s, speed.bound_tok_s)
    start = interval(speed.decode_start_tok_s, speed.bound_tok_s)
    if speed.aggregate_tok_s:
        of = "" if speed.aggregate_users == candidate.parallel else f" of {candidate.parallel}"
        yield f"{interval(speed.aggregate_tok_s)} tokens/s, {speed.aggregate_users}{of} users together"
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
        yield f"thin evidence: {'; '.join(speed.thin)}"


def _other_ways(plan: Plan, width: int) -> Iterator[RenderableType]:
    others = [candidate for candidate in plan.candidates if candidate is not plan.chosen]
    yield fitting(
        width,
        lambda: _ways_table(plan, others, quantised=True, options=True),
        lambda: _ways_table(plan, others, quantised=False, options=True),
        lambda: _ways_table(plan, others, quantised=False, options=False),
        lambda: _ways_table(plan, others, quantised=False, options=False, short=True),
    )
    for candidate in others:
        if candidate.verdict == "illegal":
            first, *more = candidate.reasons
            sizes = [reason for reason in more if reason.startswith("tensor parallel sizes")]
            yield ""
            yield from _hanging("illegal", f"{_name(candidate)}: {'; '.join((first, *sizes))}", width)


def _ways_table(
    plan: Plan, others: Sequence[Candidate], *, quantised: bool, options: bool, short: bool = False
) -> Table:
    users = plan.chosen.parallel
    table = plain_table(
        [
            ("other ways", "left"),
            ("", "left"),
            ("tokens/s", "right"),
            *([(f"{users} users", "right")] if users > 1 else []),
            *([("", "left")] if options else []),
        ],
    )
    for candidate in others:
        speed = candidate.speed
        cells = [
            _name(candidate, short=short) + (f", {candidate.quant or '?'}" if quantised else ""),
            _SHORT_VERDICTS[candidate.verdict],
            interval(speed.decode_tok_s, speed.bound_tok_s) if speed.decode_tok_s else "",
        ]
        if users > 1:
            cells.append(interval(speed.aggregate_tok_s) if speed.aggregate_tok_s else "")
        table.add_row(*cells, *([_how(plan, candidate)] if options else []))
    return table


def _name(candidate: Candidate, *, short: bool = False) -> str:
    how = shape_words(candidate) if short else ""
    return f"{TITLES[candidate.backend]}, {how or split_words(candidate)}"


def _how(plan: Plan, candidate: Candidate) -> str:
    """The options that would choose this way, or the command that makes it possible."""
    if candidate.verdict == "unavailable":
        return next(iter(candidate.reasons), "").removeprefix("not installed: ").removeprefix("install it from ")
    if candidate.verdict == "does-not-fit":
        return f"{gib(candidate.short_bytes)} short"
    if candidate.verdict == "illegal":
        return "see below"
    chosen = plan.chosen
    words = [f"--backend {candidate.backend}"] if candidate.backend != chosen.backend else []
    used = ",".join(f"gpu{device.gpu}" for device in candidate.devices) or "none"
    if {d.gpu for d in candidate.devices} != {d.gpu for d in chosen.devices}:
        words.append(f"--gpus {used}")
    elif candidate.backend == "vllm":  # the same cards in another shape
        words.append(f"--tensor-parallel {candidate.tensor_parallel}")
        words += [f"--pipeline-parallel {candidate.pipeline_parallel}"] if candidate.pipeline_parallel > 1 else []
        words += [f"--replicas {candidate.replicas}"] if candidate.replicas > 1 else []
    elif candidate.backend == "llama.cpp" and len(candidate.devices) > 1:
        words.append(f"--split-mode {candidate.split_mode}")
    return " ".join(words) + (" (thin evidence)" if candidate.speed.thin and candidate.verdict == "fits" else "")


def _fixes(plan: Plan) -> Iterator[RenderableType]:
    table = plain_table([("change", "left"), ("then", "left")])
    for fix in plan.fixes:
        candidate = fix.candidate
        spare = min((device.spare_bytes for device in candidate.devices), default=candidate.host.spare_bytes or 0)
        words = f"{VERDICT_WORDS[candidate.verdict][0].lower()}, {gib(spare)} spare on the fullest card"
        if candidate.verdict == "fits-with-offload":
            words = f"{candidate.host.words(len(plan.model.layers))} in host memory"
        if candidate.speed.decode_tok_s:
            words += f", {interval(candidate.speed.decode_tok_s, candidate.speed.bound_tok_s)} tokens/s"
        table.add_row(fix.change, words)
    yield table
