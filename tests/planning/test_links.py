"""Slow links: which they are, and where in a row of cards they matter least."""

from __future__ import annotations

import pytest

from mgpu.machine.snapshot import Gpu, NvLinkPort, PcieLink
from mgpu.planning.links import is_slow, layer_order, link_gb_s, link_words

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


@pytest.mark.parametrize(
    ("lanes", "offload", "order"),
    [
        pytest.param((16, 16, 1), False, [2, 0, 1], id="never last: there the vocabulary's numbers leave"),
        pytest.param((1, 16, 16), True, [1, 0, 2], id="with offload not first either: there host layers arrive"),
        pytest.param((1, 16), True, [1, 0], id="of two cards the first matters more with offload"),
        pytest.param((16, 1), False, [1, 0], id="of two cards the last matters more without"),
        pytest.param((16, 16), True, [0, 1], id="no slow link, nothing to do"),
        pytest.param((1, 1), False, [0, 1], id="all of them slow"),
        pytest.param((None, 1), False, [1, 0], id="unknown is not slow"),
    ],
)
def test_the_order_of_a_layer_split(lanes: tuple[int | None, ...], offload: bool, order: list[int]) -> None:
    gpus = [card(index, 3, count) for index, count in enumerate(lanes)]
    assert [gpu.index for gpu in layer_order(gpus, offload=offload)] == order
