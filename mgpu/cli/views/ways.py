"""The tables of a plan's other ways and of the ways out, each row with its reason or its command."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mgpu.cli.views.words import fitting, hanging, plain_table
from mgpu.planning.candidates import Candidate
from mgpu.planning.choice import TITLES
from mgpu.planning.plan import Fix, Plan
from mgpu.planning.speed import interval
from mgpu.planning.wants import asked_ctx_tokens
from mgpu.units import gib

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_SHORT_VERDICTS = {
    "fits": "fits",
    "fits-with-offload": "offload",
    "unavailable": "not installed",
    "does-not-fit": "does not fit",
    "illegal": "illegal",
}


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


def tokens_words(plan: Plan, candidate: Candidate) -> str:
    """Return the context of each user: "8192 tokens", "3840 of 8192 tokens" where what was asked for does not fit."""
    asked = asked_ctx_tokens(plan.chosen.wants, plan.model)
    return f"{candidate.ctx_tokens} of {asked} tokens" if candidate.ctx_tokens < asked else f"{asked} tokens"


def waiting(candidate: Candidate) -> bool:
    """Return whether some of the users wait, because the contexts of all do not find room at once."""
    users = candidate.speed.aggregate_users
    return users is not None and users < candidate.parallel


def other_ways(plan: Plan, width: int) -> Iterator[RenderableType]:
    """Yield the candidates that were not chosen, and below them why some are illegal."""
    others = [candidate for candidate in plan.candidates if candidate is not plan.chosen]
    if others:
        yield fitting(
            width,
            lambda: _in_columns(plan, others, quantised=True),
            lambda: _in_columns(plan, others, quantised=False),
            lambda: _in_two_lines(plan, others, short=False),
            lambda: _in_two_lines(plan, others, short=True),
        )
    for candidate in others:
        if candidate.verdict == "illegal":
            first, *more = candidate.reasons
            sizes = [reason for reason in more if reason.startswith("tensor parallel sizes")]
            yield ""
            yield from hanging("illegal", f"{_name(candidate)}: {'; '.join((first, *sizes))}", width)


def ways_out(plan: Plan, width: int) -> Iterator[RenderableType]:
    """Yield what would make the model fit, and what the plan becomes with it."""
    rows = [(fix.change, ", ".join(_then(plan, fix))) for fix in plan.fixes]
    table = plain_table([("change", "left"), ("then", "left")])
    for row in rows:
        table.add_row(*row)
    longest = max(len(change) for change, _ in rows)
    if width - longest - 1 >= 36:
        yield table
        return
    stacked = plain_table([("change, and then", "left")])
    for change, then in rows:
        stacked.add_row(f"{change}\n  {then}")
    yield stacked


def _in_columns(plan: Plan, others: Sequence[Candidate], *, quantised: bool) -> Table:
    users = plan.chosen.parallel
    many = [(f"{users} users", "right")] if users > 1 else []
    table = plain_table([("other ways", "left"), ("", "left"), ("tokens/s", "right"), *many, ("", "left")])
    for candidate in others:
        name = _name(candidate) + (f", {candidate.quant or '?'}" if quantised else "")
        table.add_row(name, _SHORT_VERDICTS[candidate.verdict], *_rates(candidate, users), _how(plan, candidate))
    return table


def _in_two_lines(plan: Plan, others: Sequence[Candidate], *, short: bool) -> Table:
    """For a narrow terminal: the reason or the command under the name, and when short, the verdict there, too."""
    users = plan.chosen.parallel
    many = [(f"{users} users", "right")] if users > 1 else []
    verdicts = [] if short else [("", "left")]
    table = plain_table(
        [("other ways", "left"), *verdicts, ("tokens/s", "right"), *many], wrapping="other ways", last_wraps=False
    )
    for candidate in others:
        verdict, how = _SHORT_VERDICTS[candidate.verdict], _how(plan, candidate)
        below = ": ".join(filter(None, (verdict, how))) if short else how
        name = _name(candidate, short=short) + (f"\n  {below}" if below else "")
        table.add_row(name, *([] if short else [verdict]), *_rates(candidate, users))
    return table


def _name(candidate: Candidate, *, short: bool = False) -> str:
    how = shape_words(candidate) if short else ""
    return f"{TITLES[candidate.backend]}, {how or split_words(candidate)}"


def _rates(candidate: Candidate, users: int) -> list[str]:
    """One user's rate and, for several, all users'; "" for what is not known."""
    speed = candidate.speed
    cells = [interval(speed.decode_tok_s, speed.bound_tok_s) if speed.decode_tok_s else ""]
    if users > 1:
        served = f" ({speed.aggregate_users} of {users})" if waiting(candidate) else ""
        cells.append(f"{interval(speed.aggregate_tok_s)}{served}" if speed.aggregate_tok_s else "")
    return cells


def _how(plan: Plan, candidate: Candidate) -> str:
    """The options that would choose this way, or the command that makes it possible, or what keeps it from running."""
    if candidate.verdict == "does-not-fit":
        return f"{gib(candidate.short_bytes)} short"
    if candidate.verdict == "illegal":
        return "see below"
    words = [_options(plan, candidate)]
    if candidate.verdict == "unavailable":
        command = next(iter(candidate.reasons), "").removeprefix("not installed: ")
        words = [command.removeprefix("install it from ")]
    if candidate.ctx_tokens < asked_ctx_tokens(candidate.wants, plan.model):
        words.append(f"{candidate.ctx_tokens} tokens")
    words += ["thin evidence"] if candidate.speed.thin else []
    return ", ".join(filter(None, words))


def _options(plan: Plan, candidate: Candidate) -> str:
    """The options that choose this way and no other: its engine and its cards, where they are not those of the plan or
    where a plan of its own would be made for them, and how it lies on several."""
    chosen, used = plan.chosen, [device.gpu for device in candidate.devices]
    elsewhere = {*used} != {device.gpu for device in chosen.devices}
    several = len({each.backend for each in plan.candidates}) > 1
    fewer = len(used) < max(len(each.devices) for each in plan.candidates)
    words = []
    if candidate.backend != chosen.backend or (several and (elsewhere or fewer)):
        words.append(f"--backend {candidate.backend}")
    if elsewhere or fewer:
        words.append(f"--gpus {','.join(f'gpu{gpu}' for gpu in used) or 'none'}")
    if candidate.backend == "llama.cpp" and len(used) > 1:
        words.append(f"--split-mode {candidate.split_mode}")
    elif candidate.backend == "vllm" and len(used) > 1:
        if candidate.tensor_parallel > 1 or candidate.pipeline_parallel == 1:
            words.append(f"--tensor-parallel {candidate.tensor_parallel}")
        words += [f"--pipeline-parallel {candidate.pipeline_parallel}"] if candidate.pipeline_parallel > 1 else []
        words += [f"--replicas {candidate.replicas}"] if candidate.replicas > 1 else []
    return " ".join(words)


def _then(plan: Plan, fix: Fix) -> Iterator[str]:
    """What the plan becomes: whether it keeps the context and all users, what stays free, how fast it is."""
    candidate, host = fix.candidate, fix.candidate.host
    if candidate.verdict == "fits-with-offload":
        checked = "" if host.free_bytes is not None else " (not checked)"
        yield f"{host.words(len(plan.model.layers))} in {gib(host.total_bytes)} of RAM{checked}"
    else:
        lowered = candidate.ctx_tokens < asked_ctx_tokens(plan.chosen.wants, plan.model) and "--ctx" not in fix.change
        yield f"fits with {tokens_words(plan, candidate)}" if lowered else "fits"
        spare = min((device.spare_bytes for device in candidate.devices), default=host.spare_bytes)
        if spare is not None:
            yield f"{gib(spare)} spare"
    if waiting(candidate):
        yield f"room for {candidate.speed.aggregate_users} of {candidate.parallel} users at once"
    speed = candidate.speed
    if candidate.parallel > 1 and speed.aggregate_tok_s and speed.aggregate_users != 1:
        yield f"{interval(speed.aggregate_tok_s)} tokens/s together"
    elif speed.decode_tok_s:
        yield f"{interval(speed.decode_tok_s, speed.bound_tok_s)} tokens/s"
    if (shape := shape_words(candidate)) and shape != shape_words(plan.chosen):
        yield shape
    if speed.thin and candidate.verdict == "fits":
        yield "thin evidence"
