"""Checks of peer access over PCIe: the grant, what makes it unsafe, and what is believed of it."""

from __future__ import annotations

from typing import Any

import pytest

from mgpu.doctor.check import Check, Finding, Purpose, Skip
from mgpu.doctor.checks.peers import (
    acs_redirect,
    iommu_translated,
    p2p_grant_unsafe,
    p2p_none,
    patched_p2p_risk,
    vllm_p2p_cache_stale,
)
from mgpu.machine.inspection import Inspection
from tests.doctor.inspections import (
    DAY_S,
    H100,
    changed,
    changed_machine,
    changed_pair,
    changed_pci,
    healthy,
    verdict,
)

PRO, RTX_3090 = "NVIDIA RTX A6000", "NVIDIA GeForce RTX 3090"
PORTS = ("0000:00:01.0", "0000:00:01.1")
CARDS = ("0000:10:00.0", "0000:20:00.0")
TP2 = {"tensor_parallel": 2}
VLLM = {"backend": "vllm"}


def board(
    inspection: Inspection, *, iommu: str | None = "identity", acs: int | None = 0, root: bool = True
) -> Inspection:
    """Two cards whose IOMMU groups are of type `iommu`, and root ports with the ACS word `acs`."""
    inspection = changed_pci(inspection, *CARDS, iommu_type=iommu, iommu_group="20" if iommu else None)
    return changed_pci(changed(inspection, root=root), *PORTS, acs=acs if root else None, acs_known=root)


def granted(**facts: Any) -> Inspection:
    return board(healthy(2, PRO), **facts)


def refused(**facts: Any) -> Inspection:
    return board(healthy(2), **facts)


def virtual(inspection: Inspection) -> Inspection:
    return changed_machine(inspection, host={"virtualisation": "kvm"})


def vfio(inspection: Inspection) -> Inspection:
    return changed(inspection, host={"vfio_in_use": True})


def no_iommu(inspection: Inspection) -> Inspection:
    return changed(changed_pci(inspection, iommu_type=None, iommu_group=None), host={"iommu_present": False})


def cached(age_s: float | None, boot_age_s: float | None = DAY_S, **host: Any) -> Inspection:
    return healthy(host={"vllm_p2p_cache_age_s": age_s, "boot_age_s": boot_age_s, **host})


FORCED = changed_pair(healthy(2), 0, 1, read=0, write=0)
BRIDGED = changed_pair(healthy(2, RTX_3090), 0, 1, kind="NVLink", read=0, write=0)


