"""Graphics cards and the bridges above them, as the PCI bus shows them in sysfs."""

from __future__ import annotations

import dataclasses
import os
import re
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mgpu.machine import sysfs
from mgpu.machine.inspection import PciDevice, Unread

# VGA, 3D and other display controllers; AMD's Instinct cards are processing accelerators.
_DISPLAY_CLASSES = {0x0300, 0x0302, 0x0380}
_ACCELERATOR_CLASS, _BRIDGE_CLASS = 0x1200, 0x0604
_EXPRESS_CAPABILITY, _ACS_CAPABILITY = 0x10, 0x000D


# Long enough for a link that counts errors by the hundred each second, and no longer than NVML takes meanwhile.
_WATCH_S = 0.5


def read_pci(
    root: Path = Path("/"), *, pause: Callable[[float], object] = time.sleep
) -> tuple[tuple[PciDevice, ...], bool, tuple[Unread, ...]]:
    """Return every graphics card under `root` and every bridge above one, in the order of their addresses; whether the
    bus could be listed at all; and what could not be read.

    `gen_max` and `width_max` are the device's own (a bridge's are the slot's). Without root the kernel shows 64 bytes
    of the configuration space, so ACS and atomics stay unknown, and one `Unread` says so for all; so they do of devices
    that are asleep, which are not woken. Where errors of a link were corrected it is looked at again after a `pause` of
    half a second. Never raises.
    """
    try:
        with os.scandir(root / "sys/bus/pci/devices") as entries:
            names = sorted(entry.name for entry in entries if sysfs.PCI_ADDRESS.fullmatch(entry.name))
    except OSError as error:
        why = "there is no PCI bus here" if isinstance(error, FileNotFoundError) else "it may not be listed"
        return (), False, (Unread(what="/sys/bus/pci/devices", why=why),)
    folders: dict[str, Path] = {}
    for name in names:
        if _is_graphics(root / "sys/bus/pci/devices" / name):
            folder = sysfs.pci_device(root, name)
            while folder is not None and sysfs.PCI_ADDRESS.fullmatch(folder.name) and folder.name not in folders:
                folders[folder.name] = folder
                folder = folder.parent
    devices = tuple(_read_device(folders[name]) for name in sorted(folders))
    if any(device.aer_correctable for device in devices):
        pause(_WATCH_S)
        devices = tuple(_looked_at_again(device, folders[device.address]) for device in devices)
    devices = _with_kfd_atomics(devices, root)
    unknown = [device.address for device in devices if not device.acs_known]
    asleep = [address for address in unknown if sysfs.is_asleep(folders[address])]
    hidden = [address for address in unknown if address not in asleep]
    unread = [Unread(what=f"/sys/bus/pci/devices/{address}/config", why=sysfs.ASLEEP) for address in asleep]
    if hidden:
        why = f"more than the first 64 bytes may not be read ({len(hidden)} of {len(devices)} devices)"
        what = f"/sys/bus/pci/devices/{hidden[0]}/config"
        unread.insert(0, Unread(what=what, why=why, needs_root=os.geteuid() != 0))
    return devices, True, tuple(unread)


def _is_graphics(folder: Path) -> bool:
    kind = sysfs.read_int(folder / "class", 16)
    if kind is None:
        return False
    return kind >> 8 in _DISPLAY_CLASSES or (
        kind >> 8 == _ACCELERATOR_CLASS and sysfs.read_int(folder / "vendor", 16) == sysfs.AMD
    )


def _read_device(folder: Path) -> PciDevice:
    configuration = b"" if sysfs.is_asleep(folder) else sysfs.read_bytes(folder / "config", 4096) or b""
    capabilities = dict(_extended_capabilities(configuration))
    acs_at = capabilities.get(_ACS_CAPABILITY)
    group = _word(sysfs.link_name(folder / "iommu_group"))
    is_bridge = (sysfs.read_int(folder / "class", 16) or 0) >> 8 == _BRIDGE_CLASS
    parent = folder.parent.name
    return PciDevice(
        address=folder.name,
        vendor=sysfs.read_int(folder / "vendor", 16),
        device=sysfs.read_int(folder / "device", 16),
        pci_class=sysfs.read_int(folder / "class", 16),
        driver=_word(sysfs.link_name(folder / "driver")),
        parent=parent if sysfs.PCI_ADDRESS.fullmatch(parent) else None,
        gen=sysfs.link_generation(folder / "current_link_speed"),
        gen_max=sysfs.link_generation(folder / "max_link_speed"),
        width=sysfs.link_width(folder / "current_link_width"),
        width_max=sysfs.link_width(folder / "max_link_width"),
        iommu_group=group,
        iommu_type=_word(sysfs.read_text(folder / "iommu_group/type", 64)) if group else None,
        acs=_u16(configuration, acs_at + 6) if acs_at is not None else None,
        acs_known=len(configuration) >= 256,
        aer_correctable=_aer_total(folder / "aer_dev_correctable"),
        aer_nonfatal=_aer_total(folder / "aer_dev_nonfatal"),
        aer_fatal=_aer_total(folder / "aer_dev_fatal"),
        numa_node=sysfs.read_int(folder / "numa_node"),
        local_cpus=None if is_bridge else _word(sysfs.read_text(folder / "local_cpulist", 4096)),
        bar_bytes=None if is_bridge else _largest_bar_bytes(folder),
        atomics=_atomics(configuration),
    )


