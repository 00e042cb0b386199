"""`mgpu plan MODEL` on several machines: side by side in words, as JSON and in the exit code; prices; bad input."""

from __future__ import annotations

import json
import re
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
            largest=maybe(CANDIDATE),
            usual=maybe(CANDIDATE),
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


@pytest.mark.parametrize(
    ("model", "machines"),
    [
        pytest.param("llama-70b", ["2x4090", "2x3090"], id="tensor parallel"),
        pytest.param("qwen3-14b", ["2x4090", "1x4090"], id="one card and two"),
        pytest.param("llama-8b", ["3060", "3070"], id="small cards"),
    ],
)
def test_each_machine_is_planned_as_it_is_alone(quiet: Mgpu, model: str, machines: list[str]) -> None:
    found = compared(quiet, f"{model} {' '.join(f'--machine {name}' for name in machines)}")
    for name in machines:
        alone = quiet("plan", model, "--machine", name, "--json").json["data"]
        best = alone["candidates"][alone["best"]]
        assert found[name]["one_user"] == best
        assert f"{best['quant']}" in quiet("plan", model, "--machine", name).out.splitlines()[0]


@pytest.mark.parametrize(
    ("words", "quants", "largest"),
    [
        pytest.param(
            "llama-70b --machine 2x5090 --machine 4090+4080 --machine 4090 --backend llama.cpp",
            [("fits", "Q4_K_M"), ("fits-with-offload", "Q4_K_M"), ("fits-with-offload", "Q4_K_M")],
            ["Q6_K", "Q3_K_M", None],
            id="one quantisation for all, and the largest that fits as a remark",
        ),
        pytest.param(
            "llama-8b --machine 3060 --machine 3070 --backend llama.cpp",
            [("fits", "Q4_K_M"), ("fits", "Q4_K_M")],
            ["Q8_0", "Q5_K_M"],
            id="the context comes before a larger quantisation",
        ),
        pytest.param(
            "mistral-small-24b --machine 4090 --machine 2xH100",
            [("fits", "Q4_K_M"), ("fits", "Q4_K_M")],
            ["Q6_K", "bf16"],
            id="the smallest that a machine is planned with",
        ),
    ],
)
def test_machines_are_compared_in_one_quantisation(
    quiet: Mgpu, words: str, quants: list[tuple[str, str]], largest: list[str | None]
) -> None:
    found = compared(quiet, words).values()
    assert [(each["verdict"], each["quant"]) for each in found] == quants
    assert [each["largest"] and each["largest"]["quant"] for each in found] == largest
    for each in found:
        ways = [way for way in (each["one_user"], each["largest"], each["usual"]) if way]
        assert {way["ctx_tokens"] for way in ways} == {8192}
        assert not each["largest"] or each["largest"]["verdict"] == "fits"
    shown = " ".join(quiet("plan", *shlex.split(words)).out.split())
    for each in found:
        words_of = "it has room for" if each["verdict"] == "fits" else "it would fit with"
        assert not each["largest"] or f"{each['machine']}: {words_of} {each['largest']['quant']} (" in shown


@pytest.mark.parametrize(
    ("words", "codes", "told"),
    [
        pytest.param(
            "llama-70b --machine 4080 --machine '4090' --backend vllm",
            ["does-not-fit", "does-not-fit"],
            "llama-70b does not fit 4080: gpu0: ",
            id="none fits",
        ),
        pytest.param(
            "llama-70b --machine 4080 --machine 4090 --backend llama.cpp",
            ["does-not-fit", "does-not-fit"],
            "with --offload allow it would run",
            id="with layers in host memory",
        ),
        pytest.param("llama-70b --machine 4080 --machine 2x4090", [], "", id="one runs it"),
    ],
)
def test_a_no_says_of_each_machine_why(quiet: Mgpu, words: str, codes: list[str], told: str) -> None:
    ended = quiet("plan", *shlex.split(words), "--json")
    errors = ended.json["errors"]
    assert (ended.json["ok"], [error["code"] for error in errors]) == (not codes, codes)
    for error in errors:
        assert error["hint"].startswith("mgpu plan llama-70b --machine 40")
    assert not errors or told in errors[0]["message"]
    assert "error" not in quiet("plan", *shlex.split(words)).err, "the screen says it"


def test_what_a_machine_alone_is_planned_with_is_told(quiet: Mgpu) -> None:
    words = "mistral-small-24b --machine 4090 --machine 2xH100"
    usual = [each["usual"] and each["usual"]["quant"] for each in compared(quiet, words).values()]
    assert usual == [None, "fp8-b128"]
    assert "2xH100: alone it would be planned with fp8-b128 (" in quiet("plan", *shlex.split(words)).out


@pytest.mark.parametrize(
    ("words", "rates"),
    [
        pytest.param("", [None, 1], id="host memory is not allowed"),
        pytest.param("--offload allow", [1, 1], id="it is allowed: the least that it gives"),
    ],
)
def test_what_a_machine_does_not_run_wins_nothing(quiet: Mgpu, words: str, rates: list[int | None]) -> None:
    asked = f"llama-70b --machine 1x3060 --machine 2x4090 --price 3060=1 --price 4090=2000 {words}"
    found = list(compared(quiet, asked).values())
    for machine, rate in zip(found, rates, strict=True):
        speed, price = machine["one_user"]["speed"]["decode_tok_s"], machine["price"]
        counts = speed["likely" if machine["verdict"] == "fits" else "low"] / price["total"] * 1000
        assert price["one_user_tok_s_per_1000"] == (pytest.approx(counts) if rate else None)
    assert "most for the money" not in quiet("plan", *shlex.split(asked)).out


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
    shown = quiet("plan", *shlex.split(words)).out
    assert "8 users with 2048 tokens each" in shown
    assert "2048 each" in shown, "the heading says so, too"
    assert "(5)" in next(line for line in shown.splitlines() if line.startswith("2x4090"))
    assert "(5): room for 5 of 8 users at once" in shown
    assert (
        "most for the money, 8 users" not in quiet("plan", *shlex.split(f"{words} --price 4090=9 --price H100=9")).out
    )
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
    words = "llama-8b --machine 4090 --machine 4080 --price 4090=1800 --price 3090=700"
    found = compared(quiet, words)
    assert [each["price"]["total"] for each in found.values()] == [1800, None]
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
        pytest.param("llama-8b --machine 4090 --price 4090=0", 2, "for nothing", "leave it out", id="a price of 0"),
        pytest.param("llama-8b --machine 4090 --price 4090=0.00", 2, "for nothing", "leave it out", id="0, in cents"),
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


def test_contexts_that_differ_have_a_column(quiet: Mgpu) -> None:
    ended = quiet("plan", "llama-8b", "--machine", "3070", "--machine", "4090", "--quant", "Q6_K")
    assert ended.exit_code == 0, ended
    assert re.search(r"(?m)^machine +tokens +quantisation", ended.out)
    assert re.search(r"(?m)^4090 +fits +8192 ", ended.out)
