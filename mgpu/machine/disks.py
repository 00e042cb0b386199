"""The folders that models are kept in, and the disks they are on."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mgpu.machine import sysfs
from mgpu.machine.container import docker_data_root
from mgpu.machine.inspection import DiskSpace, Unread

DiskStatus = Callable[[Path], os.statvfs_result]

# What a network's file system may take to answer before it is left alone.
PATIENCE_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A line of the kernel's list of mounts; `device` is "major:minor", `options` those of the file system."""

    point: str
    device: str
    file_system: str
    source: str
    options: tuple[str, ...]


def read_disks(
    root: Path = Path("/"), *, disk_status: DiskStatus = os.statvfs, patience_s: float = PATIENCE_S
) -> tuple[tuple[DiskSpace, ...], tuple[Unread, ...]]:
    """Return where models are kept and how much room there is, and what did not answer within `patience_s`, as the
    server of a network's disk may not for ever. Folders that do not exist yet are judged by the one that would hold
    them. Never raises."""
    found: list[DiskSpace] = []
    unread: list[Unread] = []
    known = mounts(root)

    def ask() -> None:
        for role, path in _model_folders(root):
            try:
                found.append(_disk(root, role, path, known, disk_status))
            except (OSError, ValueError, RuntimeError) as error:
                unread.append(Unread(what=path, why=getattr(error, "strerror", None) or "it cannot be looked at"))

    asking = threading.Thread(target=ask, daemon=True)  # one that never ends must not keep the program from ending
    asking.start()
    asking.join(patience_s)
    if asking.is_alive():
        return tuple(found), (*unread, Unread(what="the disks of models", why=f"no answer in {patience_s} s"))
    return tuple(found), tuple(unread)


def mounts(root: Path = Path("/")) -> tuple[Mount, ...]:
    """Return what is mounted for this process (/proc/self/mountinfo), in the order of mounting."""
    text = sysfs.read_text(root / "proc/self/mountinfo", 1024**2) or ""
    return tuple(filter(None, map(_mount, text.splitlines())))


def _mount(line: str) -> Mount | None:
    own, _, system = line.partition(" - ")
    fields, others = own.split(" "), system.split(" ")
    if len(fields) < 6 or len(others) < 3:
        return None
    # The kernel writes blanks in names as \040.
    point = re.sub(r"\\([0-3][0-7]{2})", lambda code: chr(int(code[1], 8)), fields[4])
    return Mount(
        point=point,
        device=fields[2],
        file_system=others[0][:40],
        source=others[1],
        options=tuple(others[2].split(",")),
    )


def _model_folders(root: Path) -> Iterator[tuple[str, str]]:
    home = os.environ.get("HOME") or "/root"
    cache = os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache"
    hub = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    yield "Hugging Face cache", os.environ.get("HF_HUB_CACHE") or f"{hub}/hub"
    yield "Ollama models", os.environ.get("OLLAMA_MODELS") or f"{home}/.ollama/models"
    yield "mgpu models", f"{cache}/mgpu/models"
    yield "mgpu data", f"{os.environ.get('XDG_DATA_HOME') or f'{home}/.local/share'}/mgpu"
    if images := docker_data_root(root):
        yield "Docker images", images


def _disk(root: Path, role: str, path: str, known: tuple[Mount, ...], disk_status: DiskStatus) -> DiskSpace:
    """Raises OSError or RuntimeError (a loop of links) where the folder cannot be looked at."""
    path = path.replace("~", os.environ.get("HOME") or "/root", 1) if path.startswith("~/") else path
    if not path.startswith("/"):
        path = f"{Path.cwd()}/{path}"
    here = sysfs.below(root, path)
    while here != root and here != here.parent and not here.exists():
        here = here.parent
    status = disk_status(here)
    top, real = root.resolve(), here.resolve()
    inside = f"/{real.relative_to(top)}" if real.is_relative_to(top) else str(real)
    mount = _mount_of(inside.replace("/.", "/") if inside == "/." else inside, known)
    return DiskSpace(
        role=role,
        path=path[:500],
        free_bytes=status.f_bavail * status.f_frsize,
        total_bytes=status.f_blocks * status.f_frsize,
        file_system=mount.file_system if mount else None,
        rotational=_rotational(root, mount) if mount else None,
    )


def _mount_of(path: str, known: tuple[Mount, ...]) -> Mount | None:
    """The mount that holds the path: the longest that it lies under, and of equal ones the last."""
    found = None
    for mount in known:
        around = mount.point.rstrip("/") + "/"
        if (path + "/").startswith(around) and (found is None or len(mount.point) >= len(found.point)):
            found = mount
    return found


def _rotational(root: Path, mount: Mount) -> bool | None:
    """Whether the disk has a spindle; None for what is no disk of this computer. Partitions ask their disk."""
    places = [root / "sys/dev/block" / mount.device] if re.fullmatch(r"\d{1,6}:\d{1,6}", mount.device) else []
    if re.fullmatch(r"/dev/[\w-]+", mount.source):  # file systems over several disks have a number of their own
        places.append(root / "sys/class/block" / mount.source[5:])
    for place in places:
        folder = sysfs.real_directory(place)
        for owner in (folder, folder.parent) if folder else ():
            if (value := sysfs.read_int(owner / "queue/rotational")) is not None:
                return value == 1
    return None
