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
from mgpu.machine.inspection import Inspection, Unread
from tests.doctor.drivers import (
    AMD_CARD,
    DISPLAY_CHIP,
    IN_DOCKER,
    IN_PROCESSOR,
    P40,
    PORT,
    RTX_5090,
    WANTS_OPEN,
    beside_kepler,
    kepler,
    logged,
    undriven,
    version,
    with_graphics,
    without_last,
    without_node,
)
from tests.doctor.inspections import bare, changed, changed_gpu, changed_machine, changed_pci, healthy, verdict


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


def test_a_card_that_the_module_cannot_run_is_not_called_missing_as_well() -> None:
    closed = without_last(healthy(2, RTX_5090, driver={"open_module": False}))
    assert verdict(gpu_missing, closed) == ""
    mixed = changed_gpu(healthy(2, RTX_5090), 1, name=P40, compute_capability="6.1")
    device = next(each for each in mixed.pci if each.address == "0000:20:00.0")
    others = tuple(each for each in mixed.pci if each is not device)
    mixed = changed(mixed, pci=(*others, dataclasses.replace(device, device=0x1B38)))
    assert verdict(gpu_missing, without_last(version(mixed, "595.58.03"))) == ""
