"""Checks of what kind of machine this is, where that changes what can be judged: virtual machines, LXC, WSL2."""

from __future__ import annotations

import re

from mgpu.doctor import subjects
from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, Skip, check
from mgpu.machine.inspection import Inspection
from mgpu.machine.layout import is_virtual, is_wsl


@check("virtualised", Area.host, "A", about=(subjects.nvidia_card,))
def virtualised(inspection: Inspection, _purpose: Purpose) -> Said:
    """This is a virtual machine, or an LXC container: some readings differ, and some advice would be wrong.

    Read: the processor's hypervisor flag, the board's name and NVML's virtualisation mode.
    Rule: info, once. What the host decides (slots, link speeds, Resizable BAR, IOMMU, ACS) is not judged in here.
    Why: peer access that is missing in a guest comes from its virtual chipset, not from BAR1.
    Do: run mgpu doctor on the host too, and never turn ACS off there while cards are passed through.
    """
    host = inspection.machine.host
    if is_wsl(inspection):
        return
    virtual = is_virtual(inspection)
    if virtual:
        modes = {1: "passthrough", 2: "vGPU"}
        mode = next(
            (modes[card.virtualisation_mode] for card in inspection.cards if card.virtualisation_mode in modes), None
        )
        yield Finding(
            severity=Severity.info,
            summary="a virtual machine: slots, links, IOMMU and ACS are the host's to judge",
            evidence=(
                Evidence(path="virtualisation", value=host.virtualisation or "unknown"),
                *((Evidence(path="NVML virtualisation mode", value=mode),) if mode else ()),
            ),
            fix=("mgpu doctor  # on the host",),
        )
    elif host.container == "lxc":
        yield Finding(
            severity=Severity.info,
            summary="an LXC container: the driver and the devices are the host's",
            evidence=(Evidence(path="container", value="lxc"),),
            fix=("mgpu doctor  # on the host",),
        )
    elif virtual is None:
        yield Skip(reason="whether this is a virtual machine could not be told")


@check("wsl2", Area.host, "A")
def wsl2(inspection: Inspection, purpose: Purpose) -> Said:
    """This is WSL2: cards reach each other only through Windows, and some readings are missing.

    Read: the kernel's name and /dev/dxg.
    Rule: info, because one card works well; warn where a model is to be cut over several, and for a kernel before
    4.19.121, the first with CUDA.
    Why: there is neither peer access nor a topology, and pinned memory may be refused. AMD does not support several
    cards in WSL.
    Do: wsl --update for the kernel; native Linux for several cards.
    """
    if not is_wsl(inspection):
        return
    kernel = inspection.machine.host.kernel or ""
    version = re.match(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?", kernel)
    old = version is not None and tuple(int(part or 0) for part in version.groups()) < (4, 19, 121)
    cutting = (purpose.tensor_parallel or 1) > 1
    said = "its kernel is too old for CUDA" if old else "cards share no peer access, cutting a model is slow"
    yield Finding(
        severity=Severity.warn if old or cutting else Severity.info,
        summary=f"WSL2: {said}",
        evidence=(Evidence(path="/proc/sys/kernel/osrelease", value=kernel or "unknown"),),
        fix=("wsl --update  # in Windows",) if old else ("for several cards: run native Linux",),
    )


CHECKS: tuple[Check, ...] = (virtualised, wsl2)
