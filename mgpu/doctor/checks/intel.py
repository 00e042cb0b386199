"""Checks of Intel's cards (Arc and Data Center GPU), which are told from integrated graphics by their bus."""

from __future__ import annotations

from mgpu.doctor import subjects
from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, check
from mgpu.doctor.facts import unread
from mgpu.machine.inspection import Inspection, PciDevice
from mgpu.machine.layout import in_container, is_virtual, on_bus
from mgpu.machine.sysfs import INTEL
from mgpu.units import MIB, gib

_DRIVERS = ("i915", "xe")
_SMALL_BAR_BYTES = 256 * MIB


@check("intel-xe", Area.intel, "A", about=(subjects.intel,))
def intel_xe(inspection: Inspection, _purpose: Purpose) -> Said:
    """An Intel card without a driver, without access, or whose memory the processor sees through a small window.

    Read: the driver that is bound, the largest memory region in /sys/bus/pci/devices/*/resource, whether
    /dev/dri/renderD* may be opened, and ONEAPI_DEVICE_SELECTOR.
    Rule: fail when neither i915 nor xe has the card (info when it is handed to a virtual machine), or when the render
    node may not be opened; warn when the region is 256 MiB or less on bare metal; info for several cards without
    ONEAPI_DEVICE_SELECTOR.
    Why: Arc needs Resizable BAR: without, every copy is cut into small windows. llama.cpp cuts over
    Arc by whole layers alone. Whether peers behind different root ports reach each other is not judged: that is up to a
    list of host bridges inside the kernel, which it shows to nobody.
    Do: Re-Size BAR and Above 4G Decoding in the BIOS; sudo usermod -aG render $USER.
    """
    cards = on_bus(inspection, INTEL)
    unbound = [each for each in cards if each.driver not in _DRIVERS]
    for each in unbound:
        passed_on = each.driver == "vfio-pci"
        yield Finding(
            severity=Severity.info if passed_on else Severity.fail,
            summary=f"the Intel card {each.address} is handed to a virtual machine"
            if passed_on
            else f"no driver has the Intel card {each.address}",
            evidence=(Evidence(path=f"/sys/bus/pci/devices/{each.address}/driver", value=each.driver or "none"),),
            fix=() if passed_on else ("sudo modprobe xe", "Arc B-series need Linux 6.12 or later"),
            needs_root=not passed_on,
        )
    driven = [each for each in cards if each not in unbound]
    if not driven:
        return
    yield from _access(inspection)
    if not is_virtual(inspection):  # a guest has no BIOS to change, and its windows tell nothing
        yield from _windows(inspection, driven)
    environment = dict(inspection.host.environment)
    if len(driven) > 1 and "ONEAPI_DEVICE_SELECTOR" not in environment:
        yield Finding(
            severity=Severity.info,
            summary="several Intel cards: some builds crash without ONEAPI_DEVICE_SELECTOR",
            evidence=(Evidence(path="ONEAPI_DEVICE_SELECTOR", value="not set"),),
            fix=("export ONEAPI_DEVICE_SELECTOR='level_zero:*'",),
        )


def _access(inspection: Inspection) -> Said:
    accessible = inspection.intel.render_accessible
    if accessible is None:
        yield unread(inspection, "access to /dev/dri/renderD*", "dri")
    elif not accessible:
        yield Finding(
            severity=Severity.fail,
            summary="you may not open /dev/dri/renderD*, so engines see no Intel card",
            evidence=(Evidence(path="/dev/dri/renderD*", value="permission denied"),),
            fix=("docker run --device /dev/dri IMAGE",)
            if in_container(inspection)
            else ("sudo usermod -aG render $USER", "log out and in again"),
            needs_root=True,
        )


def _windows(inspection: Inspection, driven: list[PciDevice]) -> Said:
    small = [each for each in driven if each.bar_bytes is not None and each.bar_bytes <= _SMALL_BAR_BYTES]
    if small:
        which = f"the Intel card {small[0].address} is" if len(small) == 1 else f"{len(small)} Intel cards is"
        yield Finding(
            severity=Severity.warn,
            summary=f"the memory of {which} seen through {gib(max(each.bar_bytes or 0 for each in small))}",
            evidence=tuple(
                Evidence(path=f"/sys/bus/pci/devices/{each.address}/resource", value=gib(each.bar_bytes or 0))
                for each in small
            ),
            fix=("BIOS: Above 4G Decoding = Enabled, Re-Size BAR Support = Enabled",),
        )
    if unknown := [each.address for each in driven if each.bar_bytes is None]:
        yield unread(inspection, f"the memory regions of {', '.join(unknown)}", "resource")


CHECKS: tuple[Check, ...] = (intel_xe,)
