"""Checks of the NVIDIA driver: that it is loaded, all of one version, and right for the cards and the engines."""

from __future__ import annotations

from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, Skip, check
from mgpu.doctor.checks.driver_fit import is_blackwell, is_too_old, needs_other_module
from mgpu.machine.inspection import Inspection, PciDevice
from mgpu.machine.layout import cards, in_container, nvidia_on_bus

_LIBRARY_MISMATCH, _NOT_LOADED, _NO_LIBRARY, _UNKNOWN = 18, 9, 12, 999
_NO_ANSWER = -1  # as the inspection calls it

_RELOAD = "sudo rmmod nvidia_drm nvidia_modeset nvidia_uvm nvidia && sudo modprobe nvidia nvidia_uvm"


@check("no-gpu", Area.gpus, "A")
def no_gpu(inspection: Inspection, _purpose: Purpose) -> Said:
    """No graphics card is in this machine, or none can be seen.

    Read from the PCI bus and from the drivers. Nothing is broken: models then run on the processor, at about a tenth
    of the speed, and plans can be made for other machines with --machine. If there is a card, it is not seated, has
    no power, or is turned off in the BIOS; a virtual machine or a container sees only the cards that it was given.
    """
    refused = inspection.driver.nvml_error not in (None, 0, _NOT_LOADED, _NO_LIBRARY)  # so there is a driver
    if inspection.machine.gpus or nvidia_on_bus(inspection) or _promised(inspection) or refused:
        return
    if not inspection.pci_known:
        yield Skip(reason="the PCI bus could not be read, so whether a card is there is unknown")
    elif not any(_is_card(each) for each in inspection.pci):
        yield Finding(
            severity=Severity.info,
            summary="no GPU found: models run on the processor; try others with --machine 2x4090",
            evidence=(Evidence(path="/sys/bus/pci/devices", value="no display controller of NVIDIA, AMD or Intel"),),
            fix=("lspci -nn | grep -Ei 'vga|3d'  # not listed: check the card's seat and power cables",),
        )


@check("driver-lib-mismatch", Area.driver, "A")
def driver_lib_mismatch(inspection: Inspection, _purpose: Purpose) -> Said:
    """The NVIDIA library and the loaded kernel module are of different versions.

    Read from NVML's refusal to start (error 18), /sys/module/nvidia/version, the library's file name, and the module
    that lies on disk. Error 18 is a failure; a newer module on disk than in memory is a warning, because the library
    belongs to it. An unattended update is the usual cause of "it worked yesterday": what runs goes on, what is started
    anew fails. Reboot, or reload the modules, and hold the driver's package if this must not happen again.
    """
    driver = inspection.driver
    if driver.nvml_error == _LIBRARY_MISMATCH:
        yield Finding(
            severity=Severity.fail,
            summary="the NVIDIA library and the loaded module differ: nothing new can start",
            evidence=(
                Evidence(path="nvmlInit", value="18 (driver/library version mismatch)"),
                *_seen("/sys/module/nvidia/version", driver.loaded_version),
                *_seen("libnvidia-ml.so.1", driver.library_version),
            ),
            fix=("sudo reboot", f"{_RELOAD}  # instead, once all GPU programs are stopped"),
        )
    elif not _nvidia(inspection) or driver.nvml_error in (_NOT_LOADED, _NO_LIBRARY) or inspection.host.wsl:
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
                *_seen("/sys/module/nvidia/version", driver.loaded_version),
                *_seen("modinfo -F version nvidia", driver.on_disk_version),
                *_seen("libnvidia-ml.so.1", driver.library_version),
            ),
            fix=("sudo reboot",),
        )


@check("driver-not-loaded", Area.driver, "A")
def driver_not_loaded(inspection: Inspection, _purpose: Purpose) -> Said:
    """An NVIDIA card is there, but the NVIDIA driver is not loaded.

    Read from NVML (9: no module, 12: no library), the driver each card is bound to on the PCI bus, the kernel's log and
    Secure Boot's state. A failure, with the cause named: nouveau holds the card, vfio-pci keeps it for virtual
    machines, Secure Boot refused a module signed with an unknown key, there is no module for this kernel, or it is
    merely not loaded. Without any card on the bus this is no finding; a driver that is there and answers with another
    error is a failure everywhere.
    """
    driver, bus = inspection.driver, nvidia_on_bus(inspection)
    refuses = driver.nvml_error not in (None, _NOT_LOADED, _NO_LIBRARY)  # so there is a driver, whatever the bus says
    if not (bus or refuses or _promised(inspection)) or driver.nvml_error in (0, _LIBRARY_MISMATCH):
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
    cause, fix = _why_not_loaded(inspection, bus)
    yield Finding(
        severity=Severity.fail,
        summary=f"the NVIDIA driver is not loaded: {cause}",
        evidence=(
            Evidence(path="nvmlInit", value=f"{driver.nvml_error} ({_NVML_WORDS[driver.nvml_error or 0]})"),
            *(Evidence(path=f"{_pci(each)}/driver", value=each.driver or "none") for each in bus),
            *(
                Evidence(path="kernel log", value=entry.text[:120])
                for entry in inspection.host.log
                if entry.kind == "key"
            ),
        )[:6],
        fix=fix,
    )


