"""The host's facts: each from its file, None where that cannot be read, and no others than those that matter."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mgpu.machine import sysfs
from mgpu.machine.disks import read_disks
from mgpu.machine.environment import chosen_variables, read_nccl_configuration
from mgpu.machine.host_facts import read_host_facts
from mgpu.machine.inspection import HostFacts, Listener
from tests.fakes.sysfs_tree import SysfsTree

GIB = 1024**3


def status(blocks: int, available: int = 0) -> os.statvfs_result:
    return os.statvfs_result((4096, 4096, blocks, available, available, 0, 0, 0, 0, 255))


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "XDG_DATA_HOME", "OLLAMA_MODELS", "VLLM_CACHE_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/ada")
    return "home/ada"


def facts(root: Path) -> HostFacts:
    return read_host_facts(root, disk_status=lambda path: status(10 * GIB // 4096, 4 * GIB // 4096))[0]


def zone(number: int, name: str, limit_uw: int) -> dict[str, str | bytes]:
    folder = f"sys/class/powercap/intel-rapl:{number}"
    return {f"{folder}/name": f"{name}\n", f"{folder}/constraint_0_power_limit_uw": f"{limit_uw}\n"}


def test_a_healthy_desktop_is_read_whole(tmp_path: Path, home: str) -> None:
    SysfsTree(tmp_path).host()
    found, unread = read_host_facts(tmp_path, disk_status=lambda path: status(10, 4))
    assert unread == ()
    assert found.distribution == "debian"
    assert found.boot_age_s == 86400.0
    assert found.kernel_command_line == "iommu=pt"
    assert (found.wsl, found.iommu_present, found.vfio_in_use) == (False, False, False)
    assert found.shm_bytes == 65536000 * 1024
    assert (found.memlock_bytes, found.memlock_unlimited) == (None, True)
    assert (found.swap_total_bytes, found.swap_free_bytes) == (8 * GIB, 8 * GIB)
    assert (found.memory_limit_bytes, found.memory_pressure_percent) == (None, 0.0)
    assert (found.numa_balancing, found.nodes_without_memory) == (False, ())
    assert (found.cpu_flags_known, found.avx2, found.allowed_cpus) == (True, True, 32)
    assert (found.governors, found.cpu_power_w) == (("performance",), 162.0)
    assert (found.listeners, found.listeners_known, found.log, found.log_known) == ((), True, (), True)
    assert {(disk.file_system, disk.rotational) for disk in found.disks} == {("ext4", False)}
    assert found.vllm_p2p_cache_age_s is None


# Field, the files that change it, and what it then is.
CASES = [
    pytest.param("distribution", {"etc/os-release": "ID=debian\n"}, "debian", id="Debian"),
    pytest.param("distribution", {"etc/os-release": 'ID=linuxmint\nID_LIKE="ubuntu debian"\n'}, "debian", id="Mint"),
    pytest.param("distribution", {"etc/os-release": "ID=fedora\n"}, "fedora", id="Fedora"),
    pytest.param(
        "distribution", {"etc/os-release": 'ID="rocky"\nID_LIKE="rhel centos fedora"\n'}, "fedora", id="Rocky"
    ),
    pytest.param("distribution", {"etc/os-release": "ID=cachyos\nID_LIKE=arch\n"}, "arch", id="CachyOS"),
    pytest.param(
        "distribution",
        {"etc/os-release": "ID='opensuse-tumbleweed'\nID_LIKE='opensuse suse'\n"},
        "suse",
        id="Tumbleweed",
    ),
    pytest.param("distribution", {"etc/os-release": "ID=nixos\n"}, "nixos", id="NixOS"),
    pytest.param("distribution", {"etc/os-release": "ID=gentoo\n"}, None, id="a distribution of another family"),
    pytest.param("distribution", {"etc/os-release": "\x00=\xff"}, None, id="no os-release"),
    pytest.param(
        "distribution", {"etc/os-release": "", "usr/lib/os-release": "ID=arch\n"}, "arch", id="the vendor's os-release"
    ),
    pytest.param("boot_loader", {}, "grub", id="GRUB"),
    pytest.param("boot_loader", {"etc/kernelstub/configuration": "{}"}, "kernelstub", id="Pop!_OS"),
    pytest.param("boot_loader", {"etc/kernel/proxmox-boot-uuids": "1F2E\n"}, "proxmox", id="Proxmox"),
    pytest.param("distribution", {"run/ostree-booted": ""}, None, id="an image, whose packages are not changed so"),
    pytest.param("distribution", {"etc/os-release": "ID=steamos\nID_LIKE=arch\n"}, None, id="SteamOS"),
    pytest.param("wsl", {"proc/sys/kernel/osrelease": "5.15.1-microsoft-standard-WSL2"}, True, id="WSL by its kernel"),
    pytest.param("wsl", {"dev/dxg": ""}, True, id="WSL by its graphics device"),
    pytest.param("iommu_present", {"sys/class/iommu/dmar0/x": ""}, True, id="an IOMMU"),
    pytest.param("vfio_in_use", {"sys/bus/pci/drivers/vfio-pci/new_id": ""}, False, id="vfio loaded and unused"),
    pytest.param("vfio_in_use", {"sys/bus/pci/drivers/vfio-pci/0000:01:00.0/x": ""}, True, id="a card given to vfio"),
    pytest.param(
        "vfio_in_use", {"sys/bus/pci/drivers/mlx5_vfio_pci/0000:01:00.1/x": ""}, True, id="a card given to another vfio"
    ),
    pytest.param("vfio_in_use", {"dev/vfio/vfio": ""}, False, id="vfio's own file alone"),
    pytest.param("vfio_in_use", {"dev/vfio/vfio": "", "dev/vfio/17": ""}, True, id="a group of devices given to vfio"),
    pytest.param(
        "shm_bytes",
        {"proc/self/mountinfo": "1 0 0:9 / /dev/shm rw - tmpfs shm rw,size=65536k\n"},
        64 * 1024**2,
        id="a container's 64 MiB",
    ),
    pytest.param(
        "shm_bytes", {"proc/self/mountinfo": "1 0 0:9 / /dev/shm rw - tmpfs shm rw\n"}, 10 * GIB, id="half the memory"
    ),
    pytest.param(
        "memlock_bytes", {"proc/self/limits": "Max locked memory  8388608  8388608  bytes\n"}, 8 * 1024**2, id="8 MiB"
    ),
    pytest.param(
        "memlock_unlimited", {"proc/self/limits": "Max locked memory  0  0  bytes\n"}, False, id="none locked"
    ),
    pytest.param("memory_limit_bytes", {"sys/fs/cgroup/memory.max": "max\n"}, None, id="no limit of memory"),
    pytest.param("memory_limit_bytes", {"sys/fs/cgroup/memory.max": f"{4 * GIB}\n"}, 4 * GIB, id="version 2"),
    pytest.param("memory_limit_bytes", {"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n"}, GIB, id="version 1"),
    pytest.param(
        "memory_limit_bytes",
        {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"},
        None,
        id="version 1 without a limit",
    ),
    pytest.param(
        "memory_pressure_percent",
        {"proc/pressure/memory": "some avg10=9.00 avg60=41.27 avg300=1.00\n"},
        41.27,
        id="PSI",
    ),
    pytest.param("numa_balancing", {"proc/sys/kernel/numa_balancing": "1\n"}, True, id="NUMA balancing"),
    pytest.param(
        "nodes_without_memory",
        {"sys/devices/system/node/node1/meminfo": "Node 1 MemTotal:              0 kB\n"},
        (1,),
        id="a node without memory",
    ),
    pytest.param("avx2", {"proc/cpuinfo": "flags : sse avx\n"}, False, id="an old processor"),
    pytest.param("avx2", {"proc/cpuinfo": "Features : asimd\n"}, None, id="no x86"),
    pytest.param("allowed_cpus", {"proc/self/status": "Cpus_allowed_list:\t0-3,8,10-11\n"}, 7, id="an affinity"),
    pytest.param("allowed_cpu_list", {"proc/self/status": "Cpus_allowed_list:\t0-3,8\n"}, "0-3,8", id="its list"),
    pytest.param("allowed_cpu_list", {"proc/self/status": "Cpus_allowed_list:\t3-0\n"}, None, id="a list backwards"),
    pytest.param(
        "allowed_cpu_list", {"proc/self/status": "Cpus_allowed_list:" + "1," * 9999 + "1"}, None, id="endless"
    ),
    pytest.param("allowed_cpus", {"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3, id="a quota of 2.5 processors"),
    pytest.param("allowed_cpus", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 32, id="no quota"),
    pytest.param("allowed_cpus", {"proc/self/status": "Cpus_allowed_list:\t0-x\n"}, None, id="no list"),
    pytest.param(
        "governors",
        {"sys/devices/system/cpu/cpufreq/policy1/scaling_governor": "powersave\n"},
        ("performance", "powersave"),
        id="two governors",
    ),
    pytest.param("cpu_power_w", zone(1, "package-1", 100_000_000), 262.0, id="two processors"),
    pytest.param("cpu_power_w", zone(1, "psys", 200_000_000), 162.0, id="the whole computer is no processor"),
    pytest.param("cpu_power_w", zone(0, "package-0", 4_095_000_000), None, id="a board without a limit"),
    pytest.param("cpu_power_w", zone(1, "package-1", 4_095_000_000), None, id="a limit for one of two processors"),
    pytest.param(
        "listeners",
        {
            "proc/net/tcp": "   0: 0100007F:1F90 00000000:0000 0A 00000000\n   1: 00000000:2CAA 00000000:0000 0A 0\n"
            "   2: 00000000:0016 00000000:0000 0A 0\n   3: 00000000:1F40 0100007F:9999 01 0\n",
            "proc/net/tcp6": f"   0: {'0' * 32}:1F40 {'0' * 32}:0000 0A 0\n",
        },
        (
            Listener(port=8000, everywhere=True),
            Listener(port=8080, everywhere=False),
            Listener(port=11434, everywhere=True),
        ),
        id="listeners of engines' ports",
    ),
]


@pytest.mark.parametrize(("field", "files", "value"), CASES)
def test_a_file_changes_its_fact(
    tmp_path: Path, home: str, field: str, files: dict[str, str | bytes], value: object
) -> None:
    SysfsTree(tmp_path).host(files)
    assert getattr(facts(tmp_path), field) == value


def test_an_empty_root_is_unknown_in_every_fact(tmp_path: Path, home: str) -> None:
    def nothing(path: Path) -> os.statvfs_result:
        raise FileNotFoundError(2, "no such file")

    found, unread = read_host_facts(tmp_path, disk_status=nothing)
    known = {"environment": found.environment, "wsl": found.wsl}
    assert found == HostFacts(**known)  # type: ignore[arg-type]
    whats = {each.what for each in unread}
    assert {"/dev/kmsg", "/proc/cmdline", "/dev/shm", "/proc/net/tcp", "RLIMIT_MEMLOCK (/proc/self/limits)"} <= whats


def test_the_kernels_command_line_keeps_what_matters_to_cards_alone(tmp_path: Path, home: str) -> None:
    line = (
        "BOOT_IMAGE=/vmlinuz-6.8 root=UUID=5c3f ip=10.0.0.7::10.0.0.1:255.0.0.0:adas-box amd_iommu=on iommu=pt "
        "pcie_aspm=off nvidia-drm.modeset=1 modprobe.blacklist=nouveau pci=noaer nokaslr luks.uuid=77"
    )
    SysfsTree(tmp_path).host({"proc/cmdline": line})
    assert facts(tmp_path).kernel_command_line == (
        "amd_iommu=on iommu=pt pcie_aspm=off nvidia-drm.modeset=1 modprobe.blacklist=nouveau pci=noaer nokaslr"
    )


def test_only_variables_that_matter_are_taken() -> None:
    variables = {
        "NCCL_P2P_DISABLE": "1",
        "HSA_OVERRIDE_GFX_VERSION_1": "10.3.0",
        "HF_TOKEN": "hf_secret",
        "NCCL_COMM_ID": "10.0.0.7:4000",
        "CUDA_VISIBLE_DEVICES": "0," * 1000,
    }
    found = dict(chosen_variables(variables.items()))
    assert set(found) == {"NCCL_P2P_DISABLE", "HSA_OVERRIDE_GFX_VERSION_1", "CUDA_VISIBLE_DEVICES"}
    assert len(found["CUDA_VISIBLE_DEVICES"]) == 500


def test_the_users_nccl_file_comes_before_the_machines(tmp_path: Path, home: str) -> None:
    tree = SysfsTree(tmp_path)
    tree.files({"etc/nccl.conf": "NCCL_P2P_DISABLE=1\nNCCL_DEBUG=WARN\n# NCCL_ALGO=Ring\nNCCL_COMM_ID=10.0.0.7:1\n"})
    assert read_nccl_configuration(tmp_path) == ((("NCCL_DEBUG", "WARN"), ("NCCL_P2P_DISABLE", "1")), ())
    tree.files({f"{home}/.nccl.conf": "NCCL_P2P_DISABLE=0\n"})
    assert dict(read_nccl_configuration(tmp_path)[0])["NCCL_P2P_DISABLE"] == "0"


def test_a_configuration_of_nccl_that_cannot_be_read_is_named(tmp_path: Path, home: str) -> None:
    (SysfsTree(tmp_path).root / "etc/nccl.conf").mkdir(parents=True)
    assert [each.what for each in read_nccl_configuration(tmp_path)[1]] == ["/etc/nccl.conf"]


MOUNTS = (
    "22 1 259:2 / / rw - ext4 /dev/nvme0n1p2 rw\n"
    "40 22 8:1 / /data rw - xfs /dev/sda1 rw\n"
    "41 22 0:50 / /mnt/my\\040share rw - nfs4 nas:/share rw\n"
    "42 22 0:60 / /pool rw - btrfs /dev/sda1 rw\n"
)


@pytest.mark.parametrize(
    ("variables", "role", "path", "file_system", "rotational"),
    [
        pytest.param({}, "Hugging Face cache", "/home/ada/.cache/huggingface/hub", "ext4", False, id="by default"),
        pytest.param(
            {"HF_HOME": "/data/hf"}, "Hugging Face cache", "/data/hf/hub", "xfs", True, id="a partition of a disk"
        ),
        pytest.param({"HF_HUB_CACHE": "/database"}, "Hugging Face cache", "/database", "ext4", False, id="a like name"),
        pytest.param(
            {"OLLAMA_MODELS": "/mnt/my share/x"}, "Ollama models", "/mnt/my share/x", "nfs4", None, id="a network's"
        ),
        pytest.param({"OLLAMA_MODELS": "/pool"}, "Ollama models", "/pool", "btrfs", True, id="a number of its own"),
        pytest.param({"XDG_DATA_HOME": "/data"}, "mgpu data", "/data/mgpu", "xfs", True, id="our own data"),
    ],
)
def test_a_folder_of_models_is_on_the_disk_that_holds_it(
    tmp_path: Path,
    home: str,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    role: str,
    path: str,
    file_system: str,
    rotational: bool | None,
) -> None:
    tree = SysfsTree(tmp_path / "root").host({"proc/self/mountinfo": MOUNTS})
    disk, partition = "sys/devices/ata/sda", "sys/devices/ata/sda/sda1"
    tree.files({f"{disk}/queue/rotational": "1", f"{partition}/partition": "1"})
    tree.files({f"{mounted}/file": "" for mounted in ("data", "mnt/my share", "pool")})
    tree.link("sys/dev/block/8:1", partition).link("sys/class/block/sda1", partition)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    asked = []

    def disk_status(folder: Path) -> os.statvfs_result:
        asked.append(folder)
        return status(1000, 250)

    disks, unread = read_disks(tree.root, disk_status=disk_status)
    (found,) = (found for found in disks if found.role == role)
    assert (found.path, found.file_system, found.rotational) == (path, file_system, rotational)
    assert (found.total_bytes, found.free_bytes, unread) == (1000 * 4096, 250 * 4096, ())
    assert all(folder.exists() for folder in asked)


@pytest.mark.parametrize(
    ("files", "path"),
    [
        pytest.param({}, None, id="no Docker"),
        pytest.param({"usr/bin/dockerd": ""}, "/var/lib/docker", id="by default"),
        pytest.param(
            {"usr/bin/dockerd": "", "etc/docker/daemon.json": '{"data-root": "/data/docker"}'},
            "/data/docker",
            id="on another disk",
        ),
        pytest.param(
            {"usr/bin/dockerd": "", "etc/docker/daemon.json": '{"data-root": ["x"]}'}, "/var/lib/docker", id="nonsense"
        ),
        pytest.param({"usr/bin/dockerd": "", "etc/docker/daemon.json": "{"}, None, id="settings that are no JSON"),
        pytest.param({"var/snap/docker/x": ""}, "/var/snap/docker/common/var-lib-docker", id="a snap"),
        pytest.param({"run/docker.sock": ""}, None, id="a Docker that is elsewhere"),
    ],
)
def test_dockers_images_are_on_a_disk_as_models_are(
    tmp_path: Path, home: str, files: dict[str, str | bytes], path: str | None
) -> None:
    root = SysfsTree(tmp_path).host({**files, "proc/self/mountinfo": MOUNTS, "data/x": ""}).root
    found = {disk.role: disk for disk in read_disks(root, disk_status=lambda _: status(10))[0]}
    assert (found["Docker images"].path if path else found.get("Docker images")) == path
    assert path != "/data/docker" or found["Docker images"].file_system == "xfs"


def test_a_disk_that_never_answers_does_not_hold_the_doctor_up(tmp_path: Path, home: str) -> None:
    answer = threading.Event()

    def hung(folder: Path) -> os.statvfs_result:
        answer.wait(60)
        raise OSError

    try:
        disks, unread = read_disks(tmp_path, disk_status=hung, patience_s=0.05)
    finally:
        answer.set()
    assert (disks, [each.what for each in unread]) == ((), ["the disks of models"])


def test_a_home_folder_that_never_answers_does_not_hold_the_doctor_up(
    tmp_path: Path, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()
    (SysfsTree(tmp_path).host().root / "etc/nccl.conf").write_text("NCCL_P2P_DISABLE=1\n")

    def hung(usual: Callable[..., Any]) -> Callable[..., Any]:
        def ask(path: Path, *arguments: Any) -> Any:
            if path.is_relative_to(tmp_path / home.lstrip("/")):
                answer.wait(60)
            return usual(path, *arguments)

        return ask

    monkeypatch.setattr(sysfs, "read_text", hung(sysfs.read_text))
    monkeypatch.setattr(sysfs, "children", hung(sysfs.children))
    started = time.monotonic()
    try:
        found, unread = read_host_facts(tmp_path, disk_status=lambda _: status(1))
    finally:
        answer.set()
    assert time.monotonic() - started < 20
    assert (found.nccl_configuration, found.vllm_p2p_cache_age_s) == ((("NCCL_P2P_DISABLE", "1"),), None)
    assert {"~/.nccl.conf", "vLLM's verdicts on peer access"} <= {each.what for each in unread}


def test_the_age_of_vllms_verdicts_is_that_of_the_oldest(tmp_path: Path, home: str) -> None:
    folder = f"{home}/.cache/vllm"
    names = [f"{folder}/gpu_p2p_access_cache_for_{cards}.json" for cards in ("0,1", "0,1,2,3")]
    SysfsTree(tmp_path).host(dict.fromkeys(names, "{}"))
    os.utime(tmp_path / names[0], (1_000_000_000, 1_000_000_000))
    age_s: Any = facts(tmp_path).vllm_p2p_cache_age_s
    assert age_s > 365 * 86400
    os.utime(tmp_path / names[0], (2**33, 2**33))  # from the future, as after a clock was set
    assert json.loads(json.dumps(facts(tmp_path).vllm_p2p_cache_age_s)) < 3600
