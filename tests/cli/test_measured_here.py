"""What `mgpu run --ask` saw of this machine's speed, in the plans that come after it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.llama_server import install

from .program import Ended, Mgpu
from .two_cards import CARDS

RIG = Path(__file__).parents[1] / "machines" / "rigs" / "2x4090-x670e.txt"
# Slower than predicted of two such cards; the cache is what the planner expects of the tiny model.
FAKE = {"FAKE_TOKENS_PER_SECOND": "100", "FAKE_FAIL": "talkative", "FAKE_KV_BYTES_PER_TOKEN": "8192"}
ONE = ("--gpus", "gpu0")


@pytest.fixture
def two_cards(mgpu: Mgpu, nvml: dict[str, Path]) -> Mgpu:
    mgpu.environment |= {**CARDS, "LD_LIBRARY_PATH": str(nvml["new"]), "FAKE_NVML": str(RIG)}
    return mgpu


def asked(mgpu: Mgpu, model: Path, *words: object, tokens: int = 40, **variables: str | None) -> Ended:
    ended = mgpu("run", model, "--ask", "Go on", "--max-tokens", tokens, *words, **{**FAKE, **variables})
    assert ended.exit_code == 0, ended
    return ended


def speed(mgpu: Mgpu, model: Path, *words: object, **variables: str | None) -> dict[str, Any]:
    ended = mgpu("plan", model, "--json", *words, **variables)
    assert ended.exit_code == 0, ended
    data = ended.json["data"]
    found = data["candidates"][0]["speed"]
    assert isinstance(found, dict)
    return found


def measured(found: dict[str, Any]) -> bool:
    told = any(line.startswith("measured here: ") for line in found["sums"])
    assert told is bool(found["basis"] and found["basis"].startswith("measured here "))
    return told


def test_a_plan_shows_what_was_measured(two_cards: Mgpu, tiny: Path) -> None:
    before = speed(two_cards, tiny, *ONE)
    for _ in range(2):
        asked(two_cards, tiny, *ONE)
    after = speed(two_cards, tiny, *ONE)
    assert not measured(before)
    assert measured(after)
    assert after["decode_start_tok_s"]["likely"] < 105
    assert after["decode_start_tok_s"]["high"] < before["decode_start_tok_s"]["low"]
    screen = two_cards("plan", tiny, *ONE, "--explain", COLUMNS="200").out
    assert re.search(r"(?m)^  speed     .* tokens/s, one user", screen), screen
    assert re.search(r"measured here 2 times: \d+\.\d tokens/s at \d+ tokens, the prediction × 0\.\d\d", screen)
    assert re.search(r"measured here: 2 times, median \d+\.\d tokens/s at \d+ tokens, predicted \d+\.\d", screen)
    told = re.search(r"(?m)^plan .* gpu0 .* (\d+)-(\d+) tokens/s expected$", asked(two_cards, tiny, *ONE).err)
    assert told
    assert int(told[2]) < before["decode_start_tok_s"]["low"]
    two_cards.assert_nothing_left()


def test_a_way_that_was_slower_than_another_is_predicted_to_be_comes_after_it(two_cards: Mgpu, tiny: Path) -> None:
    devices = [asked(two_cards, tiny).err.count(" · gpu0 · ")]
    devices.append(asked(two_cards, tiny, tokens=1).err.count(" · gpu0 · "))
    assert devices == [1, 0]


def test_it_holds_for_another_context_of_the_same_setting(two_cards: Mgpu, tiny: Path) -> None:
    asked(two_cards, tiny, *ONE, "--ctx", "1024")
    assert measured(speed(two_cards, tiny, *ONE, "--ctx", "16k"))


def test_it_holds_for_exactly_its_setting(two_cards: Mgpu, tiny: Path, tmp_path: Path) -> None:
    asked(two_cards, tiny, *ONE)
    rig = RIG.read_text(encoding="utf-8")
    limited, other, copy = tmp_path / "limited", tmp_path / "other", tmp_path / "copy.gguf"
    limited.write_text(rig.replace("power.limit = 450000", "power.limit = 300000"), encoding="utf-8")
    other.write_text(rig.replace("GPU-0", "GPU-1"), encoding="utf-8")
    copy.symlink_to(tiny)
    (tmp_path / "engine").mkdir()
    build = str(install(tmp_path / "engine"))
    renamed = {"FAKE_NVML": str(other), "FAKE_UUIDS": CARDS["FAKE_UUIDS"].replace("GPU-0", "GPU-1")}
    assert measured(speed(two_cards, tiny, *ONE))
    others = {
        "flag": speed(two_cards, tiny, *ONE, "--flash-attn", "off"),
        "argument of the engine": speed(two_cards, tiny, *ONE, "--", "--no-mmap"),
        "variable": speed(two_cards, tiny, *ONE, GGML_CUDA_FORCE_MMQ="1"),
        "the other card": speed(two_cards, tiny, "--gpus", "gpu1"),
        "both cards": speed(two_cards, tiny, "--gpus", "2", "--split-mode", "layer"),
        "another card in its place": speed(two_cards, tiny, *ONE, **renamed),
        "power limit": speed(two_cards, tiny, *ONE, FAKE_NVML=str(limited)),
        "build": speed(two_cards, tiny, *ONE, MGPU_LLAMA_SERVER=build),
        "model": speed(two_cards, copy, *ONE),
        "machine": speed(two_cards, tiny, "--machine", "4090"),
    }
    assert [name for name, found in others.items() if measured(found)] == []
    assert measured(speed(two_cards, tiny, *ONE))


@pytest.mark.parametrize(
    ("tokens", "variables"),
    [
        pytest.param(31, {}, id="a short answer"),
        pytest.param(40, {"FAKE_FAIL": "repeat-token"}, id="an engine that is not as planned"),
    ],
)
def test_what_is_no_measurement_is_not_remembered(
    mgpu: Mgpu, tiny: Path, tokens: int, variables: dict[str, str]
) -> None:
    asked(mgpu, tiny, tokens=tokens, **variables)
    assert list(mgpu.state.glob(".meas*")) == []


def test_a_renewed_engine_is_another_build(mgpu: Mgpu, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    build = install(tmp_path / "engine")
    mgpu.environment["MGPU_LLAMA_SERVER"] = str(build)
    asked(mgpu, tiny)
    assert measured(speed(mgpu, tiny))
    os.utime(build, (1, 1))
    assert not measured(speed(mgpu, tiny))


def test_a_damaged_record_and_a_folder_that_cannot_be_made_keep_nobody_from_planning(mgpu: Mgpu, tiny: Path) -> None:
    asked(mgpu, tiny)
    (path,) = mgpu.state.glob(".meas*")
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "tok_s": "fast"}) + "\n" + path.read_text()[:-20])
    assert not measured(speed(mgpu, tiny))
    assert not measured(speed(mgpu, tiny, XDG_STATE_HOME="/dev/null"))
