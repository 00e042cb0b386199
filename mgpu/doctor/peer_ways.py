"""What lies in the way of peer access over PCIe (an IOMMU that translates, bridges that redirect), and what to do."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from mgpu.doctor.check import Evidence
from mgpu.doctor.commands import Task, steps
from mgpu.doctor.facts import named, on_pci
from mgpu.machine.inspection import Inspection, PciDevice
from mgpu.machine.layout import Pair, bridges_are_known, bridges_between, device

_REQUEST_REDIRECT, _COMPLETION_REDIRECT = 0x04, 0x08
_PASS_THROUGH = ("iommu=pt", "iommu.passthrough=1")


def untranslated(inspection: Inspection) -> tuple[str, ...]:
    """Return how the IOMMU is kept from translating, the reboot last. Where the kernel was already told to
    (`iommu=pt`), that is said, and what else there is."""
    told = (inspection.host.kernel_command_line or "").split()
    present = [option for option in _PASS_THROUGH if option in told]
    if not present:
        return steps(inspection, Task.kernel_option, option=_PASS_THROUGH[0])
    off = f"{present[0]} is set, yet it translates: turn the IOMMU off in the BIOS (AMD-Vi, VT-d), or another way:"
    if len(present) == len(_PASS_THROUGH):
        return (off.removesuffix(", or another way:"),)
    other = next(option for option in _PASS_THROUGH if option not in told)
    return (off, *steps(inspection, Task.kernel_option, option=other))


def is_redirected(inspection: Inspection, pair: Pair) -> bool | None:
    """Return whether a bridge between two cards sends their traffic through the root; None where that is unread."""
    ends = pair.a.bus_id, pair.b.bus_id
    known = [_redirects(bridge) for bridge in bridges_between(inspection, *ends)]
    return either(known if known and bridges_are_known(inspection, *ends) else (*known, None))


def _redirects(bridge: PciDevice) -> bool | None:
    if bridge.acs is not None:
        return bool(bridge.acs & (_REQUEST_REDIRECT | _COMPLETION_REDIRECT))
    return False if bridge.acs_known else None


def either(answers: Iterable[bool | None]) -> bool | None:
    """Return the logical or of three-valued answers."""
    known = list(answers)
    return True if True in known else None if None in known else False


def acs_off(inspection: Inspection, found: list[Pair]) -> tuple[str, ...]:
    """Return the command for every bridge that redirects, and the lasting step; none where vfio relies on them."""
    if inspection.host.vfio_in_use is None:
        return ("BIOS: ACS off, unless a virtual machine has a card of this one (that could not be read)",)
    if inspection.host.vfio_in_use:
        return ("ACS stays on: vfio is in use here, and virtual machines rely on it",)
    addresses = {
        bridge.address
        for pair in found
        for bridge in bridges_between(inspection, pair.a.bus_id, pair.b.bus_id)
        if _redirects(bridge)
    }
    commands = (f"sudo setpci -s {address} ECAP_ACS+6.w=0000  # until the reboot" for address in sorted(addresses))
    return (*commands, "BIOS: turn ACS off, which lasts")


def acs_words(inspection: Inspection, pair: Pair) -> tuple[Evidence, ...]:
    """Return the ACS control words of the bridges between two cards that redirect."""
    bridges = bridges_between(inspection, pair.a.bus_id, pair.b.bus_id)
    return tuple(
        Evidence(path=f"ACS control of {bridge.address}", value=f"{bridge.acs:#06x}")
        for bridge in bridges
        if bridge.acs is not None and _redirects(bridge)
    )


def between(found: Sequence[Pair]) -> str:
    """Return the cards of pairs as a summary names them, with the sides that the pairs join: "GPU0,1 and GPU2,3"; all
    in one ("GPU0,1,2") where each has a pair with each, or there are no clear sides."""
    crossing = {frozenset(pair.indices) for pair in found}
    members = sorted(frozenset().union(*crossing))
    sides: list[list[int]] = []
    for index in members:
        side = next((each for each in sides if not any(frozenset((index, other)) in crossing for other in each)), None)
        if side is None:
            sides.append([index])
        else:
            side.append(index)
    across = sum(len(a) * len(b) for a, b in itertools.combinations(sides, 2))
    if len(sides) == len(members) or across != len(crossing):
        return named(members)
    return " and ".join(map(named, sides))


def group_types(inspection: Inspection, pair: Pair) -> tuple[Evidence, ...]:
    """Return the types of the IOMMU groups of two cards."""
    return tuple(
        Evidence(path=f"{on_pci(gpu.bus_id)}/iommu_group/type", value=group_type(inspection, gpu.bus_id))
        for gpu in (pair.a, pair.b)
    )


def group_type(inspection: Inspection, bus_id: str | None) -> str:
    """Return the type of a card's IOMMU group in a word, "unknown" where it is unread."""
    found = device(inspection, bus_id)
    return (found.iommu_type if found else None) or "unknown"
