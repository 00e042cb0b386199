"""How the cards of an inspection hang together: which there are, the bridges above them, and every two of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from mgpu.machine.inspection import CardHealth, Inspection, PciDevice, PeerAccess
from mgpu.machine.snapshot import Gpu, Link

NVIDIA = 0x10DE
_DISPLAY_CLASSES = (0x0300, 0x0302)
_DEEPEST_PATH = 32  # a bus has 256 numbers; far fewer bridges are ever above one another
_ANCESTORS = {0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two NVIDIA cards that answer, the lower index first. `kind` is as in `Link`; `granted` is the driver's claim
    about peer access (None: unknown), `status` NVML's number for it where it is not granted."""

    a: Gpu
    b: Gpu
    kind: str = "unknown"
    granted: bool | None = None
    status: int | None = None

    @property
    def indices(self) -> tuple[int, int]:
        """Both cards' indices."""
        return self.a.index, self.b.index

    @property
    def nvlink(self) -> bool:
        """Whether NVLink joins them."""
        return self.kind == "NVLink"


def cards(inspection: Inspection) -> tuple[Gpu, ...]:
    """Return the NVIDIA cards that answer questions: what is lost has a finding of its own, and no other."""
    return tuple(
        gpu
        for gpu in inspection.machine.gpus
        if gpu.vendor == "nvidia" and not gpu.problem and not health(inspection, gpu).nvml_error
    )


def health(inspection: Inspection, gpu: Gpu) -> CardHealth:
    """Return what the diagnosis asked of a card; all of it unknown where it did not."""
    found = (card for card in inspection.cards if card.gpu == gpu.index)
    return next(found, CardHealth(gpu=gpu.index))


def pairs(inspection: Inspection) -> tuple[Pair, ...]:
    """Return every two of `cards`."""
    links = {frozenset((link.a, link.b)): link for link in inspection.machine.links}
    peers = {frozenset((peer.a, peer.b)): peer for peer in inspection.peers}
    joined = []
    for a, b in itertools.combinations(cards(inspection), 2):
        both = frozenset((a.index, b.index))
        joined.append(_pair(a, b, links.get(both), peers.get(both)))
    return tuple(joined)


def device(inspection: Inspection, address: str | None) -> PciDevice | None:
    """Return the PCI device at an address, or None where it was not read."""
    return next((each for each in inspection.pci if address is not None and each.address == address), None)


def nvidia_on_bus(inspection: Inspection) -> tuple[PciDevice, ...]:
    """Return the NVIDIA cards that the PCI bus shows, whether or not a driver has them."""
    return tuple(
        each
        for each in inspection.pci
        if each.vendor == NVIDIA and each.pci_class is not None and each.pci_class >> 8 in _DISPLAY_CLASSES
    )


def bridges_above(inspection: Inspection, address: str | None) -> tuple[PciDevice, ...]:
    """Return the bridges from a device up to its root port, nearest first; fewer where one was not read."""
    above: list[PciDevice] = []
    current = device(inspection, address)
    while current is not None and len(above) < _DEEPEST_PATH:
        current = device(inspection, current.parent)
        if current is None or current in above:
            break
        above.append(current)
    return tuple(above)


def bridges_between(inspection: Inspection, a: str | None, b: str | None) -> tuple[PciDevice, ...]:
    """Return the bridges whose ACS decides over a transfer between two devices: those above one of them but not above
    both, for where the paths meet, the transfer turns."""
    one, other = bridges_above(inspection, a), bridges_above(inspection, b)
    return tuple(each for each in (*one, *other) if not (each in one and each in other))


def is_virtual(inspection: Inspection) -> bool | None:
    """Return whether this is a virtual machine (WSL2 is one), None where that cannot be told."""
    kind = inspection.machine.host.virtualisation
    if inspection.host.wsl or any(card.virtualisation_mode in (1, 2) for card in inspection.cards):
        return True
    return None if kind is None else kind != "none"


def in_container(inspection: Inspection) -> bool:
    """Return whether this is known to be a container."""
    return inspection.machine.host.container not in (None, "none")


def is_geforce(gpu: Gpu) -> bool:
    """Return whether a card is a GeForce or a TITAN, to which the driver grants less than to others."""
    return "geforce" in gpu.name.lower() or "titan" in gpu.name.lower()


def _pair(a: Gpu, b: Gpu, link: Link | None, peer: PeerAccess | None) -> Pair:
    kind = link.kind if link else "unknown"
    if kind == "unknown" and peer is not None and peer.ancestor is not None:
        kind = _ANCESTORS.get(peer.ancestor, "unknown")
    granted = link.p2p if link else None
    statuses = [number for number in (peer.read, peer.write) if number is not None] if peer else []
    if statuses:
        granted = not any(statuses)
    return Pair(a=a, b=b, kind=kind, granted=granted, status=next(filter(None, statuses), None))
