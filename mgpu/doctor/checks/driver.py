"""Checks of the NVIDIA driver: that it is loaded, all of one version, and right for the cards and the engines."""

from __future__ import annotations

from mgpu.doctor import subjects
from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, Skip, check
from mgpu.doctor.checks.driver_fit import (
    driver_steps,
    is_before_maxwell,
    is_blackwell,
    is_too_old,
    needs_other_module,
    wants_open_module,
)
from mgpu.doctor.checks.not_loaded import is_held_by_nouveau, why_not_loaded, without_nouveau
from mgpu.doctor.commands import Task, steps
from mgpu.doctor.facts import is_promised, on_pci, seen, unread
from mgpu.machine.inspection import Inspection, PciDevice
from mgpu.machine.integrated import is_discrete
from mgpu.machine.layout import cards, in_container, is_passed_on, nvidia_on_bus, on_bus
from mgpu.machine.sysfs import AMD, INTEL, NVIDIA

_LIBRARY_MISMATCH, _NOT_LOADED, _NO_LIBRARY, _UNKNOWN = 18, 9, 12, 999
_NO_ANSWER = -1  # as the inspection calls it
_UVM = "/dev/nvidia-uvm"
# Whose cards a driver lists.
_MAKERS = {"NVIDIA": NVIDIA, "AMD": AMD}

_RELOAD = "sudo rmmod nvidia_drm nvidia_modeset nvidia_uvm nvidia && sudo modprobe -a nvidia nvidia_uvm"


@check("no-gpu", Area.gpus, "A")
def no_gpu(inspection: Inspection, _purpose: Purpose) -> Said:
    """No graphics card is in this machine, or none can be seen.

    Read: the PCI bus and the drivers.
    Rule: info, for nothing is broken.
    Why: models then run on the processor, at about a tenth of the speed. A virtual machine or a container sees only the
    cards that it was given.
    Do: see to the card's seat and power, and to the BIOS, if there is one; plan for other machines with --machine.
    """
    refused = inspection.driver.nvml_error not in (None, 0, _NOT_LOADED, _NO_LIBRARY)  # so there is a driver
    if inspection.machine.gpus or nvidia_on_bus(inspection) or is_promised(inspection) or refused:
        return
    if not inspection.pci_known:
        yield Skip(reason="the PCI bus could not be read, so whether a card is there is unknown")
    elif not any(on_bus(inspection, vendor) for vendor in (NVIDIA, AMD, INTEL)):
        yield Finding(
            severity=Severity.info,
            summary="no GPU found: models run on the processor; try others with --machine 2x4090",
            evidence=(Evidence(path="/sys/bus/pci/devices", value="no display controller of NVIDIA, AMD or Intel"),),
            fix=("lspci -nn | grep -Ei 'vga|3d'  # not listed: check the card's seat and power cables",),
        )


@check("driver-lib-mismatch", Area.driver, "A", about=(subjects.nvidia,))
def driver_lib_mismatch(inspection: Inspection, _purpose: Purpose) -> Said:
    """The NVIDIA library and the loaded kernel module are of different versions.

    Read: NVML's refusal to start (error 18), /sys/module/nvidia/version, the library's file name, and the module that
    lies on disk.
    Rule: fail at error 18; warn for a newer module on disk than in memory, because the library belongs to it.
    Why: an unattended update is the usual cause of "it worked yesterday": what runs goes on, what is started anew
    fails.
    Do: reboot, or reload the modules; hold the driver's package if this must not happen again.
    """
    driver = inspection.driver
    if driver.nvml_error == _LIBRARY_MISMATCH:
        yield Finding(
            severity=Severity.fail,
            summary="the NVIDIA library and the loaded module differ: nothing new can start",
            evidence=(
                Evidence(path="nvmlInit", value="18 (driver/library version mismatch)"),
                *seen("/sys/module/nvidia/version", driver.loaded_version),
                *seen("libnvidia-ml.so.1", driver.library_version),
            ),
            fix=("sudo reboot", "or, once all GPU programs are stopped:", _RELOAD),
        )
    elif (
        driver.nvml_error in (_NOT_LOADED, _NO_LIBRARY)
        or inspection.host.wsl
        or not (cards(inspection) or nvidia_on_bus(inspection))
    ):
        return
    elif driver.loaded_version is None:
        yield Skip(reason="/sys/module/nvidia/version could not be read")
    elif driver.on_disk_version is None and driver.library_version is None:
        yield Skip(reason="the installed driver's version could not be read (modinfo -F version nvidia)")
    elif newer := next(
        (each for each in (driver.on_disk_version, driver.library_version) if each and each != driver.loaded_version),
        None,
    ):
        yield Finding(
            severity=Severity.warn,
            summary=f"driver {newer} is installed, but {driver.loaded_version} is still loaded"[:90],
            evidence=(
                *seen("/sys/module/nvidia/version", driver.loaded_version),
                *seen("modinfo -F version nvidia", driver.on_disk_version),
                *seen("libnvidia-ml.so.1", driver.library_version),
            ),
            fix=("sudo reboot",),
        )


