"""Layers dealt over cards: balanced by capacity, and exactly as llama.cpp deals them."""

from __future__ import annotations

import itertools
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgpu.planning.split import balanced_split, split_behind_first, split_by_proportions
from mgpu.units import GIB, MIB

SIXTEEN_CARDS = (24 * GIB,) * 8 + (16 * GIB,) * 8


@pytest.mark.parametrize(
    ("units", "capacities", "counts"),
    [
        pytest.param([1] * 8, [10, 10], (4, 4), id="equal cards share equally"),
        pytest.param([1] * 9, [10, 10], (5, 4), id="the odd unit goes to the first card"),
        pytest.param([1] * 9, [20, 10], (6, 3), id="a card twice as large takes twice as much"),
        pytest.param([1] * 9, [10, 20], (3, 6), id="order of cards is kept"),
        pytest.param([1, 1, 1, 5], [10, 10], (3, 1), id="a large head counts by its size"),
        pytest.param([1] * 21, [10] * 8, (3, 3, 2, 3, 3, 2, 3, 2), id="no card is idle where seven could hold all"),
        pytest.param([1] * 6, [0, 10, 10], (0, 3, 3), id="a card without capacity holds nothing"),
        pytest.param([1] * 6, [10, -5, 10], (3, 0, 3), id="nor does one that lacks memory already"),
        pytest.param([4, 4], [10, 10, 10], (1, 1, 0), id="more cards than units leave cards over"),
        pytest.param([7], [5, 5, 5], (1, 0, 0), id="a unit cannot be cut"),
        pytest.param([10] * 4, [4, 12], (1, 3), id="where nothing fits every card overflows by the same fraction"),
        pytest.param([10] * 4, [-30, -5, -20], (0, 4, 0), id="without any capacity the one that lacks least takes all"),
        pytest.param([10] * 4, [0, 0], (4, 0), id="cards that are exactly full"),
        pytest.param([3 * GIB] * 8, [1, 24 * GIB], (0, 8), id="one byte of capacity does not blur the balance"),
        pytest.param(
            [500 * MIB] * 127, SIXTEEN_CARDS, (10, 10, 9, 10, 10, 10, 10, 10) + (6,) * 8, id="405B on 16 cards"
        ),
    ],
)
def test_units_go_where_the_fullest_card_is_emptiest(
    units: list[int], capacities: list[int], counts: tuple[int, ...]
) -> None:
    assert balanced_split(units, capacities) == counts


def splits(units: int, cards: int) -> Iterator[tuple[int, ...]]:
    for cuts in itertools.combinations_with_replacement(range(units + 1), cards - 1):
        ends = (*cuts, units)
        yield tuple(end - start for start, end in zip((0, *cuts), ends, strict=True))


def fullest(units: Sequence[int], capacities: Sequence[int], counts: Sequence[int]) -> float:
    """The fill of the fullest card; a card without capacity must stay empty."""
    ends = list(itertools.accumulate(counts))
    loads = [sum(units[end - count : end]) for end, count in zip(ends, counts, strict=True)]
    return max(
        load / capacity if capacity > 0 else float("inf") if load else 0.0
        for load, capacity in zip(loads, capacities, strict=True)
    )


@given(
    units=st.lists(st.integers(1, 1000), min_size=1, max_size=9),
    capacities=st.lists(st.integers(-100, 3000), min_size=1, max_size=4).filter(lambda cards: max(cards) > 0),
)
@settings(max_examples=200, deadline=None)
def test_no_other_split_has_an_emptier_fullest_card(units: list[int], capacities: list[int]) -> None:
    counts = balanced_split(units, capacities)
    assert sum(counts) == len(units)
    assert min(counts) >= 0
    best = min(fullest(units, capacities, other) for other in splits(len(units), len(capacities)))
    assert fullest(units, capacities, counts) == pytest.approx(best)


@given(
    units=st.lists(st.integers(1, 200 * GIB), min_size=1, max_size=130),
    capacities=st.lists(st.integers(-80 * GIB, 80 * GIB), min_size=1, max_size=16),
)
@settings(max_examples=100, deadline=None)
def test_every_unit_is_dealt_whatever_the_sizes(units: list[int], capacities: list[int]) -> None:
    counts = balanced_split(units, capacities)
    assert len(counts) == len(capacities)
    assert sum(counts) == len(units)
    if max(capacities) > 0:
        assert not any(count for count, capacity in zip(counts, capacities, strict=True) if capacity <= 0)