def _looked_at_again(device: PciDevice, folder: Path) -> PciDevice:
    first, last = device.aer_correctable, _aer_total(folder / "aer_dev_correctable")
    return dataclasses.replace(device, aer_fresh=None if first is None or last is None else max(last - first, 0))


def _word(text: str | None) -> str | None:
    return text if text and re.fullmatch(r"[\w,.:+-]{1,512}", text, re.ASCII) else None


def _aer_total(path: Path) -> int | None:
    total = re.search(r"^TOTAL_ERR_\w+ (\d{1,18})$", sysfs.read_text(path, 4096) or "", re.M)
    return int(total[1]) if total else None


def _largest_bar_bytes(folder: Path) -> int | None:
    """The largest of the six windows; `resource` has a line "first last flags" for each, zeros for none."""
    sizes = []
    for line in (sysfs.read_text(folder / "resource", 4096) or "").splitlines()[:6]:
        ends = re.match(r"0x([0-9a-f]{1,16}) 0x([0-9a-f]{1,16}) ", line)
        if ends and (last := int(ends[2], 16)) > (first := int(ends[1], 16)):
            sizes.append(last - first + 1)
    return max(sizes, default=None)


def _u16(configuration: bytes, at: int) -> int | None:
    return struct.unpack_from("<H", configuration, at)[0] if at + 2 <= len(configuration) else None


def _extended_capabilities(configuration: bytes) -> Iterator[tuple[int, int]]:
    """Number and place of each extended capability, which are a list from 0x100 on (PCI Express base, 7.6)."""
    at, seen = 0x100, set[int]()
    while 0x100 <= at <= len(configuration) - 4 and at not in seen:
        seen.add(at)
        (header,) = struct.unpack_from("<I", configuration, at)
        if header in (0, 0xFFFFFFFF):
            return
        yield header & 0xFFFF, at
        at = header >> 20 & 0xFFC


def _capability(configuration: bytes, wanted: int) -> int | None:
    """The place of a capability of the older list, which starts where byte 0x34 says; its first 64 bytes are the
    header."""
    if len(configuration) < 64 or not configuration[6] & 0x10:
        return None
    at, seen = configuration[0x34] & 0xFC, set[int]()
    while 0x40 <= at < min(len(configuration) - 1, 0x100) and at not in seen:
        seen.add(at)
        if configuration[at] == wanted:
            return at
        at = configuration[at + 1] & 0xFC
    return None


def _atomics(configuration: bytes) -> bool | None:
    """Whether atomic operations pass: a switch routes them, a root port completes them (both widths), and of a card
    that the driver, having found that its whole path can, let it use them."""
    at = _capability(configuration, _EXPRESS_CAPABILITY)
    if at is None:
        return None
    flags, capable, control = (_u16(configuration, at + offset) for offset in (0x02, 0x24, 0x28))
    if flags is None or capable is None or control is None:
        return None
    if flags & 0xF < 2:  # the first version of the capability has none of this
        return False
    kind = flags >> 4 & 0xF
    if kind in (5, 6):  # ports of a switch
        return bool(capable & 0x40)
    if kind == 4:  # root port
        return capable & 0x180 == 0x180
    return bool(control & 0x40)


def _with_kfd_atomics(devices: tuple[PciDevice, ...], root: Path) -> tuple[PciDevice, ...]:
    """AMD's compute driver tells anyone which cards it lists, under which numbers, and whether atomics reach the
    processor from each: flags 4 and 8 of a link say no."""
    nodes = sysfs.children(root / "sys/class/kfd/kfd/topology/nodes", r"\d{1,4}")
    told: dict[str, bool | None] = {}
    places: dict[str, int] = {}
    for node in nodes:
        fields = sysfs.read_fields(node / "properties", None)
        numbers = [fields.get(key, "") for key in ("location_id", "domain", "gfx_target_version")]
        if not all(re.fullmatch(r"\d{1,10}", number) for number in numbers) or numbers[2] == "0":
            continue
        location, domain = int(numbers[0]), int(numbers[1])
        flags = sysfs.read_fields(node / "io_links/0/properties", None).get("flags", "")
        address = f"{domain:04x}:{location >> 8 & 255:02x}:{location >> 3 & 31:02x}.{location & 7}"
        places[address] = int(node.name)
        told[address] = not int(flags) & 0b1100 if re.fullmatch(r"\d{1,10}", flags) else None

    def joined(device: PciDevice) -> PciDevice:
        if device.vendor != sysfs.AMD or (device.pci_class or 0) >> 8 == _BRIDGE_CLASS or not nodes:
            return device
        atomics = told.get(device.address)
        return dataclasses.replace(
            device,
            in_kfd=device.address in told,
            kfd_node=places.get(device.address),
            atomics=device.atomics if atomics is None else atomics,
        )

    return tuple(map(joined, devices))
