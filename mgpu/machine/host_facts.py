"""What the computer around the cards gives to engines and takes from them, from /proc and /sys."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from mgpu.machine import sysfs
from mgpu.machine.disks import PATIENCE_S, DiskStatus, mounts, read_disks
from mgpu.machine.environment import chosen_variables, read_nccl_configuration
from mgpu.machine.host import control_groups
from mgpu.machine.inspection import HostFacts, Listener, Unread
from mgpu.machine.kernel_log import read_kernel_log
from mgpu.machine.patience import Question
from mgpu.machine.redaction import kernel_options
from mgpu.machine.service_units import read_unit_variables

# Server processors of 2025 draw 500 W.
_MOST_PROCESSOR_UW = 10**9
# Every second of 2048 processors, one by one, takes 5 KB.
_LONGEST_LIST = 8192
ENGINE_PORTS = (8000, 8080, 11434)  # vLLM's, llama-server's and Ollama's


def read_host_facts(
    root: Path = Path("/"), *, disk_status: DiskStatus = os.statvfs
) -> tuple[HostFacts, tuple[Unread, ...]]:
    """Return what files under `root` say of the host, and what could not be read.

    The environment is this process's. `disk_status` tells the size of the file system that a path is on. Never raises;
    a disk that does not answer (a network's) is waited for half a second.
    """
    unread: list[Unread] = []
    log, log_known, log_unread = read_kernel_log(root)
    disks, disks_unread = read_disks(root, disk_status=disk_status)
    nccl, nccl_unread = read_nccl_configuration(root)
    units, units_unread = read_unit_variables(root)
    unread += [*log_unread, *disks_unread, *nccl_unread, *units_unread]
    memory = sysfs.read_fields(root / "proc/meminfo")
    flags = _processor_flags(root)
    memlock = _memlock(root, unread)
    listeners = _listeners(root, unread)
    return HostFacts(
        distribution=_distribution(root),
        boot_age_s=_first_number(root / "proc/uptime"),
        boot_loader=_boot_loader(root),
        kernel_command_line=_command_line(root, unread),
        wsl=_wsl(root),
        iommu_present=_has_entries(root / "sys/class/iommu", root / "sys/class"),
        vfio_in_use=_vfio_in_use(root),
        shm_bytes=_shm_bytes(root, disk_status, unread),
        memlock_bytes=None if memlock is _UNLIMITED else memlock,
        memlock_unlimited=None if memlock is None else memlock is _UNLIMITED,
        swap_total_bytes=_kilobytes(memory.get("SwapTotal")),
        swap_free_bytes=_kilobytes(memory.get("SwapFree")),
        memory_limit_bytes=_memory_limit_bytes(root),
        memory_pressure_percent=_memory_pressure_percent(root),
        numa_balancing=_numa_balancing(root),
        nodes_without_memory=_nodes_without_memory(root),
        cpu_flags_known=flags is not None,
        avx2=None if flags is None else "avx2" in flags,
        allowed_cpus=_allowed_cpus(root),
        allowed_cpu_list=_allowed_cpu_list(root),
        governors=_governors(root),
        cpu_power_w=_cpu_power_w(root),
        environment=chosen_variables(os.environ.items()),
        nccl_configuration=nccl,
        unit_variables=units,
        disks=disks,
        listeners=listeners or (),
        listeners_known=listeners is not None,
        log=log,
        log_known=log_known,
        vllm_p2p_cache_age_s=_patiently(root, unread),
    ), tuple(unread)


# The families whose commands are known, by the ids that their members give themselves or say they are like.
_FAMILIES = {
    "debian": "debian",
    "ubuntu": "debian",
    "fedora": "fedora",
    "rhel": "fedora",
    "centos": "fedora",
    "arch": "arch",
    "suse": "suse",
    "opensuse": "suse",
    "sles": "suse",
    "nixos": "nixos",
}

# Whole images, whose packages are not changed with their family's commands.
_IMAGES = ("steamos", "opensuse-microos", "opensuse-aeon", "opensuse-kalpa", "sle-micro", "sl-micro")


def _distribution(root: Path) -> str | None:
    """The family by os-release(5): ID says which one it is, ID_LIKE what it descends from, the nearest first."""
    files = (sysfs.read_fields(root / name, "=") for name in ("etc/os-release", "usr/lib/os-release"))
    fields = next((each for each in files if each), {})
    own, *like = (fields.get(key, "").strip("\"'").lower() for key in ("ID", "ID_LIKE"))
    if own in _IMAGES or sysfs.is_there(root / "run/ostree-booted"):
        return None
    words = (own, *" ".join(like).split())
    return next((family for word in words if (family := _FAMILIES.get(word.partition("-")[0]))), None)


# What takes the kernel's options from where, by a file of its own. Pop!_OS and Proxmox may have GRUB's files as well.
_BOOT_LOADERS = {
    "etc/kernelstub/configuration": "kernelstub",
    "etc/kernel/proxmox-boot-uuids": "proxmox",
    "etc/default/grub": "grub",
}


def _boot_loader(root: Path) -> str | None:
    return next((name for file, name in _BOOT_LOADERS.items() if sysfs.is_there(root / file)), None)


def _first_number(path: Path) -> float | None:
    number = re.match(r"\d{1,12}(\.\d{1,9})?", sysfs.read_text(path, 100) or "")
    return float(number[0]) if number else None


def _kilobytes(text: str | None) -> int | None:
    amount = re.match(r"(\d{1,15}) kB", text or "")
    return int(amount[1]) * 1024 if amount else None


def _command_line(root: Path, unread: list[Unread]) -> str | None:
    text = sysfs.read_text(root / "proc/cmdline", 16 * 1024)
    if text is None:
        unread.append(Unread(what="/proc/cmdline", why="not there or not readable"))
        return None
    return kernel_options(text)


def _wsl(root: Path) -> bool | None:
    kernel = sysfs.read_text(root / "proc/sys/kernel/osrelease", 200)
    return "microsoft" in kernel.lower() or sysfs.is_there(root / "dev/dxg") if kernel else None


def _has_entries(folder: Path, around: Path, pattern: str = ".+") -> bool | None:
    """Whether the folder has such entries; None where not even the folder around it is there."""
    return bool(sysfs.children(folder, pattern)) if sysfs.is_there(around) else None


def _vfio_in_use(root: Path) -> bool | None:
    """Whether a driver of the VFIO family (vfio-pci, nvgrace-gpu-vfio-pci, mlx5_vfio_pci) has a device, or a device of
    a virtual machine is open to one; None where the bus is not there."""
    if not sysfs.is_there(root / "sys/bus/pci"):
        return None
    drivers = sysfs.children(root / "sys/bus/pci/drivers", ".*vfio.*")
    given = any(sysfs.children(driver, sysfs.PCI_ADDRESS.pattern) for driver in drivers)
    # The file "vfio" is always there once its module is loaded; a group of devices has one named by its number.
    return given or bool(sysfs.children(root / "dev/vfio", "(?!vfio$).+"))


_SHARED_MEMORY = "/dev/shm"  # noqa: S108  nothing is written there


def _shm_bytes(root: Path, disk_status: DiskStatus, unread: list[Unread]) -> int | None:
    """The size of /dev/shm: what its mount says, as in every container, or what the file system has in all."""
    options = next((mount.options for mount in reversed(mounts(root)) if mount.point == _SHARED_MEMORY), ())
    for option in options:
        if size := re.fullmatch(r"size=(\d{1,15})k", option):
            return int(size[1]) * 1024
    try:
        status = disk_status(sysfs.below(root, _SHARED_MEMORY))
        return status.f_blocks * status.f_frsize
    except (OSError, ValueError):
        unread.append(Unread(what=_SHARED_MEMORY, why="it is not there or does not tell its size"))
        return None


_UNLIMITED = -1


def _memlock(root: Path, unread: list[Unread]) -> int | None:
    limits = sysfs.read_text(root / "proc/self/limits", 8192) or ""
    limit = re.search(r"^Max locked memory +(unlimited|\d{1,19}) ", limits, re.M)
    if limit is None:
        unread.append(Unread(what="RLIMIT_MEMLOCK (/proc/self/limits)", why="not there or not readable"))
        return None
    return _UNLIMITED if limit[1] == "unlimited" else int(limit[1])


def _memory_limit_bytes(root: Path) -> int | None:
    """The tightest limit of the control groups around this process; None where there is none."""
    limits = [sysfs.read_int(group / "memory.max") for group in control_groups(root)]
    older = sysfs.read_int(root / "sys/fs/cgroup/memory/memory.limit_in_bytes")
    limits.append(older if older is not None and older < 2**60 else None)  # version 1 writes "none" as a huge number
    return min((limit for limit in limits if limit is not None and limit >= 0), default=None)


def _memory_pressure_percent(root: Path) -> float | None:
    """The share of the last minute in which some program waited for memory (the kernel's documentation of PSI)."""
    share = re.search(r"^some .*?avg60=(\d{1,3}\.\d{1,2})\b", sysfs.read_text(root / "proc/pressure/memory", 512) or "")
    return float(share[1]) if share else None


def _numa_balancing(root: Path) -> bool | None:
    value = sysfs.read_int(root / "proc/sys/kernel/numa_balancing")
    return None if value is None else value != 0


def _nodes_without_memory(root: Path) -> tuple[int, ...]:
    empty = []
    for node in sysfs.children(root / "sys/devices/system/node", r"node\d{1,4}"):
        total = re.search(r"MemTotal: +(\d{1,15}) kB", sysfs.read_text(node / "meminfo", 4096) or "")
        if total and int(total[1]) == 0:
            empty.append(int(node.name[4:]))
    return tuple(empty)


def _processor_flags(root: Path) -> set[str] | None:
    """The first processor's; None where it is no x86 or its flags are beyond what was read."""
    flags = sysfs.read_fields(root / "proc/cpuinfo", limit=16 * 1024).get("flags")
    return set(flags.split()) if flags else None


def _allowed_cpu_list(root: Path) -> str | None:
    listed = sysfs.read_fields(root / "proc/self/status").get("Cpus_allowed_list")
    return listed if listed and len(listed) <= _LONGEST_LIST and sysfs.ranges(listed) else None


def _allowed_cpus(root: Path) -> int | None:
    """The processors that this process may use, by its affinity and by the quotas of its control groups."""
    parts = sysfs.ranges(sysfs.read_fields(root / "proc/self/status").get("Cpus_allowed_list"))
    count = sum(last - first + 1 for first, last in parts) if parts else None
    for group in control_groups(root):
        quota = re.fullmatch(r"(\d{1,15}) ([1-9]\d{0,14})", sysfs.read_text(group / "cpu.max", 64) or "")
        if quota and count is not None:
            count = min(count, max(1, -(-int(quota[1]) // int(quota[2]))))
    return count


def _governors(root: Path) -> tuple[str, ...]:
    """Those of the first processors: a server has hundreds, all set alike."""
    policies = sysfs.children(root / "sys/devices/system/cpu/cpufreq", r"policy\d+")[:8]
    names = (sysfs.read_text(policy / "scaling_governor", 64) or "" for policy in policies)
    return tuple(sorted({name for name in names if re.fullmatch(r"[\w-]{1,32}", name)}))


def _cpu_power_w(root: Path) -> float | None:
    """The sum over the processors of the power that they may draw for long; None too where a board sets no limit, which
    many write as 4095 W. The zone "psys" is the whole computer."""
    zones = sysfs.children(root / "sys/class/powercap", r"intel-rapl:\d+")
    processors = [zone for zone in zones if (sysfs.read_text(zone / "name", 64) or "").startswith("package-")]
    limits = [sysfs.read_int(zone / "constraint_0_power_limit_uw") for zone in processors]
    known = [limit for limit in limits if limit is not None and 0 < limit <= _MOST_PROCESSOR_UW]
    return sum(known) / 1e6 if known and len(known) == len(limits) else None


def _listeners(root: Path, unread: list[Unread]) -> tuple[Listener, ...] | None:
    """Who listens on the ports of engines; None where the kernel's table cannot be read."""
    tables = [sysfs.read_text(root / "proc/net" / name, 1024**2) for name in ("tcp", "tcp6")]
    if tables[0] is None and tables[1] is None:
        unread.append(Unread(what="/proc/net/tcp", why="not there or not readable"))
        return None
    return tuple(sorted(set(_listening("\n".join(filter(None, tables)))), key=lambda it: (it.port, it.everywhere)))


def _listening(table: str) -> Iterable[Listener]:
    for line in re.finditer(r"^ *\d+: ([0-9A-F]{8}|[0-9A-F]{32}):([0-9A-F]{4}) [0-9A-F]+:[0-9A-F]{4} 0A ", table, re.M):
        if (port := int(line[2], 16)) in ENGINE_PORTS:
            yield Listener(port=port, everywhere=not line[1].strip("0"))


def _patiently(root: Path, unread: list[Unread]) -> float | None:
    try:
        return Question(lambda: _vllm_p2p_cache_age_s(root)).answer(PATIENCE_S)
    except TimeoutError as error:
        unread.append(Unread(what="vLLM's verdicts on peer access", why=str(error)))
        return None


def _vllm_p2p_cache_age_s(root: Path, now: Callable[[], float] | None = None) -> float | None:
    """The age of the oldest of vLLM's verdicts on peer access, None where it keeps none."""
    import time

    home = os.environ.get("HOME", "/root")
    cache = os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache"
    folder = sysfs.below(root, os.environ.get("VLLM_CACHE_ROOT") or f"{cache}/vllm")
    ages = []
    for path in sysfs.children(folder, r"gpu_p2p_access_cache_for_.*\.json"):
        try:
            ages.append((now or time.time)() - path.stat().st_mtime)
        except OSError:
            continue
    return round(max(*ages, 0.0), 1) if ages else None
