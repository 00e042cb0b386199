"""Bridges of a chipset, whose few lanes to the processor all that hangs on it shares."""

from __future__ import annotations

from mgpu.machine.inspection import Inspection, PciDevice
from mgpu.machine.layout import bridges_above
from mgpu.machine.sysfs import INTEL

_AMD, _ASMEDIA = 0x1022, 0x1B21
# AMD's chipsets since the 300 series are a switch, Promontory (the 600 series' is 43f4 and 43f5); those before are 43a0
# to 43a3. ASMedia, who made them, has sold the first under its own number too.
_AMD_DEVICES = range(0x4300, 0x4400)
# Up to the 500 series Intel's root ports of the chipset are known by their place. Those of the 600, 700 and 800 series
# have one number for each of up to 28 ports; the 800 series' are on bus 80. AE4D, beside them, is the processor's own
# port for the card.
_INTEL_PORTS = (range(0x7AB0, 0x7ACC), range(0x7A30, 0x7A4C), range(0x7F30, 0x7F4C))
_INTEL_PLACES = ("0000:00:1a.", "0000:00:1b.", "0000:00:1c.", "0000:00:1d.")


def chipset_bridge(inspection: Inspection, address: str | None) -> PciDevice | None:
    """Return the nearest bridge of a chipset above a device, None where all its lanes are the processor's or where the
    bridges were not read."""
    return next(filter(is_of_chipset, bridges_above(inspection, address)), None)


def is_of_chipset(bridge: PciDevice) -> bool:
    """Return whether a bridge is a chipset's: AMD's, ASMedia's or Intel's, by the numbers in the PCI ID list. Switches
    of PLX and Broadcom are none, and neither are the processor's own ports."""
    if bridge.vendor == INTEL:
        known = any(bridge.device in ports for ports in _INTEL_PORTS)
        return known or bridge.address.startswith(_INTEL_PLACES)
    return bridge.vendor == _ASMEDIA or (bridge.vendor == _AMD and bridge.device in _AMD_DEVICES)
