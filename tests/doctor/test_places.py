"""Where the board is somebody else's: WSL2, containers and virtual machines. What is hidden there is said once."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mgpu.doctor.catalogue import CHECKS
from mgpu.doctor.check import Purpose, Severity
from mgpu.doctor.checks.host import cannot_read
from mgpu.doctor.checks.peers import acs_redirect
from mgpu.doctor.diagnosis import Diagnosis, diagnose
from mgpu.doctor.report import Report
from mgpu.machine.inspection import DiskSpace, Inspection, InstalledEngine, Unread
from mgpu.machine.snapshot import PcieLink

from .inspections import GIB, changed, changed_machine, healthy

DISK = DiskSpace(role="mgpu models", path="/m", free_bytes=900 * GIB, total_bytes=999 * GIB, file_system="ext4")
ENGINE = InstalledEngine(
    backend="llama.cpp", version="b9000", cuda_runtime=12080, architectures=("sm_89",), architectures_known=True
)
LOG = Unread(what="/dev/kmsg", why="this user may not", needs_root=True)
CONFIG = Unread(what="/sys/bus/pci/devices/0000:00:01.0/config", why="more than the first 64 bytes may not be read")
POWER: dict[str, Any] = dict.fromkeys(("power_default_w", "power_min_w", "power_max_w", "power_requested_w"))


def place(unread: tuple[Unread, ...], of: dict[str, Any], **changes: Any) -> Inspection:
    """Two idle cards that compute as on bare metal, where the log is not shown and processors have no governor."""
    hidden = {"log_known": False, "governors": (), "cpu_power_w": None, "disks": (DISK,)}
    inspection = changed_machine(healthy(), host=of)
    return changed(
        inspection, unread=unread, root=False, engines=(ENGINE,), host=hidden | changes.pop("host", {}), **changes
    )


def without_acs(inspection: Inspection) -> Inspection:
    return changed(
        inspection, pci=tuple(dataclasses.replace(each, acs=None, acs_known=False) for each in inspection.pci)
    )


def wsl() -> Inspection:
    """As nvidia-smi shows it there: no peers, processes or limits of power, and no driver in the kernel."""
    nothing = dict.fromkeys(("loaded_version", "on_disk_version", "open_module", "secure_boot", "uvm_disable_hmm"))
    devices = dict.fromkeys(("uvm_loaded", "uvm_device", "control_device", "persistence_daemon"), False)
    inspection = place(
        (LOG,),
        {"virtualisation": "wsl2", "kernel": "5.15.167.4-microsoft-standard-WSL2"},
        host={"wsl": True, "iommu_present": False},
        driver={**nothing, **devices},
        peers=(),
        pci=(),
    )
    cards = [
        dataclasses.replace(card, used_by_known=False, recovery_action=None, readings=card.readings[:1], **POWER)
        for card in inspection.cards
    ]
    link = PcieLink(gen=1, gen_max=4, width=16, width_max=16)
    gpus = tuple(
        dataclasses.replace(gpu, pcie=link, free_bytes=(gpu.free_bytes or 0) - 2 * GIB)
        for gpu in inspection.machine.gpus
    )
    return changed_machine(changed(inspection, cards=tuple(cards)), gpus=gpus, links=())


DOCKER = without_acs(place((dataclasses.replace(LOG, needs_root=False), CONFIG), {"container": "docker"}))
GUEST = without_acs(place((LOG,), {"virtualisation": "kvm"}, host={"iommu_present": False}))
PLACES = [pytest.param(wsl(), id="WSL2"), pytest.param(DOCKER, id="a container"), pytest.param(GUEST, id="a guest")]


def diagnosed(inspection: Inspection) -> Diagnosis:
    return diagnose(inspection, CHECKS, Purpose())


@pytest.mark.parametrize("inspection", PLACES)
def test_a_healthy_place_is_not_warned_of(inspection: Inspection) -> None:
    assert [finding for finding in diagnosed(inspection).findings if finding.severity is not Severity.info] == []


@pytest.mark.parametrize(
    ("inspection", "reasons"),
    [
        pytest.param(
            wsl(), {"WSL2 does not show it: the driver, the board and the log are those of Windows"}, id="WSL2"
        ),
        pytest.param(DOCKER, {"a container is not shown it: run mgpu doctor on the host"}, id="a container"),
    ],
)
def test_what_is_hidden_has_one_reason_that_no_root_can_change(inspection: Inspection, reasons: set[str]) -> None:
    skipped = [skip for skip in diagnosed(inspection).skipped if not skip.id.endswith("proof")]
    assert "xid-recent" in {skip.id for skip in skipped}
    assert {skip.reason for skip in skipped} == reasons
    assert not any(skip.needs_root for skip in skipped)


def test_on_bare_metal_each_says_what_it_could_not_read() -> None:
    bare_metal = without_acs(place((LOG,), {}))
    assert {skip.id: skip.needs_root for skip in (*acs_redirect.run(bare_metal, Purpose()),)} == {"": True}
    assert [skip.id for skip in diagnosed(bare_metal).skipped if skip.needs_root].count("xid-recent") == 1


def test_what_a_container_hides_besides_is_still_named() -> None:
    broken = Unread(what="the host", why="the reader itself failed")
    (skip,) = cannot_read.run(changed(DOCKER, unread=(*DOCKER.unread, broken)), Purpose())
    assert getattr(skip, "reason", "") == "could not be read: the host (the reader itself failed)"


def test_there_are_no_best_sets_of_cards_whose_paths_are_not_known() -> None:
    def sets(inspection: Inspection) -> int:
        return len(
            Report(
                inspection=inspection,
                checks=CHECKS,
                diagnosis=diagnosed(inspection),
                purpose=Purpose(),
                seconds=0.0,
            ).groups
        )

    assert (sets(wsl()), sets(DOCKER)) == (0, 1)
