from __future__ import annotations

import pytest

from mgpu.doctor.check import Finding, Purpose, Skip
from mgpu.doctor.checks import container, host
from mgpu.machine.inspection import Inspection, Listener, Unread
from tests.doctor.inspections import GIB, H100, MIB, bare, changed, changed_gpu, changed_machine, changed_pci, healthy
from tests.doctor.said import said

CHECKS = (*host.CHECKS, *container.CHECKS)
TWO = Purpose(backend="vllm", tensor_parallel=2)


def nodes(count: int | None, inspection: Inspection | None = None) -> Inspection:
    return changed_machine(inspection or healthy(), host={"numa_nodes": count})


def on_processors(listed: str | None, **facts: object) -> Inspection:
    return healthy(8, H100, host={"allowed_cpu_list": listed, **facts})


def listening(port: int, *, everywhere: bool = False) -> Inspection:
    return healthy(host={"listeners": (Listener(port=port, everywhere=everywhere),)})


def inside(inspection: Inspection, **facts: object) -> Inspection:
    return changed(changed_machine(inspection, host={"container": "docker"}), container=facts)


def docker(**facts: object) -> Inspection:
    known = {"docker": True, "docker_nvidia_runtime": True, "cgroup_driver": "systemd", "device_links": True}
    return healthy(container={**known, **facts})


def shared(size: int | None) -> Inspection:
    return healthy(host={"shm_bytes": size})


STALE = docker(cdi_files=("/etc/cdi/nvidia.yaml",), cdi_older_than_driver=True)


