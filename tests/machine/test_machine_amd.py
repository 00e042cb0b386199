from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from mgpu.machine.amd import read_amd
from mgpu.machine.inspection_reader import inspect_machine
from mgpu.machine.snapshot import Gpu, GpuProcess, PcieLink
from mgpu.machine.sysfs import pcie_link

Tree = Callable[..., Path]
Files = dict[str, str | bytes]

# A Radeon since Navi carries a switch: root port, the switch's two ends (vendor 0x1002), then the GPU.
ROOT_PORT = "sys/devices/pci0000:00/0000:00:01.1"
UPSTREAM = f"{ROOT_PORT}/0000:01:00.0"
DOWNSTREAM = f"{UPSTREAM}/0000:02:00.0"
XTX = f"{DOWNSTREAM}/0000:03:00.0"
NODE = "sys/class/kfd/kfd/topology/nodes/1"

RADEON: Files = {
    f"{ROOT_PORT}/vendor": "0x1022\n",
    f"{ROOT_PORT}/class": "0x060400\n",
    f"{ROOT_PORT}/max_link_width": "8\n",
    f"{ROOT_PORT}/max_link_speed": "32.0 GT/s PCIe\n",
    f"{UPSTREAM}/vendor": "0x1002\n",
    f"{UPSTREAM}/class": "0x060400\n",
    f"{UPSTREAM}/current_link_width": "8\n",
    f"{UPSTREAM}/current_link_speed": "2.5 GT/s PCIe\n",
    f"{UPSTREAM}/max_link_width": "16\n",
    f"{UPSTREAM}/max_link_speed": "16.0 GT/s PCIe\n",
    f"{DOWNSTREAM}/vendor": "0x1002\n",
    f"{DOWNSTREAM}/class": "0x060400\n",
    f"{XTX}/vendor": "0x1002\n",
    f"{XTX}/device": "0x744c\n",
    f"{XTX}/revision": "0xc8\n",
    f"{XTX}/unique_id": "8b1fc6b9fcdf1c7e\n",
    f"{XTX}/current_link_width": "16\n",
    f"{XTX}/max_link_width": "16\n",
    f"{XTX}/mem_info_vram_total": "25753026560\n",
    f"{XTX}/mem_info_vram_used": "1073741824\n",
    f"{XTX}/mem_info_vis_vram_total": "25753026560\n",
    f"{XTX}/gpu_busy_percent": "12\n",
    f"{XTX}/hwmon/hwmon4/power1_average": "31000000\n",
    f"{XTX}/hwmon/hwmon4/power1_cap": "339000000\n",
    f"{XTX}/hwmon/hwmon4/temp1_input": "45600\n",
    "sys/class/kfd/kfd/topology/nodes/0/properties": "cpu_cores_count 16\ngfx_target_version 0\nlocation_id 0\n",
    f"{NODE}/properties": "simd_count 192\nlocation_id 768\ndomain 0\ngfx_target_version 110000\n",
    f"{NODE}/gpu_id": "5095\n",
    "sys/class/kfd/kfd/proc/4711/vram_5095": "1048576\n",
    "sys/class/kfd/kfd/proc/4712/vram_5095": "0\n",
    "proc/4711/cmdline": b"/opt/bin/llama-server\0-m\0",
    "sys/class/drm/card1/card1-DP-1/enabled": "disabled\n",
    "sys/class/drm/card1/card1-HDMI-A-1/enabled": "enabled\n",
    "sys/class/drm/renderD128/ignored": "",
}


def integrated(bus: str, number: int) -> tuple[Files, dict[str, str]]:
    device = f"sys/devices/pci0000:00/0000:00:08.1/0000:{bus}:00.0"
    files: Files = {
        f"{device}/vendor": "0x1002\n",
        f"{device}/device": "0x164e\n",
        f"{device}/revision": "0xd8\n",
        f"{device}/mem_info_vram_total": "536870912\n",
        f"{device}/mem_info_vram_used": "999999999\n",
    }
    return files, {f"sys/class/drm/card{number}/device": device}


