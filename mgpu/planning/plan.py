"""The plan: candidates ranked, the best one, and the cheapest ways out when nothing fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from mgpu.machine.snapshot import Gpu, Machine
from mgpu.models.facts import ModelFacts
from mgpu.planning.candidates import Candidate, layer_split, with_max_ctx
from mgpu.planning.kinds import groups_alike, without_slow
from mgpu.planning.links import layer_order
from mgpu.planning.more_cards import more_cards
from mgpu.planning.predicted import predicted
from mgpu.planning.ranking import Contestant, in_order
from mgpu.planning.wants import DEFAULT_HEADROOM_BYTES, Wants, asked_ctx_tokens

# A context this short serves one question and a short answer; below it a plan is no help.
_SMALLEST_USEFUL_CTX = 2048
# Still offered as a way out, for the user to judge.
_SMALLEST_OFFERED_CTX = 512

_NOT_MODELLED = ("memory other programs take between plan and start",)
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
class LeftOut:
    """An engine of which there is no candidate, and why in one sentence."""

    backend: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The candidates, the one to run first; `best` indexes it, None when none fits. `why` says in one line why that
    engine, None where there was no choice. `left_out` are the engines that have no candidate, and why."""

    model: ModelFacts
    machine: Machine
    candidates: tuple[Candidate, ...]
    best: int | None
    fixes: tuple[Fix, ...]
    why: str | None = None
    left_out: tuple[LeftOut, ...] = ()

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
        if len(gpus) > 1 and wants.tensor_split and wants.split_mode is None:
            note = "--tensor-split deals whole layers; with --split-mode tensor it cuts each layer so"
            asked = replace(asked, reasons=(*asked.reasons, note))
        return (asked,)
    cut = _asked(facts, replace(wants, split_mode="tensor"), gpus, machine)
    single = _best_single(facts, replace(wants, offload=False), gpus, machine)
    alone = (single,) if single.verdict == "fits" else ()
    return (asked, cut, *alone, *_on_fewer_cards(facts, wants, gpus, machine, (asked, cut)))


def _on_fewer_cards(
    facts: ModelFacts, wants: Wants, gpus: Sequence[Gpu], machine: Machine, on_all: tuple[Candidate, Candidate]
) -> Iterator[Candidate]:
    """The layer split without the slow cards and the tensor split over cards of one kind, where they hold as much
    context as `on_all` of them and are faster, or rest on firmer evidence."""
    least_bytes = sum(layer.weights_bytes for layer in facts.layers)
    by_mode = (None, without_slow, False), ("tensor", groups_alike, True)
    for (split_mode, sets_of, each_set), other in zip(by_mode, on_all, strict=True):
        for some in sets_of(gpus, least_bytes=least_bytes):
            found = _asked(facts, replace(wants, offload=False, split_mode=split_mode), some, machine)
            if found.verdict == "fits" and not any(device.idle for device in found.devices):
                if _is_better(found, other):
                    yield found
                if not each_set:
                    break


def _is_better(fewer: Candidate, others: Candidate) -> bool:
    """Whether fewer cards do better than others with the same split."""
    if others.verdict != "fits" or fewer.ctx_tokens != others.ctx_tokens:
        return others.verdict != "fits" or fewer.ctx_tokens > others.ctx_tokens
    return _rate(fewer) > _rate(others) or set(fewer.speed.thin) < set(others.speed.thin)


def _rate(candidate: Candidate) -> float:
    """What is likely for one user, 0 where that is unknown."""
    return candidate.speed.decode_tok_s.likely if candidate.speed.decode_tok_s else 0.0


def llama_cpp_fixes(
    facts: ModelFacts, others: Sequence[ModelFacts], machine: Machine, gpus: Sequence[Gpu], wants: Wants
) -> tuple[Fix, ...]:
    """Return the cheapest changes that make the model fit with llama.cpp; `others` are it in other quantisations."""

    def planned(other: ModelFacts, changed: Wants, cards: Sequence[Gpu] = gpus, there: Machine = machine) -> Candidate:
        candidates = llama_cpp_candidates(other, there, cards, changed)
        if running := [Contestant(candidate=each) for each in candidates if each.runs]:
            fitting = [way for way in running if way.candidate.verdict == "fits"] or running
            return in_order(fitting, for_many=changed.parallel > 1)[0].candidate
        return max(candidates, key=lambda each: each.max_ctx_tokens or 0)

    def with_more_cards() -> Iterator[Fix]:
        for change, there, cards in more_cards(
            machine,
            gpus,
            lambda gpu: bool(gpu.engine_devices),
            least_bytes=sum(layer.weights_bytes for layer in facts.layers),
        ):
            candidate = planned(facts, replace(wants, tensor_split=None), cards, there)
            if candidate.verdict == "fits":
                yield Fix(change=change, candidate=candidate)
                return

    return find_fixes(facts, wants, others, planned, on_cards=bool(gpus), besides=with_more_cards)


def mildest_first(fixes: Iterable[Fix], ctx_tokens: int) -> tuple[Fix, ...]:
    """Return the fixes as they came, but those that tacitly lower the context below `ctx_tokens` or leave some of the
    users waiting after those that do not."""

    def costs(fix: Fix) -> bool:
        lowered = fix.candidate.ctx_tokens < ctx_tokens and "--ctx" not in fix.change
        users = fix.candidate.speed.aggregate_users
        return lowered or (users is not None and users < fix.candidate.parallel)

    return tuple(sorted(fixes, key=costs))


