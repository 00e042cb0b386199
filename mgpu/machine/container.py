"""What a container was given of the cards, and what Docker on a host can give, by files alone."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from mgpu.machine import sysfs
from mgpu.machine.inspection import ContainerFacts, Unread
from mgpu.machine.nvidia_driver import loaded_version

_CDI_FOLDERS = ("etc/cdi", "var/run/cdi")


def read_container(root: Path = Path("/")) -> tuple[ContainerFacts, tuple[Unread, ...]]:
    """Return what the environment and files under `root` say, and what could not be read. Never raises.

    Docker is neither started nor asked: what is in its configuration counts. CDI files are "older than the driver"
    when they name the libraries of another version than the one that is loaded. The toolkit's version is not in a file.
    """
    unread: list[Unread] = []
    settings = _docker_settings(root, unread)
    cdi = _cdi_files(root)
    docker = _docker(root)
    links = _count(root / "dev/char", r"195:\d+")
    return ContainerFacts(
        visible_devices=_variable("NVIDIA_VISIBLE_DEVICES"),
        capabilities=_variable("NVIDIA_DRIVER_CAPABILITIES"),
        device_nodes=_count(root / "dev", r"nvidia\d+"),
        host_gpus=_count(root / "proc/driver/nvidia/gpus", sysfs.PCI_ADDRESS.pattern),
        docker=docker,
        docker_nvidia_runtime=_has_nvidia_runtime(settings) if docker else None,
        cdi_files=tuple(f"/{path.relative_to(root)}" for path in cdi),
        cdi_older_than_driver=_names_another_driver(cdi, loaded_version(root)),
        toolkit=any(sysfs.is_there(root / folder / "nvidia-ctk") for folder in ("usr/bin", "usr/local/bin")),
        cgroup_driver=_cgroup_driver(root, settings) if docker else None,
        device_links=None if links is None else links > 0,
    ), tuple(unread)


def _variable(name: str) -> str | None:
    value = os.environ.get(name)
    return None if value is None else value[:500]


def _count(folder: Path, pattern: str) -> int | None:
    return len(sysfs.children(folder, pattern)) if sysfs.is_there(folder) else None


def _docker(root: Path) -> bool | None:
    places = ("usr/bin/dockerd", "usr/sbin/dockerd", "usr/local/bin/dockerd", "run/docker.sock", "var/run/docker.sock")
    return any(sysfs.is_there(root / place) for place in places) if sysfs.is_there(root / "usr") else None


def _docker_settings(root: Path, unread: list[Unread]) -> dict[str, object] | None:
    """Docker's configuration; empty where it has none, None where it cannot be read."""
    path = root / "etc/docker/daemon.json"
    if not sysfs.is_there(path):
        return {}
    text = sysfs.read_text(path, 256 * 1024)
    try:
        settings = json.loads(text or "")
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        why = "it is not JSON" if text is not None else "it cannot be read"
        unread.append(Unread(what="/etc/docker/daemon.json", why=why, needs_root=text is None and os.geteuid() != 0))
        return None
    return settings


def _has_nvidia_runtime(settings: dict[str, object] | None) -> bool | None:
    if settings is None:
        return None
    runtimes = settings.get("runtimes")
    return isinstance(runtimes, dict) and "nvidia" in runtimes


def _cgroup_driver(root: Path, settings: dict[str, object] | None) -> str | None:
    """What the configuration chooses, else Docker's own choice: systemd's where version 2 of control groups is."""
    if settings is None:
        return None
    options = settings.get("exec-opts")
    for option in options if isinstance(options, list) else ():
        if isinstance(option, str) and (chosen := re.fullmatch(r"native\.cgroupdriver=(systemd|cgroupfs)", option)):
            return chosen[1]
    return "systemd" if sysfs.is_there(root / "sys/fs/cgroup/cgroup.controllers") else "cgroupfs"


def _cdi_files(root: Path) -> list[Path]:
    return [
        path
        for folder in _CDI_FOLDERS
        for path in sysfs.children(root / folder, r"[\w.-]+\.(yaml|yml|json)")
        if "nvidia.com" in (sysfs.read_text(path, 4096) or "")
    ][:16]


def _names_another_driver(files: list[Path], driver: str | None) -> bool | None:
    """None where there is no file, no driver, or no library named."""
    named: set[str] = set()
    for path in files:
        named |= set(
            re.findall(r"lib(?:cuda|nvidia-ml)\.so\.(\d{3}(?:\.\d+){1,2})", sysfs.read_text(path, 1024**2) or "")
        )
    return named != {driver} if named and driver else None
