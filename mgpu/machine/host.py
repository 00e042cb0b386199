"""The computer around the cards, from /proc and /sys."""

from __future__ import annotations

import re
from pathlib import Path

from mgpu.machine import sysfs
from mgpu.machine.snapshot import Host


def read_host(root: Path = Path("/")) -> Host:
    """Return what /proc and /sys under `root` say of the host; what cannot be read is None. Never raises.

    `cores` are physical cores, or processors where the kernel does not tell cores from threads. RAM is what
    a program started here may use: a memory limit of our control group (version 2) counts. `virtualisation`
    is "none" on bare metal, "wsl2", the hypervisor's name, or "vm"; `container` is "none", "docker",
    "podman", "kubernetes", "lxc", or what systemd calls it ("container-other" where its maker cannot be told).
    """
    kernel = sysfs.read_text(root / "proc/sys/kernel/osrelease", 200)
    fields = sysfs.read_fields(root / "proc/cpuinfo", limit=16 * 1024)  # the first processor's
    ram_bytes, available_bytes = _ram(root)
    nodes = sysfs.children(root / "sys/devices/system/node", r"node\d+")
    return Host(
        kernel=_printable(kernel),
        cpu=_printable(fields.get("model name") or fields.get("Model")),
        cores=_cores(root),
        ram_bytes=ram_bytes,
        ram_available_bytes=available_bytes,
        numa_nodes=len(nodes) or None,
        virtualisation=_virtualisation(root, kernel or "", fields),
        container=_container(root),
    )


def _printable(text: str | None) -> str | None:
    return "".join(filter(str.isprintable, text or ""))[:200] or None


def _cores(root: Path) -> int | None:
    cores = set()
    for cpu in sysfs.children(root / "sys/devices/system/cpu", r"cpu\d+"):
        core = sysfs.read_int(cpu / "topology/core_id")
        if core is not None:
            cores.add((sysfs.read_int(cpu / "topology/physical_package_id"), core))
    if cores:
        return len(cores)
    every_processor = sysfs.read_text(root / "proc/cpuinfo", 4 * 1024**2) or ""  # 256 threads take 400 KB
    return len(re.findall(r"^processor\s*:", every_processor, re.M)) or None


def _ram(root: Path) -> tuple[int | None, int | None]:
    """Total and available bytes, each capped by the tightest control group around this process."""
    fields = sysfs.read_fields(root / "proc/meminfo")
    total, available = _kilobytes(fields.get("MemTotal")), _kilobytes(fields.get("MemAvailable"))
    for group in control_groups(root):
        limit = sysfs.read_int(group / "memory.max")  # "max" is no integer: no limit
        if limit is None:
            continue
        total = limit if total is None else min(total, limit)
        # The kernel gives up inactive file pages before it refuses memory, so they are as good as free.
        pages = sysfs.read_fields(group / "memory.stat", None).get("inactive_file", "0")
        used = max((sysfs.read_int(group / "memory.current") or 0) - _integer(pages), 0)
        available = min(total if available is None else available, max(limit - used, 0))
    return total, available


def _kilobytes(text: str | None) -> int | None:
    amount = re.match(r"(\d{1,18}) kB", text or "")
    return int(amount[1]) * 1024 if amount else None


def _integer(text: str) -> int:
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else 0


def control_groups(root: Path) -> list[Path]:
    """Return our control group's folder (version 2) and those around it; in a container the outermost is its own."""
    line = re.search(r"^0::(/\S*)", sysfs.read_text(root / "proc/self/cgroup") or "", re.M)
    if not line or ".." in line[1]:
        return []
    top = root / "sys/fs/cgroup"
    group = top / line[1].lstrip("/")
    return [group, *(parent for parent in group.parents if parent.is_relative_to(top))]


# What the board's maker or model holds, to the hypervisor that writes it.
_HYPERVISORS = {
    "qemu": "kvm",
    "kvm": "kvm",
    "proxmox": "kvm",
    "vmware": "vmware",
    "virtualbox": "virtualbox",
    "innotek": "virtualbox",
    "microsoft": "hyper-v",
    "xen": "xen",
    "amazon": "amazon",
    "google": "google",
    "parallels": "parallels",
    "apple": "apple",
}


def _virtualisation(root: Path, kernel: str, cpu: dict[str, str]) -> str | None:
    if "microsoft" in kernel.lower():
        return "wsl2"
    flags = cpu.get("flags")
    if flags is None:  # not an x86: the processor does not say
        return None
    if "hypervisor" not in flags.split():
        return "none"
    board = [sysfs.read_text(root / "sys/class/dmi/id" / name, 200) or "" for name in ("sys_vendor", "product_name")]
    names = (name for word, name in _HYPERVISORS.items() if word in " ".join(board).lower())
    return next(names, "vm")


_CONTAINER_GROUPS = {
    "kubepods": "kubernetes",
    "docker": "docker",
    "libpod": "podman",
    "lxc": "lxc",
    "containerd": "containerd",
}


def _container(root: Path) -> str | None:
    if sysfs.is_there(root / ".dockerenv"):
        return "docker"
    if sysfs.is_there(root / "run/.containerenv"):
        return "podman"
    if sysfs.is_there(root / "var/run/secrets/kubernetes.io"):
        return "kubernetes"
    named = _printable(sysfs.read_text(root / "run/systemd/container", 64))
    if named and named != "wsl":  # so systemd calls WSL, which is a virtual machine
        return named
    groups = sysfs.read_text(root / "proc/1/cgroup")
    if groups is None:
        return None
    names = (name for word, name in _CONTAINER_GROUPS.items() if word in groups)
    environment = sysfs.read_text(root / "proc/1/environ") or ""  # root alone may read it
    if found := next(names, "lxc" if "container=lxc" in environment.split("\0") else None):
        return found
    return _unnamed_container(root)


# The number of the kernel's first namespace of processes (PROC_PID_INIT_INO of its headers).
_FIRST_NAMESPACE = "pid:[4026531836]"


def _unnamed_container(root: Path) -> str | None:
    """Version 2 of control groups hides the names of those around a container; then its own processes and a root of
    layers tell of one, either alone of something that cannot be told (a sandbox). WSL's systems look so, too."""
    namespace = sysfs.link_name(root / "proc/self/ns/pid")
    kernel = sysfs.read_text(root / "proc/sys/kernel/osrelease", 200) or ""
    if namespace in (None, _FIRST_NAMESPACE) or "microsoft" in kernel.lower():
        return "none"
    mounted = sysfs.read_text(root / "proc/self/mountinfo", 1024**2) or ""
    return "container-other" if re.search(r"^\S+ \S+ \S+ \S+ / .* - (overlay|fuse-overlayfs) ", mounted, re.M) else None
