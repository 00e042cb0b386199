"""`mgpu plan --explain`: whoever redoes its sums with a pencil finds what is printed."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from .contract import PLAN, checked
from .program import Mgpu

CASES = [
    pytest.param("llama-70b --machine 2x4090 --backend llama.cpp --split-mode layer", id="a layer split"),
    pytest.param("llama-70b --machine 2x4090 --backend llama.cpp --split-mode tensor", id="a tensor split"),
    pytest.param("llama-70b --machine 4090+5090 --backend llama.cpp --split-mode layer", id="unequal cards"),
    pytest.param("gpt-oss-120b --machine 3x3090 --split-mode layer", id="experts and windows"),
    pytest.param("llama-70b --machine 2x4090 --backend vllm", id="vLLM"),
    pytest.param("llama-70b --machine 4x3090 --backend vllm --parallel 8 --ctx 2k", id="vLLM for eight users"),
    pytest.param("llama-70b --machine 2x4090 --backend ollama", id="Ollama"),
    pytest.param("llama-70b --machine 4090 --offload allow --backend llama.cpp", id="layers in host memory"),
    pytest.param("llama-8b --machine none --backend llama.cpp", id="the CPU"),
    pytest.param(
        "llama-70b --machine 4x4090 --backend vllm --tensor-parallel 2 --pipeline-parallel 2", id="a pipeline of pairs"
    ),
]
NUMBER = r"\d+(?:\.\d+)?"


@pytest.fixture
def sums(mgpu: Mgpu, tmp_path: Path) -> Mgpu:
    mgpu.environment["HF_HUB_CACHE"] = str(tmp_path)
    return mgpu


def lines(mgpu: Mgpu, words: str) -> list[str]:
    """The lines between ledger and other ways, each whole."""
    out = mgpu("plan", *words.split(), "--explain", COLUMNS="400").out
    return [line[12:] for line in out.splitlines() if re.match(r" {2}(\w+ +| {10})\S", line)]


def tolerance(printed: str) -> float:
    """Half of the last digit that is printed."""
    return 0.5 / float(10 ** len(printed.partition(".")[2]))


@pytest.mark.parametrize("words", CASES)
def test_what_a_card_holds_can_be_added_up(sums: Mgpu, words: str) -> None:
    found = 0
    for line in lines(sums, words):
        for parts, total in re.findall(rf"((?:{NUMBER} \+ )+{NUMBER}) = ({NUMBER})", line):
            terms = parts.split(" + ")
            assert math.fsum(map(float, terms)) == pytest.approx(float(total), abs=1e-9)
            found += 1
        for left, right, rest in re.findall(rf"({NUMBER}) free - ({NUMBER}) = (-?{NUMBER}) spare", line):
            assert float(left) - float(right) == pytest.approx(float(rest), abs=1e-9)
    data = checked(sums("plan", *words.split(), "--json").json, "plan", PLAN)
    assert found >= len(data["candidates"][0]["devices"])


@pytest.mark.parametrize("words", CASES)
def test_a_compute_buffer_can_be_multiplied(sums: Mgpu, words: str) -> None:
    for line in lines(sums, words):
        if found := re.search(r"\((.*) = (\d+)\) × (\d+) × 4 B((?: \+ .*)?) = ([\d.]+) MiB", line):
            values, count, tokens, others, total = found.groups()
            assert sum(int(term.split()[-1]) for term in values.split(" + ")) == int(count)
            beside = sum(map(float, re.findall(r"([\d.]+) MiB", others)))
            assert int(count) * int(tokens) * 4 / 2**20 + beside == pytest.approx(float(total), abs=0.02)
            break
    else:
        assert "vllm" in words or "none" in words


@pytest.mark.parametrize("words", CASES)
def test_what_a_token_reads_is_what_its_times_are_of(sums: Mgpu, words: str) -> None:
    shown = lines(sums, words)
    (read,) = [line for line in shown if line.startswith("a token reads ")]
    parts, total = re.findall(r"a token reads (.*?) = ([\d.]+) GB", read)[0]
    products = re.sub(r"GB|of \w+( head)?", "", parts).replace("×", "*").replace("÷", "/")
    products = products.replace("the head", "")
    assert eval(products) == pytest.approx(float(total), abs=0.03)
    weights = [line for line in shown if line.startswith("weights: ")]
    width = max((int(n) for line in weights for n in re.findall(r"on each of (\d+) cards", line)), default=1)
    on_cards = sum(float(re.findall(r"([\d.]+) GB", line)[0]) for line in weights) * width
    if not any("host memory" in line for line in shown):
        assert on_cards == pytest.approx(float(total), rel=0.01)


@pytest.mark.parametrize("words", CASES)
def test_a_cache_can_be_multiplied(sums: Mgpu, words: str) -> None:
    for line in lines(sums, words):
        cache = re.search(
            rf"(\d+) heads? × \((\d+) K × ({NUMBER}) B \+ (\d+) V × ({NUMBER}) B\) × (\d+) tokens.* × (\d+) users?"
            rf" = ({NUMBER}) MiB",
            line,
        )
        if cache:
            heads, keys, key_bytes, values, value_bytes, tokens, users, total = map(float, cache.groups())
            size = heads * (keys * key_bytes + values * value_bytes) * tokens * users / 2**20
            assert size == pytest.approx(total, abs=0.006)
            break
    else:
        assert "vllm" in words
        assert any(
            re.search(r"heads? on each card × \(\d+ K \+ \d+ V\) f16 × 2 B", line) for line in lines(sums, words)
        )


@pytest.mark.parametrize("words", CASES)
def test_each_time_of_a_token_can_be_divided(sums: Mgpu, words: str) -> None:
    shown = lines(sums, words)
    checked_terms, milliseconds = 0, 0.0
    for line in shown:
        reading = re.match(
            rf"(?:weights|KV cache): ({NUMBER}) GB ÷ ({NUMBER}) GB/s ÷ ({NUMBER})(?:,.*)? = ({NUMBER}) ms", line
        )
        starting = re.match(
            rf"(?:starting kernels|from card to card): (\d+)(?: layers)? × ({NUMBER}) µs = ({NUMBER}) ms", line
        )
        if reading:
            size, rate, reached, result = reading.groups()
            expected = float(size) / float(rate) / float(reached) * 1e3
            assert expected == pytest.approx(float(result), rel=tolerance(size) / float(size) + 0.005, abs=0.006)
        elif starting:
            count, each, result = starting.groups()
            assert float(count) * float(each) / 1e3 == pytest.approx(float(result), rel=0.01, abs=0.006)
        else:
            cards = re.match(
                rf"adding up between cards: (\d+) layers × \((\d+) µs × log2\((\d+) cards\)\) = ({NUMBER}) ms", line
            )
            if not cards:
                continue
            count, each, width, result = cards.groups()
            assert float(count) * float(each) * math.log2(int(width)) / 1e3 == pytest.approx(float(result), abs=0.006)
        checked_terms += 1
        milliseconds += float(result)
    one_user = next(line for line in shown if line.startswith("one user: "))
    if summed := re.match(rf"one user: 1 ÷ ({NUMBER}) ms = ({NUMBER}) tokens/s", one_user):
        assert float(summed[1]) == pytest.approx(milliseconds, abs=0.006 * (checked_terms + 1))
        assert 1e3 / float(summed[1]) == pytest.approx(float(summed[2]), abs=0.06)
        assert checked_terms >= 3
    else:
        assert any(line.startswith("host memory at best: ") for line in shown)


@pytest.mark.parametrize("words", CASES)
def test_the_bound_is_what_the_printed_sum_gives_and_above_what_is_expected(sums: Mgpu, words: str) -> None:
    bound = None
    for line in lines(sums, words):
        if alike := re.match(rf"({NUMBER}) GB/s ÷ ({NUMBER}) GB.* = ({NUMBER}) at most", line):
            bound, given, size = float(alike[3]), float(alike[1]) / float(alike[2]), alike[2]
            assert bound <= given * (1 + tolerance(size) / float(size))
            assert given * (1 - tolerance(size) / float(size)) - bound <= (0.1 if bound < 100 else 1)
        elif unlike := re.match(rf"1 ÷ \((.*)\) = ({NUMBER}) at most", line):
            seconds = sum(float(a) / float(b) for a, b in re.findall(rf"({NUMBER}) GB ÷ ({NUMBER}) GB/s", unlike[1]))
            bound = float(unlike[2])
            assert bound == pytest.approx(1 / seconds, rel=0.01)
    data = checked(sums("plan", *words.split(), "--json").json, "plan", PLAN)
    speed = data["candidates"][0]["speed"]
    assert (bound is None) == (speed["bound_tok_s"] is None)
    if bound is not None:
        assert speed["decode_start_tok_s"]["high"] <= speed["bound_tok_s"]
        assert bound <= speed["bound_tok_s"] < bound * 1.02
