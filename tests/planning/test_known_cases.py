"""Eight questions that planners get wrong, with answers that can be computed by hand.

Sums: weights are the file's, KV at 8192 tokens in f16; the bound is bandwidth over the bytes read for a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from mgpu.cli.contenders import contenders
from mgpu.cli.options import Backend, KvType, PlannerOptions
from mgpu.cli.prepare import ask_about, prepare
from mgpu.cli.prepared import Prepared
from mgpu.planning.candidates import Candidate
from mgpu.planning.plan import Plan
from mgpu.planning.together import place_together
from mgpu.units import GIB

pytestmark = pytest.mark.usefixtures("nothing_on_disk")


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """`card_gib` is what lies on each card, `bound` the physical bound of a layer split in tokens per second."""

    verdict: str
    card_gib: tuple[float, ...]
    bound: float | None = None


def planned(
    model: str,
    machine: str,
    quant: str | None = None,
    *,
    backend: Backend = Backend.auto,
    kv_type: KvType = KvType.f16,
) -> Prepared:
    return prepare(model, PlannerOptions(ctx="8k", quant=quant, backend=backend, kv_type=kv_type), machine=machine)


def layer_split(model: str, machine: str, quant: str | None = None) -> Candidate:
    """llama.cpp's layer split on all cards of the machine."""
    plan = planned(model, machine, quant, backend=Backend.llama_cpp).plan
    on_all = (each for each in plan.candidates if each.split_mode != "tensor" and len(each.devices) == cards(plan))
    return next(on_all)


def cards(plan: Plan) -> int:
    return len(plan.machine.gpus)


CASES = [
    pytest.param(
        ("llama-70b", "2x4090", "Q4_K_M"),
        Truth(verdict="fits", card_gib=(21.7, 21.7), bound=24),
        id="70B Q4_K_M on two RTX 4090",
    ),
    pytest.param(
        ("llama-70b", "2x5090", "Q8_0"),
        Truth(verdict="does-not-fit", card_gib=(36.8, 36.8)),
        id="70B Q8_0 on two RTX 5090",
    ),
    pytest.param(
        ("llama-70b", "5090", "Q4_K_M"),
        Truth(verdict="does-not-fit", card_gib=(42.5,)),
        id="70B Q4_K_M on one RTX 5090",
    ),
    pytest.param(
        ("llama-405b", "4x4090", "Q4_K_M"),
        Truth(verdict="does-not-fit", card_gib=(58.5, 58.5, 58.5, 58.5)),
        id="405B Q4_K_M on four RTX 4090",
    ),
    pytest.param(
        ("llama-405b", "4xA100-80", "Q4_K_M"),
        Truth(verdict="fits", card_gib=(59, 59, 59, 59), bound=8.4),
        id="405B Q4_K_M on four A100 80 GB",
    ),
    pytest.param(
        ("llama-70b", "4090+4080", "Q4_K_M"),
        Truth(verdict="does-not-fit", card_gib=(25.9, 17.5)),
        id="70B Q4_K_M on an RTX 4090 and an RTX 4080",
    ),
    pytest.param(
        ("qwen3-30b-a3b", "3090", "Q4_K_M"),
        Truth(verdict="fits", card_gib=(18.7,), bound=495),
        id="30B with experts on one RTX 3090",
    ),
    pytest.param(
        ("gpt-oss-120b", "3x3090", None),
        Truth(verdict="fits", card_gib=(20.6, 20.6, 20.6), bound=265),
        id="120B with experts on three RTX 3090",
    ),
]


BOUNDED = [case for case in CASES if isinstance(truth := case.values[1], Truth) and truth.bound]


@pytest.mark.parametrize(("case", "truth"), CASES)
def test_the_verdict_and_what_lies_on_each_card(case: tuple[str, str, str | None], truth: Truth) -> None:
    found = layer_split(*case)
    assert found.verdict == truth.verdict
    sizes = [device.total_bytes / GIB for device in found.devices]
    assert sum(sizes) == pytest.approx(sum(truth.card_gib), rel=0.02)
    assert sizes == pytest.approx(list(truth.card_gib), rel=0.04)


@pytest.mark.parametrize(("case", "truth"), BOUNDED)
def test_the_physical_bound(case: tuple[str, str, str | None], truth: Truth) -> None:
    speed = layer_split(*case).speed
    assert speed.bound_tok_s == pytest.approx(truth.bound, rel=0.05)
    if speed.decode_tok_s and speed.bound_tok_s:
        assert speed.decode_tok_s.high <= speed.bound_tok_s


@pytest.mark.parametrize("kv_type", [KvType.f16, KvType.q8_0])
def test_on_unequal_cards_no_kv_type_makes_70b_fit_and_a_smaller_quantisation_does(
    kv_type: KvType,
) -> None:
    plan = planned("llama-70b", "4090+4080", "Q4_K_M", kv_type=kv_type).plan
    assert plan.best is None
    fix = next(fix for fix in plan.fixes if fix.change.startswith("--quant"))
    first, second = (device.layers for device in fix.candidate.devices)
    assert fix.candidate.verdict == "fits"
    assert 1.3 < first / second < 1.7  # three to two


@pytest.mark.parametrize(
    ("model", "machine", "sum_"),
    [
        pytest.param(
            "gpt-oss-120b", "3x3090", "64 attention heads ÷ 3 cards", id="three cards do not divide the heads"
        ),
        pytest.param("llama-70b", "4090+4080", "", id="unequal cards"),
    ],
)
def test_tensor_parallel_is_never_offered_where_it_cannot_be(model: str, machine: str, sum_: str) -> None:
    plan = planned(model, machine, backend=Backend.vllm).plan
    count = cards(plan)
    on_all = [each for each in plan.candidates if each.tensor_parallel == count]
    assert all(each.verdict == "illegal" and sum_ in each.reasons[0] for each in on_all)
    assert bool(on_all) == bool(sum_)


def test_two_13b_take_a_card_each_and_do_not_fit_on_one() -> None:
    def on(machine: str) -> list[tuple[int, ...] | None]:
        asked = ask_about(("llama-2-13b", "llama-2-13b"), PlannerOptions(ctx="8k", quant="Q4_K_M"), machine=machine)
        together = place_together(contenders(asked), asked[0].machine)
        return [each.gpus if each.placed else None for each in together.placements]

    assert sorted(gpus or () for gpus in on("2x4090")) == [(0,), (1,)]
    assert on("4090").count(None) == 1
    alone = layer_split("llama-2-13b", "4090", "Q4_K_M")
    assert alone.devices[0].total_bytes / GIB == pytest.approx(14.2, rel=0.02)
    assert alone.speed.bound_tok_s == pytest.approx(128, rel=0.03)


def test_one_card_that_lacks_room_says_how_many_layers_it_takes() -> None:
    plan = planned("llama-70b", "5090", "Q4_K_M").plan
    offload = next(fix.candidate for fix in plan.fixes if fix.change == "--offload allow")
    assert offload.verdict == "fits-with-offload"
    assert 55 <= offload.devices[0].layers <= 60
