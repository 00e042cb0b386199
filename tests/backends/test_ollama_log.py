"""Ollama's log, both generations of it: cards found, runners started, memory on the planned cards."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.backends.backend import DeviceMemory
from mgpu.backends.ollama_log import found_devices, memory, phase, planned_runner, runner_port, runners

from . import recorded_ollama as recorded
from .planned_ollama import planned

MIB = 1 << 20


def mib(*sizes: float | None) -> DeviceMemory:
    weights, kv, compute = (None if size is None else round(size * MIB) for size in sizes)
    return DeviceMemory(weights_bytes=weights, kv_bytes=kv, compute_bytes=compute)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        pytest.param("spread", [("0", "0", "Vulkan", "Vulkan0"), ("1", "0", "Vulkan", "Vulkan1")], id="two cards"),
        pytest.param("one", [("0", "0", "Vulkan", "Vulkan0")], id="one card"),
        pytest.param("cpu", [], id="no card"),
        pytest.param("badvk", [], id="a wrong index among right ones leaves no card"),
        pytest.param("nollama", [], id="an installation without llama-server"),
    ],
)
def test_cards_are_those_of_the_inference_compute_lines(name: str, found: list[tuple[str, ...]]) -> None:
    devices = found_devices(recorded.lines(name))
    assert devices is not None
    assert [(device.id, device.visible_as, device.library, device.name) for device in devices] == found


def test_before_the_cards_were_looked_for_nothing_is_known_of_them() -> None:
    before = [line for line in recorded.lines("spread") if "inference compute" not in line]
    assert found_devices(before) is None
    assert found_devices([]) is None


def test_after_a_restart_the_cards_of_the_last_start_count() -> None:
    assert found_devices(recorded.lines("spread") + recorded.lines("badvk")) == ()
    again = found_devices(recorded.lines("badvk") + recorded.lines("one"))
    assert again is not None
    assert len(again) == 1


@pytest.mark.parametrize(
    ("name", "held"),
    [
        pytest.param("spread", {0: mib(33.82, 48, 31.79), 1: mib(58.28, 42, 31.79)}, id="spread over two cards"),
        pytest.param("tsplit", {0: mib(50.73, 72, 31.79), 1: mib(41.37, 18, 31.79)}, id="a tensor split of 3,1"),
        pytest.param("kvq8b", {0: mib(33.82, 25.5, 31.91), 1: mib(58.28, 22.31, 31.91)}, id="a quantised cache"),
        pytest.param("autospread", {0: mib(29.59, 840, 85.35), 1: mib(60.4, 900, 38.75)}, id="one layer in RAM"),
        pytest.param("vk2", {0: mib(92.1, 90, 15.26)}, id="all on the first card"),
        pytest.param(
            "maingpu1", {1: mib(92.1, 90, 15.26)}, id="all on the second card, which its runner calls Vulkan0"
        ),
        pytest.param("tensor", {0: mib(60.46, 45, 16.38), 1: mib(60.46, 45, 16.38)}, id="both in tensor mode"),
        pytest.param("cpu", {}, id="a CPU's AMX buffer is no card"),
        pytest.param("badvk", {}, id="a silent fall-back to the CPU"),
        pytest.param("numgpu0", {}, id="no layer on any card"),
        pytest.param("kvq8", {}, id="a load that failed"),
        pytest.param("pull", {}, id="nothing loaded"),
    ],
)
def test_memory_is_given_to_the_planned_card_that_holds_it(name: str, held: dict[int, DeviceMemory]) -> None:
    assert memory(recorded.lines(name), planned()) == held


def test_cards_left_out_of_the_plan_are_not_visible_to_ollama_and_not_counted() -> None:
    candidate = planned(("Vulkan0", "Vulkan1", "Vulkan2"), (16, 0, 14))
    assert sorted(memory(recorded.lines("spread"), candidate)) == [0, 2]


def test_the_old_format_names_cards_by_uuid() -> None:
    candidate = planned(("CUDA0", "CUDA1"), (24, 24), uuids=("GPU-bbbb", "GPU-aaaa"))
    assert memory(recorded.OLD, candidate) == {
        0: mib(11.9 * 1024, 960, 270.6),
        1: mib(11.5 * 1024, 1024, 884.1),
    }


def test_in_the_old_format_a_runner_on_one_of_two_cards_is_known_by_its_layers() -> None:
    lines = [
        line.replace(
            "49[ID:GPU-aaaa Layers:25(0..24) ID:GPU-bbbb Layers:24(25..48)]", "49[ID:GPU-bbbb Layers:49(0..48)]"
        )
        for line in recorded.OLD
        if "device=CUDA1" not in line
    ]
    candidate = planned(("CUDA0", "CUDA1"), (24, 24), uuids=("GPU-aaaa", "GPU-bbbb"))
    assert list(memory(lines, candidate)) == [1]


def test_the_old_formats_runner_without_a_model_is_not_one() -> None:
    (runner,) = runners(recorded.OLD)
    assert (runner.model, runner.layers, runner.of_layers) == ("/var/models/blobs/sha256-60e0", 49, 49)
    assert runner_port(recorded.OLD) is None, "it has no counters"


def test_three_models_are_three_runners_and_the_first_one_is_the_planned() -> None:
    started = runners(recorded.lines("three"))
    assert [runner.port for runner in started] == [43411, 43349, 46193]
    assert [[device.id for device, _ in runner.cards] for runner in started] == [["0"], ["1"], ["1"]]
    runner = planned_runner(recorded.lines("three"))
    assert runner is not None
    assert runner.port == 43411


def test_a_model_loaded_again_counts_as_it_was_loaded_last() -> None:
    assert [runner.port for runner in runners(recorded.lines("rk"))] == [41613, 46167]
    assert runner_port(recorded.lines("rk")) == 46167


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        pytest.param("spread", (31, 31), id="all"),
        pytest.param("fittarget", (26, 31), id="a margin leaves some in RAM"),
        pytest.param("numgpu10", (10, 31), id="as many as were asked for"),
        pytest.param("cpu", (31, 31), id="all, it says, where there is no card"),
    ],
)
def test_layers_are_those_ollama_claims(name: str, layers: tuple[int, int]) -> None:
    runner = planned_runner(recorded.lines(name))
    assert runner is not None
    assert (runner.layers, runner.of_layers) == layers


def test_a_load_is_told_phase_by_phase() -> None:
    told = [words for line in recorded.lines("spread") if (words := phase(line))]
    assert list(dict.fromkeys(told)) == [
        "looking for cards",
        "starting the model's llama-server",
        "reading header",
        "loading weights",
        "allocating KV cache",
        "reserving compute buffers",
        "warming up",
    ]


@given(st.lists(st.text(max_size=200) | st.sampled_from(recorded.lines("spread") + recorded.OLD), max_size=30))
def test_no_line_is_too_strange_to_be_read(lines: list[str]) -> None:
    found_devices(lines)
    memory(lines, planned())
    runner_port(lines)
    for line in lines:
        phase(line)
