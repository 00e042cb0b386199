"""From cards and models to what a token reads."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mgpu.machine.cards import find_card
from mgpu.machine.snapshot import Gpu, Link
from mgpu.models.facts import Layer, ModelFacts
from mgpu.planning.work import chip_of, is_quantised, link_between, share_of

FULL = Layer(weights_bytes=1000, expert_bytes=800, kv_heads=2, key_length=4, value_length=4)
WINDOWED = replace(FULL, sliding_window=100)
RECURRENT = replace(FULL, kv_heads=0)
FACTS = ModelFacts(
    name="m",
    architecture="llama",
    quantisation="Q4_K_M",
    parameters=8000,
    active_parameters=4000,
    context_length=4096,
    vocabulary=100,
    embedding_length=8,
    feed_forward_length=16,
    heads=2,
    kv_heads=2,
    head_dim=4,
    experts=8,
    experts_used=2,
    tied=False,
    embedding_bytes=500,
    head_bytes=300,
    layers=(FULL, WINDOWED, RECURRENT),
    file_bytes=3800,
    source="test",
)


def gpu(name: str, **known: object) -> Gpu:
    card = find_card(name)
    found = Gpu(
        index=0,
        vendor=card.vendor,
        name=card.full_name,
        total_bytes=card.total_bytes,
        bandwidth_gb_s=card.bandwidth_gb_s,
    )
    return replace(found, **known)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "memory", "modern", "cdna"),
    [
        pytest.param("RTX 4090", "gddr", True, False, id="a GeForce of the Ada generation"),
        pytest.param("RTX 3090", "gddr", False, False, id="one before it"),
        pytest.param("A100-80", "hbm", False, False, id="stacked memory"),
        pytest.param("H100 PCIe", "hbm", True, False, id="Hopper"),
        pytest.param("MI100", "hbm", False, True, id="AMD's Instinct"),
        pytest.param("7900 XTX", "gddr", False, False, id="AMD's Radeon"),
        pytest.param("GB10", "lpddr", True, False, id="memory shared with the processor"),
    ],
)
def test_a_chip_is_known_by_its_name(name: str, memory: str, modern: bool, cdna: bool) -> None:
    chip = chip_of(gpu(name))
    assert (chip.memory, chip.modern, chip.cdna) == (memory, modern, cdna)
    assert chip.tensor_tflops


def test_a_card_without_tensor_cores_computes_with_its_shaders() -> None:
    chip = chip_of(gpu("P40"))
    assert chip.without_tensor_cores
    assert chip.tensor_tflops == pytest.approx(find_card("P40").fp32_tflops)


def test_an_unknown_card_has_no_bandwidth() -> None:
    chip = chip_of(Gpu(index=0, vendor="nvidia", name="NVIDIA RTX 9999 Laptop GPU"))
    assert chip.bandwidth_gb_s is None
    assert chip.tensor_tflops is None


@pytest.mark.parametrize(
    ("limit_w", "power"),
    [
        pytest.param(None, 1.0, id="a limit nobody tells"),
        pytest.param(450.0, 1.0, id="the card's own"),
        pytest.param(435.0, 1.0, id="hardly below it"),
        pytest.param(600.0, 1.0, id="above it"),
        pytest.param(225.0, 0.5, id="half of it"),
    ],
)
def test_a_power_limit_counts_where_it_is_lower_than_the_cards(limit_w: float | None, power: float) -> None:
    assert chip_of(gpu("RTX 4090", power_limit_w=limit_w)).power == pytest.approx(power)


def test_a_token_reads_the_experts_it_uses_and_the_window_it_sees() -> None:
    share = share_of(FACTS, FACTS.layers, chip_of(gpu("RTX 4090")), head=True, depth_tokens=1000)
    assert share.weights_bytes == 3 * 200 + 3 * 800 * 2 / 8 + 300
    assert share.expert_bytes == 3 * 800
    assert share.kv_bytes == (1000 + 100) * 2 * (4 + 4) * 2


def test_equal_cards_read_their_part_each() -> None:
    chip = chip_of(gpu("RTX 4090"))
    whole = share_of(FACTS, FACTS.layers, chip, head=True, depth_tokens=1000)
    half = share_of(FACTS, FACTS.layers, chip, head=True, depth_tokens=1000, cards=2)
    assert (half.weights_bytes * 2, half.expert_bytes * 2, half.kv_bytes * 2) == (
        whole.weights_bytes,
        whole.expert_bytes,
        whole.kv_bytes,
    )


def test_a_quantised_cache_is_read_faster_and_an_empty_one_not_at_all() -> None:
    chip = chip_of(gpu("RTX 4090"))
    full = share_of(FACTS, FACTS.layers, chip, head=False, depth_tokens=1000)
    half = share_of(FACTS, FACTS.layers, chip, head=False, depth_tokens=1000, kv_element_bytes=(1.0, 1.0))
    assert half.kv_bytes == full.kv_bytes / 2
    assert share_of(FACTS, FACTS.layers, chip, head=False, depth_tokens=0).kv_bytes == 0


def test_sixteen_bit_files_are_not_quantised() -> None:
    assert is_quantised(FACTS)
    assert not is_quantised(replace(FACTS, file_bytes=FACTS.parameters * 2))


@pytest.mark.parametrize(
    ("links", "expected"),
    [
        pytest.param((), "host", id="nothing known"),
        pytest.param((Link(a=0, b=1, kind="PHB", p2p=False), Link(a=0, b=2, kind="PHB"), Link(a=1, b=2, kind="PHB")),
                     "host", id="no peer access"),
        pytest.param(tuple(Link(a=a, b=b, kind="PIX", p2p=True) for a, b in ((0, 1), (0, 2), (2, 1))), "peer",
                     id="peer access between all"),
        pytest.param(tuple(Link(a=a, b=b, kind="NVLink") for a, b in ((0, 1), (0, 2), (2, 1))), "nvlink",
                     id="NVLink between all"),
        pytest.param((Link(a=0, b=1, kind="NVLink"), Link(a=0, b=2, kind="PHB", p2p=True),
                      Link(a=1, b=2, kind="PHB", p2p=True)), "peer", id="the slowest pair counts"),
        pytest.param((Link(a=0, b=1, kind="NVLink"),), "host", id="a bridge between two of three"),
    ],
)  # fmt: skip
def test_the_slowest_link_counts(links: tuple[Link, ...], expected: str) -> None:
    gpus = [replace(gpu("RTX 3090"), index=index) for index in range(3)]
    assert link_between(gpus, links) == expected
