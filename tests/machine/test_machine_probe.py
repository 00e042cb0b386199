from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from mgpu.machine.probe import probe, with_engine_devices
from mgpu.machine.simulate import simulate
from mgpu.machine.snapshot import EngineDevice, Gpu, Machine, machine_from_json
from tests.fakes.sysfs_tree import tree_of_rig

GIB = 1024**3
RIG = Path(__file__).parents[1] / "machines/rigs/2x4090-one-lost.txt"
AMD = "sys/devices/pci0000:00/0000:00:08.0/0000:0c:00.0"


def test_a_machine_joins_every_makers_cards_under_one_numbering(
    run_python: Callable[..., str], tree: Callable[..., Path]
) -> None:
    root = tree(
        {
            "proc/sys/kernel/osrelease": "6.8\n",
            f"{AMD}/vendor": "0x1002\n",
            f"{AMD}/device": "0x744c\n",
            f"{AMD}/revision": "0xc8\n",
        },
        {"sys/class/drm/card0/device": AMD},
    )
    program = (
        "import json\nfrom mgpu.machine.probe import probe\nfrom mgpu.machine.snapshot import to_json\n"
        "print(json.dumps(to_json(probe())))"
    )
    machine = machine_from_json(json.loads(run_python(program, FAKE_NVML=str(RIG), MGPU_ROOT=str(root))))
    assert machine.source == "probed"
    assert machine.host.kernel == "6.8"
    assert machine.driver is not None
    assert [(gpu.index, gpu.vendor, gpu.problem is None) for gpu in machine.gpus] == [
        (0, "nvidia", True),
        (1, "nvidia", False),
        (2, "amd", True),
    ]


def test_an_empty_root_is_a_machine_without_cards_or_facts(tmp_path: Path) -> None:
    machine = probe(tmp_path)
    assert datetime.fromisoformat(machine.captured_at).utcoffset() is not None
    assert machine.host.kernel is None
    assert [gpu for gpu in machine.gpus if gpu.vendor == "amd"] == []


HUNG = """
import os, sys
import mgpu.machine.nvidia
mgpu.machine.nvidia._PATIENCE_S = mgpu.machine.nvidia._PATIENCE_PER_CARD_S = 0.2
if sys.argv[1:]:
    from mgpu.cli.main import run_main
    run_main()
import json
from mgpu.machine.patience import is_awaited
from mgpu.machine.probe import probe
from mgpu.machine.snapshot import to_json
print(json.dumps([is_awaited(), to_json(probe()), is_awaited()]), flush=True)
os._exit(0)
"""


