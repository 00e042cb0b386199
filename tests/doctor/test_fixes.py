"""What --fix may do: only what can be undone, only for what was found, and what is said of how it went."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgpu.doctor.catalogue import CHECKS
from mgpu.doctor.check import Finding, Purpose, Severity
from mgpu.doctor.diagnosis import Diagnosis, diagnose
from mgpu.doctor.fixes import Remedy, apply, fixable_ids, remedies
from mgpu.machine.inspection import Inspection

from .inspections import changed, changed_card, changed_gpu, changed_machine, changed_pci, healthy

REDIRECTS = 0x1D
PORTS = ("0000:00:01.0", "0000:00:01.1")


def found(*ids: str, gpus: tuple[int, ...] = (), severity: Severity = Severity.warn) -> Diagnosis:
    findings = tuple(Finding(id=name, severity=severity, summary="x", gpus=gpus) for name in ids)
    return Diagnosis(findings=findings, skipped=(), well=())


def lines(inspection: Inspection, *ids: str, gpus: tuple[int, ...] = ()) -> list[str]:
    return [" ".join(remedy.argv) for remedy in remedies(inspection, found(*ids, gpus=gpus))]


CAPPED = changed_card(healthy(), 1, power_requested_w=300.0, power_enforced_w=250.0)
UVM = changed(healthy(), driver={"uvm_loaded": False, "uvm_device": False})
REDIRECTED = changed_pci(healthy(), *PORTS, acs=REDIRECTS)


@pytest.mark.parametrize(
    ("inspection", "finding", "expected"),
    [
        pytest.param(
            changed_card(healthy(), 1, persistence=False),
            "persistence-off",
            ["nvidia-smi -i 0000:20:00.0 -pm 1"],
            id="persistence of the one card that lacks it",
        ),
        pytest.param(CAPPED, "power-capped", ["nvidia-smi -i 0000:20:00.0 -pl 450"], id="a limit back to its default"),
        pytest.param(healthy(), "power-capped", [], id="no limit where all have their default"),
        pytest.param(
            changed_card(CAPPED, 1, power_default_w=None), "power-capped", [], id="no limit where none is known"
        ),
        pytest.param(
            changed_card(CAPPED, 1, power_max_w=400.5),
            "power-capped",
            ["nvidia-smi -i 0000:20:00.0 -pl 400"],
            id="no limit above what the card takes",
        ),
        pytest.param(
            changed_card(CAPPED, 1, power_default_w=200.0, power_min_w=310.5),
            "power-capped",
            ["nvidia-smi -i 0000:20:00.0 -pl 311"],
            id="nor below",
        ),
        pytest.param(
            changed_card(CAPPED, 1, power_requested_w=450.0), "power-capped", [], id="no limit that is set already"
        ),
        pytest.param(
            changed_gpu(changed_card(CAPPED, 1, power_requested_w=None), 1, name="NVIDIA GeForce RTX 4090 Laptop GPU"),
            "power-capped",
            [],
            id="no limit in a laptop",
        ),
        pytest.param(
            changed_card(healthy(), 0, compute_mode=3),
            "compute-mode",
            ["nvidia-smi -i 0000:10:00.0 -c 0"],
            id="a card for several processes",
        ),
        pytest.param(
            changed_machine(UVM, host={"container": "lxc"}), "uvm-missing", [], id="no module from within a container"
        ),
        pytest.param(UVM, "uvm-missing", ["modprobe nvidia_uvm", "nvidia-modprobe -c0 -u"], id="CUDA's module"),
        pytest.param(
            REDIRECTED,
            "acs-redirect",
            [f"setpci -s {port} ECAP_ACS+6.w=0000" for port in PORTS],
            id="both bridges between two cards",
        ),
        pytest.param(
            changed_pci(healthy(), *PORTS, acs=0x01), "acs-redirect", [], id="no bridge that redirects nothing"
        ),
        pytest.param(changed_pci(healthy(), *PORTS, acs=None), "acs-redirect", [], id="no bridge that was not read"),
        pytest.param(changed_pci(healthy(1), PORTS[0], acs=REDIRECTS), "acs-redirect", [], id="no bridge of one card"),
        pytest.param(healthy(), "iommu-translated", [], id="nothing for what only the boot can change"),
        pytest.param(
            changed(healthy(), cards=()), "persistence-off", [], id="nothing for cards of which nothing is known"
        ),
    ],
)
def test_a_finding_has_its_commands(inspection: Inspection, finding: str, expected: list[str]) -> None:
    assert lines(inspection, finding) == expected


def test_only_the_cards_of_the_finding_are_touched() -> None:
    both = changed_card(changed_card(healthy(), 0, compute_mode=3), 1, compute_mode=3)
    assert lines(both, "compute-mode", gpus=(1,)) == ["nvidia-smi -i 0000:20:00.0 -c 0"]


@pytest.mark.parametrize(
    ("inspection", "finding", "is_mended"),
    [
        pytest.param(CAPPED, "power-capped", False, id="a limit that was set on purpose"),
        pytest.param(REDIRECTED, "acs-redirect", False, id="bridges that do no harm"),
        pytest.param(REDIRECTED, "p2p-grant-unsafe", False, id="a grant that is proved"),
        pytest.param(UVM, "uvm-missing", True, id="a device that the first program makes"),
        pytest.param(changed_card(healthy(), 1, persistence=False), "persistence-off", True, id="cards let go of"),
    ],
)
def test_what_is_only_said_is_mended_only_where_that_costs_nothing(
    inspection: Inspection, finding: str, is_mended: bool
) -> None:
    assert bool(remedies(inspection, found(finding, severity=Severity.info))) is is_mended


@pytest.mark.parametrize(
    ("inspection", "purpose"),
    [
        pytest.param(changed_card(healthy(), 1, power_requested_w=400.0), Purpose(), id="a rig capped for its supply"),
        pytest.param(REDIRECTED, Purpose(backend="vllm", tensor_parallel=2), id="ACS between cards without peers"),
    ],
)
def test_a_diagnosis_without_a_fault_changes_neither_power_nor_bridges(
    inspection: Inspection, purpose: Purpose
) -> None:
    assert remedies(inspection, diagnose(inspection, CHECKS, purpose)) == ()


def test_only_bridges_between_the_cards_of_the_finding_are_touched() -> None:
    four = changed_pci(healthy(4), acs=REDIRECTS)
    assert lines(four, "p2p-grant-unsafe", gpus=(0, 1)) == lines(REDIRECTED, "acs-redirect")


def test_a_power_limit_is_undone_to_the_one_that_was_set() -> None:
    (remedy,) = remedies(CAPPED, found("power-capped"))
    assert "-pl 300," in remedy.undo


def test_two_findings_with_the_same_command_have_it_once() -> None:
    assert lines(REDIRECTED, "p2p-grant-unsafe", "acs-redirect") == lines(REDIRECTED, "acs-redirect")


@pytest.mark.parametrize(
    ("inspection", "why"),
    [
        pytest.param(changed(REDIRECTED, host={"vfio_in_use": True}), "virtual machine", id="vfio is in use"),
        pytest.param(changed(REDIRECTED, host={"vfio_in_use": None}), "could not be read", id="vfio is unknown"),
        pytest.param(
            changed_pci(REDIRECTED, "0000:10:00.0", driver="vfio-pci"), "virtual machine", id="a card is passed on"
        ),
        pytest.param(
            changed_pci(REDIRECTED, "0000:10:00.0", driver="nvgrace_gpu_vfio_pci"),
            "virtual machine",
            id="a card is passed on by another driver of that family",
        ),
        pytest.param(
            changed_machine(REDIRECTED, host={"virtualisation": "kvm"}), "virtual machine", id="inside a guest"
        ),
    ],
)
def test_acs_is_left_alone_where_something_may_depend_on_it(inspection: Inspection, why: str) -> None:
    refused = remedies(inspection, found("acs-redirect"))
    assert len(refused) == 2
    for remedy in refused:
        outcome = apply(remedy, root=True)
        assert outcome.result == "refused"
        assert why in (outcome.detail or "")


def test_every_remedy_says_how_it_is_undone() -> None:
    everything = changed(
        changed_card(changed_card(CAPPED, 0, compute_mode=3), 0, persistence=False),
        driver={"uvm_loaded": False, "uvm_device": False},
        pci=REDIRECTED.pci,
    )
    made = remedies(everything, found(*fixable_ids()))
    assert {remedy.id for remedy in made} == set(fixable_ids()) - {"p2p-grant-unsafe"}
    assert all(remedy.undo and remedy.does for remedy in made)
    assert f"ECAP_ACS+6.w={REDIRECTS:04x}" in next(each.undo for each in made if each.argv[0] == "setpci")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs that stand in for sudo and nvidia-smi."""
    for name, text in {
        "sudo": 'printf "%s\\n" "$*" >> calls; exec "$@"\n',
        "-n": 'exec "$@"\n',
        "works": "exit 0\n",
        "breaks": "echo first; printf 'Insufficient\\033 permissions\\nand more\\n' >&2; exit 4\n",
        "mute": "exit 3\n",
    }.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\ncd {tmp_path}\n{text}")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


