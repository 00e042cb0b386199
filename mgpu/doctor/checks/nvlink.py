"""Checks of NVLink: bridges that are down, ports that err, bridges that a setting leaves idle; NVSwitch's manager."""

from __future__ import annotations

import itertools

from mgpu.doctor import subjects
from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, check
from mgpu.doctor.commands import install_fabric_manager
from mgpu.doctor.facts import named, nvidia_cards, settings, unread, unread_settings
from mgpu.machine.families import family
from mgpu.machine.inspection import Inspection
from mgpu.machine.layout import cards, pairs
from mgpu.units import seconds

_FABRIC_COMPLETED = 3
_FABRIC_UNDONE = (1, 2)  # not started, in progress


@check("fabric-manager", Area.driver, "A", about=(subjects.nvidia_card, subjects.nvswitch))
def fabric_manager(inspection: Inspection, _purpose: Purpose) -> Said:
    """A machine with NVSwitch without a running fabric manager of the driver's version.

    Read: /proc/driver/nvidia-nvswitch, the service's state, its version and each card's fabric state (3 is done).
    Rule: fail on HGX machines (A100, H100, H200, B200 SXM) where it does not run, or is not of exactly the driver's
    version. Without a switch it has nothing to do, and is not mentioned.
    Why: CUDA says "system not yet initialized" (802) until it has set up the switches.
    Do: install it in the driver's version and start it: sudo systemctl enable --now nvidia-fabricmanager.
    """
    driver = inspection.driver
    if driver.nvswitch is None:
        yield unread(inspection, "whether there is an NVSwitch", "nvswitch")
        return
    if all((card.fabric_state, card.fabric_status) == (_FABRIC_COMPLETED, 0) for _, card in nvidia_cards(inspection)):
        return
    version = driver.loaded_version or (inspection.machine.driver.version if inspection.machine.driver else None)
    install = install_fabric_manager(inspection, version)
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
            fix=(*install, start),
        )
    elif version and driver.fabric_manager_version not in (None, version):
        yield Finding(
            severity=Severity.fail,
            summary="the fabric manager is not of the driver's version: CUDA error 802",
            evidence=(
                Evidence(path="nv-fabricmanager --version", value=driver.fabric_manager_version or "unknown"),
                Evidence(path="/sys/module/nvidia/version", value=version),
            ),
            fix=(*install, "sudo systemctl restart nvidia-fabricmanager"),
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


@check("nvlink-inactive", Area.p2p, "B", about=(subjects.nvlink_port,))
def nvlink_inactive(inspection: Inspection, _purpose: Purpose) -> Said:
    """A card has some NVLink ports up and some down, or could be bridged and is not.

    Read: NVML's state of every port.
    Rule: fail for some but not all ports of a card, and with NVSwitch for none; info for a card without a bridge, where
    another card could be its partner. PCIe models of A100 and H100 may carry fewer bridges than they have room for, and
    are not blamed.
    Why: a bridge that is loose, or of the wrong spacing. A whole one takes 43 tokens/s to 67 on gen 3, 3 to 5 % in
    decode on recent vLLM, 35 to 49 % in prefill.
    Do: reseat the bridge, or fit one.
    """
    able = [gpu for gpu in cards(inspection) if gpu.nvlink]
    unbridged = []
    for gpu in able:
        up, all_ports = sum(port.active for port in gpu.nvlink), len(gpu.nvlink)
        if up == all_ports or (up and family(gpu.name).several_bridges):
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


@check("nvlink-errors", Area.p2p, "B", about=(subjects.nvlink,))
def nvlink_errors(inspection: Inspection, _purpose: Purpose) -> Said:
    """NVLink ports count errors.

    Read: NVML's counters of replays, recoveries and checksums, three times within a second where a card works.
    Rule: warn for a count that has grown at every look; info for one that grows once, as links repeat a packet now and
    then, or that stands still.
    Why: Xid 74 is what follows.
    Do: reseat the bridge; the counters can be reset to watch them.
    """
    unknown = []
    for gpu, card in nvidia_cards(inspection):
        if not any(port.active for port in gpu.nvlink):
            continue
        looks = [(each.at_s, each.nvlink_errors) for each in card.readings if each.nvlink_errors is not None]
        if not looks:
            unknown.append(gpu.index)
        elif looks[-1][1] > 0:
            (start_s, first), (end_s, last) = looks[0], looks[-1]
            steps = [later > earlier for (_, earlier), (_, later) in itertools.pairwise(looks)]
            grows = len(steps) > 1 and all(steps)
            span = seconds(max(end_s - start_s, 0))
            count, when = (last - first, f"in {span}") if last > first else (last, "in the past")
            counts = ", ".join(str(total) for _, total in looks[:4])
            yield Finding(
                severity=Severity.warn if grows else Severity.info,
                summary=f"GPU{gpu.index}'s NVLink counted {count} error{'s' * (count != 1)} {when}",
                evidence=(Evidence(path=f"GPU{gpu.index} NVLink errors", value=counts),),
                fix=("nvidia-smi nvlink -e", "turn the machine off and reseat the NVLink bridge") if grows else (),
                gpus=(gpu.index,),
            )
    if unknown:
        yield unread(inspection, "the NVLink error counters", "NvLink", of=unknown)


@check("nvlink-unused", Area.p2p, "B", about=(subjects.nvlink,))
def nvlink_unused(inspection: Inspection, _purpose: Purpose) -> Said:
    """Cards are joined by NVLink, but a setting keeps NCCL from using it.

    Read: the environment, NCCL's own files (/etc/nccl.conf, ~/.nccl.conf) and the units of systemd that run engines,
    not compose files.
    Rule: warn for NCCL_P2P_DISABLE=1 or NCCL_P2P_LEVEL=LOC, which turn all peer access off, the bridge too.
    Why: 10 to 60 % of the speed lie idle. Often left from a day when peer access over PCIe hung.
    Do: NCCL_P2P_LEVEL=NVL keeps that off and the bridge on.
    """
    if not any(pair.nvlink for pair in pairs(inspection)):
        return
    for each in settings(inspection):
        disabled = each.name == "NCCL_P2P_DISABLE" and each.value.strip() not in ("", "0")
        local = each.name == "NCCL_P2P_LEVEL" and each.value.strip().upper() in ("LOC", "0")
        if disabled or local:
            yield Finding(
                severity=Severity.warn,
                summary=f"the NVLink bridge lies idle: {each.name} is set in {each.place[:24]}",
                evidence=(Evidence(path=each.path, value=f"{each.name}={each.value}"[:120]),),
                fix=(*each.removal, "export NCCL_P2P_LEVEL=NVL"),
            )
    yield from unread_settings(inspection)


CHECKS: tuple[Check, ...] = (fabric_manager, nvlink_inactive, nvlink_errors, nvlink_unused)
