"""Why the NVIDIA driver is not loaded, or does not have a card; and what to do, in an order that works."""

from __future__ import annotations

from mgpu.doctor.checks.driver_fit import driver_steps, needs_closed_module, needs_open_module, wants_open_module
from mgpu.doctor.commands import Task, steps
from mgpu.machine.inspection import Inspection, PciDevice
from mgpu.machine.layout import in_container, is_passed_on

_NO_LIBRARY = 12
_REBOOT = "sudo reboot"
_NOUVEAU = "nouveau"


def why_not_loaded(inspection: Inspection, bus: tuple[PciDevice, ...]) -> tuple[str, tuple[str, ...]]:
    """Return the cause in a few words, and what to do. `bus` are the cards on it."""
    driver = inspection.driver
    wanted = tuple(each for each in bus if not is_passed_on(each))
    if in_container(inspection):
        return "the container was not given it", ("docker run --gpus all IMAGE", "mgpu doctor  # on the host")
    if bus and not wanted:
        return "the cards are kept for virtual machines", (
            "to use them here: remove their ids from vfio-pci (/etc/modprobe.d, vfio-pci.ids= of the kernel), reboot",
        )
    installed = driver.on_disk or driver.on_disk_version is not None
    library = driver.nvml_error != _NO_LIBRARY or driver.library_version is not None
    if is_held_by_nouveau(wanted):
        missing = "" if installed or library or driver.on_disk is None else ", and NVIDIA's is not installed"
        return f"nouveau holds the card{missing}", without_nouveau(inspection)
    if any(entry.kind == "key" for entry in inspection.host.log):
        if driver.secure_boot is False:
            return "the kernel refused its signature", (
                "take module.sig_enforce from the kernel's command line, or sign the module with a known key; reboot",
            )
        return "Secure Boot refused its signature", steps(inspection, Task.enrol_key)
    if not installed:
        if library:
            return "no module for this kernel", (*steps(inspection, Task.build_module), _REBOOT)
        return "no NVIDIA driver is installed", (*driver_steps(inspection), _REBOOT)
    other = _other_module(inspection)
    if other is not None:
        return other, (*driver_steps(inspection), _REBOOT)
    load = "sudo modprobe nvidia && sudo nvidia-modprobe -c0 -u"
    if not driver.secure_boot:
        return "its module is installed, but not loaded", (load,)
    return "its module is installed, but not loaded", (
        load,
        'if that says "Key was rejected by service", it is Secure Boot that refuses the module; then:',
        *steps(inspection, Task.enrol_key),
    )


def is_held_by_nouveau(bus: tuple[PciDevice, ...]) -> bool:
    """Return whether nouveau has one of the cards."""
    return any(each.driver == _NOUVEAU for each in bus)


def without_nouveau(inspection: Inspection) -> tuple[str, ...]:
    """Return how nouveau is kept from the cards: NVIDIA's driver first, for without either the screen stays dark."""
    driver = inspection.driver
    first: tuple[str, ...] = ()
    if not (driver.on_disk or driver.on_disk_version or driver.loaded_version):
        library = driver.on_disk is False and driver.nvml_error != _NO_LIBRARY
        first = steps(inspection, Task.build_module) if library else driver_steps(inspection)
    return (
        *first,
        *steps(inspection, Task.blacklist, module=_NOUVEAU),
        *steps(inspection, Task.update_initramfs),
        _REBOOT,
    )


def _other_module(inspection: Inspection) -> str | None:
    """Whether a card needs the open module, or the closed one, and that is not the one on disk, in a few words."""
    driver = inspection.driver
    is_open = driver.open_module if driver.open_module is not None else driver.on_disk_open
    if needs_closed_module(inspection) and is_open:
        return "this card needs the closed module, not the open one"
    if is_open or not needs_open_module(inspection):
        return None
    if is_open is False or wants_open_module(inspection):
        return "this card needs the open module, not the closed one"
    return "its module does not load; this card needs the open one"