@pytest.fixture
def hung(run_python: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """hung(*words) runs mgpu, or without words prints what `probe` gives, where the driver hangs at the first
    question."""
    tree = tree_of_rig(tmp_path / "root", RIG.with_stem("2x4090-x670e"))
    os.mkfifo(tmp_path / "rig")  # the fake library opens it, and nobody ever writes to it
    return lambda *words: run_python(HUNG, *words, FAKE_NVML=str(tmp_path / "rig"), MGPU_ROOT=str(tree.root))


def test_a_driver_that_hangs_costs_seconds_and_its_cards_alone(hung: Callable[..., str]) -> None:
    before, data, after = json.loads(hung())
    machine = machine_from_json(data)
    assert (before, after) == (False, True)
    assert (machine.host.kernel, machine.links) == ("6.8.0-90-generic", ())
    assert machine.driver is not None
    assert machine.driver.version == "580.126.20"
    for words in ("hangs", "NVML did not answer", "mgpu doctor", "reboot"):
        assert words in (machine.driver.problem or "")
    assert [(gpu.name, gpu.bus_id) for gpu in machine.gpus] == [
        ("NVIDIA GPU [10de:2684]", "0000:01:00.0"),
        ("NVIDIA GPU [10de:2684]", "0000:02:00.0"),
    ]
    assert all(gpu.problem for gpu in machine.gpus)


@pytest.mark.parametrize("words", [("gpus",), ("plan", "llama-70b", "--json")], ids=["gpus", "plan"])
def test_a_command_answers_beside_a_driver_that_hangs(hung: Callable[..., str], words: tuple[str, ...]) -> None:
    assert "NVML did not answer" in hung(*words)


def device(name: str, description: str, total_gib: float = 24, free_gib: float = 23) -> EngineDevice:
    return EngineDevice(
        id=name, description=description, total_bytes=int(total_gib * GIB), free_bytes=int(free_gib * GIB)
    )


def machine(*names: str) -> Machine:
    """Cards of 24 GiB in the order of their bus; a name ending in "!" is of a lost card."""
    gpus = (
        Gpu(
            index=index,
            vendor="amd" if "AMD" in name else "nvidia",
            name=name.rstrip("!"),
            uuid=f"GPU-{index}",
            bus_id=f"0000:{index + 1:02x}:00.0",
            total_bytes=24 * GIB,
            free_bytes=20 * GIB,
            problem="fell off the bus" if name.endswith("!") else None,
        )
        for index, name in enumerate(names)
    )
    return Machine(captured_at="", source="probed", gpus=tuple(gpus))


RTX_4090, RTX_3090, XTX = "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 3090", "AMD Radeon RX 7900 XTX"
UNNAMED, IGPU = "AMD GPU [1002:744c]", "AMD Radeon 610M"


@pytest.mark.parametrize(
    ("cards", "devices", "names"),
    [
        pytest.param(
            [RTX_4090, RTX_4090],
            [device("CUDA0", RTX_4090), device("CUDA1", RTX_4090)],
            [["CUDA0"], ["CUDA1"]],
            id="CUDA in bus order",
        ),
        pytest.param(
            [RTX_3090, RTX_4090],
            [device("CUDA0", RTX_4090), device("CUDA1", RTX_3090)],
            [["CUDA1"], ["CUDA0"]],
            id="CUDA, fastest first",
        ),
        pytest.param([RTX_4090, RTX_3090], [device("CUDA0", RTX_3090)], [[], ["CUDA0"]], id="CUDA with a card hidden"),
        pytest.param(
            [RTX_4090 + "!", RTX_4090], [device("CUDA0", RTX_4090)], [[], ["CUDA0"]], id="a lost card is passed over"
        ),
        pytest.param(
            [RTX_4090, UNNAMED], [device("ROCm0", XTX), device("CUDA0", "?")], [["CUDA0"], ["ROCm0"]], id="two makers"
        ),
        pytest.param(
            [RTX_3090, XTX, RTX_3090],
            [
                device("Vulkan0", "AMD Radeon RX 7900 XTX (RADV NAVI31)"),
                device("Vulkan1", RTX_3090),
                device("Vulkan2", RTX_3090),
            ],
            [["Vulkan1"], ["Vulkan0"], ["Vulkan2"]],
            id="Vulkan by description, equal cards in order",
        ),
        pytest.param(
            [RTX_4090],
            [device("CUDA0", RTX_4090), device("Vulkan0", RTX_4090)],
            [["CUDA0", "Vulkan0"]],
            id="one name of each kind",
        ),
        pytest.param(
            [IGPU, UNNAMED],
            [device("Vulkan0", "AMD Radeon Graphics (RADV NAVI44)", 24)],
            [[], ["Vulkan0"]],
            id="cards that no catalogue names",
        ),
        pytest.param([RTX_4090], [device("GPU-0", RTX_4090)], [["GPU-0"]], id="by UUID"),
    ],
)
def test_an_engines_devices_are_joined_to_cards(
    cards: list[str], devices: list[EngineDevice], names: list[list[str]]
) -> None:
    # The unnamed cards differ in size so that the nearest can be told.
    before = machine(*cards)
    gpus = [dataclasses.replace(g, total_bytes=GIB // 2) if g.name == IGPU else g for g in before.gpus]
    joined = with_engine_devices(dataclasses.replace(before, gpus=tuple(gpus)), devices, backend="llama.cpp")
    assert [list(gpu.engine_devices) for gpu in joined.gpus] == names
    assert {gpu.free_bytes for gpu in joined.gpus} == {20 * GIB}  # the driver's reading, not the engine's


@pytest.mark.parametrize(
    ("devices", "added"),
    [
        pytest.param(
            [device("RPC0", "127.0.0.1:8290"), device("RPC1", "127.0.0.1:8290")],
            [("other", "127.0.0.1:8290", ("RPC0",), None), ("other", "127.0.0.1:8290", ("RPC1",), None)],
            id="two devices behind one server",
        ),
        pytest.param(
            [device("RPC0", RTX_4090)], [("other", RTX_4090, ("RPC0",), None)], id="a remote card is not ours"
        ),
        pytest.param(
            [device("Vulkan0", "llvmpipe (LLVM 15.0.6, 256 bits)", 2)],
            [("other", "llvmpipe (LLVM 15.0.6, 256 bits)", ("Vulkan0",), None)],
            id="a software renderer",
        ),
        pytest.param(
            [device("Vulkan0", "Intel(R) Arc(TM) A770 Graphics", 16)],
            [("intel", "Intel(R) Arc(TM) A770 Graphics", ("Vulkan0",), 512.0)],
            id="an Intel card",
        ),
        pytest.param(
            [device("CUDA0", RTX_4090), device("CUDA1", RTX_3090), device("Vulkan0", RTX_3090)],
            [("other", RTX_3090, ("CUDA1", "Vulkan0"), None)],
            id="a card that no driver reported, under two names",
        ),
        pytest.param([device("XPU0", "\x1b")], [("other", "llama.cpp device XPU0", ("XPU0",), None)], id="no name"),
    ],
)
def test_what_only_the_engine_knows_is_added(
    devices: list[EngineDevice], added: list[tuple[str, str, tuple[str, ...], float | None]]
) -> None:
    joined = with_engine_devices(machine(RTX_4090), devices, backend="llama.cpp")
    new = joined.gpus[1:]
    assert [(gpu.vendor, gpu.name, gpu.engine_devices, gpu.bandwidth_gb_s) for gpu in new] == added
    assert [gpu.index for gpu in joined.gpus] == list(range(len(joined.gpus)))
    assert {(gpu.uuid, gpu.free_bytes) for gpu in new} == {(None, 23 * GIB)}
    assert with_engine_devices(joined, devices, backend="llama.cpp") == joined


def test_memory_that_the_driver_did_not_tell_is_the_engines() -> None:
    bare = machine(RTX_4090)
    unknown = dataclasses.replace(bare.gpus[0], total_bytes=None, free_bytes=None)
    devices = [device("CUDA0", RTX_4090, 24, 22)]
    (gpu,) = with_engine_devices(dataclasses.replace(bare, gpus=(unknown,)), devices, backend="vllm").gpus
    assert (gpu.total_bytes, gpu.free_bytes) == (24 * GIB, 22 * GIB)


def test_a_simulated_machine_already_has_its_names() -> None:
    before = simulate("4090+7900xtx")
    devices = [device("CUDA0", RTX_4090), device("ROCm0", XTX)]
    assert with_engine_devices(before, devices, backend="llama.cpp") == before


@pytest.mark.parametrize(
    ("name", "engine_gib", "expected_gib"),
    [
        pytest.param("AMD Radeon 8060S", 96, (96, 90), id="shared memory is more than what was set aside"),
        pytest.param("AMD Radeon 8060S", 0.7, (0.5, 0.25), id="about the same: the driver is right"),
        pytest.param(XTX, 96, (0.5, 0.25), id="a card has its own memory alone"),
    ],
)
def test_an_amd_gpu_that_shares_memory_has_what_the_engine_can_use(
    name: str, engine_gib: float, expected_gib: tuple[float, float]
) -> None:
    before = machine(name)
    set_aside = dataclasses.replace(before.gpus[0], total_bytes=GIB // 2, free_bytes=GIB // 4)
    devices = [device("ROCm0", "AMD Radeon Graphics", engine_gib, 90)]
    joined = with_engine_devices(dataclasses.replace(before, gpus=(set_aside,)), devices, backend="llama.cpp")
    (gpu,) = joined.gpus
    assert gpu.total_bytes is not None
    assert gpu.free_bytes is not None
    assert (gpu.total_bytes / GIB, gpu.free_bytes / GIB) == expected_gib
    assert with_engine_devices(joined, devices, backend="llama.cpp") == joined


def test_an_integrated_gpu_that_only_the_engine_knows_is_marked() -> None:
    devices = [device("Vulkan0", "Intel(R) UHD Graphics 770 (ADL-S GT1)", 62), device("Vulkan1", RTX_4090)]
    joined = with_engine_devices(machine(RTX_4090), devices, backend="llama.cpp")
    assert [(gpu.engine_devices, gpu.integrated) for gpu in joined.gpus] == [(("Vulkan1",), None), (("Vulkan0",), True)]


@pytest.mark.parametrize(
    ("engine_free_gib", "expected"),
    [
        pytest.param((23, 5), [["Vulkan1"], ["Vulkan0"]], id="the busy card is the first"),
        pytest.param((5, 23), [["Vulkan0"], ["Vulkan1"]], id="the busy card is the second"),
        pytest.param((24, 24), [["Vulkan0"], ["Vulkan1"]], id="an engine that cannot tell: in order"),
        pytest.param((14.2, 14.1), [["Vulkan0"], ["Vulkan1"]], id="not clearly nearer: in order"),
    ],
)
def test_equal_cards_are_told_apart_by_their_free_memory(
    engine_free_gib: tuple[float, float], expected: list[list[str]]
) -> None:
    before = machine(XTX, XTX)
    gpus = [dataclasses.replace(gpu, free_bytes=free * GIB) for gpu, free in zip(before.gpus, (5, 23), strict=True)]
    devices = [device(f"Vulkan{index}", XTX, 24, free) for index, free in enumerate(engine_free_gib)]
    joined = with_engine_devices(dataclasses.replace(before, gpus=tuple(gpus)), devices, backend="llama.cpp")
    assert [list(gpu.engine_devices) for gpu in joined.gpus] == expected
    assert with_engine_devices(joined, devices, backend="llama.cpp") == joined
