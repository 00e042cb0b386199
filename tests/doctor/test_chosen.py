"""Judging some of the cards: what is wrong with the others is no finding."""

from __future__ import annotations

import dataclasses

import pytest

from mgpu.doctor.catalogue import CHECKS
from mgpu.doctor.check import Purpose, Severity
from mgpu.doctor.chosen import chosen
from mgpu.doctor.diagnosis import diagnose
from mgpu.errors import Missing, UsageError
from mgpu.machine.inspection import Inspection, InstalledEngine, LogEntry

from .inspections import GIB, bare, changed, changed_card, changed_gpu, changed_machine, changed_pair, healthy

THREE = healthy(3, engines=(InstalledEngine(backend="vllm", architectures=("compute_75",), architectures_known=True),))


def faults(inspection: Inspection, selection: str | None, purpose: Purpose | None = None) -> set[str]:
    judged = inspection if selection is None else chosen(inspection, selection)
    said = diagnose(judged, CHECKS, purpose or Purpose())
    return {finding.id for finding in said.findings if finding.severity is not Severity.info}


XID = LogEntry(kind="xid", text="NVRM: Xid 79", number=79, bus_id="0000:30:00.0", age_s=60.0)
SMALL = {"name": "NVIDIA GeForce RTX 3060", "total_bytes": 12 * GIB, "free_bytes": 11 * GIB}


@pytest.mark.parametrize(
    ("inspection", "purpose", "check"),
    [
        pytest.param(changed_card(THREE, 2, compute_mode=2), None, "compute-mode", id="a mode of a card"),
        pytest.param(changed_gpu(THREE, 2, problem="is lost"), None, "gpu-lost", id="a card that is lost"),
        pytest.param(changed(THREE, host={"log": (XID,)}), None, "xid-recent", id="a line in the log"),
        pytest.param(
            changed_gpu(THREE, 2, **SMALL), Purpose(backend="vllm", tensor_parallel=3), "mixed-gpus", id="a small card"
        ),
        pytest.param(
            changed_gpu(THREE, 2, compute_capability="6.1"),
            Purpose(backend="vllm"),
            "arch-unsupported",
            id="an old one",
        ),
        pytest.param(changed_pair(THREE, 0, 2, read=0, write=0), None, "patched-p2p-risk", id="a pair"),
        pytest.param(
            changed_machine(
                changed(THREE, container={"device_nodes": 3, "host_gpus": 4}),
                host=dataclasses.replace(THREE.machine.host, container="docker"),
            ),
            Purpose(tensor_parallel=1),
            "container-visibility",
            id="a card that a container was not given",
        ),
    ],
)
def test_faults_of_other_cards_are_left_out(inspection: Inspection, purpose: Purpose | None, check: str) -> None:
    assert check in faults(inspection, None, purpose)
    assert check not in faults(inspection, "0,1", purpose)
    if check not in ("mixed-gpus", "container-visibility"):
        assert check in faults(inspection, "0,2", purpose)


def test_a_card_that_the_driver_does_not_list_is_another() -> None:
    machine = THREE.machine
    hidden = changed(
        THREE,
        machine=dataclasses.replace(machine, gpus=machine.gpus[:2], links=machine.links[:1]),
        cards=THREE.cards[:2],
        peers=THREE.peers[:1],
    )
    assert "gpu-missing" in faults(hidden, None)
    assert faults(hidden, "0,1") == set()


def test_cards_keep_their_numbers_and_bridges() -> None:
    judged = chosen(THREE, "gpu1,2")
    assert [gpu.index for gpu in judged.machine.gpus] == [1, 2]
    assert [(link.a, link.b) for link in judged.machine.links] == [(1, 2)]
    assert [device.address for device in judged.pci] == [
        device.address for device in THREE.pci if device.address != "0000:10:00.0"
    ]


def test_without_any_card_the_doctor_says_why() -> None:
    with pytest.raises(Missing) as refused:
        chosen(bare(), "2")
    assert "mgpu doctor" in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("selection", "error"),
    [
        pytest.param("0,7", Missing, id="a card that is not there"),
        pytest.param("4", Missing, id="more than there are"),
        pytest.param("none", UsageError, id="none"),
        pytest.param("0,,\x1b", UsageError, id="garbage"),
    ],
)
def test_a_selection_that_is_none_is_refused(selection: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        chosen(THREE, selection)
