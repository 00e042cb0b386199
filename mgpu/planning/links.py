"""What the way to a card means for a split: how fast it is, and where in a row of cards it matters least."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from mgpu.machine.snapshot import Gpu, Machine

# GB/s of one lane and direction by PCIe generation, after the line code (PCI-SIG: 2.5 and 5 GT/s in 8b/10b, from 8 GT/s
# on in 128b/130b, 64 GT/s in flits).
_LANE_GB_S = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
SLOW_GB_S = 4.0
"""A slower link is slow: four lanes of PCIe 4.0 cost tensor parallelism 1 % (two cards, one user); of the half of that
and less, which chipset slots, risers and external boxes give, nobody published as much."""


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


def layer_order(gpus: Sequence[Gpu], *, offload: bool) -> tuple[Gpu, ...]:
    """Return the cards in the order in which llama.cpp's layer split does best with their links.

    Between two cards goes one vector of the model's width a token (32 KiB for a 70B). The last card sends a number for
    each word of the vocabulary to the host (501 KiB), so that a slow link is not last; with layers in host memory the
    first card computes their prompts and fetches their weights for each micro-batch, gigabytes, so that then it is not
    first either where it can be helped. A display is no reason: what it takes is missing from the card's free memory,
    by which layers are dealt. Cards whose links are alike or unknown stay in their order.
    """
    slow = [gpu for gpu in gpus if is_slow(gpu)]
    fast = [gpu for gpu in gpus if gpu not in slow]
    if not slow or not fast:
        return tuple(gpus)
    return (fast[0], *slow, *fast[1:]) if offload else (*slow, *fast)


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
