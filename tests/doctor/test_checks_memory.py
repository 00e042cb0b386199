from __future__ import annotations

from typing import Any

import pytest

from mgpu.doctor.check import Finding, Purpose
from mgpu.doctor.checks import memory
from mgpu.machine.inspection import DiskSpace, Inspection
from mgpu.machine.snapshot import GpuProcess
from tests.doctor.inspections import GIB, H100, MIB, bare, changed, changed_card, changed_gpu, changed_machine, healthy
from tests.doctor.said import said

VLLM = Purpose(backend="vllm", tensor_parallel=2)
ENGINE = GpuProcess(pid=4711, name="llama-server", bytes=9 * GIB)
DESKTOP = GpuProcess(pid=900, name="Xorg", bytes=700 * MIB)


def taken(size_bytes: int, *processes: GpuProcess, display: bool = False) -> Inspection:
    gpu = healthy().machine.gpus[0]
    assert gpu.free_bytes is not None
    return changed_gpu(healthy(), 0, free_bytes=gpu.free_bytes - size_bytes, used_by=processes, display=display)


def inside(size_bytes: int, *processes: GpuProcess) -> Inspection:
    return changed_machine(taken(size_bytes, *processes), host={"container": "lxc"})


def untold(size_bytes: int) -> Inspection:
    """As in WSL, where the driver lists no processes."""
    return changed_card(taken(size_bytes), 0, used_by_known=False)


def disk(role: str = "Hugging Face cache", **changes: Any) -> Inspection:
    facts = {"free_bytes": 400 * GIB, "total_bytes": 900 * GIB, "file_system": "ext4", "rotational": False, **changes}
    return healthy(host={"disks": (DiskSpace(role=role, path="/models", **facts),)})


def folder(role: str, free_bytes: int) -> DiskSpace:
    return DiskSpace(
        role=role, path=f"/{role}", free_bytes=free_bytes, total_bytes=999 * GIB, file_system="ext4", rotational=False
    )


FOLDERS = healthy(
    host={
        "disks": (
            folder("Hugging Face cache", 900 * GIB),
            folder("Ollama models", 10 * GIB),
            folder("Docker images", 30 * GIB),
        )
    }
)


def swap(used: int, *, total: int = 8 * GIB, pressure: float | None = 0.0) -> Inspection:
    host = {"swap_total_bytes": total, "swap_free_bytes": total - used, "memory_pressure_percent": pressure}
    return healthy(host=host)


