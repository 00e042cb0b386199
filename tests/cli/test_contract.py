"""What scripts rely on: one JSON object a command, its keys and types, and exit codes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from .contract import (
    BACKENDS,
    LAUNCH,
    MACHINE,
    NOTHING,
    OVERVIEW,
    PLAN,
    PROFILES,
    TEXT,
    Json,
    checked,
    checked_stream,
    exactly,
)
from .program import Mgpu

TWO_CARDS = (
    "CUDA0: NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free);"
    "CUDA1: NVIDIA GeForce RTX 4080 (16081 MiB, 15000 MiB free)"
)


@pytest.fixture(scope="session")
def too_large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.fakes.shapes import SHAPES
    from tests.fakes.sparse_gguf import make_sparse_gguf

    path = tmp_path_factory.mktemp("models") / "large.gguf"
    return make_sparse_gguf(path, SHAPES["llama-3.1-405b"], "Q8_0", vocabulary=1000)


@pytest.mark.parametrize(
    ("words", "command", "data"),
    [
        pytest.param("--json", "mgpu", OVERVIEW, id="mgpu alone"),
        pytest.param("--version --json", "version", exactly(version=TEXT), id="version"),
        pytest.param("gpus --json", "gpus", MACHINE, id="gpus"),
        pytest.param("backends --json", "backends", BACKENDS, id="backends"),
        pytest.param("plan {tiny} --json", "plan", PLAN, id="plan of a file"),
        pytest.param("plan llama-8b --gpus none --ctx 4k --json", "plan", PLAN, id="plan of a profile"),
        pytest.param("run {tiny} --dry-run --json", "run", LAUNCH, id="run without running"),
        pytest.param("profiles --json", "profiles.list", PROFILES, id="profiles alone"),
        pytest.param("profiles list --json", "profiles.list", PROFILES, id="profiles list"),
        pytest.param("profiles show llama-8b --json", "profiles.show", {"type": "object"}, id="profiles show"),
        pytest.param("profiles check --json", "profiles.check", {"type": "object"}, id="profiles check"),
        pytest.param("profiles new mine --json", "profiles.new", exactly(path=TEXT), id="profiles new"),
        pytest.param("profiles schema --json", "profiles.schema", {"type": "object"}, id="profiles schema"),
    ],
)
def test_a_command_that_works_prints_one_object(mgpu: Mgpu, tiny: Path, words: str, command: str, data: Json) -> None:
    ended = mgpu(*words.format(tiny=tiny).split(), FAKE_DEVICES=TWO_CARDS)
    assert ended.exit_code == ended.json["exit_code"] == 0
    checked(ended.json, command, data)
    assert ended.json["simulated"] is False
    mgpu.assert_nothing_left()


@pytest.mark.parametrize(
    ("words", "command", "data", "exit_code", "code"),
    [
        pytest.param("--nonsense --json", "mgpu", NOTHING, 2, "usage", id="a bad option of mgpu itself"),
        pytest.param("nonsense --json", "mgpu", NOTHING, 2, "usage", id="a command that does not exist"),
        pytest.param("gpus --nonsense --json", "gpus", NOTHING, 2, "usage", id="a bad option of gpus"),
        pytest.param("gpus --machine 3xRTX --json", "gpus", NOTHING, 2, "card-unknown", id="a machine that is none"),
        pytest.param("backends --nonsense --json", "backends", NOTHING, 2, "usage", id="a bad option of backends"),
        pytest.param("plan --json", "plan", NOTHING, 2, "usage", id="plan of nothing"),
        pytest.param("plan nosuch --json", "plan", NOTHING, 2, "profile-unknown", id="plan of an unknown profile"),
        pytest.param("plan {here}/no.gguf --json", "plan", NOTHING, 3, "model-missing", id="plan of a missing file"),
        pytest.param("plan {large} --json", "plan", PLAN, 1, "does-not-fit", id="plan of what does not fit"),
        pytest.param("run {large} --json", "run", NOTHING, 1, "does-not-fit", id="run of what does not fit"),
        pytest.param("run {large} --dry-run --json", "run", NOTHING, 1, "does-not-fit", id="dry run of what does not"),
        pytest.param("run {tiny} --port 0 --json", "run", NOTHING, 2, "usage", id="run at no port"),
        pytest.param(
            "run {tiny} --gpus 3 --json", "run", NOTHING, 3, "gpu-missing", id="run on cards that are not there"
        ),
        pytest.param("profiles list x --json", "profiles.list", NOTHING, 2, "usage", id="profiles list of something"),
        pytest.param("profiles show nosuch --json", "profiles.show", NOTHING, 2, "profile-unknown", id="profiles show"),
        pytest.param(
            "profiles check nosuch --json",
            "profiles.check",
            {"type": "object"},
            2,
            "profile-unknown",
            id="profiles check",
        ),
        pytest.param("profiles new A/B --json", "profiles.new", NOTHING, 2, "usage", id="profiles new of no name"),
        pytest.param("profiles schema --x --json", "profiles.schema", NOTHING, 2, "usage", id="profiles schema"),
    ],
)
def test_a_command_that_fails_prints_one_object(
    mgpu: Mgpu,
    tiny: Path,
    too_large: Path,
    words: str,
    command: str,
    data: Json,
    exit_code: int,
    code: str | None,
) -> None:
    ended = mgpu(*words.format(tiny=tiny, large=too_large, here=mgpu.here).split(), FAKE_DEVICES=TWO_CARDS)
    entry = ended.json
    assert (ended.exit_code, entry["exit_code"]) == (exit_code, exit_code)
    checked(entry, command, data)
    assert [error["code"] for error in entry["errors"]] == ([code] if code else [])
    assert all(error["message"] and error["hint"] for error in entry["errors"]), entry
    mgpu.assert_nothing_left()


def without_port(word_and_before: tuple[str, str]) -> str:
    word, before = word_and_before
    return "PORT" if before == "--port" else word


def test_a_plan_says_what_would_be_started_and_what_is_unknown(mgpu: Mgpu, tiny: Path) -> None:
    plan = checked(mgpu("plan", tiny, "--json", FAKE_DEVICES=TWO_CARDS).json, "plan", PLAN)
    candidate = plan["candidates"][plan["best"]]
    assert [device["device"] for device in candidate["devices"]] == ["CUDA0", "CUDA1"]
    assert candidate["argv"][1:3] == ["-m", str(tiny)]
    dry = mgpu("run", tiny, "--dry-run", "--json", FAKE_DEVICES=TWO_CARDS).json["data"]["argv"]
    # The port is chosen anew each time, and others take ports, too.
    assert [*map(without_port, zip(candidate["argv"], ["", *candidate["argv"]], strict=False))] == [
        *map(without_port, zip(dry, ["", *dry], strict=False))
    ]
    for device in candidate["devices"]:
        parts = ("weights_bytes", "kv_bytes", "compute_bytes", "runtime_bytes")
        assert device["total_bytes"] == sum(device[part] for part in parts)
        assert device["spare_bytes"] == device["free_bytes"] - device["total_bytes"]
    assert plan["machine"]["host"]["kernel"] is None
    assert candidate["speed"]["decode_tok_s"] is None


def test_a_plan_that_does_not_fit_offers_plans_that_do(mgpu: Mgpu) -> None:
    ended = mgpu("plan", "llama-70b", "--machine", "2x4090", "--quant", "Q8_0", "--json")
    plan = checked(ended.json, "plan", PLAN)
    assert (ended.exit_code, plan["best"], plan["candidates"][0]["verdict"]) == (1, None, "does-not-fit")
    assert plan["candidates"][0]["short_bytes"] > 0
    assert plan["fixes"]
    assert all(fix["candidate"]["verdict"].startswith("fits") for fix in plan["fixes"])


@pytest.mark.parametrize("words", ["plan llama-8b --machine 2x4090", "gpus --machine 4090+3060"])
def test_what_was_simulated_says_so(mgpu: Mgpu, words: str) -> None:
    assert mgpu(*words.split(), "--json").json["simulated"] is True
    assert "SIMULATED" in mgpu(*words.split()).out


@pytest.mark.parametrize("words", ["plan llama-8b --gpus none", "gpus", "backends"])
def test_what_is_real_does_not_say_simulated(mgpu: Mgpu, words: str) -> None:
    assert "SIMULATED" not in mgpu(*words.split()).out


def test_an_answer_is_a_stream_that_ends_with_stopped(mgpu: Mgpu, tiny: Path) -> None:
    ended = mgpu("run", tiny, "--ask", "Why?", "--json", FAKE_DEVICES=TWO_CARDS)
    events = checked_stream(ended)
    assert ended.exit_code == 0
    assert events[0] == "planned"
    assert [event for event in events if event in ("checked", "ready", "answered")] == ["checked", "ready", "answered"]
    assert events[-2:] == ["stopping", "stopped"]
    assert "answer" in events
    assert len(events) == len(ended.stream)
    text = "".join(entry["data"]["text"] for entry in ended.stream if entry["data"]["event"] == "answer")
    assert text.startswith("I am a fake engine")


def test_a_run_that_was_interrupted_is_a_stream_that_ends_with_stopped_and_why(mgpu: Mgpu, tiny: Path) -> None:
    running = mgpu.start("run", tiny, "--json", "--interval", "0.1", FAKE_DEVICES=TWO_CARDS)
    running.event("status")
    ended = running.end(signal.SIGINT)
    events = checked_stream(ended)
    assert ended.exit_code == 130
    assert events[-1] == "stopped"
    assert [entry["data"] for entry in ended.stream].count(None) == 1
    assert [error["code"] for error in ended.stream[-1]["errors"]] == ["interrupted"]
    assert ended.event("stopped")["freed_bytes"] > 0


def test_a_run_that_failed_is_a_stream_that_ends_with_the_cause(mgpu: Mgpu, tiny: Path) -> None:
    ended = mgpu("run", tiny, "--json", FAKE_DEVICES=TWO_CARDS, FAKE_FAIL="oom-kv")
    assert "started" in checked_stream(ended)
    assert ended.exit_code == 4
    assert [error["code"] for error in ended.stream[-1]["errors"]] == ["out-of-memory"]


def test_warnings_are_part_of_the_stream(mgpu: Mgpu, tiny: Path) -> None:
    ended = mgpu("run", tiny, "--ctx", "256", "--ask", "Why?", "--json", FAKE_FAIL="repeat-token")
    assert "warning" in checked_stream(ended)
    assert "repeats one token" in ended.event("warning")["message"]
