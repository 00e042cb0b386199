"""The NVIDIA driver, containers and AMD's driver by their files."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import pytest

from mgpu.machine.amd_facts import read_amd_facts
from mgpu.machine.container import read_container
from mgpu.machine.inspection import AmdFacts, ContainerFacts, NvidiaDriver
from mgpu.machine.nvidia_driver import read_nvidia_driver
from tests.fakes.sysfs_tree import KERNEL, SysfsTree

VERSION = "580.126.20"
CARDS = ("0000:01:00.0", "0000:02:00.0")
SECURE_BOOT = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
MODULES = f"lib/modules/{KERNEL}"

DEBIANS = "updates/dkms/nvidia-current.ko.xz:\nupdates/dkms/nvidia-current-uvm.ko.xz:\n"
DEBIANS_OPEN = "updates/dkms/nvidia-current-open.ko.xz:\nupdates/dkms/nvidia-current-open-modeset.ko.xz:\n"

Files = dict[str, str | bytes]


@pytest.fixture
def tree(tmp_path: Path) -> SysfsTree:
    return SysfsTree(tmp_path / "root").host().nvidia_driver(VERSION, cards=CARDS)


def test_a_healthy_driver_is_read_whole(tree: SysfsTree) -> None:
    assert read_nvidia_driver(tree.root, nvml_error=18) == (
        NvidiaDriver(
            nvml_error=18,
            loaded_version=VERSION,
            library_version=VERSION,
            on_disk_version=VERSION,
            on_disk=True,
            open_module=True,
            uvm_loaded=True,
            uvm_on_disk=True,
            node_maker=True,
            uvm_device=True,
            control_device=True,
            secure_boot=False,
            registry_dwords="",
            uvm_disable_hmm=False,
            nvswitch=False,
            persistence_daemon=False,
        ),
        (),
    )


def test_an_empty_root_tells_nothing_of_a_driver(tmp_path: Path) -> None:
    assert read_nvidia_driver(tmp_path) == (NvidiaDriver(), ())


def elf_module(version: str, licence: str = "Dual MIT/GPL") -> bytes:
    """A kernel module as far as it is read: sections .modinfo and .shstrtab, and their table."""
    words = b"\0.modinfo\0.shstrtab\0"
    modinfo = b"license=" + licence.encode() + b"\0srcversion=11.22.33\0version=" + version.encode() + b"\0"
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", header, 40, 64 + len(words) + len(modinfo))
    struct.pack_into("<HHH", header, 58, 64, 3, 2)
    sections = [(0, 0, 0), (1, 64 + len(words), len(modinfo)), (10, 64, len(words))]
    table = b"".join(struct.pack("<IIQQQQ24x", name, 0, 0, 0, start, length) for name, start, length in sections)
    return bytes(header) + words + modinfo + table


@pytest.mark.parametrize(
    ("files", "field", "value"),
    [
        pytest.param({"sys/module/nvidia/version": "575.64\n"}, "loaded_version", "575.64", id="another is loaded"),
        pytest.param({SECURE_BOOT: b"\x06\0\0\0\x01"}, "secure_boot", True, id="Secure Boot"),
        pytest.param({SECURE_BOOT: b"\x06\0"}, "secure_boot", None, id="half a variable"),
        pytest.param(
            {"proc/driver/nvidia/params": 'RegistryDwords: "RMForceStaticBar1=1"\n'},
            "registry_dwords",
            "RMForceStaticBar1=1",
            id="options of the registry",
        ),
        pytest.param({"sys/module/nvidia_uvm/parameters/uvm_disable_hmm": "Y\n"}, "uvm_disable_hmm", True, id="no HMM"),
        pytest.param(
            {"proc/driver/nvidia/version": f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {VERSION}\n"},
            "open_module",
            False,
            id="the closed module",
        ),
        pytest.param({"run/nvidia-persistenced/socket": ""}, "persistence_daemon", True, id="the persistence daemon"),
        pytest.param({f"{MODULES}/modules.dep": "kernel/fs/ext4.ko:\n"}, "on_disk", False, id="no module on disk"),
        pytest.param({f"{MODULES}/modules.dep": "extra/nvidia.ko:\n"}, "on_disk", True, id="a module on disk"),
        pytest.param({f"{MODULES}/modules.dep": "extra/nvidia.ko:\n"}, "uvm_on_disk", False, id="and none for CUDA"),
        pytest.param({f"{MODULES}/modules.dep": "extra/nvidia-uvm.ko:\n"}, "on_disk", False, id="CUDA's alone"),
        pytest.param({f"{MODULES}/modules.dep": DEBIANS}, "on_disk", True, id="Debian's module"),
        pytest.param({f"{MODULES}/modules.dep": DEBIANS}, "uvm_on_disk", True, id="Debian's for CUDA"),
        pytest.param({f"{MODULES}/modules.dep": DEBIANS_OPEN}, "on_disk", True, id="Debian's open module"),
        pytest.param({f"{MODULES}/modules.dep": DEBIANS_OPEN}, "uvm_on_disk", False, id="which is not CUDA's"),
    ],
)
def test_a_file_changes_its_fact_of_the_driver(tree: SysfsTree, files: Files, field: str, value: object) -> None:
    assert getattr(read_nvidia_driver(tree.files(files).root)[0], field) == value


@pytest.mark.parametrize("package", ["nvidia-current", "nvidia-current-open", "nvidia-tesla-535"])
def test_debians_packages_of_dkms_tell_the_version_on_disk(tree: SysfsTree, package: str) -> None:
    folder = tree.root / "var/lib/dkms"
    (folder / "nvidia" / f"kernel-{KERNEL}-x86_64").unlink()
    tree.link(f"var/lib/dkms/{package}/kernel-{KERNEL}-x86_64", f"var/lib/dkms/{package}/550.163.01/{KERNEL}/x86_64")
    assert read_nvidia_driver(tree.root)[0].on_disk_version == "550.163.01"


@pytest.mark.parametrize(
    ("content", "version"),
    [
        pytest.param(elf_module("570.86.16"), "570.86.16", id="a module"),
        pytest.param(elf_module("570.86.16")[:-70], None, id="cut off"),
        pytest.param(b"\x7fELF\x02" + b"\xff" * 200, None, id="places past the end"),
        pytest.param(b"", None, id="empty"),
    ],
)
def test_without_dkms_the_version_on_disk_is_in_the_module(
    tree: SysfsTree, content: bytes, version: str | None
) -> None:
    (tree.root / f"var/lib/dkms/nvidia/kernel-{KERNEL}-x86_64").unlink()
    tree.files({f"{MODULES}/modules.dep": "extra/nvidia.ko:\n", f"{MODULES}/extra/nvidia.ko": content})
    assert read_nvidia_driver(tree.root)[0].on_disk_version == version


@pytest.mark.parametrize(
    ("content", "is_open"),
    [
        pytest.param(elf_module("580.95.05"), True, id="the open one"),
        pytest.param(elf_module("580.95.05", "NVIDIA"), False, id="NVIDIA's own"),
        pytest.param(b"\x7fELF\x02" + b"\xff" * 200, None, id="one that cannot be read"),
    ],
)
def test_a_modules_licence_tells_which_one_it_is(tree: SysfsTree, content: bytes, is_open: bool | None) -> None:
    tree.files({f"{MODULES}/modules.dep": "extra/nvidia.ko:\n", f"{MODULES}/extra/nvidia.ko": content})
    assert read_nvidia_driver(tree.root)[0].on_disk_open is is_open


@pytest.mark.parametrize(
    ("mode", "makes"),
    [
        pytest.param(0o4755, True, id="set to run as root"),
        pytest.param(0o755, False, id="an ordinary program"),
        pytest.param(0o4644, False, id="no program"),
        pytest.param(None, False, id="not installed"),
    ],
)
def test_only_a_setuid_program_makes_device_nodes(tree: SysfsTree, mode: int | None, makes: bool) -> None:
    path = tree.root / "usr/bin/nvidia-modprobe"
    path.unlink() if mode is None else path.chmod(mode)
    assert read_nvidia_driver(tree.root)[0].node_maker is makes


def program(tree: SysfsTree, name: str, script: str) -> None:
    tree.files({f"usr/bin/{name}": f"#!/bin/sh\n{script}\n"})
    (tree.root / "usr/bin" / name).chmod(0o755)


def test_programs_are_asked_only_on_a_machine_with_a_switch(tree: SysfsTree) -> None:
    program(tree, "systemctl", f"touch {tree.root}/was-run; echo active")
    assert read_nvidia_driver(tree.root)[0].fabric_manager is None
    assert not (tree.root / "was-run").exists()
    tree.files({"dev/nvidia-nvswitchctl": ""})
    assert read_nvidia_driver(tree.root)[0].fabric_manager == "active"


@pytest.mark.parametrize(
    ("files", "answer", "state", "unread"),
    [
        pytest.param({}, "echo inactive; exit 3", "inactive", False, id="not running"),
        pytest.param({}, "echo failed; exit 3", "failed", False, id="failed"),
        pytest.param({}, "echo System has not been booted with systemd; exit 1", None, True, id="no systemd"),
        pytest.param({}, "exec sleep 600", None, True, id="no answer"),
        pytest.param(
            {"sys/fs/cgroup/system.slice/nvidia-fabricmanager.service/cgroup.procs": "7"},
            "exec sleep 600",
            "active",
            False,
            id="running, as its control group shows",
        ),
    ],
)
def test_the_fabric_manager_is_as_systemd_says(
    tree: SysfsTree, files: Files, answer: str, state: str | None, unread: bool
) -> None:
    tree.files({"proc/driver/nvidia-nvswitch/devices/0000:08:00.0/information": "", **files})
    program(tree, "systemctl", answer)
    program(tree, "nv-fabricmanager", "echo Fabric Manager version is : 535.54.03")
    started = time.monotonic()
    driver, missed = read_nvidia_driver(tree.root)
    assert time.monotonic() - started < 5
    assert (driver.nvswitch, driver.fabric_manager, driver.fabric_manager_version) == (True, state, "535.54.03")
    assert bool(missed) is unread


CDI = "cdiVersion: 0.5.0\nkind: nvidia.com/gpu\n# /usr/lib/libcuda.so.{}\n"
DOCKER: Files = {"usr/bin/dockerd": ""}


@pytest.mark.parametrize(
    ("files", "changes"),
    [
        pytest.param({}, {}, id="no Docker"),
        pytest.param(
            DOCKER, {"docker": True, "docker_nvidia_runtime": False, "cgroup_driver": "cgroupfs"}, id="Docker alone"
        ),
        pytest.param(
            {**DOCKER, "etc/docker/daemon.json": '{"runtimes": {"nvidia": {"path": "x"}}}', "usr/bin/nvidia-ctk": ""},
            {"docker": True, "docker_nvidia_runtime": True, "cgroup_driver": "cgroupfs", "toolkit": True},
            id="Docker with NVIDIA's runtime",
        ),
        pytest.param(
            {**DOCKER, "sys/fs/cgroup/cgroup.controllers": "cpu"},
            {"docker": True, "docker_nvidia_runtime": False, "cgroup_driver": "systemd"},
            id="systemd's control groups",
        ),
        pytest.param(
            {
                **DOCKER,
                "sys/fs/cgroup/cgroup.controllers": "cpu",
                "etc/docker/daemon.json": '{"exec-opts": [1, "native.cgroupdriver=cgroupfs"]}',
            },
            {"docker": True, "docker_nvidia_runtime": False, "cgroup_driver": "cgroupfs"},
            id="Docker's own control groups",
        ),
        pytest.param({**DOCKER, "etc/docker/daemon.json": "{"}, {"docker": True}, id="a configuration that is no JSON"),
        pytest.param({**DOCKER, "etc/docker/daemon.json": "[" * 9999}, {"docker": True}, id="a deep one"),
        pytest.param({**DOCKER, "etc/docker/daemon.json": "[]"}, {"docker": True}, id="a list"),
        pytest.param(
            {"etc/cdi/nvidia.yaml": CDI.format(VERSION)},
            {"cdi_files": ("/etc/cdi/nvidia.yaml",), "cdi_older_than_driver": False},
            id="CDI of this driver",
        ),
        pytest.param(
            {"var/run/cdi/nvidia.yaml": CDI.format("570.86.16"), "etc/cdi/other.yaml": "kind: intel.com/gpu\n"},
            {"cdi_files": ("/var/run/cdi/nvidia.yaml",), "cdi_older_than_driver": True},
            id="CDI of another driver",
        ),
        pytest.param(
            {"etc/cdi/nvidia.yaml": "kind: nvidia.com/gpu"}, {"cdi_files": ("/etc/cdi/nvidia.yaml",)}, id="CDI of none"
        ),
        pytest.param(
            {**DOCKER, "usr/bin/nvidia-container-runtime-hook": ""},
            {"docker": True, "docker_nvidia_runtime": True, "cgroup_driver": "cgroupfs"},
            id="the hook that --gpus starts",
        ),
        pytest.param(
            {**DOCKER, "etc/systemd/system/docker.service.d/gpu.conf": "ExecStart=dockerd --add-runtime=nvidia=/x\n"},
            {"docker": True, "docker_nvidia_runtime": True, "cgroup_driver": "cgroupfs"},
            id="a runtime given to the service",
        ),
        pytest.param(
            {**DOCKER, "sys/fs/cgroup/cgroup.controllers": "cpu", "sys/fs/cgroup/docker/x": ""},
            {"docker": True, "docker_nvidia_runtime": False, "cgroup_driver": "cgroupfs"},
            id="containers in Docker's own control groups",
        ),
        pytest.param(
            {
                **DOCKER,
                "etc/docker/daemon.json": '{"exec-opts": ["native.cgroupdriver=cgroupfs"]}',
                f"sys/fs/cgroup/system.slice/docker-{'5c3f' * 16}.scope/x": "",
            },
            {"docker": True, "docker_nvidia_runtime": False, "cgroup_driver": "systemd"},
            id="containers in systemd's, whatever is configured since",
        ),
        pytest.param({"run/docker.sock": ""}, {"docker": True}, id="Docker Desktop, which is elsewhere"),
        pytest.param(
            {"var/snap/docker/current/config/daemon.json": '{"runtimes": {"nvidia": {}}}'},
            {"docker": True, "docker_nvidia_runtime": True, "cgroup_driver": "cgroupfs"},
            id="Docker of a snap",
        ),
        pytest.param({"dev/dxg": ""}, {"device_nodes": None}, id="WSL, which has no device nodes"),
        pytest.param({"dev/char/195:0": ""}, {"device_links": True}, id="links to the devices"),
        pytest.param({"dev/char/1:3": ""}, {"device_links": False}, id="links to other devices"),
    ],
)
def test_docker_is_known_by_its_files(
    tree: SysfsTree, monkeypatch: pytest.MonkeyPatch, files: Files, changes: dict[str, object]
) -> None:
    monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", "all")
    monkeypatch.delenv("NVIDIA_DRIVER_CAPABILITIES", raising=False)
    found, unread = read_container(tree.files(files).root)
    rest: dict[str, object] = {"docker": False, "toolkit": False, "device_nodes": 2, "host_gpus": 2}
    assert found == ContainerFacts(visible_devices="all", **{**rest, **changes})  # type: ignore[arg-type]
    unreadable = bool(found.docker) and found.docker_nvidia_runtime is None
    what = "/etc/docker/daemon.json" if "usr/bin/dockerd" in files else "the settings of docker"
    assert [each.what for each in unread] == ([what] if unreadable else [])


def test_podmans_socket_is_not_dockers(tree: SysfsTree) -> None:
    tree.files({"run/podman/podman.sock": ""}).link("run/docker.sock", "run/podman/podman.sock")
    assert read_container(tree.root)[0].docker is False


def test_what_run_links_to_is_described_once(tree: SysfsTree) -> None:
    tree.files({"run/cdi/nvidia.yaml": CDI.format(VERSION)}).link("var/run", "run")
    assert read_container(tree.root)[0].cdi_files == ("/run/cdi/nvidia.yaml",)


def test_amds_driver_and_the_users_rights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_amd_facts(tmp_path) == AmdFacts()
    monkeypatch.setattr(os, "getgroups", lambda: [992, 1000])
    monkeypatch.setattr(os, "getegid", lambda: 1000)
    monkeypatch.setenv("HSA_OVERRIDE_GFX_VERSION", "10.3.0")
    files = {"dev/kfd": "", "dev/dri/renderD128": "", "dev/dri/renderD129": "", "sys/module/amdgpu/version": "6.16.6\n"}
    vendors = {f"sys/class/drm/renderD{128 + n}/device/vendor": vendor for n, vendor in enumerate(["0x8086", "0x1002"])}
    tree = SysfsTree(tmp_path).host().files({**files, **vendors, "etc/group": "ada:x:1000:\nrender:x:992:ada\n"})
    whole = AmdFacts(
        kfd_device=True,
        kfd_accessible=True,
        render_nodes=("/dev/dri/renderD129",),
        render_accessible=True,
        user_groups=("render",),
        module_version="6.16.6",
    )
    assert read_amd_facts(tree.root) == whole
    monkeypatch.setattr(os, "access", lambda path, mode: path.name == "kfd")
    assert (read_amd_facts(tree.root).kfd_accessible, read_amd_facts(tree.root).render_accessible) == (True, False)