@pytest.mark.parametrize(
    ("check", "inspection", "purpose", "expected"),
    [
        pytest.param("vram-in-use", healthy(), VLLM, [], id="the driver's reserve is not in use"),
        pytest.param("vram-in-use", taken(700 * MIB, DESKTOP), VLLM, ["info 0"], id="a desktop"),
        pytest.param("vram-in-use", taken(3 * GIB), Purpose(), ["warn 0"], id="3 GiB that no process has"),
        pytest.param(
            "vram-in-use",
            changed_machine(taken(3 * GIB), host={"container": "lxc"}),
            Purpose(),
            ["info 0"],
            id="what others hold outside of a container",
        ),
        pytest.param("vram-in-use", inside(23 * GIB), Purpose(), ["info 0"], id="full by others, as seen in one"),
        pytest.param("vram-in-use", inside(23 * GIB), VLLM, ["warn 0"], id="full by others, and vLLM is to have it"),
        pytest.param(
            "vram-in-use", inside(23 * GIB, ENGINE), Purpose(), ["info 0"], id="who has it is listed in a container"
        ),
        pytest.param(
            "vram-in-use",
            changed_gpu(taken(3 * GIB), 0, power_w=188.0, power_limit_w=350.0),
            Purpose(),
            ["info 0"],
            id="a card that draws power has somebody",
        ),
        pytest.param(
            "vram-in-use", taken(2 * GIB, display=True), Purpose(), ["info 0"], id="a desktop's share is no mystery"
        ),
        pytest.param(
            "vram-in-use",
            taken(9 * GIB, GpuProcess(pid=1, bytes=9 * GIB)),
            VLLM,
            ["warn 0"],
            id="an engine holds what vLLM is to have",
        ),
        pytest.param(
            "vram-in-use",
            taken(9 * GIB, GpuProcess(pid=1, bytes=9 * GIB)),
            Purpose(),
            ["info 0"],
            id="an engine that serves is no fault",
        ),
        pytest.param(
            "vram-in-use", taken(9 * GIB, GpuProcess(pid=1)), Purpose(), ["info 0"], id="a process that does not say"
        ),
        pytest.param("vram-in-use", untold(3 * GIB), Purpose(), ["info 0"], id="who has it the driver does not tell"),
        pytest.param("vram-in-use", untold(9 * GIB), VLLM, ["info 0"], id="nor whether it goes"),
        pytest.param("vram-in-use", untold(0), VLLM, [], id="nobody to tell of"),
        pytest.param("vram-in-use", changed_gpu(healthy(), 1, free_bytes=None), VLLM, ["skip"], id="memory unread"),
        pytest.param("display-on-gpu", taken(0, display=True), Purpose(), ["info 0"], id="a monitor"),
        pytest.param("display-on-gpu", healthy(), Purpose(), [], id="no monitor"),
        pytest.param(
            "display-on-gpu", changed_gpu(healthy(), 0, display=None), Purpose(), ["skip"], id="monitor unread"
        ),
        pytest.param("ecc-vram", healthy(2, "NVIDIA RTX A6000"), Purpose(), ["info 0", "info 1"], id="ECC of GDDR"),
        pytest.param("ecc-vram", healthy(8, H100), Purpose(), [], id="ECC of HBM costs no memory"),
        pytest.param("ecc-vram", healthy(), Purpose(), [], id="a GeForce has none to read"),
        pytest.param(
            "ecc-vram",
            changed_card(healthy(1, "NVIDIA RTX A6000"), 0, ecc_enabled=None),
            Purpose(),
            ["skip"],
            id="ECC unread",
        ),
        pytest.param("ram-swap", healthy(), Purpose(weights_bytes=200 * GIB), ["warn"], id="weights above the memory"),
        pytest.param("ram-swap", healthy(), Purpose(weights_bytes=30 * GIB), [], id="weights within the memory"),
        pytest.param("ram-swap", swap(6 * GIB, pressure=30.0), Purpose(), ["warn"], id="swapping, and waiting for it"),
        pytest.param("ram-swap", swap(6 * GIB), Purpose(), [], id="old pages in swap are normal"),
        pytest.param("ram-swap", swap(6 * GIB, pressure=None), Purpose(), ["info"], id="swapping, waiting unread"),
        pytest.param(
            "ram-swap",
            changed_machine(swap(0, total=0), host={"ram_bytes": 16 * GIB}),
            Purpose(),
            ["info"],
            id="no swap, and less memory than the cards",
        ),
        pytest.param(
            "ram-swap", changed_machine(healthy(), host={"ram_bytes": None}), Purpose(), ["skip"], id="RAM unread"
        ),
        pytest.param("ram-swap", healthy(host={"swap_free_bytes": None}), Purpose(), ["skip"], id="swap unread"),
        pytest.param("disk-models", disk(), Purpose(missing_bytes=100 * GIB), [], id="room for the weights"),
        pytest.param(
            "disk-models",
            disk(free_bytes=30 * GIB),
            Purpose(weights_bytes=100 * GIB, missing_bytes=0),
            [],
            id="weights that are here need no room",
        ),
        pytest.param(
            "disk-models",
            disk(free_bytes=105 * GIB),
            Purpose(missing_bytes=100 * GIB),
            ["fail"],
            id="a tenth is wanted more",
        ),
        *(
            pytest.param("disk-models", FOLDERS, Purpose(backend=backend, missing_bytes=40 * GIB), expected, id=words)
            for backend, expected, words in (
                ("llama.cpp", [], "only the folder that is fetched to must hold it"),
                (None, ["warn"], "whatever the engine, Ollama's folder holds none of it"),
                ("ollama", ["fail"], "Ollama's folder must hold it for Ollama"),
            )
        ),
        pytest.param("disk-models", disk(free_bytes=15 * GIB), Purpose(), ["warn"], id="15 GiB are little"),
        pytest.param(
            "disk-models",
            disk("Ollama models", free_bytes=15 * GIB),
            VLLM,
            ["skip"],
            id="another engine's folder is not judged, and its own was not read",
        ),
        pytest.param("disk-models", disk(file_system="nfs4"), Purpose(), ["warn"], id="on the network"),
        pytest.param("disk-models", disk(rotational=True), Purpose(), ["warn"], id="a hard disk"),
        pytest.param(
            "disk-models",
            changed_machine(disk(rotational=True), host={"virtualisation": "kvm"}),
            Purpose(),
            [],
            id="a virtual disk says at random that it turns",
        ),
        pytest.param(
            "disk-models",
            changed_machine(disk(rotational=True), host={"container": "docker"}),
            Purpose(),
            ["info"],
            id="a hard disk below a container",
        ),
        pytest.param("disk-models", disk(free_bytes=None), Purpose(), ["skip"], id="free space unread"),
    ],
)
def test_memory_is_judged(check: str, inspection: Inspection, purpose: Purpose, expected: list[str]) -> None:
    assert said(memory.CHECKS, check, inspection, purpose) == expected


