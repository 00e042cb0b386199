"""Slow links: which they are, and which card of a layer split comes first and last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from mgpu.machine.snapshot import Gpu, NvLinkPort, PcieLink
from mgpu.models.shape import facts_from_shape
from mgpu.planning.links import is_slow, layer_order, link_gb_s, link_words
from tests.fakes.shapes import SHAPES

NVLINK = (NvLinkPort(port=0, active=True),)


def card(index: int, gen: int | None, lanes: int | None, *, nvlink: tuple[NvLinkPort, ...] = ()) -> Gpu:
    return Gpu(index=index, vendor="nvidia", name="card", pcie=PcieLink(gen_max=gen, width=lanes), nvlink=nvlink)


@pytest.mark.parametrize(
    ("gpu", "rate", "slow"),
    [
        pytest.param(card(0, 3, 1), 0.985, True, id="a riser of one lane"),
        pytest.param(card(0, 3, 4), 3.94, True, id="a chipset slot of PCIe 3.0"),
        pytest.param(card(0, 4, 4), 7.876, False, id="four lanes of PCIe 4.0 cost 1 %"),
        pytest.param(card(0, 4, 16), 31.504, False, id="a whole slot"),
        pytest.param(card(0, None, 16), None, False, id="an unknown generation"),
        pytest.param(card(0, 4, None), None, False, id="unknown lanes"),
        pytest.param(card(0, 9, 1), None, False, id="a generation that is not known yet"),
        pytest.param(card(0, 3, 1, nvlink=NVLINK), 0.985, False, id="NVLink is used instead"),
    ],
)
def test_which_links_are_slow(gpu: Gpu, rate: float | None, slow: bool) -> None:
    assert link_gb_s(gpu) == (None if rate is None else pytest.approx(rate, rel=1e-3))
    assert is_slow(gpu) == slow


def test_the_slot_tells_where_the_card_does_not() -> None:
    gpu = Gpu(index=0, vendor="amd", name="card", pcie=PcieLink(gen_max=3, slot_width=1))
    assert is_slow(gpu)
    assert link_words(gpu) == "PCIe 3.0 x1, 1.0 GB/s"


def order_of(gpus: Sequence[Gpu], *, vocabulary: int = 128_256, on_host: bool = False) -> tuple[list[int], str]:
    """The cards in the order of a layer split, and why it is another than theirs."""
    facts = replace(facts_from_shape("m", SHAPES["llama-3.1-8b"], "Q4_K_M"), vocabulary=vocabulary)
    order = layer_order(gpus, facts, on_host=on_host)
    return ([gpu.index for gpu in order.gpus], order.why) if order else ([gpu.index for gpu in gpus], "")


@pytest.mark.parametrize(
    ("lanes", "vocabulary", "order", "why"),
    [
        pytest.param(
            (16, 16, 1),
            128_256,
            [2, 0, 1],
            "gpu2 (PCIe 3.0 x1, 1.0 GB/s) is not last: 501 KiB a token leave the last card",
            id="the vocabulary's numbers do not leave over one lane",
        ),
        pytest.param((16, 1, 1), 128_256, [1, 2, 0], "gpu2", id="two slow ones go first, in their order"),
        pytest.param((1, 16), 128_256, [0, 1], "", id="it is not last"),
        pytest.param((16, 1), 32_000, [0, 1], "", id="a small vocabulary is there soon"),
        pytest.param((16, 4), 128_256, [0, 1], "", id="four lanes are enough"),
        pytest.param((16, 4), 262_144, [1, 0], "gpu1", id="but not for 262,144 words"),
        pytest.param((16, 16), 128_256, [0, 1], "", id="no slow link"),
        pytest.param((1, 1), 128_256, [0, 1], "", id="all of them slow"),
        pytest.param((16, None), 128_256, [0, 1], "", id="unknown is not slow"),
        pytest.param((1,), 128_256, [0], "", id="one card"),
    ],
)
def test_the_last_card_of_a_layer_split(
    lanes: tuple[int | None, ...], vocabulary: int, order: list[int], why: str
) -> None:
    found, reason = order_of([card(index, 3, count) for index, count in enumerate(lanes)], vocabulary=vocabulary)
    assert found == order
    assert reason.startswith(why)
    assert bool(reason) == bool(why)


@pytest.mark.parametrize(
    ("cards", "order", "why"),
    [
        pytest.param(
            [("4090", 1), ("4090", 16), ("4090", 16)],
            [1, 0, 2],
            "gpu1 (PCIe 3.0 x16, 15.8 GB/s) comes first: prompts of what is in host memory are computed there",
            id="host layers do not arrive over one lane",
        ),
        pytest.param([("4090", 16), ("4090", 1)], [0, 1], "", id="of two the first matters more than the last"),
        pytest.param(
            [("3060", None), ("4090", None)],
            [1, 0],
            "gpu1 comes first: prompts of what is in host memory are computed there",
            id="the card that computes fastest, where no link is known",
        ),
        pytest.param([("3060", 16), ("4090", 4)], [0, 1], "", id="a fast card behind a slow link"),
        pytest.param([("3060", None), ("4090", 16)], [0, 1], "", id="a link that is not known"),
        pytest.param([("someone's", 16), ("4090", 16)], [0, 1], "", id="a card that is not known"),
        pytest.param([("4080", 16), ("4090", 16)], [0, 1], "", id="hardly faster"),
    ],
)
def test_the_first_card_of_a_layer_split_with_layers_on_the_host(
    cards: list[tuple[str, int | None]], order: list[int], why: str
) -> None:
    gpus = [
        replace(card(index, 3, lanes), name=f"NVIDIA GeForce RTX {name}", engine_devices=(f"CUDA{index}",))
        for index, (name, lanes) in enumerate(cards)
    ]
    found, reason = order_of(gpus, on_host=True)
    assert (found, reason) == (order, why)


def test_devices_that_compute_nothing_of_the_host_stay_in_their_order() -> None:
    gpus = [replace(card(index, 3, lanes), engine_devices=(f"RPC{index}",)) for index, lanes in enumerate((1, 16))]
    named = [replace(gpu, name="NVIDIA GeForce RTX 4090") for gpu in gpus]
    assert order_of(named, on_host=True) == ([0, 1], "")
