"""Small files of /sys and /proc, read so that nothing they hold can hurt: None where there is no answer."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from mgpu.machine.snapshot import PcieLink

# Makers of cards, as the file `vendor` of a PCI device has them.
NVIDIA, AMD, INTEL = 0x10DE, 0x1002, 0x8086
ASLEEP = "it is asleep, and reading would wake it"
PCI_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")

# Transfer rates as sysfs writes them ("16.0 GT/s PCIe"), to the PCIe generation.
_GENERATIONS = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}


def read_text(path: Path, limit: int = 64 * 1024) -> str | None:
    """Return the first `limit` bytes as stripped text, bad bytes replaced; None when it cannot be read.

    Anything but a regular file gives None, so that a pipe or a device under a replaced root cannot block.
    """
    content = read_bytes(path, limit)
    return None if content is None else content.decode("utf-8", "replace").strip()


def read_bytes(path: Path, limit: int) -> bytes | None:
    """Return the first `limit` bytes of a regular file, None when it is none or cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            chunks = []
            while limit > 0 and (chunk := file.read(limit)):
                chunks.append(chunk)
                limit -= len(chunk)
    except (OSError, ValueError):
        return None
    return b"".join(chunks)


def is_there(path: Path) -> bool:
    """Return whether something is at the path; False also where that may not be looked at."""
    try:
        return path.exists()
    except (OSError, ValueError, RuntimeError):
        return False


def read_int(path: Path, base: int = 10) -> int | None:
    """Return the file's one integer, or None when it is missing or is not one of at most 64 bits."""
    text = read_text(path, 64)
    try:
        value = int(text, base) if text else None
    except ValueError:
        return None
    return value if value is not None and -(2**63) <= value < 2**64 else None


def read_fields(path: Path, separator: str | None = ":", limit: int = 64 * 1024) -> dict[str, str]:
    """Return the lines "key: value" of a file as a dict, the first of equal keys; empty when unreadable."""
    fields: dict[str, str] = {}
    for line in (read_text(path, limit) or "").splitlines():
        parts = line.split(separator, 1)
        if len(parts) == 2:
            fields.setdefault(parts[0].strip(), parts[1].strip())
    return fields


def ranges(text: str | None) -> tuple[tuple[int, int], ...] | None:
    """Return first and last of each part of a list of numbers such as "0-7,16-23"; None where it is none."""
    found = []
    for part in (text or "").split(","):
        ends = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part.strip())
        if ends is None or int(ends[2] or ends[1]) < int(ends[1]):
            return None
        found.append((int(ends[1]), int(ends[2] or ends[1])))
    return tuple(found)


def children(directory: Path, pattern: str) -> list[Path]:
    """Return the entries whose whole name matches, numbers in their order; empty when unreadable."""
    try:
        found = [entry for entry in directory.iterdir() if re.fullmatch(pattern, entry.name)]
    except OSError:
        return []
    return sorted(found, key=lambda entry: [int(part) if part.isdecimal() else part for part in _parts(entry.name)])


def below(root: Path, path: str) -> Path:
    """Return where an absolute path lies under a replaced root; a ".." in it does not lead out."""
    return root / os.path.normpath(f"/{path}").lstrip("/")


def process_name(root: Path, pid: int) -> str | None:
    """Return the base name of a process's program, or None when it is gone or belongs to another namespace.

    Characters that a terminal would act on are dropped: anyone can name a process.
    """
    command = read_text(root / "proc" / str(pid) / "cmdline", 4096) or ""
    name = command.split("\0", 1)[0].rsplit("/", 1)[-1] or read_text(root / "proc" / str(pid) / "comm", 64) or ""
    return "".join(character for character in name if character.isprintable())[:64] or None


def link_name(link: Path) -> str | None:
    """Return the last part of what a symbolic link points to, such as the driver of a device; None where it is none."""
    try:
        return link.readlink().name
    except (OSError, ValueError):
        return None


def pci_device(root: Path, bus_id: str) -> Path | None:
    """Return the real directory of a PCI device ("0000:01:00.0"), whose parent is its upstream bridge."""
    if not PCI_ADDRESS.fullmatch(bus_id):
        return None
    return real_directory(root / "sys/bus/pci/devices" / bus_id)


def real_directory(path: Path) -> Path | None:
    """Return the directory that a symbolic link of sysfs leads to, or None."""
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError):  # Python 3.11 and 3.12 raise RuntimeError for a loop of links
        return None


def is_asleep(device: Path) -> bool:
    """Return whether a PCI device is suspended to save power: the kernel wakes it for whoever reads its configuration
    space, as does its driver for its sensors."""
    return read_text(device / "power/runtime_status", 32) == "suspended"


def pcie_link(device: Path) -> PcieLink:
    """Return the link of a PCI device's directory; the slot's width is what its upstream bridge offers.

    A device's own `max_link_width` says 16 even in a slot wired for 4. `gen_max` is what both ends can do. Of a card
    with a PCIe switch of its own it is the link of that switch to the slot.
    """
    device = _end_of_slot(device)
    ends = [link_generation(device / "max_link_speed"), link_generation(device.parent / "max_link_speed")]
    return PcieLink(
        gen=link_generation(device / "current_link_speed"),
        gen_max=min((gen for gen in ends if gen is not None), default=None),
        width=link_width(device / "current_link_width"),
        width_max=link_width(device / "max_link_width"),
        slot_width=link_width(device.parent / "max_link_width"),
    )


def link_generation(path: Path) -> int | None:
    """Return the PCIe generation of a file such as `current_link_speed` ("16.0 GT/s PCIe" is 4), or None."""
    rate = re.match(r"\d{1,3}(\.\d)?", read_text(path, 64) or "")
    return _GENERATIONS.get(float(rate[0])) if rate else None


def link_width(path: Path) -> int | None:
    """Return the lanes in a file such as `current_link_width`, None where there is no link."""
    width = read_int(path)
    return width if width in {1, 2, 4, 8, 12, 16, 32} else None  # 0 and 255: no link


# The switches on Intel's Arc cards (Alchemist's, Battlemage's); its root ports have the same vendor.
_ARC_SWITCHES = {*range(0x4FA0, 0x4FA5), *range(0xE2F0, 0xE300)}


def _end_of_slot(device: Path) -> Path:
    """The device whose upstream bridge is the slot: Radeons since Navi and Intel's Arc carry a switch of their own, and
    the GPU's own link is the one inside the card, at full width (Radeon) or always at "2.5 GT/s, x1" (Arc)."""
    vendor = read_int(device / "vendor", 16)
    while vendor is not None and _is_cards_own_bridge(device.parent, vendor):
        device = device.parent
    return device


def _is_cards_own_bridge(bridge: Path, vendor: int) -> bool:
    if read_int(bridge / "vendor", 16) != vendor or not (read_text(bridge / "class", 16) or "").startswith("0x0604"):
        return False
    return vendor == AMD or (vendor == INTEL and read_int(bridge / "device", 16) in _ARC_SWITCHES)


def _parts(name: str) -> list[str]:
    # Alternates text and digits and starts with text, so that equal positions compare like with like.
    return re.split(r"(\d+)", name)
