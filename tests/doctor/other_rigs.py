"""Computers with Radeons and Arcs, as the kernel shows them: the cards carry a switch of their own."""

from __future__ import annotations

from pathlib import Path

from tests.fakes.sysfs_tree import SysfsTree

GIB, MIB = 1024**3, 1024**2
_RADEON, _RADEON_PORTS = (0x1002, 0x744C), ((0x1002, 0x1478), (0x1002, 0x1479))
_ARC, _ARC_PORTS = (0x8086, 0xE20B), ((0x8086, 0xE2FF), (0x8086, 0xE2F0))
_DISPLAY = 0x030000


def two_radeons(
    root: Path, *, lanes: tuple[int, int] = (8, 8), group_type: str | None = "identity", atomics: bool = True
) -> SysfsTree:
    """Two RX 7900 XTX on slots of the processor with these lanes, behind an IOMMU whose groups are of that type. Cards
    without atomics are left out by the compute driver."""
    tree = SysfsTree(root).host({"dev/kfd": "", "sys/class/kfd/kfd/topology/nodes/0/properties": "simd_count 0\n"})
    for index in (0, 1):
        address = _behind_its_switch(
            tree, index, _RADEON, _RADEON_PORTS, "amdgpu", lanes[index], 16, group_type, atomics, 32 * GIB
        )
        _drawn_by(tree, address, index)
        folder, node = f"sys/bus/pci/devices/{address}", f"sys/class/kfd/kfd/topology/nodes/{index + 1}"
        bus = int(address[5:7], 16)
        tree.files(
            {
                f"{folder}/mem_info_vram_total": "25753026560\n",
                f"{folder}/mem_info_vram_used": "30000000\n",
                f"{folder}/mem_info_vis_vram_total": "25753026560\n",
                f"{folder}/gpu_busy_percent": "0\n",
                f"{folder}/revision": "0xc8\n",
                f"{folder}/unique_id": f"8b1fc6b9fcdf1c7{index}\n",
                f"{folder}/hwmon/hwmon4/power1_average": "15000000\n",
                f"{folder}/hwmon/hwmon4/power1_cap": "339000000\n",
                f"{folder}/hwmon/hwmon4/temp1_input": "38000\n",
            }
        )
        if not atomics:
            continue
        tree.files(
            {
                f"{node}/properties": f"simd_count 192\nlocation_id {bus << 8}\ndomain 0\ngfx_target_version 110000\n",
                f"{node}/gpu_id": f"509{index}\n",
                f"{node}/io_links/0/properties": "type 2\nflags 1\n",
            }
        )
    return tree


def two_arcs(root: Path, *, bar_bytes: int = 16 * GIB) -> SysfsTree:
    """Two Arc B580 whose memory the processor sees through windows of that size, beside integrated graphics."""
    tree = SysfsTree(root).host()
    tree.device("0000:00:02.0", ids=(0x8086, 0xA780), pci_class=_DISPLAY, driver="i915", bar_bytes=256 * MIB)
    for index in (0, 1):
        address = _behind_its_switch(tree, index, _ARC, _ARC_PORTS, "xe", 8, 8, "identity", True, bar_bytes)
        _drawn_by(tree, address, index)
    return tree


def _behind_its_switch(
    tree: SysfsTree,
    index: int,
    ids: tuple[int, int],
    ports: tuple[tuple[int, int], tuple[int, int]],
    driver: str,
    slot_lanes: int,
    lanes: int,
    group_type: str | None,
    atomics: bool,
    bar_bytes: int,
) -> str:
    """A root port, the card's switch, and the card, whose link inside is never that of the slot."""
    port, first = f"0000:00:01.{index + 1}", 3 * index + 1
    up, down, card = (f"0000:{first + step:02x}:00.0" for step in range(3))
    own = (8, 16) if driver == "amdgpu" else (1, 1)
    tree.device(port, gen=(1, 5), width=(slot_lanes, slot_lanes), atomics=atomics)
    tree.device(up, below=port, ids=ports[0], gen=(1, 4), width=(min(slot_lanes, lanes), lanes))
    tree.device(down, below=up, ids=ports[1], gen=(1, 4), width=(own[1], own[1]))
    tree.device(
        card,
        below=down,
        ids=ids,
        pci_class=_DISPLAY,
        driver=driver,
        gen=(1, 4),
        width=(own[1], own[1]),
        acs=None,
        atomics=atomics,
        group=(14 + index, group_type) if group_type else None,
        bar_bytes=bar_bytes,
    )
    return card


def _drawn_by(tree: SysfsTree, address: str, index: int) -> None:
    tree.link(f"sys/class/drm/card{index}/device", f"sys/bus/pci/devices/{address}")
    tree.link(f"sys/class/drm/renderD{128 + index}/device", f"sys/bus/pci/devices/{address}")
    tree.files({f"dev/dri/renderD{128 + index}": ""})
