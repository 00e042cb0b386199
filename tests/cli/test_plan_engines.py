"""`mgpu plan` with three engines: which one it takes on which cards, what it says of the others, and how it looks."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mgpu.planning.speed import Range, interval
from tests.fakes import ollama_server, vllm_server
from tests.fakes.hub_server import FakeHub, running
from tests.fakes.tiny_llama import CONFIG, shapes

from .contract import LAUNCH, NOTHING, PLAN, Json, checked
from .program import Mgpu

GIB = 1 << 30
RIG = Path(__file__).parents[1] / "machines" / "rigs" / "2x4090-x670e.txt"
TWO_CARDS = (
    "CUDA0: NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free);"
    "CUDA1: NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free)"
)
VARIABLES = {"llama.cpp": "MGPU_LLAMA_SERVER", "vllm": "MGPU_VLLM", "ollama": "MGPU_OLLAMA"}
ALL = ("llama.cpp", "vllm", "ollama")
VLLM_MISSING = "not installed: mgpu backends install vllm"

With = Callable[..., Mgpu]


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory, fake_engine: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    return {
        "llama.cpp": fake_engine,
        "vllm": vllm_server.install(folder),
        "ollama": ollama_server.install(folder),
    }


@pytest.fixture
def having(mgpu: Mgpu, programs: dict[str, Path]) -> With:
    """mgpu where these engines are installed and no other; nothing runs, and no hub is asked."""

    def with_engines(*engines: str) -> Mgpu:
        for engine, variable in VARIABLES.items():
            mgpu.environment.pop(variable, None)
            if engine in engines or engine == "llama.cpp":  # which may be in this Python environment, too
                mgpu.environment[variable] = str(programs[engine]) if engine in engines else "/nonexistent"
        mgpu.environment |= {"PATH": "/nonexistent", "OLLAMA_HOST": "127.0.0.1:1", "HF_HUB_OFFLINE": "1"}
        mgpu.environment["HF_HUB_CACHE"] = str(mgpu.here.parent / "hub")
        return mgpu

    return with_engines


@pytest.fixture
def on_cards(having: With, nvml: dict[str, Path]) -> With:
    """The same on a computer with two RTX 4090."""

    def with_engines(*engines: str) -> Mgpu:
        mgpu = having(*engines)
        mgpu.environment |= {"LD_LIBRARY_PATH": str(nvml["new"]), "FAKE_NVML": str(RIG), "FAKE_DEVICES": TWO_CARDS}
        return mgpu

    return with_engines


def planned(mgpu: Mgpu, words: str) -> Json:
    """The data of `plan --json`, which keep the contract."""
    ended = mgpu("plan", *shlex.split(words), "--json")
    data = checked(ended.json, "plan", PLAN)
    assert ended.exit_code == (0 if data["best"] is not None else 1)
    return data


def best(data: Json) -> str | None:
    return None if data["best"] is None else data["candidates"][data["best"]]["backend"]


def shape(candidate: Json) -> str:
    """A candidate in a word, such as "vllm 2x1 fits"."""
    cut = f" {candidate['tensor_parallel']}x{candidate['pipeline_parallel']}" if candidate["backend"] == "vllm" else ""
    return f"{candidate['backend']}{cut} {candidate['verdict']}"


@pytest.mark.parametrize(
    ("words", "engines", "expected", "why", "first"),
    [
        pytest.param("--machine 2x4090", ALL, "vllm", "with vLLM", "vllm 2x1 fits", id="2x4090"),
        pytest.param("--machine 2x4090", (), "vllm", "with vLLM", "vllm 2x1 fits", id="2x4090 without any engine"),
        pytest.param(
            "--machine 2x4090 --ctx 16k",
            ALL,
            "llama.cpp",
            "with llama.cpp's tensor split",
            "llama.cpp fits",
            id="2x4090 with a long context",
        ),
        pytest.param("--machine 4090+4080", ALL, None, None, "llama.cpp does-not-fit", id="unequal cards, too small"),
        pytest.param(
            "--machine 4090+4080 --quant Q3_K_M --ctx 4k",
            ALL,
            "llama.cpp",
            "decides the split",
            "llama.cpp fits",
            id="unequal cards with a smaller file",
        ),
        pytest.param(
            "--machine 5090+4090",
            ALL,
            "llama.cpp",
            "tokens/s with llama.cpp's layer split",
            "llama.cpp fits",
            id="unequal cards",
        ),
        pytest.param(
            "--machine 3x4090",
            ALL,
            "vllm",
            "rest on thin evidence",
            "vllm 2x1 fits",
            id="3x4090",
        ),
        pytest.param(
            "--machine 3x4090 --gpus 3", ALL, "llama.cpp", "would leave cards unused", "llama.cpp fits", id="counted"
        ),
        pytest.param(
            "--machine 3x4090 --gpus 0,1,2 --backend vllm", ALL, "vllm", None, "vllm 1x3 fits", id="cards by name"
        ),
        pytest.param("--machine 4090", ALL, None, None, "llama.cpp does-not-fit", id="one card"),
        pytest.param("--machine 8xA100-80", ALL, "vllm", "rest on thin evidence", "vllm 8x1 fits", id="8xA100"),
        pytest.param("--machine '2xRX 7900 XTX'", ALL, "vllm", "with vLLM", "vllm 2x1 fits", id="AMD"),
        pytest.param("--machine '2xArc A770'", ALL, None, None, "llama.cpp does-not-fit", id="Intel: not for vLLM"),
        pytest.param("--machine none", ("llama.cpp", "ollama"), "llama.cpp", "as planned", "llama.cpp fits", id="none"),
        pytest.param(
            "--machine 2x4090 --parallel 8", ALL, "vllm", "room for 2304 tokens each", "vllm 2x1 fits", id="8 users"
        ),
        pytest.param(
            "--machine 2x4090 --parallel 8 --for latency",
            ALL,
            "vllm",
            "room for 2304 tokens each",
            "vllm 2x1 fits",
            id="8 users without a queue",
        ),
        pytest.param(
            "--machine 3x4090 --for throughput", ALL, "vllm", "with vLLM's pipeline", "vllm 1x3 fits", id="throughput"
        ),
        pytest.param("--machine 3x4090 --for latency", ALL, "vllm", "with vLLM", "vllm 2x1 fits", id="latency"),
        pytest.param(
            "--machine 4090+4080 --parallel 8", ALL, None, None, "vllm 1x2 does-not-fit", id="unequal cards, many users"
        ),
        pytest.param("--machine 2x4090 --backend vllm", (), "vllm", None, "vllm 2x1 fits", id="vLLM asked for"),
        pytest.param(
            "--machine 2x4090 --backend llama.cpp", ALL, "llama.cpp", None, "llama.cpp fits", id="llama.cpp asked for"
        ),
        pytest.param("--machine 2x4090 --backend ollama", ALL, "ollama", None, "ollama fits", id="Ollama asked for"),
        pytest.param(
            "--machine 2x4090 --tensor-parallel 3 --backend vllm",
            ALL,
            None,
            None,
            "vllm 3x1 illegal",
            id="64 ÷ 3 heads",
        ),
        pytest.param(
            "--machine 3x4090 --pipeline-parallel 3",
            ALL,
            "vllm",
            "vLLM alone knows all the options",
            "vllm 1x3 fits",
            id="a pipeline asked for",
        ),
    ],
)
def test_users_and_cards_choose_the_engine(
    having: With, words: str, engines: tuple[str, ...], expected: str | None, why: str | None, first: str
) -> None:
    data = planned(having(*engines), f"llama-70b {words}")
    assert (best(data), shape(data["candidates"][0])) == (expected, first)
    assert why is None or why in data["why"]
    assert (data["why"] is None) == (why is None)
    for candidate in data["candidates"]:
        assert candidate["verdict"] != "unavailable", "what is installed here says nothing of another machine"
        if candidate["verdict"] == "illegal":
            assert re.search(r"64 attention heads ÷ 3 cards = 21\.33", " ".join(candidate["reasons"]))
    verdicts = [candidate["verdict"] for candidate in data["candidates"]]
    ranks = ["fits", "fits-with-offload", "does-not-fit", "illegal"]
    assert verdicts == sorted(verdicts, key=ranks.index)


@pytest.mark.parametrize(
    ("engines", "expected", "why"),
    [
        pytest.param(ALL, "vllm", "with vLLM", id="all"),
        pytest.param(("llama.cpp",), "llama.cpp", "with llama.cpp's tensor split, ", id="without vLLM"),
        pytest.param(("llama.cpp", "ollama"), "llama.cpp", "with its layer split", id="with Ollama, too"),
    ],
)
def test_what_is_installed_here_decides_for_this_machine(
    on_cards: With, engines: tuple[str, ...], expected: str, why: str
) -> None:
    data = planned(on_cards(*engines), "llama-70b")
    assert best(data) == expected
    assert why in data["why"]
    for candidate in data["candidates"]:
        installed = candidate["backend"] in engines
        assert installed or candidate["verdict"] not in ("fits", "fits-with-offload"), shape(candidate)
        if candidate["verdict"] == "unavailable":
            assert candidate["reasons"][0].startswith("not installed: ")


@pytest.mark.parametrize("engines", [("llama.cpp",), ("ollama",), ()])
@pytest.mark.parametrize(
    ("words", "told"),
    [
        pytest.param("llama-70b --machine 2x4090", "vLLM is not installed here: mgpu backends install vllm", id="FITS"),
        pytest.param(
            "llama-70b --machine '2xRX 7900 XTX'",
            "vLLM is not installed here: https://docs.vllm.ai (ROCm)",
            id="a build that AMD can use",
        ),
        pytest.param(
            "mistral-small-24b --machine 4x3090 --parallel 256", "mgpu backends install vllm", id="many users"
        ),
        pytest.param("llama-70b --machine 4090+4080", "", id="what does not fit needs no engine"),
    ],
)
def test_what_is_installed_here_says_nothing_of_another_machine(
    having: With, words: str, told: str, engines: tuple[str, ...]
) -> None:
    ended = having(*engines)("plan", *shlex.split(words))
    assert told in ended.out
    assert ("not installed" in ended.out) == bool(told)
    assert planned(having(*engines), words)["candidates"] == planned(having(*ALL), words)["candidates"]


@pytest.mark.parametrize(
    ("words", "engines", "changes"),
    [
        pytest.param(
            "--machine 4090+4080 --parallel 8",
            ALL,
            [
                "--backend llama.cpp --offload allow",
                "--backend ollama --offload allow",
                "1 more RTX N",
                "--backend llama.cpp --quant Q3_K_M",
                "1 more RTX N (llama.cpp)",
            ],
            id="of the engine asked first, without its name",
        ),
        pytest.param(
            "--ctx 10k --parallel 2",
            ("llama.cpp",),
            [
                "--backend llama.cpp --ctx N",
                "--backend llama.cpp --kv-type q8_0",
                "--backend llama.cpp --quant Q3_K_M",
                "--backend llama.cpp --offload allow",
                "mgpu backends install vllm",
            ],
            id="an engine in which users would wait comes last",
        ),
        pytest.param(
            "--machine 2x4090 --quant fp8",
            ("vllm",),
            ["--quant awq", "2 more RTX N"],
            id="another quantisation for vLLM",
        ),
        pytest.param(
            "--machine 2x4090 --ctx 24k --backend ollama",
            ("ollama",),
            ["--ctx N", "--kv-type q8_0", "--quant Q3_K_M", "--offload allow"],
            id="of Ollama",
        ),
        pytest.param(
            "--machine 3x4090 --tensor-parallel 3 --backend vllm",
            ("vllm",),
            ["--tensor-parallel 1", "--tensor-parallel 2 --gpus gpu0,gpu1"],
            id="other shapes, over all cards and over fewer",
        ),
    ],
)
def test_ways_out_are_commands(on_cards: With, words: str, engines: tuple[str, ...], changes: list[str]) -> None:
    mgpu = on_cards(*engines)
    data = planned(mgpu, f"llama-70b {words}")
    found = [fix["change"] for fix in data["fixes"]]
    assert [re.sub(r"\d{4,}", "N", change) for change in found] == changes
    for fix in data["fixes"]:
        assert fix["candidate"]["verdict"] in ("fits", "fits-with-offload")
        if fix["change"].startswith("--"):
            again = planned(mgpu, f"llama-70b {words} {fix['change']}")
            assert again["candidates"][0] == fix["candidate"]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param("qwen3-32b --machine 4090+4080", id="chosen on one card"),
        pytest.param("llama-8b --machine 3x4090", id="chosen on some of the cards"),
        pytest.param("llama-8b --machine 2x4090 --backend llama.cpp", id="one engine"),
        pytest.param("qwen3-8b --machine 4x3090 --for throughput", id="replicas"),
    ],
)
def test_the_options_of_every_way_choose_it(having: With, words: str) -> None:
    mgpu = having(*ALL)
    data = planned(mgpu, words)
    others = [each for index, each in enumerate(data["candidates"]) if index != data["best"]]
    shown = mgpu("plan", *shlex.split(words), COLUMNS="200").out.partition("other ways")[2].split("\n\n")[0]
    rows = [line for line in shown.splitlines() if "  " in line.strip() and not line.startswith("─")][-len(others) :]
    assert len(rows) == len(others)
    tried = 0
    for row, candidate in zip(rows, others, strict=True):
        if candidate["verdict"] == "fits":
            options = re.findall(r"--[a-z-]+ [\w.,]*\w", row)
            again = planned(mgpu, f"{words} {' '.join(options)}")
            found = again["candidates"][again["best"]]
            assert {**found, "reasons": candidate["reasons"]} == candidate, (
                row
            )  # Ollama's tell how many cards there are
            tried += 1
    assert tried


def test_the_command_of_every_way_is_what_run_would_start(on_cards: With) -> None:
    mgpu = on_cards(*ALL)
    data = planned(mgpu, "llama-8b")
    assert {shape(candidate) for candidate in data["candidates"]} == {
        "vllm 2x1 fits",
        "vllm 1x1 fits",
        "llama.cpp fits",
        "ollama fits",
    }
    seen = set()
    for candidate in data["candidates"]:
        backend, cards = candidate["backend"], [device["gpu"] for device in candidate["devices"]]
        which = ["--gpus", ",".join(f"gpu{index}" for index in cards)]
        if backend == "llama.cpp" and len(cards) > 1:
            which += ["--split-mode", candidate["split_mode"]]
        ended = mgpu("run", "llama-8b", "--dry-run", "--json", "--backend", backend, *which)
        launch = checked(ended.json, "run", LAUNCH)
        assert anywhere(launch) == anywhere(candidate), backend
        seen.add((backend, len(cards)))
    assert seen == {(backend, count) for backend in ALL for count in (1, 2)}
    chosen = checked(mgpu("run", "llama-8b", "--dry-run", "--json").json, "run", LAUNCH)
    assert anywhere(chosen) == anywhere(data["candidates"][data["best"]])
    mgpu.assert_nothing_left()


def anywhere(launch: Json) -> Json:
    """A command without the port, which is any that is free."""
    words = [re.sub(r":\d+$", ":PORT", word) for word in launch["argv"]]
    argv = ["PORT" if before == "--port" else word for before, word in zip(["", *words], words, strict=False)]
    return {"argv": argv, "env": {key: re.sub(r":\d+$", ":PORT", text) for key, text in launch["env"].items()}}


@pytest.mark.parametrize(
    ("words", "argv", "env"),
    [
        pytest.param(
            "--backend vllm",
            ["vllm", "serve", "casperhansen/llama-3.3-70b-instruct-awq", "--tensor-parallel-size 2"],
            {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
            id="vLLM",
        ),
        pytest.param(
            "--backend vllm --pipeline-parallel 2",
            ["--pipeline-parallel-size 2"],
            {"VLLM_PP_LAYER_PARTITION": "40,40"},
            id="a pipeline",
        ),
        pytest.param("--backend ollama", ["ollama", "serve"], {"OLLAMA_CONTEXT_LENGTH": "8192"}, id="Ollama"),
        pytest.param("--backend llama.cpp", ["llama-server", "-dev CUDA0,CUDA1"], {}, id="llama.cpp"),
    ],
)
def test_on_another_machine_the_command_has_no_path(
    having: With, words: str, argv: list[str], env: dict[str, str]
) -> None:
    candidate = planned(having(*ALL), f"llama-70b --machine 2x4090 {words}")["candidates"][0]
    joined = " ".join(candidate["argv"])
    assert all(part in joined for part in argv), joined
    assert env.items() <= candidate["env"].items()
    assert not candidate["argv"][0].startswith("/")


@pytest.mark.parametrize("words", ["--machine 2x4090", "--machine 2x4090 --gpus 2", "--machine none"])
def test_the_build_of_vllm_here_says_nothing_of_another_machine(having: With, tmp_path: Path, words: str) -> None:
    cpu = vllm_server.install(tmp_path / "vllm", cpu="none" not in words)
    ended = having("vllm")("plan", "llama-8b", "--backend", "vllm", "--json", *words.split(), MGPU_VLLM=str(cpu))
    data = checked(ended.json, "plan", PLAN)
    assert (ended.exit_code, ended.json["warnings"]) == (0, [])
    assert len(data["candidates"][0]["devices"]) == (0 if "none" in words else 2)


def test_cards_that_vllm_has_no_kernels_for_are_not_planned_with_it(having: With) -> None:
    mgpu = having(*ALL)
    assert {candidate["backend"] for candidate in planned(mgpu, "llama-8b --machine 2xP40")["candidates"]} == {
        "llama.cpp",
        "ollama",
    }
    ended = mgpu("plan", "llama-8b", "--machine", "2xP40", "--backend", "vllm", "--gpus", "2")
    assert ended.exit_code == 3
    assert "vLLM cannot use gpu0 (NVIDIA Tesla P40)" in ended.err


@pytest.mark.parametrize(
    ("machine", "words", "devices", "pinned", "unused"),
    [
        pytest.param("4090+2x7900XTX", "", ["ROCm0", "ROCm1"], "0,1", "gpu0", id="the most memory"),
        pytest.param("2x7900XTX+4090", "--gpus all", ["ROCm0", "ROCm1"], "0,1", "gpu2", id="all, in another order"),
        pytest.param("4090+2x7900XTX", "--gpus 2", ["ROCm0", "ROCm1"], "0,1", None, id="two, which only AMD has"),
        pytest.param("4090+2x7900XTX", "--gpus gpu2", ["ROCm1"], "1", None, id="one by its name"),
        pytest.param("7900XTX+2x4090", "", ["CUDA0", "CUDA1"], None, "gpu0", id="NVIDIA's"),
        pytest.param("A770+7900XTX+4060", "", ["ROCm0"], "0", "gpu2", id="one that no vLLM can use counts for nothing"),
    ],
)
def test_vllm_takes_cards_of_one_maker_and_numbers_them_as_its_driver_does(
    having: With, machine: str, words: str, devices: list[str], pinned: str | None, unused: str | None
) -> None:
    asked = ["plan", "llama-8b", "--backend", "vllm", "--machine", machine.replace("7900XTX", "RX 7900 XTX")]
    ended = having(*ALL)(*asked, *words.split(), "--json")
    first = checked(ended.json, "plan", PLAN)["candidates"][0]
    assert first["verdict"] == "fits"
    assert [device["device"] for device in first["devices"]] == devices
    assert first["env"].get("HIP_VISIBLE_DEVICES") == pinned
    told = [text for text in ended.json["warnings"] if "two makers' cards in one model" in text]
    assert [f"{unused} (" in text and f"--gpus {unused} plans on it" in text for text in told] == [True] * bool(unused)


@pytest.mark.parametrize("words", ["--gpus 0,1", "--gpus 3"])
def test_cards_of_two_makers_are_not_for_one_vllm(having: With, words: str) -> None:
    mgpu, machine = having(*ALL), "--machine '4090+2xRX 7900 XTX'"
    ended = mgpu("plan", "llama-8b", *shlex.split(machine), *words.split(), "--backend", "vllm")
    assert ended.exit_code == 3
    assert "vLLM cannot use gpu0 (NVIDIA GeForce RTX 4090), gpu1 (AMD Radeon RX 7900 XTX)" in ended.err
    assert best(planned(mgpu, f"llama-8b {machine} {words}")) == "llama.cpp"


@pytest.mark.parametrize(
    ("backend", "left_out"),
    [
        pytest.param("llama.cpp", "at most --cache-ram", id="llama.cpp"),
        pytest.param("vllm", "vLLM's own processes", id="vLLM"),
        pytest.param("ollama", "Ollama's llama-server", id="Ollama"),
    ],
)
def test_what_a_plan_leaves_out_is_the_engines_own(having: With, backend: str, left_out: str) -> None:
    *_, own = planned(having(*ALL), f"llama-8b --machine 2x4090 --backend {backend}")["not_modelled"]
    assert left_out in own


@pytest.mark.parametrize("words", ["", "--parallel 8", "--ctx 64k"])
def test_a_vllm_for_cpus_is_not_taken_beside_cards(on_cards: With, tmp_path: Path, words: str) -> None:
    mgpu = on_cards("llama.cpp")
    mgpu.environment["MGPU_VLLM"] = str(vllm_server.install(tmp_path / "vllm", cpu=True))
    data = planned(mgpu, f"llama-70b {words}")
    assert {candidate["backend"] for candidate in data["candidates"]} == {"llama.cpp", "ollama"}
    assert best(planned(mgpu, "llama-8b --backend vllm")) == "vllm"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        pytest.param("llama-70b --quant bf16 --machine 8xA100-80", "vLLM alone loads bf16", id="a quantisation"),
        pytest.param(
            "{tiny} --ubatch 256",
            "llama.cpp alone knows all the options that were given; no form of it is for vLLM",
            id="options, and a file that one engine does not load",
        ),
        pytest.param(
            "llama-8b --machine 2x4090 --ubatch 256",
            "llama.cpp alone knows all the options that were given",
            id="options",
        ),
        pytest.param(
            "gpt-oss-120b --machine 1x4090 --offload allow",
            "llama.cpp alone knows all the options that were given; no form of it is for Ollama",
            id="an option that an engine without a form of the model knows, too",
        ),
        pytest.param("llama-70b --quant fp8 --machine 2x4090", None, id="nothing that runs"),
    ],
)
def test_where_there_is_no_choice_it_is_said_why(having: With, tiny: Path, words: str, why: str | None) -> None:
    assert planned(having(*ALL), words.format(tiny=tiny))["why"] == why


def test_what_ollama_would_not_do_is_what_is_said_of_it(having: With) -> None:
    out = having(*ALL)("plan", "llama-70b", "--machine", "2x4090", "--ctx", "1m").out
    told = " ".join(out.split())
    assert "illegal Ollama, layer split over 2 cards: Ollama gives a user 131072 tokens at most" in told


@pytest.mark.parametrize(
    ("words", "engines", "message", "hint"),
    [
        pytest.param("--parallel 2 --ctx 10k", ("llama.cpp",), "fits no engine", "backends install vllm", id="install"),
        pytest.param("--tensor-parallel 3", ALL, "cannot be run so", "add --tensor-parallel 2", id="illegal"),
        pytest.param("--ctx 64k", ALL, "does not fit", "add --ctx", id="too large"),
    ],
)
def test_run_says_what_keeps_it(on_cards: With, words: str, engines: tuple[str, ...], message: str, hint: str) -> None:
    mgpu = on_cards(*engines)
    ended = mgpu("run", "llama-70b", "--dry-run", "--json", *words.split())
    checked(ended.json, "run", NOTHING)
    assert ended.exit_code == 1
    assert message in ended.json["errors"][0]["message"]
    assert hint in ended.json["errors"][0]["hint"]


CELLS = re.compile(r"^(gpu\d+|host) .*?((?:\s+(?:-?\d+\.\d\d|-|\?)){3,7})\s")


def ledger(out: str) -> dict[str, list[str]]:
    """The figures of each card in the ledger."""
    return {match[1]: match[2].split() for line in out.splitlines() if (match := CELLS.match(line))}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        pytest.param("llama-70b --machine 2x4090", 2, id="tensor parallel"),
        pytest.param("llama-70b --machine 3x4090 --backend vllm", 1, id="a pipeline"),
        pytest.param("llama-8b --machine 4090 --backend vllm --kv-type fp8", 1, id="one card, FP8 cache"),
        pytest.param("llama-8b --machine 4xA100-80 --replicas 2", 2, id="replicas"),
    ],
)
def test_the_sums_of_vllm_add_up(having: With, words: str, parts: int) -> None:
    mgpu = having(*ALL)
    out = mgpu("plan", *words.split(), "--explain").out
    cards = {
        name: [float(cell) if cell != "-" else 0.0 for cell in cells]
        for name, cells in ledger(out).items()
        if name != "host"
    }
    assert cards
    for weights, kv, compute, runtime, total, free, spare in cards.values():
        assert weights + kv + compute + runtime == pytest.approx(total, abs=0.025)
        assert free - total == pytest.approx(spare, abs=0.015)
    whole = float(figure(out, r"weights +([\d.]+) GiB in all"))
    replicas = 2 if "--replicas" in words else 1
    assert sum(cells[0] for cells in cards.values()) == pytest.approx(whole * replicas, rel=0.02)
    assert (f"each layer cut into {parts} parts" in out) == (parts > 1)

    heads, keys, values, kind = re.findall(r"token (\d+) heads? on each card × \((\d+) K \+ (\d+) V\) (\w+)", out)[0]
    data = planned(mgpu, words)
    first, *_ = data["candidates"][0]["devices"]
    per_token = int(heads) * (int(keys) + int(values)) * {"f16": 2, "fp8": 1}[kind] * first["layers"]
    tokens = int(figure(out, r"(\d+) tokens in all"))
    assert first["kv_bytes"] // per_token >= tokens
    assert (
        min(
            device["kv_bytes"] * first["layers"] // (device["layers"] * per_token)
            for device in data["candidates"][0]["devices"]
        )
        == tokens
    )

    share = float(figure(out, r"vLLM takes ([\d.]+) of what CUDA sees"))
    fullest = max(device["total_bytes"] / (device["card_bytes"] * 0.98) for device in data["candidates"][0]["devices"])
    assert fullest == pytest.approx(share, abs=0.005)


def figure(text: str, pattern: str) -> str:
    found = re.search(pattern, text)
    assert found, (pattern, text)
    return found[1]


SCREENS = [
    pytest.param("llama-70b --machine 2x4090", ALL, id="vLLM"),
    pytest.param("llama-70b --machine 3x4090", ("llama.cpp",), id="an illegal way and two that are not installed"),
    pytest.param("llama-70b --machine 8xA100-80 --parallel 8", ALL, id="eight cards"),
    pytest.param("llama-70b --machine 4090+4080 --parallel 8", ALL, id="what does not fit"),
    pytest.param("llama-70b --machine 2x4090 --tensor-parallel 3", ALL, id="what is illegal"),
    pytest.param("llama-8b --machine 4090+4080+4080 --backend vllm", ALL, id="unequal cards"),
]


@pytest.mark.parametrize("width", [60, 100])
@pytest.mark.parametrize(("words", "engines"), SCREENS)
def test_a_screen_keeps_its_width_and_its_numbers(
    having: With, words: str, engines: tuple[str, ...], width: int
) -> None:
    mgpu = having(*engines)
    out = mgpu("plan", *words.split(), "--explain", COLUMNS=str(width)).out
    lines = out.splitlines()
    assert lines[0].endswith("SIMULATED")
    assert ("narrow" in out) == (width == 60), "what is left out is said"
    assert [line for line in lines if len(line) > width and " " in line.strip()] == [], "but for long names"
    chosen = planned(mgpu, words)["candidates"][0]
    found = ledger(out)
    for device in chosen["devices"]:
        keys = ("weights_bytes", "kv_bytes", "compute_bytes", "runtime_bytes", "free_bytes")
        *parts, free = (round(device[key] / GIB * 100) for key in keys)
        shown = [f"{figure / 100:.2f}" if figure else "-" for figure in (sum(parts), free, free - sum(parts))]
        assert found[f"gpu{device['gpu']}"][-3:] == shown, "the figures close as they are printed"
    for verdict in ("illegal", "not installed", "does not fit"):
        assert not re.search(rf"(?m)^\s*{verdict.split()[-1]}\s*$", out), "a verdict is not broken"
    for candidate in planned(mgpu, words)["candidates"]:
        speed = candidate["speed"]
        assert (speed["decode_tok_s"] is None) == (candidate["verdict"] in ("does-not-fit", "illegal"))
        if speed["decode_tok_s"]:
            assert interval(Range(**speed["decode_tok_s"]), speed["bound_tok_s"]) in out


@pytest.mark.parametrize(("words", "engines"), SCREENS)
def test_a_pipe_gets_no_colour_and_an_ascii_terminal_no_other_letters(
    having: With, words: str, engines: tuple[str, ...]
) -> None:
    ended = having(*engines)("plan", *words.split(), "--explain", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert "\x1b" not in ended.out
    assert (ended.out + ended.err).isascii()
    assert "?" not in re.sub(r"(?m)^host .*$", "", ended.out), "a letter that has no plain one"


@pytest.fixture
def hub(having: With) -> Iterator[FakeHub]:
    """A model of 16 shards on the hub, of which no shard may be fetched."""
    names = [name for name, _ in shapes()]
    shards = {name: f"model-{i % 4 + 1:05}-of-00004.safetensors" for i, name in enumerate(names)}
    index = {"metadata": {}, "weight_map": shards}
    files: dict[str, bytes | Path] = {
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        **{shard: bytes(1_300_000 + i) for i, shard in enumerate(sorted(set(shards.values())))},
    }
    with running(FakeHub({"org/tiny": files})) as serving:
        mgpu = having("vllm")
        mgpu.environment |= {"HF_ENDPOINT": serving.endpoint, "XDG_CACHE_HOME": str(mgpu.here.parent / "cache")}
        mgpu.environment.pop("HF_HUB_OFFLINE")
        yield serving


def test_a_model_in_safetensors_is_planned_from_its_configuration_and_index(having: With, hub: FakeHub) -> None:
    mgpu = having("vllm")
    mgpu.environment.pop("HF_HUB_OFFLINE")
    data = planned(mgpu, "hf:org/tiny --machine 2x4090")
    files = hub.repositories["org/tiny"]
    read = [files[name] for name in ("config.json", "model.safetensors.index.json")]
    assert hub.served_bytes == sum(len(content) for content in read if isinstance(content, bytes))
    assert len(hub.downloads()) == 2
    assert (best(data), data["why"]) == ("vllm", "vLLM is the engine for a model in safetensors")
    assert data["model"]["file_bytes"] == 4 * 1_300_000 + 6
    assert data["candidates"][0]["argv"][2] == "org/tiny"

    hub.requests.clear()
    planned(mgpu, "hf:org/tiny --machine 2x4090")
    assert len([path for _, path, _ in hub.requests if path != "/"]) == 1, "only whether it has changed"
    hub.status = 503
    ended = mgpu("plan", "hf:org/tiny", "--machine", "2x4090")
    assert ended.exit_code == 0
    assert "warning  planned from what was read of hf:org/tiny before" in ended.err


@pytest.mark.parametrize(
    ("words", "exit_code", "code", "message"),
    [
        pytest.param("llama-70b --exact --backend vllm", 2, "usage", "vllm has no way to be asked", id="exact of vLLM"),
        pytest.param("llama-70b --exact --backend ollama", 2, "usage", "no way to be asked", id="exact of Ollama"),
        pytest.param("llama-70b --backend vllm --quant Q4_K_M", 2, "usage", "awq, fp8", id="a GGUF's for vLLM"),
        pytest.param("llama-70b --backend llama.cpp --quant awq", 2, "usage", "Q3_K_M", id="vLLM's for llama.cpp"),
        pytest.param("{tiny} --backend vllm", 3, "form-unsupported", "vllm wants safetensors", id="a file for vLLM"),
        pytest.param("{tiny} --tensor-parallel 2", 2, "usage", "--tensor-parallel is vLLM's", id="vLLM's for a file"),
        pytest.param("llama-70b --backend vllm --gpus 3", 3, "gpu-missing", "has 2", id="more cards than there are"),
    ],
)
def test_what_an_engine_cannot_do_is_explained(
    on_cards: With, tiny: Path, words: str, exit_code: int, code: str, message: str
) -> None:
    ended = on_cards(*ALL)("plan", *words.format(tiny=tiny).split(), "--json")
    checked(ended.json, "plan", NOTHING)
    error: dict[str, Any] = ended.json["errors"][0]
    assert (ended.exit_code, error["code"]) == (exit_code, code)
    assert message in error["message"]
    assert error["hint"]
