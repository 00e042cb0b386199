"""The device nodes through which programs compute on the cards of one maker, and whether this user may."""

from __future__ import annotations

import os
from pathlib import Path

from mgpu.machine import sysfs


def render_nodes(root: Path, vendor: int) -> tuple[tuple[str, ...], bool | None]:
    """Return the nodes of a vendor's cards as paths ("/dev/dri/renderD128"), and whether all of them may be read and
    written; None where there is none. Those of integrated graphics, on the first bus, are no cards'. Never raises."""
    found = [
        node.name
        for node in sysfs.children(root / "sys/class/drm", r"renderD\d{1,4}")
        if sysfs.read_int(node / "device/vendor", 16) == vendor and not _is_on_first_bus(node / "device")
    ]
    accessible = all(may_use(root / "dev/dri" / name) for name in found) if found else None
    return tuple(f"/dev/dri/{name}" for name in found), accessible


def may_use(device: Path) -> bool:
    """Return whether this user may read and write a device; not, if it is absent."""
    try:
        return os.access(device, os.R_OK | os.W_OK)
    except (OSError, ValueError):
        return False


def _is_on_first_bus(device: Path) -> bool:
    folder = sysfs.real_directory(device)
    return folder is not None and folder.name.partition(":")[2].startswith("00:")
