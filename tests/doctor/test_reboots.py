"""No command is to be typed after a reboot: whoever reboots at once never reads it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from mgpu.doctor.catalogue import CHECKS
from mgpu.doctor.check import Finding, Purpose
from mgpu.machine.inspection import Inspection
from tests.doctor.drivers import P40, RTX_5090, WANTS_OPEN, logged, undriven, without_last
from tests.doctor.inspections import asked, changed, changed_card, changed_pci, healthy
from tests.doctor.test_checks_peers import granted
from tests.doctor.test_hostile_texts import inspections

FAMILIES = ("debian", "fedora", "arch", "suse", "nixos", None)
PURPOSE = Purpose(backend="vllm", tensor_parallel=2)


def reboots_early(fix: tuple[str, ...]) -> bool:
    """Whether a command follows a reboot that is not its alternative; comments do not reboot."""
    lines = [line.partition("  #")[0] for line in fix]
    return any("reboot" in line and not after.startswith("or") for line, after in itertools.pairwise(lines))


def machines() -> Iterator[Inspection]:
    """Faults whose cure is a reboot."""
    yield from inspections()
    yield granted(iommu="DMA-FQ", acs=0x1D)
    for facts in ({"nvml_error": 18}, {"on_disk": True, "secure_boot": True}, {"nvml_error": 12}, {}):
        yield undriven(2, **facts)
        yield changed_pci(undriven(2, **facts), driver="nouveau")
        yield undriven(1, P40, on_disk_open=True, **facts)
        yield changed(undriven(1, RTX_5090, **facts), host=logged("key"))
    yield changed_pci(without_last(healthy(3)), driver="nouveau")
    yield changed(without_last(healthy(3)), host=logged("init", WANTS_OPEN))
    yield healthy(2, P40, driver={"open_module": True})
    yield healthy(2, RTX_5090, driver={"open_module": False})
    yield healthy(2, RTX_5090, host=logged("hmm"))
    yield changed_card(healthy(2, "NVIDIA RTX A6000"), 0, ecc_enabled=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_typed_after_a_reboot(family: str | None) -> None:
    rebooted = set()
    for inspection in machines():
        for option in ("quiet", "iommu=pt"):
            told = changed(inspection, host={"distribution": family, "kernel_command_line": option})
            for check in CHECKS:
                for said in asked(check, told, PURPOSE):
                    if isinstance(said, Finding) and "reboot" in "".join(said.fix):
                        assert not reboots_early(said.fix), (check.id, said.fix)
                        rebooted.add(check.id)
    assert {"p2p-grant-unsafe", "driver-lib-mismatch", "driver-not-loaded", "ecc-vram", "gpu-missing"} <= rebooted


@pytest.mark.parametrize(
    ("fix", "early"),
    [
        pytest.param(("sudo reboot", "sudo rmmod nvidia"), True, id="a command after it"),
        pytest.param(("sudo update-grub && sudo reboot", "export A=1"), True, id="at the end of a line"),
        pytest.param(("sudo reboot", "or, once all is stopped:", "sudo rmmod nvidia"), False, id="an alternative"),
        pytest.param(("sudo setpci  # until the reboot", "sudo reboot"), False, id="a comment before it"),
    ],
)
def test_the_rule_itself(fix: tuple[str, ...], early: bool) -> None:
    assert reboots_early(fix) is early