def _asked(facts: ModelFacts, wants: Wants, gpus: Sequence[Gpu], machine: Machine) -> Candidate:
    """All of `gpus` (or the best one) with the context asked for, or the default one, lowered if only that makes it
    fit."""
    if wants.split_mode == "none" and len(gpus) > 1:
        return _best_single(facts, wants, gpus, machine)
    ctx_tokens = asked_ctx_tokens(wants, facts)
    candidate = with_max_ctx(layer_split(facts, wants, gpus, machine.host, ctx_tokens), facts, gpus, machine.host)
    reordered = _reordered(candidate, facts, wants, gpus, machine)
    if reordered:
        candidate, gpus = reordered
    largest = candidate.max_ctx_tokens or 0
    if candidate.verdict not in ("fits", "illegal") and not wants.ctx_tokens and largest >= _SMALLEST_USEFUL_CTX:
        lowered = layer_split(facts, wants, gpus, machine.host, largest)
        note = f"context lowered from {ctx_tokens} to {largest} tokens, the most that fits"
        why = candidate.reasons[-1:] if reordered else ()
        candidate = replace(lowered, max_ctx_tokens=largest, reasons=(note, *lowered.reasons, *why))
    return predicted(candidate, facts, gpus, machine.host, machine.links)


def _reordered(
    candidate: Candidate, facts: ModelFacts, wants: Wants, gpus: Sequence[Gpu], machine: Machine
) -> tuple[Candidate, tuple[Gpu, ...]] | None:
    """The same with the cards in the order that suits a layer split better, and why last of its reasons; None where
    there is none, where the user said another, or where less would fit."""
    if len(gpus) < 2 or wants.keep_order or wants.tensor_split or wants.split_mode == "tensor":
        return None
    on_host = bool(candidate.host.layers or candidate.host.expert_layers)
    order = layer_order(gpus, facts, on_host=on_host)
    if order is None:
        return None
    again = layer_split(facts, wants, order.gpus, machine.host, candidate.ctx_tokens)
    again = with_max_ctx(again, facts, order.gpus, machine.host)
    if again.verdict != candidate.verdict or again.short_bytes > candidate.short_bytes:
        return None
    if again.verdict != "fits" and (again.max_ctx_tokens or 0) < (candidate.max_ctx_tokens or 0):
        return None
    return replace(again, reasons=(*again.reasons, order.why)), order.gpus


def _best_single(facts: ModelFacts, wants: Wants, gpus: Sequence[Gpu], machine: Machine) -> Candidate:
    """The fastest of the cards on which the model fits, or the one on which it misses that by least."""
    kinds = {_kind(gpu): gpu for gpu in gpus[::-1]}
    alone = [gpu for gpu in gpus if gpu in kinds.values()]
    singles = [_asked(facts, replace(wants, tensor_split=None), [gpu], machine) for gpu in alone]

    def rank(single: Candidate) -> tuple[bool, int, int, float]:
        return single.verdict == "fits", -single.short_bytes, -single.host.weights_bytes, _rate(single)

    return max(singles, key=rank)


def _kind(gpu: Gpu) -> Gpu:
    """What a plan for one card depends on."""
    families = tuple(name.rstrip("0123456789") for name in gpu.engine_devices)
    return replace(gpu, index=0, uuid=None, bus_id=None, engine_devices=families)


def find_fixes(
    facts: ModelFacts,
    wants: Wants,
    other_quantisations: Sequence[ModelFacts],
    planned: Callable[[ModelFacts, Wants], Candidate],
    *,
    on_cards: bool,
    besides: Callable[[], Iterable[Fix]] = tuple,
) -> tuple[Fix, ...]:
    """Return the cheapest changes that make the model fit, mildest first, each as `planned` makes it.

    For llama.cpp and what runs it: the options are theirs. `on_cards` says that there are cards to plan on; `besides`
    gives other changes, which are milder than layers in host memory.
    """
    if facts.context_length and (wants.ctx_tokens or 0) > facts.context_length:
        # Nobody buys cards for a context that the model was never trained for.
        shorter = replace(wants, ctx_tokens=facts.context_length)
        change = f"--ctx {facts.context_length}"
        if (candidate := planned(facts, shorter)).verdict == "fits":
            return (Fix(change=change, candidate=candidate),)
        found = find_fixes(facts, shorter, other_quantisations, planned, on_cards=on_cards)
        return tuple(
            fix if fix.change.startswith("--ctx ") else replace(fix, change=f"{change} {fix.change}") for fix in found
        )
    tries: list[tuple[str, ModelFacts, Wants]] = []
    if wants.tensor_split:
        tries.append(("without --tensor-split", facts, replace(wants, tensor_split=None)))
    if wants.headroom_bytes > DEFAULT_HEADROOM_BYTES:
        tries.append(("without --headroom", facts, replace(wants, headroom_bytes=DEFAULT_HEADROOM_BYTES)))
    if wants.split_mode:
        tries.append((f"without --split-mode {wants.split_mode}", facts, replace(wants, split_mode=None)))
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
        if change.startswith("--offload"):
            fixes += besides()
        if change.startswith("--quant") and quantisation_found:
            continue  # the largest that fits is the mildest; smaller ones need no mention
        candidate = planned(other_facts, other_wants)
        if candidate.verdict in ("fits", "fits-with-offload"):
            quantisation_found |= change.startswith("--quant")
            fixes.append(Fix(change=change, candidate=candidate))
    return mildest_first(fixes, asked_ctx_tokens(wants, facts))
