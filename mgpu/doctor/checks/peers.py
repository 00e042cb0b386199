"""Checks of peer access over PCIe: granted where it cannot work, held back, missing, or believed from an old test."""

from __future__ import annotations

from collections.abc import Iterable

from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, Skip, check
from mgpu.doctor.facts import named, unread
from mgpu.machine.inspection import Inspection, PciDevice
from mgpu.machine.layout import Pair, bridges_between, cards, device, is_geforce, is_virtual, pairs
from mgpu.units import seconds

_REQUEST_REDIRECT, _COMPLETION_REDIRECT = 0x04, 0x08
_PASS_THROUGH = (
    "add iommu=pt to GRUB_CMDLINE_LINUX_DEFAULT in /etc/default/grub",
    "sudo update-grub && sudo reboot",
)
_WITHOUT_PEERS = "export NCCL_P2P_DISABLE=1  # until then, and vLLM with --disable-custom-all-reduce"


@check("p2p-grant-unsafe", Area.p2p, "A")
def p2p_grant_unsafe(inspection: Inspection, purpose: Purpose) -> Said:
    """Peer access is granted between cards that cannot reach each other: hangs, or wrong output at full speed.

    Joins three facts of two cards without NVLink: NVML says that peer access is OK (a claim, not a test), their IOMMU
    group translates addresses (DMA or DMA-FQ), and a bridge between them redirects peer traffic (ACS, bits 2 and 3).
    All three are a failure: peer writes are not acknowledged, so they vanish, and vLLM with two cards hangs after NCCL
    has started. A translating IOMMU alone is a warning, and a failure for vLLM or --tensor-parallel; redirection alone
    is a warning there and only said elsewhere. What is only claimed can be proved with --probe. Two cards hang where
    four do not: NCCL uses peers across host bridges of AMD processors only up to two.
    """
    if is_virtual(inspection):
        return
    wanted = _peers_wanted(purpose)
    worst: dict[tuple[Severity, bool, bool | None], list[Pair]] = {}
    unknown = []
    for pair in pairs(inspection):
        if pair.nvlink or pair.granted is False:
            continue
        translated = _either(_translated(inspection, gpu.bus_id) for gpu in (pair.a, pair.b))
        redirected = _redirected(inspection, pair)
        if pair.granted is None or (translated is None and not redirected) or (redirected is None and not translated):
            unknown.append(pair)
        elif translated:
            severity = Severity.fail if redirected or wanted else Severity.warn
            worst.setdefault((severity, True, redirected), []).append(pair)
        elif redirected:
            worst.setdefault((Severity.warn if wanted else Severity.info, False, True), []).append(pair)
    for (severity, translated, redirected), found in worst.items():
        reasons = [
            word for word, holds in (("the IOMMU remaps it", translated), ("ACS redirects it", redirected)) if holds
        ]
        yield Finding(
            severity=severity,
            summary=f"peer access is granted, but {' and '.join(reasons)}: may hang or corrupt",
            evidence=(
                Evidence(path=f"nvmlDeviceGetP2PStatus {_named(found[0])}", value="OK"),
                *_group_types(inspection, found[0]),
                *_acs_words(inspection, found[0]),
            ),
            fix=(
                *(_PASS_THROUGH if translated else ()),
                *(_acs_off(inspection, found) if redirected else ()),
                *(("sudo mgpu doctor --only acs-redirect  # whether ACS redirects too",) if redirected is None else ()),
                _WITHOUT_PEERS,
            ),
            gpus=_members(found),
            confidence="read" if severity is Severity.fail and redirected else "inferred",
        )
    if unknown:
        known = all(pair.granted is not None for pair in unknown)
        what = "IOMMU or ACS between" if known else "peer access between"
        yield Skip(
            reason=f"{what} {named(_members(unknown))} could not be read, so the grant is unproven",
            needs_root=known and not inspection.root,
        )