@check("gpu-missing", Area.gpus, "A")
def gpu_missing(inspection: Inspection, purpose: Purpose) -> Said:
    """The PCI bus shows more NVIDIA cards than the driver does, or fewer are there than expected.

    Compares the display controllers of NVIDIA on the bus with the cards that NVML lists; cards kept for virtual
    machines (vfio-pci) do not count, and in a container the bus is not compared. Fewer is a failure, fewer than
    --expect-gpus a warning. RTX 50 cards fail so with "Above 4G Decoding" or Resizable BAR off, or with the closed
    module; the kernel's log (RmInitAdapter) often says why.
    """
    listed = [gpu for gpu in inspection.machine.gpus if gpu.vendor == "nvidia"]
    if purpose.expected_gpus is not None and len(inspection.machine.gpus) < purpose.expected_gpus:
        yield Finding(
            severity=Severity.warn,
            summary=f"{len(inspection.machine.gpus)} GPUs are here, {purpose.expected_gpus} are expected",
            evidence=(Evidence(path="mgpu gpus", value=f"{len(inspection.machine.gpus)} GPUs"),),
            fix=("lspci -nn | grep -i nvidia  # not listed: check the card's seat and power cables",),
        )
    if inspection.driver.nvml_error != 0 or in_container(inspection):
        return
    if not inspection.pci_known:
        yield Skip(reason="the PCI bus could not be read, so the driver's cards cannot be counted against it")
        return
    bus = [
        each
        for each in nvidia_on_bus(inspection)
        if each.driver != "vfio-pci" and not is_too_old(each, inspection) and not needs_other_module(each, inspection)
    ]
    if len(listed) >= len(bus):
        return
    known = {gpu.bus_id for gpu in listed}
    log = [entry for entry in inspection.host.log if entry.kind == "init"]
    yield Finding(
        severity=Severity.fail,
        summary=f"{len(bus)} NVIDIA cards are on the PCI bus, the driver has only {len(listed)}",
        evidence=(
            *(
                Evidence(path=_pci(each), value=f"driver {each.driver or 'none'}")
                for each in bus
                if each.address not in known
            ),
            *(Evidence(path="kernel log", value=entry.text[:120]) for entry in log),
        )[:6],
        fix=(
            "BIOS: enable Above 4G Decoding and Re-Size BAR",
            "sudo dmesg | grep -E 'NVRM|RmInitAdapter'  # names the reason; reseat the card if nothing is there",
        ),
    )


@check("uvm-missing", Area.driver, "A")
def uvm_missing(inspection: Inspection, _purpose: Purpose) -> Said:
    """/dev/nvidia-uvm is missing: nvidia-smi works, CUDA does not.

    Read from the device nodes and /sys/module/nvidia_uvm. NVML does not need the module for unified memory, every CUDA
    program does, so engines fall back to the processor (Ollama's codes 3, 46, 100, 999). Seen after suspend and resume,
    and in LXC containers without a rule for the device.
    """
    driver = inspection.driver
    if driver.nvml_error != 0 or not cards(inspection) or inspection.host.wsl:
        return
    if driver.uvm_device is None:
        yield Skip(reason="whether /dev/nvidia-uvm exists could not be read")
    elif not driver.uvm_device or driver.control_device is False:
        node = "/dev/nvidia-uvm" if not driver.uvm_device else "/dev/nvidiactl"
        loaded = {True: "loaded", False: "not loaded"}.get(driver.uvm_loaded) if driver.uvm_loaded is not None else None
        yield Finding(
            severity=Severity.fail,
            summary=f"{node} is missing: CUDA cannot start, though nvidia-smi works",
            evidence=(Evidence(path=node, value="missing"), *_seen("/sys/module/nvidia_uvm", loaded)),
            fix=(
                ("pass /dev/nvidia-uvm and /dev/nvidiactl to the container",)
                if in_container(inspection)
                else (
                    "sudo nvidia-modprobe -c0 -u",
                    "sudo rmmod nvidia_uvm && sudo modprobe nvidia_uvm  # after suspend",
                )
            ),
        )


