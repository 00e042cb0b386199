"""The NVIDIA driver as it is installed and loaded: its modules, its library, and what it was told."""

from __future__ import annotations

import os
import re
import stat
import struct
import subprocess
from pathlib import Path

from mgpu.machine import sysfs
from mgpu.machine.inspection import NvidiaDriver, Unread
from mgpu.machine.nvml import Nvml

PROGRAM_LIMIT_S = 0.5


def read_nvidia_driver(
    root: Path = Path("/"), *, nvml: Nvml | None = None, nvml_error: int | None = None
) -> tuple[NvidiaDriver, tuple[Unread, ...]]:
    """Return what files under `root` and, where it answers, `nvml` say of the driver; and what could not be read.

    Never raises and starts no program, but on a machine with an NVSwitch: there `systemctl` and `nv-fabricmanager`
    (those under `root`) are asked, each for at most half a second. The version on disk is the one that the next boot
    of this kernel loads; a compressed module is not unpacked to learn it, so it is often None.
    """
    unread: list[Unread] = []
    module, nvswitch, folder = _module_on_disk(root), _nvswitch(root), sysfs.is_there(_modules_folder(root))
    modules = sysfs.is_there(root / "sys/module")
    return NvidiaDriver(
        nvml_error=nvml_error,
        loaded_version=loaded_version(root),
        library_version=_library_version(root, nvml),
        on_disk_version=_on_disk_version(root, module),
        on_disk=module is not None if folder else None,
        on_disk_open=_is_open(module),
        open_module=_open_module(root),
        cuda_version=_cuda_version(nvml),
        uvm_loaded=sysfs.is_there(root / "sys/module/nvidia_uvm") if modules else None,
        uvm_on_disk=_module_on_disk(root, "-uvm") is not None if folder else None,
        node_maker=_node_maker(root),
        uvm_device=sysfs.is_there(root / "dev/nvidia-uvm") if sysfs.is_there(root / "dev") else None,
        control_device=sysfs.is_there(root / "dev/nvidiactl") if sysfs.is_there(root / "dev") else None,
        secure_boot=_secure_boot(root, unread),
        registry_dwords=_registry_dwords(root),
        uvm_disable_hmm=_yes_or_no(root / "sys/module/nvidia_uvm/parameters/uvm_disable_hmm"),
        nvswitch=nvswitch,
        fabric_manager=_fabric_manager(root, unread) if nvswitch else None,
        fabric_manager_version=_fabric_manager_version(root) if nvswitch else None,
        persistence_daemon=_persistence_daemon(root),
    ), tuple(unread)


def loaded_version(root: Path) -> str | None:
    """Return the version of the module that is loaded ("580.126.20"), None where none is or it does not say."""
    version = sysfs.read_text(root / "sys/module/nvidia/version", 100)
    text = version or sysfs.read_text(root / "proc/driver/nvidia/version", 4096) or ""
    found = re.search(r"\b\d{3}\.\d{2,4}(\.\d{2,3})?\b", text)
    return found[0] if found else None


def _open_module(root: Path) -> bool | None:
    text = sysfs.read_text(root / "proc/driver/nvidia/version", 4096)
    return "Open Kernel Module" in text if text else None


def _yes_or_no(path: Path) -> bool | None:
    return {"Y": True, "1": True, "N": False, "0": False}.get(sysfs.read_text(path, 16) or "")


# Where distributions, the container toolkit and WSL keep the driver's library.
_LIBRARY_FOLDERS = (
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "usr/lib64",
    "usr/lib",
    "usr/local/nvidia/lib64",
    "run/opengl-driver/lib",
)


def _library_version(root: Path, nvml: Nvml | None) -> str | None:
    """NVML's own word ("13.580.126.20" is CUDA 13 and the driver's version), or the name of the file it would be."""
    said = nvml.ask("nvmlSystemGetNVMLVersion") if nvml else None
    said = said.decode("ascii", "replace") if isinstance(said, bytes) else said
    if isinstance(said, str) and (found := re.fullmatch(r"\d+\.(\d{3}(\.\d+){1,2})", said)):
        return found[1]
    for folder in _LIBRARY_FOLDERS:
        try:
            name = (root / folder / "libnvidia-ml.so.1").resolve(strict=True).name
        except (OSError, RuntimeError):
            continue
        if found := re.fullmatch(r"libnvidia-ml\.so\.(\d{3}(\.\d+){1,2})", name):
            return found[1]
    return None


def _cuda_version(nvml: Nvml | None) -> int | None:
    if nvml is None:
        return None
    version = nvml.ask("nvmlSystemGetCudaDriverVersion_v2") or nvml.ask("nvmlSystemGetCudaDriverVersion")
    return int(version) if version else None


def _modules_folder(root: Path) -> Path:
    release = sysfs.read_text(root / "proc/sys/kernel/osrelease", 200) or ""
    named = re.fullmatch(r"[\w.+~-]+", release) and release.strip(".")
    return root / "lib/modules" / (release if named else "unknown")


# "nvidia"; Debian's own packages name it nvidia-current, nvidia-current-open or nvidia-tesla-535, which modprobe then
# loads in its place. DKMS names its folders alike.
_MODULE = r"nvidia(?:-current|-tesla)?(?:-\d{3})?(?:-open)?"


def _module_on_disk(root: Path, part: str = "") -> Path | None:
    """The file of the driver's module, or of a `part` of it ("-uvm"), for the running kernel, as depmod lists it."""
    folder = _modules_folder(root)
    modules = sysfs.read_text(folder / "modules.dep", 4 * 1024**2) or ""
    listed = re.search(rf"^((?:\S*/)?{_MODULE}{part}\.ko[^:\s/]*):", modules, re.M)
    if not listed or ".." in listed[1]:
        return None
    return folder / listed[1] if not listed[1].startswith("/") else root / listed[1].lstrip("/")


