"""The PCI bus: links, drivers, IOMMU groups, ACS, error counters and atomics, each from the file that holds it."""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from mgpu.machine.inspection import PciDevice
from mgpu.machine.pci import read_pci
from tests.fakes.sysfs_tree import SysfsTree, configuration_space

PORT, SWITCH, CARD = "0000:00:01.0", "0000:01:00.0", "0000:02:00.0"
NVIDIA_4090 = (0x10DE, 0x2684)


@pytest.fixture
def bus(tmp_path: Path) -> SysfsTree:
    return SysfsTree(tmp_path / "root").device(PORT, acs=0x1D, width=(8, 8))


def card(bus: SysfsTree, **changes: object) -> PciDevice:
    options: dict[str, object] = {"below": PORT, "ids": NVIDIA_4090, "pci_class": 0x030000, "driver": "nvidia"}
    bus.device(CARD, **{**options, **changes})  # type: ignore[arg-type]
    devices, known, _ = read_pci(bus.root)
    assert known
    return devices[-1]


def test_a_card_and_the_bridge_above_it_are_read_whole(bus: SysfsTree) -> None:
    found = card(bus, gen=(1, 4), width=(8, 16), group=(14, "DMA-FQ"), acs=None, aer=(210, 2, 1), numa_node=0)
    assert found == PciDevice(
        address=CARD,
        vendor=0x10DE,
        device=0x2684,
        pci_class=0x030000,
        driver="nvidia",
        parent=PORT,
        gen=1,
        gen_max=4,
        width=8,
        width_max=16,
        iommu_group="14",
        iommu_type="DMA-FQ",
        acs=None,
        acs_known=True,
        aer_correctable=210,
        aer_nonfatal=2,
        aer_fatal=1,
        aer_fresh=0,
        numa_node=0,
        local_cpus="0-31",
        bar_bytes=32 * 1024**3,
        atomics=True,
    )
    port = read_pci(bus.root)[0][0]
    assert (port.address, port.parent, port.acs, port.width_max, port.driver) == (PORT, None, 0x1D, 8, "pcieport")
    assert port.local_cpus is None


@pytest.mark.parametrize(
    ("pci_class", "vendor", "listed"),
    [
        pytest.param(0x030000, 0x10DE, True, id="VGA"),
        pytest.param(0x030200, 0x10DE, True, id="3D controller"),
        pytest.param(0x038000, 0x1002, True, id="display controller"),
        pytest.param(0x120000, 0x1002, True, id="AMD Instinct"),
        pytest.param(0x120000, 0x1DA3, False, id="another maker's accelerator"),
        pytest.param(0x040300, 0x10DE, False, id="the sound of a card"),
        pytest.param(0x010802, 0x144D, False, id="a disk"),
    ],
)
def test_graphics_cards_are_listed_and_nothing_else(bus: SysfsTree, pci_class: int, vendor: int, listed: bool) -> None:
    bus.device(CARD, below=PORT, ids=(vendor, 1), pci_class=pci_class, driver=None)
    assert [device.address for device in read_pci(bus.root)[0]] == ([PORT, CARD] if listed else [])


def test_every_bridge_above_a_card_is_listed_once(bus: SysfsTree) -> None:
    bus.device(SWITCH, below=PORT)
    for address in (CARD, "0000:03:00.0"):
        bus.device(address, below=SWITCH, ids=NVIDIA_4090, pci_class=0x030000)
    parents = {device.address: device.parent for device in read_pci(bus.root)[0]}
    assert parents == {PORT: None, SWITCH: PORT, CARD: SWITCH, "0000:03:00.0": SWITCH}