def float32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def dealt_by_llama_cpp(shares: Sequence[str], layers: int, gpu_layers: int) -> tuple[int, ...]:
    """llama.cpp's own rule in its own 32-bit floats (`llama_model_base::load_tensors`): `-ts` is cumulated and
    divided by its sum; layer i (the last is the output) goes to the first device whose share is above its place."""
    cumulated, total = [], 0.0
    for share in shares:
        total = float32(total + float32(float(share)))
        cumulated.append(total)
    cumulated = [float32(share / total) for share in cumulated]
    on_devices = min(gpu_layers, layers + 1)
    start = layers + 1 - on_devices
    counts = [0] * len(shares)
    for layer in range(start, layers + 1):
        counts[bisect_right(cumulated, float32(float32(layer - start) / float32(on_devices)))] += 1
    return tuple(counts)


def uneven(units: int, cards: int) -> tuple[int, ...]:
    """Counts that fall from card to card, with nothing left for the last where units are few."""
    return balanced_split([1] * units, [units * (cards - card) ** 2 for card in range(cards)])


@pytest.mark.parametrize("cards", range(1, 9))
def test_whole_units_as_proportions_come_back_exactly(cards: int) -> None:
    for layers in range(1, 131):
        for on_devices in {layers + 1, (layers + 1) // 2 or 1, 1}:
            for counts in (uneven(on_devices, cards), tuple(reversed(uneven(on_devices, cards)))):
                assert dealt_by_llama_cpp([str(count) for count in counts], layers, on_devices) == counts
                assert split_by_proportions(on_devices, counts) == counts


@given(
    units=st.integers(1, 131),
    proportions=st.lists(st.integers(0, 200), min_size=1, max_size=8).filter(any),
)
def test_proportions_are_dealt_as_llama_cpp_does(units: int, proportions: list[int]) -> None:
    assert split_by_proportions(units, proportions) == dealt_by_llama_cpp(list(map(str, proportions)), units - 1, 999)


@given(
    units=st.integers(1, 131),
    proportions=st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=8).filter(lambda all_: sum(all_) > 0),
)
def test_every_unit_is_dealt_whatever_the_proportions(units: int, proportions: list[float]) -> None:
    counts = split_by_proportions(units, proportions)
    assert len(counts) == len(proportions)
    assert sum(counts) == units


@pytest.mark.parametrize(
    ("units", "proportions", "counts"),
    [
        pytest.param(33, (3, 1), (25, 8), id="the first card gets the odd unit"),
        pytest.param(33, (0.75, 0.25), (25, 8), id="fractions are proportions, too"),
        pytest.param(33, (1, 0, 1), (17, 0, 16), id="a zero share holds nothing"),
        pytest.param(1, (1, 9), (1, 0), id="one unit goes to the first card"),
        pytest.param(5, (1e-9, 1), (1, 4), id="the first unit goes to the first card with any share"),
        pytest.param(3, (0.1,) * 3, (1, 1, 1), id="shares that round to just below one"),
    ],
)
def test_proportions(units: int, proportions: tuple[float, ...], counts: tuple[int, ...]) -> None:
    assert split_by_proportions(units, proportions) == counts


@pytest.mark.parametrize(
    ("rooms", "first", "other", "counts"),
    [
        pytest.param([10, 10], 2, 2, (3, 1), id="equal cards share"),
        pytest.param([7, 30, 30], 7, 2, (0, 2, 2), id="a card too small to be the first one stays idle"),
        pytest.param([11, 18, 2], 9, 2, (1, 3, 0), id="the first one takes a layer, that no other is first"),
        pytest.param([11, 5], 2, 6, (3, 1), id="the head alone needs no buffer of the layers"),
        pytest.param([2, 2], 1, 1, (3, 1), id="what fits nowhere overflows evenly"),
    ],
)
def test_the_first_card_computes_in_more_than_the_others(
    rooms: list[int], first: int, other: int, counts: tuple[int, ...]
) -> None:
    """Four units of 2, 2, 2 and 4 bytes: three layers and the head."""
    found = split_behind_first([2, 2, 2, 4], rooms, first_bytes=first, other_bytes=other, head_bytes=1)
    assert found == counts
