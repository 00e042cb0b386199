"""AMD's and Intel's cards."""

from __future__ import annotations

from typing import Any

import pytest

from mgpu.doctor.check import Purpose
from mgpu.doctor.checks import amd, intel
from mgpu.machine.inspection import AmdFacts, Inspection, InstalledEngine, PciDevice
from mgpu.machine.snapshot import Gpu, PcieLink
from tests.doctor.inspections import GIB, MIB, bare, changed, changed_gpu, changed_machine, changed_pci, healthy
from tests.doctor.said import said

CHECKS = (*amd.CHECKS, *intel.CHECKS)
ALLOWED = AmdFacts(kfd_device=True, kfd_accessible=True, render_accessible=True, user_groups=("render", "video"))
OLLAMA = InstalledEngine(backend="ollama", architectures=("gfx1030", "gfx1100"), architectures_known=True)


def radeons(*gfx: str, **changes: Any) -> Inspection:
    """Radeons on slots of the processor, 16 lanes each, IOMMU in passthrough."""
    addresses = [f"0000:{number + 3:02x}:00.0" for number in range(len(gfx))]
    gpus = tuple(
        Gpu(index=index, vendor="amd", name="AMD Radeon", gfx=name, bus_id=address, pcie=PcieLink(slot_width=16))
        for index, (name, address) in enumerate(zip(gfx, addresses, strict=True))
    )
    pci = [PciDevice(address=f"0000:00:01.{index}", vendor=0x1022, device=0x14DB) for index in range(len(gfx))]
    pci += [
        PciDevice(
            address=address,
            vendor=0x1002,
            pci_class=0x030000,
            driver="amdgpu",
            parent=f"0000:00:01.{index}",
            iommu_type="identity",
            atomics=True,
        )
        for index, address in enumerate(addresses)
    ]
    return changed(changed_machine(bare(pci=tuple(pci), amd=ALLOWED), gpus=gpus), **changes)


def arcs(count: int = 1, amd: AmdFacts = ALLOWED, **changes: Any) -> Inspection:
    facts = {"driver": "xe", "bar_bytes": 16 * GIB, "parent": "0000:00:01.0", **changes}
    cards = [
        PciDevice(address=f"0000:{number + 3:02x}:00.0", vendor=0x8086, pci_class=0x030000, **facts)
        for number in range(count)
    ]
    integrated = PciDevice(address="0000:00:02.0", vendor=0x8086, pci_class=0x030000, bar_bytes=256 * MIB)
    return bare(pci=(integrated, *cards), amd=amd)


TWO = radeons("gfx1100", "gfx1100")
FIRST = "0000:03:00.0"
CHIPSET = changed_pci(TWO, "0000:00:01.1", device=0x43F4)
INTEL_CHIPSET = changed_pci(changed_pci(TWO, FIRST, parent="0000:00:1c.4"), "0000:00:01.0", vendor=0x8086)
INTEL_CHIPSET = changed_pci(INTEL_CHIPSET, "0000:00:01.0", address="0000:00:1c.4")
TRANSLATED = changed_pci(TWO, FIRST, iommu_type="DMA-FQ")
WITH_INTEGRATED = changed_machine(
    TWO, gpus=(*TWO.machine.gpus, Gpu(index=2, vendor="amd", name="Raphael", gfx="gfx1036", integrated=True))
)


def override(inspection: Inspection, **variables: str) -> Inspection:
    return changed(inspection, host={"environment": tuple(variables.items())})


