"""Whether Ollama did what was planned: recorded runs against plans they meet or miss."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from mgpu.backends.ollama_placement import LoadedModel, missing_devices, verify_placement
from mgpu.planning.candidates import Candidate
from mgpu.planning.wants import Wants

from . import recorded_ollama as recorded
from .planned_ollama import MIB, planned

ONE = planned(("Vulkan0",), (30,))
CPU = planned((), ())


def listed(name: str) -> LoadedModel:
    model: dict[str, Any] = json.loads(recorded.text(name))["models"][0]
    return LoadedModel(
        name=model["name"],
        size_bytes=model["size"],
        size_vram_bytes=model["size_vram"],
        ctx_tokens=model["context_length"],
    )


@pytest.mark.parametrize(
    ("name", "candidate", "complaints"),
    [
        pytest.param("spread", planned(), [], id="spread as planned"),
        pytest.param("tsplit", planned(layers=(24, 6)), [], id="dealt as planned"),
        pytest.param("tensor", planned(split_mode="tensor"), [], id="tensor mode on both cards"),
        pytest.param("fit1", planned(ctx_tokens=8192), [], id="a margin that lets all layers on the cards"),
        pytest.param("one", ONE, [], id="one card, as planned"),
        pytest.param("cpu", CPU, [], id="the CPU, as planned"),
        pytest.param("maingpu1", ONE, ["is not in the plan", "gpu0 does not hold its part"], id="another card"),
        pytest.param("vk2", planned(), ["whole model is on gpu0; gpu1 holds nothing .*SCHED_SPREAD"], id="one of two"),
        pytest.param("maingpu1", planned(), ["whole model is on gpu1; gpu0 holds nothing"], id="the second of two"),
        pytest.param(
            "badvk",
            planned(),
            ["found no card .* CPU; asked for: gpu0 and gpu1", "whole model is in RAM"],
            id="a silent fall-back to the CPU",
        ),
        pytest.param("cpu", ONE, ["found no card", "whole model is in RAM"], id="a CPU that calls itself a GPU"),
        pytest.param("one", planned(), ["did not find gpu1", "whole model is on gpu0"], id="one card found of two"),
        pytest.param("numgpu0", planned(), ["whole model is in RAM"], id="no layer on the cards that are there"),
        pytest.param(
            "fittarget",
            planned(),
            [r"only 26 of 31 .* 31 were planned.*FIT_TARGET=256"],
            id="fewer layers than planned",
        ),
        pytest.param("autospread", planned(ctx_tokens=8192), ["only 30 of 31"], id="one layer fewer"),
        pytest.param("numgpu10", planned(layers=(5, 4)), [], id="few layers, as planned"),
        pytest.param("pull", planned(), ["found no card", "does not say on which cards"], id="nothing loaded"),
        pytest.param("kvq8", planned(), ["does not say on which cards"], id="a load that failed"),
    ],
)
def test_a_recorded_run_is_held_against_its_plan(name: str, candidate: Candidate, complaints: list[str]) -> None:
    found = verify_placement(candidate, recorded.lines(name))
    assert len(found) == len(complaints), found
    for complaint, pattern in zip(found, complaints, strict=True):
        assert re.search(pattern, complaint), complaint


@pytest.mark.parametrize("name", ["spread", "tensor", "one", "cpu", "vk2"])
def test_no_amount_of_claimed_card_memory_changes_the_verdict(name: str) -> None:
    claims = LoadedModel(name="x", size_bytes=100, size_vram_bytes=100, ctx_tokens=4096)
    denies = LoadedModel(name="x", size_bytes=100, size_vram_bytes=0, ctx_tokens=4096)
    lines = recorded.lines(name)
    assert verify_placement(planned(), lines, claims) == verify_placement(planned(), lines, denies)
    assert verify_placement(planned(), lines, claims) == verify_placement(planned(), lines)


def test_what_ps_says_on_a_machine_without_a_card_is_not_believed() -> None:
    lying = listed("ps_cpu.json")
    assert lying.size_vram_bytes == lying.size_bytes
    assert verify_placement(ONE, recorded.lines("cpu"), lying)


@pytest.mark.parametrize(
    ("ctx_tokens", "why"),
    [
        pytest.param(8192, "4096 tokens .* instead of the 8192 planned: Ollama lowers it", id="less than planned"),
        pytest.param(2048, "4096 tokens .* instead of the 2048 planned: the model brings its own", id="more"),
    ],
)
def test_another_context_than_planned_is_told(ctx_tokens: int, why: str) -> None:
    (complaint,) = verify_placement(planned(ctx_tokens=ctx_tokens), recorded.lines("spread"), listed("spread_ps.json"))
    assert re.search(why, complaint)


def test_the_headroom_that_is_to_blame_is_named() -> None:
    candidate = planned(wants=Wants(headroom_bytes=1950 * MIB))
    (complaint,) = verify_placement(candidate, recorded.lines("fittarget"))
    assert "1.90 GiB free on each card (LLAMA_ARG_FIT_TARGET=1950)" in complaint


@pytest.mark.parametrize(
    ("name", "candidate", "problem"),
    [
        pytest.param("spread", planned(), None, id="all there"),
        pytest.param("pull", CPU, None, id="none asked for"),
        pytest.param("badvk", planned(), "found no card", id="none found"),
        pytest.param("one", planned(), "did not find gpu1; it sees only llvmpipe", id="one found of two"),
    ],
)
def test_missing_cards_are_told_before_anything_is_loaded(name: str, candidate: Candidate, problem: str | None) -> None:
    lines = recorded.lines(name)
    start = next(i for i, line in enumerate(lines) if "vram-based default context" in line)
    found = missing_devices(candidate, lines[: start + 1])
    assert (found is None) is (problem is None)
    assert problem is None or (found and problem in found)


def test_a_uuid_that_is_not_found_is_missed_even_when_as_many_cards_are_there() -> None:
    candidate = planned(("CUDA0", "CUDA1"), (24, 24), uuids=("GPU-aaaa", "GPU-cccc"))
    assert missing_devices(candidate, recorded.OLD) is not None