@check("driver-not-loaded", Area.driver, "A", about=(subjects.nvidia_or_promised,))
def driver_not_loaded(inspection: Inspection, _purpose: Purpose) -> Said:
    """An NVIDIA card is there, but the NVIDIA driver is not loaded.

    Read: NVML (9: no module, 12: no library), the driver each card is bound to on the PCI bus, what is installed, the
    kernel's log and Secure Boot's state.
    Rule: fail, with the cause named: nouveau holds the card, the kernel refused a module signed with an unknown key,
    the card needs the open module (RTX 50) or the closed one, there is no module for this kernel, or it is merely not
    loaded; a driver that is there and answers with another error fails everywhere. Info where all cards are kept for
    virtual machines (vfio-pci, pci-stub), or are older than Maxwell.
    Why: without it CUDA finds no card. Secure Boot is the cause only where the log says that a key was rejected.
    Do: what the cause asks for; the finding has the commands for this distribution.
    """
    driver, everything = inspection.driver, nvidia_on_bus(inspection)
    bus = tuple(each for each in everything if not is_before_maxwell(each))
    refuses = driver.nvml_error not in (None, _NOT_LOADED, _NO_LIBRARY)  # so there is a driver, whatever the bus says
    if not (everything or refuses or is_promised(inspection)) or driver.nvml_error in (0, _LIBRARY_MISMATCH):
        return
    if everything and not bus and not refuses:
        yield Finding(
            severity=Severity.info,
            summary="the NVIDIA cards here are older than Maxwell: no engine runs on them",
            evidence=tuple(
                Evidence(path=on_pci(each.address), value=f"device {each.device or 0:#06x}") for each in everything
            ),
        )
        return
    if driver.nvml_error is None:
        yield Skip(reason="NVML could not be asked whether the driver is loaded")
        return
    if driver.nvml_error not in (_NOT_LOADED, _NO_LIBRARY):
        if driver.nvml_error != _UNKNOWN or not in_container(inspection):  # container-cgroup-lost says that
            silent = driver.nvml_error == _NO_ANSWER
            said = "it hangs" if silent else f"NVML ends with error {driver.nvml_error}"
            yield Finding(
                severity=Severity.fail,
                summary=f"the NVIDIA driver does not answer: {said}",
                evidence=(Evidence(path="nvmlInit", value=str(driver.nvml_error)),),
                fix=("ls -l /dev/nvidia*  # may this user read and write them?", "sudo reboot"),
            )
        return
    if bus and all(is_too_old(each, inspection) for each in bus):
        return  # driver-too-new-for-gpu says it
    cause, fix = why_not_loaded(inspection, bus)
    yield Finding(
        severity=Severity.info if bus and all(map(is_passed_on, bus)) else Severity.fail,
        summary=f"the NVIDIA driver is not loaded: {cause}",
        evidence=(
            Evidence(path="nvmlInit", value=f"{driver.nvml_error} ({_NVML_WORDS[driver.nvml_error or 0]})"),
            *(Evidence(path=f"{on_pci(each.address)}/driver", value=each.driver or "none") for each in bus),
            *(
                Evidence(path="kernel log", value=entry.text[:120])
                for entry in inspection.host.log
                if entry.kind in ("key", "init")
            ),
            *seen("Secure Boot", "on" if driver.secure_boot else None),
        )[:6],
        fix=fix,
    )


