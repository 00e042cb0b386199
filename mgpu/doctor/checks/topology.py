"""Checks of which cards belong together: other sockets, chipset lanes; and the best sets of cards for one model."""

from __future__ import annotations

import itertools
import math

from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, Skip, check
from mgpu.doctor.facts import named
from mgpu.machine.inspection import Inspection, PciDevice
from mgpu.machine.layout import Pair, bridges_above, cards, health, is_virtual, pairs

# What a transfer over each kind of path costs, only so that the kinds can be compared; unknown lies before SYS.
_COST = {"NVLink": 0, "PIX": 1, "PXB": 2, "PHB": 4, "NODE": 8, "unknown": 12, "SYS": 32}
_CHIPSET_COST = 6
_MOST_SETS = 20_000

_AMD, _INTEL, _ASMEDIA = 0x1022, 0x8086, 0x1B21


def best_groups(inspection: Inspection, size: int) -> tuple[tuple[int, ...], ...]:
    """Return the sets of `size` cards that reach each other best, best first, no card twice; indices ascending.

    All pairs of a set exchange data when a tensor is cut, so a set is as good as its worst pair, then as the sum of its
    pairs; cards of one model come before mixed ones, for the smallest and slowest sets the pace. Empty where there are
    fewer cards. Machines with very many sets (more than 20 000) are searched greedily, from each card on.
    """
    gpus = {gpu.index: gpu for gpu in cards(inspection)}
    if not 2 <= size <= len(gpus):
        return ()
    slow = {gpu.index for gpu in gpus.values() if _chipset_bridge(inspection, gpu.bus_id) is not None}
    costs = {}
    for pair in pairs(inspection):
        through = _CHIPSET_COST * len(slow & set(pair.indices)) if not pair.nvlink else 0
        costs[frozenset(pair.indices)] = _COST.get(pair.kind, _COST["unknown"]) + through

    def cost(group: tuple[int, ...]) -> tuple[int, int, int, tuple[int, ...]]:
        of_pairs = [costs[frozenset(pair)] for pair in itertools.combinations(group, 2)]
        return max(of_pairs), len({gpus[index].name for index in group}), sum(of_pairs), group

    found: list[tuple[int, ...]] = []
    left = sorted(gpus)
    while len(left) >= size:
        if math.comb(len(left), size) <= _MOST_SETS:
            best = min(itertools.combinations(left, size), key=cost)
        else:
            best = min((_grown(first, left, size, costs) for first in left), key=cost)
        found.append(best)
        left = [index for index in left if index not in best]
    return tuple(found)


def worst_kind(inspection: Inspection, group: tuple[int, ...]) -> str:
    """Return the kind of the worst path between cards of a group, as "PHB"; "unknown" where none is known."""
    kinds = [pair.kind for pair in pairs(inspection) if set(pair.indices) <= set(group)]
    return max(kinds, key=lambda kind: _COST.get(kind, _COST["unknown"]), default="unknown")


@check("topo-cross-socket", Area.p2p, "B")
def topo_cross_socket(inspection: Inspection, purpose: Purpose) -> Said:
    """Cards that are to work on one model are on different processors, or on different parts of one.

    Read from the nearest common ancestor of every two cards (SYS: two sockets; NODE: two host bridges of one) and from
    NVLink, which makes it irrelevant. SYS goes through the link between the sockets, 6 to 40 GB/s shared by all. It is
    a warning where the best set of --tensor-parallel cards, or the only pair there is, crosses sockets; where better
    sets exist they are only named. Move a card, or keep engine and memory on one node with numactl.
    """
    pcie = [pair for pair in pairs(inspection) if not pair.nvlink]
    if not pcie or is_virtual(inspection):
        return
    crossing = [pair for pair in pcie if pair.kind == "SYS"]
    wanted = purpose.tensor_parallel or 0
    size = wanted if wanted > 1 else 2
    groups = best_groups(inspection, size)
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
                fix=(f"CUDA_VISIBLE_DEVICES={','.join(map(str, groups[0]))}",),
            )
    elif node := [pair for pair in pcie if pair.kind == "NODE"]:
        yield Finding(
            severity=Severity.info,
            summary="some cards are on different host bridges of one processor",
            evidence=_paths(node),
        )
    elif all(pair.kind == "unknown" for pair in pcie):
        yield Skip(reason="how the cards reach each other could not be read")


@check("pcie-chipset", Area.pcie, "B")
def pcie_chipset(inspection: Inspection, purpose: Purpose) -> Said:
    """A card is on lanes of the chipset, not of the processor, though the topology calls both the same.

    Read from the bridges above the card: AMD's and ASMedia's chipsets are a switch (1022:43xx, 1b21), Intel's has its
    ports at 00:1b to 00:1d. A PLX or Broadcom switch is none. The chipset shares four lanes with disks and network:
    6.5 GB/s between two cards where processor lanes give 13. A warning where such a card is among the best set of
    --tensor-parallel cards, otherwise only said; a split by layers hardly notices.
    """
    if is_virtual(inspection) or not cards(inspection):
        return
    if not inspection.pci_known:
        yield Skip(reason="the PCI bus could not be read, so lanes of chipset and processor look alike")
        return
    wanted = purpose.tensor_parallel or 0
    groups = best_groups(inspection, wanted)
    for gpu in cards(inspection):
        bridge = _chipset_bridge(inspection, gpu.bus_id or health(inspection, gpu).bus_id)
        if bridge is None:
            continue
        needed = bool(groups) and gpu.index in groups[0]
        others = best_groups(inspection, 2)
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
                *(
                    (f"export CUDA_VISIBLE_DEVICES={','.join(map(str, better[0]))}  # uses the others instead",)
                    if better
                    else ()
                ),
            ),
            gpus=(gpu.index,),
        )


def _chipset_bridge(inspection: Inspection, bus_id: str | None) -> PciDevice | None:
    return next((each for each in bridges_above(inspection, bus_id) if _is_chipset(each)), None)


def _is_chipset(bridge: PciDevice) -> bool:
    if bridge.vendor == _AMD:
        return bridge.device is not None and bridge.device & 0xFF00 == 0x4300
    if bridge.vendor == _INTEL:
        return bridge.address.startswith(("0000:00:1b.", "0000:00:1c.", "0000:00:1d."))
    return bridge.vendor == _ASMEDIA


def _grown(first: int, cards_left: list[int], size: int, costs: dict[frozenset[int], int]) -> tuple[int, ...]:
    group = [first]
    while len(group) < size:
        others = [index for index in cards_left if index not in group]
        group.append(min(others, key=lambda index: sum(costs[frozenset((index, member))] for member in group)))
    return tuple(sorted(group))


def _paths(found: list[Pair]) -> tuple[Evidence, ...]:
    shown = tuple(Evidence(path=f"GPU{pair.a.index} to GPU{pair.b.index}", value=pair.kind) for pair in found[:4])
    more = len(found) - len(shown)
    return (*shown, Evidence(path="other pairs", value=f"{more} more")) if more else shown


CHECKS: tuple[Check, ...] = (topo_cross_socket, pcie_chipset)
