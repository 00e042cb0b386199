from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.errors import UsageError
from mgpu.machine.cards import Card, card_for_name, catalogue, find_card

GIB = 1024**3


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("4090", "GeForce RTX 4090"),
        ("rtx4090", "GeForce RTX 4090"),
        ("RTX 3090", "GeForce RTX 3090"),
        ("NVIDIA GeForce RTX 3090", "GeForce RTX 3090"),
        ("4090 24gb", "GeForce RTX 4090"),
        ("4090d", "GeForce RTX 4090 D"),
        ("5090", "GeForce RTX 5090"),
        ("3060 12gb", "GeForce RTX 3060 12 GB"),
        ("4060ti", "GeForce RTX 4060 Ti 16 GB"),
        ("4070tisuper", "GeForce RTX 4070 Ti SUPER"),
        ("4070 ti", "GeForce RTX 4070 Ti"),
        ("titan rtx", "TITAN RTX"),
        ("6000ada", "RTX 6000 Ada Generation"),
        ("pro6000", "RTX PRO 6000 Blackwell"),
        ("pro 6000 max-q", "RTX PRO 6000 Blackwell Max-Q"),
        ("a6000", "RTX A6000"),
        ("p40", "Tesla P40"),
        ("A100-80", "A100 SXM4 80 GB"),
        ("a100 80gb", "A100 SXM4 80 GB"),
        ("A100-80-PCIe", "A100 PCIe 80 GB"),
        ("a100-sxm4-40gb", "A100 SXM4 40 GB"),
        ("H100", "H100 SXM5 80 GB"),
        ("h100 nvl", "H100 NVL 94 GB"),
        ("l40s", "L40S"),
        ("7900xtx", "Radeon RX 7900 XTX"),
        ("7900 xt", "Radeon RX 7900 XT"),
        ("MI300X", "Radeon Instinct MI300X"),
        ("w7900", "Radeon PRO W7900"),
        ("b580", "Arc B580"),
    ],
)
def test_what_people_type_names_a_card(typed: str, name: str) -> None:
    assert find_card(typed).name == name


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        pytest.param("A100", ["A100 PCIe 40 GB", "A100 SXM4 80 GB"], id="40 or 80 GB"),
        pytest.param("v100", ["Tesla V100 SXM2 16 GB", "Tesla V100 PCIe 32 GB"], id="16 or 32 GB"),
        pytest.param(
            "rtx 6000",
            ["Quadro RTX 6000", "RTX 6000 Ada Generation", "RTX PRO 6000 Blackwell"],
            id="three generations",
        ),
        pytest.param("7900", ["Radeon RX 7900 XT", "Radeon RX 7900 XTX", "Radeon RX 7900 GRE"], id="three memories"),
    ],
)
def test_cards_that_differ_are_not_guessed_between(typed: str, offered: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        find_card(typed)
    assert caught.value.code == "card-ambiguous"
    assert [name for name in offered if name not in caught.value.message] == []
    assert caught.value.hint


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        pytest.param("4099", "GeForce RTX 4090", id="slip of a digit"),
        pytest.param("4060ti 8gb", "GeForce RTX 4060 Ti 16 GB", id="a size that is not there"),
        pytest.param("4090 48gb", "GeForce RTX 4090", id="a modified card"),
        pytest.param("titan", "TITAN RTX", id="series only"),
        pytest.param("xtx", "Radeon RX 7900 XTX", id="suffix only"),
        pytest.param("24gb", "", id="size only"),
        pytest.param("geforce rtx", "", id="maker only"),
        pytest.param("", "", id="nothing"),
        pytest.param("💥\x1b[2J", "", id="junk"),
        pytest.param("4090" + " " * 200, "GeForce RTX 4090", id="too long to be a name"),
    ],
)
def test_an_unknown_card_is_an_error_with_the_nearest_names(typed: str, offered: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_card(typed)
    assert caught.value.code == "card-unknown"
    assert offered in caught.value.message
    assert any(card.name in caught.value.message for card in catalogue())


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA GeForce RTX 3090", "GeForce RTX 3090"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM4 80 GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80 GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM5 80 GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe 80 GB"),
        ("Tesla V100-SXM2-32GB", "Tesla V100 SXM2 32 GB"),
        ("Tesla P40", "Tesla P40"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000 Blackwell Max-Q"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada Generation"),
        ("Quadro RTX 6000", "Quadro RTX 6000"),
        ("AMD Radeon RX 7900 XTX (RADV NAVI31)", "Radeon RX 7900 XTX"),
        ("AMD Instinct MI300X", "Radeon Instinct MI300X"),
        ("Intel(R) Arc(TM) A770 Graphics (DG2)", "Arc A770"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A10G", None),
        ("AMD Radeon Graphics", None),
        ("llvmpipe (LLVM 15.0.6, 256 bits)", None),
        ("127.0.0.1:8290", None),
        ("", None),
    ],
)
def test_what_drivers_report_names_a_card_or_none(reported: str, name: str | None) -> None:
    card = card_for_name(reported)
    assert (card.name if card else None) == name


@pytest.mark.parametrize(("size", "name"), [(16 * GIB, "Radeon Instinct MI50"), (32 * GIB, "Radeon Instinct MI60")])
def test_a_name_of_two_cards_is_settled_by_their_memory(size: int, name: str) -> None:
    card = card_for_name("AMD Instinct MI60 / MI50", size)
    assert card is not None
    assert card.name == name


@pytest.mark.parametrize("card", catalogue(), ids=lambda card: card.name)
def test_every_card_is_found_by_its_names_and_its_figures_are_possible(card: Card) -> None:
    assert find_card(card.name) is card
    assert card_for_name(card.full_name) is card
    assert 0.93 < card.total_bytes / (card.marketed_gb * GIB) <= 1  # ECC and decimal gigabytes take some
    assert 0 <= card.reserved_bytes < card.total_bytes / 10
    assert 190 < card.bandwidth_gb_s <= 8000
    assert card.fp16_fp32_accumulate_tflops <= card.fp16_tflops
    assert (card.compute_capability is None) != (card.vendor == "nvidia")
    assert (card.gfx is None) != (card.vendor == "amd")
    assert card.pci_id is None or re.fullmatch(r"[0-9A-F]{4}:[0-9A-F]{2}", card.pci_id)
    assert (card.nvlink_version is None) == (card.nvlink_total_gb_s is None)


@given(st.text(max_size=60))
def test_any_text_gives_a_card_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        find_card(text)
    card_for_name(text)
