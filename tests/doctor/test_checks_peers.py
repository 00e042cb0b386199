"""Checks of peer access over PCIe: the grant, what makes it unsafe, and what is believed of it."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mgpu.doctor.check import Check, Finding, Purpose, Skip
from mgpu.doctor.checks.peers import (
    acs_redirect,
    iommu_translated,
    p2p_grant_unsafe,
    p2p_none,
    patched_p2p_risk,
    proved_checks,
    vllm_p2p_cache_stale,
)
from mgpu.doctor.proof import Collective, PairCopy, Proof
from mgpu.machine.inspection import Inspection
from tests.doctor.inspections import (
    DAY_S,
    H100,
    changed,
    changed_gpu,
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
    inspection = changed_pci(inspection, *CARDS, iommu_type=iommu, iommu_group="20")
    return changed_pci(changed(inspection, root=root), *PORTS, acs=acs if root else None, acs_known=root)


def granted(**facts: Any) -> Inspection:
    return board(healthy(2, PRO), **facts)


def refused(**facts: Any) -> Inspection:
    return board(healthy(2), **facts)


def unread_branch() -> Inspection:
    """Two cards, and of the bridges only GPU0's: it does not redirect."""
    whole = granted()
    return changed(whole, pci=tuple(each for each in whole.pci if each.address != PORTS[1]))


def proof(cards: int = 2, **outcomes: str) -> Proof:
    """What a probe finds where all arrives, but for the `pair` from GPU1 to GPU0 and the last all-reduce (`sum`)."""
    pairs = [PairCopy(a=a, b=b, outcome="right") for a, b in itertools.permutations(range(cards), 2)]
    pairs[cards - 1] = dataclasses.replace(pairs[cards - 1], outcome=outcomes.get("pair", "right"))
    sizes = [size for size in (2, 4) if size <= cards]
    sums = [Collective(gpus=tuple(range(size)), control=False, outcome="right") for size in sizes]
    sums[-1] = dataclasses.replace(sums[-1], outcome=outcomes.get("sum", "right"))
    return Proof(pairs=tuple(pairs), collectives=tuple(sums))


def virtual(inspection: Inspection) -> Inspection:
    return changed_machine(inspection, host={"virtualisation": "kvm"})


def vfio(inspection: Inspection) -> Inspection:
    return changed(inspection, host={"vfio_in_use": True})


def no_iommu(inspection: Inspection, *, present: bool | None = False) -> Inspection:
    return changed(changed_pci(inspection, iommu_type=None, iommu_group=None), host={"iommu_present": present})


def cached(age_s: float | None, boot_age_s: float | None = DAY_S, **host: Any) -> Inspection:
    return healthy(host={"vllm_p2p_cache_age_s": age_s, "boot_age_s": boot_age_s, **host})