@pytest.mark.parametrize(
    ("size", "acs", "known", "value", "atomics"),
    [
        pytest.param(4096, 0x1D, True, 0x1D, True, id="all of it"),
        pytest.param(4096, None, True, None, True, id="a bridge without ACS"),
        pytest.param(256, 0x1D, True, None, True, id="no extended part"),
        pytest.param(64, 0x1D, False, None, None, id="an ordinary user's 64 bytes"),
        pytest.param(0, 0x1D, False, None, None, id="nothing"),
    ],
)
def test_acs_is_read_as_far_as_the_kernel_shows_it(
    tmp_path: Path, size: int, acs: int | None, known: bool, value: int | None, atomics: bool | None
) -> None:
    bus = SysfsTree(tmp_path).device(PORT, acs=acs, configuration=size)
    bus.device(CARD, below=PORT, pci_class=0x030000, configuration=size)
    (port, _), _, unread = read_pci(tmp_path)
    assert (port.acs_known, port.acs, port.atomics) == (known, value, atomics)
    assert [each.what for each in unread] == ([] if known else [f"/sys/bus/pci/devices/{PORT}/config"])


def test_a_card_that_is_asleep_is_not_woken(bus: SysfsTree) -> None:
    awake = card(bus)
    bus.files({f"sys/devices/pci0000:00/{PORT}/{CARD}/power/runtime_status": "suspended\n"})
    (_, asleep), _, unread = read_pci(bus.root)
    assert asleep == dataclasses.replace(awake, acs_known=False, acs=None, atomics=None)
    assert [(each.what, each.needs_root) for each in unread] == [(f"/sys/bus/pci/devices/{CARD}/config", False)]
    assert "asleep" in unread[0].why
    bus.files({f"sys/devices/pci0000:00/{PORT}/{CARD}/power/runtime_status": "active\n"})
    assert read_pci(bus.root)[0][1] == awake


def test_only_an_ordinary_user_is_told_to_be_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SysfsTree(tmp_path).device(CARD, pci_class=0x030000, configuration=64)
    for user, needs_root in ((0, False), (1000, True)):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        assert [each.needs_root for each in read_pci(tmp_path)[2]] == [needs_root]


def looped(next_at: int) -> bytes:
    """A list of capabilities that comes back to itself."""
    space = bytearray(configuration_space(bridge=True, acs=4))
    struct.pack_into("<I", space, 0x148, next_at << 20 | 1 << 16 | 0x0002)
    return bytes(space)


@pytest.mark.parametrize(
    "space",
    [
        pytest.param(looped(0x100), id="a loop"),
        pytest.param(looped(0xFFF), id="a place past the end"),
        pytest.param(b"\xff" * 4096, id="a device that is gone"),
        pytest.param(b"\xff" * 257, id="one byte of a header"),
    ],
)
def test_a_broken_configuration_space_says_nothing_of_acs(bus: SysfsTree, space: bytes) -> None:
    card(bus)
    bus.files({f"sys/devices/pci0000:00/{PORT}/config": space})
    assert read_pci(bus.root)[0][0].acs is None


@pytest.mark.parametrize(
    ("flags", "capable", "control", "atomics"),
    [
        pytest.param(4 << 4 | 2, 0x180, 0, True, id="a root port that completes both widths"),
        pytest.param(4 << 4 | 2, 0x080, 0, False, id="a root port that completes one"),
        pytest.param(6 << 4 | 2, 0x040, 0, True, id="a switch that routes them"),
        pytest.param(6 << 4 | 2, 0x180, 0, False, id="a switch that does not"),
        pytest.param(0 << 4 | 2, 0x180, 0x40, True, id="a card that may"),
        pytest.param(0 << 4 | 2, 0x180, 0, False, id="a card whose driver did not let it"),
        pytest.param(0 << 4 | 1, 0x180, 0x40, False, id="a version before atomics"),
    ],
)
def test_atomics_depend_on_what_the_device_is(
    tmp_path: Path, flags: int, capable: int, control: int, atomics: bool
) -> None:
    space = bytearray(configuration_space(bridge=False))
    struct.pack_into("<H", space, 0x82, flags)
    struct.pack_into("<I", space, 0xA4, capable)
    struct.pack_into("<H", space, 0xA8, control)
    tree = SysfsTree(tmp_path).device(CARD, pci_class=0x030000)
    tree.files({f"sys/devices/pci0000:00/{CARD}/config": bytes(space)})
    assert read_pci(tmp_path)[0][0].atomics is atomics