@check("gpu-missing", Area.gpus, "A", about=(subjects.expected_cards,))
def gpu_missing(inspection: Inspection, purpose: Purpose) -> Said:
    """The PCI bus shows more NVIDIA cards than the driver does, or fewer are there than expected.

    Read: the display controllers on the PCI bus, and the cards that the drivers list; in a container the bus is not
    compared.
    Rule: fail for fewer of NVIDIA's than the bus shows; cards kept for virtual machines (vfio-pci, pci-stub) are info.
    Fewer than --expect-gpus (or expect_gpus in ~/.config/mgpu/config.yaml): warn, and fail for none; graphics inside
    the processor and cards that cannot be used do not count.
    Why: RTX 50 cards fail so with "Above 4G Decoding" or Resizable BAR off, or with the closed module; nouveau may hold
    a card; the kernel's log (RmInitAdapter) often says why.
    Do: those two settings in the BIOS, and the driver that the card needs; reseat a card that the bus does not show.
    """
    listed = [gpu for gpu in inspection.machine.gpus if gpu.vendor == "nvidia"]
    yield from _fewer_than_expected(inspection, purpose.expected_gpus or 0)
    if inspection.driver.nvml_error != 0 or in_container(inspection):
        return
    if not inspection.pci_known:
        yield Skip(reason="the PCI bus could not be read, so the driver's cards cannot be counted against it")
        return
    known = {gpu.bus_id for gpu in listed}
    kept = tuple(each for each in nvidia_on_bus(inspection) if is_passed_on(each) and each.address not in known)
    if kept:
        yield Finding(
            severity=Severity.info,
            summary=f"{len(kept)} of the NVIDIA cards {'is' if len(kept) == 1 else 'are'} kept for virtual machines",
            evidence=tuple(
                Evidence(path=f"{on_pci(each.address)}/driver", value=each.driver or "") for each in kept[:4]
            ),
        )
    bus = [
        each
        for each in nvidia_on_bus(inspection)
        if each not in kept
        and not is_before_maxwell(each)
        and not is_too_old(each, inspection)
        and not needs_other_module(each, inspection)
    ]
    if len(listed) >= len(bus):
        return
    missing = tuple(each for each in bus if each.address not in known)
    log = [entry for entry in inspection.host.log if entry.kind == "init"]
    yield Finding(
        severity=Severity.fail,
        summary=f"{len(bus)} NVIDIA cards are on the PCI bus, the driver has only {len(listed)}",
        evidence=(
            *(Evidence(path=on_pci(each.address), value=f"driver {each.driver or 'none'}") for each in missing),
            *(Evidence(path="kernel log", value=entry.text[:120]) for entry in log),
        )[:6],
        fix=_missing_fix(inspection, missing),
    )


def _fewer_than_expected(inspection: Inspection, expected: int) -> Said:
    listed = inspection.machine.gpus
    usable = sum(is_discrete(gpu) and not gpu.problem for gpu in listed if gpu.vendor != "intel")
    here = usable + len(on_bus(inspection, INTEL))  # which engines alone list
    if here >= expected:
        return
    known = {gpu.bus_id for gpu in listed}
    unlisted = {
        maker: sum(each.address not in known for each in on_bus(inspection, vendor))
        for maker, vendor in _MAKERS.items()
    }
    hidden = {maker: count for maker, count in unlisted.items() if count}
    more = sum(hidden.values())
    yield Finding(
        severity=Severity.warn if here else Severity.fail,
        summary=f"{here} GPU{'s' * (here != 1)} can be used, {expected} are expected"
        + (f"; {more} more on the PCI bus without a driver" if more else ""),
        evidence=(
            Evidence(path="mgpu gpus, without integrated ones", value=f"{here} GPU{'s' * (here != 1)}"),
            *(Evidence(path="PCI bus", value=f"{count} more of {maker}") for maker, count in hidden.items()),
        ),
        fix=(
            *(f"lspci -nnk -d {_MAKERS[maker]:04x}:  # which driver has it" for maker in hidden),
            *(
                (r"lspci -nn | grep -E '\[(03..|1200)\]:'  # not listed: check the card's seat and power cables",)
                if here + more < expected
                else ()
            ),
        ),
    )


def _missing_fix(inspection: Inspection, missing: tuple[PciDevice, ...]) -> tuple[str, ...]:
    if is_held_by_nouveau(missing):
        return without_nouveau(inspection)
    if wants_open_module(inspection):
        return (*driver_steps(inspection), "sudo reboot")
    return (
        "BIOS: enable Above 4G Decoding and Re-Size BAR",
        "sudo dmesg | grep -E 'NVRM|RmInitAdapter'  # names the reason; reseat the card if nothing is there",
    )


