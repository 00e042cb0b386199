"""Checks of the NVIDIA driver: loaded, of one version, and right for cards and engines."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mgpu.doctor.check import Check, Finding, Purpose, Skip
from mgpu.doctor.checks.driver import (
    driver_lib_mismatch,
    driver_not_loaded,
    gpu_missing,
    hmm_kaslr,
    no_gpu,
    uvm_missing,
)
from mgpu.doctor.checks.driver_fit import driver_flavour, driver_too_new_for_gpu, driver_too_old
from mgpu.machine.inspection import Inspection, InstalledEngine, LogEntry, PciDevice, Unread
from mgpu.machine.snapshot import Gpu
from tests.doctor.inspections import H100, bare, changed, changed_gpu, changed_machine, changed_pci, healthy, verdict

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


@pytest.mark.parametrize(
    ("check", "inspection", "purpose", "expected"),
    [
        pytest.param(no_gpu, bare(), {}, "info", id="no card at all is said, and is no failure"),
        pytest.param(no_gpu, bare(pci=(DISPLAY_CHIP,)), {}, "info", id="a server's display chip is no card"),
        pytest.param(no_gpu, bare(pci=(IN_PROCESSOR, PORT)), {}, "info", id="nor are a processor's graphics and ports"),
        pytest.param(no_gpu, bare(pci=(AMD_CARD,)), {}, "", id="an AMD card without a driver is there"),
        pytest.param(no_gpu, undriven(), {}, "", id="a card without a driver is there"),
        pytest.param(no_gpu, bare(pci_known=False), {}, "skip", id="without the bus nobody knows whether there is one"),
        pytest.param(
            no_gpu, bare(pci_known=False, driver={"nvml_error": 18}), {}, "", id="a driver that refuses is one"
        ),
        pytest.param(
            driver_lib_mismatch, undriven(nvml_error=18), {}, "fail", id="NVML refuses for library and module differ"
        ),
        pytest.param(
            driver_lib_mismatch,
            healthy(driver={"on_disk_version": "590.48.01"}),
            {},
            "warn",
            id="an update waits for the next boot",
        ),
        pytest.param(
            driver_lib_mismatch, healthy(driver={"on_disk_version": None}), {}, "", id="module not looked into"
        ),
        pytest.param(driver_lib_mismatch, healthy(driver={"loaded_version": None}), {}, "skip", id="version unread"),
        pytest.param(driver_lib_mismatch, bare(), {}, "", id="no card, no driver to compare"),
        pytest.param(driver_not_loaded, undriven(), {}, "fail", id="a card and no module"),
        pytest.param(driver_not_loaded, undriven(nvml_error=12), {}, "fail", id="a card and no library"),
        pytest.param(driver_not_loaded, undriven(nvml_error=4), {}, "fail", id="this user may not"),
        pytest.param(driver_not_loaded, bare(driver={"nvml_error": 9}), {}, "", id="no card on the bus needs none"),
        pytest.param(
            driver_not_loaded,
            bare(driver={"nvml_error": 999}),
            {},
            "fail",
            id="a driver that refuses, whatever the bus says",
        ),
        pytest.param(
            driver_not_loaded,
            changed_machine(bare(container=IN_DOCKER), host={"container": "docker"}),
            {},
            "fail",
            id="the container was promised cards",
        ),
        pytest.param(driver_not_loaded, undriven(nvml_error=None), {}, "skip", id="NVML was not asked"),
        pytest.param(
            driver_not_loaded,
            undriven(1, P40, on_disk_version="590.48.01"),
            {},
            "",
            id="too old a card has its own check",
        ),
        pytest.param(gpu_missing, without_last(healthy(3)), {}, "fail", id="the bus has one more than the driver"),
        pytest.param(gpu_missing, healthy(3), {"expected_gpus": 4}, "warn", id="fewer than expected"),
        pytest.param(gpu_missing, healthy(3), {"expected_gpus": 3}, "", id="as many as expected"),
        pytest.param(
            gpu_missing,
            with_graphics(healthy(1)),
            {"expected_gpus": 2},
            "warn",
            id="a processor's graphics do not count",
        ),
        pytest.param(
            gpu_missing,
            changed_gpu(healthy(2), 1, problem="needs a reset"),
            {"expected_gpus": 2},
            "warn",
            id="nor does a card that cannot be used",
        ),
        pytest.param(gpu_missing, beside_kepler(healthy(2)), {}, "", id="a GT 710 for the screen is not missing"),
        pytest.param(driver_not_loaded, kepler(), {}, "info", id="a GT 710 alone needs no driver for engines"),
        pytest.param(driver_too_new_for_gpu, kepler(on_disk_version="580.95.05"), {}, "", id="nor is 580 its last"),
        pytest.param(driver_flavour, beside_kepler(healthy(2)), {}, "", id="nor the closed module what it needs"),
        *(
            pytest.param(
                gpu_missing,
                changed_pci(without_last(healthy(3)), "0000:30:00.0", driver=driver),
                {},
                "info",
                id=f"a card that {driver} keeps is not missing",
            )
            for driver in ("vfio-pci", "nvgrace_gpu_vfio_pci", "pci-stub")
        ),
        pytest.param(
            gpu_missing,
            changed_pci(without_last(without_last(healthy(3))), "0000:30:00.0", driver="vfio-pci"),
            {},
            "fail",
            id="a card is missing beside one that is kept",
        ),
        pytest.param(
            gpu_missing,
            changed_machine(without_last(healthy(3)), host={"container": "docker"}),
            {},
            "",
            id="a container has the cards that it was given",
        ),
        pytest.param(gpu_missing, healthy(2, pci_known=False), {}, "skip", id="the bus could not be read"),
        pytest.param(uvm_missing, without_node(node_maker=False), {}, "fail", id="nobody makes /dev/nvidia-uvm"),
        pytest.param(uvm_missing, without_node(), {}, "info", id="the first program makes it"),
        pytest.param(uvm_missing, without_node(uvm_loaded=False), {}, "info", id="and loads its module"),
        pytest.param(
            uvm_missing, without_node(uvm_loaded=False, uvm_on_disk=False), {}, "fail", id="there is no module to load"
        ),
        pytest.param(
            uvm_missing,
            changed_machine(without_node(), host={"container": "docker"}),
            {},
            "fail",
            id="in a container no program may make it",
        ),
        pytest.param(uvm_missing, without_node(node_maker=None), {}, "skip", id="who would make it is unknown"),
        pytest.param(
            uvm_missing, without_node(uvm_loaded=False, uvm_on_disk=None), {}, "skip", id="its module is unknown"
        ),
        pytest.param(uvm_missing, healthy(), {}, "", id="both devices are there"),
        pytest.param(uvm_missing, healthy(driver={"uvm_device": None}), {}, "skip", id="/dev could not be read"),
        pytest.param(uvm_missing, healthy(host={"wsl": True}, driver={"uvm_device": False}), {}, "", id="WSL has none"),
        pytest.param(
            driver_too_new_for_gpu, undriven(2, P40, on_disk_version="590.48.01"), {}, "fail", id="P40 and 590"
        ),
        pytest.param(driver_too_new_for_gpu, healthy(2, P40), {}, "info", id="P40 and 580: the last branch"),
        pytest.param(driver_too_new_for_gpu, version(healthy(2, P40), "535.129.03"), {}, "", id="P40 and 535"),
        pytest.param(driver_too_new_for_gpu, version(healthy(), "610.43.02"), {}, "", id="4090 and 610"),
        pytest.param(driver_too_new_for_gpu, version(healthy(1, P40), None), {}, "skip", id="version unknown"),
        pytest.param(
            driver_too_old, version(healthy(engines=engine()), "575.57.08"), {}, "fail", id="CUDA 13 needs 580"
        ),
        pytest.param(
            driver_too_old,
            version(healthy(engines=engine(cuda=12080)), "525.60.13"),
            {},
            "",
            id="the oldest driver of CUDA 12 runs all of CUDA 12",
        ),
        pytest.param(
            driver_too_old,
            version(healthy(1, P40, engines=engine("ollama", None)), "550.54"),
            {},
            "fail",
            id="Ollama, P40",
        ),
        pytest.param(
            driver_too_old,
            version(healthy(engines=engine("ollama", None)), "550.54"),
            {},
            "",
            id="Ollama, 4090 and 550",
        ),
        pytest.param(
            driver_too_old,
            version(healthy(engines=engine()), "575.57.08"),
            {"backend": "llama.cpp"},
            "",
            id="another engine is meant",
        ),
        pytest.param(driver_too_old, healthy(engines=engine(cuda=None)), {}, "skip", id="vLLM's CUDA is unknown"),
        pytest.param(
            driver_too_old,
            version(healthy(engines=engine("llama.cpp", cuda=13000)), "575.57.08"),
            {},
            "fail",
            id="llama.cpp with the runtime of CUDA 13",
        ),
        pytest.param(
            driver_too_old,
            healthy(engines=engine("llama.cpp", cuda=12000)),
            {},
            "",
            id="llama.cpp with that of CUDA 12",
        ),
        pytest.param(
            driver_too_old,
            healthy(engines=engine("llama.cpp", cuda=None)),
            {},
            "",
            id="llama.cpp without code for CUDA",
        ),
        pytest.param(
            driver_too_old,
            healthy(
                engines=(InstalledEngine(backend="llama.cpp", architectures=("sm_86",), architectures_known=True),)
            ),
            {},
            "skip",
            id="llama.cpp's CUDA is unknown",
        ),
        pytest.param(driver_too_old, version(healthy(engines=engine()), None), {}, "skip", id="driver unknown"),
        pytest.param(
            driver_flavour,
            without_last(healthy(2, RTX_5090, driver={"open_module": False})),
            {},
            "fail",
            id="5090, closed",
        ),
        pytest.param(
            driver_flavour, healthy(1, P40, driver={"open_module": True}), {}, "fail", id="P40 and the open module"
        ),
        pytest.param(driver_flavour, healthy(2, driver={"open_module": False}), {}, "", id="4090 runs with both"),
        pytest.param(driver_flavour, healthy(1, H100, driver={"open_module": None}), {}, "skip", id="flavour unread"),
        pytest.param(hmm_kaslr, healthy(2, RTX_5090, host=logged("hmm")), {}, "fail", id="the kernel logged it"),
        pytest.param(
            hmm_kaslr,
            healthy(2, RTX_5090, host=logged("hmm"), driver={"uvm_disable_hmm": True}),
            {},
            "",
            id="HMM is off already",
        ),
        pytest.param(hmm_kaslr, healthy(2, RTX_5090, host={"log_known": False}), {}, "skip", id="log unread"),
        pytest.param(hmm_kaslr, healthy(1, RTX_5090, host={"log_known": False}), {}, "skip", id="log unread, one card"),
        pytest.param(hmm_kaslr, healthy(2, host={"log_known": False}), {}, "", id="not with cards before Blackwell"),
    ],
)
def test_what_is_said_of_a_driver(check: Check, inspection: Inspection, purpose: dict[str, Any], expected: str) -> None:
    assert verdict(check, inspection, **purpose) == expected


@pytest.mark.parametrize(
    ("inspection", "cause"),
    [
        pytest.param(changed_pci(undriven(), driver="nouveau"), "nouveau", id="nouveau holds it"),
        pytest.param(changed_pci(undriven(), driver="vfio-pci"), "virtual machines", id="vfio-pci keeps it"),
        pytest.param(
            changed(undriven(secure_boot=True), host=logged("key")), "Secure Boot refused", id="the key was refused"
        ),
        pytest.param(
            changed(undriven(secure_boot=False), host=logged("key")), "the kernel refused", id="without Secure Boot"
        ),
        pytest.param(
            undriven(on_disk=True, secure_boot=True), "but not loaded", id="Secure Boot is on, and nothing is logged"
        ),
        pytest.param(changed_pci(undriven(), driver="pci-stub"), "virtual machines", id="pci-stub keeps it"),
        pytest.param(
            changed_pci(undriven(nvml_error=12), driver="nouveau"), "is not installed", id="nouveau, and no other"
        ),
        pytest.param(undriven(nvml_error=12), "no NVIDIA driver is installed", id="nothing is installed"),
        pytest.param(
            undriven(1, RTX_5090, on_disk=True, on_disk_open=False), "needs the open module, not", id="5090, closed"
        ),
        pytest.param(undriven(1, RTX_5090, on_disk=True), "needs the open one", id="5090, and the module does not say"),
        pytest.param(undriven(1, RTX_5090, on_disk=True, on_disk_open=True), "not loaded", id="5090, open"),
        pytest.param(
            changed(undriven(on_disk=True), host=logged("init", WANTS_OPEN)),
            "the open module",
            id="the kernel wants it",
        ),
        pytest.param(undriven(1, P40, on_disk=True, on_disk_open=True), "needs the closed module, not", id="P40, open"),
        pytest.param(undriven(on_disk=True), "not loaded", id="only not loaded"),
        pytest.param(undriven(), "no module for this kernel", id="none for this kernel"),
        pytest.param(changed_machine(undriven(), host={"container": "docker"}), "container", id="a container without"),
    ],
)
def test_why_the_driver_is_not_loaded_is_named(inspection: Inspection, cause: str) -> None:
    (finding,) = driver_not_loaded.run(inspection, Purpose())
    assert isinstance(finding, Finding)
    assert cause in finding.summary
    assert len(finding.summary) <= 90


INSTALLED: dict[str, Any] = {"nvml_error": 9, "on_disk": True, "on_disk_version": "580.95.05"}


@pytest.mark.parametrize(
    ("inspection", "steps"),
    [
        pytest.param(
            changed_pci(undriven(nvml_error=12), driver="nouveau"),
            ["apt install nvidia-driver-580-open", "blacklist nouveau", "update-initramfs", "reboot"],
            id="nouveau alone: install, then blacklist",
        ),
        pytest.param(
            changed_pci(undriven(**INSTALLED), driver="nouveau"),
            ["blacklist nouveau", "update-initramfs", "reboot"],
            id="nouveau beside a driver",
        ),
        pytest.param(
            changed_pci(changed(undriven(**INSTALLED), host={"distribution": "fedora"}), driver="nouveau"),
            ["blacklist nouveau", "dracut --force", "reboot"],
            id="nouveau on Fedora",
        ),
        pytest.param(
            changed_pci(undriven(), driver="nouveau"),
            ["dkms autoinstall", "blacklist nouveau", "update-initramfs", "reboot"],
            id="nouveau, and no module for this kernel",
        ),
        pytest.param(
            undriven(on_disk=True, secure_boot=True),
            ["modprobe nvidia", "Key was rejected by service", "mokutil --import", "Enroll MOK"],
            id="Secure Boot is only a possibility",
        ),
        pytest.param(undriven(on_disk=True), ["modprobe nvidia"], id="without Secure Boot"),
        pytest.param(
            undriven(1, RTX_5090, on_disk=True), ["nvidia-driver-580-open", "reboot"], id="5090 and no open module"
        ),
        pytest.param(
            changed(undriven(on_disk=True), host=logged("init", WANTS_OPEN)),
            ["nvidia-driver-580-open", "reboot"],
            id="the kernel wants the open module",
        ),
        pytest.param(
            undriven(1, P40, on_disk=True, on_disk_open=True), ["nvidia-driver-580 ", "reboot"], id="P40, open module"
        ),
        pytest.param(undriven(1, P40, nvml_error=12), ["nvidia-driver-580 ", "reboot"], id="P40, nothing installed"),
    ],
)
def test_what_to_do_fits_why_the_driver_is_not_loaded(inspection: Inspection, steps: list[str]) -> None:
    (finding,) = driver_not_loaded.run(inspection, Purpose())
    assert isinstance(finding, Finding)
    assert len(finding.fix) == len(steps), finding.fix
    assert all(step in line for step, line in zip(steps, finding.fix, strict=True)), finding.fix


@pytest.mark.parametrize(
    ("driver", "log", "steps", "not_said"),
    [
        pytest.param(None, {}, "BIOS", "nouveau", id="no driver has it"),
        pytest.param("nouveau", {}, "blacklist nouveau", "BIOS", id="nouveau holds it"),
        pytest.param(None, logged("init", WANTS_OPEN), "-open", "BIOS", id="the kernel wants the open module"),
    ],
)
def test_what_to_do_about_a_missing_card_fits_its_cause(
    driver: str | None, log: dict[str, Any], steps: str, not_said: str
) -> None:
    missing = changed_pci(without_last(healthy(3, host=log)), "0000:30:00.0", driver=driver)
    (finding,) = gpu_missing.run(missing, Purpose())
    assert isinstance(finding, Finding)
    assert steps in "\n".join(finding.fix)
    assert not_said not in "\n".join(finding.fix)


def test_a_card_before_maxwell_does_not_have_nouveau_taken_from_another() -> None:
    (finding,) = driver_not_loaded.run(beside_kepler(undriven(on_disk=True)), Purpose())
    assert isinstance(finding, Finding)
    assert finding.severity == "fail"
    assert "nouveau" not in finding.summary + "".join(finding.fix)


def test_who_could_read_the_log_is_said() -> None:
    """Root in a container cannot; a user on a host could as root."""
    hidden = changed_machine(healthy(1, RTX_5090, host={"log_known": False}), host={"container": "docker"})
    (skip,) = hmm_kaslr.run(hidden, Purpose())
    assert isinstance(skip, Skip)
    assert not skip.needs_root
    denied = (Unread(what="/dev/kmsg", why="not permitted", needs_root=True),)
    (skip,) = hmm_kaslr.run(healthy(1, RTX_5090, host={"log_known": False}, unread=denied), Purpose())
    assert isinstance(skip, Skip)
    assert skip.needs_root


def test_cards_kept_for_virtual_machines_are_no_failure() -> None:
    kept = changed_pci(undriven(2), driver="vfio-pci")
    assert verdict(driver_not_loaded, kept) == "info"
    assert verdict(driver_not_loaded, changed_pci(kept, "0000:20:00.0", driver=None)) == "fail"


def test_a_card_that_the_module_cannot_run_is_not_called_missing_as_well() -> None:
    closed = without_last(healthy(2, RTX_5090, driver={"open_module": False}))
    assert verdict(gpu_missing, closed) == ""
    mixed = changed_gpu(healthy(2, RTX_5090), 1, name=P40, compute_capability="6.1")
    device = next(each for each in mixed.pci if each.address == "0000:20:00.0")
    others = tuple(each for each in mixed.pci if each is not device)
    mixed = changed(mixed, pci=(*others, dataclasses.replace(device, device=0x1B38)))
    assert verdict(gpu_missing, without_last(version(mixed, "595.58.03"))) == ""
