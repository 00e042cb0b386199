"""Unlike cards: which ways leave some of them out, and the kinds they are of."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mgpu.machine.simulate import simulate
from mgpu.machine.snapshot import PcieLink
from mgpu.models.shape import facts_from_shape
from mgpu.planning.kinds import alike, groups_alike, largest_kind, without_slow
from mgpu.planning.plan import llama_cpp_candidates
from mgpu.planning.ranking import Contestant, in_order
from mgpu.planning.wants import Wants
from mgpu.units import GIB
from tests.fakes.shapes import SHAPES


@pytest.mark.parametrize(
    ("machine", "least_gib", "in_turn", "at_once"),
    [
        pytest.param("2x4090+3060", 40, [(0, 1)], [(0, 1)], id="the slow one left out"),
        pytest.param("2x4090+3060", 50, [], [], id="its memory is needed"),
        pytest.param("4x3090", 10, [], [], id="alike"),
        pytest.param("5090+4090+3090", 40, [(0, 1)], [], id="one of each"),
        pytest.param("3060+4090+5090", 20, [(1, 2)], [], id="in their order"),
        pytest.param("2x3060+2x3090+2x4090", 20, [(4, 5), (2, 3, 4, 5)], [(4, 5), (2, 3)], id="two sets at most"),
        pytest.param("4090", 10, [], [], id="a single card"),
    ],
)
def test_sets_without_slow_cards_have_room_and_are_the_fastest(
    machine: str, least_gib: int, in_turn: list[tuple[int, ...]], at_once: list[tuple[int, ...]]
) -> None:
    gpus = simulate(machine).gpus
    for sets_of, expected in ((without_slow, in_turn), (groups_alike, at_once)):
        found = sets_of(gpus, least_bytes=least_gib * GIB)
        assert [tuple(gpu.index for gpu in some) for some in found] == expected


def test_kinds_are_told_by_model_and_size() -> None:
    gpus = simulate("4090+2x3090").gpus
    assert not alike(gpus)
    assert [gpu.index for gpu in largest_kind(gpus)] == [1, 2]
    assert alike(gpus[1:])
    assert not alike((gpus[1], replace(gpus[2], total_bytes=12 * GIB)))


@pytest.mark.parametrize(
    ("model", "machine", "first", "others"),
    [
        pytest.param(
            "llama-3.3-70b",
            "2x4090+3060",
            ("tensor", (0, 1)),
            [("layer", (0, 1)), ("layer", (0, 1, 2)), ("tensor", (0, 1, 2))],
            id="a slow and small third card",
        ),
        pytest.param(
            "gpt-oss-120b",
            "2x3090+3x5090",
            ("layer", (2, 3, 4)),
            [("layer", (0, 1, 2, 3, 4)), ("tensor", (0, 1, 2, 3, 4)), ("tensor", (2, 3, 4))],
            id="fast cards are enough",
        ),
        pytest.param("llama-3.3-70b", "4090+3090", ("layer", (0, 1)), [("tensor", (0, 1))], id="both are needed"),
        pytest.param("llama-3.3-70b", "3x3090", ("tensor", (0, 1, 2)), [("layer", (0, 1, 2))], id="alike: all of them"),
    ],
)
def test_cards_that_only_slow_the_others_down_are_left_out(
    model: str, machine: str, first: tuple[str, tuple[int, ...]], others: list[tuple[str, tuple[int, ...]]]
) -> None:
    rig = simulate(machine)
    quantisation = "MXFP4" if "oss" in model else "Q4_K_M"
    candidates = llama_cpp_candidates(facts_from_shape(model, SHAPES[model], quantisation), rig, rig.gpus, Wants())
    found = [(each.split_mode, tuple(device.gpu for device in each.devices)) for each in candidates]
    assert sorted(found) == sorted([first, *others])
    fitting = [Contestant(candidate=each) for each in candidates if each.verdict == "fits"]
    best = in_order(fitting, for_many=False)[0].candidate
    assert (best.split_mode, tuple(device.gpu for device in best.devices)) == first


def test_a_card_behind_a_slow_link_or_mostly_taken_is_left_out_like_a_slow_one() -> None:
    three = simulate("3x3090").gpus
    behind = replace(three[1], pcie=PcieLink(gen_max=3, width=1))
    taken = replace(three[1], free_bytes=4 * GIB)
    for odd in (behind, taken):
        gpus = (three[0], odd, three[2])
        candidates = llama_cpp_candidates(
            facts_from_shape("qwen3-32b", SHAPES["qwen3-32b"], "Q4_K_M"),
            replace(simulate("3x3090"), gpus=gpus),
            gpus,
            Wants(),
        )
        assert ("tensor", [0, 2]) in [(each.split_mode, [d.gpu for d in each.devices]) for each in candidates]