@check("iommu-translated", Area.host, "A")
def iommu_translated(inspection: Inspection, _purpose: Purpose) -> Said:
    """The IOMMU translates the addresses that cards use.

    Read from iommu_group/type of each card: DMA and DMA-FQ translate, identity does not, and without an IOMMU there is
    no group. With two cards or more on bare metal it is a warning: translation slows transfers between cards and can
    stop them (two 3090 on an X399 board crashed with Xid 154 under tensor parallel). Where peer access is granted,
    p2p-grant-unsafe says it. In a virtual machine, or where cards are passed to one (vfio), it is only said.
    """
    gpus = cards(inspection)
    if len(gpus) < 2:
        return
    found = {gpu.index: _translated(inspection, gpu.bus_id) for gpu in gpus}
    translated = [gpu for gpu in gpus if found[gpu.index]]
    if translated:
        joined = any(pair.granted and not pair.nvlink for pair in pairs(inspection)) and not is_virtual(inspection)
        needed = bool(is_virtual(inspection) or inspection.host.vfio_in_use)
        yield Finding(
            severity=Severity.info if joined or needed else Severity.warn,
            summary=(
                "the IOMMU translates GPU addresses: virtual machines need it, peers suffer"
                if needed
                else "the IOMMU translates GPU addresses: slower, and can hang tensor parallel"
            ),
            evidence=tuple(
                Evidence(path=f"{_path(gpu.bus_id)}/iommu_group/type", value=_type(inspection, gpu.bus_id))
                for gpu in translated[:4]
            ),
            fix=() if is_virtual(inspection) else _PASS_THROUGH,
            gpus=tuple(gpu.index for gpu in translated),
        )
    elif any(value is None for value in found.values()) and not is_virtual(inspection):
        yield unread(inspection, "the IOMMU group's type", "iommu", of=(i for i, it in found.items() if it is None))


@check("acs-redirect", Area.host, "A", needs_root=True)
def acs_redirect(inspection: Inspection, purpose: Purpose) -> Said:
    """Bridges between the cards send peer traffic through the root complex (ACS).

    Read from the PCIe configuration of the bridges between each two cards, which needs root: request redirect (bit 2)
    and completion redirect (bit 3); 0x1d is usual on AMD. It matters where peer access is granted and wanted (vLLM,
    --tensor-parallel): a warning then, as the slow or hanging all-reduce of NCCL has it for its cause; only said
    elsewhere. Virtual machines need ACS, so nothing is advised in one, nor where vfio is in use.
    """
    if is_virtual(inspection) or len(cards(inspection)) < 2:
        return
    found = [pair for pair in pairs(inspection) if not pair.nvlink and _redirected(inspection, pair)]
    if found:
        granted = [pair for pair in found if pair.granted]
        joined = any(_translated(inspection, gpu.bus_id) for pair in granted for gpu in (pair.a, pair.b))
        keep = inspection.host.vfio_in_use is not False
        warn = granted and _peers_wanted(purpose) and not inspection.host.vfio_in_use and not joined
        said = "peer access is slow or hangs" if granted else "harmless without peer access"
        yield Finding(
            severity=Severity.warn if warn else Severity.info,
            summary=f"ACS redirects traffic between {named(_members(found))}: {said}",
            evidence=_acs_words(inspection, found[0]),
            fix=_acs_off(inspection, found) if granted and not keep else (),
            gpus=_members(found),
        )
    unknown = [pair for pair in pairs(inspection) if not pair.nvlink and _redirected(inspection, pair) is None]
    if unknown and not found:
        yield Skip(
            reason=f"ACS of the bridges between {named(_members(unknown))} could not be read",
            needs_root=not inspection.root,
        )


_STATUS_WORDS = {
    1: "1 (chipset not supported)",
    2: "2 (GPU not supported)",
    3: "3 (topology not supported)",
    4: "4 (disabled by a registry key)",
    5: "5 (not supported)",
    6: "6 (unknown)",
}


