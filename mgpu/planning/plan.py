"""The plan: candidates ranked, the best one, and the cheapest ways out when nothing fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mgpu.machine.snapshot import Gpu, Machine
from mgpu.models.facts import ModelFacts
from mgpu.planning.candidates import Candidate, layer_split, with_max_ctx
from mgpu.planning.wants import DEFAULT_CTX_TOKENS, Wants

# A context this short serves one question and a short answer; below it a plan is no help.
_SMALLEST_USEFUL_CTX = 2048
# Still offered as a way out, for the user to judge.
_SMALLEST_OFFERED_CTX = 512

_NOT_MODELLED = (
    "speed below the physical bound (no prediction yet)",
    "memory other programs take between plan and start",
)
# What each engine takes besides.
_NOT_MODELLED_OF = {
    "llama.cpp": "llama-server's prompt cache in host memory, at most --cache-ram",
    "vllm": "what vLLM's own processes take of the host memory",
    "ollama": "the prompt cache of Ollama's llama-server in host memory",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fix:
    """A change of options and what the plan becomes with it; `candidate` was planned again, not guessed."""

    change: str
    candidate: Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The candidates, the one to run first; `best` indexes it, None when none fits. `why` says in one line why that
    engine, None where there was no choice."""

    model: ModelFacts
    machine: Machine
    candidates: tuple[Candidate, ...]
    best: int | None
    fixes: tuple[Fix, ...]
    why: str | None = None

    @property
    def chosen(self) -> Candidate:
        """The candidate to run or, when none fits, the one that was asked for."""
        return self.candidates[self.best or 0]

    @property
    def not_modelled(self) -> tuple[str, ...]:
        """What the chosen candidate leaves out, in words."""
        return (*_NOT_MODELLED, _NOT_MODELLED_OF[self.chosen.backend])


def make_plan(
    facts: ModelFacts,
    machine: Machine,
    gpus: Sequence[Gpu],
    wants: Wants,
    *,
    other_quantisations: Sequence[ModelFacts] = (),
) -> Plan:
    """Plan `facts` on `gpus` of `machine` (none: the CPU).

    The first candidate uses all of `gpus`, or with the split mode "none" the best one of them; a single card that
    would do as well follows. `other_quantisations` are smaller files of the same model to propose when this one
    does not fit.
    """
    candidates = llama_cpp_candidates(facts, machine, gpus, wants)
    best = next((i for i, candidate in enumerate(candidates) if candidate.runs), None)
    fixes = llama_cpp_fixes(facts, other_quantisations, machine, gpus, wants) if best is None else ()
    return Plan(model=facts, machine=machine, candidates=candidates, best=best, fixes=fixes)


def llama_cpp_candidates(
    facts: ModelFacts, machine: Machine, gpus: Sequence[Gpu], wants: Wants
) -> tuple[Candidate, ...]:
    """Return the ways llama.cpp can run `facts` on `gpus` (none: the CPU), as `make_plan` has them."""
    asked = _asked(facts, wants, gpus, machine)
    if len(gpus) < 2 or wants.tensor_split or wants.split_mode is not None:
        return (asked,)
    single = _best_single(facts, replace(wants, offload=False), gpus, machine)
    return (asked, single) if single.verdict == "fits" else (asked,)


def llama_cpp_fixes(
    facts: ModelFacts, others: Sequence[ModelFacts], machine: Machine, gpus: Sequence[Gpu], wants: Wants
) -> tuple[Fix, ...]:
    """Return the cheapest changes that make the model fit with llama.cpp; `others` are it in other quantisations."""

    def planned(other: ModelFacts, changed: Wants) -> Candidate:
        return _asked(other, changed, gpus, machine)

    return find_fixes(facts, wants, others, planned, on_cards=bool(gpus))


def _asked(facts: ModelFacts, wants: Wants, gpus: Sequence[Gpu], machine: Machine) -> Candidate:
    """All of `gpus` (or the best one) with the context asked for, or the default one, lowered if only that makes it
    fit."""
    if wants.split_mode == "none" and len(gpus) > 1:
        return _best_single(facts, wants, gpus, machine)
    ctx_tokens = wants.ctx_tokens or min(DEFAULT_CTX_TOKENS, facts.context_length or DEFAULT_CTX_TOKENS)
    candidate = with_max_ctx(layer_split(facts, wants, gpus, machine.host, ctx_tokens), facts, gpus, machine.host)
    largest = candidate.max_ctx_tokens or 0
    if candidate.verdict == "fits" or wants.ctx_tokens or largest < _SMALLEST_USEFUL_CTX:
        return candidate
    lowered = layer_split(facts, wants, gpus, machine.host, largest)
    note = f"context lowered from {ctx_tokens} to {largest} tokens, the most that fits"
    return replace(lowered, max_ctx_tokens=largest, reasons=(note, *lowered.reasons))


def _best_single(facts: ModelFacts, wants: Wants, gpus: Sequence[Gpu], machine: Machine) -> Candidate:
    """The fastest of the cards on which the model fits, or the one on which it misses that by least."""
    singles = [_asked(facts, replace(wants, tensor_split=None), [gpu], machine) for gpu in gpus]

    def rank(single: Candidate) -> tuple[bool, int, int, float]:
        return single.verdict == "fits", -single.short_bytes, -single.host.layers, single.speed.bound_tok_s or 0

    return max(singles, key=rank)


def find_fixes(
    facts: ModelFacts,
    wants: Wants,
    other_quantisations: Sequence[ModelFacts],
    planned: Callable[[ModelFacts, Wants], Candidate],
    *,
    on_cards: bool,
) -> tuple[Fix, ...]:
    """Return the cheapest changes that make the model fit, mildest first, each as `planned` makes it.

    For llama.cpp and what runs it: the options are theirs. `on_cards` says that there are cards to plan on.
    """
    tries: list[tuple[str, ModelFacts, Wants]] = []
    if wants.tensor_split:
        tries.append(("without --tensor-split", facts, replace(wants, tensor_split=None)))
    if wants.split_mode == "none":
        tries.append(("without --split-mode none", facts, replace(wants, split_mode=None)))
    largest = planned(facts, replace(wants, offload=False)).max_ctx_tokens or 0
    if largest >= _SMALLEST_OFFERED_CTX:
        tries.append((f"--ctx {largest}", facts, replace(wants, ctx_tokens=largest)))
    if wants.kv_type_k == wants.kv_type_v == "f16" and wants.uses_flash_attention:
        tries.append(("--kv-type q8_0", facts, replace(wants, kv_type_k="q8_0", kv_type_v="q8_0")))
    smaller = [other for other in other_quantisations if other.file_bytes < facts.file_bytes]
    for other in sorted(smaller, key=lambda other: -other.file_bytes):
        tries.append((f"--quant {other.quantisation}", other, wants))
    if not wants.offload and on_cards:
        tries.append(("--offload allow", facts, replace(wants, offload=True)))

    fixes: list[Fix] = []
    quantisation_found = False
    for change, other_facts, other_wants in tries:
        if change.startswith("--quant") and quantisation_found:
            continue  # the largest that fits is the mildest; smaller ones need no mention
        candidate = planned(other_facts, other_wants)
        if candidate.verdict in ("fits", "fits-with-offload"):
            quantisation_found |= change.startswith("--quant")
            fixes.append(Fix(change=change, candidate=candidate))
    return tuple(fixes)
