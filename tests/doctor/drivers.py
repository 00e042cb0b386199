"""Machines whose driver is absent, or has fewer cards than the bus, and what the kernel logged."""

from __future__ import annotations

from typing import Any

from mgpu.machine.inspection import Inspection, InstalledEngine, LogEntry, PciDevice
from mgpu.machine.snapshot import Gpu
from tests.doctor.inspections import changed, changed_machine, changed_pci, healthy

GT_710 = 0x128B
P40, RTX_5090 = "Tesla P40", "NVIDIA GeForce RTX 5090"


def undriven(cards: int = 1, name: str = "NVIDIA GeForce RTX 4090", **driver: Any) -> Inspection:
    """Cards on the bus that no driver has."""
    there = changed_pci(healthy(cards, name), driver=None)
    unread = {
        "nvml_error": 9,
        "loaded_version": None,
        "library_version": None,
        "on_disk_version": None,
        "on_disk": False,
        "open_module": None,
    }
    there = changed(there, driver={**unread, **driver}, cards=(), peers=())
    return changed_machine(there, gpus=(), links=(), driver=None)


def without_last(inspection: Inspection) -> Inspection:
    """The same bus, and one card fewer that the driver has."""
    fewer = changed_machine(inspection, gpus=inspection.machine.gpus[:-1], links=())
    return changed(fewer, cards=inspection.cards[:-1], peers=())


def version(inspection: Inspection, text: str | None) -> Inspection:
    versions = {"loaded_version": text, "library_version": text, "on_disk_version": text}
    return changed_machine(changed(inspection, driver=versions), driver={"version": text})


def engine(backend: str = "vllm", cuda: int | None = 13000, **facts: Any) -> tuple[InstalledEngine, ...]:
    return (InstalledEngine(backend=backend, cuda_runtime=cuda, **facts),)


def without_node(**driver: Any) -> Inspection:
    return healthy(driver={"uvm_device": False, **driver})


def kepler(**driver: Any) -> Inspection:
    """A GT 710 that nouveau has, and nothing else."""
    return changed_pci(undriven(**driver), "0000:10:00.0", driver="nouveau", device=GT_710)


def beside_kepler(inspection: Inspection) -> Inspection:
    card = PciDevice(address="0000:90:00.0", vendor=0x10DE, device=GT_710, pci_class=0x030000, driver="nouveau")
    return changed(inspection, pci=(*inspection.pci, card))


def with_graphics(inspection: Inspection) -> Inspection:
    inside = Gpu(index=9, vendor="amd", name="AMD Radeon Graphics", integrated=True)
    return changed_machine(inspection, gpus=(*inspection.machine.gpus, inside))


def logged(kind: str, text: str = "NVRM: it went wrong") -> dict[str, Any]:
    return {"log": (LogEntry(kind=kind, text=text, age_s=60.0),)}


DISPLAY_CHIP = PciDevice(address="0000:03:00.0", vendor=0x1A03, device=0x2000, pci_class=0x030000)
AMD_CARD = PciDevice(address="0000:03:00.0", vendor=0x1002, device=0x744C, pci_class=0x030000)
IN_PROCESSOR = PciDevice(address="0000:00:02.0", vendor=0x8086, device=0xA780, pci_class=0x030000)
PORT = PciDevice(address="0000:00:01.0", vendor=0x8086, device=0x460D, pci_class=0x060400)
WANTS_OPEN = "NVRM: installed in this system requires use of the NVIDIA open kernel modules."
IN_DOCKER = {"visible_devices": "all"}