@pytest.mark.parametrize(
    ("check", "inspection", "purpose", "expected"),
    [
        pytest.param(p2p_grant_unsafe, granted(iommu="DMA-FQ", acs=0x1D), {}, "fail", id="all three"),
        pytest.param(p2p_grant_unsafe, granted(iommu="DMA", acs=0x04), {}, "fail", id="all three, in other words"),
        pytest.param(p2p_grant_unsafe, granted(iommu="DMA-FQ"), {}, "warn", id="granted and translated"),
        pytest.param(p2p_grant_unsafe, granted(iommu="DMA-FQ"), VLLM, "fail", id="granted and translated, for vLLM"),
        pytest.param(p2p_grant_unsafe, granted(iommu="DMA-FQ", root=False), {}, "warn", id="translated, ACS unread"),
        pytest.param(p2p_grant_unsafe, granted(acs=0x1D), {}, "info", id="granted and redirected"),
        pytest.param(p2p_grant_unsafe, granted(acs=0x1D), TP2, "warn", id="granted and redirected, a model is cut"),
        pytest.param(p2p_grant_unsafe, granted(acs=0x11), TP2, "", id="ACS that does not redirect"),
        pytest.param(p2p_grant_unsafe, granted(), TP2, "", id="granted, and nothing in the way"),
        pytest.param(p2p_grant_unsafe, no_iommu(granted()), TP2, "", id="no IOMMU translates nothing"),
        pytest.param(p2p_grant_unsafe, granted(root=False), {}, "skip", id="identity, ACS unread"),
        pytest.param(p2p_grant_unsafe, granted(iommu=None), {}, "skip", id="group unread"),
        pytest.param(p2p_grant_unsafe, refused(iommu="DMA-FQ", acs=0x1D), TP2, "", id="not granted"),
        pytest.param(p2p_grant_unsafe, board(BRIDGED, iommu="DMA-FQ", acs=0x1D), TP2, "", id="NVLink goes another way"),
        pytest.param(p2p_grant_unsafe, virtual(granted(iommu="DMA-FQ", acs=0x1D)), TP2, "", id="a guest's own tables"),
        pytest.param(iommu_translated, refused(iommu="DMA-FQ"), {}, "warn", id="two cards, translated"),
        pytest.param(iommu_translated, granted(iommu="DMA-FQ"), {}, "info", id="the joined verdict speaks"),
        pytest.param(iommu_translated, vfio(refused(iommu="DMA-FQ")), {}, "info", id="vfio needs it"),
        pytest.param(iommu_translated, virtual(refused(iommu="DMA-FQ")), {}, "info", id="translated in a guest"),
        pytest.param(iommu_translated, refused(), {}, "", id="identity"),
        pytest.param(iommu_translated, changed_pci(healthy(1), iommu_type="DMA-FQ"), {}, "", id="one card has no peer"),
        pytest.param(iommu_translated, refused(iommu=None), {}, "skip", id="type unread"),
        pytest.param(acs_redirect, refused(acs=0x1D), TP2, "info", id="harmless without peer access"),
        pytest.param(acs_redirect, granted(acs=0x1D), TP2, "warn", id="peer access granted and wanted"),
        pytest.param(acs_redirect, granted(acs=0x1D), {}, "info", id="peer access granted"),
        pytest.param(acs_redirect, granted(iommu="DMA", acs=0x1D), TP2, "info", id="the joined verdict speaks of it"),
        pytest.param(acs_redirect, vfio(granted(acs=0x1D)), TP2, "info", id="virtual machines need ACS"),
        pytest.param(acs_redirect, virtual(granted(acs=0x1D)), TP2, "", id="ACS in a guest"),
        pytest.param(acs_redirect, granted(), TP2, "", id="no redirection"),
        pytest.param(acs_redirect, granted(acs=None), TP2, "", id="bridges without ACS"),
        pytest.param(acs_redirect, granted(root=False), TP2, "skip", id="only root may read it"),
        pytest.param(p2p_none, healthy(), {}, "info", id="normal on GeForce"),
        pytest.param(p2p_none, changed_pair(healthy(2, PRO), 0, 1, read=1, write=1), {}, "warn", id="A6000 without"),
        pytest.param(
            p2p_none,
            changed_pair(healthy(2, PRO), 0, 1, read=1),
            {"backend": "llama.cpp"},
            "info",
            id="layers need none",
        ),
        pytest.param(
            p2p_none, virtual(changed_pair(healthy(2, PRO), 0, 1, read=1)), {}, "info", id="without, in a guest"
        ),
        pytest.param(p2p_none, changed_pair(healthy(2, PRO), 0, 1, kind="SYS", read=1), {}, "info", id="two sockets"),
        pytest.param(p2p_none, healthy(2, PRO), {}, "", id="granted"),
        pytest.param(p2p_none, changed_pair(healthy(), 0, 1, read=None, write=None), {}, "skip", id="status unread"),
        pytest.param(patched_p2p_risk, FORCED, {}, "warn", id="GeForce with peer access"),
        pytest.param(patched_p2p_risk, healthy(), {}, "", id="GeForce without"),
        pytest.param(patched_p2p_risk, healthy(2, PRO), {}, "", id="cards to which it is granted by right"),
        pytest.param(patched_p2p_risk, BRIDGED, {}, "", id="peer access over a bridge"),
        pytest.param(
            patched_p2p_risk, changed_pair(healthy(), 0, 1, read=None, write=None), {}, "skip", id="claim unread"
        ),
        pytest.param(vllm_p2p_cache_stale, cached(2 * DAY_S), VLLM, "warn", id="older than the boot, for vLLM"),
        pytest.param(vllm_p2p_cache_stale, cached(2 * DAY_S), {}, "info", id="older than the boot"),
        pytest.param(
            vllm_p2p_cache_stale,
            cached(2 * DAY_S, environment=(("VLLM_SKIP_P2P_CHECK", "0"),)),
            {},
            "warn",
            id="older than the boot, and it is read",
        ),
        pytest.param(vllm_p2p_cache_stale, cached(60.0), VLLM, "", id="written since"),
        pytest.param(vllm_p2p_cache_stale, cached(None), VLLM, "", id="no such file"),
        pytest.param(vllm_p2p_cache_stale, cached(60.0, None), VLLM, "skip", id="boot unknown"),
    ],
)
def test_what_is_said_of_peers(check: Check, inspection: Inspection, purpose: dict[str, Any], expected: str) -> None:
    assert verdict(check, inspection, **purpose) == expected


def test_the_joined_verdict_names_its_three_facts_and_turns_off_only_what_redirects() -> None:
    inspection = changed_pci(granted(iommu="DMA-FQ", acs=0x1D), PORTS[0], acs=0)
    (finding,) = p2p_grant_unsafe.run(inspection, Purpose())
    assert isinstance(finding, Finding)
    assert [each.value for each in finding.evidence] == ["OK", "DMA-FQ", "DMA-FQ", "0x001d"]
    assert [each for each in finding.fix if "setpci" in each] == [f"sudo setpci -s {PORTS[1]} ECAP_ACS+6.w=0000"]


@pytest.mark.parametrize("check", [pytest.param(check, id=check.id) for check in (p2p_grant_unsafe, acs_redirect)])
def test_acs_is_never_turned_off_where_vfio_is_in_use(check: Check) -> None:
    said = [*check.run(vfio(granted(iommu="DMA", acs=0x1D)), Purpose(tensor_parallel=2))]
    assert said
    assert not any("setpci" in line for item in said if isinstance(item, Finding) for line in item.fix)


def test_what_only_root_can_read_says_so() -> None:
    for check in (p2p_grant_unsafe, acs_redirect):
        (skip,) = check.run(granted(root=False), Purpose())
        assert isinstance(skip, Skip)
        assert skip.needs_root


def test_a_bridge_above_both_cards_does_not_decide_over_them() -> None:
    switched = changed_pair(healthy(2, H100), 0, 1, kind="PIX")
    above_both = changed_pci(switched, "0000:0c:00.0", "0000:00:01.0", acs=0x1D)
    assert verdict(acs_redirect, above_both, **TP2) == ""
    assert verdict(acs_redirect, changed_pci(switched, "0000:0f:00.0", acs=0x1D), **TP2) == "warn"