def test_folders_on_one_disk_are_judged_once() -> None:
    full = [
        DiskSpace(
            role=role, path=f"/{role}", free_bytes=GIB, total_bytes=90 * GIB, file_system="ext4", rotational=False
        )
        for role in ("Hugging Face cache", "mgpu models", "Ollama models")
    ]
    assert said(memory.CHECKS, "disk-models", healthy(host={"disks": tuple(full)})) == ["warn"]


def test_the_processes_that_hold_the_memory_are_the_evidence() -> None:
    (finding,) = memory.vram_in_use.run(taken(700 * MIB, DESKTOP), Purpose())
    assert isinstance(finding, Finding)
    assert [(each.path, each.value) for each in finding.evidence] == [
        ("memory of GPU0", "0.69 GiB in use"),
        ("process 900 (Xorg)", "0.68 GiB"),
    ]


def test_processes_that_the_driver_does_not_list_are_not_looked_for() -> None:
    (finding,) = memory.vram_in_use.run(untold(3 * GIB), Purpose())
    assert isinstance(finding, Finding)
    assert finding.summary == "3.00 GiB of GPU0 are in use; by whom, the driver does not tell here"
    assert (finding.fix, finding.needs_root) == ((), False)
    full = changed_card(changed_gpu(untold(3 * GIB), 1, free_bytes=0), 1, used_by_known=False)
    (both,) = memory.vram_in_use.run(full, VLLM)
    assert isinstance(both, Finding)
    assert both.summary.startswith("3.00 GiB to 23.5 GiB of GPU0,1 are")


def test_a_desktop_without_cards_has_no_memory_of_cards_to_judge() -> None:
    checks = ("vram-in-use", "display-on-gpu", "ecc-vram", "ram-swap")
    assert [said(memory.CHECKS, check, bare()) for check in checks] == [[], [], [], []]


@pytest.mark.parametrize(
    ("inspection", "fix"),
    [
        pytest.param(taken(9 * GIB, ENGINE), ("kill 4711  # llama-server",), id="an engine that somebody started"),
        pytest.param(
            changed(taken(9 * GIB, ENGINE), mgpu_processes=(4711,)),
            ("end llama-server (process 4711) with Ctrl-C in the terminal of its mgpu run",),
            id="an engine of mgpu, which would start it again",
        ),
        pytest.param(
            taken(9 * GIB, *(GpuProcess(pid=pid, name="ollama", bytes=9 * GIB // 2) for pid in (77, 78))),
            ("ollama stop MODEL  # ollama ps lists them; or all of it: sudo systemctl stop ollama",),
            id="Ollama, whose service starts them again",
        ),
        *(
            pytest.param(
                taken(9 * GIB, GpuProcess(pid=900, name=name, bytes=9 * GIB), display=True),
                ("plug the monitor into the mainboard, or log out of the desktop",),
                id=f"{name} is the desktop",
            )
            for name in ("Xorg", "gnome-shell", "kwin_wayland", "plasmashell", "Xwayland", "sway")
        ),
        pytest.param(
            taken(10 * GIB, ENGINE, DESKTOP, GpuProcess(pid=901, name="firefox", bytes=GIB), display=True),
            (
                "kill 4711  # llama-server",
                "close firefox (process 901)",
                "plug the monitor into the mainboard, or log out of the desktop",
            ),
            id="an engine beside a desktop",
        ),
        pytest.param(
            taken(9 * GIB, GpuProcess(pid=7, bytes=9 * GIB)), ("kill 7",), id="a process whose name is not told"
        ),
        pytest.param(taken(9 * GIB, display=True), ("sudo fuser -v /dev/nvidia*",), id="nobody is listed"),
        pytest.param(inside(9 * GIB), ("sudo fuser -v /dev/nvidia*  # on the host",), id="nobody, in a container"),
        pytest.param(inside(23 * GIB), ("sudo fuser -v /dev/nvidia*  # on the host",), id="nobody, and it is full"),
    ],
)
def test_who_holds_memory_is_ended_in_a_way_of_its_own(inspection: Inspection, fix: tuple[str, ...]) -> None:
    (finding,) = memory.vram_in_use.run(inspection, VLLM)
    assert isinstance(finding, Finding)
    assert finding.fix == fix
