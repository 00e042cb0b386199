"""NVML through the real nvidia-ml-py and a fake driver library."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from mgpu.machine.snapshot import Gpu, GpuProcess, Machine, NvLinkPort

RIGS = sorted((Path(__file__).parents[1] / "machines/rigs").glob("*.txt"))
BROKEN = {"driver-mismatch", "no-driver", "container-lost-cgroup"}
MIB = 1024**2

Tree = Callable[..., Path]
ReadRig = Callable[..., Machine]

# Per rig: driver, CUDA, and per kind of card: name, how many, total bytes, compute capability, PCIe generation
# now and at most, BAR1 MiB, power limit W; then the widths now, and the links as pair to (kind, peer access).
RTX_3090 = ("NVIDIA GeForce RTX 3090", 25769803776, "8.6")
RTX_4090 = ("NVIDIA GeForce RTX 4090", 25757220864, "8.9")
RTX_5090 = ("NVIDIA GeForce RTX 5090", 34190917632, "12.0")
A100 = ("NVIDIA A100-SXM4-80GB", 85899345920, "8.0")
H100 = ("NVIDIA H100 80GB HBM3", 85520809984, "9.0")
P40 = ("Tesla P40", 25769803776, "6.1")
PRO_6000 = ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 102641958912, "12.0")
RTX_6000_ADA = ("NVIDIA RTX 6000 Ada Generation", 51527024640, "8.9")


@dataclasses.dataclass(frozen=True)
class Facts:
    driver: str
    cuda: str
    cards: list[tuple[str, int, str]]
    gen: list[int]
    gen_max: int
    width: list[int]
    bar1_mib: list[int]
    power_limit_w: list[float]
    kinds: set[tuple[str, bool | None]]
    nvlink_ports: int = 0


FACTS = {
    "2x3090-nvlink": Facts(
        "610.43.02", "13.3", [RTX_3090] * 2, [1, 1], 3, [16, 16], [256] * 2, [350] * 2, {("NVLink", True)}, 4
    ),
    "2x3090-riser-x1": Facts(
        "580.126.20", "13.0", [RTX_3090] * 2, [4, 1], 4, [16, 1], [256] * 2, [350] * 2, {("PHB", False)}, 4
    ),
    "2x4090-one-lost": Facts("580.126.20", "13.0", [RTX_4090], [1], 4, [8], [32768], [450], set()),
    "2x4090-x670e": Facts(
        "580.126.20", "13.0", [RTX_4090] * 2, [1, 1], 4, [8, 8], [32768] * 2, [450] * 2, {("PHB", False)}
    ),
    "2x5090-x8": Facts(
        "610.43.02", "13.3", [RTX_5090] * 2, [1, 1], 5, [8, 8], [32768] * 2, [575] * 2, {("PHB", False)}
    ),
    "2xpro6000-p2p-hang": Facts(
        "595.71.05", "13.2", [PRO_6000] * 2, [1, 1], 5, [8, 8], [131072] * 2, [600] * 2, {("PHB", True)}
    ),
    "3xp40": Facts("535.129.03", "12.2", [P40] * 3, [3] * 3, 3, [16, 8, 8], [32768] * 3, [250] * 3, {("PHB", True)}),
    "4x3090-2nvlink": Facts(
        "595.71.05",
        "13.2",
        [RTX_3090] * 4,
        [1] * 4,
        4,
        [16] * 4,
        [256] * 4,
        [350] * 4,
        {("NVLink", True), ("NODE", False)},
        4,
    ),
    "6000ada-4090": Facts(
        "580.126.20",
        "13.0",
        [RTX_6000_ADA, RTX_4090],
        [1, 1],
        4,
        [16, 16],
        [65536, 32768],
        [300, 450],
        {("NODE", False)},
    ),
    "8xa100-sxm": Facts(
        "535.54.03",
        "12.2",
        [A100] * 8,
        [4] * 8,
        4,
        [16] * 8,
        [131072] * 8,
        [400] * 8,
        {("NVLink", True)},
        12,
    ),
    "8xh100-sxm": Facts(
        "590.48.01",
        "13.1",
        [H100] * 8,
        [5] * 8,
        5,
        [16] * 8,
        [131072] * 8,
        [700] * 8,
        {("NVLink", True)},
        18,
    ),
}


def test_every_rig_is_either_expected_or_broken() -> None:
    assert {rig.stem for rig in RIGS} == FACTS.keys() | BROKEN


@pytest.mark.parametrize("driver", ["new", "old"])
def test_rigs_read_as_their_owners_reported_them(read_rigs: Callable[..., list[Machine]], driver: str) -> None:
    machines = read_rigs([rig for rig in RIGS if rig.stem in FACTS], driver=driver)
    for (name, facts), machine in zip(sorted(FACTS.items()), machines, strict=True):
        assert machine.driver is not None, name
        usable = [gpu for gpu in machine.gpus if gpu.problem is None]
        assert (
            Facts(
                driver=machine.driver.version or "",
                cuda=machine.driver.cuda or "",
                cards=[(gpu.name, gpu.total_bytes or 0, gpu.compute_capability or "") for gpu in usable],
                gen=[gpu.pcie.gen or 0 for gpu in usable],
                gen_max=max(gpu.pcie.gen_max or 0 for gpu in usable),
                width=[gpu.pcie.width or 0 for gpu in usable],
                bar1_mib=[(gpu.bar1_bytes or 0) // MIB for gpu in usable],
                power_limit_w=[gpu.power_limit_w or 0 for gpu in usable],
                kinds={(link.kind, link.p2p) for link in machine.links},
                nvlink_ports=max(len(gpu.nvlink) for gpu in usable),
            )
            == facts
        ), name
        assert all(gpu.bandwidth_gb_s for gpu in usable), name
        assert [gpu.index for gpu in machine.gpus] == list(range(len(machine.gpus))), name
        assert len(machine.links) == len(usable) * (len(usable) - 1) // 2, name


def test_a_card_is_read_fact_by_fact(read_rig: ReadRig) -> None:
    first, second = read_rig("2x3090-nvlink", "gpu1.mig = 1", "gpu1.display = 1").gpus
    assert first.uuid == "GPU-00000000-0000-0000-0000-000000000001"
    assert (first.bus_id, second.bus_id) == ("0000:17:00.0", "0000:65:00.0")
    assert first.free_bytes == 25769803776 - 24194842624 - 471859200
    assert (first.power_w, first.temperature_c, first.utilisation_percent) == (188.0, 35, 0)
    assert (first.bandwidth_gb_s, first.pcie.width_max, first.pcie.slot_width) == (936.2, 16, None)
    assert first.nvlink == tuple(
        NvLinkPort(port=port, active=True, version=3, remote_bus_id="0000:65:00.0") for port in range(4)
    )
    assert (first.mig, first.display, second.mig, second.display) == (None, None, True, True)


def test_nvlink_joins_only_the_bridged_pairs(read_rig: ReadRig) -> None:
    links = read_rig("4x3090-2nvlink").links
    assert {(link.a, link.b) for link in links if link.kind == "NVLink"} == {(0, 1), (2, 3)}
    assert {(link.a, link.b) for link in links if link.p2p} == {(0, 1), (2, 3)}


def test_ports_to_a_switch_have_no_remote_card(read_rig: ReadRig) -> None:
    gpu = read_rig("8xh100-sxm").gpus[0]
    assert gpu.nvlink == tuple(NvLinkPort(port=port, active=True, version=4, remote_bus_id=None) for port in range(18))


def test_unbridged_ports_are_listed_as_inactive(read_rig: ReadRig) -> None:
    gpu = read_rig("2x3090-riser-x1").gpus[0]
    assert [port.active for port in gpu.nvlink] == [False] * 4


@pytest.mark.parametrize(
    ("level", "kind"), [(0, "PIX"), (10, "PIX"), (20, "PXB"), (30, "PHB"), (40, "NODE"), (50, "SYS"), (99, "unknown")]
)
def test_the_common_ancestor_names_the_link(read_rig: ReadRig, level: int, kind: str) -> None:
    (link,) = read_rig("2x4090-x670e", f"topo.0.1 = {level}").links
    assert link.kind == kind


def test_peer_access_is_what_the_driver_says_of_reading(read_rig: ReadRig) -> None:
    (link,) = read_rig("2x4090-x670e", "p2p.read.0.1 = 0", "p2p.write.0.1 = 1").links
    assert link.p2p is True


def test_cards_on_a_switch_that_may_not_use_it_are_joined_by_pcie(read_rig: ReadRig) -> None:
    links = read_rig("8xh100-sxm", "p2p.nvlink.0.1 = 5").links
    assert [link.kind for link in links if (link.a, link.b) in {(0, 1), (0, 2)}] == ["NODE", "NVLink"]


# The keys of a rig that feed a fact of the card; without the key, the fact is unknown and the others stay.
FEEDS = {
    "name": {"name", "bandwidth_gb_s"},
    "uuid": {"uuid"},
    "bdf": {"bus_id"},
    "mem.total": {"total_bytes", "free_bytes"},
    "cc": {"compute_capability"},
    "bar1.total": {"bar1_bytes"},
    "pcie.gen": {"pcie"},
    "pcie.genmax": {"pcie"},
    "pcie.width": {"pcie"},
    "pcie.widthmax": {"pcie"},
    "power.draw": {"power_w"},
    "power.limit": {"power_limit_w"},
    "temp": {"temperature_c"},
    "util": {"utilisation_percent"},
    "compute": {"used_by"},
    "display": {"display"},
    "mig": {"mig"},
    "nvlink.state": {"nvlink"},
}


@pytest.mark.parametrize("error", [3, 4, 13, 999], ids=["not supported", "no permission", "missing", "unknown"])
def test_a_question_without_an_answer_costs_only_that_answer(
    read_rigs: Callable[..., list[Machine]], tmp_path: Path, error: int
) -> None:
    base = (Path(__file__).parents[1] / "machines/rigs/2x3090-riser-x1.txt").read_text()
    base += "\ngpu0.display = 1\ngpu0.mig = 0\ngpu0.compute = 7:1024\ntopo.0.1 = 30\n"
    rigs = [tmp_path / "whole.txt", *(tmp_path / f"{key}.txt" for key in FEEDS)]
    for rig, key in zip(rigs, ["unused", *FEEDS], strict=True):
        rig.write_text(f"{base}gpu0.{key} = !{error}\n")
    whole, *damaged = read_rigs(rigs)
    for (key, fields), machine in zip(FEEDS.items(), damaged, strict=True):
        assert _different(whole.gpus[0], machine.gpus[0]) == fields, key
        assert machine.gpus[1] == whole.gpus[1], key
        assert machine.links == whole.links, key
        assert machine.gpus[0].problem is None, key


def _different(one: Gpu, other: Gpu) -> set[str]:
    names = (field.name for field in dataclasses.fields(Gpu))
    return {name for name in names if getattr(one, name) != getattr(other, name)}


def test_pairs_without_an_answer_are_unknown(read_rig: ReadRig) -> None:
    (link,) = read_rig("2x4090-x670e", "topo.0.1 = !3", "p2p.0.1 = !999").links
    assert (link.kind, link.p2p) == ("unknown", None)


def test_a_lost_card_keeps_its_place_and_says_what_to_do(read_rig: ReadRig) -> None:
    good, lost = read_rig("2x4090-one-lost").gpus
    assert good.problem is None
    assert lost.index == 1
    assert lost.problem is not None
    assert "fell off the bus" in lost.problem
    assert (lost.total_bytes, lost.uuid) == (None, None)


def test_a_lost_card_is_named_from_what_the_kernel_module_still_lists(read_rig: ReadRig, tree: Tree) -> None:
    information = "Model: \t\t NVIDIA GeForce RTX 4090\nGPU UUID: \t GPU-0000-b\nBus Location: \t 0000:02:00.0\n"
    root = tree(
        {
            "proc/driver/nvidia/gpus/0000:01:00.0/information": information,
            "proc/driver/nvidia/gpus/0000:02:00.0/information": information,
        }
    )
    lost = read_rig("2x4090-one-lost", root=root).gpus[1]
    assert (lost.name, lost.uuid, lost.bus_id) == ("NVIDIA GeForce RTX 4090", "GPU-0000-b", "0000:02:00.0")
    assert lost.problem is not None


def test_a_card_lost_while_being_read_has_a_problem_and_its_facts(read_rig: ReadRig) -> None:
    machine = read_rig("2x4090-x670e", "gpu1.temp = !15")
    assert machine.gpus[1].problem is not None
    assert machine.gpus[1].total_bytes == 25757220864
    assert machine.gpus[1].temperature_c is None
    assert machine.links == ()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        pytest.param(8, "power cables", id="power cable missing"),
        pytest.param(16, "nvidia-smi -r", id="reset required"),
        pytest.param(4, "permissions", id="no permission"),
        pytest.param(77, "NVML error 77", id="an error nobody knows"),
    ],
)
def test_a_card_that_cannot_be_opened_says_why(read_rig: ReadRig, error: int, words: str) -> None:
    problem = read_rig("2x4090-x670e", f"gpu0.handle = !{error}").gpus[0].problem
    assert problem is not None
    assert words in problem


CARD_ON_BUS = {
    "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
    "sys/bus/pci/devices/0000:01:00.0/class": "0x030000\n",
}


@pytest.mark.parametrize(
    ("rig", "files", "words"),
    [
        pytest.param("driver-mismatch", {"sys/module/nvidia/version": "580.1\n"}, "reboot", id="library newer"),
        pytest.param("container-lost-cgroup", {}, "container", id="unknown error"),
        pytest.param("no-driver", CARD_ON_BUS, "modprobe", id="module not loaded though there is a card"),
        pytest.param("no-driver", {}, None, id="no card, no module: no driver"),
        pytest.param(
            "no-driver", CARD_ON_BUS | {"sys/bus/pci/devices/0000:01:00.0/class": "0x040300\n"}, None, id="only sound"
        ),
    ],
)
def test_a_driver_that_does_not_start(
    read_rig: ReadRig, tree: Tree, rig: str, files: dict[str, str | bytes], words: str | None
) -> None:
    machine = read_rig(rig, root=tree(files))
    assert machine.gpus == ()
    if words is None:
        assert machine.driver is None
    else:
        assert machine.driver is not None
        assert words in (machine.driver.problem or "")
        assert machine.driver.version == ("580.1" if "sys/module/nvidia/version" in files else None)


def test_without_the_library_there_is_no_driver_and_no_card(
    read_rigs: Callable[..., list[Machine]], tmp_path: Path
) -> None:
    (tmp_path / "libnvidia-ml.so.1").touch()  # found before a real one, and cannot be loaded
    (machine,) = read_rigs([tmp_path / "unused"], driver=str(tmp_path))
    assert (machine.driver, machine.gpus, machine.links) == (None, (), ())


def test_processes_are_merged_and_named(read_rig: ReadRig, tree: Tree) -> None:
    root = tree(
        {
            "proc/70/cmdline": b"/usr/bin/llama-server\0--port\0",
            "proc/71/cmdline": b"",
            "proc/71/comm": "Xorg\n",
            "proc/72/cmdline": b"evil\x1b[2J\0",
        }
    )
    lines = ("gpu0.compute = 70:1073741824 72:5", "gpu0.graphics = 71:- 70:2147483648 73:9")
    expected = (
        GpuProcess(pid=70, name="llama-server", bytes=2147483648),
        GpuProcess(pid=71, name="Xorg", bytes=None),
        GpuProcess(pid=72, name="evil[2J", bytes=5),
        GpuProcess(pid=73, name=None, bytes=9),
    )
    for driver in ("new", "old"):
        assert read_rig("2x4090-x670e", *lines, root=root, driver=driver).gpus[0].used_by == expected


def test_the_slot_is_the_width_of_the_bridge_above_the_card(read_rig: ReadRig, tree: Tree) -> None:
    bridge = "sys/devices/pci0000:00/0000:00:01.0"
    root = tree(
        {f"{bridge}/max_link_width": "8\n", f"{bridge}/0000:01:00.0/max_link_width": "16\n"},
        {"sys/bus/pci/devices/0000:01:00.0": f"{bridge}/0000:01:00.0"},
    )
    first, second = read_rig("2x4090-x670e", root=root).gpus
    assert (first.pcie.slot_width, first.pcie.width_max) == (8, 16)
    assert second.pcie.slot_width is None


@pytest.mark.parametrize(
    ("text", "flavour"),
    [
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.126.20", "open"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03", "closed"),
    ],
)
def test_the_module_is_open_or_closed(read_rig: ReadRig, tree: Tree, text: str, flavour: str) -> None:
    driver = read_rig("2x4090-x670e", root=tree({"proc/driver/nvidia/version": text})).driver
    assert driver is not None
    assert driver.module_flavour == flavour


def test_a_card_outside_the_catalogue_gets_its_bandwidth_from_bus_and_clock(read_rig: ReadRig) -> None:
    lines = ("gpu0.name = NVIDIA GeForce RTX 9999", "gpu0.membus = 384", "gpu0.clock.mem = 10501")
    assert read_rig("2x4090-x670e", *lines).gpus[0].bandwidth_gb_s == pytest.approx(1008.1, abs=0.1)


def test_names_that_are_not_text_do_not_break_the_reading(read_rig: ReadRig) -> None:
    gpu = read_rig("2x4090-x670e", b"gpu0.name = \xff\xfe\x80", "gpu0.uuid = GPU-1\x1b[31m", "gpu0.cc = zebra").gpus[0]
    assert (gpu.name, gpu.uuid, gpu.compute_capability) == ("NVIDIA GPU", "GPU-1[31m", None)
    assert gpu.total_bytes == 25757220864


def test_nvml_is_shut_down_even_when_reading_fails(run_python: Callable[..., str], tmp_path: Path) -> None:
    mark = tmp_path / "was-shut-down"
    program = (
        "import mgpu.machine.nvidia as n\n"
        "n._read_links = lambda *_: 1 / 0\n"
        "try: n.read_nvidia()\n"
        "except ZeroDivisionError: print('failed')"
    )
    rig = next(rig for rig in RIGS if rig.stem == "2x4090-x670e")
    assert run_python(program, FAKE_NVML=str(rig), FAKE_NVML_SHUTDOWN=str(mark)).strip() == "failed"
    assert mark.exists()


def test_eight_cards_are_read_in_a_tenth_of_a_second(run_python: Callable[..., str]) -> None:
    program = (
        "import time, pynvml\nfrom mgpu.machine.nvidia import read_nvidia\n"
        "def once():\n    start = time.perf_counter(); read_nvidia(); return time.perf_counter() - start\n"
        "print(min(once() for _ in range(5)))"
    )
    rig = next(rig for rig in RIGS if rig.stem == "8xh100-sxm")
    assert float(run_python(program, FAKE_NVML=str(rig))) < 0.1


def test_the_binding_is_imported_only_when_cards_are_read(run_python: Callable[..., str]) -> None:
    program = "import sys, mgpu.machine.probe, mgpu.machine.simulate; print('pynvml' in sys.modules)"
    assert run_python(program).strip() == "False"