def without(*names: str, read: int = 5) -> Inspection:
    """Two cards of these names on one socket, to which the driver grants nothing."""
    pair = changed_pair(healthy(2, PRO), 0, 1, read=read, write=read)
    return changed_gpu(changed_gpu(pair, 0, name=names[0]), 1, name=names[1])


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
        pytest.param(p2p_grant_unsafe, granted(acs=0x1D), {}, "warn", id="granted and redirected"),
        pytest.param(p2p_grant_unsafe, granted(acs=0x1D), TP2, "warn", id="granted and redirected, a model is cut"),
        pytest.param(p2p_grant_unsafe, granted(acs=0x11), TP2, "info", id="ACS that does not redirect"),
        pytest.param(p2p_grant_unsafe, granted(), {}, "info", id="granted, nothing in the way, unproven"),
        pytest.param(p2p_grant_unsafe, no_iommu(granted()), TP2, "info", id="no IOMMU translates nothing"),
        pytest.param(p2p_grant_unsafe, granted(root=False), {}, "skip", id="identity, ACS unread"),
        pytest.param(p2p_grant_unsafe, no_iommu(granted(), present=True), {}, "info", id="no IOMMU for cards"),
        pytest.param(p2p_grant_unsafe, granted(iommu=None), {}, "skip", id="group's type unread"),
        pytest.param(p2p_grant_unsafe, changed(granted(), pci=()), {}, "skip", id="bus unread"),
        pytest.param(p2p_grant_unsafe, refused(iommu="DMA-FQ", acs=0x1D), TP2, "", id="not granted"),
        pytest.param(p2p_grant_unsafe, board(BRIDGED, iommu="DMA-FQ", acs=0x1D), TP2, "", id="NVLink goes another way"),
        pytest.param(p2p_grant_unsafe, virtual(granted(iommu="DMA-FQ", acs=0x1D)), TP2, "", id="a guest's own tables"),
        pytest.param(p2p_grant_unsafe, board(FORCED), {}, "", id="of GeForce patched-p2p-risk says it"),
        pytest.param(iommu_translated, refused(iommu="DMA-FQ"), {}, "warn", id="two cards, translated"),
        pytest.param(iommu_translated, granted(iommu="DMA-FQ"), {}, "info", id="the joined verdict speaks"),
        pytest.param(iommu_translated, vfio(refused(iommu="DMA-FQ")), {}, "info", id="vfio needs it"),
        pytest.param(iommu_translated, virtual(refused(iommu="DMA-FQ")), {}, "info", id="translated in a guest"),
        pytest.param(iommu_translated, refused(), {}, "", id="identity"),
        pytest.param(iommu_translated, changed_pci(healthy(1), iommu_type="DMA-FQ"), {}, "", id="one card has no peer"),
        pytest.param(iommu_translated, no_iommu(refused(), present=True), {}, "", id="cards without a group"),
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
        pytest.param(acs_redirect, unread_branch(), TP2, "skip", id="one card's bridge was not read"),
        pytest.param(p2p_grant_unsafe, unread_branch(), TP2, "skip", id="nor what would make its grant unsafe"),
        pytest.param(
            acs_redirect,
            changed(granted(acs=0x1D), host={"vfio_in_use": None}),
            TP2,
            "warn",
            id="whether vfio is in use is unknown",
        ),
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
        pytest.param(p2p_none, without("NVIDIA RTX A6000", "NVIDIA RTX 6000 Ada Generation"), {}, "info", id="unlike"),
        *(
            pytest.param(p2p_none, without(name, name, read=status), {}, "warn", id=f"two {name} should have it")
            for name, status in (
                ("NVIDIA L40S", 5),
                ("Tesla P40", 1),
                ("NVIDIA RTX 6000 Ada Generation", 3),
                ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 4),
                ("NVIDIA A100-SXM4-80GB", 1),
                ("Quadro RTX 8000", 1),
            )
        ),
        *(
            pytest.param(p2p_none, without(name, name), {}, "info", id=f"two {name} have none")
            for name in ("NVIDIA P102-100", "NVIDIA P104-100", "NVIDIA CMP 170HX", "NVIDIA Graphics Device")
        ),
        pytest.param(
            p2p_none, without("NVIDIA L40S", "NVIDIA P102-100"), {}, "info", id="a mining card beside another"
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
    assert [each for each in finding.fix if "setpci" in each] == [
        f"sudo setpci -s {PORTS[1]} ECAP_ACS+6.w=0000  # until the reboot"
    ]


@pytest.mark.parametrize("check", [pytest.param(check, id=check.id) for check in (p2p_grant_unsafe, acs_redirect)])
def test_acs_is_never_turned_off_where_vfio_is_in_use(check: Check) -> None:
    said = [*check.run(vfio(granted(iommu="DMA", acs=0x1D)), Purpose(tensor_parallel=2))]
    assert said
    assert not any("setpci" in line for item in said if isinstance(item, Finding) for line in item.fix)


@pytest.mark.parametrize(
    ("family", "step"),
    [
        pytest.param("debian", "sudo update-grub && sudo reboot", id="Debian and Ubuntu"),
        pytest.param("fedora", "sudo grubby --update-kernel=ALL --args=iommu=pt && sudo reboot", id="Fedora"),
        pytest.param(
            None, "add iommu=pt to the kernel's command line, in the boot loader's configuration", id="another"
        ),
    ],
)
def test_the_kernels_options_are_changed_as_the_distribution_does_it(family: str | None, step: str) -> None:
    translated = changed(refused(iommu="DMA-FQ"), host={"distribution": family, "kernel_command_line": "quiet"})
    (finding,) = iommu_translated.run(translated, Purpose())
    assert isinstance(finding, Finding)
    assert step in finding.fix


@pytest.mark.parametrize(
    ("id", "inspection", "found", "expected"),
    [
        pytest.param("patched-p2p-risk", FORCED, None, "warn", id="patched, not probed"),
        pytest.param("patched-p2p-risk", FORCED, proof(), "info", id="patched, all arrives"),
        pytest.param("patched-p2p-risk", FORCED, proof(pair="wrong"), "warn", id="patched, a copy arrives wrong"),
        pytest.param("patched-p2p-risk", FORCED, proof(sum="hang"), "warn", id="patched, an all-reduce hangs"),
        pytest.param("patched-p2p-risk", FORCED, Proof(problem="no PyTorch"), "warn", id="patched, nothing probed"),
        pytest.param(
            "patched-p2p-risk", FORCED, dataclasses.replace(proof(), collectives=()), "warn", id="patched, copies alone"
        ),
        pytest.param("p2p-grant-unsafe", granted(iommu="DMA-FQ", acs=0x1D), None, "fail", id="all three, not probed"),
        pytest.param(
            "p2p-grant-unsafe", granted(iommu="DMA-FQ", acs=0x1D), proof(), "info", id="all three, all arrives"
        ),
        pytest.param(
            "p2p-grant-unsafe",
            granted(iommu="DMA-FQ", acs=0x1D),
            proof(sum="wrong"),
            "fail",
            id="all three, wrong sums",
        ),
        pytest.param("p2p-grant-unsafe", granted(), None, "info", id="nothing in the way, not probed"),
        pytest.param("p2p-grant-unsafe", granted(), proof(), "", id="nothing in the way, all arrives"),
        pytest.param("p2p-grant-unsafe", granted(root=False), proof(), "", id="ACS unread, all arrives"),
        pytest.param(
            "p2p-grant-unsafe", granted(root=False), proof(pair="hang"), "skip", id="ACS unread, a copy hangs"
        ),
    ],
)
def test_what_a_probe_saw_arrive_is_no_longer_feared(
    id: str,  # noqa: A002
    inspection: Inspection,
    found: Proof | None,
    expected: str,
) -> None:
    (check,) = (each for each in proved_checks(found) if each.id == id)
    assert verdict(check, inspection) == expected


def test_a_proof_of_two_cards_says_nothing_of_four() -> None:
    (check,) = (each for each in proved_checks(proof(2)) if each.id == "p2p-grant-unsafe")
    four = changed_pci(healthy(4, PRO), iommu_type="DMA-FQ", acs=0x1D, acs_known=True)
    assert verdict(check, four) == "fail"
    (check,) = (each for each in proved_checks(proof(4)) if each.id == "p2p-grant-unsafe")
    assert verdict(check, four) == "info"


@pytest.mark.parametrize(
    ("inspection", "expected"),
    [
        pytest.param(healthy(), "export NCCL_P2P_DISABLE=1", id="no bridge"),
        pytest.param(
            changed_pair(healthy(4, RTX_3090), 0, 1, kind="NVLink", read=0, write=0),
            "export NCCL_P2P_LEVEL=NVL",
            id="a bridged pair beside another",
        ),
        pytest.param(
            changed_pci(changed_pair(healthy(4, PRO), 0, 1, kind="NVLink"), iommu_type="DMA-FQ", acs=0x1D),
            "export NCCL_P2P_LEVEL=NVL",
            id="a bridged pair, and an unsafe grant over PCIe",
        ),
    ],
)
def test_what_turns_peer_access_off_leaves_bridges_in_use(inspection: Inspection, expected: str) -> None:
    said = [*p2p_none.run(inspection, Purpose()), *p2p_grant_unsafe.run(inspection, Purpose())]
    steps = [step for item in said if isinstance(item, Finding) for step in item.fix if "NCCL_P2P" in step]
    assert steps
    assert all(step.startswith(expected) for step in steps)


def test_vllms_answer_is_deleted_where_vllm_keeps_it(tmp_path: Path) -> None:
    (finding,) = vllm_p2p_cache_stale.run(cached(2 * DAY_S), Purpose())
    assert isinstance(finding, Finding)
    for variables in ({"VLLM_CACHE_ROOT": "{}/v"}, {"XDG_CACHE_HOME": "{}/x"}, {"HOME": "{}/a home"}):
        (name, place), *_ = variables.items()
        folder = Path(place.format(tmp_path)) / {"HOME": ".cache/vllm", "XDG_CACHE_HOME": "vllm"}.get(name, "")
        folder.mkdir(parents=True)
        answer, other = folder / "gpu_p2p_access_cache_for_0,1.json", folder / "config.json"
        answer.touch()
        other.touch()
        subprocess.run(["sh", "-c", finding.fix[0]], check=True, env={"PATH": os.defpath, name: place.format(tmp_path)})
        assert not answer.exists()
        assert other.exists()


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
