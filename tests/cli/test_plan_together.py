"""`mgpu plan` of several models: the answer in words, as JSON and in the exit code, and the commands that it prints."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .contract import CANDIDATE, COUNT, FLAG, MACHINE, TEXT, Json, checked, exactly, listed, maybe
from .program import Mgpu, until

TOGETHER = exactly(
    machine=MACHINE,
    placed=FLAG,
    verdict={"enum": ["fits", "fits-with-offload", "does-not-fit"]},
    models=listed(
        exactly(
            name=TEXT,
            argument=TEXT,
            verdict=CANDIDATE["properties"]["verdict"],
            gpus=listed(COUNT),
            port=maybe(COUNT),
            command=listed(TEXT),
            why=maybe(TEXT),
            candidate=maybe(CANDIDATE),
        )
    ),
    cards=listed(
        exactly(
            gpu=COUNT,
            uuid=maybe(TEXT),
            name=TEXT,
            total_bytes=maybe(COUNT),
            free_bytes=COUNT,
            planned_bytes=COUNT,
            spare_bytes=COUNT,
        )
    ),
    host=exactly(free_bytes=maybe(COUNT), planned_bytes=COUNT, spare_bytes=maybe(COUNT)),
)
TWO_CARDS = "CUDA0: A card (24000 MiB, 23000 MiB free);CUDA1: A card (24000 MiB, 9000 MiB free)"


@pytest.fixture
def quiet(mgpu: Mgpu) -> Iterator[Mgpu]:
    """mgpu with llama.cpp alone, far from any hub."""
    mgpu.environment |= {"HF_HUB_OFFLINE": "1", "PATH": "/nonexistent", "OLLAMA_HOST": "127.0.0.1:1"}
    yield mgpu
    mgpu.assert_nothing_left()


def together(mgpu: Mgpu, words: str, **variables: str) -> Json:
    """The data of `plan --json`, which are whole, add up and agree with the exit code."""
    ended = mgpu("plan", *shlex.split(words), "--json", **variables)
    data = checked(ended.json, "plan", TOGETHER)
    assert ended.exit_code == (0 if data["placed"] else 1)
    placed = [model for model in data["models"] if model["command"]]
    planned = {card["gpu"]: 0 for card in data["cards"]}
    for model in placed:
        for device in model["candidate"]["devices"]:
            planned[device["gpu"]] += device["total_bytes"]
    assert planned == {card["gpu"]: card["planned_bytes"] for card in data["cards"]}
    assert all(card["spare_bytes"] == card["free_bytes"] - card["planned_bytes"] for card in data["cards"])
    assert len({model["port"] for model in placed}) == len(placed)
    assert len({model["name"] for model in data["models"]}) == len(data["models"])
    assert data["placed"] == (len(placed) == len(data["models"]))
    return data


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param(
            "llama-2-13b llama-2-13b --machine 2x4090",
            {"llama-2-13b": ("fits", [0]), "llama-2-13b-2": ("fits", [1])},
            id="the same twice, one a card",
        ),
        pytest.param(
            "llama-8b llama-70b --machine 3x4090 --backend llama.cpp",
            {"llama-70b": ("fits", [0, 1]), "llama-8b": ("fits", [2])},
            id="a large one and a small one",
        ),
        pytest.param(
            "llama-70b llama-8b --machine 2x4090 --ctx 8k",
            {"llama-70b": ("fits", [0, 1]), "llama-8b": ("does-not-fit", [])},
            id="not both: the one that was named first",
        ),
        pytest.param(
            "llama-8b llama-70b --machine 2x4090 --ctx 8k",
            {"llama-8b": ("fits", [0, 1]), "llama-70b": ("does-not-fit", [])},
            id="named the other way round",
        ),
        pytest.param(
            "llama-8b qwen3-8b --machine 2x4090 --gpus gpu1",
            {"qwen3-8b": ("fits", [1]), "llama-8b": ("fits", [1])},
            id="on the cards that were chosen",
        ),
        pytest.param(
            "qwen3-14b qwen3-14b --machine 4090 --backend vllm --ctx 4k",
            {"qwen3-14b": ("fits", [0]), "qwen3-14b-2": ("fits", [0])},
            id="two vLLMs on a card",
        ),
        pytest.param(
            "llama-8b llama-8b --machine none", {"llama-8b": ("fits", []), "llama-8b-2": ("fits", [])}, id="no card"
        ),
        pytest.param(
            "llama-70b llama-8b --machine 4090 --offload allow",
            {"llama-70b": ("fits-with-offload", [0]), "llama-8b": ("fits", [0])},
            id="with offload",
        ),
    ],
)
def test_models_are_placed_together(quiet: Mgpu, words: str, expected: dict[str, tuple[str, list[int]]]) -> None:
    data = together(quiet, words)
    found = {model["name"]: (model["verdict"], model["gpus"]) for model in data["models"]}
    assert found == expected


def test_two_vllms_on_one_card_are_told_what_is_theirs(quiet: Mgpu) -> None:
    data = together(quiet, "qwen3-14b qwen3-14b --machine 4090 --backend vllm --ctx 4k")
    shares = []
    for model in data["models"]:
        assert model["command"][-2] == "--gpu-memory-utilization"
        shares.append(float(model["command"][-1]))
        argv = model["candidate"]["argv"]
        assert argv[argv.index("--gpu-memory-utilization") + 1] == model["command"][-1]
        assert argv[argv.index("--port") + 1] == str(model["port"])
        assert argv[argv.index("--served-model-name") + 1] == model["name"]
    assert sum(shares) <= 0.98


def test_what_other_programs_hold_is_left_to_them(quiet: Mgpu, tiny: Path) -> None:
    data = together(quiet, f"{tiny} llama-2-13b --ctx 4k", FAKE_DEVICES=TWO_CARDS)
    assert [card["free_bytes"] >> 20 for card in data["cards"]] == [23000, 9000]
    assert {model["name"]: model["gpus"] for model in data["models"]} == {"llama-2-13b": [0], "tiny": [1]}


def test_the_commands_start_what_was_planned(quiet: Mgpu, tiny: Path) -> None:
    words = f"{tiny} {tiny} --ctx 512 --kv-type q8_0 --headroom 300MiB"

    def start_as_planned() -> bool:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            data = together(quiet, words, FAKE_DEVICES=TWO_CARDS)
            assert taken.getsockname()[1] not in [model["port"] for model in data["models"]]
        assert [model["name"] for model in data["models"]] == ["tiny", "tiny-2"]
        for model in data["models"]:
            program, *command = model["command"]
            assert program == "mgpu"
            ended = quiet(*command, "--dry-run", "--json", FAKE_DEVICES=TWO_CARDS)
            if ended.json["errors"] and ended.json["errors"][0]["code"] == "port-in-use":
                return False  # some other program of this machine has taken it since
            assert ended.exit_code == 0, ended
            assert ended.json["data"]["argv"] == model["candidate"]["argv"]
        return True

    until(start_as_planned, "the ports that were planned stay free")


def test_options_are_for_all_models_and_lowered_contexts_are_told(quiet: Mgpu) -> None:
    data = together(quiet, "llama-8b qwen3-8b --machine 2x4090 --for throughput --backend vllm")
    assert [model["candidate"]["parallel"] for model in data["models"]] == [8, 8]
    assert all("--for" in model["command"] for model in data["models"])
    crowded = together(quiet, " ".join(["llama-8b"] * 4) + " --machine 4090 --backend llama.cpp")
    lowered = [model for model in crowded["models"] if model["candidate"]["ctx_tokens"] < 8192]
    for model in lowered:
        assert model["command"][model["command"].index("--ctx") + 1] == str(model["candidate"]["ctx_tokens"])
    assert len(lowered) == (1 if crowded["placed"] else 0)


@pytest.mark.parametrize("columns", [60, 100])
def test_the_screen_says_who_is_where_and_what_stays_free(quiet: Mgpu, columns: int) -> None:
    ended = quiet("plan", "llama-8b", "llama-70b", "--machine", "2x4090", "--ctx", "8k", COLUMNS=str(columns))
    assert ended.exit_code == 1
    first, *rest = ended.out.splitlines()
    assert first == "DOES NOT FIT   1 of 2 models on 2 cards   SIMULATED"
    commands = [line.strip() for line in rest if line.startswith("  mgpu ")]
    others = [line.rstrip() for line in rest if line.strip() not in commands]
    assert max(map(len, others)) <= columns
    assert len(commands) == 1
    text = " ".join(" ".join(others).split())
    assert "no room llama-70b: 43.9 GiB needed on the cards, " in text or "no room llama-70b: " in text
    assert "short on gpu" in text
    assert text.count("gpu0 RTX 4090") == 1


@pytest.mark.parametrize(
    ("words", "told", "untold"),
    [
        pytest.param(
            "llama-8b llama-70b --machine 2x4090 --for throughput",
            "alone it fits, with room for 1 of 8 users at 8192 tokens; the others wait",
            "alone it fits start",
            id="how much of it fits alone",
        ),
        pytest.param(
            "llama-8b llama-70b --machine 2x4090 --ctx 8k --kv-type q8_0 --backend llama.cpp",
            "beside the others; alone it fits ",
            "alone it fits,",
            id="all of it fits alone",
        ),
        pytest.param(
            "qwen3-32b llama-8b qwen3-8b --machine 4x3090 --for throughput",
            "tokens/s, 8 users together",
            "shared",
            id="many users' speed is that of all together",
        ),
        pytest.param(
            "llama-8b llama-8b --machine 4090",
            "100-140 tokens/s; that fast while it is alone at work: gpu0 is shared",
            "users together",
            id="a shared card",
        ),
        pytest.param("llama-8b llama-8b --machine 2x4090", "100-140 tokens/s", "shared", id="a card each"),
        pytest.param(
            "llama-8b llama-8b --machine none",
            "tokens/s; that fast while it is alone at work: the host's memory is shared",
            "are shared",
            id="one memory of the host",
        ),
    ],
)
def test_the_speed_is_whose_it_says(quiet: Mgpu, words: str, told: str, untold: str) -> None:
    shown = " ".join(quiet("plan", *shlex.split(words)).out.split())
    assert told in shown
    assert untold not in shown
    single = quiet("plan", "llama-8b", "--machine", "4090", "--backend", "llama.cpp").out
    assert "100-140 tokens/s" in single, "as the plan of one model writes it"


@pytest.mark.parametrize(
    ("words", "told", "hint"),
    [
        pytest.param(
            "llama-70b llama-8b --machine 2x4090",
            "beside the others with --offload allow",
            "mgpu run llama-8b --offload allow   or   mgpu run llama-8b --backend ollama --offload allow, "
            "once llama-70b runs",
            id="beside those that found room",
        ),
        pytest.param(
            "llama-70b llama-70b --machine 4090",
            "by itself with --offload allow",
            "mgpu run llama-70b --offload allow   or   mgpu run llama-70b --backend ollama --offload allow",
            id="where none found any",
        ),
        pytest.param(
            "qwen3-32b qwen3-32b --machine 2x4060 --offload allow",
            "mgpu plan qwen3-32b shows ways out",
            "mgpu plan qwen3-32b shows what it needs, and ways out",
            id="none beside the others",
        ),
    ],
)
def test_who_finds_no_room_is_told_what_would(quiet: Mgpu, words: str, told: str, hint: str) -> None:
    assert told in " ".join(quiet("plan", *shlex.split(words)).out.split())
    errors = quiet("plan", *shlex.split(words), "--json").json["errors"]
    assert errors[-1]["hint"] == hint


def test_a_reader_that_leaves_is_no_error(quiet: Mgpu) -> None:
    with quiet.piped("plan", "llama-8b", "llama-8b", "--machine", "2x4090") as process:
        assert process.stdout
        process.stdout.close()
        assert process.wait() == 0
        assert process.stderr
        assert not process.stderr.read()


def test_json_is_read_by_others(quiet: Mgpu) -> None:
    ended = quiet("plan", "llama-8b", "llama-8b", "--machine", "2x4090", "--json")
    tool = subprocess.run(
        [sys.executable, "-m", "json.tool"], input=ended.out, capture_output=True, text=True, check=True
    )
    assert json.loads(tool.stdout) == ended.json


@pytest.mark.parametrize(
    ("words", "exit_code", "message", "hint"),
    [
        pytest.param("llama-8b nope --machine 2x4090", 2, "no profile 'nope'", "profiles list", id="an unknown model"),
        pytest.param("llama-8b '' --machine 2x4090", 2, "MODEL is empty", "hf:ORG/REPO", id="an empty one"),
        pytest.param("llama-8b /no/x.gguf --machine 2x4090", 3, "no file '/no/x.gguf'", "/no", id="a missing file"),
        pytest.param("llama-8b llama-8b --machine 2x9999", 2, "'9999' is not in the", "snapshot", id="an unknown card"),
        pytest.param("llama-8b llama-8b --exact", 2, "--exact asks the engine about one", "--exact", id="--exact"),
        pytest.param("llama-8b llama-8b --explain", 2, "sums of one model", "llama-8b --explain", id="--explain"),
        pytest.param(
            "llama-8b llama-8b --machine 2x4090 --tensor-split 1,1",
            2,
            "layers of one model",
            "leave",
            id="--tensor-split",
        ),
        pytest.param("llama-8b llama-8b --machine 2x4090 --gpus 5", 3, "machine has 2", "gpu0", id="too many cards"),
        pytest.param("llama-8b llama-8b --machine 0x4090", 2, "at least 1", "--machine none", id="no cards of a kind"),
        pytest.param("llama-8b " * 65 + "--machine 2x4090", 2, "more than the 64", "--help", id="too many models"),
        pytest.param("llama-8b llama-8b --machine 2x4090 --quant Q99", 2, "Q99", "", id="an unknown quantisation"),
        pytest.param("llama-8b llama-8b --machine 2x4090 --ctx 0", 2, "not positive", "--help", id="no context"),
    ],
)
def test_what_cannot_be_placed_is_explained(quiet: Mgpu, words: str, exit_code: int, message: str, hint: str) -> None:
    ended = quiet("plan", *shlex.split(words))
    assert ended.exit_code == exit_code, ended
    assert message in ended.err
    assert hint in ended.err
    assert "Traceback" not in ended.err
    assert not ended.out
    as_json = quiet("plan", *shlex.split(words), "--json")
    assert as_json.exit_code == exit_code
    assert message in as_json.json["errors"][0]["message"]
