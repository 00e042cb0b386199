"""Checks of NVLink and of NVSwitch's fabric manager."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mgpu.doctor.check import Check, Finding, Purpose
from mgpu.doctor.checks.nvlink import fabric_manager, nvlink_errors, nvlink_inactive, nvlink_unused
from mgpu.machine.inspection import Inspection, UnitVariable, Unread
from mgpu.machine.snapshot import NvLinkPort
from tests.doctor.inspections import H100, changed, changed_card, changed_gpu, changed_pair, healthy, verdict

RTX_3090 = "NVIDIA GeForce RTX 3090"


def ports(up: int, of: int = 4, remote: str | None = None) -> tuple[NvLinkPort, ...]:
    return tuple(NvLinkPort(port=port, active=port < up, remote_bus_id=remote) for port in range(of))


def bridged(up: int = 4, cards: int = 2) -> Inspection:
    """GPU0 and GPU1 joined by a bridge, with that many ports up."""
    inspection = changed_pair(healthy(cards, RTX_3090), 0, 1, kind="NVLink", read=0, write=0)
    for index in (0, 1):
        inspection = changed_gpu(inspection, index, nvlink=ports(up, remote="0000:20:00.0"))
        inspection = changed_card(inspection, index, readings={"nvlink_errors": 0})
    return inspection


def switched(state: int | None = 3, **driver: Any) -> Inspection:
    """Eight H100 behind switches, whose fabric is in that state."""
    inspection = healthy(8, H100, driver=driver)
    for index in range(8):
        inspection = changed_card(inspection, index, fabric_state=state)
    return inspection


def in_unit(name: str, value: str) -> Inspection:
    variable = UnitVariable(unit="vllm.service", path="/etc/vllm.env", name=name, value=value)
    return changed(bridged(), host={"unit_variables": (variable,)})


def counted(*counts: int | None) -> Inspection:
    """GPU1's NVLink errors at looks that are 0.3 s apart."""
    reading = bridged().cards[1].readings[0]
    return changed_card(
        bridged(),
        1,
        readings=tuple(
            dataclasses.replace(reading, at_s=look * 0.3, nvlink_errors=count) for look, count in enumerate(counts)
        ),
    )


def setting(name: str, value: str, where: str = "environment", inspection: Inspection | None = None) -> Inspection:
    return changed(inspection or bridged(), host={where: ((name, value),)})


@pytest.mark.parametrize(
    ("check", "inspection", "expected"),
    [
        pytest.param(fabric_manager, switched(state=None, fabric_manager="inactive"), "fail", id="not running"),
        pytest.param(fabric_manager, switched(state=0, fabric_manager="inactive"), "fail", id="not running, A100"),
        pytest.param(
            fabric_manager, switched(state=None, fabric_manager_version="580.95.05"), "fail", id="other version"
        ),
        pytest.param(fabric_manager, switched(fabric_manager="inactive"), "", id="run by another than systemd"),
        pytest.param(
            fabric_manager,
            changed_card(switched(fabric_manager="inactive"), 5, fabric_status=1),
            "fail",
            id="not running, one card not set up",
        ),
        pytest.param(fabric_manager, changed_card(healthy(8, H100), 3, fabric_state=2), "fail", id="not set up yet"),
        pytest.param(fabric_manager, healthy(8, H100), "", id="running, of the driver's version"),
        pytest.param(fabric_manager, healthy(driver={"fabric_manager": "failed"}), "", id="no switch needs none"),
        pytest.param(fabric_manager, switched(state=None, fabric_manager=None), "skip", id="state unread"),
        pytest.param(fabric_manager, healthy(8, H100, driver={"nvswitch": None}), "skip", id="switch unread"),
        pytest.param(fabric_manager, healthy(driver={"nvswitch": None}), "", id="no links, no switch to ask of"),
        pytest.param(nvlink_inactive, bridged(up=2), "fail", id="half of the ports"),
        pytest.param(nvlink_inactive, changed_gpu(healthy(8, H100), 2, nvlink=ports(0, 18)), "fail", id="SXM, none up"),
        pytest.param(nvlink_inactive, healthy(2, RTX_3090), "info", id="two that could be bridged"),
        pytest.param(nvlink_inactive, healthy(1, RTX_3090), "", id="one has no partner"),
        pytest.param(nvlink_inactive, bridged(cards=3), "", id="the third beside a bridged pair"),
        pytest.param(nvlink_inactive, bridged(cards=4), "info", id="another pair beside a bridged one"),
        pytest.param(nvlink_inactive, bridged(), "", id="all up"),
        pytest.param(
            nvlink_inactive,
            changed_gpu(healthy(1), 0, name="NVIDIA A100 80GB PCIe", nvlink=ports(4, 12)),
            "",
            id="one of three bridges on a PCIe model",
        ),
        pytest.param(nvlink_errors, counted(0, 5, 12), "warn", id="errors at every look"),
        pytest.param(nvlink_errors, counted(0, 1, 1), "info", id="one packet repeated is no bad link"),
        pytest.param(nvlink_errors, counted(0, 12), "info", id="a step between two looks may be the only one"),
        pytest.param(nvlink_errors, counted(4000, 4000, 4000), "info", id="errors of the past, however many"),
        pytest.param(nvlink_errors, counted(4000), "info", id="an idle card is looked at once"),
        pytest.param(nvlink_errors, bridged(), "", id="no errors"),
        pytest.param(nvlink_errors, healthy(2, RTX_3090), "", id="no bridge, nothing to count"),
        pytest.param(nvlink_errors, counted(None, None), "skip", id="counters unread"),
        pytest.param(nvlink_unused, setting("NCCL_P2P_DISABLE", "1"), "warn", id="disabled in the environment"),
        pytest.param(
            nvlink_unused, setting("NCCL_P2P_LEVEL", "loc", "nccl_configuration"), "warn", id="local only in nccl.conf"
        ),
        pytest.param(nvlink_unused, setting("NCCL_P2P_DISABLE", "0"), "", id="not disabled"),
        pytest.param(nvlink_unused, in_unit("NCCL_P2P_DISABLE", "1"), "warn", id="disabled for a service"),
        pytest.param(nvlink_unused, in_unit("NCCL_P2P_DISABLE", "0"), "", id="not disabled for a service"),
        pytest.param(
            nvlink_unused,
            changed(bridged(), unread=(Unread(what="/etc/vllm.env (vllm.service)", why="denied"),)),
            "skip",
            id="a service's settings unread",
        ),
        pytest.param(nvlink_unused, setting("NCCL_P2P_LEVEL", "NVL"), "", id="bridge only"),
        pytest.param(
            nvlink_unused, setting("NCCL_P2P_DISABLE", "1", inspection=healthy()), "", id="no bridge to waste"
        ),
    ],
)
def test_what_is_said_of_nvlink(check: Check, inspection: Inspection, expected: str) -> None:
    purpose: dict[str, Any] = {}
    assert verdict(check, inspection, **purpose) == expected


@pytest.mark.parametrize(
    ("inspection", "summary"),
    [
        pytest.param(counted(3, 5, 12), "GPU1's NVLink counted 9 errors in 0.6 s", id="now"),
        pytest.param(counted(7, 7), "GPU1's NVLink counted 7 errors in the past", id="earlier"),
        pytest.param(counted(9, 1), "GPU1's NVLink counted 1 error in the past", id="reset in between"),
    ],
)
def test_what_was_counted_is_said_with_its_time(inspection: Inspection, summary: str) -> None:
    (finding,) = nvlink_errors.run(inspection, Purpose())
    assert isinstance(finding, Finding)
    assert finding.summary == summary
