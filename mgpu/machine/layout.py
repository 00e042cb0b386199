"""How the cards of an inspection hang together: which there are, the bridges above them, and every two of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from mgpu.machine.inspection import CardHealth, Inspection, PciDevice, PeerAccess
from mgpu.machine.snapshot import Gpu, Link
from mgpu.machine.sysfs import INTEL, NVIDIA

_DISPLAY, _ACCELERATOR = 0x03, 0x1200
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
    return on_bus(inspection, NVIDIA)


def on_bus(inspection: Inspection, vendor: int) -> tuple[PciDevice, ...]:
    """Return the cards of a vendor that the PCI bus shows, whether or not a driver has them. Intel's graphics inside
    the processor sit on the first bus, and are none."""
    return tuple(
        each
        for each in inspection.pci
        if each.vendor == vendor
        and each.pci_class is not None
        and (each.pci_class >> 16 == _DISPLAY or each.pci_class >> 8 == _ACCELERATOR)
        and not (vendor == INTEL and each.address.partition(":")[2].startswith("00:"))
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


def bridges_are_known(inspection: Inspection, a: str | None, b: str | None) -> bool:
    """Return whether `bridges_between` has them all: both paths were read up to their root ports, or to where they
    meet."""
    one, other = bridges_above(inspection, a), bridges_above(inspection, b)
    return any(each in other for each in one) or all(path and path[-1].parent is None for path in (one, other))


def is_translated(inspection: Inspection, address: str | None) -> bool | None:
    """Return whether an IOMMU translates what a device addresses, None where that was not read.

    The kernel puts every device that an IOMMU is in front of into a group, whose type DMA or DMA-FQ translates and
    identity does not. A device without a group has no IOMMU before it, or one that is off.
    """
    found = device(inspection, address)
    if found is not None and found.iommu_type is not None:
        return found.iommu_type.upper().startswith("DMA")
    if inspection.host.iommu_present is False or (found is not None and found.iommu_group is None):
        return False
    return None


def is_wsl(inspection: Inspection) -> bool:
    """Return whether this is known to be WSL2, where the driver and the board are those of Windows."""
    return inspection.host.wsl is True or inspection.machine.host.virtualisation == "wsl2"


def is_virtual(inspection: Inspection) -> bool | None:
    """Return whether this is a virtual machine (WSL2 is one), None where that cannot be told."""
    kind = inspection.machine.host.virtualisation
    if is_wsl(inspection) or any(card.virtualisation_mode in (1, 2) for card in inspection.cards):
        return True
    return None if kind is None else kind != "none"


def in_container(inspection: Inspection) -> bool:
    """Return whether this is known to be a container."""
    return inspection.machine.host.container not in (None, "none")


def is_passed_on(found: PciDevice) -> bool:
    """Return whether a device is kept for virtual machines on purpose: by a driver of the VFIO family, or by one that
    only holds it."""
    driver = (found.driver or "").lower()
    return "vfio" in driver or driver in ("pci-stub", "pciback", "xen-pciback")


def is_laptop(gpu: Gpu) -> bool:
    """Return whether a card is a laptop's, whose power limit follows its load and temperature. "Max-Q" also names
    workstation cards of lower power, which are no laptop's."""
    name = gpu.name.lower()
    return "laptop" in name or "mobile" in name or ("max-q" in name and "workstation" not in name)


def _pair(a: Gpu, b: Gpu, link: Link | None, peer: PeerAccess | None) -> Pair:
    kind = link.kind if link else "unknown"
    if kind == "unknown" and peer is not None and peer.ancestor is not None:
        kind = _ANCESTORS.get(peer.ancestor, "unknown")
    granted = link.p2p if link else None
    statuses = [number for number in (peer.read, peer.write) if number is not None] if peer else []
    if statuses:
        granted = not any(statuses)
    return Pair(a=a, b=b, kind=kind, granted=granted, status=next(filter(None, statuses), None))
