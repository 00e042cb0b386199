"""Checks that the NVIDIA driver fits: new enough for the engines, not too new for the cards, and the right module."""

from __future__ import annotations

import re

from mgpu.doctor import subjects
from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, Skip, check
from mgpu.doctor.commands import LAST_BRANCH_FOR_OLD_CARDS, Task, install_driver, steps
from mgpu.doctor.facts import on_pci, seen
from mgpu.machine.inspection import Inspection, InstalledEngine, PciDevice
from mgpu.machine.layout import cards, is_passed_on, nvidia_on_bus

# NVIDIA numbers its chips upwards: the first Maxwell (GM108) is 0x1340, the first Turing (TU102) 0x1e02, the first
# Blackwell (GB100) 0x2901.
_FIRST_MAXWELL, _FIRST_TURING, _FIRST_BLACKWELL = 0x1340, 0x1E00, 0x2900
_WANTS_OPEN = "requires use of the NVIDIA open kernel modules"


@check("driver-too-new-for-gpu", Area.driver, "A", about=(subjects.nvidia,))
def driver_too_new_for_gpu(inspection: Inspection, _purpose: Purpose) -> Said:
    """A Maxwell, Pascal or Volta card with a driver that no longer knows it.

    Read: the card's compute capability (below 7.5) or its number on the PCI bus, and the driver's version.
    Rule: fail from 590 on; info at 580, the last branch for them, so that the next upgrade is not a surprise.
    Why: 590 no longer knows the P40, P100, V100 and GTX 10.
    Do: install 580 and hold its package.
    """
    old_gpus = [gpu.index for gpu in cards(inspection) if (_capability(gpu.compute_capability) or (99,)) < (7, 5)]
    old = [each for each in _own(inspection) if _is_before_turing(each)]
    major = _major(_version(inspection))
    if not old and not old_gpus:
        return
    if major is None:
        yield Skip(reason="the driver's version could not be read")
        return
    evidence = (
        *seen("driver", _version(inspection)),
        *(Evidence(path=on_pci(each.address), value=f"device {each.device or 0:#06x}") for each in old),
    )
    hold = steps(inspection, Task.hold_driver, branch=LAST_BRANCH_FOR_OLD_CARDS)
    if major >= 590:
        closed = install_driver(inspection, branch=LAST_BRANCH_FOR_OLD_CARDS, open_module=False)
        yield Finding(
            severity=Severity.fail,
            summary=f"driver {major} does not support cards before Turing (P40, V100, GTX 10)",
            evidence=evidence,
            fix=tuple(dict.fromkeys((*closed, *hold, "sudo reboot"))),
            gpus=tuple(old_gpus),
        )
    elif major == LAST_BRANCH_FOR_OLD_CARDS:
        yield Finding(
            severity=Severity.info,
            summary="driver 580 is the last that supports these cards: do not upgrade past it",
            evidence=evidence,
            fix=hold,
            gpus=tuple(old_gpus),
        )


@check("driver-too-old", Area.driver, "A", about=(subjects.nvidia_card, subjects.named_engine))
def driver_too_old(inspection: Inspection, purpose: Purpose) -> Said:
    """An engine was built for a newer CUDA than the driver can run.

    Read: the CUDA version that the driver reports, the runtime inside each engine (or the engine of --for), and the
    driver's version.
    Rule: fail below what is needed: 525.60.13 for CUDA 12, 580 for CUDA 13, 550 for Ollama (570 for cards of compute
    capability 5.0 to 6.2).
    Why: on GeForce the engine stops with error 804 or silently uses the processor.
    Do: upgrade the driver, or install the engine's build for an older CUDA.
    """
    installed = [engine for engine in inspection.engines if purpose.backend in (None, engine.backend)]
    wanting = [engine for engine in installed if not engine.cpu_build]
    version = _version(inspection)
    if _numbers(version) is None:
        yield Skip(reason="the driver's version could not be read")
        return
    made_for_cuda = (each for each in wanting if each.backend == "vllm" or each.architectures)
    if unknown := [each.backend for each in made_for_cuda if each.cuda_runtime is None and not each.problem]:
        yield Skip(reason=f"the CUDA version that {' and '.join(unknown)[:60]} was built for could not be read")
    for engine in wanting:
        needed = _least_driver(engine, inspection)
        if needed is None or (_numbers(version) or ()) >= (_numbers(needed) or ()):
            continue
        yield Finding(
            severity=Severity.fail,
            summary=f"{engine.backend} needs driver {needed} or newer; {version} is installed"[:90],
            evidence=(
                *seen("driver", version),
                *seen("CUDA of the driver", _cuda(inspection.driver.cuda_version)),
                *seen(f"CUDA of {engine.backend}", _runtime(engine.cuda_runtime)),
            ),
            fix=(
                *driver_steps(inspection),
                "sudo reboot",
                f"or install a build of {engine.backend} for an older CUDA",
            ),
        )