def test_a_radeon_is_read_fact_by_fact(tree: Tree) -> None:
    root = tree(RADEON, {"sys/class/drm/card1/device": XTX})
    assert read_amd(root) == (
        Gpu(
            index=0,
            vendor="amd",
            name="AMD Radeon RX 7900 XTX",
            uuid="GPU-8b1fc6b9fcdf1c7e",
            bus_id="0000:03:00.0",
            total_bytes=25753026560,
            free_bytes=25753026560 - 1073741824,
            used_by=(GpuProcess(pid=4711, name="llama-server", bytes=1048576),),
            gfx="gfx1100",
            bandwidth_gb_s=960.0,
            # the slot's link, not the one between the card's own switch and its GPU
            pcie=PcieLink(gen=1, gen_max=4, width=8, width_max=16, slot_width=8),
            bar1_bytes=25753026560,
            power_w=31.0,
            power_limit_w=339.0,
            temperature_c=46,
            utilisation_percent=12,
            display=True,
        ),
    )


ARC = f"{ROOT_PORT}/0000:01:00.0/0000:02:01.0/0000:03:00.0"
ARC_FILES: Files = {
    f"{ROOT_PORT}/vendor": "0x8086\n",  # Intel's too, and yet not the card's
    f"{ROOT_PORT}/device": "0xa70d\n",
    f"{ROOT_PORT}/class": "0x060400\n",
    f"{ROOT_PORT}/max_link_width": "4\n",
    f"{UPSTREAM}/vendor": "0x8086\n",
    f"{UPSTREAM}/device": "0x4fa1\n",
    f"{UPSTREAM}/class": "0x060400\n",
    f"{UPSTREAM}/max_link_width": "16\n",
    f"{UPSTREAM}/current_link_width": "4\n",
    f"{UPSTREAM}/0000:02:01.0/vendor": "0x8086\n",
    f"{UPSTREAM}/0000:02:01.0/device": "0x4fa4\n",
    f"{UPSTREAM}/0000:02:01.0/class": "0x060400\n",
    f"{UPSTREAM}/0000:02:01.0/max_link_width": "1\n",
    f"{ARC}/vendor": "0x8086\n",
    f"{ARC}/current_link_width": "1\n",
}
FOREIGN_SWITCH: Files = {**RADEON, f"{UPSTREAM}/vendor": "0x10b5\n", f"{DOWNSTREAM}/vendor": "0x10b5\n"}


def test_the_sensors_of_a_card_that_is_asleep_are_left_alone(tree: Tree) -> None:
    links = {"sys/class/drm/card1/device": XTX, "sys/bus/pci/devices/0000:03:00.0": XTX}
    (awake,) = read_amd(tree({**RADEON, f"{XTX}/power/runtime_status": "active\n"}, links))
    root = tree({f"{XTX}/power/runtime_status": "suspended\n"})
    unknown = {"power_w": None, "power_limit_w": None, "temperature_c": None, "utilisation_percent": None}
    assert read_amd(root) == (dataclasses.replace(awake, **unknown),)  # type: ignore[arg-type]
    why = {each.what: each.why for each in inspect_machine(root).unread}
    assert "asleep" in why["/sys/bus/pci/devices/0000:03:00.0/hwmon"]


@pytest.mark.parametrize(
    ("files", "device", "slot_width", "width"),
    [
        pytest.param(RADEON, XTX, 8, 8, id="a Radeon's own switch is no slot"),
        pytest.param(
            {**FOREIGN_SWITCH, f"{DOWNSTREAM}/max_link_width": "4"}, XTX, 4, 16, id="a switch of the board is"
        ),
        pytest.param(ARC_FILES, ARC, 4, 4, id="an Arc's own switch is no slot, Intel's root port is"),
    ],
)
def test_the_slot_is_the_first_bridge_that_is_not_the_cards_own(
    tree: Tree, files: Files, device: str, slot_width: int, width: int
) -> None:
    found = pcie_link(tree(files) / device)
    assert (found.slot_width, found.width) == (slot_width, width)


def test_cards_are_in_bus_order_with_the_integrated_one(tree: Tree) -> None:
    files, links = integrated("0a", 0)
    gpus = read_amd(tree(RADEON | files, {"sys/class/drm/card1/device": XTX} | links))
    assert [(gpu.index, gpu.bus_id) for gpu in gpus] == [(0, "0000:03:00.0"), (1, "0000:0a:00.0")]
    assert gpus[1].name == "AMD GPU [1002:164e]"
    assert (gpus[1].total_bytes, gpus[1].free_bytes) == (536870912, 0)  # more used than there is: 0, not negative
    assert (gpus[1].uuid, gpus[1].gfx, gpus[1].bandwidth_gb_s, gpus[1].display) == (None, None, None, None)