@check("hmm-kaslr", Area.driver, "A")
def hmm_kaslr(inspection: Inspection, _purpose: Purpose) -> Said:
    """CUDA cannot start because shared memory management collides with the kernel's random layout.

    Read from the kernel's log: uvm_pmm_gpu.c fails in devmem_alloc_pagemap with error -34. Several Blackwell cards need
    more addresses than the kernel's randomised layout leaves. A failure where the line is there and HMM is still on;
    nothing otherwise. Turn HMM off for the nvidia_uvm module.
    """
    if not cards(inspection) or inspection.driver.uvm_disable_hmm:
        return
    lines = [entry for entry in inspection.host.log if entry.kind == "hmm"]
    if lines:
        yield Finding(
            severity=Severity.fail,
            summary="CUDA cannot start: HMM and the kernel's random layout collide",
            evidence=(
                Evidence(path="kernel log", value=lines[-1].text[:120]),
                *_seen("uvm_disable_hmm", {False: "N"}.get(bool(inspection.driver.uvm_disable_hmm))),
            ),
            fix=(
                "echo 'options nvidia_uvm uvm_disable_hmm=1' | sudo tee /etc/modprobe.d/uvm.conf",
                "sudo rmmod nvidia_uvm && sudo modprobe nvidia_uvm",
            ),
        )
    elif not inspection.host.log_known and sum(is_blackwell(each) for each in nvidia_on_bus(inspection)) > 1:
        yield Skip(reason="the kernel's log could not be read", needs_root=True)


_NVML_WORDS = {_NOT_LOADED: "driver not loaded", _NO_LIBRARY: "library not found"}


def _why_not_loaded(inspection: Inspection, bus: tuple[PciDevice, ...]) -> tuple[str, tuple[str, ...]]:
    """The cause in a few words, and what to do."""
    driver, log = inspection.driver, inspection.host.log
    bound = {each.driver for each in bus}
    if in_container(inspection):
        return "the container was not given it", ("docker run --gpus all IMAGE", "mgpu doctor  # on the host")
    if "nouveau" in bound:
        return "nouveau holds the card", (
            "echo 'blacklist nouveau' | sudo tee /etc/modprobe.d/blacklist-nouveau.conf",
            "sudo update-initramfs -u && sudo reboot",
        )
    if bound == {"vfio-pci"}:
        return "vfio-pci keeps the card for virtual machines", (
            "remove its ids from vfio-pci (/etc/modprobe.d, vfio-pci.ids= on the kernel's command line), then reboot",
        )
    if any(entry.kind == "key" for entry in log) or (driver.secure_boot and driver.on_disk):
        return "Secure Boot refused its signature", (
            "sudo mokutil --import /var/lib/shim-signed/mok/MOK.der",
            "sudo reboot  # and choose Enroll MOK",
        )
    if driver.on_disk_version or driver.on_disk:
        return "its module is installed, but not loaded", ("sudo modprobe nvidia && sudo nvidia-modprobe -c0 -u",)
    return "no module for this kernel", (
        "sudo apt install linux-headers-$(uname -r) && sudo dkms autoinstall",
        "sudo ubuntu-drivers install && sudo reboot  # where no driver is installed at all",
    )


def _is_card(device: PciDevice) -> bool:
    """Whether it is a graphics card: not a bridge, not a server's display chip, not Intel's graphics in the processor,
    which are always at 00:02.0."""
    if device.pci_class is None or device.pci_class >> 16 == 0x06:
        return False
    return device.vendor in (0x10DE, 0x1002) or (device.vendor == 0x8086 and not device.address.endswith(":00:02.0"))


def _nvidia(inspection: Inspection) -> bool:
    return bool(cards(inspection) or nvidia_on_bus(inspection))


def _promised(inspection: Inspection) -> bool:
    """Whether a container was to have cards."""
    return in_container(inspection) and inspection.container.visible_devices not in (None, "", "void", "none")


def _pci(device: PciDevice) -> str:
    return f"/sys/bus/pci/devices/{device.address}"


def _seen(path: str, value: str | None) -> tuple[Evidence, ...]:
    return () if value is None else (Evidence(path=path, value=value),)


CHECKS: tuple[Check, ...] = (
    driver_lib_mismatch,
    driver_not_loaded,
    uvm_missing,
    hmm_kaslr,
    no_gpu,
    gpu_missing,
)