@check("driver-flavour", Area.driver, "A", about=(subjects.nvidia,))
def driver_flavour(inspection: Inspection, _purpose: Purpose) -> Said:
    """The open kernel module with a card that needs the closed one, or the other way round.

    Read: the module's licence or /proc/driver/nvidia/version, and each card's number on the PCI bus.
    Rule: fail for a card that the module does not take: Blackwell (RTX 50, RTX PRO 6000, B200) runs with the open one
    only; Maxwell, Pascal and Volta with the closed one only. From Turing to Hopper both work.
    Why: such a card never appears. Only the open module can be patched to grant GeForce cards peer access.
    Do: install the other flavour of the driver, then reboot.
    """
    bus = _own(inspection)
    if inspection.driver.nvml_error != 0 or not bus:  # driver-not-loaded says it of a module that no card is left to
        return
    open_module = inspection.driver.open_module
    if open_module is None:
        yield Skip(reason="whether the module is the open or the closed one could not be read")
        return
    wrong = [each for each in bus if needs_other_module(each, inspection)]
    if not wrong:
        return
    now, needed = ("open", "closed") if open_module else ("closed", "open")
    yield Finding(
        severity=Severity.fail,
        summary=f"the {now} NVIDIA module is loaded, but a card here needs the {needed} one",
        evidence=tuple(Evidence(path=on_pci(each.address), value=f"device {each.device or 0:#06x}") for each in wrong),
        fix=(*driver_steps(inspection), "sudo reboot"),
        gpus=tuple(gpu.index for gpu in cards(inspection) if gpu.bus_id in {each.address for each in wrong}),
    )


def driver_steps(inspection: Inspection) -> tuple[str, ...]:
    """Return how the driver is installed that has the cards here: the open module where one needs it, else the closed
    one where a card before Turing needs that or it is loaded now; no branch newer than such a card's last."""
    closed = needs_closed_module(inspection)
    open_module = needs_open_module(inspection) or not (closed or inspection.driver.open_module is False)
    installed = _major(_version(inspection)) or LAST_BRANCH_FOR_OLD_CARDS
    branch = LAST_BRANCH_FOR_OLD_CARDS if closed else max(installed, LAST_BRANCH_FOR_OLD_CARDS)
    return install_driver(inspection, branch=branch, open_module=open_module)


def needs_open_module(inspection: Inspection) -> bool:
    """Return whether a card here runs with the open module only: a Blackwell, or one that the kernel says so of."""
    return any(is_blackwell(each) for each in _own(inspection)) or wants_open_module(inspection)


def needs_closed_module(inspection: Inspection) -> bool:
    """Return whether a card here runs with the closed module only."""
    return any(_is_before_turing(each) for each in _own(inspection))


def wants_open_module(inspection: Inspection) -> bool:
    """Return whether the kernel logged that a card needs the open module."""
    return any(_WANTS_OPEN in entry.text for entry in inspection.host.log)


def is_before_maxwell(device: PciDevice) -> bool:
    """Return whether a card on the bus is a Kepler or older (GT 710, K80), by its number: 470 was the last driver for
    one, and no engine of today runs on it, so that it is nothing but a display."""
    return device.device is not None and device.device < _FIRST_MAXWELL


def is_blackwell(device: PciDevice) -> bool:
    """Return whether a card on the bus is a Blackwell or newer, by its number."""
    return device.device is not None and device.device >= _FIRST_BLACKWELL


def is_too_old(device: PciDevice, inspection: Inspection) -> bool:
    """Return whether the driver has dropped a card on the bus."""
    return _is_before_turing(device) and (_major(_version(inspection)) or 0) >= 590


def needs_other_module(device: PciDevice, inspection: Inspection) -> bool:
    """Return whether a card on the bus cannot run with the module that is loaded, the open or the closed one."""
    open_module = inspection.driver.open_module
    if open_module is None or is_too_old(device, inspection):
        return False
    return _is_before_turing(device) if open_module else is_blackwell(device)


def _own(inspection: Inspection) -> tuple[PciDevice, ...]:
    """The cards on the bus without those that are kept for virtual machines, or too old for any engine."""
    bus = nvidia_on_bus(inspection)
    return tuple(each for each in bus if not (is_passed_on(each) or is_before_maxwell(each)))


def _is_before_turing(device: PciDevice) -> bool:
    return device.device is not None and _FIRST_MAXWELL <= device.device < _FIRST_TURING


def _version(inspection: Inspection) -> str | None:
    driver = inspection.machine.driver
    return (driver.version if driver else None) or inspection.driver.loaded_version or inspection.driver.on_disk_version


def _numbers(version: str | None) -> tuple[int, ...] | None:
    match = re.match(r"[0-9]{1,6}(?:\.[0-9]{1,6}){0,3}", version or "")
    return tuple(int(part) for part in match[0].split(".")) if match else None


def _major(version: str | None) -> int | None:
    numbers = _numbers(version)
    return numbers[0] if numbers else None


def _capability(text: str | None) -> tuple[int, ...] | None:
    return _numbers(text)


def _cuda(version: int | None) -> str | None:
    return None if version is None else f"{version // 1000}.{version % 1000 // 10}"


def _runtime(version: int | None) -> str | None:
    """Of a runtime often no more than its major version is known."""
    return _cuda(version) if version is None or version % 1000 else str(version // 1000)


def _least_driver(engine: InstalledEngine, inspection: Inspection) -> str | None:
    """The least driver for an engine: by its CUDA major version (minor versions run on any driver of the major one)."""
    if engine.backend == "ollama":
        old = any((5, 0) <= (_capability(gpu.compute_capability) or ()) <= (6, 2) for gpu in cards(inspection))
        return "570" if old else "550"
    major = None if engine.cuda_runtime is None else engine.cuda_runtime // 1000
    return {12: "525.60.13", 13: "580"}.get(major or 0)


CHECKS: tuple[Check, ...] = (driver_too_new_for_gpu, driver_too_old, driver_flavour)
