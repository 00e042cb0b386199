"""Tokens of many users at once: the weights are read once for all of them, the KV cache once for each.

    seconds = max(weights(N) ÷ rate, N × 2 × parameters ÷ compute) + N × KV ÷ rate + what one user costs beside
    together = N ÷ seconds

More users touch more experts: of E experts with k used, N users touch 1 − (1 − k/E)^N. Of a pipeline of S stages,
where S batches of N ÷ S users overlap, the sum is that of the slowest stage, S times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from mgpu.planning.decode import Term, digits, hops, kv_terms, launches, reductions, weight_terms
from mgpu.planning.prefill import compute_reached, prefill_tok_s
from mgpu.planning.speed_constants import VALUES, Values
from mgpu.planning.work import Share, Stage, Work

# Two reductions a layer, of two bytes per value.
_REDUCED_BYTES = 2 * 2
_HIDDEN = 4096  # where the model does not say


def step_terms(work: Work, constants: Values = VALUES) -> tuple[Term, ...]:
    """Return the summands of the time in which each user of one replica gets a token.

    Without the number of parameters or a card's compute rate, computing is taken not to be what limits.
    """
    users = work.users / _busy(work)
    if work.vllm and len(work.stages) > 1:
        return _overlapping(work, users, constants)
    return _step(work, users, constants)


def _step(work: Work, users: float, constants: Values) -> tuple[Term, ...]:
    """One batch with a token of each of `users`, through all stages in turn."""

    def read(share: Share) -> float:
        return touched_bytes(share, work, users)

    reading = weight_terms(work, constants, read=read)
    seconds = sum(term.seconds for term in reading)
    if not work.vllm and users > 1:
        slower = constants["llama.cpp weights quantised"] / constants["llama.cpp batch weights"]
        reading = [
            replace(term, how=f"{term.how} × {slower:.3g} for a batch", seconds=term.seconds * slower)
            for term in reading
        ]
        seconds *= slower
    computing = _computing(work, users, constants)
    terms = [computing] if computing and computing.seconds > seconds else reading
    terms.append(launches(work, constants))
    if work.width > 1:
        terms += [reductions(work, constants), _exchange(work, users, constants)]
    terms += kv_terms(work, constants, users=users)
    each = constants[("vLLM user, CDNA" if _cdna(work) else "vLLM user") if work.vllm else "llama.cpp user"]
    terms.append(Term(what="users", how=f"{users:.4g} × {each:.0f} µs", seconds=users * each * 1e-6))
    return tuple(terms)


def _overlapping(work: Work, users: float, constants: Values) -> tuple[Term, ...]:
    """vLLM's pipeline, which has as many batches under way as stages (`max_concurrent_batches`), the users dealt to
    them evenly: the slowest stage computes one after the other, or, with too few users to fill the pipeline, each
    batch goes its own way through all stages.

    What a stage reads once for each batch is read more often than for one batch of all; so it is the KV cache,
    computing and what each user costs that overlapping makes cheaper.
    """
    batches = min(len(work.stages), users)
    each = [_step(_alone(work, stage), users / batches, constants) for stage in work.stages]
    slowest = [
        replace(term, how=f"{batches:.4g} batches × {term.how}", seconds=batches * term.seconds)
        for term in max(each, key=_seconds)
    ]
    through = _through(work, users / batches, constants)
    return through if _seconds(through) > _seconds(slowest) else tuple(slowest)


def _through(work: Work, users: float, constants: Values) -> tuple[Term, ...]:
    """One batch of `users` through a pipeline."""
    return (*_step(work, users, constants), hops(work, constants))


def _alone(work: Work, stage: Stage) -> Work:
    """What one stage of `work` does."""
    part = stage.layers / max(1, work.layers)
    active = work.active_parameters and work.active_parameters * part
    return replace(work, stages=(stage,), active_parameters=active)


def _seconds(terms: Sequence[Term]) -> float:
    return sum(term.seconds for term in terms)


def aggregate_tok_s(
    work: Work, constants: Values = VALUES, *, prompt_tokens: float = 0, answer_tokens: float = 0
) -> float:
    """Return all users' tokens per second together; with `prompt_tokens` and `answer_tokens` each, the prompts are
    computed in between, as a server does, and take their time."""
    users = work.users / _busy(work)
    step = _seconds(step_terms(work, constants))
    prefill = prefill_tok_s(work, constants) if prompt_tokens else None
    if not prefill or not answer_tokens:
        return work.users / step
    seconds = answer_tokens * step + users * prompt_tokens / prefill
    return work.users * answer_tokens / seconds


def least_tok_s(work: Work, constants: Values = VALUES) -> float:
    """Return all users' tokens per second together where the stages of vLLM's pipeline do not overlap: users who asked
    at the same moment stay in one batch. Elsewhere the same as `aggregate_tok_s`."""
    if not (work.vllm and len(work.stages) > 1):
        return aggregate_tok_s(work, constants)
    return min(
        aggregate_tok_s(work, constants),
        work.users / _seconds(_through(work, work.users / _busy(work), constants)),
    )


def touched_bytes(share: Share, work: Work, users: float) -> float:
    """Return what of the weights is read in one step for `users`."""
    if not work.experts:
        return share.weights_bytes
    used = work.experts_used / work.experts
    dense = share.weights_bytes - share.expert_bytes * used
    return dense + share.expert_bytes * (1 - math.pow(1 - used, users))


def _busy(work: Work) -> float:
    """How many replicas have anything to do."""
    return min(work.replicas, work.users)


def _computing(work: Work, users: float, constants: Values) -> Term | None:
    """Two operations per active parameter and token, over what the cards that work at once can do."""
    rates = [chip.tensor_tflops for chip in work.chips]
    if not work.active_parameters or not all(rates):
        return None
    if work.vllm:
        reached = constants["vLLM compute, CDNA" if _cdna(work) else "vLLM compute"]
    else:  # nobody measured it for users: as much as for a prompt
        reached = min(compute_reached(work, chip, constants) for chip in work.chips)
    at_once = min(rate for rate in rates if rate) * work.width
    how = f"{users:.4g} users × 2 × {work.active_parameters / 1e9:.4g} G ÷ {at_once:.4g} TFLOPS ÷ {reached:.3g}"
    seconds = users * 2 * work.active_parameters / (reached * at_once * 1e12)
    return Term(what="computing", how=how, seconds=seconds)


def _exchange(work: Work, users: float, constants: Values) -> Term:
    """What the cards of a stage send each other: each value goes around all of them and back."""
    hidden = work.embedding_length or _HIDDEN
    around = 2 * (work.width - 1) / work.width
    rate = {"nvlink": "link NVLink", "peer": "link peer"}.get(work.link, "link host")
    sent = work.layers * _REDUCED_BYTES * users * hidden * around
    carried = constants[rate] if work.link_gb_s is None else min(constants[rate], work.link_gb_s)
    values = f"{users:.4g} users × {hidden} values × {_REDUCED_BYTES} B × {around:.3g} times around"
    how = f"{work.layers} layers × {values} = {digits(sent / 1e9)} GB, ÷ {carried:.3g} GB/s"
    return Term(what="sending between cards", how=how, seconds=sent / (carried * 1e9))


def _cdna(work: Work) -> bool:
    return any(chip.cdna for chip in work.chips)