def _on_disk_version(root: Path, module: Path | None) -> str | None:
    """From DKMS's record of what it installed for this kernel, else from an uncompressed module's own headers."""
    release = sysfs.read_text(root / "proc/sys/kernel/osrelease", 200) or ""
    packages = sysfs.children(root / "var/lib/dkms", _MODULE)
    for link in (link for each in packages for link in sysfs.children(each, rf"kernel-{re.escape(release)}-\w+")):
        try:
            version = link.readlink().parts[0]
        except (OSError, IndexError):
            continue
        if re.fullmatch(r"\d{3}(\.\d+){1,2}", version):
            return version
    return found[1].decode() if (found := re.search(rb"(?:^|\0)version=([\d.]+)\0", _modinfo(module))) else None


def _is_open(module: Path | None) -> bool | None:
    """Whether a module is the open one, by its licence: NVIDIA's own, or MIT and GPL."""
    found = re.search(rb"(?:^|\0)license=([^\0]+)\0", _modinfo(module))
    return b"GPL" in found[1] if found else None


def _modinfo(module: Path | None) -> bytes:
    """The section .modinfo of an uncompressed kernel module, b"" where it cannot be read: three short reads of a file
    of many megabytes."""
    if module is None or module.suffix != ".ko":
        return b""
    try:
        descriptor = os.open(module, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            header = os.pread(descriptor, 64, 0)
            if header[:5] != b"\x7fELF\x02":
                return b""
            offset, size, count, names = (*struct.unpack("<Q", header[40:48]), *struct.unpack("<HHH", header[58:64]))
            table = os.pread(descriptor, min(size * count, 1024**2), offset)
            sections = [struct.unpack("<I20xQQ", table[at : at + 40]) for at in range(0, len(table) - 39, size or 64)]
            words = os.pread(descriptor, min(sections[names][2], 1024**2), sections[names][1])
            for name, start, length in sections:
                if words[name : name + 9] == b".modinfo\0":
                    return os.pread(descriptor, min(length, 65536), start)
        finally:
            os.close(descriptor)
    except (OSError, OverflowError, struct.error, IndexError):
        pass
    return b""


def _node_maker(root: Path) -> bool | None:
    """Whether nvidia-modprobe is set to run as root, at the one path that the driver's libraries know."""
    folder = root / "usr/bin"
    try:
        mode = (folder / "nvidia-modprobe").stat().st_mode
    except FileNotFoundError:
        return False if sysfs.is_there(folder) else None
    except (OSError, ValueError):
        return None
    return bool(mode & stat.S_ISUID and mode & 0o111)


def _secure_boot(root: Path, unread: list[Unread]) -> bool | None:
    """The byte after the four of attributes of the firmware's variable; a BIOS without EFI has no Secure Boot."""
    firmware = root / "sys/firmware"
    if not sysfs.is_there(firmware):
        return None
    if not sysfs.is_there(firmware / "efi"):
        return False
    path = firmware / "efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
    value = sysfs.read_bytes(path, 16) or b""
    if len(value) < 5:
        unread.append(Unread(what=f"/{path.relative_to(root)}", why="not there or not readable"))
        return None
    return value[4] == 1


def _registry_dwords(root: Path) -> str | None:
    text = sysfs.read_fields(root / "proc/driver/nvidia/params").get("RegistryDwords")
    return None if text is None else text.strip('"')[:500]


def _nvswitch(root: Path) -> bool | None:
    if not sysfs.is_there(root / "dev"):
        return None
    devices = sysfs.children(root / "proc/driver/nvidia-nvswitch/devices", sysfs.PCI_ADDRESS.pattern)
    return bool(devices) or sysfs.is_there(root / "dev/nvidia-nvswitchctl")


def _fabric_manager(root: Path, unread: list[Unread]) -> str | None:
    """What systemd calls the state of the service: "active", "inactive", "failed", ..."""
    if _runs(root, "nvidia-fabricmanager"):
        return "active"
    state = _answer_of(root, "systemctl", "is-active", "nvidia-fabricmanager")
    if state is None or not re.fullmatch(r"[a-z-]{1,20}", state):
        unread.append(Unread(what="systemctl is-active nvidia-fabricmanager", why="systemd does not answer here"))
        return None
    return state


def _fabric_manager_version(root: Path) -> str | None:
    found = re.search(r"\d{3}(\.\d+){1,2}", _answer_of(root, "nv-fabricmanager", "--version") or "")
    return found[0] if found else None


def _persistence_daemon(root: Path) -> bool | None:
    return sysfs.is_there(root / "run/nvidia-persistenced/socket") if sysfs.is_there(root / "run") else None


def _runs(root: Path, service: str) -> bool:
    """systemd gives each service that runs a control group of its own."""
    return sysfs.is_there(root / f"sys/fs/cgroup/system.slice/{service}.service")


def _answer_of(root: Path, program: str, *arguments: str) -> str | None:
    for folder in ("usr/bin", "bin"):
        path = root / folder / program
        if os.access(path, os.X_OK):
            try:
                done = subprocess.run(
                    [path, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    timeout=PROGRAM_LIMIT_S,
                )
            except (OSError, ValueError, subprocess.SubprocessError):
                return None
            return done.stdout[:1000].decode("utf-8", "replace").strip()
    return None
