"""The order of cards of a layer split, as it is asked for and shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mgpu.cli.cards import choose_cards, in_users_order
from mgpu.machine.simulate import simulate
from mgpu.machine.snapshot import Machine, PcieLink, to_json

from .contract import PLAN, checked
from .program import Mgpu


def rig() -> Machine:
    """Two cards, of which the second one is on a riser of one lane."""
    machine = simulate("2x4090")
    gpus = tuple(
        replace(gpu, uuid=f"GPU-{gpu.index}{gpu.index}", pcie=PcieLink(gen_max=3, width=width))
        for gpu, width in zip(machine.gpus, (16, 1), strict=True)
    )
    return replace(machine, gpus=gpus)


@pytest.mark.parametrize(
    ("words", "order"),
    [
        pytest.param("", [1, 0], id="all cards"),
        pytest.param("--gpus all", [1, 0], id="all of them, asked for"),
        pytest.param("--gpus 2", [1, 0], id="a number of cards"),
        pytest.param("--gpus 0,1", [0, 1], id="a list"),
        pytest.param("--gpus gpu1,gpu0", [1, 0], id="a list in another order"),
        pytest.param("--gpus GPU-00,GPU-11", [0, 1], id="a list of UUIDs"),
        pytest.param("--tensor-split 1,1", [0, 1], id="shares of the cards in their order"),
    ],
)
def test_the_order_of_cards_that_are_listed_is_kept(mgpu: Mgpu, tmp_path: Path, words: str, order: list[int]) -> None:
    machine = tmp_path / "rig.json"
    machine.write_text(json.dumps(to_json(rig())))
    asked = ("plan", "llama-70b", "--machine", machine, "--backend", "llama.cpp", "--split-mode", "layer")
    ended = mgpu(*asked, *words.split(), "--json")
    best = checked(ended.json, "plan", PLAN)["candidates"][0]
    assert [device["gpu"] for device in best["devices"]] == order
    assert best["env"]["CUDA_VISIBLE_DEVICES"] == ",".join(f"GPU-{index}{index}" for index in order)
    shown = mgpu(*asked, *words.split(), COLUMNS="200").out
    assert [line.split()[0] for line in shown.splitlines() if line.lstrip().startswith("gpu")] == [
        f"gpu{index}" for index in order
    ]
    assert ("gpu1 (PCIe 3.0 x1, 1.0 GB/s) is not last" in shown) == (order == [1, 0] and "," not in words)


@pytest.mark.parametrize(
    ("mask", "order"),
    [
        pytest.param("0,1", "0,1", id="a mask lists the cards"),
        pytest.param("1,0", "1,0", id="in an order of its own"),
    ],
)
def test_a_mask_is_a_list(monkeypatch: pytest.MonkeyPatch, mask: str, order: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    probed = replace(rig(), source="probed")
    chosen, _ = choose_cards("llama.cpp", probed, None, probed.gpus)
    assert ",".join(str(gpu.index) for gpu in chosen) == order
    assert in_users_order(probed, None)
    assert not in_users_order(rig(), None)  # the mask of this machine says nothing of another
    assert not in_users_order(probed, "2")