@pytest.mark.parametrize(
    ("program", "result", "detail"),
    [
        pytest.param("works", "done", None, id="it works"),
        pytest.param("breaks", "failed", "Insufficient", id="it fails and says why"),
        pytest.param("mute", "failed", "exit status 3", id="it fails without a word"),
        pytest.param("absent", "failed", "absent: No such file", id="it is not there"),
    ],
)
def test_what_became_of_a_command_is_told(programs: Path, program: str, result: str, detail: str | None) -> None:
    remedy = Remedy(id="x", does="does", argv=(program, "-i", "a b; rm -rf /"), undo="undo")
    outcome = apply(remedy, root=True)
    assert outcome.result == result
    assert (detail is None) == (outcome.detail is None)
    assert (detail or "") in (outcome.detail or "")
    assert (outcome.detail or "").isprintable()
    assert not (programs / "calls").exists()


def test_nothing_is_mended_while_another_machines_files_were_read(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MGPU_ROOT", str(programs))
    outcome = apply(Remedy(id="x", does="does", argv=("works",), undo="undo"), root=False)
    assert (outcome.result, outcome.detail) == ("refused", "MGPU_ROOT names another machine's files")
    assert not (programs / "calls").exists()


def test_without_root_sudo_is_used_and_no_shell(programs: Path) -> None:
    remedy = Remedy(id="x", does="does", argv=("works", "a b; touch harm"), undo="undo")
    assert remedy.shown(root=False) == "sudo works 'a b; touch harm'"
    assert apply(remedy, root=False).result == "done"
    assert apply(remedy, root=False, ask_password=False).result == "done"
    assert (programs / "calls").read_text().splitlines() == ["works a b; touch harm", "-n works a b; touch harm"]
    assert not (programs / "harm").exists()
