"""Checks of peer access over PCIe: granted where it cannot work, held back, missing, or believed from an old test."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from mgpu.doctor import subjects
from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, Skip, check
from mgpu.doctor.facts import HOST_ONLY, named, on_pci, unread, without_peers
from mgpu.doctor.peer_ways import (
    acs_off,
    acs_words,
    between,
    either,
    group_type,
    group_types,
    is_redirected,
    untranslated,
)
from mgpu.doctor.proof import Proof
from mgpu.machine.families import family
from mgpu.machine.inspection import Inspection
from mgpu.machine.layout import (
    Pair,
    cards,
    in_container,
    is_translated,
    is_virtual,
    pairs,
)
from mgpu.machine.snapshot import Gpu
from mgpu.units import seconds


@check("p2p-grant-unsafe", Area.p2p, "A", about=(subjects.nvidia_pair, subjects.bare_metal))
def p2p_grant_unsafe(inspection: Inspection, purpose: Purpose) -> Said:
    """Peer access is granted between cards that cannot reach each other: hangs, or wrong output at full speed.

    Read: three facts of two cards without NVLink: NVML says that peer access is OK (a claim, not a test), their IOMMU
    group translates addresses (DMA or DMA-FQ), and a bridge between them redirects peer traffic (ACS, bits 2 and 3).
    Rule: fail for all three. A translating IOMMU alone: warn, and fail for vLLM or --tensor-parallel. Redirection
    alone: warn. A grant with nothing in its way is still a claim: info (of GeForce cards patched-p2p-risk says it), and
    so is all of it where --probe saw all values arrive.
    Why: peer writes are not acknowledged, so they vanish, and vLLM with two cards hangs after NCCL has started. Two
    cards hang where four do not: NCCL uses peers across host bridges of AMD processors only up to two.
    Do: iommu=pt on the kernel's command line, ACS off in the BIOS, and NCCL_P2P_DISABLE=1 until then; --probe proves
    whether data arrives.
    """
    wanted = _peers_wanted(purpose)
    worst: dict[tuple[Severity, bool, bool | None], list[Pair]] = {}
    unknown, unproven = [], []
    for pair in pairs(inspection):
        if pair.nvlink or pair.granted is False:
            continue
        translated = either(is_translated(inspection, gpu.bus_id) for gpu in (pair.a, pair.b))
        redirected = is_redirected(inspection, pair)
        if pair.granted is None or (translated is None and not redirected) or (redirected is None and not translated):
            unknown.append(pair)
        elif translated:
            severity = Severity.fail if redirected or wanted else Severity.warn
            worst.setdefault((severity, True, redirected), []).append(pair)
        elif redirected:
            worst.setdefault((Severity.warn, False, True), []).append(pair)
        elif not _is_geforce(pair.a):
            unproven.append(pair)
    for (severity, translated, redirected), found in worst.items():
        reasons = [
            word for word, holds in (("the IOMMU remaps it", translated), ("ACS redirects it", redirected)) if holds
        ]
        yield Finding(
            severity=severity,
            summary=f"peer access is granted, but {' and '.join(reasons)}: may hang or corrupt",
            evidence=(
                Evidence(path=f"nvmlDeviceGetP2PStatus {_named(found[0])}", value="OK"),
                *group_types(inspection, found[0]),
                *acs_words(inspection, found[0]),
            ),
            fix=(
                f"{without_peers(inspection)}  # helps at once; vLLM with --disable-custom-all-reduce too",
                *(acs_off(inspection, found) if redirected else ()),
                *(("sudo mgpu doctor --only acs-redirect  # whether ACS redirects too",) if redirected is None else ()),
                *(untranslated(inspection) if translated else ()),
            ),
            gpus=_members(found),
            confidence="read" if severity is Severity.fail and redirected else "inferred",
        )
    if unproven:
        yield Finding(
            severity=Severity.info,
            summary="peer access is granted but unproven: mgpu doctor --probe tests it",
            evidence=(Evidence(path=f"nvmlDeviceGetP2PStatus {_named(unproven[0])}", value="OK"),),
            fix=("mgpu doctor --probe",),
            gpus=_members(unproven),
            confidence="inferred",
        )
    if unknown:
        known = all(pair.granted is not None for pair in unknown)
        what = "IOMMU or ACS between" if known else "peer access between"
        yield Skip(
            reason=f"{what} {named(_members(unknown))} could not be read, so the grant is unproven",
            needs_root=known and not inspection.root,
        )


@check("iommu-translated", Area.host, "A", about=(subjects.nvidia_pair,))
def iommu_translated(inspection: Inspection, _purpose: Purpose) -> Said:
    """The IOMMU translates the addresses that cards use.

    Read: iommu_group/type of each card: DMA and DMA-FQ translate, identity does not, and a card without a group has no
    IOMMU before it, or one that is off.
    Rule: warn with two cards or more on bare metal; info in a virtual machine, or where cards are passed to one (vfio).
    Where peer access is granted, p2p-grant-unsafe says it.
    Why: translation slows transfers between cards and can stop them (two 3090 on an X399 board crashed with Xid 154
    under tensor parallel).
    Do: iommu=pt on the kernel's command line; where that is told already, the IOMMU off in the BIOS.
    """
    gpus = cards(inspection)
    found = {gpu.index: is_translated(inspection, gpu.bus_id) for gpu in gpus}
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
                Evidence(path=f"{on_pci(gpu.bus_id)}/iommu_group/type", value=group_type(inspection, gpu.bus_id))
                for gpu in translated[:4]
            ),
            fix=() if is_virtual(inspection) else untranslated(inspection),
            gpus=tuple(gpu.index for gpu in translated),
        )
    elif any(value is None for value in found.values()) and not is_virtual(inspection):
        yield unread(inspection, "the IOMMU group's type", "iommu", of=(i for i, it in found.items() if it is None))


@check("acs-redirect", Area.host, "A", needs_root=True, about=(subjects.nvidia_pair, subjects.bare_metal))
def acs_redirect(inspection: Inspection, purpose: Purpose) -> Said:
    """Bridges between the cards send peer traffic through the root complex (ACS).

    Read: the PCIe configuration of the bridges between each two cards, which needs root: request redirect (bit 2) and
    completion redirect (bit 3); 0x1d is usual on AMD.
    Rule: warn where peer access is granted and wanted (vLLM, --tensor-parallel), else info.
    Why: a slow or hanging all-reduce of NCCL has it for its cause. Virtual machines need ACS, so nothing is advised in
    one, nor where vfio is in use.
    Do: ACS off in the BIOS, or until the next boot with setpci.
    """
    found = [pair for pair in pairs(inspection) if not pair.nvlink and is_redirected(inspection, pair)]
    if found:
        granted = [pair for pair in found if pair.granted]
        joined = any(is_translated(inspection, gpu.bus_id) for pair in granted for gpu in (pair.a, pair.b))
        warn = granted and _peers_wanted(purpose) and not inspection.host.vfio_in_use and not joined
        said = "peer access is slow or hangs" if granted else "harmless without peer access"
        yield Finding(
            severity=Severity.warn if warn else Severity.info,
            summary=f"ACS redirects traffic between {named(_members(found))}: {said}",
            evidence=acs_words(inspection, found[0]),
            fix=acs_off(inspection, granted) if granted and not inspection.host.vfio_in_use else (),
            gpus=_members(found),
        )
    unknown = [pair for pair in pairs(inspection) if not pair.nvlink and is_redirected(inspection, pair) is None]
    if unknown and not found and in_container(inspection):
        yield Skip(reason=HOST_ONLY)
    elif unknown and not found:
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


@check("p2p-none", Area.p2p, "B", about=(subjects.nvidia_pair,))
def p2p_none(inspection: Inspection, purpose: Purpose) -> Said:
    """Cards have no access to each other's memory.

    Read: NVML's peer status of every two cards.
    Rule: info on GeForce, on mining cards, between unlike cards and between sockets, where it is normal; warn for two
    equal cards for workstations or datacentres on one socket, unless the engine does not use it.
    Why: NCCL then goes through host memory. Peer access is worth 10 to 14 % in decode on x4 and 12 to 14 % in prefill,
    and nothing to llama.cpp splitting by layers.
    Do: nothing where it is normal (a patched driver grants it to GeForce at a risk of its own: patched-p2p-risk); else
    Above 4G Decoding and Re-Size BAR in the BIOS.
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
            summary=_no_access(found, why),
            evidence=tuple(
                Evidence(
                    path=f"nvmlDeviceGetP2PStatus {_named(pair)}",
                    value=_STATUS_WORDS.get(pair.status or 0, "not granted"),
                )
                for pair in found[:4]
            ),
            fix=("BIOS: enable Above 4G Decoding and Re-Size BAR",) if unexpected else (without_peers(inspection),),
            gpus=_members(found),
        )
    if unknown and not inspection.host.wsl:
        yield unread(inspection, "peer access", "P2P", of=_members(unknown))


