"""The order of cards in llama.cpp's layer split: what mgpu chooses, what the user said, and what is launched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mgpu.backends.backend import Serving
from mgpu.backends.llama_cpp import build_launch
from mgpu.machine.simulate import simulate
from mgpu.machine.snapshot import Gpu, Machine, PcieLink
from mgpu.models.shape import facts_from_shape
from mgpu.planning.candidates import Candidate
from mgpu.planning.plan import make_plan
from mgpu.planning.wants import Wants
from tests.fakes.shapes import SHAPES

SERVING = Serving(program=Path("/l"), model="m.gguf", name="m", host="127.0.0.1", port=8080, folder=Path("/m"))
NOT_LAST = "gpu1 (PCIe 3.0 x1, 1.0 GB/s) is not last: 501 KiB a token leave the last card"


def rig(cards: str, *lanes: int, display: int | None = None) -> Machine:
    """Cards in PCIe 3.0 slots of so many lanes."""

    def built_in(gpu: Gpu, width: int) -> Gpu:
        return replace(
            gpu,
            uuid=f"GPU-{gpu.index}",
            pcie=PcieLink(gen_max=3, width=width),
            display=gpu.index == display,
            engine_devices=(f"CUDA{gpu.index}",),
        )

    machine = simulate(cards)
    gpus = tuple(built_in(gpu, width) for gpu, width in zip(machine.gpus, lanes, strict=True))
    return replace(machine, gpus=gpus)


def layer_split(machine: Machine, wants: Wants) -> Candidate:
    facts = facts_from_shape("m", SHAPES["llama-3.3-70b"], "Q4_K_M")
    return make_plan(facts, machine, machine.gpus, wants).candidates[0]


@pytest.mark.parametrize(
    ("machine", "wants", "order", "reasons"),
    [
        pytest.param(rig("2x4090", 16, 1), Wants(), [1, 0], [NOT_LAST], id="the slow card first"),
        pytest.param(rig("2x4090", 16, 16), Wants(), [0, 1], [], id="links that are alike"),
        pytest.param(rig("2x4090", 16, 16, display=1), Wants(), [0, 1], [], id="a display takes memory, no order"),
        pytest.param(rig("2x4090", 16, 1), Wants(keep_order=True), [0, 1], [], id="the order that the user said"),
        pytest.param(rig("2x4090", 16, 1), Wants(tensor_split=(1, 1)), [0, 1], [], id="shares that the user gave"),
        pytest.param(
            rig("2x4090", 16, 1), Wants(split_mode="tensor", ctx_tokens=2048), [0, 1], [], id="a tensor split"
        ),
        pytest.param(rig("4090+5090", 16, 16), Wants(), [0, 1], [], id="unequal cards on their own"),
    ],
)
def test_the_order_of_the_cards(machine: Machine, wants: Wants, order: list[int], reasons: list[str]) -> None:
    found = layer_split(machine, wants)
    assert found.verdict == "fits"
    assert [device.gpu for device in found.devices] == order
    assert [reason for reason in found.reasons if "last" in reason or "first" in reason] == reasons
    assert found.devices[0].first_layer == 0
    assert found.speed.decode_tok_s
    launch = build_launch(found, SERVING)
    assert launch.env["CUDA_VISIBLE_DEVICES"] == ",".join(f"GPU-{index}" for index in order)
    assert launch.argv[launch.argv.index("-dev") + 1] == "CUDA0,CUDA1"


@pytest.mark.parametrize(
    ("machine", "order"),
    [
        pytest.param(rig("2x4080", 1, 16), [1, 0], id="what lies on the host does not arrive over one lane"),
        pytest.param(rig("2x4080", 16, 1), [0, 1], id="the fast link is first already"),
        pytest.param(rig("3060+4090", 16, 16), [1, 0], id="the card that computes fastest"),
    ],
)
def test_the_first_card_computes_what_is_on_the_host(machine: Machine, order: list[int]) -> None:
    found = layer_split(machine, Wants(offload=True))
    assert found.verdict == "fits-with-offload"
    assert [device.gpu for device in found.devices] == order
    assert any("comes first" in reason for reason in found.reasons) == (order == [1, 0])


def test_a_lowered_context_keeps_its_reasons_and_the_order() -> None:
    machine = rig("2x4090", 16, 1)
    tight = replace(machine, gpus=tuple(replace(gpu, free_bytes=21 * 2**30 + 2**29) for gpu in machine.gpus))
    found = layer_split(tight, Wants())
    assert [device.gpu for device in found.devices] == [1, 0]
    assert found.reasons[0].startswith("context lowered from 8192 to ")
    assert found.reasons[-1] == NOT_LAST


def test_the_order_costs_no_room() -> None:
    swapped, kept = (layer_split(rig("2x4090", 16, 1), Wants(keep_order=keep)) for keep in (False, True))
    assert swapped.verdict == kept.verdict == "fits"
    assert [device.total_bytes for device in swapped.devices] == [device.total_bytes for device in kept.devices]
    assert swapped.max_ctx_tokens == kept.max_ctx_tokens
