"""Why the NVIDIA driver is not loaded, and what to do then."""

from __future__ import annotations

from typing import Any

import pytest

from mgpu.doctor.check import Finding, Purpose
from mgpu.doctor.checks.driver import (
    driver_not_loaded,
)
from mgpu.machine.inspection import Inspection
from tests.doctor.drivers import P40, RTX_5090, WANTS_OPEN, beside_kepler, logged, undriven
from tests.doctor.inspections import changed, changed_machine, changed_pci, verdict


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


def test_a_card_before_maxwell_does_not_have_nouveau_taken_from_another() -> None:
    (finding,) = driver_not_loaded.run(beside_kepler(undriven(on_disk=True)), Purpose())
    assert isinstance(finding, Finding)
    assert finding.severity == "fail"
    assert "nouveau" not in finding.summary + "".join(finding.fix)


def test_cards_kept_for_virtual_machines_are_no_failure() -> None:
    kept = changed_pci(undriven(2), driver="vfio-pci")
    assert verdict(driver_not_loaded, kept) == "info"
    assert verdict(driver_not_loaded, changed_pci(kept, "0000:20:00.0", driver=None)) == "fail"