@check("patched-p2p-risk", Area.p2p, "A", about=(subjects.nvidia_pair,))
def patched_p2p_risk(inspection: Inspection, _purpose: Purpose) -> Said:
    """GeForce cards have peer access over PCIe, which only a patched or forced driver grants.

    Read: NVML: GeForce, no NVLink, and peer access OK; the patch itself leaves no mark.
    Rule: warn; info once --probe has seen all values arrive.
    Why: vLLM's custom all-reduce returned wrong data on two Intel rigs while NCCL's own path was fine, and RTX 50 need
    RMForceStaticBar1=1 and PeerMappingOverride=1 or they hang.
    Do: mgpu doctor --probe; until it is proved, vLLM with --disable-custom-all-reduce.
    """
    both = [pair for pair in pairs(inspection) if _is_geforce(pair.a) and _is_geforce(pair.b) and not pair.nvlink]
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
                f"{without_peers(inspection)}  # if it hangs",
            ),
            gpus=_members(found),
            confidence="inferred",
        )
    elif any(pair.granted is None for pair in both) and not inspection.host.wsl:
        yield unread(inspection, "peer access", "P2P", of=_members(both))


@check("vllm-p2p-cache-stale", Area.p2p, "A", about=(subjects.nvidia_pair,))
def vllm_p2p_cache_stale(inspection: Inspection, purpose: Purpose) -> Said:
    """vLLM keeps an answer about peer access from before the machine started.

    Read: the age of gpu_p2p_access_cache_for_*.json in vLLM's cache (~/.cache/vllm), and the time since boot. When the
    driver was installed is not asked: its files often have the dates of its making, and it takes effect when it is
    loaded, which is at boot but for those who reload it by hand.
    Rule: warn for vLLM, or where VLLM_SKIP_P2P_CHECK=0 has it read; else info, since vLLM believes the driver by
    default.
    Why: a new driver, BIOS or slot changes the answer, and the file is named by card numbers only.
    Do: delete the file.
    """
    age_s, boot_s = inspection.host.vllm_p2p_cache_age_s, inspection.host.boot_age_s
    if age_s is None:
        return
    if boot_s is None:
        yield Skip(reason="the time since boot could not be read, so the age of vLLM's answer means nothing")
    elif age_s > boot_s:
        read = ("VLLM_SKIP_P2P_CHECK", "0") in inspection.host.environment or purpose.backend == "vllm"
        yield Finding(
            severity=Severity.warn if read else Severity.info,
            summary="vLLM's saved answer about peer access is older than the last boot",
            evidence=(
                Evidence(path="gpu_p2p_access_cache_for_*.json in vLLM's cache", value=f"{seconds(age_s)} old"),
                Evidence(path="since boot", value=seconds(max(boot_s, 0))),
            ),
            fix=(
                'rm "${VLLM_CACHE_ROOT:-${XDG_CACHE_HOME:-$HOME/.cache}/vllm}"/gpu_p2p_access_cache_for_*.json',
                "export VLLM_SKIP_P2P_CHECK=0  # for the next start of vLLM",
            ),
        )


