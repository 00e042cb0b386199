"""What is in the way of peers, as a person reads it: options that are there already, what comes first, which pairs."""

from __future__ import annotations

import pytest

from mgpu.doctor.check import Finding, Purpose
from mgpu.doctor.checks.peers import iommu_translated, p2p_grant_unsafe, p2p_none
from tests.doctor.inspections import changed, changed_pair, healthy
from tests.doctor.test_checks_peers import RTX_3090, granted, refused


@pytest.mark.parametrize(
    ("command_line", "said", "unsaid"),
    [
        pytest.param("quiet splash", "add iommu=pt to GRUB", "yet", id="it was never set"),
        pytest.param(None, "add iommu=pt to GRUB", "yet", id="the command line is unread"),
        pytest.param("quiet iommu=pt", "iommu=pt is set, yet it translates", "add iommu=pt", id="it is set"),
        pytest.param("iommu=pt", "add iommu.passthrough=1 to GRUB", "add iommu=pt", id="there is another way"),
        pytest.param("iommu.passthrough=1", "add iommu=pt to GRUB", "add iommu.pass", id="the other way was gone"),
        pytest.param("iommu=pt iommu.passthrough=1", "turn the IOMMU off in the BIOS", "add ", id="both are set"),
    ],
)
def test_no_option_is_to_be_added_that_is_there(command_line: str | None, said: str, unsaid: str) -> None:
    host = {"kernel_command_line": command_line}
    for check, inspection in ((iommu_translated, refused(iommu="DMA")), (p2p_grant_unsafe, granted(iommu="DMA"))):
        (finding,) = check.run(changed(inspection, host=host), Purpose())
        assert isinstance(finding, Finding)
        assert said in "\n".join(finding.fix)
        assert unsaid not in "\n".join(finding.fix)


def test_what_helps_at_once_comes_first_and_the_reboot_last() -> None:
    inspection = changed(granted(iommu="DMA-FQ", acs=0x1D), host={"kernel_command_line": "quiet"})
    (finding,) = p2p_grant_unsafe.run(inspection, Purpose())
    assert isinstance(finding, Finding)
    starts = [
        "export NCCL_P2P_DISABLE=1",
        "sudo setpci",
        "sudo setpci",
        "BIOS: turn ACS off",
        "add iommu=pt",
        "sudo up",
    ]
    assert [line[: len(start)] for line, start in zip(finding.fix, starts, strict=True)] == starts


@pytest.mark.parametrize(
    ("bridged", "summary"),
    [
        pytest.param([(0, 1), (2, 3)], "between GPU0,1 and GPU2,3 is", id="two bridged pairs"),
        pytest.param([(0, 2), (1, 3)], "between GPU0,2 and GPU1,3 is", id="two others"),
        pytest.param([(0, 1)], "between GPU0,1 and GPU2 and GPU3 is", id="one bridged pair beside two cards"),
        pytest.param([(0, 1), (1, 2)], "between GPU0,1,2,3 is", id="no clear sides"),
        pytest.param([], "between GPU0,1,2,3 is", id="no bridge"),
    ],
)
def test_only_pairs_without_peer_access_are_named(bridged: list[tuple[int, int]], summary: str) -> None:
    four = healthy(4, RTX_3090)
    for a, b in bridged:
        four = changed_pair(four, a, b, kind="NVLink", read=0, write=0)
    (finding,) = p2p_none.run(four, Purpose())
    assert isinstance(finding, Finding)
    assert summary in finding.summary
    assert finding.summary.endswith("which is normal")
