"""Machines side by side: sums of watts and prices, and what is said of them, from plans made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mgpu.machine.simulate import simulate
from mgpu.machine.snapshot import Gpu
from mgpu.planning.advice import Choice, Standing, Statement, price_of, statements, watts_of
from mgpu.planning.candidates import Candidate, PlannedDevice, PlannedHost
from mgpu.planning.speed import Range, Speed
from mgpu.planning.wants import Wants
from mgpu.units import GIB


def choice(
    tok_s: float | None,
    *,
    cards: int = 1,
    quant: str = "Q4_K_M",
    gb: float = 42,
    verdict: str = "fits",
    together: float | None = None,
    users: int = 8,
    ctx_tokens: int = 8192,
) -> Choice:
    """A way on the first `cards` cards that gives `tok_s`, give or take a tenth."""

    def around(value: float | None) -> Range | None:
        return Range(low=value * 0.9, likely=value, high=value * 1.1) if value else None

    device = PlannedDevice(
        gpu=0,
        uuid=None,
        name="card",
        device="CUDA0",
        first_layer=0,
        layers=40,
        head=True,
        weights_bytes=GIB,
        kv_bytes=0,
        compute_bytes=0,
        runtime_bytes=0,
        card_bytes=2 * GIB,
        free_bytes=2 * GIB,
        basis="",
    )
    candidate = Candidate(
        backend="llama.cpp",
        split_mode="layer",
        tensor_parallel=1,
        pipeline_parallel=1,
        replicas=1,
        quant=quant,
        kv_type="f16",
        ctx_tokens=ctx_tokens,
        parallel=8 if together else 1,
        verdict=verdict,
        reasons=("30 of 80 layers stay in host memory: slow",) if verdict == "fits-with-offload" else (),
        devices=tuple(replace(device, gpu=index) for index in range(cards)),
        host=PlannedHost(layers=0, weights_bytes=0, kv_bytes=0, compute_bytes=0, free_bytes=None),
        short_bytes=0,
        max_ctx_tokens=None,
        speed=Speed(
            decode_tok_s=around(tok_s),
            aggregate_tok_s=around(together),
            aggregate_users=users if together else None,
        ),
        wants=Wants(),
    )
    return Choice(candidate=candidate, file_bytes=int(gb * 1e9))


def standing(
    name: str,
    one: Choice,
    *,
    one_card: Choice | None = None,
    many: Choice | None = None,
    price: float | None = None,
    offload: bool = False,
) -> Standing:
    machine = simulate(name)
    return Standing(name=name, machine=machine, one=one, one_card=one_card, many=many, price=price, offload=offload)


def said(*standings: Standing, users: int = 1) -> list[Statement]:
    return list(statements(standings, users))


@pytest.mark.parametrize(
    ("several", "single", "kind", "as_well", "text"),
    [
        pytest.param(
            choice(100, cards=2, gb=5),
            choice(98, gb=5),
            "one-card",
            True,
            "one of the two cards serves one user as fast: Q4_K_M 88-110 tokens/s, and Q4_K_M 90-110 tokens/s on both "
            "cards",
            id="one card is as fast",
        ),
        pytest.param(
            choice(100, cards=2, gb=5),
            choice(60, gb=5),
            "one-card",
            False,
            "one RTX 4090 holds it too, at 60% of the speed",
            id="one card is slower",
        ),
        pytest.param(
            choice(40, cards=2),
            choice(41, quant="Q3_K_M", gb=34),
            "one-card-smaller",
            True,
            "one RTX 4090 with Q3_K_M serves one user as fast",
            id="a smaller quantisation on one card",
        ),
        pytest.param(
            choice(40, cards=2),
            choice(30, quant="Q2_K", gb=26),
            "one-card-smaller",
            False,
            "one RTX 4090 holds no more than Q2_K",
            id="a smaller quantisation that is slower",
        ),
        pytest.param(
            choice(20, cards=2),
            choice(3, verdict="fits-with-offload"),
            "one-card-offload",
            False,
            "with one RTX 4090, 30 of 80 layers stay in host memory: Q4_K_M 2.7-3.3 tokens/s",
            id="offload",
        ),
        pytest.param(
            choice(20, cards=2),
            choice(23, verdict="fits-with-offload"),
            "one-card-offload",
            True,
            "one RTX 4090 with layers in host memory serves one user as fast",
            id="offload whose least is as fast",
        ),
        pytest.param(
            choice(20, cards=2),
            choice(20.5, verdict="fits-with-offload"),
            "one-card-offload",
            False,
            "stay in host memory",
            id="offload that may be slower",
        ),
        pytest.param(
            choice(None, cards=2), choice(None), "one-card", None, "one RTX 4090 holds it too", id="no speed is known"
        ),
        pytest.param(
            choice(90, cards=1), None, "one-card", True, "one of the two cards is enough", id="the plan uses one of two"
        ),
    ],
)
def test_what_one_of_two_cards_does(
    several: Choice, single: Choice | None, kind: str, as_well: bool | None, text: str
) -> None:
    (statement,) = said(standing("2x4090", several, one_card=single))
    assert (statement.kind, statement.machine, statement.as_well) == (kind, "2x4090", as_well)
    assert statement.text.startswith(text) or (text in statement.text and not as_well)


@pytest.mark.parametrize(
    "alone",
    [
        pytest.param(standing("4090", choice(20)), id="one card"),
        pytest.param(standing("2x4090", choice(20, cards=2)), id="one card runs nothing"),
        pytest.param(standing("2x4090", choice(None, cards=2, verdict="does-not-fit")), id="nothing runs"),
        pytest.param(
            standing("2x4090", choice(20, cards=2), one_card=choice(20, verdict="does-not-fit")), id="one does not fit"
        ),
    ],
)
def test_nothing_is_said_without_a_plan_for_it(alone: Standing) -> None:
    assert not said(alone)


def test_another_machine_that_takes_less_is_named() -> None:
    two, one = standing("2x3090", choice(50, cards=2)), standing("5090", choice(49, quant="awq-int4-g128", gb=39.8))
    (statement,) = said(two, one)
    assert (statement.kind, statement.machine) == ("other-machine", "2x3090")
    assert statement.text == (
        "5090 with awq-int4-g128 serves one user as fast as 2x3090 with Q4_K_M (44-54 and 45-55 tokens/s): "
        "1 card instead of 2, 575 W instead of 700"
    )


@pytest.mark.parametrize(
    ("fast", "other"),
    [
        pytest.param(
            standing("2x3090", choice(50, cards=2), price=1400),
            standing("5090", choice(49), price=2500),
            id="fewer cards for more money",
        ),
        pytest.param(standing("2x3090", choice(50, cards=2)), standing("5090", choice(40)), id="slower"),
        pytest.param(standing("2x3090", choice(50, cards=2)), standing("5090", choice(None)), id="unknown speed"),
        pytest.param(
            standing("2x3090", choice(50, cards=2)),
            standing("5090", choice(60, verdict="fits-with-offload")),
            id="with host memory",
        ),
        pytest.param(
            standing("2x3090", choice(50, cards=2, quant="Q8_0", gb=75)),
            standing("5090", choice(60)),
            id="Q8_0 and Q4_K_M",
        ),
        pytest.param(
            standing("2x3090", choice(50, cards=2)), standing("5090", choice(60, gb=75)), id="the other way round"
        ),
        pytest.param(
            standing("2x3090", choice(50, cards=2)), standing("5090", choice(60, ctx_tokens=6656)), id="less context"
        ),
    ],
)
def test_no_machine_is_better_where_it_costs_more_or_does_not_do_the_same(fast: Standing, other: Standing) -> None:
    assert not [statement for statement in said(fast, other) if statement.kind == "other-machine"]


def test_most_for_the_money_is_said_of_prices_that_are_known() -> None:
    cheap = standing("3090", choice(40), many=choice(40, together=300), price=700)
    dear = standing("4090", choice(60), many=choice(60, together=900), price=1800)
    own = standing("5090", choice(90), price=0)
    found = [(each.machine, each.text) for each in said(cheap, dear, own, users=8) if each.kind == "money"]
    assert found == [
        ("3090", "most for the money, one user: 3090, 57.1 tokens/s per 1000"),
        ("4090", "most for the money, 8 users together: 4090, 500 tokens/s per 1000"),
    ]
    assert not [each for each in said(cheap, standing("4090", choice(60)), users=8) if each.kind == "money"]


@pytest.mark.parametrize(
    ("other", "kinds"),
    [
        pytest.param(choice(60, together=900), ["money", "money"], id="the same of both"),
        pytest.param(choice(60, together=900, users=5), ["money"], id="room for fewer users"),
        pytest.param(choice(60, together=900, gb=75), [], id="another quantisation"),
        pytest.param(choice(60, together=900, ctx_tokens=6656), [], id="another context"),
        pytest.param(choice(60, together=900, verdict="fits-with-offload"), [], id="layers in host memory"),
        pytest.param(choice(60, together=900, verdict="does-not-fit"), [], id="what does not fit"),
    ],
)
@pytest.mark.parametrize("offload", [False, True])
def test_a_winner_is_named_only_where_all_do_the_same(other: Choice, kinds: list[str], *, offload: bool) -> None:
    first = standing("3090", choice(40), many=choice(40, together=300), price=700)
    alone = replace(other, candidate=replace(other.candidate, parallel=1))
    second = standing("4090", alone, many=other, price=1800, offload=offload)
    assert [each.kind for each in said(first, second, users=8) if each.kind == "money"] == kinds


@pytest.mark.parametrize(
    ("one", "offload", "rate"),
    [
        pytest.param(choice(40), False, 40, id="what fits: the likely rate"),
        pytest.param(choice(40, verdict="fits-with-offload"), True, 36, id="layers in host memory: the least"),
        pytest.param(choice(40, verdict="fits-with-offload"), False, None, id="layers there, not allowed"),
        pytest.param(choice(40, verdict="does-not-fit"), True, None, id="what does not fit"),
        pytest.param(choice(None), False, None, id="no speed is known"),
    ],
)
def test_what_does_not_run_gives_nothing_for_the_money(one: Choice, offload: bool, rate: float | None) -> None:
    found = standing("4090", one, price=1000, offload=offload)
    assert found.one_per_1000 == (None if rate is None else pytest.approx(rate))
    assert found.runs == (one.fits or (offload and one.runs))


def test_watts_are_the_machines_own_limits_or_the_catalogues() -> None:
    gpu = Gpu(index=0, vendor="nvidia", name="NVIDIA GeForce RTX 4090")
    assert watts_of([gpu, replace(gpu, power_limit_w=300.0)]) == 750
    assert watts_of([gpu, replace(gpu, name="NVIDIA Something New")]) is None
    assert watts_of([]) == 0


def test_prices_are_summed_where_all_are_known() -> None:
    gpus = simulate("2x4090+3090").gpus
    assert price_of(gpus, {"GeForce RTX 4090": 1800, "GeForce RTX 3090": 0}) == 3600
    assert price_of(gpus, {"GeForce RTX 4090": 1800}) is None
    assert price_of((), {"GeForce RTX 4090": 1800}) is None
