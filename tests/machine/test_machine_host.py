from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgpu.machine.amd import read_amd
from mgpu.machine.host import read_host
from mgpu.machine.sysfs import read_int, read_text

Tree = Callable[..., Path]
Files = dict[str, str | bytes]
GIB = 1024**3

DESKTOP: Files = {
    "proc/sys/kernel/osrelease": "6.8.0-45-generic\n",
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD Ryzen 9 7950X\nflags\t\t: fpu sse\n\nprocessor\t: 1\n",
    "proc/meminfo": "MemTotal:       67108864 kB\nMemFree: 1 kB\nMemAvailable:   33554432 kB\n",
    "proc/1/cgroup": "0::/init.scope\n",
    "proc/self/cgroup": "0::/user.slice/session.scope\n",
    "sys/devices/system/node/node0/cpulist": "0-3\n",
    "sys/devices/system/cpu/cpu0/topology/core_id": "0\n",
    "sys/devices/system/cpu/cpu1/topology/core_id": "0\n",
    "sys/devices/system/cpu/cpu2/topology/core_id": "1\n",
    "sys/devices/system/cpu/cpu3/topology/core_id": "1\n",
}
VM: Files = {"proc/cpuinfo": "model name : EPYC\nflags : fpu hypervisor\n"}


def test_a_desktop_is_read_fact_by_fact(tree: Tree) -> None:
    host = read_host(tree(DESKTOP))
    assert (host.kernel, host.cpu) == ("6.8.0-45-generic", "AMD Ryzen 9 7950X")
    assert host.cores == 2  # four threads
    assert (host.ram_bytes, host.ram_available_bytes) == (64 * GIB, 32 * GIB)
    assert (host.numa_nodes, host.virtualisation, host.container) == (1, "none", "none")


@pytest.mark.parametrize(
    ("files", "field", "value"),
    [
        pytest.param(VM, "virtualisation", "vm", id="a hypervisor without a name"),
        pytest.param(VM | {"sys/class/dmi/id/sys_vendor": "QEMU\n"}, "virtualisation", "kvm", id="QEMU"),
        pytest.param(VM | {"sys/class/dmi/id/sys_vendor": "VMware, Inc.\n"}, "virtualisation", "vmware", id="VMware"),
        pytest.param(
            {"proc/sys/kernel/osrelease": "5.15.1-microsoft-standard-WSL2\n"}, "virtualisation", "wsl2", id="WSL"
        ),
        pytest.param({"proc/cpuinfo": "Model : Raspberry Pi 5\n"}, "virtualisation", None, id="an ARM cannot say"),
        pytest.param({"proc/cpuinfo": "Model : Raspberry Pi 5\n"}, "cpu", "Raspberry Pi 5", id="an ARM's name"),
        pytest.param({".dockerenv": ""}, "container", "docker", id="Docker"),
        pytest.param({"run/.containerenv": ""}, "container", "podman", id="Podman"),
        pytest.param({"run/systemd/container": "lxc\n"}, "container", "lxc", id="LXC with systemd"),
        pytest.param({"run/systemd/container": "wsl\n"}, "container", "none", id="WSL is no container"),
        pytest.param({"proc/1/environ": b"A=1\0container=lxc\0"}, "container", "lxc", id="LXC without systemd"),
        pytest.param({"proc/1/cgroup": "0::/kubepods/pod1/x\n"}, "container", "kubernetes", id="a pod by its group"),
        pytest.param({"var/run/secrets/kubernetes.io/x": ""}, "container", "kubernetes", id="a pod by its secrets"),
        pytest.param({"proc/1/cgroup": "1:x:/docker/abc\n"}, "container", "docker", id="Docker, old groups"),
        pytest.param({f"sys/devices/system/node/node{n}/x": "" for n in (0, 1, 10)}, "numa_nodes", 3, id="three nodes"),
    ],
)
def test_a_host_is_told_by_its_marks(tree: Tree, files: Files, field: str, value: object) -> None:
    assert getattr(read_host(tree(DESKTOP | files)), field) == value


def test_without_a_topology_processors_are_counted(tree: Tree) -> None:
    assert read_host(tree({"proc/cpuinfo": DESKTOP["proc/cpuinfo"]})).cores == 2


GROUP = "sys/fs/cgroup/user.slice"


