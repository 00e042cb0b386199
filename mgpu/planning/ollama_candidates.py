"""Where Ollama will put a model, by its own rules: one card if it fits there, else all cards of one library.

The rules are those of version 0.32.15 (server/sched.go, llm/llama_server.go): a rough prediction chooses the cards,
then llama.cpp's `--fit` deals the layers over them by free memory and keeps a margin free on each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mgpu.machine.snapshot import Gpu, Host, Machine
from mgpu.models.facts import ModelFacts
from mgpu.planning.candidates import Candidate, place_layers, planned_on_bytes
from mgpu.planning.memory import CTX_GRANULARITY, cache_bytes
from mgpu.planning.plan import Fix, find_fixes
from mgpu.planning.predicted import predicted
from mgpu.planning.wants import DEFAULT_CTX_TOKENS, Wants
from mgpu.units import GIB, MIB, gib

BACKEND = "ollama"
# A single card is taken when the prediction is at most this part of its free memory.
_SINGLE_PERCENT = 80
# Micro-batches by context of all users together, the most of the free memory the model may take for each, and what
# Ollama adds to its prediction then.
_BATCHES = ((32768, 2048, 60, 2 * GIB), (4096, 1024, 75, 768 * MIB))
_SMALL_BATCH = 512
# Architectures whose runner serves one request at a time, whatever OLLAMA_NUM_PARALLEL says.
_ONE_USER = ("mllama", "qwen3vl", "qwen35", "qwen3next", "lfm2", "nemotron_h")
_LIBRARIES = {"nvidia": "CUDA", "amd": "ROCm", "intel": "Vulkan"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The cards Ollama takes by itself, in their order, and why, in words."""

    gpus: tuple[Gpu, ...]
    why: str


def predicted_bytes(facts: ModelFacts, ctx_tokens: int, parallel: int) -> int:
    """Return what Ollama expects a model to take: the file and a 16-bit KV cache of the layer with the fewest heads.

    The type of the cache, sliding windows and compute buffers do not count (llm/llama_server.go, PredictServerVRAM).
    """
    kv_heads = min((layer.kv_heads for layer in facts.layers), default=facts.kv_heads) or 1
    head_length = facts.embedding_length // facts.heads if facts.heads else 0
    return facts.file_bytes + 2 * len(facts.layers) * kv_heads * head_length * ctx_tokens * parallel * 2


