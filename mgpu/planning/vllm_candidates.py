"""The ways to run a model with vLLM on a set of cards, the one to prefer first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mgpu.machine.snapshot import Gpu, Host
from mgpu.models.facts import ModelFacts
from mgpu.planning.candidates import Candidate
from mgpu.planning.plan import Fix
from mgpu.planning.tensor_parallel import best_shape, legal_sizes
from mgpu.planning.vllm_memory import BLOCK_TOKENS, VllmWants
from mgpu.planning.vllm_placement import vllm_candidate
from mgpu.planning.wants import DEFAULT_CTX_TOKENS
from mgpu.units import GIB

# A context this short serves one question and a short answer; below it a plan is no help.
_SMALLEST_USEFUL_CTX = 2048


def vllm_candidates(facts: ModelFacts, wants: VllmWants, gpus: Sequence[Gpu], host: Host) -> tuple[Candidate, ...]:
    """Return the ways to run `facts` on `gpus` (none: the CPU) with vLLM, the one to prefer first.

    With a shape in `wants` that one alone, legal or not. Without one: tensor parallel over cards of one model (with
    a pipeline where the model cannot be cut that often), a pipeline over unlike cards, the largest group of like
    cards among unlike ones, and the best single card where the model fits on one. For one user the fastest comes
    first, for several or with `wants.all_cards` what uses all cards. What does not fit comes last.
    """
    cards = tuple(gpus)
    if wants.tensor_parallel or wants.pipeline_parallel or wants.replicas > 1 or not cards:
        return (_with_context(facts, wants, cards, host, _asked_shape(wants, len(cards))),)
    shapes: list[tuple[tuple[Gpu, ...], tuple[int, int]]] = []
    alike = _alike(cards)
    if len(cards) > 1 and wants.split_mode != "none":
        if wants.split_mode == "tensor":
            shapes.append((cards, (len(cards), 1)))
        elif alike == cards:
            shapes.append((cards, best_shape(facts, len(cards))))
            if shapes[0][1] != (len(cards), 1):
                shapes += _fewer(facts, cards)
                shapes.append((cards, (len(cards), 1)))  # shown with the reason why not
        else:
            shapes.append((cards, (1, len(cards))))
            if len(alike) > 1:
                shapes.append((alike, best_shape(facts, len(alike))))
    found = [_with_context(facts, wants, some, host, shape) for some, shape in shapes]
    singles = [_with_context(facts, wants, (gpu,), host, (1, 1)) for gpu in cards]
    best_single = max(singles, key=_rank)
    if best_single.verdict == "fits" or not found:
        found.append(best_single)
    return _in_order(found, wants)


def vllm_fixes(
    facts: ModelFacts, others: Sequence[ModelFacts], wants: VllmWants, gpus: Sequence[Gpu], host: Host
) -> tuple[Fix, ...]:
    """Return the cheapest changes that make the model fit, mildest first; `others` are the same model in other
    quantisations. Each was planned again."""
    cards = tuple(gpus)
    tries = [(change, facts, shaped, some) for change, shaped, some in _lawful_shapes(facts, wants, cards)]
    largest = max(each.max_ctx_tokens or 0 for each in vllm_candidates(facts, wants, cards, host))
    if largest >= _SMALLEST_USEFUL_CTX:
        tries.append((f"--ctx {largest}", facts, replace(wants, ctx_tokens=largest), cards))
    if wants.kv_type_k == "f16" and cards:
        tries.append(("--kv-type fp8", facts, replace(wants, kv_type_k="fp8", kv_type_v="fp8"), cards))
    smaller = sorted((other for other in others if other.file_bytes < facts.file_bytes), key=lambda o: -o.file_bytes)
    tries += [(f"--quant {_method(other)}", other, wants, cards) for other in smaller]
    fixes = []
    for change, changed, other_wants, some in tries:
        best = vllm_candidates(changed, other_wants, some, host)[0]
        if best.verdict == "fits":
            fixes.append(Fix(change=change, candidate=best))
    return tuple(fixes)


def _lawful_shapes(
    facts: ModelFacts, wants: VllmWants, cards: tuple[Gpu, ...]
) -> Iterator[tuple[str, VllmWants, tuple[Gpu, ...]]]:
    """Instead of a shape that was asked for: the largest legal tensor-parallel size that uses all cards, and a larger
    one on fewer of them."""
    if not (wants.tensor_parallel or wants.pipeline_parallel or wants.split_mode == "tensor"):
        return
    asked = _asked_shape(wants, len(cards))
    size, stages = max(legal_sizes(facts, asked[0])), asked[1]  # on the CPU any number of workers will do
    if cards:
        size, stages = best_shape(facts, max(1, len(cards) // wants.replicas))
    if (size, stages) != asked:
        again = wants.pipeline_parallel not in (None, stages)
        change = f"--tensor-parallel {size}" + (f" --pipeline-parallel {stages}" if again else "")
        pipeline = stages if again else wants.pipeline_parallel
        yield change, replace(wants, tensor_parallel=size, pipeline_parallel=pipeline), cards
    if cards and wants.replicas == 1 and wants.pipeline_parallel in (None, 1):
        for some, (most, _) in _fewer(facts, cards):
            if most > size:
                names = ",".join(f"gpu{gpu.index}" for gpu in some)
                yield f"--tensor-parallel {most} --gpus {names}", replace(wants, tensor_parallel=most), some


def _method(facts: ModelFacts) -> str:
    """The quantisation without its bits and groups: "awq" of "awq-int4-g128", which is as much as --quant needs."""
    return re.sub(r"(-int\d+)?(-[gb]\d+)?$", "", facts.quantisation or "")


def _with_context(
    facts: ModelFacts, wants: VllmWants, gpus: tuple[Gpu, ...], host: Host, shape: tuple[int, int]
) -> Candidate:
    """The candidate with the context asked for, or the default one, lowered where only that makes it fit."""

    def at(ctx_tokens: int) -> Candidate:
        return vllm_candidate(
            facts, wants, gpus, host, ctx_tokens, tensor_parallel=shape[0], pipeline_parallel=shape[1]
        )

    longest = facts.context_length or 1 << 20
    candidate = at(wants.ctx_tokens or min(DEFAULT_CTX_TOKENS, longest))
    if candidate.verdict == "illegal":
        return candidate
    low, high = 0, longest // BLOCK_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if at(middle * BLOCK_TOKENS).verdict == "fits" else (low, middle - 1)
    largest = low * BLOCK_TOKENS
    if candidate.verdict == "does-not-fit" and wants.ctx_tokens is None and largest >= _SMALLEST_USEFUL_CTX:
        note = f"context lowered from {candidate.ctx_tokens} to {largest} tokens, the most that fits"
        lowered = at(largest)
        candidate = replace(lowered, reasons=(note, *lowered.reasons))
    return replace(candidate, max_ctx_tokens=largest)


def _asked_shape(wants: VllmWants, cards: int) -> tuple[int, int]:
    """The shape asked for; what is left open follows from the number of cards."""
    per_replica = max(1, cards // max(1, wants.replicas))
    if wants.tensor_parallel:
        return wants.tensor_parallel, wants.pipeline_parallel or max(1, per_replica // wants.tensor_parallel)
    if wants.pipeline_parallel:
        return max(1, per_replica // wants.pipeline_parallel), wants.pipeline_parallel
    return (per_replica, 1) if cards else (1, 1)


def _fewer(facts: ModelFacts, cards: tuple[Gpu, ...]) -> list[tuple[tuple[Gpu, ...], tuple[int, int]]]:
    """The most of like cards over which each layer can be cut, those with the most free memory: fewer cards that are
    read at once may be faster than all of them in turn."""
    size = max(legal_sizes(facts, len(cards)))
    if size < 2:
        return []
    chosen = sorted(cards, key=lambda gpu: -(gpu.free_bytes or 0))[:size]
    return [(tuple(gpu for gpu in cards if gpu in chosen), (size, 1))]


def _alike(cards: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """The largest group of cards of one model and size."""
    groups: dict[tuple[str, int | None], list[Gpu]] = {}
    for gpu in cards:
        size = None if gpu.total_bytes is None else round(gpu.total_bytes / GIB)
        groups.setdefault((gpu.name, size), []).append(gpu)
    largest = max(len(group) for group in groups.values())
    return next(tuple(group) for group in groups.values() if len(group) == largest)


def _in_order(found: Sequence[Candidate], wants: VllmWants) -> tuple[Candidate, ...]:
    """What fits first, and of that the fastest for one user, unless its context had to be lowered."""
    fitting = [candidate for candidate in found if candidate.verdict == "fits"]
    known = all(candidate.speed.bound_tok_s for candidate in fitting)
    if known and wants.parallel == 1 and not wants.all_cards and wants.split_mode != "tensor":
        fitting.sort(key=lambda candidate: (-candidate.ctx_tokens, -round(candidate.speed.bound_tok_s or 0)))
    return (*fitting, *(candidate for candidate in found if candidate.verdict != "fits"))


def _rank(candidate: Candidate) -> tuple[bool, int, float]:
    return candidate.verdict == "fits", -candidate.short_bytes, candidate.speed.bound_tok_s or 0