@check("p2p-none", Area.p2p, "B")
def p2p_none(inspection: Inspection, purpose: Purpose) -> Said:
    """Cards have no access to each other's memory.

    Read from NVML's peer status of every two cards. Normal on GeForce and between sockets: only said, and NCCL then
    goes through host memory. For two other cards on one socket it is a warning, unless the engine does not use it: peer
    access is worth 10 to 14 % in decode on x4 and 12 to 14 % in prefill, and nothing to llama.cpp splitting by layers.
    A patched driver grants it to GeForce at a risk of its own (patched-p2p-risk).
    """
    without: dict[str, list[Pair]] = {}
    unknown = []
    for pair in pairs(inspection):
        if pair.granted is None or pair.status == 6:
            unknown.append(pair)
        elif not pair.granted and not pair.nvlink:
            without.setdefault(_why_none(pair), []).append(pair)
    layers = purpose.backend in ("llama.cpp", "ollama") or is_virtual(inspection)
    for why, found in without.items():
        unexpected = why == _UNEXPECTED
        yield Finding(
            severity=Severity.warn if unexpected and not layers else Severity.info,
            summary=f"peer access between {named(_members(found))} is {why}",
            evidence=tuple(
                Evidence(
                    path=f"nvmlDeviceGetP2PStatus {_named(pair)}",
                    value=_STATUS_WORDS.get(pair.status or 0, "not granted"),
                )
                for pair in found[:4]
            ),
            fix=("BIOS: enable Above 4G Decoding and Re-Size BAR",) if unexpected else ("export NCCL_P2P_DISABLE=1",),
            gpus=_members(found),
        )
    if unknown and not inspection.host.wsl:
        yield unread(inspection, "peer access", "P2P", of=_members(unknown))


@check("patched-p2p-risk", Area.p2p, "A")
def patched_p2p_risk(inspection: Inspection, _purpose: Purpose) -> Said:
    """GeForce cards have peer access over PCIe, which only a patched or forced driver grants.

    Read from NVML: GeForce, no NVLink, and peer access OK; the patch itself leaves no mark. A warning until --probe has
    seen values arrive: vLLM's custom all-reduce returned wrong data on two Intel rigs while NCCL's own path was fine,
    and RTX 50 need RMForceStaticBar1=1 and PeerMappingOverride=1 or they hang.
    """
    both = [pair for pair in pairs(inspection) if is_geforce(pair.a) and is_geforce(pair.b) and not pair.nvlink]
    found = [pair for pair in both if pair.granted]
    if found:
        dwords = inspection.driver.registry_dwords
        yield Finding(
            severity=Severity.warn,
            summary="GeForce cards have peer access: a patched driver, unproven on this board",
            evidence=(
                *(Evidence(path=f"nvmlDeviceGetP2PStatus {_named(pair)}", value="OK") for pair in found[:4]),
                *(
                    (Evidence(path="RegistryDwords in /proc/driver/nvidia/params", value=dwords[:120]),)
                    if dwords
                    else ()
                ),
            ),
            fix=(
                "mgpu doctor --probe",
                "vllm serve --disable-custom-all-reduce",
                "export NCCL_P2P_DISABLE=1  # if it hangs",
            ),
            gpus=_members(found),
            confidence="inferred",
        )
    elif any(pair.granted is None for pair in both) and not inspection.host.wsl:
        yield unread(inspection, "peer access", "P2P", of=_members(both))


@check("vllm-p2p-cache-stale", Area.p2p, "A")
def vllm_p2p_cache_stale(inspection: Inspection, purpose: Purpose) -> Said:
    """vLLM keeps an answer about peer access from before the machine started.

    Compares the age of ~/.cache/vllm/gpu_p2p_access_cache_for_*.json with the time since boot: a new driver, BIOS or
    slot changes the answer, and the file is named by card numbers only. A warning for vLLM, or where
    VLLM_SKIP_P2P_CHECK=0 has it read; only said otherwise, since vLLM believes the driver by default. Delete it.
    """
    age_s, boot_s = inspection.host.vllm_p2p_cache_age_s, inspection.host.boot_age_s
    if age_s is None or len(cards(inspection)) < 2:
        return
    if boot_s is None:
        yield Skip(reason="the time since boot could not be read, so the age of vLLM's answer means nothing")
    elif age_s > boot_s:
        read = ("VLLM_SKIP_P2P_CHECK", "0") in inspection.host.environment or purpose.backend == "vllm"
        yield Finding(
            severity=Severity.warn if read else Severity.info,
            summary="vLLM's saved answer about peer access is older than the last boot",
            evidence=(
                Evidence(path="~/.cache/vllm/gpu_p2p_access_cache_for_*.json", value=f"{seconds(age_s)} old"),
                Evidence(path="since boot", value=seconds(max(boot_s, 0))),
            ),
            fix=(
                "rm ~/.cache/vllm/gpu_p2p_access_cache_for_*.json",
                "export VLLM_SKIP_P2P_CHECK=0  # for the next start of vLLM",
            ),
        )