@pytest.mark.parametrize(
    ("check", "inspection", "purpose", "expected"),
    [
        pytest.param("memlock", healthy(host={"memlock_bytes": 8 * MIB}), TWO, ["info"], id="8 MiB may be locked"),
        pytest.param("memlock", healthy(), TWO, [], id="enough may be locked"),
        pytest.param("memlock", healthy(1, host={"memlock_bytes": 65536}), TWO, [], id="one card needs none locked"),
        pytest.param("memlock", healthy(host={"memlock_bytes": None}), TWO, ["skip"], id="memlock unread"),
        pytest.param("numa-affinity", healthy(8, H100, host={"numa_balancing": True}), TWO, ["info"], id="balancing"),
        pytest.param(
            "numa-affinity", healthy(host={"numa_balancing": True}), TWO, [], id="one socket balances nothing"
        ),
        pytest.param(
            "numa-affinity",
            healthy(8, H100, host={"nodes_without_memory": (1,)}),
            TWO,
            ["warn 4,5,6,7"],
            id="empty node",
        ),
        pytest.param(
            "numa-affinity",
            healthy(8, H100, host={"nodes_without_memory": (3,)}),
            TWO,
            [],
            id="an empty node without cards",
        ),
        pytest.param("numa-affinity", on_processors("0-31"), TWO, ["info 4,5,6,7"], id="processors of one node alone"),
        pytest.param("numa-affinity", on_processors("32,40-47"), TWO, ["info 0,1,2,3"], id="those of the other"),
        pytest.param("numa-affinity", on_processors("0,63"), TWO, [], id="one processor of each node"),
        pytest.param("numa-affinity", on_processors(None), TWO, ["skip"], id="processors unread"),
        pytest.param(
            "numa-affinity",
            on_processors(None, numa_balancing=None),
            TWO,
            ["skip"],
            id="processors and balancing unread, said once",
        ),
        pytest.param(
            "numa-affinity", changed_pci(on_processors("0-31"), local_cpus=None), TWO, [], id="near which is unknown"
        ),
        pytest.param(
            "numa-affinity", healthy(host={"allowed_cpu_list": "64"}), TWO, [], id="on one socket none is far"
        ),
        pytest.param("numa-affinity", nodes(None), TWO, ["skip"], id="nodes unread"),
        pytest.param(
            "numa-affinity", healthy(8, H100, host={"numa_balancing": None}), TWO, ["skip"], id="balancing unread"
        ),
        pytest.param("cpu-caps", healthy(host={"avx2": False}), TWO, ["warn"], id="no AVX2"),
        pytest.param("cpu-caps", healthy(host={"avx2": None}), TWO, [], id="not an x86"),
        pytest.param(
            "cpu-caps", healthy(host={"avx2": None, "cpu_flags_known": False}), TWO, ["skip"], id="flags unread"
        ),
        pytest.param("cpu-caps", healthy(host={"allowed_cpus": 2}), TWO, ["warn"], id="two processors for two ranks"),
        pytest.param("cpu-caps", healthy(host={"allowed_cpus": 3}), TWO, [], id="three processors for two ranks"),
        pytest.param("cpu-caps", bare(host={"allowed_cpus": 1}), Purpose(), ["warn"], id="one processor"),
        pytest.param(
            "cpu-caps",
            changed_machine(healthy(host={"allowed_cpus": None}), host={"cores": None}),
            TWO,
            ["skip"],
            id="cores unread",
        ),
        pytest.param("cpu-governor", healthy(host={"governors": ("powersave",)}), TWO, ["info"], id="powersave"),
        pytest.param("cpu-governor", healthy(host={"governors": ("performance",)}), TWO, [], id="performance"),
        pytest.param("cpu-governor", healthy(host={"governors": ()}), TWO, ["skip"], id="governor unread"),
        pytest.param(
            "cpu-governor",
            changed_machine(healthy(host={"governors": ()}), host={"virtualisation": "kvm"}),
            TWO,
            [],
            id="a virtual machine has no governor",
        ),
        pytest.param(
            "port-exposed", listening(8000), Purpose(port=8000), ["info"], id="a taken port: run takes the next"
        ),
        pytest.param("port-exposed", listening(8000), Purpose(), [], id="a local server is no fault"),
        pytest.param("port-exposed", listening(11434, everywhere=True), Purpose(), ["info"], id="open to the network"),
        pytest.param("port-exposed", listening(22, everywhere=True), Purpose(), [], id="not an engine's port"),
        pytest.param("port-exposed", healthy(host={"listeners_known": False}), Purpose(), ["skip"], id="ports unread"),
        pytest.param("shm-small", inside(shared(64 * MIB)), TWO, ["fail"], id="Docker's 64 MiB for two cards"),
        pytest.param("shm-small", inside(shared(64 * MIB)), Purpose(), ["warn"], id="64 MiB, nothing asked"),
        pytest.param("shm-small", inside(shared(2 * GIB)), TWO, ["warn"], id="2 GiB in a container"),
        pytest.param("shm-small", inside(shared(8 * GIB)), TWO, [], id="8 GiB in a container"),
        pytest.param("shm-small", shared(64 * MIB), TWO, ["info"], id="a small one on a host"),
        pytest.param("shm-small", shared(2 * GIB), TWO, [], id="2 GiB on a host"),
        pytest.param("shm-small", inside(shared(64 * MIB)), Purpose(tensor_parallel=1), [], id="one card needs none"),
        pytest.param("shm-small", shared(None), TWO, ["skip"], id="/dev/shm unread"),
        pytest.param(
            "container-visibility", inside(bare(), device_nodes=0, host_gpus=2), Purpose(), ["fail"], id="given none"
        ),
        pytest.param(
            "container-visibility", inside(healthy(1), host_gpus=2), Purpose(), ["warn"], id="given one of two"
        ),
        pytest.param("container-visibility", inside(healthy()), Purpose(), [], id="given all"),
        pytest.param("container-visibility", inside(bare()), Purpose(), [], id="a host without cards has none to give"),
        pytest.param(
            "container-visibility",
            inside(bare(), host_gpus=None),
            Purpose(),
            [],
            id="a host without a driver of NVIDIA's",
        ),
        pytest.param(
            "container-visibility", inside(healthy(), capabilities="utility"), Purpose(), ["fail"], id="may not compute"
        ),
        pytest.param(
            "container-visibility", inside(healthy(), capabilities="compute,utility"), Purpose(), [], id="may compute"
        ),
        pytest.param("container-visibility", inside(healthy(), host_gpus=None), Purpose(), ["skip"], id="given unread"),
        pytest.param(
            "container-cgroup-lost", inside(bare(driver={"nvml_error": 999})), Purpose(), ["fail"], id="lost its cards"
        ),
        pytest.param("container-cgroup-lost", bare(driver={"nvml_error": 999}), Purpose(), [], id="999 on a host"),
        pytest.param(
            "container-cgroup-lost",
            inside(healthy(driver={"nvml_error": None})),
            Purpose(),
            ["skip"],
            id="NVML not asked",
        ),
        pytest.param("container-cgroup-lost", docker(device_links=False), Purpose(), ["info"], id="a host that can"),
        pytest.param("container-cgroup-lost", docker(), Purpose(), [], id="a host with links"),
        pytest.param("container-cgroup-lost", docker(cgroup_driver=None), Purpose(), ["skip"], id="driver unread"),
        pytest.param("container-toolkit", docker(docker_nvidia_runtime=False), Purpose(), ["info"], id="no runtime"),
        pytest.param("container-toolkit", docker(), Purpose(), [], id="with the runtime"),
        pytest.param("container-toolkit", STALE, Purpose(), ["warn"], id="an old description"),
        pytest.param("container-toolkit", docker(docker=None), Purpose(), ["skip"], id="Docker unread"),
        pytest.param(
            "container-toolkit", docker(docker_nvidia_runtime=None), Purpose(), ["skip"], id="runtimes unread"
        ),
    ],
)
def test_the_computer_is_judged(check: str, inspection: Inspection, purpose: Purpose, expected: list[str]) -> None:
    assert said(CHECKS, check, inspection, purpose) == expected


