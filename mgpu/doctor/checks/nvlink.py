"""Checks of NVLink: bridges that are down, ports that err, bridges that a setting leaves idle; NVSwitch's manager."""

from __future__ import annotations

import re

from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, check
from mgpu.doctor.facts import named, nvidia_cards, unread
from mgpu.machine.inspection import Inspection
from mgpu.machine.layout import cards, pairs
from mgpu.machine.snapshot import Gpu

_FABRIC_COMPLETED = 3
_FABRIC_UNDONE = (1, 2)  # not started, in progress


@check("fabric-manager", Area.driver, "A")
def fabric_manager(inspection: Inspection, _purpose: Purpose) -> Said:
    """A machine with NVSwitch without a running fabric manager of the driver's version.

    Read from /proc/driver/nvidia-nvswitch, the service's state, its version and each card's fabric state (3 is done).
    On HGX machines (A100, H100, H200, B200 SXM) CUDA says "system not yet initialized" (802) until it has set up the
    switches, and it only talks to the driver of exactly its own version: a failure. Without a switch the service has
    nothing to do, and is not mentioned.
    """
    driver = inspection.driver
    switched = [port for gpu in cards(inspection) for port in gpu.nvlink if port.active and not port.remote_bus_id]
    if driver.nvswitch is None and switched:
        yield unread(inspection, "whether there is an NVSwitch", "nvswitch")
    if not driver.nvswitch or not cards(inspection):
        return
    version = driver.loaded_version or (inspection.machine.driver.version if inspection.machine.driver else None)
    branch = (version or "").split(".")[0]
    install = f"sudo apt install nvidia-fabricmanager-{branch}" + (f"={version}-1" if version else "")
    undone = [
        gpu.index
        for gpu, card in nvidia_cards(inspection)
        # State 0 is "not supported": an A100 says so on a fabric that works.
        if card.fabric_state in _FABRIC_UNDONE or (card.fabric_state == _FABRIC_COMPLETED and card.fabric_status)
    ]
    running = driver.fabric_manager in ("active", "running")
    start = "sudo systemctl enable --now nvidia-fabricmanager"
    seen = Evidence(path="systemctl is-active nvidia-fabricmanager", value=driver.fabric_manager or "unknown")
    if driver.fabric_manager is not None and not running:
        yield Finding(
            severity=Severity.fail,
            summary="NVSwitch needs the fabric manager, and it does not run: CUDA error 802",
            evidence=(seen,),
            fix=(install, start),
        )
    elif version and driver.fabric_manager_version not in (None, version):
        yield Finding(
            severity=Severity.fail,
            summary="the fabric manager is not of the driver's version: CUDA error 802",
            evidence=(
                Evidence(path="nv-fabricmanager --version", value=driver.fabric_manager_version or "unknown"),
                Evidence(path="/sys/module/nvidia/version", value=version),
            ),
            fix=(install, "sudo systemctl restart nvidia-fabricmanager"),
        )
    elif undone:
        yield Finding(
            severity=Severity.fail,
            summary=f"{named(undone)}: the NVSwitch fabric is not set up",
            evidence=(seen, Evidence(path="nvmlDeviceGetGpuFabricInfoV", value="not completed")),
            fix=("sudo systemctl restart nvidia-fabricmanager", "sudo journalctl -u nvidia-fabricmanager -b"),
            gpus=tuple(undone),
        )
    elif driver.fabric_manager is None:
        yield unread(inspection, "the state of nvidia-fabricmanager", "fabricmanager")


