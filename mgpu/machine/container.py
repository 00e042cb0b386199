"""What a container was given of the cards, and what Docker on a host can give, by files alone."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from mgpu.machine import sysfs
from mgpu.machine.inspection import ContainerFacts, Unread
from mgpu.machine.nvidia_driver import loaded_version

_CDI_FOLDERS = ("etc/cdi", "run/cdi", "var/run/cdi")
_PROGRAMS = ("usr/bin", "usr/sbin", "usr/local/bin", "run/current-system/sw/bin")
_SNAP = "var/snap/docker"


def read_container(root: Path = Path("/")) -> tuple[ContainerFacts, tuple[Unread, ...]]:
    """Return what the environment and files under `root` say, and what could not be read. Never raises.

    Docker is neither started nor asked: what it is configured with counts, and which control groups its containers are
    in; of a Docker that is only a socket here (Docker Desktop's) both are unknown. `docker_nvidia_runtime` is also true
    where `docker run --gpus` finds the hook that it starts. CDI files are "older than the driver" when they name the
    libraries of another version than the one that is loaded. WSL has no device node for a card, so none are counted.
    """
    unread: list[Unread] = []
    docker = _docker(root)
    settings = _docker_settings(root, unread) if docker else None
    cdi = _cdi_files(root)
    links = _count(root / "dev/char", r"195:\d+")
    return ContainerFacts(
        visible_devices=_variable("NVIDIA_VISIBLE_DEVICES"),
        capabilities=_variable("NVIDIA_DRIVER_CAPABILITIES"),
        device_nodes=None if sysfs.is_there(root / "dev/dxg") else _count(root / "dev", r"nvidia\d+"),
        host_gpus=_count(root / "proc/driver/nvidia/gpus", sysfs.PCI_ADDRESS.pattern),
        docker=docker,
        docker_nvidia_runtime=_has_nvidia_runtime(root, settings) if docker else None,
        cdi_files=tuple(f"/{path.relative_to(root)}" for path in cdi),
        cdi_older_than_driver=_names_another_driver(cdi, loaded_version(root)),
        toolkit=_is_installed(root, "nvidia-ctk") if sysfs.is_there(root / "usr") else None,
        cgroup_driver=_cgroup_driver(root, settings) if docker else None,
        device_links=None if links is None else links > 0,
    ), tuple(unread)


def docker_data_root(root: Path = Path("/")) -> str | None:
    """Return the folder that Docker here keeps images in; None without Docker, or where its settings are unknown."""
    settings = _docker_settings(root, []) if _docker(root) else None
    if settings is None:
        return None
    chosen = settings.get("data-root", settings.get("graph"))
    if isinstance(chosen, str) and chosen.startswith("/"):
        return chosen
    return f"/{_SNAP}/common/var-lib-docker" if sysfs.is_there(root / _SNAP) else "/var/lib/docker"


def _variable(name: str) -> str | None:
    value = os.environ.get(name)
    return None if value is None else value[:500]


def _count(folder: Path, pattern: str) -> int | None:
    return len(sysfs.children(folder, pattern)) if sysfs.is_there(folder) else None


def _is_installed(root: Path, program: str) -> bool:
    return any(sysfs.is_there(root / folder / program) for folder in _PROGRAMS)


def _docker(root: Path) -> bool | None:
    if not sysfs.is_there(root / "usr"):
        return None
    # Podman puts its own socket in that place.
    sockets = [root / place for place in ("run/docker.sock", "var/run/docker.sock")]
    listens = any(sysfs.is_there(socket) and "podman" not in (sysfs.link_name(socket) or "") for socket in sockets)
    return listens or _is_installed(root, "dockerd") or sysfs.is_there(root / _SNAP)


def _docker_settings(root: Path, unread: list[Unread]) -> dict[str, object] | None:
    """Docker's configuration; empty where it has none, None where it cannot be read."""
    path = root / "etc/docker/daemon.json"
    if sysfs.is_there(root / _SNAP):
        path = root / _SNAP / "current/config/daemon.json"
    elif not _is_installed(root, "dockerd"):
        why = "there is only a socket of Docker's, whose settings are elsewhere"
        unread.append(Unread(what="the settings of docker", why=why))
        return None
    if not sysfs.is_there(path):
        return {}
    text = sysfs.read_text(path, 256 * 1024)
    try:
        settings = json.loads(text or "")
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        why = "it is not JSON" if text is not None else "it cannot be read"
        what = f"/{path.relative_to(root)}"
        unread.append(Unread(what=what, why=why, needs_root=text is None and os.geteuid() != 0))
        return None
    return settings


def _has_nvidia_runtime(root: Path, settings: dict[str, object] | None) -> bool | None:
    if _is_installed(root, "nvidia-container-runtime-hook"):
        return True
    units = [root / "etc/systemd/system/docker.service"]
    units += sysfs.children(root / "etc/systemd/system/docker.service.d", r".+\.conf")[:16]
    if any(re.search(r"--add-runtime[= ]nvidia\b", sysfs.read_text(unit) or "") for unit in units):
        return True
    if settings is None:
        return None
    runtimes = settings.get("runtimes")
    return isinstance(runtimes, dict) and "nvidia" in runtimes


def _cgroup_driver(root: Path, settings: dict[str, object] | None) -> str | None:
    """What containers that run are in, else what the configuration chooses, else Docker's own choice: systemd's where
    version 2 of control groups is."""
    top = root / "sys/fs/cgroup"
    own = any(sysfs.is_there(top / folder / "docker") for folder in ("", "memory", "devices"))
    systemds = any(
        sysfs.children(top / folder / "system.slice", r"docker-[0-9a-f]{64}\.scope")
        for folder in ("", "memory", "devices")
    )
    if own != systemds:
        return "cgroupfs" if own else "systemd"
    if settings is None:
        return None
    options = settings.get("exec-opts")
    for option in options if isinstance(options, list) else ():
        if isinstance(option, str) and (chosen := re.fullmatch(r"native\.cgroupdriver=(systemd|cgroupfs)", option)):
            return chosen[1]
    return "systemd" if sysfs.is_there(top / "cgroup.controllers") else "cgroupfs"


def _cdi_files(root: Path) -> list[Path]:
    """The files that describe NVIDIA's cards; /var/run usually is a link to /run."""
    found: dict[Path | None, Path] = {}
    for folder in _CDI_FOLDERS:
        for path in sysfs.children(root / folder, r"[\w.-]+\.(yaml|yml|json)"):
            if "nvidia.com" in (sysfs.read_text(path, 4096) or ""):
                found.setdefault(sysfs.real_directory(path), path)
    return list(found.values())[:16]


def _names_another_driver(files: list[Path], driver: str | None) -> bool | None:
    """None where there is no file, no driver, or no library named."""
    named: set[str] = set()
    for path in files:
        named |= set(
            re.findall(r"lib(?:cuda|nvidia-ml)\.so\.(\d{3}(?:\.\d+){1,2})", sysfs.read_text(path, 1024**2) or "")
        )
    return named != {driver} if named and driver else None