@pytest.mark.parametrize(
    ("toolkit", "first"),
    [
        pytest.param(True, "sudo nvidia-ctk runtime configure", id="installed: it is only to be configured"),
        pytest.param(False, "sudo apt install nvidia-container-toolkit", id="not installed"),
        pytest.param(None, "sudo apt install nvidia-container-toolkit", id="not known"),
    ],
)
def test_a_toolkit_that_is_there_is_not_installed_again(toolkit: bool | None, first: str) -> None:
    (finding,) = container.container_toolkit.run(docker(docker_nvidia_runtime=False, toolkit=toolkit), Purpose())
    assert isinstance(finding, Finding)
    assert finding.fix[0].startswith(first)


def test_balancing_is_a_warning_with_cards_of_amd() -> None:
    mixed = changed_gpu(nodes(2, healthy(host={"numa_balancing": True})), 1, vendor="amd")
    assert said(CHECKS, "numa-affinity", mixed) == ["warn 1"]


def test_what_was_not_read_is_two_lines_at_most() -> None:
    unread = (
        Unread(what="/dev/kmsg", why="permission denied", needs_root=True),
        *(Unread(what=f"PCI config of card {number}", why="short", needs_root=True) for number in range(9)),
        Unread(what="/etc/nccl.conf", why="not text"),
    )
    root, rest = host.cannot_read.run(healthy(unread=unread), Purpose())
    assert isinstance(root, Skip)
    assert root.needs_root
    assert root.reason.startswith("only root may read /dev/kmsg, PCI config of card 0,")
    assert root.reason.endswith("and 4 more")
    assert rest == Skip(reason="could not be read: /etc/nccl.conf (not text)")


def test_nothing_unread_is_nothing_said() -> None:
    assert said(CHECKS, "cannot-read", healthy()) == []


@pytest.mark.parametrize("check", [check.id for check in CHECKS])
def test_a_desktop_without_cards_and_docker_is_left_alone(check: str) -> None:
    assert said(CHECKS, check, bare(host={"shm_bytes": 64 * MIB, "memlock_bytes": 65536})) == []
