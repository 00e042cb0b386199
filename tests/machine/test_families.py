"""The families of NVIDIA's cards, told by the names that drivers give."""

from __future__ import annotations

import dataclasses

import pytest

from mgpu.machine.cards import Card, catalogue
from mgpu.machine.families import family

SXM = {"peers", "whole_window", "hbm", "mig", "keeps_link_speed"}
NVIDIA = [card for card in catalogue() if card.vendor == "nvidia" and not card.name.startswith(("CMP", "GB10"))]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param(["NVIDIA GeForce RTX 4090", "NVIDIA TITAN RTX", "NVIDIA TITAN Xp"], {"geforce"}, id="GeForce"),
        pytest.param(["NVIDIA TITAN V"], {"geforce", "hbm"}, id="a TITAN with HBM"),
        pytest.param(["NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA B200"], SXM, id="SXM"),
        pytest.param(
            ["NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL"],
            SXM | {"several_bridges"},
            id="PCIe models with room for bridges",
        ),
        pytest.param(
            ["NVIDIA A30", "NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA B300 SXM6 AC"],
            {"peers", "whole_window", "hbm", "mig"},
            id="others with HBM and instances",
        ),
        pytest.param(
            ["Tesla V100-SXM2-32GB", "Tesla P100-PCIE-16GB"], {"peers", "whole_window", "hbm"}, id="before instances"
        ),
        pytest.param(["Quadro GV100"], {"peers", "hbm", "several_bridges"}, id="a workstation's with two bridges"),
        pytest.param(["NVIDIA L40S"], {"peers", "whole_window", "keeps_link_speed"}, id="L40S"),
        pytest.param(
            ["NVIDIA A40", "NVIDIA A10G", "NVIDIA L4", "NVIDIA L40", "Tesla P40"], {"peers", "whole_window"}, id="GDDR"
        ),
        pytest.param(
            ["NVIDIA RTX A6000", "NVIDIA RTX A400", "NVIDIA RTX A500 Laptop GPU", "Quadro P400", "Quadro RTX 8000"],
            {"peers"},
            id="workstations",
        ),
        pytest.param(["Tesla T4", "NVIDIA A2", "NVIDIA A16", "Tesla K80"], {"peers"}, id="small windows"),
        pytest.param(
            ["NVIDIA P102-100", "NVIDIA P104-100", "NVIDIA CMP 170HX", "NVIDIA Graphics Device", ""],
            set(),
            id="mining cards, and what nobody knows",
        ),
    ],
)
def test_a_name_tells_the_family(names: list[str], expected: set[str]) -> None:
    for name in names:
        facts = dataclasses.asdict(family(name))
        assert {fact for fact, holds in facts.items() if holds} == expected, name


@pytest.mark.parametrize("card", [pytest.param(card, id=card.name) for card in NVIDIA])
def test_the_catalogue_agrees(card: Card) -> None:
    """NVIDIA's chips with HBM are those of compute capability 6.0, 7.0, 8.0, 9.0 and 10.0."""
    facts = family(card.full_name)
    assert facts.hbm is (card.compute_capability in ("6.0", "7.0", "8.0", "9.0", "10.0"))
    assert facts.peers is not facts.geforce