def test_amds_compute_driver_tells_which_cards_it_lists(tmp_path: Path) -> None:
    tree = SysfsTree(tmp_path)
    for address in (CARD, "0000:05:00.0"):
        tree.device(address, pci_class=0x030000, ids=(0x1002, 0x744C))
    tree.device("0000:06:00.0", pci_class=0x030000, ids=(0x10DE, 0x2684))
    nodes = "sys/class/kfd/kfd/topology/nodes"
    assert [each.in_kfd for each in read_pci(tmp_path)[0]] == [None, None, None]
    tree.files(
        {
            f"{nodes}/0/properties": "cpu_cores_count 16\ngfx_target_version 0\nlocation_id 0\ndomain 0\n",
            f"{nodes}/1/properties": "gfx_target_version 110000\nlocation_id 512\ndomain 0\n",
        }
    )
    assert [each.in_kfd for each in read_pci(tmp_path)[0]] == [True, False, None]
    assert [each.kfd_node for each in read_pci(tmp_path)[0]] == [1, None, None]


@pytest.mark.parametrize(("flags", "atomics"), [("1", True), ("9", False), ("13", False), ("x", None)])
def test_amds_compute_driver_tells_an_ordinary_user_of_atomics(
    tmp_path: Path, flags: str, atomics: bool | None
) -> None:
    tree = SysfsTree(tmp_path).device(CARD, pci_class=0x030000, ids=(0x1002, 0x744C), configuration=64)
    node = "sys/class/kfd/kfd/topology/nodes/1"
    tree.files(
        {
            f"{node}/properties": "gfx_target_version 110000\nlocation_id 512\ndomain 0\n",
            f"{node}/io_links/0/properties": f"type 2\nflags {flags}\n",
        }
    )
    assert read_pci(tmp_path)[0][0].atomics is atomics


@pytest.mark.parametrize(
    ("later", "fresh"),
    [pytest.param(330, 120, id="more"), pytest.param(210, 0, id="as many"), pytest.param(3, 0, id="counted anew")],
)
def test_corrected_errors_are_counted_once_more(bus: SysfsTree, later: int, fresh: int) -> None:
    card(bus, aer=(210, 0, 0))
    counter: dict[str, str | bytes] = {
        f"sys/devices/pci0000:00/{PORT}/{CARD}/aer_dev_correctable": f"TOTAL_ERR_COR {later}\n"
    }
    devices, _, _ = read_pci(bus.root, pause=lambda _: bus.files(counter))
    assert [each.aer_fresh for each in devices] == [0, fresh]


def test_without_errors_nothing_is_waited_for(bus: SysfsTree) -> None:
    card(bus)
    pauses: list[float] = []
    devices, _, _ = read_pci(bus.root, pause=pauses.append)
    assert (pauses, [each.aer_fresh for each in devices]) == ([], [None, None])


UNKNOWN = {
    "gen": ("current_link_speed", "Unknown\n"),
    "width": ("current_link_width", "255\n"),
    "aer_fatal": ("aer_dev_fatal", "\n"),
    "numa_node": ("numa_node", "many\n"),
    "vendor": ("vendor", "\0\0"),
    "bar_bytes": ("resource", "not a window\n"),
    "local_cpus": ("local_cpulist", "\x1b[2J\n"),
}


@pytest.mark.parametrize("field", UNKNOWN)
def test_a_file_that_holds_nonsense_costs_its_own_fact(bus: SysfsTree, field: str) -> None:
    whole = card(bus)
    name, content = UNKNOWN[field]
    bus.files({f"sys/devices/pci0000:00/{PORT}/{CARD}/{name}": content})
    assert read_pci(bus.root)[0][-1] == dataclasses.replace(whole, **{field: None})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda folder: folder.rmdir(), id="no bus"),
        pytest.param(lambda folder: (folder.rmdir(), folder.write_text("")), id="a file instead"),
    ],
)
def test_a_bus_that_cannot_be_listed_is_unknown_not_empty(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    SysfsTree(tmp_path)
    spoil(tmp_path / "sys/bus/pci/devices")
    devices, known, unread = read_pci(tmp_path)
    assert (devices, known, [each.what for each in unread]) == ((), False, ["/sys/bus/pci/devices"])