_UNEXPECTED = "missing, though these cards support it"


def _why_none(pair: Pair) -> str:
    if is_geforce(pair.a) or is_geforce(pair.b):
        return "not granted to GeForce, which is normal"
    return "not possible between sockets, which is normal" if pair.kind == "SYS" else _UNEXPECTED


def _peers_wanted(purpose: Purpose) -> bool:
    return (purpose.tensor_parallel or 1) > 1 or purpose.backend == "vllm"


def _translated(inspection: Inspection, bus_id: str | None) -> bool | None:
    """Whether the IOMMU translates what a card addresses; a host without an IOMMU does not."""
    found = device(inspection, bus_id)
    if found is not None and found.iommu_type is not None:
        return found.iommu_type.upper().startswith("DMA")
    return False if inspection.host.iommu_present is False else None


def _redirected(inspection: Inspection, pair: Pair) -> bool | None:
    bridges = bridges_between(inspection, pair.a.bus_id, pair.b.bus_id)
    if not bridges:
        return None
    return _either(_redirects(bridge) for bridge in bridges)


def _redirects(bridge: PciDevice) -> bool | None:
    if bridge.acs is not None:
        return bool(bridge.acs & (_REQUEST_REDIRECT | _COMPLETION_REDIRECT))
    return False if bridge.acs_known else None


def _either(answers: Iterable[bool | None]) -> bool | None:
    """Or, of three values."""
    known = list(answers)
    return True if True in known else None if None in known else False


def _acs_off(inspection: Inspection, found: list[Pair]) -> tuple[str, ...]:
    """Commands for every bridge that redirects; none where vfio relies on them."""
    if inspection.host.vfio_in_use is None:
        return ("BIOS: ACS off, unless a virtual machine has a card of this one (that could not be read)",)
    if inspection.host.vfio_in_use:
        return ("ACS stays on: vfio is in use here, and virtual machines rely on it",)
    addresses = {
        bridge.address
        for pair in found
        for bridge in bridges_between(inspection, pair.a.bus_id, pair.b.bus_id)
        if _redirects(bridge)
    }
    commands = tuple(f"sudo setpci -s {address} ECAP_ACS+6.w=0000" for address in sorted(addresses))
    return (*commands, "BIOS: ACS off (the commands last until the next boot)")


def _acs_words(inspection: Inspection, pair: Pair) -> tuple[Evidence, ...]:
    bridges = bridges_between(inspection, pair.a.bus_id, pair.b.bus_id)
    return tuple(
        Evidence(path=f"ACS control of {bridge.address}", value=f"{bridge.acs:#06x}")
        for bridge in bridges
        if bridge.acs is not None and _redirects(bridge)
    )


def _group_types(inspection: Inspection, pair: Pair) -> tuple[Evidence, ...]:
    return tuple(
        Evidence(path=f"{_path(gpu.bus_id)}/iommu_group/type", value=_type(inspection, gpu.bus_id))
        for gpu in (pair.a, pair.b)
    )


def _type(inspection: Inspection, bus_id: str | None) -> str:
    found = device(inspection, bus_id)
    return (found.iommu_type if found else None) or "unknown"


def _path(bus_id: str | None) -> str:
    return f"/sys/bus/pci/devices/{bus_id or 'unknown'}"


def _named(pair: Pair) -> str:
    return f"GPU{pair.a.index},GPU{pair.b.index}"


def _members(found: list[Pair]) -> tuple[int, ...]:
    return tuple(sorted({index for pair in found for index in pair.indices}))


CHECKS: tuple[Check, ...] = (
    p2p_grant_unsafe,
    iommu_translated,
    acs_redirect,
    patched_p2p_risk,
    vllm_p2p_cache_stale,
    p2p_none,
)
