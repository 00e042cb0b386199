"""Checks of AMD's cards: access to the compute driver, where they are plugged in, and how programs see them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from mgpu.backends.engine import INSTALL_LLAMA_CPP
from mgpu.doctor import subjects
from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, check
from mgpu.doctor.facts import named, rocm_cards, settings, unread, usable_cards
from mgpu.doctor.peer_ways import untranslated
from mgpu.doctor.visibility import kfd_node, rocm_sees_only
from mgpu.machine.chipset import chipset_bridge
from mgpu.machine.inspection import Inspection, InstalledEngine, PciDevice
from mgpu.machine.layout import device, in_container, is_translated, is_virtual
from mgpu.machine.snapshot import Gpu

_MASKS = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
# AMD's package of ROCm 7.0 brings module 6.14.14, that of 6.4 brought 6.12.12.
_FIRST_OF_ROCM_7 = (6, 14)


@check("amd-kfd-access", Area.amd, "A", about=(subjects.amd,))
def amd_kfd_access(inspection: Inspection, purpose: Purpose) -> Said:
    """AMD cards that programs may not compute on.

    Read: the driver that each card has, whether /dev/kfd and /dev/dri/renderD* exist and may be opened, your groups,
    and the version of the module where it is of AMD's own package; the kernel's has none.
    Rule: fail when /dev/kfd is absent (info beside NVIDIA cards, which compute instead) or either may not be opened.
    Where Ollama is installed, a module older than ROCm 7's (6.14) is said, and a warning when Ollama is named. A card
    with the old driver, radeon, is only said: it shows pictures. SELinux is not asked, since no container is shown its
    switches; what it forbids shows as a device that may not be opened.
    Why: ROCm then finds no card, and Ollama silently computes on the processor ("failed to finish discovery before
    timeout"). Vulkan needs the render node alone.
    Do: sudo usermod -aG render,video $USER and log in again; in a container --device /dev/kfd --device /dev/dri, and
    with SELinux sudo setsebool container_use_devices=1 on the host.
    """
    cards = rocm_cards(inspection)
    if old := [gpu for gpu in usable_cards(inspection, "amd") if gpu not in cards]:
        yield Finding(
            severity=Severity.info,
            summary=f"{named(gpu.index for gpu in old)} shows pictures: its driver does not compute",
            evidence=tuple(Evidence(path=f"driver of GPU{gpu.index}", value=_driver(inspection, gpu)) for gpu in old),
            gpus=tuple(gpu.index for gpu in old),
        )
    if not cards:
        return
    facts, inside = inspection.amd, in_container(inspection)
    yield from _too_old_for_ollama(inspection, purpose, cards)
    if facts.kfd_device is False:
        yield Finding(
            severity=Severity.info if usable_cards(inspection, "nvidia") else Severity.fail,
            summary="AMD's compute driver is not there: /dev/kfd is absent",
            evidence=(Evidence(path="/dev/kfd", value="absent"),),
            fix=("docker run --device /dev/kfd --device /dev/dri IMAGE",) if inside else ("sudo modprobe amdgpu",),
            gpus=tuple(gpu.index for gpu in cards),
            needs_root=not inside,
        )
        return
    closed = [
        path
        for path, open_to_us in (("/dev/kfd", facts.kfd_accessible), ("/dev/dri/renderD*", facts.render_accessible))
        if open_to_us is False
    ]
    if closed:
        yield Finding(
            severity=Severity.fail,
            summary=f"you may not open {' and '.join(closed)}, so engines see no AMD card",
            evidence=(
                *(Evidence(path=path, value="permission denied") for path in closed),
                Evidence(path="your groups", value=" ".join(facts.user_groups)[:200] or "unknown"),
            ),
            fix=(
                "docker run --device /dev/kfd --device /dev/dri --group-add $(getent group render | cut -d: -f3) IMAGE",
                "sudo setsebool container_use_devices=1  # on the host, where it has SELinux",
            )
            if inside
            else ("sudo usermod -aG render,video $USER", "log out and in again"),
            gpus=tuple(gpu.index for gpu in cards),
            needs_root=True,
        )
    elif None in (facts.kfd_device, facts.kfd_accessible, facts.render_accessible):
        yield unread(inspection, "access to /dev/kfd and /dev/dri", "kfd", "dri")


def _driver(inspection: Inspection, gpu: Gpu) -> str:
    found = device(inspection, gpu.bus_id)
    return (found.driver if found else None) or "unknown"


def _too_old_for_ollama(inspection: Inspection, purpose: Purpose, cards: Sequence[Gpu]) -> Said:
    found = re.match(r"(\d{1,3})\.(\d{1,3})", inspection.amd.module_version or "")
    installed = any(engine.backend == "ollama" for engine in inspection.engines)
    if found and installed and (int(found[1]), int(found[2])) < _FIRST_OF_ROCM_7:
        yield Finding(
            severity=Severity.warn if purpose.backend == "ollama" else Severity.info,
            summary="AMD's driver is older than ROCm 7, which Ollama wants",
            evidence=(Evidence(path="/sys/module/amdgpu/version", value=(inspection.amd.module_version or "")[:40]),),
            fix=("install the driver of ROCm 7 (amdgpu-dkms), or take AMD's package out and use the kernel's driver",),
            gpus=tuple(gpu.index for gpu in cards),
        )


@check("amd-multi-gpu", Area.amd, "A", about=(subjects.rocm,))
def amd_multi_gpu(inspection: Inspection, _purpose: Purpose) -> Said:
    """AMD cards in slots that ROCm cannot use together.

    Read: the bridges above each card, the slots' widths, PCIe atomics and the type of the IOMMU group.
    Rule: fail for a card without PCIe atomics that the compute driver does not list, warn for one that it lists; with
    two cards or more warn for a chipset's slot, for slots of unequal width, and for an IOMMU that translates on bare
    metal (no iommu=pt).
    Why: the driver leaves out cards whose path lacks atomics; AMD supports several Radeons only on slots of the
    processor with equal widths; RCCL deadlocks behind a translating IOMMU.
    Do: move the card; boot with iommu=pt; until then NCCL_P2P_DISABLE=1.
    """
    cards = rocm_cards(inspection)
    own = {gpu.index: device(inspection, gpu.bus_id) for gpu in cards}
    yield from _atomics(inspection, cards, own)
    if len(cards) < 2:
        return
    if is_virtual(inspection):  # slots and IOMMU are the host's
        return
    yield from _slots(inspection, cards)
    answers = {gpu.index: is_translated(inspection, gpu.bus_id) for gpu in cards}
    if unknown := [index for index, answer in answers.items() if answer is None]:
        yield unread(inspection, "the IOMMU's mode", "iommu", of=unknown)
    translated = [gpu for gpu in cards if answers[gpu.index]]
    if translated:
        kinds = {gpu.index: each.iommu_type if (each := own[gpu.index]) else None for gpu in translated}
        yield Finding(
            severity=Severity.warn,
            summary="the IOMMU translates what AMD cards send each other: RCCL can deadlock",
            evidence=tuple(
                Evidence(
                    path=f"/sys/bus/pci/devices/{gpu.bus_id}/iommu_group/type", value=kinds[gpu.index] or "unknown"
                )
                for gpu in translated
            ),
            fix=("export NCCL_P2P_DISABLE=1  # helps at once", *untranslated(inspection)),
            gpus=tuple(gpu.index for gpu in translated),
            needs_root=True,
        )


def _atomics(inspection: Inspection, cards: Sequence[Gpu], own: dict[int, PciDevice | None]) -> Said:
    answers = {gpu.index: each.atomics if (each := own[gpu.index]) else None for gpu in cards}
    listed = {gpu.index for gpu in cards if (each := own[gpu.index]) and each.in_kfd}
    without = [index for index, answer in answers.items() if answer is False]
    if left_out := [index for index in without if index not in listed]:
        yield Finding(
            severity=Severity.fail,
            summary=f"{named(left_out)}: no PCIe atomics in that slot, so ROCm leaves the card out",
            evidence=tuple(Evidence(path=f"AtomicOpsCap on the path of GPU{index}", value="no") for index in left_out),
            fix=("move the card to a slot of the processor, or run it with Vulkan",),
            gpus=tuple(left_out),
        )
    if kept := [index for index in without if index in listed]:
        yield Finding(
            severity=Severity.warn,
            summary=f"{named(kept)}: no PCIe atomics in that slot, which some of ROCm's programs need",
            evidence=tuple(
                Evidence(path=f"/sys/class/kfd/kfd/topology: io_links of GPU{index}", value="no atomics")
                for index in kept
            ),
            fix=("move the card to a slot of the processor, or run it with Vulkan",),
            gpus=tuple(kept),
        )
    if unknown := [index for index, answer in answers.items() if answer is None]:
        yield unread(inspection, "PCIe atomics", "config", "Atomic", of=unknown)


def _slots(inspection: Inspection, cards: Sequence[Gpu]) -> Said:
    behind = {gpu.index: chipset_bridge(inspection, gpu.bus_id) for gpu in cards}
    if far := [index for index, bridge in behind.items() if bridge]:
        yield Finding(
            severity=Severity.warn,
            summary=f"{named(far)} hangs on the chipset, where AMD supports no second card",
            evidence=tuple(
                Evidence(path=f"bridge above GPU{index}", value=bridge.address)
                for index, bridge in behind.items()
                if bridge
            ),
            fix=("move the card to a slot of the processor",),
            gpus=tuple(far),
        )
    elif not inspection.pci_known:
        yield unread(inspection, "the bridges above AMD's cards", "bus/pci")
    widths = {gpu.index: gpu.pcie.slot_width for gpu in cards}
    known = {width for width in widths.values() if width}
    if len(known) > 1:
        yield Finding(
            severity=Severity.warn,
            summary="AMD cards are in slots of unequal width, which AMD does not support",
            evidence=tuple(Evidence(path=f"slot of GPU{index}", value=f"x{width}") for index, width in widths.items()),
            fix=("move the cards to slots of equal width (or set the slots to x8/x8 in the BIOS)",),
            gpus=tuple(widths),
        )
    elif unknown := [index for index, width in widths.items() if width is None]:
        yield unread(inspection, "the slot's width", "link_width", of=unknown)


@check("amd-gfx-override", Area.amd, "A", about=(subjects.rocm,))
def amd_gfx_override(inspection: Inspection, purpose: Purpose) -> Said:
    """AMD cards that an engine has no code for, an override that fits one of them, or integrated graphics in the way.

    Read: the cards' gfx versions, the engines' architectures, HSA_OVERRIDE_GFX_VERSION and its per-card forms, and
    ROCR_VISIBLE_DEVICES; in the environment and in the units of engines.
    Rule: without an override, fail when the engine that is named was not built for a card (info for others); warn when
    one override is set for cards of different versions; info when integrated graphics are visible beside cards (warn
    when a model is to be cut over cards).
    Why: an engine without code for a card ends at the first kernel; one override makes the other card run wrong code;
    integrated graphics look like a card with a lot of slow memory.
    Do: HSA_OVERRIDE_GFX_VERSION_1=10.3.0 for one card, by its number in /sys/class/kfd/kfd/topology/nodes, where
    processors count too; only a version of the same generation runs. ROCR_VISIBLE_DEVICES leaves the others out.
    """
    cards = rocm_cards(inspection)
    overrides = [each for each in settings(inspection) if each.name == _OVERRIDE and each.value]
    kinds = sorted({gpu.gfx for gpu in cards if gpu.gfx})
    if unknown := [gpu.index for gpu in cards if gpu.gfx is None]:
        yield unread(inspection, "the gfx version", "kfd", "topology", of=unknown)
    for each in overrides if len(kinds) > 1 else ():
        meant = [gpu for gpu in cards if _version(gpu.gfx or "")[:2] == _numbers(each.value)[:2]]
        node = kfd_node(inspection, meant[0]) if len(meant) == 1 else None
        unit = "Environment=" if len(each.removal) > 1 else ""  # a service's is not the shell's
        yield Finding(
            severity=Severity.warn,
            summary=f"one gfx override for unlike AMD cards breaks some of them ({each.place[:24]})",
            evidence=(
                Evidence(path=each.path, value=f"{_OVERRIDE}={each.value[:40]}"),
                *(Evidence(path=f"GPU{gpu.index}", value=gpu.gfx or "unknown") for gpu in cards),
            ),
            fix=(
                each.removal[0],
                f"instead set {unit}{_OVERRIDE}_{'N' if node is None else node}={shlex.quote(each.value[:20])}",
                *each.removal[1:],
            ),
            gpus=tuple(gpu.index for gpu in cards),
        )
    yield from _unbuilt(inspection, purpose, cards)
    integrated = [gpu for gpu in inspection.machine.gpus if gpu.vendor == "amd" and gpu.integrated]
    if integrated and not any(each.name in _MASKS and each.value for each in settings(inspection)):
        only = rocm_sees_only(inspection, cards)
        yield Finding(
            severity=Severity.warn if (purpose.tensor_parallel or 1) > 1 else Severity.info,
            summary="engines also see the processor's own graphics as an AMD card",
            evidence=tuple(Evidence(path=f"GPU{gpu.index}", value=f"{gpu.name} {gpu.gfx or ''}") for gpu in integrated),
            fix=(only or "export ROCR_VISIBLE_DEVICES=UUIDS  # rocminfo | grep Uuid lists them",),
            gpus=tuple(gpu.index for gpu in integrated),
        )


_OVERRIDE = "HSA_OVERRIDE_GFX_VERSION"
_OLLAMA = "ollama.service"


def _unbuilt(inspection: Inspection, purpose: Purpose, cards: Sequence[Gpu]) -> Said:
    for engine in inspection.engines:
        if _is_overridden(inspection, engine):
            continue
        built = {name.split(":")[0] for name in engine.architectures if name.startswith("gfx")}
        missing = [gpu for gpu in cards if gpu.gfx and gpu.gfx not in built]
        # A generic target such as gfx11-generic stands for a family whose members are not listed here.
        if not built or not missing or any(name.endswith("generic") for name in built):
            continue
        kinds = ", ".join(sorted({gpu.gfx or "" for gpu in missing}))
        yield Finding(
            severity=Severity.fail if engine.backend == purpose.backend else Severity.info,
            summary=f"this {engine.backend[:20]} has no code for {kinds[:30]}",
            evidence=(
                Evidence(path=f"architectures of {engine.path or engine.backend}", value=" ".join(sorted(built))[:200]),
            ),
            fix=(*_nearest(inspection, engine, missing[0], built), _VULKAN),
            gpus=tuple(gpu.index for gpu in missing),
        )


_VULKAN = f"{INSTALL_LLAMA_CPP}  # llama.cpp with Vulkan needs no code of its own for a card"


def _is_overridden(inspection: Inspection, engine: InstalledEngine) -> bool:
    """Whether the engine is told of a card's version, by the environment or by a unit that is its own or mgpu's."""
    own = ("the environment", engine.backend.partition(".")[0], "mgpu")
    return any(each.name.startswith(_OVERRIDE) and each.place.startswith(own) for each in settings(inspection))


def _nearest(inspection: Inspection, engine: InstalledEngine, gpu: Gpu, built: set[str]) -> tuple[str, ...]:
    """The override by which a card runs code of the nearest version of its own generation; none before RDNA, whose
    versions do not run each other's code. One for all where it is AMD's only GPU."""
    version = _version(gpu.gfx or "")
    alike = [other for name in built if version[:1] >= (10,) and (other := _version(name))[:2] == version[:2]]
    alone = sum(each.vendor == "amd" for each in inspection.machine.gpus) == 1
    node = None if alone else kfd_node(inspection, gpu)
    if not alike or (node is None and not alone):
        return ()
    nearest = min(alike, key=lambda other: (abs(other[2] - version[2]), other))
    name = _OVERRIDE if alone else f"{_OVERRIDE}_{node}"
    setting, why = f"{name}={'.'.join(map(str, nearest))}", "the nearest version that is in the list"
    if engine.backend != "ollama":
        return (f"export {setting}  # {why}",)
    # Ollama runs as a service, which no shell's environment reaches.
    own = any(each.user and each.unit == _OLLAMA for each in inspection.host.unit_variables)
    control = "systemctl --user" if own else "sudo systemctl"
    return (
        f"{control} edit {_OLLAMA}  # {why}; write there:",
        "[Service]",
        f"Environment={setting}",
        f"{control} restart {_OLLAMA}",
    )


def _version(gfx: str) -> tuple[int, ...]:
    """The parts of a gfx version: 10, 3 and 1 for gfx1031, 9, 0 and 10 for gfx90a; none of other names."""
    found = re.fullmatch(r"gfx(\d{1,2})(\d)([0-9a-f])", gfx)
    return (int(found[1]), int(found[2]), int(found[3], 16)) if found else ()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d{1,3}", text[:20]))


CHECKS: tuple[Check, ...] = (amd_kfd_access, amd_multi_gpu, amd_gfx_override)
