"""Which ways of cutting a model vLLM accepts, known before anything is fetched or started.

Tensor parallelism cuts every matrix into equal parts, one a card; a pipeline gives each card whole layers. The rules
were read in vLLM 0.32.0 (config/model.py, model_executor/layers/linear.py, quantization/utils).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from mgpu.machine.snapshot import Gpu
from mgpu.models.facts import ModelFacts
from mgpu.planning.links import is_slow, link_words
from mgpu.planning.split import balanced_split
from mgpu.units import gib

_EXPERTS = "an expert's width"
_VOCABULARY_PADDING = 64  # vLLM rounds the vocabulary up before it cuts it


@dataclass(frozen=True, slots=True, kw_only=True)
class Legality:
    """Whether a shape is possible: `problems` say with numbers why not (empty: it is), `notes` what it costs."""

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def legal(self) -> bool:
        """Whether nothing forbids it."""
        return not self.problems


def check_shape(facts: ModelFacts, gpus: Sequence[Gpu], *, tensor_parallel: int, pipeline_parallel: int) -> Legality:
    """Say whether vLLM can run `facts` on `gpus` in this shape; each stage is a run of `tensor_parallel` cards.

    Without cards (on the CPU build) only the model itself counts.
    """
    problems = list(tensor_problems(facts, tensor_parallel)) if tensor_parallel > 1 else []
    if problems and (sizes := legal_sizes(facts, max(tensor_parallel * 2, 8))):
        problems.append(f"tensor parallel sizes that work: {', '.join(map(str, sizes))}")
    if pipeline_parallel > len(facts.layers):
        problems.append(f"{len(facts.layers)} layers ÷ {pipeline_parallel} stages: a stage needs at least one layer")
    wanted = tensor_parallel * pipeline_parallel
    if gpus and wanted != len(gpus):
        shape = f"{tensor_parallel} × {pipeline_parallel}" if pipeline_parallel > 1 else str(tensor_parallel)
        problems.append(f"a shape of {shape} takes {_cards(wanted)}, and there are {len(gpus)}")
    notes: list[str] = []
    if not problems and tensor_parallel > 1:
        for start in range(0, len(gpus), tensor_parallel):
            notes += _unequal(gpus[start : start + tensor_parallel])
            notes += _slow_links(facts, gpus[start : start + tensor_parallel])
        if replicas := _kv_replicas(facts, tensor_parallel):
            notes.append(
                f"{facts.kv_heads} KV heads on {_cards(tensor_parallel)}: each is held {replicas} times, "
                "so that more cards hold no longer context"
            )
    return Legality(problems=tuple(problems), notes=tuple(notes))


def tensor_problems(facts: ModelFacts, size: int) -> Iterator[str]:
    """Say what of `facts` cannot be cut into `size` equal parts; nothing when all can."""
    latent = facts.kv_lora_rank is not None
    if facts.heads % size:
        yield f"{facts.heads} attention heads ÷ {_cards(size)} = {_quotient(facts.heads, size)}"
    if not latent and facts.kv_heads % size and size % facts.kv_heads:
        yield f"{facts.kv_heads} KV heads can be neither dealt to {_cards(size)} nor repeated evenly on them"
    vocabulary = -(-facts.vocabulary // _VOCABULARY_PADDING) * _VOCABULARY_PADDING
    if vocabulary % size:
        yield f"a vocabulary of {vocabulary} ÷ {_cards(size)} = {_quotient(vocabulary, size)}"
    for name, length in _feed_forward(facts):
        if length % size:
            yield f"{name} of {length} ÷ {_cards(size)} = {_quotient(length, size)}"
    yield from _quantisation_problems(facts, size)


def replica_problems(facts: ModelFacts, tensor_parallel: int, replicas: int) -> Iterator[str]:
    """Say what keeps `replicas` engines from serving `facts` side by side; nothing for a dense model.

    Experts are not held by each replica: all cards of all replicas share them (docs.vllm.ai, data parallel
    deployment), so that they must be cut that often.
    """
    size = tensor_parallel * replicas
    if facts.experts and replicas > 1:
        for problem in tensor_problems(facts, size):
            if problem.startswith(_EXPERTS):
                yield f"vLLM cuts the experts over all {_cards(size)} of the replicas: {problem}"


def legal_sizes(facts: ModelFacts, most: int) -> tuple[int, ...]:
    """Return every tensor-parallel size from 1 to `most` that the model allows."""
    return tuple(size for size in range(1, most + 1) if size == 1 or not any(tensor_problems(facts, size)))


def best_shape(facts: ModelFacts, cards: int) -> tuple[int, int]:
    """Return (tensor parallel, pipeline parallel) for `cards` equal cards: the largest legal tensor-parallel size that
    divides them, and a pipeline for the rest."""
    tensor = max(size for size in legal_sizes(facts, cards) if cards % size == 0)
    return tensor, cards // tensor


def pipeline_partition(
    layer_bytes: Sequence[int], first_bytes: int, last_bytes: int, capacity_bytes: Sequence[int]
) -> tuple[int, ...]:
    """Return how many layers each stage takes (VLLM_PP_LAYER_PARTITION), balanced by what each can hold.

    `first_bytes` is on the first stage besides (the embedding), `last_bytes` on the last one (the head). Each stage
    gets at least one layer: vLLM has no empty ones. There must be at least as many layers as stages.
    """
    units = list(layer_bytes)
    units[0] += first_bytes
    units[-1] += last_bytes
    counts = list(balanced_split(units, capacity_bytes))
    while 0 in counts:  # take from the stage that has most
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return tuple(counts)


# METHOD[-intBITS][-gGROUP | -bBLOCK], as mgpu.models.hf_config.quantisation names it.
_GROUP = re.compile(r"-g(\d{1,6})$")
_BLOCK = re.compile(r"-b(\d{1,6})$")


def _quantisation_problems(facts: ModelFacts, size: int) -> Iterator[str]:
    """Scales belong to whole groups of weights, so that a cut must not go through one.

    Groups lie along a matrix's input, which is cut in the output projection and the feed-forward network's second
    half (a group that straddles two cards cannot be mended by padding, MarlinLinearKernel.can_implement). FP8 blocks
    are square: they bind the outputs too (validate_fp8_block_shape).
    """
    group, block = _GROUP.search(facts.quantisation or ""), _BLOCK.search(facts.quantisation or "")
    grain = int((group or block or ("", "0"))[1])
    if not grain:
        return
    what = f"groups of {grain}" if group else f"blocks of {grain}"
    parts = [(name, length // size) for name, length in _feed_forward(facts) if length % size == 0]
    if facts.kv_lora_rank is None and facts.heads % size == 0:
        parts.append(("attention's output", facts.heads // size * facts.head_dim))
        if block:
            parts.append(("attention's keys", max(1, facts.kv_heads // size) * facts.head_dim))
    for name, part in parts:
        if part % grain:
            yield f"{name} ÷ {_cards(size)} is {part}, which is {_quotient(part, grain)} {what}"


def _feed_forward(facts: ModelFacts) -> Iterator[tuple[str, int]]:
    if any(not layer.expert_bytes for layer in facts.layers):
        yield "a feed-forward width", facts.feed_forward_length
    if facts.experts and facts.expert_feed_forward_length:
        yield _EXPERTS, facts.expert_feed_forward_length
    if facts.shared_expert_feed_forward_length:
        yield "the shared expert's width", facts.shared_expert_feed_forward_length


def _kv_replicas(facts: ModelFacts, size: int) -> int:
    """How often each KV head is held, 0 when once."""
    if facts.kv_lora_rank is not None:
        return size
    return size // facts.kv_heads if size > facts.kv_heads else 0


def _unequal(gpus: Sequence[Gpu]) -> Iterator[str]:
    """What it means that the cards of a group differ: all get the same part, the smallest and slowest one sets it."""
    totals = [gpu.total_bytes for gpu in gpus if gpu.total_bytes]
    if len({gpu.name for gpu in gpus}) > 1:
        names = " and ".join(f"{len(list(same))} × {name}" for name, same in groupby(sorted(g.name for g in gpus)))
        yield f"{names} take equal parts: the slowest card sets the pace"
    if totals and max(totals) - min(totals) > max(totals) // 50:
        yield f"every card holds what the smallest can: {gib(min(totals))} of up to {gib(max(totals))} is used"


def _slow_links(facts: ModelFacts, gpus: Sequence[Gpu]) -> Iterator[str]:
    """What a slow link costs: after attention and after the feed-forward network of each layer, every card sends and
    receives 2 (n - 1) / n vectors of the model's width a token, in 16 bits."""
    count = len(gpus)
    moved_bytes = 2 * len(facts.layers) * facts.embedding_length * 2 * 2 * (count - 1) // count
    for gpu in gpus:
        if is_slow(gpu):
            yield (
                f"gpu{gpu.index} is on a slow link ({link_words(gpu)}), and a token moves {moved_bytes / 1e6:.1f} MB "
                "over it: long prompts and many users wait for it"
            )


def _cards(count: int) -> str:
    return "1 card" if count == 1 else f"{count} cards"


def _quotient(whole: int, parts: int) -> str:
    return f"{whole / parts:.2f}".rstrip("0").rstrip(".")