def _no_access(found: list[Pair], why: str) -> str:
    """The pairs as two sides, where that is not too long for a summary."""
    said = (f"peer access between {which} is {why}" for which in (between(found), named(_members(found))))
    return next((words for words in said if len(words) <= 90), f"peer access between some cards is {why}")


_UNEXPECTED = "missing, though these cards support it"


def _why_none(pair: Pair) -> str:
    if pair.a.name != pair.b.name:
        return "not possible between unlike cards, which is normal"
    if _is_geforce(pair.a):
        return "not granted to GeForce, which is normal"
    if pair.kind == "SYS":
        return "not possible between sockets, which is normal"
    return _UNEXPECTED if family(pair.a.name).peers else "not known to be granted to such cards"


def proved_checks(proof: Proof | None) -> tuple[Check, ...]:
    """Return the checks of a claim that a probe can prove: what it saw arrive is only said, and no longer unproven."""
    return tuple(replace(each, run=partial(_proved, each, proof)) for each in (p2p_grant_unsafe, patched_p2p_risk))


def _proved(claimed: Check, proof: Proof | None, inspection: Inspection, purpose: Purpose) -> Said:
    for said in claimed.run(inspection, purpose):
        gpus = said.gpus if isinstance(said, Finding) else tuple(gpu.index for gpu in cards(inspection))
        if proof is None or not proof.shows_peers(gpus):
            yield said
        elif isinstance(said, Finding) and said.severity is not Severity.info:  # no claim is unproven any more
            summary, fix = _PROVED[claimed.id]
            evidence = (*said.evidence, Evidence(path="copies and all-reduce", value="right"))
            info = replace(said, severity=Severity.info, summary=summary, evidence=evidence, fix=fix)
            yield replace(info, confidence="probed")


_PROVED: dict[str, tuple[str, tuple[str, ...]]] = {
    p2p_grant_unsafe.id: ("peer access works as probed, though the IOMMU or ACS is in its way", ()),
    patched_p2p_risk.id: (
        "GeForce cards have peer access by a patched driver; probed, and values arrive",
        ("vllm serve --disable-custom-all-reduce  # if vLLM alone errs: the probe sums with NCCL",),
    ),
}


def _is_geforce(gpu: Gpu) -> bool:
    return family(gpu.name).geforce


def _peers_wanted(purpose: Purpose) -> bool:
    return purpose.joins_cards


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
