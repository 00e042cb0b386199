"""Checks that the NVIDIA driver fits: new enough for the engines, not too new for the cards, and the right module."""

from __future__ import annotations

import re

from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, Skip, check
from mgpu.machine.inspection import Inspection, InstalledEngine, PciDevice
from mgpu.machine.layout import cards, nvidia_on_bus

_NOT_LOADED = 9

# NVIDIA numbers its chips upwards: TU102, the first Turing, is 0x1e02; GB100, the first Blackwell, is 0x2901.
_FIRST_TURING, _FIRST_BLACKWELL = 0x1E00, 0x2900
_LAST_FOR_OLD_CARDS = 580


@check("driver-too-new-for-gpu", Area.driver, "A")
def driver_too_new_for_gpu(inspection: Inspection, _purpose: Purpose) -> Said:
    """A Maxwell, Pascal or Volta card with a driver that no longer knows it.

    Read from the card's compute capability (below 7.5) or its number on the PCI bus, and the driver's version. From
    590 on such cards are gone (P40, P100, V100, GTX 10): a failure. At 580, the last branch for them, it is only said,
    so that the next upgrade is not a surprise. Hold 580.
    """
    old_gpus = [gpu.index for gpu in cards(inspection) if (_capability(gpu.compute_capability) or (99,)) < (7, 5)]
    old = [each for each in nvidia_on_bus(inspection) if _is_before_turing(each) and each.driver != "vfio-pci"]
    major = _major(_version(inspection))
    if not old and not old_gpus:
        return
    if major is None:
        yield Skip(reason="the driver's version could not be read")
        return
    evidence = (
        *_seen("driver", _version(inspection)),
        *(Evidence(path=_pci(each), value=f"device {each.device:#06x}") for each in old if each.device is not None),
    )
    hold = f"sudo apt-mark hold nvidia-driver-{_LAST_FOR_OLD_CARDS}"
    if major >= 590:
        yield Finding(
            severity=Severity.fail,
            summary=f"driver {major} does not support cards before Turing (P40, V100, GTX 10)",
            evidence=evidence,
            fix=(f"sudo apt install nvidia-driver-{_LAST_FOR_OLD_CARDS} && {hold}", "Arch: install nvidia-580xx-dkms"),
            gpus=tuple(old_gpus),
        )
    elif major == _LAST_FOR_OLD_CARDS:
        yield Finding(
            severity=Severity.info,
            summary="driver 580 is the last that supports these cards: do not upgrade past it",
            evidence=evidence,
            fix=(hold,),
            gpus=tuple(old_gpus),
        )


@check("driver-too-old", Area.driver, "A")
def driver_too_old(inspection: Inspection, purpose: Purpose) -> Said:
    """An engine was built for a newer CUDA than the driver can run.

    Compares the CUDA version that the driver reports with the runtime inside each engine (or the engine of --for), and
    the driver's version with the least that is needed: 525.60.13 for CUDA 12, 580 for CUDA 13, 550 for Ollama (570 for
    cards of compute capability 5.0 to 6.2). A failure: on GeForce the engine stops with error 804 or silently uses the
    processor. Upgrade the driver, or install the engine's build for an older CUDA.
    """
    installed = [engine for engine in inspection.engines if purpose.backend in (None, engine.backend)]
    wanting = [engine for engine in installed if not engine.cpu_build]
    if not wanting or not cards(inspection):
        return
    version = _version(inspection)
    if _numbers(version) is None:
        yield Skip(reason="the driver's version could not be read")
        return
    if any(engine.backend == "vllm" and engine.cuda_runtime is None for engine in wanting):
        yield Skip(reason="the CUDA version that vLLM was built for could not be read")
    for engine in wanting:
        needed = _least_driver(engine, inspection)
        if needed is None or (_numbers(version) or ()) >= (_numbers(needed) or ()):
            continue
        yield Finding(
            severity=Severity.fail,
            summary=f"{engine.backend} needs driver {needed} or newer; {version} is installed"[:90],
            evidence=(
                *_seen("driver", version),
                *_seen("CUDA of the driver", _cuda(inspection.driver.cuda_version)),
                *_seen(f"CUDA of {engine.backend}", _cuda(engine.cuda_runtime)),
            ),
            fix=(
                f"sudo apt install nvidia-driver-{max(_major(needed) or 0, _LAST_FOR_OLD_CARDS)} && sudo reboot",
                f"or install a build of {engine.backend} for an older CUDA",
            ),
        )


@check("driver-flavour", Area.driver, "A")
def driver_flavour(inspection: Inspection, _purpose: Purpose) -> Said:
    """The open kernel module with a card that needs the closed one, or the other way round.

    Read from the module's licence or /proc/driver/nvidia/version, and each card's number on the PCI bus. Blackwell (RTX
    50, RTX PRO 6000, B200) runs with the open module only; Maxwell, Pascal and Volta with the closed one only. The
    wrong one is a failure: such a card never appears. From Turing to Hopper both work, and only the open one can be
    patched to grant GeForce cards peer access.
    """
    bus = [each for each in nvidia_on_bus(inspection) if each.driver != "vfio-pci"]
    if inspection.driver.nvml_error not in (0, _NOT_LOADED) or not bus:
        return
    open_module = inspection.driver.open_module
    if open_module is None:
        if inspection.driver.nvml_error == 0:
            yield Skip(reason="whether the module is the open or the closed one could not be read")
        return
    wrong = [each for each in bus if needs_other_module(each, inspection)]
    if not wrong:
        return
    major = _major(_version(inspection)) or _LAST_FOR_OLD_CARDS
    now, needed = ("open", "closed") if open_module else ("closed", "open")
    package = f"nvidia-driver-{major}" + ("" if open_module else "-open")
    yield Finding(
        severity=Severity.fail,
        summary=f"the {now} NVIDIA module is loaded, but a card here needs the {needed} one",
        evidence=tuple(Evidence(path=_pci(each), value=f"device {each.device or 0:#06x}") for each in wrong),
        fix=(f"sudo apt install {package} && sudo reboot",),
        gpus=tuple(gpu.index for gpu in cards(inspection) if gpu.bus_id in {each.address for each in wrong}),
    )


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


def _is_before_turing(device: PciDevice) -> bool:
    return device.device is not None and device.device < _FIRST_TURING


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


def _least_driver(engine: InstalledEngine, inspection: Inspection) -> str | None:
    """The least driver for an engine: by its CUDA major version (minor versions run on any driver of the major one)."""
    if engine.backend == "ollama":
        old = any((5, 0) <= (_capability(gpu.compute_capability) or ()) <= (6, 2) for gpu in cards(inspection))
        return "570" if old else "550"
    major = None if engine.cuda_runtime is None else engine.cuda_runtime // 1000
    return {12: "525.60.13", 13: "580"}.get(major or 0)


def _pci(device: PciDevice) -> str:
    return f"/sys/bus/pci/devices/{device.address}"


def _seen(path: str, value: str | None) -> tuple[Evidence, ...]:
    return () if value is None else (Evidence(path=path, value=value),)


CHECKS: tuple[Check, ...] = (driver_too_new_for_gpu, driver_too_old, driver_flavour)
