"""AMD's and Intel's cards."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from mgpu.doctor.check import Finding, Purpose
from mgpu.doctor.checks import amd, intel
from mgpu.machine.inspection import AmdFacts, Inspection, InstalledEngine, IntelFacts, PciDevice, UnitVariable
from mgpu.machine.snapshot import Gpu, PcieLink
from tests.doctor.inspections import GIB, MIB, bare, changed, changed_gpu, changed_machine, changed_pci, healthy
from tests.doctor.said import said

CHECKS = (*amd.CHECKS, *intel.CHECKS)
ALLOWED = AmdFacts(kfd_device=True, kfd_accessible=True, render_accessible=True, user_groups=("render", "video"))
OLLAMA = InstalledEngine(backend="ollama", architectures=("gfx1030", "gfx1100"), architectures_known=True)
VLLM = InstalledEngine(backend="vllm", architectures=("gfx1030", "gfx942"), architectures_known=True)


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
            in_kfd=True,
            kfd_node=index + 1,
            iommu_group=str(14 + index),
            iommu_type="identity",
            atomics=True,
        )
        for index, address in enumerate(addresses)
    ]
    return changed(changed_machine(bare(pci=tuple(pci), amd=ALLOWED), gpus=gpus), **changes)


def arcs(count: int = 1, accessible: bool | None = True, **changes: Any) -> Inspection:
    facts = {"driver": "xe", "bar_bytes": 16 * GIB, "parent": "0000:00:01.0", **changes}
    cards = [
        PciDevice(address=f"0000:{number + 3:02x}:00.0", vendor=0x8086, pci_class=0x030000, **facts)
        for number in range(count)
    ]
    integrated = PciDevice(address="0000:00:02.0", vendor=0x8086, pci_class=0x030000, bar_bytes=256 * MIB)
    return bare(pci=(integrated, *cards), intel=IntelFacts(render_accessible=accessible))


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


def of_service(inspection: Inspection, **variables: str) -> Inspection:
    path = "/etc/systemd/system/ollama.service.d/override.conf"
    found = tuple(
        UnitVariable(unit="ollama.service", path=path, name=name, value=value) for name, value in variables.items()
    )
    return changed(inspection, host={"unit_variables": found})


def of_package(version: str | None) -> Inspection:
    """Radeons with a module of that version, and Ollama."""
    return changed(TWO, engines=(OLLAMA,), amd={"module_version": version})


def beside_nvidia(inspection: Inspection) -> Inspection:
    """The Radeons behind two 4090, with the numbers that the machine's list then gives to them."""
    radeons = [dataclasses.replace(gpu, index=gpu.index + 2) for gpu in inspection.machine.gpus]
    return changed_machine(inspection, gpus=(*healthy().machine.gpus, *radeons))