@check("uvm-missing", Area.driver, "A", about=(subjects.nvidia_card,))
def uvm_missing(inspection: Inspection, _purpose: Purpose) -> Said:
    """/dev/nvidia-uvm is missing: nvidia-smi works, CUDA does not.

    Read: the device nodes, /sys/module/nvidia_uvm and /usr/bin/nvidia-modprobe.
    Rule: fail where nothing would make the node: in a container (LXC without a rule for the device), without a setuid
    nvidia-modprobe, or without the module; info where the first CUDA program makes it.
    Why: NVML does not need the module for unified memory, every CUDA program does; engines then fall back to the
    processor (Ollama's codes 3, 46, 100, 999).
    Do: sudo nvidia-modprobe -c0 -u; in a container, pass the device to it.
    """
    driver = inspection.driver
    if driver.nvml_error != 0 or inspection.host.wsl:
        return
    if driver.uvm_device is None:
        yield Skip(reason=f"whether {_UVM} exists could not be read")
    elif not driver.uvm_device:
        made = _is_made_on_use(inspection)
        if made is None:
            yield Skip(reason=f"{_UVM} is missing, and whether nvidia-modprobe would make it could not be read")
            return
        loaded = {True: "loaded", False: "not loaded"}.get(driver.uvm_loaded) if driver.uvm_loaded is not None else None
        setuid = {True: "setuid", False: "absent, or not setuid"}.get(bool(driver.node_maker))
        yield Finding(
            severity=Severity.info if made else Severity.fail,
            summary=f"{_UVM} is missing: the first CUDA program makes it"
            if made
            else f"{_UVM} is missing: CUDA cannot start, though nvidia-smi works",
            evidence=(
                Evidence(path=_UVM, value="missing"),
                *seen("/sys/module/nvidia_uvm", loaded),
                *(() if in_container(inspection) else seen("/usr/bin/nvidia-modprobe", setuid)),
            ),
            fix=_node_fix(inspection, made=made),
        )


def _is_made_on_use(inspection: Inspection) -> bool | None:
    """Whether the driver's own helper makes the node once a program needs it."""
    driver = inspection.driver
    module = True if driver.uvm_loaded else driver.uvm_on_disk
    if in_container(inspection) or driver.node_maker is False or module is False:
        return False
    return None if driver.node_maker is None or module is None else True


def _node_fix(inspection: Inspection, *, made: bool) -> tuple[str, ...]:
    if in_container(inspection):
        return (f"pass {_UVM} to the container",)
    if made:
        return ("sudo nvidia-modprobe -c0 -u  # to have it now",)
    if not inspection.driver.uvm_loaded and inspection.driver.uvm_on_disk is False:
        return (*steps(inspection, Task.build_module), "sudo reboot")
    return (
        "sudo modprobe nvidia_uvm",
        "sudo mknod -m 666 /dev/nvidia-uvm c $(awk '$2 == \"nvidia-uvm\" {print $1}' /proc/devices) 0",
        "install nvidia-modprobe, setuid root: it makes the nodes at every start",
    )


@check("hmm-kaslr", Area.driver, "A", about=(subjects.nvidia_card,))
def hmm_kaslr(inspection: Inspection, _purpose: Purpose) -> Said:
    """CUDA cannot start because shared memory management collides with the kernel's random layout.

    Read: the kernel's log: uvm_pmm_gpu.c fails in devmem_alloc_pagemap with error -34.
    Rule: fail where the line is there and HMM is still on.
    Why: several Blackwell cards need more addresses than the kernel's randomised layout leaves.
    Do: turn HMM off for the module nvidia_uvm (uvm_disable_hmm=1).
    """
    if inspection.driver.uvm_disable_hmm:
        return
    lines = [entry for entry in inspection.host.log if entry.kind == "hmm"]
    if lines:
        yield Finding(
            severity=Severity.fail,
            summary="CUDA cannot start: HMM and the kernel's random layout collide",
            evidence=(
                Evidence(path="kernel log", value=lines[-1].text[:120]),
                *seen("uvm_disable_hmm", {False: "N"}.get(bool(inspection.driver.uvm_disable_hmm))),
            ),
            fix=(
                *steps(inspection, Task.module_option, module="nvidia_uvm", option="uvm_disable_hmm=1"),
                "sudo rmmod nvidia_uvm && sudo modprobe nvidia_uvm",
            ),
        )
    elif not inspection.host.log_known and any(is_blackwell(each) for each in nvidia_on_bus(inspection)):
        yield unread(inspection, "the kernel's log", "kmsg")


_NVML_WORDS = {_NOT_LOADED: "driver not loaded", _NO_LIBRARY: "library not found"}


CHECKS: tuple[Check, ...] = (
    driver_lib_mismatch,
    driver_not_loaded,
    uvm_missing,
    hmm_kaslr,
    no_gpu,
    gpu_missing,
)