LIBDRM = "# a comment\n1.0.0\n164E,\tD8,\tAMD Radeon 610M\n744C,\tC8,\tAMD Radeon RX 7900 XTX\n744C,\tZZ\n"


@pytest.mark.parametrize(
    ("files", "name", "bandwidth_gb_s"),
    [
        pytest.param({}, "AMD Radeon RX 7900 XTX", 960.0, id="catalogue"),
        pytest.param({f"{XTX}/revision": "0xcc\n"}, "AMD Radeon RX 7900 XT", 800.0, id="the revision tells them apart"),
        pytest.param({f"{XTX}/revision": "0x77\n"}, "AMD GPU [1002:744c]", None, id="an unknown revision"),
        pytest.param(
            {f"{XTX}/device": "0x164e\n", f"{XTX}/revision": "0xd8\n", "usr/share/libdrm/amdgpu.ids": LIBDRM},
            "AMD Radeon 610M",
            None,
            id="libdrm's list",
        ),
        pytest.param({f"{XTX}/product_name": "AMD Instinct MI210\n"}, "AMD Instinct MI210", 1638.0, id="the board"),
        pytest.param(
            {f"{XTX}/product_name": "0x1234\n", f"{XTX}/device": "0xffff\n"}, "0x1234", None, id="an unknown board"
        ),
        pytest.param(
            {f"{XTX}/device": "0x66a1\n", f"{XTX}/revision": "0x02\n", f"{XTX}/mem_info_vram_total": f"{32 * 2**30}\n",
             "usr/share/libdrm/amdgpu.ids": "66A1,\t02,\tAMD Instinct MI60 / MI50\n"},
            "AMD Instinct MI60 / MI50",
            1024.0,
            id="one id for two cards",
        ),
        pytest.param({f"{XTX}/device": b"\xff\x00"}, "AMD GPU [1002:????]", None, id="no id"),
    ],
)  # fmt: skip
def test_a_card_is_named_by_the_best_source(tree: Tree, files: Files, name: str, bandwidth_gb_s: float | None) -> None:
    (gpu,) = read_amd(tree(RADEON | files, {"sys/class/drm/card1/device": XTX}))
    assert (gpu.name, gpu.bandwidth_gb_s) == (name, bandwidth_gb_s)


@pytest.mark.parametrize(
    ("version", "gfx"),
    [
        ("110000", "gfx1100"),
        ("90402", "gfx942"),
        ("90010", "gfx90a"),
        ("100300", "gfx1030"),
        ("120001", "gfx1201"),
        ("90006", "gfx906"),
        ("0", "gfx1100"),
        ("zebra", "gfx1100"),
    ],
)
def test_the_architecture_is_the_compute_drivers_or_the_catalogues(tree: Tree, version: str, gfx: str) -> None:
    files = RADEON | {f"{NODE}/properties": f"location_id 768\ndomain 0\ngfx_target_version {version}\n"}
    (gpu,) = read_amd(tree(files, {"sys/class/drm/card1/device": XTX}))
    assert gpu.gfx == gfx


@pytest.mark.parametrize("unique_id", ["0\n", "ffffffffffffffff", "", "zebra"])
def test_a_card_without_a_unique_id_has_no_uuid(tree: Tree, unique_id: str) -> None:
    (gpu,) = read_amd(tree(RADEON | {f"{XTX}/unique_id": unique_id}, {"sys/class/drm/card1/device": XTX}))
    assert gpu.uuid is None


def test_other_makers_cards_and_empty_machines_are_no_amd_cards(tree: Tree) -> None:
    root = tree(RADEON | {f"{XTX}/vendor": "0x10de\n"}, {"sys/class/drm/card1/device": XTX})
    assert read_amd(root) == ()
    assert read_amd(root / "nothing") == ()


def test_links_in_a_circle_are_no_card(tree: Tree) -> None:
    root = tree({}, {"sys/class/drm/card0/device": "sys/class/drm/card0/device"})
    assert read_amd(root) == ()
