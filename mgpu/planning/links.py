"""What the way to a card means for a split: how fast it is, and where in a row of cards it matters least."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mgpu.machine.snapshot import Gpu, Machine
from mgpu.models.facts import ModelFacts
from mgpu.planning.memory import device_kind
from mgpu.planning.work import chip_of

# GB/s of one lane and direction by PCIe generation, after the line code (PCI-SIG: 2.5 and 5 GT/s in 8b/10b, from 8 GT/s
# on in 128b/130b, 64 GT/s in flits).
_LANE_GB_S = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
SLOW_GB_S = 4.0
"""A slower link is slow: four lanes of PCIe 4.0 cost tensor parallelism 1 % (two cards, one user); of the half of that
and less, which chipset slots, risers and external boxes give, nobody published as much."""

_LOGIT_BYTES = 4  # of each word of the vocabulary, in fp32
_LONG_S = 0.25e-3  # 1 % of a token's time at 40 tokens/s: 501 KiB over 2 GB/s
# What computing a micro-batch of 512 tokens with a GB of weights takes, times the card's TFLOPS: 2 operations for each
# token and each of the 1.8 G parameters in it (4.5 bits each), 0.6 of the rate reached.
_BATCH_S = 512 * 2 * 1.8e9 / 0.6e12
_CLEARLY = 1.25


def link_gb_s(gpu: Gpu) -> float | None:
    """Return what the card's PCIe link carries in one direction in GB/s, None where lanes or generation are unknown.

    The generation is the highest that card and slot have together: an idle card's own drops to the first.
    """
    lane = _LANE_GB_S.get(gpu.pcie.gen_max or 0)
    lanes = gpu.pcie.width or gpu.pcie.slot_width
    return lane * lanes if lane and lanes else None


def link_words(gpu: Gpu) -> str:
    """Return the card's link as people write it: "PCIe 3.0 x1, 1 GB/s"."""
    lanes = gpu.pcie.width or gpu.pcie.slot_width
    return f"PCIe {gpu.pcie.gen_max}.0 x{lanes}, {link_gb_s(gpu) or 0:.1f} GB/s"


def is_slow(gpu: Gpu) -> bool:
    """Whether the link is known to be slow, and there is no NVLink that would be used instead of it."""
    rate = link_gb_s(gpu)
    return rate is not None and rate < SLOW_GB_S and not any(port.active for port in gpu.nvlink)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOrder:
    """Cards in the order in which a layer split is to take them, and why it is not theirs."""

    gpus: tuple[Gpu, ...]
    why: str


def layer_order(gpus: Sequence[Gpu], facts: ModelFacts, *, on_host: bool) -> LayerOrder | None:
    """Return a better order of the cards for llama.cpp's layer split, None where theirs is as good.

    In any order the cards read the same bytes, and a vector of the model's width a token goes from each to the next
    (32 KiB for a 70B). But for each token of an answer the last card sends a number for every word of the vocabulary
    to the host (501 KiB): a link on which that takes long is not last. A prompt then crosses that link twice and not
    once, by which 16 of its tokens lose what one of an answer gains.

    With layers or experts `on_host`, the first card computes them for prompts, and fetches their weights, gigabytes,
    for each micro-batch: it is the one that is fastest at both.

    A display is no reason: what it takes is missing from the card's free memory, by which layers are dealt.
    """
    rest, front, reasons = list(gpus), list[Gpu](), list[str]()
    if on_host:
        front = [_first_for_host_layers(gpus)]
        rest.remove(front[0])
        if front[0] is not gpus[0]:
            link = f" ({link_words(front[0])})" if link_gb_s(front[0]) else ""
            reasons.append(
                f"gpu{front[0].index}{link} comes first: prompts of what is in host memory are computed there"
            )
    slow = [gpu for gpu in rest if _answers_wait(gpu, facts)]
    fast = [gpu for gpu in rest if gpu not in slow]
    if slow and fast and rest[-1] is slow[-1]:
        rest = [*slow, *fast]
        size = f"{facts.vocabulary * _LOGIT_BYTES / 1024:.0f} KiB"
        reasons.append(f"gpu{slow[-1].index} ({link_words(slow[-1])}) is not last: {size} a token leave the last card")
    return LayerOrder(gpus=(*front, *rest), why="; ".join(reasons)) if reasons else None


def _answers_wait(gpu: Gpu, facts: ModelFacts) -> bool:
    """Whether the vocabulary's numbers take long on the card's way to the host, of which NVLink is no part."""
    rate = link_gb_s(gpu)
    return rate is not None and facts.vocabulary * _LOGIT_BYTES / (rate * 1e9) >= _LONG_S


def _first_for_host_layers(gpus: Sequence[Gpu]) -> Gpu:
    """The card that would be clearly faster than the first one with prompts of what is on the host; else that one."""
    links, rates = [link_gb_s(gpu) for gpu in gpus], [chip_of(gpu).tensor_tflops for gpu in gpus]
    drivers = (gpu.engine_devices[0] if gpu.engine_devices else "" for gpu in gpus)
    if (
        any(links) != all(links)
        or not all(rates)
        or not all(device_kind(name).computes_host_layers for name in drivers)
    ):
        return gpus[0]
    seconds = [(1 / link if link else 0) + _BATCH_S / (rate or 1) for link, rate in zip(links, rates, strict=True)]
    best = min(range(len(gpus)), key=seconds.__getitem__)
    return gpus[best] if seconds[best] * _CLEARLY <= seconds[0] else gpus[0]


class Links:
    """How the cards of a machine reach each other."""

    def __init__(self, machine: Machine) -> None:
        there = {gpu.index for gpu in machine.gpus}
        known = (link for link in machine.links if {link.a, link.b} <= there)
        self._kinds = {frozenset((link.a, link.b)): link.kind for link in known}
        self._nvlink = self._components(machine, lambda kind: kind == "NVLink")
        self._socket = self._components(machine, lambda kind: kind != "SYS")

    def groups(self, gpu: Gpu) -> tuple[int, int]:
        """Return names of the cards that NVLink joins the card to and of those at its socket."""
        return self._nvlink[gpu.index], self._socket[gpu.index]

    def slow(self, gpus: Sequence[Gpu]) -> int:
        """Return how many links are slow among cards that all talk to each other: their own, and those between
        sockets."""
        return sum(map(is_slow, gpus)) + self._count(gpus, "SYS") if len(gpus) > 1 else 0

    def nvlinks(self, gpus: Sequence[Gpu]) -> int:
        """Return how many pairs of the cards NVLink joins."""
        return self._count(gpus, "NVLink")

    def _count(self, gpus: Sequence[Gpu], kind: str) -> int:
        pairs = itertools.combinations((gpu.index for gpu in gpus), 2)
        return sum(self._kinds.get(frozenset(pair)) == kind for pair in pairs)

    def _components(self, machine: Machine, joins: Callable[[str], bool]) -> dict[int, int]:
        group = {gpu.index: gpu.index for gpu in machine.gpus}
        for pair, kind in sorted(self._kinds.items(), key=lambda item: sorted(item[0])):
            if joins(kind):
                low, high = sorted(group[index] for index in pair)
                group = {index: low if own == high else own for index, own in group.items()}
        return group
