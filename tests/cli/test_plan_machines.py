"""`mgpu plan MODEL` on several machines: side by side in words, as JSON and in the exit code; prices; bad input."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from .contract import CANDIDATE, COUNT, FLAG, MACHINE, NUMBER, TEXT, Json, checked, exactly, listed, maybe
from .program import Mgpu

PRICE = exactly(
    total=maybe(NUMBER),
    one_user_tok_s_per_1000=maybe(NUMBER),
    users_tok_s_per_1000=maybe(NUMBER),
    without_price=listed(TEXT),
)
COMPARED = exactly(
    model=exactly(
        name=TEXT,
        architecture=TEXT,
        parameters=COUNT,
        active_parameters=COUNT,
        layers=COUNT,
        context_length=maybe(COUNT),
    ),
    users=COUNT,
    prices=listed(exactly(card=TEXT, price=NUMBER)),
    machines=listed(
        exactly(
            machine=TEXT,
            snapshot=MACHINE,
            verdict=CANDIDATE["properties"]["verdict"],
            runs=FLAG,
            quant=maybe(TEXT),
            power_limit_w=maybe(NUMBER),
            price=maybe(PRICE),
            one_user=CANDIDATE,
            users=maybe(CANDIDATE),
            one_card=maybe(CANDIDATE),
        )
    ),
    advice=listed(
        exactly(
            kind={"enum": ["one-card", "one-card-smaller", "one-card-offload", "other-machine", "money"]},
            machine=TEXT,
            as_well=maybe(FLAG),
            text=TEXT,
        )
    ),
)


@pytest.fixture
def quiet(mgpu: Mgpu, tmp_path: Path) -> Iterator[Mgpu]:
    """mgpu far from any hub, with nothing on disk."""
    cache = str(tmp_path / "cache")
    mgpu.environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": cache, "XDG_CACHE_HOME": cache, "PATH": "/nonexistent"}
    yield mgpu
    mgpu.assert_nothing_left()


def compared(mgpu: Mgpu, words: str) -> dict[str, Json]:
    """The machines of the answer by their names; the answer is whole and agrees with its exit code."""
    ended = mgpu("plan", *shlex.split(words), "--json")
    data = checked(ended.json, "plan", COMPARED)
    assert ended.json["simulated"]
    machines = {machine["machine"]: machine for machine in data["machines"]}
    assert ended.exit_code == (0 if any(machine["runs"] for machine in data["machines"]) else 1)
    for machine in data["machines"]:
        assert machine["verdict"] == machine["one_user"]["verdict"]
        assert machine["one_user"]["parallel"] == 1
        assert machine["users"] is None or machine["users"]["parallel"] == data["users"]
        assert {statement["machine"] for statement in data["advice"]} <= machines.keys()
    return machines


def test_each_machine_gets_the_largest_quantisation_that_fits(quiet: Mgpu) -> None:
    found = compared(quiet, "llama-70b --machine 2x5090 --machine 4090+4080 --machine 4090 --backend llama.cpp")
    assert [(each["verdict"], each["quant"], each["runs"]) for each in found.values()] == [
        ("fits", "Q6_K", True),
        ("fits", "Q3_K_M", True),
        ("fits-with-offload", "Q4_K_M", False),
    ]
    assert [each["power_limit_w"] for each in found.values()] == [1150, 770, 450]


def test_a_quantisation_that_was_asked_for_is_kept(quiet: Mgpu) -> None:
    found = compared(quiet, "llama-70b --machine 2x5090 --machine 4090+4080 --quant q4_k_m --ctx 8k")
    assert [(each["verdict"], each["quant"]) for each in found.values()] == [
        ("fits", "Q4_K_M"),
        ("fits-with-offload", "Q4_K_M"),
    ]


@pytest.mark.parametrize(
    ("words", "exit_code"),
    [
        pytest.param("llama-70b --machine 4090 --machine 2x4090", 0, id="one of them is enough"),
        pytest.param("llama-405b --machine 4090 --machine 2x4090", 1, id="none of them"),
        pytest.param("llama-70b --machine 4090 --machine 3090 --offload allow", 0, id="host memory is allowed"),
    ],
)
def test_the_exit_code_says_whether_any_machine_runs_it(quiet: Mgpu, words: str, exit_code: int) -> None:
    compared(quiet, words)
    assert quiet("plan", *shlex.split(words)).exit_code == exit_code


def test_how_many_users_is_the_users_choice(quiet: Mgpu) -> None:
    words = "llama-8b --machine 3060-12 --machine 4090"
    assert {each["users"]["parallel"] for each in compared(quiet, words).values()} == {8}
    assert {each["users"]["parallel"] for each in compared(quiet, f"{words} --parallel 3").values()} == {3}
    assert [each["users"] for each in compared(quiet, f"{words} --parallel 1").values()] == [None, None]
    assert "3 users" in quiet("plan", *shlex.split(words), "--parallel", "3").out


def test_several_users_are_compared_with_the_same_context(quiet: Mgpu) -> None:
    words = "llama-70b --machine 2x4090 --machine 8xH100"
    assert [each["users"]["ctx_tokens"] for each in compared(quiet, words).values()] == [2048, 2048]
    assert "8 users with 2048 tokens each" in quiet("plan", *shlex.split(words)).out
    roomy = compared(quiet, "llama-8b --machine 4090 --machine 8xH100 --quant q4_k_m").values()
    assert [each["users"]["ctx_tokens"] for each in roomy] == [8192, 8192]
    asked = compared(quiet, f"{words} --ctx 4k").values()
    assert [each["users"]["ctx_tokens"] for each in asked] == [4096, 4096]


def test_prices_are_summed_over_the_cards(quiet: Mgpu) -> None:
    words = "llama-8b --machine 2x4090 --machine 4090+3060-12 --price 'RTX 4090=1800' --price 3060-12=250.50"
    prices = [each["price"] for each in compared(quiet, words).values()]
    assert [price["total"] for price in prices] == [3600, 2050.5]
    for price, machine in zip(prices, compared(quiet, words).values(), strict=True):
        speed = machine["one_user"]["speed"]["decode_tok_s"]
        rate = price["one_user_tok_s_per_1000"]
        assert (rate is None) == (speed is None)
        assert speed is None or rate == pytest.approx(speed["likely"] / price["total"] * 1000)


def test_a_card_without_a_price_leaves_the_sum_open(quiet: Mgpu) -> None:
    words = "llama-8b --machine 4090 --machine 4080 --price 4090=0 --price 3090=700"
    found = compared(quiet, words)
    assert [each["price"]["total"] for each in found.values()] == [0, None]
    assert [each["price"]["without_price"] for each in found.values()] == [[], ["GeForce RTX 4080"]]
    ended = quiet("plan", *shlex.split(words))
    assert "not given: GeForce RTX 4080" in ended.out
    assert "no machine here has one" in ended.err


def test_a_price_is_added_to_the_plan_of_one_machine(quiet: Mgpu) -> None:
    words = ["plan", "llama-8b", "--machine", "2x3090", "--price", "RTX 3090=700"]
    assert quiet(*words, "--json").json["data"]["price"]["total"] == 1400
    assert any(line.split()[:2] in (["price", "1400"], ["price", "1400;"]) for line in quiet(*words).out.splitlines())
    assert "price" not in quiet(*words[:-2], "--json").json["data"]


def test_a_snapshot_is_compared_with_an_expression(quiet: Mgpu, tmp_path: Path) -> None:
    gpu = {"index": 0, "vendor": "nvidia", "name": "NVIDIA GeForce RTX 4090", "power_limit_w": 300.0}
    gpu |= {"total_bytes": 24 * 2**30, "free_bytes": 20 * 2**30, "bandwidth_gb_s": 1008.0}
    odd = gpu | {"index": 1, "name": "NVIDIA Something New", "vendor": "nvidia", "power_limit_w": None}
    path = tmp_path / "machine.json"
    path.write_text(json.dumps({"captured_at": "2026-01-01T00:00:00Z", "source": "probed", "gpus": [gpu, odd]}))
    words = f"qwen3-8b --machine {path} --machine 4090 --price 'NVIDIA Something New=500' --price 4090=1000"
    found = compared(quiet, words)
    assert [each["power_limit_w"] for each in found.values()] == [None, 450]
    assert [each["price"]["total"] for each in found.values()] == [1500, 1000]


@pytest.mark.parametrize("width", [60, 100])
def test_the_screen_fits_its_width(quiet: Mgpu, width: int) -> None:
    words = "gpt-oss-120b --machine 3x3090 --machine 2x5090 --machine 4090 --price 5090=2500 --price 3090=700"
    ended = quiet("plan", *shlex.split(words), COLUMNS=str(width))
    assert "gpt-oss-120b with 8192 tokens runs on 2 of 3 machines" in ended.out
    assert "only with --offload allow" in ended.out.replace("\n            ", " ")
    assert max(map(len, ended.out.splitlines())) <= width
    for cell in ("MXFP4", "1050", "2100", "offload", "8 users"):
        assert cell in ended.out


@pytest.mark.parametrize(
    ("words", "exit_code", "message", "hint"),
    [
        pytest.param("llama-8b --machine 4090 --machine 4090", 2, "names 4090 twice", "once", id="the same twice"),
        pytest.param(
            "llama-8b --machine 2x4090 --machine 4090+rtx4090",
            2,
            "4090+rtx4090 and 2x4090",
            "once",
            id="in other words",
        ),
        pytest.param("llama-8b --machine 4090 --machine 2x9999", 2, "--machine 2x9999: the card '9999'", "", id="card"),
        pytest.param(
            "llama-8b --machine 4090 --machine 0x4090", 2, "--machine 0x4090", "none", id="no cards of a kind"
        ),
        pytest.param("llama-8b --machine 4090 --machine /no.json", 2, "/no.json", "", id="a file that is not there"),
        pytest.param("llama-8b --machine 4090 --machine ''", 2, "--machine", "", id="an empty one"),
        pytest.param("llama-8b " + "--machine 4090 " * 17, 2, "more than the 16", "--help", id="too many"),
        pytest.param("nope --machine 4090 --machine 3090", 2, "no profile 'nope'", "profiles list", id="no such model"),
        pytest.param("llama-8b qwen3-8b --machine 4090 --machine 3090", 2, "one MODEL", "plan llama-8b", id="models"),
        pytest.param("llama-8b --machine 4090 --machine 3090 --explain", 2, "--explain", "--machine 4090", id="sums"),
        pytest.param("llama-8b --machine 4090 --machine 3090 --exact", 2, "--exact", "--exact", id="--exact"),
        pytest.param(
            "llama-8b --machine 4090 --machine 2x3090 --tensor-split 1,1", 2, "--machine 4090:", "", id="split"
        ),
        pytest.param("llama-8b --machine 4090 --machine 2x3090 --gpus 2", 3, "--machine 4090:", "", id="too few cards"),
        pytest.param("llama-8b --machine 4090 --price 4090", 2, "'4090' is not a card and", "1800", id="no price"),
        pytest.param("llama-8b --machine 4090 --price 4090=1800€", 2, "without a currency", "1800", id="a currency"),
        pytest.param("llama-8b --machine 4090 --price 4090=-1", 2, "is not a card and", "1800", id="a negative price"),
        pytest.param("llama-8b --machine 4090 --price 4090=nan", 2, "is not a card and", "1800", id="not a number"),
        pytest.param("llama-8b --machine 4090 --price =5", 2, "is not a card and", "1800", id="no card"),
        pytest.param("llama-8b --machine 4090 --price ''", 2, "is not a card and", "1800", id="nothing"),
        pytest.param("llama-8b --machine 4090 --price 4099=5", 2, "nearest names", "1800", id="an unknown card"),
        pytest.param("llama-8b --machine 4090 --price a100=5", 2, "ambiguous", "1800", id="two cards by that name"),
        pytest.param("llama-8b --machine 4090 --price 4090=5 --price RTX4090=6", 2, "twice", "once", id="two prices"),
        pytest.param("llama-8b qwen3-8b --machine 2x4090 --price 4090=5", 2, "one MODEL", "plan", id="price of models"),
    ],
)
def test_what_cannot_be_compared_is_explained(quiet: Mgpu, words: str, exit_code: int, message: str, hint: str) -> None:
    ended = quiet("plan", *shlex.split(words))
    assert ended.exit_code == exit_code, ended
    assert message in ended.err
    assert hint in ended.err
    assert "Traceback" not in ended.err
    assert not ended.out
    as_json = quiet("plan", *shlex.split(words), "--json")
    assert as_json.exit_code == exit_code
    assert message in as_json.json["errors"][0]["message"]