@pytest.mark.parametrize(
    ("files", "total_gib", "available_gib"),
    [
        pytest.param({f"{GROUP}/memory.max": "max\n"}, 64, 32, id="no limit"),
        pytest.param({f"{GROUP}/memory.max": f"{8 * GIB}\n"}, 8, 8, id="a limit around our group"),
        pytest.param({f"{GROUP}/session.scope/memory.max": f"{8 * GIB}\n"}, 8, 8, id="a limit on our group"),
        pytest.param({"sys/fs/cgroup/memory.max": f"{8 * GIB}\n"}, 8, 8, id="a container's limit"),
        pytest.param({f"{GROUP}/memory.max": f"{128 * GIB}\n"}, 64, 32, id="a limit above what there is"),
        pytest.param(
            {
                f"{GROUP}/memory.max": f"{8 * GIB}\n",
                f"{GROUP}/memory.current": f"{6 * GIB}\n",
                f"{GROUP}/memory.stat": f"anon 1\ninactive_file {3 * GIB}\n",
            },
            8,
            5,
            id="used memory counts, but not the page cache",
        ),
        pytest.param(
            {f"{GROUP}/memory.max": f"{8 * GIB}\n", f"{GROUP}/memory.current": f"{9 * GIB}\n"},
            8,
            0,
            id="over its limit",
        ),
        pytest.param({"proc/self/cgroup": "0::/../../etc\n"}, 64, 32, id="a group outside the tree"),
    ],
)
def test_a_control_groups_limit_caps_the_memory(tree: Tree, files: Files, total_gib: int, available_gib: int) -> None:
    host = read_host(tree(DESKTOP | files))
    assert (host.ram_bytes, host.ram_available_bytes) == (total_gib * GIB, available_gib * GIB)


LAYERS = "1 0 0:50 / / rw - overlay overlay rw\n"


@pytest.mark.parametrize(
    ("namespace", "files", "container"),
    [
        pytest.param("pid:[4026531836]", {}, "none", id="the computer's own processes"),
        pytest.param("pid:[4026531836]", {"proc/self/mountinfo": LAYERS}, "none", id="a system on layers"),
        pytest.param("pid:[4026532201]", {"proc/self/mountinfo": LAYERS}, "container-other", id="a pod's container"),
        pytest.param("pid:[4026532201]", {}, None, id="processes of its own alone, as in a sandbox"),
        pytest.param(
            "pid:[4026532201]",
            {"proc/self/mountinfo": LAYERS, "proc/sys/kernel/osrelease": "5.15.1-microsoft-standard-WSL2\n"},
            "none",
            id="WSL",
        ),
    ],
)
def test_where_control_groups_hide_the_container_its_processes_tell(
    tree: Tree, namespace: str, files: Files, container: str | None
) -> None:
    root = tree(DESKTOP | {"proc/1/cgroup": "0::/\n"} | files)
    (root / "proc/self/ns").mkdir(parents=True)
    (root / "proc/self/ns/pid").symlink_to(namespace)
    assert read_host(root).container == container


def test_nothing_to_read_is_nothing_known(tmp_path: Path) -> None:
    host = read_host(tmp_path)
    facts = (host.kernel, host.cpu, host.cores, host.ram_bytes, host.numa_nodes, host.virtualisation, host.container)
    assert facts == (None,) * 7


PATHS = st.sampled_from(
    [
        *DESKTOP,
        "sys/class/dmi/id/sys_vendor",
        "sys/fs/cgroup/memory.max",
        "sys/fs/cgroup/memory.stat",
        "sys/class/drm/card0/device/vendor",
        "sys/class/drm/card0/device/device",
        "sys/class/drm/card0/device/mem_info_vram_total",
        "sys/class/drm/card0/device/mem_info_vram_used",
        "sys/class/drm/card0/device/max_link_speed",
        "sys/class/drm/card0/device/hwmon/hwmon0/temp1_input",
        "sys/class/drm/card0/device/unique_id",
        "sys/class/kfd/kfd/topology/nodes/1/properties",
        "usr/share/libdrm/amdgpu.ids",
    ]
)
CONTENTS = st.one_of(
    st.binary(max_size=200),
    st.sampled_from([b"0x1002\n", b"-1\n", b"9" * 5000, b": : :\n", b"\n\n,,,\n", b"nan", b"1" * 70_000]),
    st.integers().map(lambda value: str(value).encode()),
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(PATHS, CONTENTS, max_size=12))
def test_garbage_is_never_more_than_unknown(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, content in {"sys/class/drm/card0/device/vendor": b"0x1002\n", **files}.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        host = read_host(root)
        gpus = read_amd(root)
    assert host.ram_bytes is None or host.ram_bytes >= 0
    assert all(gpu.free_bytes is None or gpu.free_bytes >= 0 for gpu in gpus)


def test_only_regular_files_are_read_and_only_their_beginning(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"7" * 1000)
    assert read_text(tmp_path / "pipe") is None
    assert read_text(tmp_path) is None
    assert read_text(tmp_path / "a\0b") is None
    assert read_text(tmp_path / "large", 10) == "7777777777"
    assert read_int(tmp_path / "large") is None
