"""The sums behind a speed, and the numbers they are made of."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest

from mgpu.planning.prediction import predict
from mgpu.planning.speed_constants import CONSTANTS, VALUES
from mgpu.planning.work import HostPart, Work
from tests.planning.measured_rows import MeasuredRow, single_stream
from tests.planning.measured_scores import Recorder, evidence
from tests.planning.works import (
    CHIPS,
    ENGINES,
    LIBRARIES,
    RTX_4090,
    RX_7900_XTX,
    dense,
    predicted,
    with_experts,
)


def summed_ms(lines: tuple[str, ...]) -> float:
    """Redo the sums of a basis with what is printed, as a reader would."""
    total = 0.0
    for line in lines:
        if line.startswith("one user:"):
            return total
        sums = line.split(": ", 1)[1].split(" = ")[0].replace("log2(2 cards)", "1").replace("log2(4 cards)", "2")
        if "GB/s" in sums:
            read, bandwidth, reached = (float(part) for part in re.findall(r"[\d.]+", sums)[:3])
            total += read / bandwidth / reached * 1e3
        elif line.startswith("power"):
            share, cut = (float(part) for part in re.findall(r"[\d.]+", sums)[1:])
            total /= 1 - share * cut
        else:
            count, bracket = sums.split(" × ", 1)
            numbers = eval(re.sub(r"[^\d.×+() ]", "", bracket).replace("×", "*"))
            total += float(re.findall(r"\d+", count)[0]) * float(numbers) / 1e3
    raise AssertionError(lines)


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row.id} {row.group}") for row in single_stream()[::9]])
def test_a_reader_can_redo_the_sum_with_a_pencil(row: MeasuredRow) -> None:
    found = predicted(row.work)
    assert 1e3 / summed_ms(found.basis) == pytest.approx(found.decode.likely, rel=0.02)


def test_the_sum_for_many_users_is_shown_too() -> None:
    basis = predicted(dense(users=16, engine="vllm", cards=2, tensor=True)).basis
    assert any(line.startswith("16 users, weights") for line in basis)
    assert any(line.startswith("16 users: 16 ÷ ") for line in basis)
    (sending,) = [line for line in basis if "sending between cards" in line]
    layers, users, values, size, around, sent, rate, result = map(float, re.findall(r"[\d.]+", sending)[1:])
    assert layers * users * values * size * around / 1e9 == pytest.approx(sent, rel=0.01)
    assert sent / rate * 1e3 == pytest.approx(result, rel=0.01)


def test_the_interval_and_the_constants_are_told() -> None:
    found = predicted(dense(cards=2, tensor=True))
    (interval,) = [line for line in found.basis if line.startswith("its interval: ")]
    down, up = map(float, re.findall(r"[\d.]+", interval))
    assert found.decode.likely / down == pytest.approx(found.decode.low, rel=0.01)
    assert found.decode.likely * up == pytest.approx(found.decode.high, rel=0.01)
    told = [line for line in found.basis if line.startswith("where ")]
    assert any("llama.cpp weights quantised is 0.91 of the rate (fit, " in line for line in told)
    assert not any(re.match("where (power|vLLM|llama.cpp prefill, layer split)", line) for line in told)


@pytest.mark.parametrize("rate", [pytest.param(None, id="unknown"), pytest.param(80.0, id="known")])
def test_host_memory_is_a_sum_at_best_and_at_worst(rate: float | None) -> None:
    host = HostPart(layers=1, weights_bytes=9e9, expert_bytes=2e9, bandwidth_gb_s=rate)
    found = predicted(dense(host=host))
    for end in ("best", "worst"):
        (line,) = [line for line in found.basis if line.startswith(f"host memory at {end}: ")]
        sum_, result = line.split(": ", 1)[1].split(" = ")
        words = re.sub(r"GB/s|GB|of experts", "", sum_).replace("÷", "/")
        assert eval(words) * 1e3 == pytest.approx(float(result.split()[0]), rel=0.01)
    (both,) = [line for line in found.basis if line.startswith("one user: ")]
    slow, low, fast, high = (
        re.findall(r"1 ÷ \(([^)]*)\) = ([\d.]+)", both)[0] + re.findall(r"to 1 ÷ \(([^)]*)\) = ([\d.]+)", both)[0]
    )
    for words, shown in ((slow, low), (fast, high)):
        assert 1e3 / eval(words.replace("ms", "").replace("×", "*")) == pytest.approx(float(shown), rel=0.01)


def test_every_constant_says_how_much_evidence_it_has() -> None:
    assert all(constant.origin for constant in CONSTANTS.values())
    found = evidence()
    assert {name: (each.rows, each.sources) for name, each in CONSTANTS.items() if each.rows} == found


def test_every_constant_is_used() -> None:
    recorder = Recorder(VALUES)
    hosts = (None, HostPart(layers=1, weights_bytes=1e9), HostPart(layers=1, weights_bytes=1e9, bandwidth_gb_s=80))
    for chip, engine, library, tensor, host in itertools.product(CHIPS, ENGINES, LIBRARIES, (False, True), hosts):
        work = dense(chip, cards=2, tensor=tensor, kv_gb=1, engine=engine, library=library, users=4, host=host)
        for each in (work, with_experts(work), replace(work, before_2025=True), replace(work, quantised=False)):
            for link in ("nvlink", "peer", "host"):
                predict(replace(each, link=link), recorder)
    predict(work_of_unequal_cards(), recorder)
    assert recorder.read == set(CONSTANTS)


def work_of_unequal_cards() -> Work:
    work = dense(RTX_4090, cards=2, tensor=True)
    (stage,) = work.stages
    slower = replace(stage.shares[1], chip=RX_7900_XTX)
    return replace(work, stages=(replace(stage, shares=(stage.shares[0], slower)),))


def test_unequal_cards_at_once_may_be_slower_than_the_slower_one_twice() -> None:
    """Measured once: RTX 5090 and 3090 Ti 93.7 tokens/s, two RTX 3090 154."""
    found = predicted(work_of_unequal_cards()).decode
    alike = predicted(dense(RX_7900_XTX, cards=2, tensor=True)).decode
    assert found.low < 0.61 * alike.likely
