"""AMD cards, as the amdgpu driver shows them in sysfs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mgpu.machine import sysfs
from mgpu.machine.cards import card_for_name, catalogue
from mgpu.machine.snapshot import Gpu, GpuProcess


def read_amd(root: Path = Path("/")) -> tuple[Gpu, ...]:
    """Return the AMD cards under `root`, in bus order, integrated ones included, with indices from 0.

    Memory is what amdgpu calls VRAM: for an integrated GPU the part of RAM that the BIOS set aside. `uuid`
    is the name that ROCR_VISIBLE_DEVICES takes ("GPU-" and the unique id), None where the card has none. The sensors
    of a card that is asleep are left alone: None.
    Links between AMD cards are not read. Never raises; what cannot be read is None.
    """
    nodes = _kfd_nodes(root)
    devices: dict[Path, Path] = {}
    for card in sysfs.children(root / "sys/class/drm", r"card\d+"):
        device = sysfs.real_directory(card / "device")
        if device and sysfs.read_int(device / "vendor", 16) == sysfs.AMD:
            devices.setdefault(device, card)
    found = sorted(devices.items(), key=lambda item: item[0].name)
    return tuple(_read_card(index, *item, nodes, root) for index, item in enumerate(found))


def _read_card(index: int, device: Path, drm: Path, nodes: dict[str, _KfdNode], root: Path) -> Gpu:
    bus_id = device.name if sysfs.PCI_ADDRESS.fullmatch(device.name) else None
    node = nodes.get(device.name, _KfdNode())
    total_bytes = sysfs.read_int(device / "mem_info_vram_total")
    used_bytes = sysfs.read_int(device / "mem_info_vram_used")
    name = _name(device, root)
    card = card_for_name(name, total_bytes)
    unique_id = sysfs.read_text(device / "unique_id", 32)
    return Gpu(
        index=index,
        vendor="amd",
        name=name,
        uuid=f"GPU-{unique_id}" if _is_unique(unique_id) else None,
        bus_id=bus_id,
        total_bytes=total_bytes,
        free_bytes=_difference(total_bytes, used_bytes),
        used_by=_processes(root, node),
        gfx=node.gfx or (card.gfx if card else None),
        bandwidth_gb_s=card.bandwidth_gb_s if card else None,
        pcie=sysfs.pcie_link(device),
        bar1_bytes=sysfs.read_int(device / "mem_info_vis_vram_total"),
        power_w=_scaled(_sensor(device, "power1_average", "power1_input"), 1_000_000),
        power_limit_w=_scaled(_sensor(device, "power1_cap"), 1_000_000),
        temperature_c=_rounded(_scaled(_sensor(device, "temp1_input"), 1000)),
        utilisation_percent=None if sysfs.is_asleep(device) else sysfs.read_int(device / "gpu_busy_percent"),
        display=_drives_display(drm),
    )


def _is_unique(unique_id: str | None) -> bool:
    try:
        return bool(unique_id) and int(unique_id or "0", 16) not in (0, 2**64 - 1)
    except ValueError:
        return False


def _difference(total: int | None, used: int | None) -> int | None:
    return max(total - used, 0) if total is not None and used is not None else None


def _scaled(value: int | None, divisor: int) -> float | None:
    return None if value is None else value / divisor


def _rounded(value: float | None) -> int | None:
    return None if value is None else round(value)


def _name(device: Path, root: Path) -> str:
    """The name on the board (server cards have one), in libdrm's list, in the catalogue, or the PCI id."""
    board = "".join(filter(str.isprintable, sysfs.read_text(device / "product_name", 128) or ""))
    if board and card_for_name(board):
        return board
    device_id = (sysfs.read_text(device / "device", 16) or "")[2:].upper()
    revision = (sysfs.read_text(device / "revision", 16) or "")[2:].upper()
    listed = _libdrm_name(root, device_id, revision) or _catalogue_name(f"{device_id}:{revision}")
    return listed or board or f"AMD GPU [1002:{device_id.lower() or '????'}]"


def _libdrm_name(root: Path, device_id: str, revision: str) -> str | None:
    """The name in /usr/share/libdrm/amdgpu.ids, whose lines are "744C, C8, AMD Radeon RX 7900 XTX"."""
    for line in (sysfs.read_text(root / "usr/share/libdrm/amdgpu.ids", 256 * 1024) or "").splitlines():
        fields = [field.strip() for field in line.split(",", 2)]
        if fields[:2] == [device_id, revision] and len(fields) == 3 and fields[2].isprintable():
            return fields[2] or None
    return None


def _catalogue_name(pci_id: str) -> str | None:
    cards = [card for card in catalogue() if card.pci_id == pci_id]
    return cards[0].full_name if cards else None


def _sensor(device: Path, *names: str) -> int | None:
    if sysfs.is_asleep(device):
        return None
    for monitor in sysfs.children(device / "hwmon", r"hwmon\d+"):
        for name in names:
            if (value := sysfs.read_int(monitor / name)) is not None:
                return value
    return None


def _drives_display(drm: Path) -> bool | None:
    """Whether a connector of the card ("card0/card0-DP-1") is lit; None for a card without connectors."""
    lit = [sysfs.read_text(port / "enabled", 16) for port in sysfs.children(drm, r"card\d+-.+")]
    return "enabled" in lit if any(lit) else None


@dataclass(frozen=True, slots=True)
class _KfdNode:
    """What the compute driver (KFD) knows of a card: its id there, and its architecture ("gfx1100")."""

    gpu_id: int | None = None
    gfx: str | None = None


def _kfd_nodes(root: Path) -> dict[str, _KfdNode]:
    """The compute driver's cards by PCI address."""
    nodes = {}
    for folder in sysfs.children(root / "sys/class/kfd/kfd/topology/nodes", r"\d+"):
        fields = sysfs.read_fields(folder / "properties", None)
        try:
            version = int(fields["gfx_target_version"])
            domain, location = int(fields.get("domain", "0")), int(fields["location_id"])
        except (KeyError, ValueError):
            continue
        if version > 0:  # 0 is a CPU
            address = f"{domain:04x}:{location >> 8 & 255:02x}:{location >> 3 & 31:02x}.{location & 7}"
            nodes[address] = _KfdNode(sysfs.read_int(folder / "gpu_id"), _gfx(version))
    return nodes


def _gfx(version: int) -> str:
    """KFD packs the architecture in decimal: 90402 is gfx942, 110000 is gfx1100, 90010 is gfx90a."""
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _processes(root: Path, node: _KfdNode) -> tuple[GpuProcess, ...]:
    """Compute processes; what draws on the card is not listed by the driver."""
    found = []
    if node.gpu_id is not None:
        for folder in sysfs.children(root / "sys/class/kfd/kfd/proc", r"\d{1,10}"):
            held_bytes = sysfs.read_int(folder / f"vram_{node.gpu_id}")
            if held_bytes:
                pid = int(folder.name)
                found.append(GpuProcess(pid=pid, name=sysfs.process_name(root, pid), bytes=held_bytes))
    return tuple(found)