@pytest.mark.parametrize(
    ("check", "inspection", "purpose", "expected"),
    [
        pytest.param("amd-kfd-access", TWO, Purpose(), [], id="may compute"),
        pytest.param("amd-kfd-access", changed(TWO, amd={"kfd_device": False}), Purpose(), ["fail 0,1"], id="no kfd"),
        pytest.param(
            "amd-kfd-access", changed(TWO, amd={"kfd_accessible": False}), Purpose(), ["fail 0,1"], id="closed"
        ),
        pytest.param(
            "amd-kfd-access",
            changed(TWO, amd={"render_accessible": False}),
            Purpose(),
            ["fail 0,1"],
            id="render closed",
        ),
        pytest.param("amd-kfd-access", changed(TWO, amd={"kfd_accessible": None}), Purpose(), ["skip"], id="unread"),
        pytest.param("amd-multi-gpu", TWO, Purpose(), [], id="equal slots of the processor"),
        pytest.param("amd-multi-gpu", CHIPSET, Purpose(), ["warn 1"], id="a slot of AMD's chipset"),
        pytest.param("amd-multi-gpu", INTEL_CHIPSET, Purpose(), ["warn 0"], id="a slot of Intel's chipset"),
        pytest.param(
            "amd-multi-gpu", changed_gpu(TWO, 1, pcie={"slot_width": 4}), Purpose(), ["warn 0,1"], id="unequal widths"
        ),
        pytest.param("amd-multi-gpu", changed_pci(TWO, FIRST, atomics=False), Purpose(), ["fail 0"], id="no atomics"),
        pytest.param("amd-multi-gpu", TRANSLATED, Purpose(), ["warn 0"], id="the IOMMU translates"),
        pytest.param(
            "amd-multi-gpu",
            changed_machine(TRANSLATED, host={"virtualisation": "kvm"}),
            Purpose(),
            [],
            id="a guest's IOMMU is its host's affair",
        ),
        pytest.param(
            "amd-multi-gpu",
            changed_pci(radeons("gfx1100"), FIRST, iommu_type="DMA"),
            Purpose(),
            [],
            id="one card has nobody to send to",
        ),
        pytest.param("amd-multi-gpu", changed_pci(TWO, FIRST, atomics=None), Purpose(), ["skip"], id="atomics unread"),
        pytest.param("amd-multi-gpu", changed_pci(TWO, FIRST, iommu_type=None), Purpose(), ["skip"], id="IOMMU unread"),
        pytest.param(
            "amd-multi-gpu", changed_gpu(TWO, 1, pcie={"slot_width": None}), Purpose(), ["skip"], id="width unread"
        ),
        pytest.param("amd-gfx-override", changed(TWO, engines=(OLLAMA,)), Purpose(), [], id="built for the cards"),
        pytest.param(
            "amd-gfx-override",
            radeons("gfx1031", engines=(OLLAMA,)),
            Purpose(backend="ollama"),
            ["fail 0"],
            id="the engine that is named has no code",
        ),
        pytest.param(
            "amd-gfx-override",
            radeons("gfx1031", engines=(OLLAMA,)),
            Purpose(),
            ["info 0"],
            id="another engine has none",
        ),
        pytest.param(
            "amd-gfx-override",
            override(radeons("gfx1031", engines=(OLLAMA,)), HSA_OVERRIDE_GFX_VERSION_0="10.3.0"),
            Purpose(backend="ollama"),
            [],
            id="overridden for that card",
        ),
        pytest.param(
            "amd-gfx-override",
            override(radeons("gfx1031", "gfx1100"), HSA_OVERRIDE_GFX_VERSION="10.3.0"),
            Purpose(),
            ["warn 0,1"],
            id="one override for unlike cards",
        ),
        pytest.param(
            "amd-gfx-override",
            override(radeons("gfx1031", "gfx1031"), HSA_OVERRIDE_GFX_VERSION="10.3.0"),
            Purpose(),
            [],
            id="one override for like cards",
        ),
        pytest.param("amd-gfx-override", WITH_INTEGRATED, Purpose(), ["info 2"], id="integrated graphics beside cards"),
        pytest.param(
            "amd-gfx-override", WITH_INTEGRATED, Purpose(tensor_parallel=2), ["warn 2"], id="integrated when cutting"
        ),
        pytest.param(
            "amd-gfx-override",
            override(WITH_INTEGRATED, ROCR_VISIBLE_DEVICES="0,1"),
            Purpose(tensor_parallel=2),
            [],
            id="integrated graphics are masked",
        ),
        pytest.param("amd-gfx-override", changed_gpu(TWO, 1, gfx=None), Purpose(), ["skip"], id="gfx unread"),
        pytest.param("intel-xe", arcs(), Purpose(), [], id="an Arc with its driver"),
        pytest.param("intel-xe", arcs(0), Purpose(), [], id="integrated graphics are not judged"),
        pytest.param("intel-xe", arcs(driver=None), Purpose(), ["fail"], id="no driver"),
        pytest.param("intel-xe", arcs(driver="vfio-pci"), Purpose(), ["info"], id="handed to a guest"),
        pytest.param("intel-xe", arcs(bar_bytes=256 * MIB), Purpose(), ["warn"], id="small BAR"),
        pytest.param(
            "intel-xe",
            changed_machine(arcs(bar_bytes=256 * MIB), host={"virtualisation": "kvm"}),
            Purpose(),
            [],
            id="a guest has no BIOS to change",
        ),
        pytest.param("intel-xe", arcs(amd=AmdFacts(render_accessible=False)), Purpose(), ["fail"], id="no access"),
        pytest.param("intel-xe", arcs(2), Purpose(), ["info"], id="two without a selector"),
        pytest.param("intel-xe", arcs(bar_bytes=None), Purpose(), ["skip"], id="regions unread"),
        pytest.param("intel-xe", arcs(amd=AmdFacts()), Purpose(), ["skip"], id="access unread"),
    ],
)
def test_cards_of_amd_and_intel_are_judged(
    check: str, inspection: Inspection, purpose: Purpose, expected: list[str]
) -> None:
    assert said(CHECKS, check, inspection, purpose) == expected


@pytest.mark.parametrize("check", [check.id for check in CHECKS])
@pytest.mark.parametrize("inspection", [pytest.param(healthy(), id="NVIDIA"), pytest.param(bare(), id="no card")])
def test_a_machine_without_their_cards_hears_nothing_of_them(check: str, inspection: Inspection) -> None:
    assert said(CHECKS, check, inspection, Purpose(tensor_parallel=2)) == []
