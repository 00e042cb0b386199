"""The ways to run a model with vLLM on a set of cards, the one to prefer first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from mgpu.machine.snapshot import Gpu, Host, Link, Machine
from mgpu.models.facts import ModelFacts
from mgpu.planning.candidates import Candidate
from mgpu.planning.kinds import largest_kind
from mgpu.planning.links import is_slow
from mgpu.planning.more_cards import more_cards
from mgpu.planning.plan import Fix
from mgpu.planning.predicted import predicted
from mgpu.planning.ranking import Contestant, in_order
from mgpu.planning.tensor_parallel import best_shape, legal_sizes
from mgpu.planning.vllm_memory import BLOCK_TOKENS, VllmWants
from mgpu.planning.vllm_placement import vllm_candidate
from mgpu.planning.vllm_room import least_share, longest_ctx_tokens, users_at_once
from mgpu.planning.wants import DEFAULT_CTX_TOKENS

# A context this short serves one question and a short answer; below it a plan is no help.
_SMALLEST_USEFUL_CTX = 2048


def vllm_candidates(
    facts: ModelFacts, wants: VllmWants, gpus: Sequence[Gpu], host: Host, links: Sequence[Link] = ()
) -> tuple[Candidate, ...]:
    """Return the ways to run `facts` on `gpus` (none: the CPU) with vLLM, the one to prefer first.

    With a shape in `wants` that one alone, legal or not. Without one: tensor parallel over cards of one model (with
    a pipeline where the model cannot be cut that often, or where a link is slow), a pipeline over unlike cards, the
    largest group of like cards among unlike ones, for several users replicas of all sizes that divide the cards, and
    the best single card where the model fits on one. Where none of these fits, what does without the fullest cards, or
    over cards of one model that differ in memory.

    For one user, or for the latency of several, the fastest comes first; for the throughput of several what gives most
    of them their context at once, then what has most replicas; with `wants.all_cards` what uses all cards. What does
    not fit comes last.
    """
    cards = tuple(gpus)
    if wants.tensor_parallel or wants.pipeline_parallel or wants.replicas > 1 or not cards:
        asked = _with_context(facts, wants, cards, host, _asked_shape(wants, len(cards)))
        return (predicted(asked, facts, cards, host, links),)
    alike = largest_kind(cards)
    shapes = list(_shapes(facts, wants, cards, alike)) if len(cards) > 1 and wants.split_mode != "none" else []
    found = [_with_context(facts, wants, some, host, shape) for some, shape in shapes]
    if shapes and wants.parallel > 1 and wants.split_mode != "tensor" and not facts.experts:
        replicas = (
            _with_context(facts, replace(wants, replicas=count), some, host, (size, 1))
            for some, size, count in _replicas(facts, wants, alike)
        )
        found += [candidate for candidate in replicas if candidate.verdict == "fits"]
    kinds = {(gpu.name, gpu.total_bytes, gpu.free_bytes, gpu.bandwidth_gb_s, gpu.display): gpu for gpu in cards[::-1]}
    singles = [_with_context(facts, wants, (gpu,), host, (1, 1)) for gpu in cards if gpu in kinds.values()]
    best_single = max((predicted(single, facts, cards, host, links) for single in singles), key=_rank)
    if shapes and wants.split_mode != "tensor" and not any(each.verdict == "fits" for each in (*found, best_single)):
        found += _first_fitting(facts, wants, cards, host)
    found = [predicted(candidate, facts, cards, host, links) for candidate in found]
    if best_single.verdict == "fits" or not found:
        found.append(best_single)
    return _in_order(facts, found, wants, cards)


_Shape = tuple[tuple[Gpu, ...], tuple[int, int]]  # cards; tensor parallel and pipeline parallel


def _shapes(facts: ModelFacts, wants: VllmWants, cards: tuple[Gpu, ...], alike: tuple[Gpu, ...]) -> Iterator[_Shape]:
    """The shapes of one engine on several cards."""
    if wants.split_mode == "tensor":
        yield cards, (len(cards), 1)
    elif alike == cards:
        best = best_shape(facts, len(cards))
        yield cards, best
        if best != (len(cards), 1):
            yield from _fewer(facts, cards)
            yield cards, (len(cards), 1)  # shown with the reason why not
        if best[0] > 1 and best[1] == 1 and any(map(is_slow, cards)) and len(facts.layers) >= len(cards):
            yield cards, (1, len(cards))
    else:
        yield cards, (1, len(cards))
        if len(alike) > 1:
            yield alike, best_shape(facts, len(alike))


def _first_fitting(facts: ModelFacts, wants: VllmWants, cards: tuple[Gpu, ...], host: Host) -> list[Candidate]:
    """The first of the other shapes that fits, where no usual one does; empty where none does either."""
    ctx_tokens = wants.ctx_tokens or min(_SMALLEST_USEFUL_CTX, facts.context_length or _SMALLEST_USEFUL_CTX)
    for some, (size, stages) in dict.fromkeys(_last_resorts(facts, wants, cards)):
        tried = vllm_candidate(facts, wants, some, host, ctx_tokens, tensor_parallel=size, pipeline_parallel=stages)
        if tried.verdict == "fits":
            return [_with_context(facts, wants, some, host, (size, stages))]
    return []


def _last_resorts(facts: ModelFacts, wants: VllmWants, cards: tuple[Gpu, ...]) -> Iterator[_Shape]:
    """Cards of one model though they differ in memory, most of them first, and pipelines without the fullest cards.

    vLLM takes the same share of every card, so that a full one costs room on all others; which to leave out is told by
    what is free, in bytes or as a share of the card.
    """

    def free_share(gpu: Gpu) -> float:
        return ((gpu.free_bytes or 0) - wants.headroom_on(gpu)) / (gpu.total_bytes or 1)

    def leaving_out(some: tuple[Gpu, ...], count: int) -> Iterator[tuple[Gpu, ...]]:
        yield _freest(some, count)
        sharing = sorted(some, key=free_share, reverse=True)[:count]
        yield tuple(gpu for gpu in some if gpu in sharing)

    for name in dict.fromkeys(gpu.name for gpu in cards):
        same = tuple(gpu for gpu in cards if gpu.name == name)
        for count in range(len(same), 1, -1):
            for some in leaving_out(same, count):
                yield some, best_shape(facts, count)
    for count in range(len(cards) - 1, 1, -1):
        for some in leaving_out(cards, count):
            yield some, (1, count)


def _replicas(
    facts: ModelFacts, wants: VllmWants, cards: tuple[Gpu, ...]
) -> Iterator[tuple[tuple[Gpu, ...], int, int]]:
    """Cards of one model, tensor parallel size and number of replicas on them: where they do not divide evenly, those
    with most free memory.

    Dense models only: of others vLLM's replicas share the experts, and wait for one another at each layer.
    """
    for size in legal_sizes(facts, len(cards) // 2):
        count = len(cards) // size
        if count * size == len(cards) or not wants.all_cards:
            yield _freest(cards, count * size), size, count


def with_least_share(
    facts: ModelFacts, candidate: Candidate, gpus: Sequence[Gpu], host: Host, links: Sequence[Link] = ()
) -> Candidate:
    """Return `candidate`, which fits, with no more of each of its cards than its users need: what a vLLM gets that is
    not alone on them."""
    wants = candidate.wants
    assert isinstance(wants, VllmWants)
    shaped = replace(
        wants,
        tensor_parallel=candidate.tensor_parallel,
        pipeline_parallel=candidate.pipeline_parallel,
        replicas=candidate.replicas,
        ctx_tokens=candidate.ctx_tokens,
        gpu_memory_utilization=least_share(facts, candidate),
    )
    used = {device.gpu for device in candidate.devices}
    return vllm_candidates(facts, shaped, [gpu for gpu in gpus if gpu.index in used], host, links)[0]


def vllm_fixes(
    facts: ModelFacts, others: Sequence[ModelFacts], wants: VllmWants, gpus: Sequence[Gpu], machine: Machine
) -> tuple[Fix, ...]:
    """Return the cheapest changes that make the model fit, mildest first; `others` are the same model in other
    quantisations. Each was planned again."""
    cards = tuple(gpus)
    tries = [(change, facts, shaped, some) for change, shaped, some in _lawful_shapes(facts, wants, cards)]
    largest = max(each.max_ctx_tokens or 0 for each in vllm_candidates(facts, wants, cards, machine.host))
    if largest >= _SMALLEST_USEFUL_CTX:
        tries.append((f"--ctx {largest}", facts, replace(wants, ctx_tokens=largest), cards))
    if wants.kv_type_k == "f16" and cards:
        tries.append(("--kv-type fp8", facts, replace(wants, kv_type_k="fp8", kv_type_v="fp8"), cards))
    smaller = sorted((other for other in others if other.file_bytes < facts.file_bytes), key=lambda o: -o.file_bytes)
    tries += [(f"--quant {_method(other)}", other, wants, cards) for other in smaller]
    fixes = []
    for change, changed, other_wants, some in tries:
        best = vllm_candidates(changed, other_wants, some, machine.host, machine.links)[0]
        if best.verdict == "fits":
            fixes.append(Fix(change=change, candidate=best))
    if not (wants.tensor_parallel or wants.pipeline_parallel or wants.replicas > 1):
        fixes += _with_more_cards(facts, wants, cards, machine)
    return tuple(fixes)


def _with_more_cards(facts: ModelFacts, wants: VllmWants, cards: tuple[Gpu, ...], machine: Machine) -> Iterator[Fix]:
    """The fewest more cards of the same maker on which the model fits."""
    makers = {gpu.vendor for gpu in cards}
    for change, there, some in more_cards(
        machine, cards, lambda gpu: gpu.vendor in makers, least_bytes=sum(layer.weights_bytes for layer in facts.layers)
    ):
        best = vllm_candidates(facts, wants, some, there.host, there.links)[0]
        if best.verdict == "fits":
            yield Fix(change=change, candidate=best)
            return


def _lawful_shapes(
    facts: ModelFacts, wants: VllmWants, cards: tuple[Gpu, ...]
) -> Iterator[tuple[str, VllmWants, tuple[Gpu, ...]]]:
    """Instead of a shape that was asked for: the largest legal tensor-parallel size that uses all cards, and a larger
    one on fewer of them."""
    if wants.replicas > 1 and len(cards) % wants.replicas:
        yield from _lawful_replicas(facts, wants, cards)
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


def _lawful_replicas(
    facts: ModelFacts, wants: VllmWants, cards: tuple[Gpu, ...]
) -> Iterator[tuple[str, VllmWants, tuple[Gpu, ...]]]:
    """Fewer replicas than were asked for, to which the cards can be dealt evenly in a legal shape, the most first."""
    for count in range(min(wants.replicas, len(cards)), 0, -1):
        size = len(cards) // count
        free = count == 1 or wants.tensor_parallel  # then the size of one follows from something else
        if len(cards) % count == 0 and (free or size in legal_sizes(facts, size)):
            yield (f"--replicas {count}" if count > 1 else "without --replicas"), replace(wants, replicas=count), cards


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
    if candidate.devices and candidate.pipeline_parallel == 1:
        largest = longest_ctx_tokens(facts, candidate, longest)
    else:  # how the layers are dealt depends on the context
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
    return [(_freest(cards, size), (size, 1))]


def _freest(cards: tuple[Gpu, ...], count: int) -> tuple[Gpu, ...]:
    """Those with the most free memory, in their order."""
    chosen = sorted(cards, key=lambda gpu: -(gpu.free_bytes or 0))[:count]
    return tuple(gpu for gpu in cards if gpu in chosen)


def _in_order(
    facts: ModelFacts, found: Sequence[Candidate], wants: VllmWants, cards: tuple[Gpu, ...]
) -> tuple[Candidate, ...]:
    """What fits first, and of that the fastest for who is served, unless its context had to be lowered. As fast are,
    for many users, what holds most of them at once, does not wait for a slow link, and has most replicas."""
    fitting = [candidate for candidate in found if candidate.verdict == "fits"]
    slow = {gpu.index for gpu in cards if is_slow(gpu)}

    def waits(candidate: Candidate) -> bool:
        return candidate.tensor_parallel > 1 and any(device.gpu in slow for device in candidate.devices)

    def for_many(candidate: Candidate) -> tuple[float, ...]:
        return -users_at_once(candidate, facts), waits(candidate), -candidate.replicas

    def lowered(candidate: Candidate) -> int:
        return -candidate.ctx_tokens

    if wants.split_mode != "tensor":
        fitting.sort(key=for_many if wants.for_many else lambda candidate: -candidate.replicas)
        if wants.for_many or not (wants.parallel == 1 and wants.all_cards):
            fitting.sort(key=lowered)
            fitting = [
                way.candidate
                for _, alike in groupby(fitting, key=lowered)
                for way in in_order([Contestant(candidate=each) for each in alike], for_many=wants.for_many)
            ]
        if wants.all_cards:
            fitting.sort(key=lambda candidate: len(candidate.devices) < len(cards))
    return (*fitting, *(candidate for candidate in found if candidate.verdict != "fits"))


def _decode_tok_s(candidate: Candidate) -> float | None:
    return candidate.speed.decode_tok_s.likely if candidate.speed.decode_tok_s else None


def _rank(candidate: Candidate) -> tuple[bool, int, float]:
    return candidate.verdict == "fits", -candidate.short_bytes, _decode_tok_s(candidate) or 0
