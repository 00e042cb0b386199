from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.errors import MgpuError, Missing, UsageError
from mgpu.machine.selection import select_gpus
from mgpu.machine.snapshot import Gpu, Machine


def gpu(index: int, free_bytes: int | None, uuid: str | None, *devices: str, problem: str | None = None) -> Gpu:
    return Gpu(
        index=index,
        vendor="nvidia",
        name=f"Card {index}",
        uuid=uuid,
        free_bytes=free_bytes,
        engine_devices=devices,
        problem=problem,
    )


MACHINE = Machine(
    captured_at="",
    source="probed",
    gpus=(
        gpu(0, 10, "GPU-3f00aa", "CUDA0", "Vulkan1"),
        gpu(1, 20, "GPU-3f00bb", "CUDA1", "Vulkan0"),
        gpu(2, None, None, problem="fell off the bus"),
        gpu(3, 20, "GPU-77", "CUDA2"),
        gpu(4, None, None, "RPC0"),
    ),
)
EMPTY = Machine(captured_at="", source="probed")


@pytest.mark.parametrize(
    ("selection", "indices"),
    [
        pytest.param(None, [0, 1, 3, 4], id="nothing said: every usable card"),
        pytest.param("all", [0, 1, 3, 4], id="all"),
        pytest.param(" ALL ", [0, 1, 3, 4], id="all, shouted"),
        pytest.param("none", [], id="none"),
        pytest.param("1", [1], id="a count: the freest, the first of equals"),
        pytest.param("2", [1, 3], id="a count of two"),
        pytest.param("3", [0, 1, 3], id="a count in order of index"),
        pytest.param("4", [0, 1, 3, 4], id="unknown memory comes last"),
        pytest.param("0,1", [0, 1], id="indices"),
        pytest.param("3, 0", [3, 0], id="the order of the list is kept"),
        pytest.param("gpu0", [0], id="a name"),
        pytest.param("GPU1,3", [1, 3], id="a name and an index"),
        pytest.param("GPU-3f00bb", [1], id="a UUID"),
        pytest.param("gpu-7", [3], id="the beginning of a UUID"),
        pytest.param("Vulkan1,vulkan0", [0, 1], id="an engine's names"),
        pytest.param("RPC0", [4], id="an engine's device"),
    ],
)
def test_a_selection_is_cards(selection: str | None, indices: list[int]) -> None:
    assert [card.index for card in select_gpus(MACHINE, selection)] == indices


@pytest.mark.parametrize(
    ("cards", "selection", "indices"),
    [
        pytest.param(("nvidia", "integrated"), None, [0], id="an integrated GPU beside a card is left out"),
        pytest.param(("integrated", "nvidia"), None, [1], id="even when it comes first"),
        pytest.param(("integrated", "nvidia"), "all", [0, 1], id="all means all"),
        pytest.param(("integrated", "nvidia"), "gpu0", [0], id="a list names it"),
        pytest.param(("integrated", "nvidia"), "1", [1], id="a count prefers the card, which has less free"),
        pytest.param(("integrated", "nvidia"), "2", [0, 1], id="a count of both"),
        pytest.param(("integrated",), None, [0], id="alone it is all there is"),
        pytest.param(("integrated", "other"), None, [0, 1], id="a remote device is no card beside it"),
        pytest.param(("integrated", "lost"), None, [0], id="nor is a lost card"),
    ],
)
def test_integrated_gpus_come_after_cards(cards: tuple[str, ...], selection: str | None, indices: list[int]) -> None:
    gpus = tuple(
        Gpu(
            index=index,
            vendor="nvidia" if card == "lost" else card.replace("integrated", "other"),
            name=card,
            free_bytes=90 if card == "integrated" else 20,
            integrated=True if card == "integrated" else None,
            problem="fell off the bus" if card == "lost" else None,
        )
        for index, card in enumerate(cards)
    )
    chosen = select_gpus(Machine(captured_at="", source="probed", gpus=gpus), selection)
    assert [card.index for card in chosen] == indices


@pytest.mark.parametrize("selection", [None, "none"])
def test_a_machine_without_cards_has_none_to_select(selection: str | None) -> None:
    assert select_gpus(EMPTY, selection) == ()


def test_all_cards_of_a_machine_without_any_are_missing() -> None:
    with pytest.raises(Missing, match="no usable card"):
        select_gpus(EMPTY, "all")


@pytest.mark.parametrize(
    ("selection", "kind", "words"),
    [
        pytest.param("5", Missing, "4 usable", id="more than can be used"),
        pytest.param("64", Missing, "64 cards", id="many more"),
        pytest.param("gpu2", Missing, "fell off the bus", id="a lost card by name"),
        pytest.param("0,2", Missing, "fell off the bus", id="a lost card in a list"),
        pytest.param("gpu7", Missing, "no such card", id="a name that is not there"),
        pytest.param("0,9", Missing, "no such card", id="an index that is not there"),
        pytest.param("GPU-99", Missing, "no such card", id="a UUID that is not there"),
        pytest.param("0", UsageError, "--gpus none", id="a count of no card"),
        pytest.param("00", UsageError, "--gpus none", id="a count of no card, twice"),
        pytest.param("65", UsageError, "no machine", id="more than any machine"),
        pytest.param("9" * 5000, UsageError, "no machine", id="a number without end"),
        pytest.param("gpu" + "9" * 5000, UsageError, "no machine", id="an index without end"),
        pytest.param("-1", UsageError, "not a card's", id="negative"),
        pytest.param("1.5", UsageError, "not a card's", id="a fraction"),
        pytest.param("２", UsageError, "not a card's", id="another script's digit"),
        pytest.param("0,0", UsageError, "twice", id="an index twice"),
        pytest.param("0,gpu0", UsageError, "twice", id="one card under two names"),
        pytest.param("GPU-3f", UsageError, "several cards: gpu0, gpu1", id="a beginning of two UUIDs"),
        pytest.param("Vulkan7", UsageError, "not a card's", id="an engine's name that is not there"),
        pytest.param("", UsageError, "not a card's", id="empty"),
        pytest.param("0,", UsageError, "not a card's", id="a comma too many"),
        pytest.param("all,0", UsageError, "not a card's", id="all and one"),
        pytest.param("x" * 10_000, UsageError, "…", id="junk without end"),
    ],
)
def test_what_cannot_be_selected_says_why(selection: str, kind: type[MgpuError], words: str) -> None:
    with pytest.raises(kind) as caught:
        select_gpus(MACHINE, selection)
    assert words in caught.value.message
    assert caught.value.hint
    assert len(caught.value.message) < 200
    assert caught.value.code == ("gpu-missing" if kind is Missing else "usage")


def test_asking_an_empty_machine_for_a_card_names_the_way_out() -> None:
    with pytest.raises(Missing) as caught:
        select_gpus(EMPTY, "1")
    assert "--gpus none" in (caught.value.hint or "")


@given(st.text(max_size=30) | st.text(alphabet="0123456789,gpuGPU-", max_size=12))
def test_any_text_selects_distinct_usable_cards_or_is_an_expected_error(selection: str) -> None:
    with contextlib.suppress(UsageError, Missing):
        chosen = select_gpus(MACHINE, selection)
        assert all(card.problem is None for card in chosen)
        assert len({card.index for card in chosen}) == len(chosen)