@check("nvlink-inactive", Area.p2p, "B")
def nvlink_inactive(inspection: Inspection, _purpose: Purpose) -> Said:
    """A card has some NVLink ports up and some down, or could be bridged and is not.

    Read from NVML's state of every port. None of a card's ports up means that no bridge is fitted: only said, and only
    where another card could be its partner (a bridge takes 43 tokens/s to 67 on gen 3, 3 to 5 % in decode on recent
    vLLM, 35 to 49 % in prefill). Some but not all is a failure: the bridge is loose, or of the wrong spacing. PCIe
    models of A100 and H100 may carry fewer bridges than they have room for, and are not blamed. With NVSwitch, all
    ports down is a failure.
    """
    able = [gpu for gpu in cards(inspection) if gpu.nvlink]
    unbridged = []
    for gpu in able:
        up, all_ports = sum(port.active for port in gpu.nvlink), len(gpu.nvlink)
        if up == all_ports or (up and _takes_several_bridges(gpu)):
            continue
        if not up and not inspection.driver.nvswitch:
            unbridged.append(gpu)
            continue
        yield Finding(
            severity=Severity.fail,
            summary=f"GPU{gpu.index} has {up} of {all_ports} NVLink ports up",
            evidence=tuple(
                Evidence(path=f"GPU{gpu.index} NVLink {port.port}", value="inactive")
                for port in gpu.nvlink
                if not port.active
            )[:4],
            fix=(
                "turn the machine off and reseat the NVLink bridge; its spacing must match the slots",
                "nvidia-smi nvlink -s",
            ),
            gpus=(gpu.index,),
        )
    partners = [gpu for gpu in unbridged if sum(other.name == gpu.name for other in unbridged) > 1]
    if partners:
        yield Finding(
            severity=Severity.info,
            summary=f"{named(gpu.index for gpu in partners)} can take an NVLink bridge; none is fitted",
            evidence=tuple(
                Evidence(path=f"GPU{gpu.index} NVLink", value=f"0 of {len(gpu.nvlink)} ports up")
                for gpu in partners[:4]
            ),
            gpus=tuple(gpu.index for gpu in partners),
        )


@check("nvlink-errors", Area.p2p, "B")
def nvlink_errors(inspection: Inspection, _purpose: Purpose) -> Said:
    """NVLink ports count errors.

    Read from NVML's counters of replays, recoveries and checksums, several times. A count that grows is a warning (Xid
    74 is what follows); one that stands still is only said. Reseat the bridge; the counters can be reset to watch them.
    """
    unknown = []
    for gpu, card in nvidia_cards(inspection):
        if not any(port.active for port in gpu.nvlink):
            continue
        counts = [reading.nvlink_errors for reading in card.readings if reading.nvlink_errors is not None]
        if not counts:
            unknown.append(gpu.index)
        elif counts[-1] > 0:
            grows = counts[-1] > counts[0]
            yield Finding(
                severity=Severity.warn if grows else Severity.info,
                summary=f"GPU{gpu.index}'s NVLink "
                + ("counts errors right now" if grows else "had errors in the past"),
                evidence=(Evidence(path=f"GPU{gpu.index} NVLink errors", value=f"{counts[0]}, then {counts[-1]}"),),
                fix=("nvidia-smi nvlink -e", "turn the machine off and reseat the NVLink bridge") if grows else (),
                gpus=(gpu.index,),
            )
    if unknown:
        yield unread(inspection, "the NVLink error counters", "NvLink", of=unknown)


@check("nvlink-unused", Area.p2p, "B")
def nvlink_unused(inspection: Inspection, _purpose: Purpose) -> Said:
    """Cards are joined by NVLink, but a setting keeps NCCL from using it.

    Read from the environment and NCCL's own files (/etc/nccl.conf, ~/.nccl.conf): NCCL_P2P_DISABLE=1 or
    NCCL_P2P_LEVEL=LOC turn all peer access off, the bridge too. A warning: 10 to 60 % of the speed lie idle. Often left
    from a day when peer access over PCIe hung; NCCL_P2P_LEVEL=NVL keeps that off and the bridge on.
    """
    if not any(pair.nvlink for pair in pairs(inspection)):
        return
    for where, settings in (
        ("environment", inspection.host.environment),
        ("nccl.conf", inspection.host.nccl_configuration),
    ):
        for name, value in settings:
            disabled = name == "NCCL_P2P_DISABLE" and value.strip() not in ("", "0")
            local = name == "NCCL_P2P_LEVEL" and value.strip().upper() in ("LOC", "0")
            if disabled or local:
                yield Finding(
                    severity=Severity.warn,
                    summary=f"the NVLink bridge lies idle: {name} is set"[:90],
                    evidence=(Evidence(path=where, value=f"{name}={value}"[:120]),),
                    fix=(
                        f"unset {name}" if where == "environment" else f"remove {name} from nccl.conf",
                        "export NCCL_P2P_LEVEL=NVL",
                    ),
                )


def _takes_several_bridges(gpu: Gpu) -> bool:
    return re.search(r"PCIe|NVL\b|GV100", gpu.name, re.IGNORECASE) is not None


CHECKS: tuple[Check, ...] = (fabric_manager, nvlink_inactive, nvlink_errors, nvlink_unused)
