"""The plan's screen: the answer, the ledger card by card, the speed, the other ways."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mgpu.cli.views.words import card_name, cell_gib, fitting, plain_table
from mgpu.planning.candidates import Candidate, PlannedDevice
from mgpu.planning.choice import TITLES
from mgpu.planning.plan import Plan
from mgpu.planning.vllm_memory import DEFAULT_UTILISATION, VllmWants, model_bytes
from mgpu.planning.vllm_placement import planned_kv_tokens
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
        for line in explanation(plan, chosen):
            yield from _hanging(line[: _INDENT - 2].strip(), line[_INDENT - 2 :], width)
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
        table.add_row(f"gpu{device.gpu} {card_name(device.name)}", *cells, _layers(device))
    host = candidate.host
    parts = (host.weights_bytes, host.kv_bytes, host.compute_bytes, 0)
    cells = [] if narrow else [cell_gib(size) for size in parts]
    cells += [cell_gib(host.total_bytes), cell_gib(host.free_bytes), cell_gib(host.spare_bytes)]
    rest = "-" if candidate.backend == "vllm" else "embeddings"
    held = f"0-{host.layers - 1}" if host.layers else rest
    table.add_row("host", *cells, held if candidate.devices else "all")
    return table


def _layers(device: PlannedDevice) -> str:
    if not device.layers:
        return "head" if device.head else "nothing"
    last = device.first_layer + device.layers - 1
    span = f"{device.first_layer}-{last}" if device.layers > 1 else f"{last}"
    return f"{span} +head" if device.head else span


def _facts(plan: Plan, candidate: Candidate) -> Iterator[tuple[str, str]]:
    if plan.why:
        yield "engine", plan.why
    bound = candidate.speed.bound_tok_s
    if candidate.verdict in ("does-not-fit", "illegal"):
        pass  # the speed of what cannot run would only raise hopes
    elif bound is not None:
        # Rounded down: what is printed as a bound must not be above it.
        shown = math.floor(bound * 10) / 10 if bound < 100 else math.floor(bound)
        yield "speed", f"at most {shown:g} tokens/s for one user: {candidate.speed.basis}"
    elif candidate.devices and candidate.host.layers:
        yield "speed", "not predicted: it depends on the host's memory bandwidth, which is unknown"
    elif candidate.devices:
        yield "speed", "not predicted: a card's memory bandwidth is unknown"
    if candidate.max_ctx_tokens:
        where = "these cards" if len(candidate.devices) > 1 else "this card" if candidate.devices else "the CPU"
        trained = " (all the model was trained for)" if candidate.max_ctx_tokens == plan.model.context_length else ""
        yield "context", f"up to {candidate.max_ctx_tokens} tokens each on {where}{trained}"
    for reason in candidate.reasons:
        yield "note", reason


def explanation(plan: Plan, candidate: Candidate) -> Iterator[str]:
    """Yield the sums behind the ledger, to be checked by hand."""
    if candidate.backend == "vllm":
        yield from _vllm_sums(plan, candidate)
        return
    facts, wants = plan.model, candidate.wants
    total = sum(layer.weights_bytes for layer in facts.layers)
    yield f"weights   {len(facts.layers)} layers {gib(total)} + head {gib(facts.head_bytes)} on the cards;"
    yield f"          embeddings {gib(facts.embedding_bytes)} stay on the host (from {facts.source})"
    layer = facts.layers[0]
    yield (
        f"KV        per layer and token {_counted(layer.kv_heads, 'head')} × ({layer.key_length} K {wants.kv_type_k}"
        f" + {layer.value_length} V {wants.kv_type_v}) × {candidate.ctx_tokens} tokens"
        f" × {_counted(candidate.parallel, 'user')}"
    )
    windows = sum(layer.sliding_window is not None for layer in facts.layers)
    if windows:
        yield f"          {windows} of {len(facts.layers)} layers keep only a window of {facts.sliding_window} tokens"
    yield f"compute   activations of a micro-batch of {wants.ubatch} tokens in the widest stage of a layer"
    yield "runtime   the driver's context, from a table; spare is what is left of the free memory"
    yield f"headroom  {gib(wants.headroom_bytes)} of the spare memory is kept on each card"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _vllm_sums(plan: Plan, candidate: Candidate) -> Iterator[str]:
    facts, wants = plan.model, candidate.wants
    assert isinstance(wants, VllmWants)
    parts = candidate.tensor_parallel
    cut = f", each layer cut into {parts} parts" if parts > 1 else ""
    yield f"weights   {gib(model_bytes(facts))} in all{cut} (from {facts.source})"
    layer = facts.layers[0]
    yield (
        f"KV        per layer and token {_counted(max(1, layer.kv_heads // parts), 'head')} on each card ×"
        f" ({layer.key_length} K + {layer.value_length} V) {candidate.kv_type}"
    )
    held = f"{planned_kv_tokens(candidate, facts)} tokens in all"
    each = "the user" if candidate.parallel == 1 else f"each of {candidate.parallel} users"
    yield f"          {held}, {candidate.ctx_tokens} for {each} at most"
    if not candidate.devices:
        return
    share = wants.gpu_memory_utilization or DEFAULT_UTILISATION
    yield f"share     vLLM takes {share:g} of what CUDA sees of a card (98 % of the driver's figure);"
    yield "          what weights, compute and runtime leave of that is KV cache"
    yield "compute   activations of a batch and what CUDA and NCCL hold, measured: 0.3 to 0.7 GiB"
    yield "runtime   CUDA graphs, measured: 0.1 to 0.7 GiB; none with -- --enforce-eager"


def _other_ways(plan: Plan, width: int) -> Iterator[RenderableType]:
    others = [candidate for candidate in plan.candidates if candidate is not plan.chosen]
    yield fitting(
        width, lambda: _ways_table(plan, others, narrow=False), lambda: _ways_table(plan, others, narrow=True)
    )
    for candidate in others:
        if candidate.verdict == "illegal":
            first, *more = candidate.reasons
            sizes = [reason for reason in more if reason.startswith("tensor parallel sizes")]
            yield ""
            yield from _hanging("illegal", f"{_name(candidate)}: {'; '.join((first, *sizes))}", width)


def _ways_table(plan: Plan, others: Sequence[Candidate], *, narrow: bool) -> Table:
    table = plain_table(
        [("other ways", "left"), ("", "left"), ("at most", "right"), *([] if narrow else [("", "left")])],
    )
    for candidate in others:
        bound = candidate.speed.bound_tok_s
        cells = [
            _name(candidate) if narrow else f"{_name(candidate)}, {candidate.quant or '?'}",
            _SHORT_VERDICTS[candidate.verdict],
            f"{math.floor(bound)} tok/s" if bound and candidate.verdict not in ("does-not-fit", "illegal") else "",
        ]
        table.add_row(*cells, *([] if narrow else [_how(plan, candidate)]))
    return table


def _name(candidate: Candidate) -> str:
    return f"{TITLES[candidate.backend]}, {split_words(candidate)}"


def _how(plan: Plan, candidate: Candidate) -> str:
    """The options that would choose this way, or the command that makes it possible."""
    if candidate.verdict == "unavailable":
        return next(iter(candidate.reasons), "").removeprefix("not installed: ").removeprefix("install it from ")
    if candidate.verdict == "does-not-fit":
        return f"{gib(candidate.short_bytes)} short"
    if candidate.verdict == "illegal":
        return "see below"
    words = [f"--backend {candidate.backend}"] if candidate.backend != plan.chosen.backend else []
    used = ",".join(f"gpu{device.gpu}" for device in candidate.devices) or "none"
    if {d.gpu for d in candidate.devices} != {d.gpu for d in plan.chosen.devices}:
        words.append(f"--gpus {used}")
    return " ".join(words)


def _fixes(plan: Plan) -> Iterator[RenderableType]:
    table = plain_table([("change", "left"), ("then", "left")])
    for fix in plan.fixes:
        candidate = fix.candidate
        spare = min((device.spare_bytes for device in candidate.devices), default=candidate.host.spare_bytes or 0)
        words = f"{VERDICT_WORDS[candidate.verdict][0].lower()}, {gib(spare)} spare on the fullest card"
        if candidate.verdict == "fits-with-offload":
            words = f"{candidate.host.layers} of {len(plan.model.layers)} layers in host memory: slow"
        elif candidate.speed.bound_tok_s:
            words += f", at most {math.floor(candidate.speed.bound_tok_s)} tokens/s"
        table.add_row(fix.change, words)
    yield table