BESIDE = beside_nvidia(radeons("gfx1031"))


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
        pytest.param(
            "amd-kfd-access",
            changed_pci(changed(BESIDE, amd={"kfd_device": False}), FIRST, driver="radeon"),
            Purpose(),
            ["info 2"],
            id="an old card that shows pictures",
        ),
        pytest.param(
            "amd-kfd-access",
            changed(BESIDE, amd={"kfd_device": False}),
            Purpose(),
            ["info 2"],
            id="no kfd beside 4090s",
        ),
        pytest.param(
            "amd-kfd-access", of_package("6.12.12"), Purpose(backend="ollama"), ["warn 0,1"], id="of ROCm 6.4"
        ),
        pytest.param(
            "amd-kfd-access", of_package("6.12.12"), Purpose(), ["info 0,1"], id="of ROCm 6.4, Ollama is here"
        ),
        pytest.param("amd-kfd-access", of_package("6.14.14"), Purpose(backend="ollama"), [], id="of ROCm 7"),
        pytest.param("amd-kfd-access", of_package(None), Purpose(backend="ollama"), [], id="the kernel's own"),
        pytest.param("amd-multi-gpu", changed_pci(TRANSLATED, driver="radeon"), Purpose(), [], id="old cards"),
        pytest.param("amd-multi-gpu", TWO, Purpose(), [], id="equal slots of the processor"),
        pytest.param("amd-multi-gpu", CHIPSET, Purpose(), ["warn 1"], id="a slot of AMD's chipset"),
        pytest.param("amd-multi-gpu", INTEL_CHIPSET, Purpose(), ["warn 0"], id="a slot of Intel's chipset"),
        pytest.param(
            "amd-multi-gpu", changed_gpu(TWO, 1, pcie={"slot_width": 4}), Purpose(), ["warn 0,1"], id="unequal widths"
        ),
        pytest.param(
            "amd-multi-gpu",
            changed_pci(TWO, FIRST, atomics=False, in_kfd=False),
            Purpose(),
            ["fail 0"],
            id="no atomics",
        ),
        pytest.param(
            "amd-multi-gpu",
            changed_pci(TWO, FIRST, atomics=False, in_kfd=True),
            Purpose(),
            ["warn 0"],
            id="no atomics, and yet the driver lists the card",
        ),
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
            changed_machine(INTEL_CHIPSET, host={"virtualisation": "kvm"}),
            Purpose(),
            [],
            id="a guest's ports are where its host puts them",
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
            "amd-multi-gpu",
            changed_pci(TWO, iommu_type=None, iommu_group=None),
            Purpose(),
            [],
            id="an IOMMU that is off for the cards",
        ),
        pytest.param("amd-multi-gpu", changed(TWO, pci=(), pci_known=False), Purpose(), ["skip"] * 3, id="bus unread"),
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
        pytest.param(
            "amd-gfx-override",
            of_service(radeons("gfx1031", engines=(OLLAMA,)), HSA_OVERRIDE_GFX_VERSION="10.3.0"),
            Purpose(backend="ollama"),
            [],
            id="overridden in Ollama's unit",
        ),
        pytest.param(
            "amd-gfx-override",
            of_service(radeons("gfx1031", engines=(VLLM,)), HSA_OVERRIDE_GFX_VERSION="10.3.0"),
            Purpose(backend="vllm"),
            ["fail 0"],
            id="Ollama's unit says nothing to vLLM",
        ),
        pytest.param(
            "amd-gfx-override",
            of_service(radeons("gfx1031", "gfx1100"), HSA_OVERRIDE_GFX_VERSION="10.3.0"),
            Purpose(),
            ["warn 0,1"],
            id="one override for unlike cards in a unit",
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
        pytest.param("intel-xe", arcs(2, bar_bytes=256 * MIB), Purpose(), ["warn", "info"], id="small BARs, said once"),
        pytest.param(
            "intel-xe",
            changed_machine(arcs(bar_bytes=256 * MIB), host={"virtualisation": "kvm"}),
            Purpose(),
            [],
            id="a guest has no BIOS to change",
        ),
        pytest.param("intel-xe", arcs(accessible=False), Purpose(), ["fail"], id="no access"),
        pytest.param("intel-xe", arcs(2), Purpose(), ["info"], id="two without a selector"),
        pytest.param("intel-xe", arcs(bar_bytes=None), Purpose(), ["skip"], id="regions unread"),
        pytest.param("intel-xe", arcs(accessible=None), Purpose(), ["skip"], id="access unread"),
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


def test_the_kernels_option_is_set_as_the_distribution_does_it() -> None:
    (finding,) = amd.amd_multi_gpu.run(
        changed(TRANSLATED, host={"distribution": "fedora", "kernel_command_line": ""}), Purpose()
    )
    assert isinstance(finding, Finding)
    assert finding.fix[-1] == "sudo grubby --update-kernel=ALL --args=iommu=pt && sudo reboot"
    assert [each.value for each in finding.evidence] == ["DMA-FQ"]


def fixes(inspection: Inspection) -> list[str]:
    found = (item for item in amd.amd_gfx_override.run(inspection, Purpose()) if isinstance(item, Finding))
    return [line for item in found for line in item.fix if re.search("export|instead set|Environment", line)]


NEAREST = "  # the nearest version that is in the list"


@pytest.mark.parametrize(
    ("inspection", "expected"),
    [
        pytest.param(
            radeons("gfx1031", engines=(OLLAMA,)),
            ["Environment=HSA_OVERRIDE_GFX_VERSION=10.3.0"],
            id="the only card of AMD's",
        ),
        pytest.param(
            beside_nvidia(radeons("gfx1030", "gfx1031", engines=(VLLM,))),
            [f"export HSA_OVERRIDE_GFX_VERSION_2=10.3.0{NEAREST}"],
            id="by AMD's number, of the card's own generation",
        ),
        pytest.param(radeons("gfx1201", engines=(OLLAMA,)), [], id="no version of its generation is in the list"),
        pytest.param(radeons("gfx90a", engines=(VLLM,)), [], id="before RDNA none runs another's code"),
        pytest.param(
            changed_pci(radeons("gfx1031", "gfx1031", engines=(OLLAMA,)), kfd_node=None), [], id="AMD's number unread"
        ),
        pytest.param(
            override(radeons("gfx1100", "gfx1031"), HSA_OVERRIDE_GFX_VERSION="10.3.0; x"),
            ["instead set HSA_OVERRIDE_GFX_VERSION_2='10.3.0; x'"],
            id="one override becomes that of the card that it fits",
        ),
    ],
)
def test_an_override_is_one_that_the_card_can_run(inspection: Inspection, expected: list[str]) -> None:
    assert fixes(inspection) == expected


def test_a_service_is_told_in_its_unit() -> None:
    for user, control in ((False, "sudo systemctl"), (True, "systemctl --user")):
        variable = UnitVariable(unit="ollama.service", path="/etc/a.conf", name="OLLAMA_HOST", value="x", user=user)
        there = changed(radeons("gfx1031", engines=(OLLAMA,)), host={"unit_variables": (variable,)})
        (finding,) = amd.amd_gfx_override.run(there, Purpose())
        assert isinstance(finding, Finding)
        assert finding.fix[:-1] == (
            f"{control} edit ollama.service{NEAREST}; write there:",
            "[Service]",
            "Environment=HSA_OVERRIDE_GFX_VERSION=10.3.0",
            f"{control} restart ollama.service",
        )


def test_an_override_of_a_service_is_changed_before_it_starts_again() -> None:
    there = of_service(radeons("gfx1100", "gfx1031"), HSA_OVERRIDE_GFX_VERSION="10.3.0")
    (finding,) = amd.amd_gfx_override.run(there, Purpose())
    assert isinstance(finding, Finding)
    assert finding.fix[1] == "instead set Environment=HSA_OVERRIDE_GFX_VERSION_2=10.3.0"
    assert "restart" in finding.fix[2]


@pytest.mark.parametrize(
    ("uuids", "expected"),
    [
        pytest.param(("GPU-a", "GPU-b"), "export ROCR_VISIBLE_DEVICES=GPU-a,GPU-b", id="by UUID"),
        pytest.param(
            (None, None), "export ROCR_VISIBLE_DEVICES=0,1", id="by ROCm's numbers, which begin with AMD's cards"
        ),
        pytest.param(("GPU-a; x", "GPU-b"), "export ROCR_VISIBLE_DEVICES='GPU-a; x,GPU-b'", id="quoted for a shell"),
    ],
)
def test_amds_cards_are_named_as_rocm_does(uuids: tuple[str | None, ...], expected: str) -> None:
    inspection = beside_nvidia(WITH_INTEGRATED)
    for index, uuid in enumerate(uuids):
        inspection = changed_gpu(inspection, index + 2, uuid=uuid)
    assert fixes(inspection) == [expected]


def test_numbers_are_not_guessed_where_some_cards_are_left_out() -> None:
    inspection = beside_nvidia(WITH_INTEGRATED)
    left = changed_machine(inspection, gpus=inspection.machine.gpus[3:])
    assert fixes(left) == ["export ROCR_VISIBLE_DEVICES=UUIDS  # rocminfo | grep Uuid lists them"]
