"""Checks of the NVIDIA driver: loaded, of one version, and right for cards and engines."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mgpu.doctor.check import Check, Finding, Purpose
from mgpu.doctor.checks.driver import (
    driver_lib_mismatch,
    driver_not_loaded,
    gpu_missing,
    hmm_kaslr,
    no_gpu,
    uvm_missing,
)
from mgpu.doctor.checks.driver_fit import driver_flavour, driver_too_new_for_gpu, driver_too_old
from mgpu.machine.inspection import Inspection, InstalledEngine, LogEntry, PciDevice
from tests.doctor.inspections import H100, bare, changed, changed_gpu, changed_machine, changed_pci, healthy, verdict

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


def logged(kind: str, text: str = "NVRM: it went wrong") -> dict[str, Any]:
    return {"log": (LogEntry(kind=kind, text=text, age_s=60.0),)}


DISPLAY_CHIP = PciDevice(address="0000:03:00.0", vendor=0x1A03, device=0x2000, pci_class=0x030000)
AMD_CARD = PciDevice(address="0000:03:00.0", vendor=0x1002, device=0x744C, pci_class=0x030000)
IN_PROCESSOR = PciDevice(address="0000:00:02.0", vendor=0x8086, device=0xA780, pci_class=0x030000)
PORT = PciDevice(address="0000:00:01.0", vendor=0x8086, device=0x460D, pci_class=0x060400)
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
        pytest.param(
            gpu_missing,
            changed_pci(without_last(healthy(3)), "0000:30:00.0", driver="vfio-pci"),
            {},
            "",
            id="a card that was given to a virtual machine is not missing",
        ),
        pytest.param(
            gpu_missing,
            changed_machine(without_last(healthy(3)), host={"container": "docker"}),
            {},
            "",
            id="a container has the cards that it was given",
        ),
        pytest.param(gpu_missing, healthy(2, pci_known=False), {}, "skip", id="the bus could not be read"),
        pytest.param(uvm_missing, healthy(driver={"uvm_device": False}), {}, "fail", id="no /dev/nvidia-uvm"),
        pytest.param(uvm_missing, healthy(driver={"control_device": False}), {}, "fail", id="no /dev/nvidiactl"),
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
        pytest.param(driver_too_old, version(healthy(engines=engine()), None), {}, "skip", id="driver unknown"),
        pytest.param(
            driver_flavour,
            without_last(healthy(2, RTX_5090, driver={"open_module": False})),
            {},
            "fail",
            id="5090, closed",
        ),
        pytest.param(driver_flavour, undriven(1, P40, open_module=True), {}, "fail", id="P40 and the open module"),
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
        pytest.param(changed(undriven(), host=logged("key")), "Secure Boot", id="the kernel refused the key"),
        pytest.param(undriven(on_disk=True, secure_boot=True), "Secure Boot", id="Secure Boot and a module on disk"),
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


def test_a_card_that_the_module_cannot_run_is_not_called_missing_as_well() -> None:
    closed = without_last(healthy(2, RTX_5090, driver={"open_module": False}))
    assert verdict(gpu_missing, closed) == ""
    mixed = changed_gpu(healthy(2, RTX_5090), 1, name=P40, compute_capability="6.1")
    device = next(each for each in mixed.pci if each.address == "0000:20:00.0")
    others = tuple(each for each in mixed.pci if each is not device)
    mixed = changed(mixed, pci=(*others, dataclasses.replace(device, device=0x1B38)))
    assert verdict(gpu_missing, without_last(version(mixed, "595.58.03"))) == ""
