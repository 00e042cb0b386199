"""Tokens of many users at once: the weights are read once for all of them, the KV cache once for each.

    seconds = max(weights(N) ÷ rate, N × 2 × parameters ÷ compute) + N × KV ÷ rate + what one user costs beside
    together = N ÷ seconds

More users touch more experts: of E experts with k used, N users touch 1 − (1 − k/E)^N.
"""

from __future__ import annotations

import math
from dataclasses import replace

from mgpu.planning.decode import Term, kv_terms, launches, reductions, weight_terms
from mgpu.planning.prefill import prefill_tok_s
from mgpu.planning.speed_constants import VALUES, Values
from mgpu.planning.work import Share, Work

# Two reductions a layer, of two bytes per value.
_REDUCED_BYTES = 2 * 2
_HIDDEN = 4096  # where the model does not say


def step_terms(work: Work, constants: Values = VALUES) -> tuple[Term, ...]:
    """Return the summands of one step, in which each user of one replica gets a token.

    Without the number of parameters or a card's compute rate, computing is taken not to be what limits.
    """
    users = work.users / _busy(work)

    def read(share: Share) -> float:
        return touched_bytes(share, work, users)

    reading = weight_terms(work, constants, read=read)
    seconds = sum(term.seconds for term in reading)
    if not work.vllm and users > 1:
        slower = constants["llama.cpp weights quantised"] / constants["llama.cpp batch weights"]
        reading = [
            replace(term, how=f"{term.how} × {slower:.2f} for a batch", seconds=term.seconds * slower)
            for term in reading
        ]
        seconds *= slower
    computing = _computing(work, users, constants)
    terms = [computing] if computing and computing.seconds > seconds else reading
    terms.append(launches(work, constants))
    if work.width > 1:
        terms += [reductions(work, constants), _exchange(work, users, constants)]
    terms += kv_terms(work, constants, users=users)
    each = constants["vLLM user, CDNA" if _cdna(work) else "vLLM user"]
    terms.append(Term(what="users", how=f"{users:.0f} × {each:.0f} µs", seconds=users * each * 1e-6))
    return tuple(terms)


def aggregate_tok_s(
    work: Work, constants: Values = VALUES, *, prompt_tokens: float = 0, answer_tokens: float = 0
) -> float:
    """Return all users' tokens per second together; with `prompt_tokens` and `answer_tokens` each, the prompts are
    computed in between, as a server does, and take their time."""
    users = work.users / _busy(work)
    step = sum(term.seconds for term in step_terms(work, constants))
    prefill = prefill_tok_s(work, constants) if prompt_tokens else None
    if not prefill or not answer_tokens:
        return work.users / step
    seconds = answer_tokens * step + users * prompt_tokens / prefill
    return work.users * answer_tokens / seconds


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
    reached = constants["vLLM compute, CDNA" if _cdna(work) else "vLLM compute"]
    at_once = min(rate for rate in rates if rate) * work.width
    how = f"{users:.0f} users × 2 × {work.active_parameters / 1e9:.1f} G ÷ {at_once:.0f} TFLOPS ÷ {reached:.2f}"
    seconds = users * 2 * work.active_parameters / (reached * at_once * 1e12)
    return Term(what="computing", how=how, seconds=seconds)


def _exchange(work: Work, users: float, constants: Values) -> Term:
    """What the cards of a stage send each other: each value goes around all of them and back."""
    hidden = work.embedding_length or _HIDDEN
    around = 2 * (work.width - 1) / work.width
    rate = {"nvlink": "link NVLink", "peer": "link peer"}.get(work.link, "link host")
    sent = work.layers * _REDUCED_BYTES * users * hidden * around
    carried = constants[rate] if work.link_gb_s is None else min(constants[rate], work.link_gb_s)
    how = f"{sent / 1e9:.3f} GB ÷ {carried:.3g} GB/s"
    return Term(what="sending between cards", how=how, seconds=sent / (carried * 1e9))


def _cdna(work: Work) -> bool:
    return any(chip.cdna for chip in work.chips)