def choose_cards(facts: ModelFacts, gpus: Sequence[Gpu], ctx_tokens: int, parallel: int) -> Choice:
    """Return the cards that Ollama takes of `gpus` when nobody asks it to spread the model."""
    predicted = predicted_bytes(facts, ctx_tokens, parallel)
    fitting = [gpu for gpu in gpus if predicted <= (gpu.free_bytes or 0) * _SINGLE_PERCENT // 100]
    if len(gpus) == 1:
        return Choice(gpus=tuple(gpus), why=f"it is the only card: {gib(predicted)} predicted")
    if fitting:
        best = max(fitting, key=lambda gpu: gpu.free_bytes or 0)
        why = f"{gib(predicted)} predicted, {_SINGLE_PERCENT} % of {gib(best.free_bytes or 0)} free"
        return Choice(gpus=(best,), why=why)
    group = _largest_group(gpus)
    return Choice(
        gpus=group, why=f"{gib(predicted)} predicted, more than {_SINGLE_PERCENT} % of any card's free memory"
    )


def ollama_candidates(facts: ModelFacts, machine: Machine, gpus: Sequence[Gpu], wants: Wants) -> tuple[Candidate, ...]:
    """Return the ways Ollama can run `facts` on `gpus` of `machine` (none: the CPU), the asked-for one first.

    With several cards that is all of one library together, as it does by itself or with OLLAMA_SCHED_SPREAD, and then
    the single card it would take by itself; with the split mode "none" only the latter. The ledgers are those of
    llama.cpp, which it runs; the `headroom_bytes` of a candidate's wants is the margin kept free on each of its cards
    (LLAMA_ARG_FIT_TARGET), which is the largest that `wants` has for one of them.
    """
    notes = []
    usable = [_named(gpu, machine) for gpu in gpus if _library(gpu)]
    unusable = [gpu for gpu in gpus if not _library(gpu)]
    if unusable:
        notes.append(f"Ollama cannot use {_names(unusable)}")
    group = _largest_group(usable)
    others = [gpu for gpu in usable if gpu not in group]
    if others:
        notes.append(
            f"Ollama never mixes {_library(group[0])} and other cards in one model: {_names(others)} stays unused"
        )
    if gpus and not usable:
        bare = place_layers(facts, wants, (), machine.host, _ctx(facts, wants), host_units=len(facts.layers) + 1)
        return (replace(bare, backend=BACKEND, verdict="unavailable", reasons=tuple(notes)),)
    ctx_tokens = _ctx(facts, wants)
    choice = choose_cards(facts, usable, ctx_tokens, wants.parallel) if usable else Choice(gpus=(), why="")
    asked = choice.gpus if wants.split_mode == "none" else group
    if wants.split_mode == "none" and len(asked) > 1:
        asked = (max(asked, key=lambda gpu: gpu.free_bytes or 0),)
    misdealt = _misdealt(wants, asked, others)
    told = replace(wants, tensor_split=None) if misdealt else wants
    candidates = [_placed(facts, told, asked, machine.host, ctx_tokens)]
    if misdealt:
        candidates = [replace(candidates[0], verdict="illegal", reasons=misdealt)]
    reasons = [_reason(asked, choice)]
    if len(asked) > 1 and len(choice.gpus) == 1 and not wants.tensor_split:
        alone = _placed(facts, replace(wants, offload=False), choice.gpus, machine.host, ctx_tokens)
        candidates.append(replace(alone, wants=replace(alone.wants, offload=wants.offload)))
        reasons.append(_reason(choice.gpus, choice))
    return tuple(
        candidate
        if candidate.verdict == "illegal"  # then only that matters
        else replace(
            predicted(candidate, facts, usable, machine.host, machine.links),
            reasons=(*([why] if why else []), *notes, *candidate.reasons),
        )
        for candidate, why in zip(candidates, reasons, strict=True)
        if candidate is candidates[0] or candidate.verdict == "fits"
    )


def _misdealt(wants: Wants, asked: Sequence[Gpu], others: Sequence[Gpu]) -> tuple[str, ...]:
    """Why the proportions that the user gave cannot be those of the cards `asked`; empty where they can."""
    count = len(wants.tensor_split or ())
    if not count or count == len(asked):
        return ()
    mixed = f", and Ollama never mixes them with {_names(others)}" if others and wants.split_mode != "none" else ""
    chosen = ",".join(f"gpu{gpu.index}" for gpu in asked)
    instead = f"give {len(asked)} with --gpus {chosen}" if len(asked) > 1 else "leave it out"
    return (f"--tensor-split has {count} proportions, where the model goes to {_names(asked)}{mixed}: {instead}",)


def ollama_fixes(
    facts: ModelFacts, others: Sequence[ModelFacts], machine: Machine, gpus: Sequence[Gpu], wants: Wants
) -> tuple[Fix, ...]:
    """Return the cheapest changes that make the model fit, mildest first; `others` are the same model in other
    quantisations. Each was planned again."""

    def planned(other: ModelFacts, changed: Wants) -> Candidate:
        return ollama_candidates(other, machine, gpus, changed)[0]

    return find_fixes(facts, wants, others, planned, on_cards=bool(gpus))


def _refusals(facts: ModelFacts, wants: Wants) -> tuple[str, ...]:
    """What Ollama would do otherwise than is wanted, without a word: that is not done."""
    found = []
    if wants.parallel > 1 and facts.architecture.startswith(_ONE_USER):
        found.append(f"Ollama serves one user at a time with {facts.architecture}, not {wants.parallel}")
    if facts.context_length and (wants.ctx_tokens or 0) > facts.context_length:
        found.append(f"Ollama gives a user {facts.context_length} tokens at most, all the model was trained on")
    if wants.kv_type_k != wants.kv_type_v:
        found.append(f"Ollama has one type for the whole KV cache, not {wants.kv_type_k} and {wants.kv_type_v}")
    return tuple(found)


def _ctx(facts: ModelFacts, wants: Wants) -> int:
    return wants.ctx_tokens or min(DEFAULT_CTX_TOKENS, facts.context_length or DEFAULT_CTX_TOKENS)


def _placed(facts: ModelFacts, wants: Wants, gpus: tuple[Gpu, ...], host: Host, ctx_tokens: int) -> Candidate:
    """The model on exactly these cards, with the largest context that would fit there.

    Ollama keeps one margin on all cards, in an order of its own: the largest that any of these is to have.
    """
    margin = max((wants.headroom_on(gpu) for gpu in gpus), default=wants.headroom_bytes)
    shown = [gpu for gpu in gpus if wants.headroom_on(gpu) > wants.headroom_bytes]
    wants, gpus = replace(wants, headroom_bytes=margin), tuple(replace(gpu, display=None) for gpu in gpus)
    candidate = _fitted(facts, wants, gpus, host, ctx_tokens)
    low, high = 0, (facts.context_length or 1 << 20) // CTX_GRANULARITY
    cards_only = replace(wants, offload=False)
    while low < high:
        middle = (low + high + 1) // 2
        fits = _may_fit(facts, wants, gpus, middle * CTX_GRANULARITY)
        fits = fits and _fitted(facts, cards_only, gpus, host, middle * CTX_GRANULARITY).verdict == "fits"
        low, high = (middle, high) if fits else (low, middle - 1)
    largest = low * CTX_GRANULARITY
    candidate = replace(candidate, max_ctx_tokens=largest)
    if shown and len(gpus) > 1:
        drives = "drive displays" if len(shown) > 1 else "drives a display"
        note = f"{_names(shown)} {drives}: {gib(margin)} stay free on each card, since Ollama has one margin for all"
        candidate = replace(candidate, reasons=(*candidate.reasons, note))
    if refusals := _refusals(facts, wants):
        candidate = replace(candidate, verdict="illegal", reasons=refusals)
    return candidate


def _may_fit(facts: ModelFacts, wants: Wants, gpus: tuple[Gpu, ...], ctx_tokens: int) -> bool:
    """Whether the cards together hold weights and KV cache, if not compute buffers: told without a split."""
    if not gpus or wants.kv_on_host or wants.cpu_moe_layers:
        return True
    planned = replace(wants, ubatch=_micro_batch(facts, wants, gpus, ctx_tokens))  # a window's cache depends on it
    kept = sum(layer.weights_bytes for layer in facts.layers) + facts.head_bytes
    room = sum(max(planned_on_bytes(gpu) - wants.headroom_bytes, 0) for gpu in gpus)
    return kept + sum(cache_bytes(facts, planned, ctx_tokens)) <= room


def _fitted(facts: ModelFacts, wants: Wants, gpus: tuple[Gpu, ...], host: Host, ctx_tokens: int) -> Candidate:
    """What llama.cpp's fit makes of it: by free memory if that leaves the margin everywhere, else from the back.

    A split the user gave is not adjusted. Layers stay on the host only with `wants.offload`: Ollama would leave them
    there without a word.
    """
    planned = replace(wants, ubatch=_micro_batch(facts, wants, gpus, ctx_tokens))
    proportions = wants.tensor_split or tuple(float(gpu.free_bytes or 0) for gpu in gpus)
    if sum(proportions) <= 0:
        proportions = (1.0,) * len(gpus)
    units = len(facts.layers) + 1
    dealt = replace(planned, tensor_split=proportions if gpus else None)
    candidate = place_layers(facts, dealt, gpus, host, ctx_tokens, host_units=0 if gpus else units)
    if gpus and not wants.tensor_split and _overflows(candidate):
        counts = _filled_from_the_back(facts, planned, gpus, host, ctx_tokens)
        if any(counts) and (sum(counts) == units or wants.offload):
            filled = replace(planned, tensor_split=tuple(map(float, counts)))
            candidate = place_layers(facts, filled, gpus, host, ctx_tokens, host_units=units - sum(counts))
            if facts.experts and sum(counts) < units:
                note = "llama.cpp may rather keep the experts of more layers in RAM than whole layers"
                candidate = replace(candidate, reasons=(*candidate.reasons, note))
    return replace(candidate, backend=BACKEND, wants=replace(wants, ubatch=planned.ubatch))


def _filled_from_the_back(
    facts: ModelFacts, wants: Wants, gpus: tuple[Gpu, ...], host: Host, ctx_tokens: int
) -> list[int]:
    """How many layers each card takes, the head counted as one, when the last card is filled first."""
    units, counts = len(facts.layers) + 1, [0] * len(gpus)
    caches = (0,) * (units - 1) if wants.kv_on_host else cache_bytes(facts, wants, ctx_tokens)
    kept = [layer.weights_bytes - layer.expert_bytes + cache for layer, cache in zip(facts.layers, caches, strict=True)]
    if not wants.cpu_moe_layers:
        kept = [size + layer.expert_bytes for layer, size in zip(facts.layers, kept, strict=True)]
    kept.append(facts.head_bytes)

    def room(device: int, count: int) -> bool:
        end = units - sum(counts[device + 1 :])
        if sum(kept[end - count : end]) > planned_on_bytes(gpus[device]) - wants.headroom_bytes:
            return False  # without a look at the compute buffers
        tried = [*counts[:device], count, *counts[device + 1 :]]
        if device and sum(tried) < units:
            tried[0] = 1  # layers in RAM are computed on the first card, which has yet to get some
        split = replace(wants, tensor_split=tuple(map(float, tried)))
        placed = place_layers(facts, split, gpus, host, ctx_tokens, host_units=units - sum(tried))
        return all(placed.devices[i].spare_bytes >= wants.headroom_bytes for i in range(device, len(gpus)) if tried[i])

    for device in reversed(range(len(gpus))):
        low, high = 0, units - sum(counts)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if room(device, middle) else (low, middle - 1)
        counts[device] = low
    return counts


def _overflows(candidate: Candidate) -> bool:
    margin = candidate.wants.headroom_bytes
    return any(not device.idle and device.spare_bytes < margin for device in candidate.devices)


def _micro_batch(facts: ModelFacts, wants: Wants, gpus: Sequence[Gpu], ctx_tokens: int) -> int:
    """The micro-batch Ollama takes (server/sched.go, automaticGenerationBatch); it has no setting for it."""
    cuda = any(_library(gpu) == "CUDA" for gpu in gpus)
    together = ctx_tokens * wants.parallel
    if wants.flash_attention == "off" and cuda:
        small = any(_library(gpu) == "CUDA" and (gpu.free_bytes or 0) <= 8 * GIB for gpu in gpus)
        return 256 if small and together > 4096 else _SMALL_BATCH
    predicted = predicted_bytes(facts, ctx_tokens, wants.parallel)
    available = sum(gpu.free_bytes or 0 for gpu in gpus)
    limit = available * _SINGLE_PERCENT // 100
    for above, batch, percent, surcharge in _BATCHES:
        fits = not available or (predicted <= available * percent // 100 and predicted + surcharge <= limit)
        if together > above and fits:
            return batch
    return _SMALL_BATCH


def _reason(gpus: Sequence[Gpu], choice: Choice) -> str | None:
    """Why these cards, compared with those Ollama takes by itself."""
    if not gpus:
        return None
    if len(choice.gpus) == 1 and len(gpus) > 1:
        return f"OLLAMA_SCHED_SPREAD=1: by itself Ollama would put it on {_names(choice.gpus)} alone: {choice.why}"
    if len(gpus) == 1:
        return f"Ollama would put it on {_names(gpus)} alone: {choice.why}" if choice.gpus == tuple(gpus) else None
    return f"Ollama would spread it over {_names(gpus)}: {choice.why}"


def _largest_group(gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """The cards of the library with the most free memory; the first one of equals."""
    groups: dict[str, list[Gpu]] = {}
    for gpu in gpus:
        groups.setdefault(_library(gpu), []).append(gpu)
    largest = max(groups.values(), key=lambda group: sum(gpu.free_bytes or 0 for gpu in group), default=[])
    return tuple(largest)


def can_use(gpu: Gpu) -> bool:
    """Whether Ollama has a library for this card."""
    return bool(_library(gpu))


def _library(gpu: Gpu) -> str:
    """What Ollama drives a card with; "" for what it cannot use. NVIDIA cards are always CUDA's, even where another
    llama.cpp found them through Vulkan."""
    names = [name.rstrip("0123456789") for name in gpu.engine_devices]
    if gpu.problem:
        return ""
    if gpu.vendor == "nvidia" or "CUDA" in names:
        return "CUDA"
    return next((name for name in ("ROCm", "Vulkan") if name in names), "" if names else _LIBRARIES.get(gpu.vendor, ""))


def _named(gpu: Gpu, machine: Machine) -> Gpu:
    """`gpu` as Ollama sees it, with the name under which it can be told of it as its only engine device."""
    library = _library(gpu)
    known = next((name for name in gpu.engine_devices if name.rstrip("0123456789") == library), None)
    if known is None:
        same = [other.index for other in machine.gpus if _library(other) == library]
        known = f"{library}{same.index(gpu.index) if gpu.index in same else gpu.index}"
    return replace(gpu, engine_devices=(known,))


def _names(gpus: Sequence[Gpu]) -> str:
    return ", ".join(f"gpu{gpu.index}" for gpu in gpus)
