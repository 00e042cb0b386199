"""Checks of which cards belong together: other sockets, chipset lanes; and the best sets of cards for one model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

from mgpu.doctor import subjects
from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, Skip, check
from mgpu.doctor.facts import named, of_one_size
from mgpu.doctor.peer_ways import between
from mgpu.doctor.visibility import cuda_sees_only
from mgpu.machine.chipset import chipset_bridge
from mgpu.machine.inspection import Inspection
from mgpu.machine.layout import Pair, cards, health, pairs
from mgpu.machine.snapshot import Gpu

# What a transfer over each kind of path costs, only so that the kinds can be compared; unknown lies before SYS.
_COST = {"NVLink": 0, "PIX": 1, "PXB": 2, "PHB": 4, "NODE": 8, "unknown": 12, "SYS": 32}
_CHIPSET_COST = 6
_MOST_SETS = 20_000


def best_groups(inspection: Inspection, size: int, *, unequal: bool = False) -> tuple[tuple[int, ...], ...]:
    """Return the sets of `size` cards that reach each other best, best first, no card twice; indices ascending.

    All pairs of a set exchange data when a tensor is cut, so a set is as good as its worst pair, then as the sum of its
    pairs. Only cards of one model make a set, for the smallest and the slowest card set the pace; with `unequal` others
    follow after those. Empty where there are fewer such cards. Machines with very many sets (more than 20 000) are
    searched greedily, from each card on.
    """
    gpus = {gpu.index: gpu for gpu in cards(inspection)}
    if not 2 <= size <= len(gpus):
        return ()
    slow = {gpu.index for gpu in gpus.values() if chipset_bridge(inspection, _address(inspection, gpu)) is not None}
    costs = {}
    for pair in pairs(inspection):
        through = _CHIPSET_COST * len(slow & set(pair.indices)) if not pair.nvlink else 0
        costs[frozenset(pair.indices)] = _COST.get(pair.kind, _COST["unknown"]) + through

    def cost(group: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
        of_pairs = [costs[frozenset(pair)] for pair in itertools.combinations(group, 2)]
        return max(of_pairs), sum(of_pairs), group

    found = sorted(
        (group for alike in _of_one_model(gpus.values()) for group in _sets(alike, size, costs, cost)), key=cost
    )
    if unequal:
        taken = {index for group in found for index in group}
        found += _sets([index for index in sorted(gpus) if index not in taken], size, costs, cost)
    return tuple(found)


def worst_kind(inspection: Inspection, group: tuple[int, ...]) -> str:
    """Return the kind of the worst path between cards of a group, as "PHB"; "unknown" where none is known."""
    kinds = [pair.kind for pair in pairs(inspection) if set(pair.indices) <= set(group)]
    return max(kinds, key=lambda kind: _COST.get(kind, _COST["unknown"]), default="unknown")


@check("topo-cross-socket", Area.p2p, "B", about=(subjects.nvidia_pair, subjects.bare_metal))
def topo_cross_socket(inspection: Inspection, purpose: Purpose) -> Said:
    """Cards that are to work on one model are on different processors, or on different parts of one.

    Read: the nearest common ancestor of every two cards (SYS: two sockets; NODE: two host bridges of one), and NVLink,
    which makes it irrelevant.
    Rule: warn where the best set of --tensor-parallel cards, or the only pair there is, crosses sockets; info where
    better sets exist, and for NODE, which costs little.
    Why: SYS goes through the link between the sockets, 6 to 40 GB/s shared by all.
    Do: move a card, or keep engine and memory on one node with numactl.
    """
    pcie = [pair for pair in pairs(inspection) if not pair.nvlink]
    if not pcie:
        return
    crossing = [pair for pair in pcie if pair.kind == "SYS"]
    wanted = purpose.tensor_parallel or 0
    size = wanted if wanted > 1 else 2
    groups = best_groups(inspection, size, unequal=True)
    if crossing and groups:
        kind = worst_kind(inspection, groups[0])
        best = f"{named(groups[0])} ({kind})"
        if kind == "SYS":
            yield Finding(
                severity=Severity.warn,
                summary=f"the best {size} cards for one model are on different processors",
                evidence=_paths(crossing),
                fix=("move a card to a slot of the other's processor (AMD EPYC: also set NPS1 in the BIOS)",),
                gpus=groups[0],
            )
        else:
            yield Finding(
                severity=Severity.info,
                summary=f"some cards are on different processors; best {size} together: {best}"[:90],
                evidence=_paths(crossing),
                fix=(cuda_sees_only(groups[0]),),
                gpus=_members(crossing),
            )
    elif node := [pair for pair in pcie if pair.kind == "NODE"]:
        yield Finding(
            severity=Severity.info,
            summary=f"{between(node)} are on one socket, but on two parts of it (NODE): a little slower"[:90],
            evidence=_paths(node),
            gpus=_members(node),
        )
    elif all(pair.kind == "unknown" for pair in pcie):
        yield Skip(reason="how the cards reach each other could not be read")


@check("pcie-chipset", Area.pcie, "B", about=(subjects.nvidia_card, subjects.bare_metal))
def pcie_chipset(inspection: Inspection, purpose: Purpose) -> Said:
    """A card is on lanes of the chipset, not of the processor, though the topology calls both the same.

    Read: the bridges above the card: AMD's and ASMedia's chipsets are a switch (1022:43xx, 1b21), Intel's has its ports
    at 00:1a to 00:1d, and on bus 80 since the 800 series. A PLX or Broadcom switch is none.
    Rule: warn where such a card is among the best set of --tensor-parallel cards, else info.
    Why: the chipset shares four lanes with disks and network: 6.5 GB/s between two cards where processor lanes give 13.
    A split by layers hardly notices.
    Do: move the card to a slot of the processor, or use the others.
    """
    if not inspection.pci_known:
        yield Skip(reason="the PCI bus could not be read, so lanes of chipset and processor look alike")
        return
    wanted = purpose.tensor_parallel or 0
    groups = best_groups(inspection, wanted, unequal=True)
    for gpu in cards(inspection):
        bridge = chipset_bridge(inspection, _address(inspection, gpu))
        if bridge is None:
            continue
        needed = bool(groups) and gpu.index in groups[0]
        others = best_groups(inspection, max(wanted, 2))
        better = [group for group in others if gpu.index not in group]
        yield Finding(
            severity=Severity.warn if needed else Severity.info,
            summary=f"GPU{gpu.index} is on lanes of the chipset: half the speed between cards",
            evidence=(
                Evidence(
                    path=f"/sys/bus/pci/devices/{bridge.address}",
                    value=f"{bridge.vendor or 0:04x}:{bridge.device or 0:04x}, a bridge of the chipset",
                ),
            ),
            fix=(
                "move the card to a slot of the processor",
                *((f"{cuda_sees_only(better[0])}  # uses the others instead",) if better else ()),
            ),
            gpus=(gpu.index,),
        )


def _of_one_model(gpus: Iterable[Gpu]) -> list[list[int]]:
    """Cards of one model and size together: there are 3080s of 10 and of 20 GiB."""
    same_name: dict[str, list[Gpu]] = {}
    for gpu in gpus:
        same_name.setdefault(gpu.name, []).append(gpu)
    return [sorted(gpu.index for gpu in group) for same in same_name.values() for group in of_one_size(same)]


def _sets(
    left: list[int],
    size: int,
    costs: dict[frozenset[int], int],
    cost: Callable[[tuple[int, ...]], tuple[int, int, tuple[int, ...]]],
) -> list[tuple[int, ...]]:
    """The best set of `size` of the cards that are left, then the best of the rest, and so on."""
    found = []
    while len(left) >= size:
        if math.comb(len(left), size) <= _MOST_SETS:
            best = min(itertools.combinations(left, size), key=cost)
        else:
            best = min((_grown(first, left, size, costs) for first in left), key=cost)
        found.append(best)
        left = [index for index in left if index not in best]
    return found


def _address(inspection: Inspection, gpu: Gpu) -> str | None:
    return gpu.bus_id or health(inspection, gpu).bus_id


def _grown(first: int, cards_left: list[int], size: int, costs: dict[frozenset[int], int]) -> tuple[int, ...]:
    group = [first]
    while len(group) < size:
        others = [index for index in cards_left if index not in group]
        group.append(min(others, key=lambda index: sum(costs[frozenset((index, member))] for member in group)))
    return tuple(sorted(group))


def _members(found: list[Pair]) -> tuple[int, ...]:
    return tuple(sorted({index for pair in found for index in pair.indices}))


def _paths(found: list[Pair]) -> tuple[Evidence, ...]:
    shown = tuple(Evidence(path=f"GPU{pair.a.index} to GPU{pair.b.index}", value=pair.kind) for pair in found[:4])
    more = len(found) - len(shown)
    return (*shown, Evidence(path="other pairs", value=f"{more} more")) if more else shown


CHECKS: tuple[Check, ...] = (topo_cross_socket, pcie_chipset)
