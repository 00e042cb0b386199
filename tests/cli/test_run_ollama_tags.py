"""`mgpu run ollama:NAME:TAG`: planned from the registry's first bytes, then fetched by Ollama itself, and answered."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.devices import free_port
from tests.fakes.ollama_registry import FakeRegistry, running
from tests.fakes.ollama_running import running_ollama
from tests.fakes.shapes import SHAPES
from tests.fakes.sparse_gguf import make_sparse_gguf

from .contract import PLAN, checked, checked_stream
from .program import Mgpu
from .two_cards import CARDS, engine_log, store, warnings_of, with_two_cards

TAG = "smol:135m"
RUN = ("run", f"ollama:{TAG}", "--gpus", "2")
WEIGHTS = "application/vnd.ollama.image.model"


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sparse_gguf(tmp_path_factory.mktemp("models") / "small.gguf", SHAPES["smollm2-135m"], "Q4_1")


@pytest.fixture
def registry(small: Path, tmp_path: Path) -> Iterator[FakeRegistry]:
    """Ollama's library, with a small model and a large one."""
    with running(FakeRegistry()) as registry:
        registry.add(f"library/{TAG}", small)
        registry.add("library/big:70b", make_sparse_gguf(tmp_path / "70b.gguf", SHAPES["llama-3.3-70b"], "Q4_K_M"))
        yield registry


@pytest.fixture
def on_two(mgpu: Mgpu, nvml: dict[str, Path], tmp_path: Path, registry: FakeRegistry, small: Path) -> Mgpu:
    """mgpu where library and registry have the same model."""
    mgpu.environment |= {
        "MGPU_OLLAMA_REGISTRY": registry.address,
        "FAKE_LIBRARY": f"{TAG}={small.stat().st_size} big:70b=1",
    }
    return with_two_cards(mgpu, nvml, tmp_path)


def keep(folder: Path, weights: Path) -> None:
    """Put the model into a store as Ollama keeps it."""
    digest = "sha256-" + "1" * 64
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    (folder / "blobs" / digest).hardlink_to(weights)
    manifest = folder / "manifests/registry.ollama.ai/library" / TAG.replace(":", "/")
    manifest.parent.mkdir(parents=True)
    layer = {"mediaType": WEIGHTS, "digest": digest.replace("-", ":"), "size": weights.stat().st_size}
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": [layer]}))


def test_a_tag_is_planned_fetched_checked_and_answered(on_two: Mgpu, registry: FakeRegistry, small: Path) -> None:
    ended = on_two(*RUN, "--ask", "Hello", "--json")
    assert ended.exit_code == 0, ended
    steps = [event for event in checked_stream(ended) if event not in ("loading", "answer")]
    assert steps[:5] == ["planned", "started", "fetching", "fetched", "checked"]
    assert steps[5:] == ["ready", "answered", "stopping", "stopped"]
    assert ended.event("fetching")["name"] == TAG
    assert ended.event("ready")["model"] == TAG
    assert [device["weights_bytes"] > 0 for device in ended.event("checked")["devices"]] == [True, True]
    assert warnings_of(ended) == []
    assert registry.served_bytes < small.stat().st_size / 10, "Ollama fetches the rest"
    on_two.assert_nothing_left()


def test_a_fetch_is_one_line(on_two: Mgpu) -> None:
    ended = on_two(*RUN, "--ask", "Hello")
    assert ended.exit_code == 0
    (line,) = re.findall(r"(?m)^(?:fetch|import) .*", ended.err)
    assert re.fullmatch(rf"fetch +{TAG}  97\.6 MB in .* s", line)


def test_a_tag_that_does_not_fit_is_not_fetched(on_two: Mgpu, registry: FakeRegistry) -> None:
    ended = on_two("run", "ollama:big:70b", "--gpus", "1", "--json")
    assert (ended.exit_code, ended.stream[-1]["errors"][0]["code"]) == (1, "does-not-fit")
    assert not list(on_two.state.glob("*/engine.log"))
    assert registry.served_bytes < 64 << 20


@pytest.mark.parametrize("variables", [pytest.param({}, id="own"), pytest.param({"theirs": "1"}, id="somebody else's")])
def test_a_tag_that_ollama_has_needs_no_network(
    on_two: Mgpu, small: Path, tmp_path: Path, variables: dict[str, str]
) -> None:
    offline = {"FAKE_LIBRARY": "none:0=1", "MGPU_OLLAMA_REGISTRY": f"http://127.0.0.1:{free_port()}"}
    if not variables:
        keep(store(on_two), small)
        ended = on_two(*RUN, "--ask", "Hello", "--json", **offline)
    else:
        keep(tmp_path / "theirs" / "models", small)
        with running_ollama(tmp_path / "theirs", {**CARDS, **offline}) as server:
            there = {"OLLAMA_HOST": server.url, "OLLAMA_MODELS": str(server.models)}
            ended = on_two(*RUN, "--ask", "Hello", "--json", **offline, **there)
    assert ended.exit_code == 0, ended
    assert "fetching" not in checked_stream(ended)
    assert ended.event("answered")["generated_tokens"] == 17


@pytest.mark.parametrize(
    ("fault", "exit_code", "code"),
    [
        pytest.param("pull-fails", 3, "disk-full", id="no space half way"),
        pytest.param("pull-breaks", 4, "download-interrupted", id="it breaks off"),
    ],
)
def test_a_fetch_that_fails_is_explained(on_two: Mgpu, fault: str, exit_code: int, code: str) -> None:
    ended = on_two(*RUN, "--json", FAKE_FAIL=fault)
    assert (ended.exit_code, [error["code"] for error in ended.stream[-1]["errors"]]) == (exit_code, [code])
    assert "fetching" in checked_stream(ended)
    on_two.assert_nothing_left()
    assert on_two(*RUN, "--ask", "Hello").exit_code == 0, "the next try is none the worse"


def test_a_fetch_that_is_interrupted_leaves_nothing_running(on_two: Mgpu) -> None:
    running = on_two.start(*RUN, "--json", FAKE_FAIL="pull-slow:1")
    running.event("started")
    running.event("fetching")
    assert running.end(signal.SIGINT).exit_code == 130
    on_two.assert_nothing_left()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        pytest.param("ollama:smol:7b", "not-found", "there is no smol:7b", id="a tag that is not there"),
        pytest.param("ollama:nosuch", "not-found", "there is no nosuch:latest", id="a model that is not there"),
    ],
)
def test_what_the_library_does_not_have_starts_nothing(on_two: Mgpu, words: str, code: str, message: str) -> None:
    ended = on_two("run", words, "--gpus", "2", "--json")
    (error,) = ended.stream[-1]["errors"]
    assert (ended.exit_code, error["code"]) == (3, code)
    assert message in error["message"]
    assert "https://ollama.com/library/" in error["hint"]
    assert not list(on_two.state.glob("*/engine.log"))


def test_a_registry_out_of_reach(on_two: Mgpu, registry: FakeRegistry) -> None:
    nowhere = {"MGPU_OLLAMA_REGISTRY": f"http://127.0.0.1:{free_port()}"}
    ended = on_two(*RUN, "--ask", "Hello", **nowhere)
    assert ended.exit_code == 3
    assert f"error    ollama:{TAG} cannot be read at {nowhere['MGPU_OLLAMA_REGISTRY']}" in ended.err
    assert on_two("plan", *RUN[1:]).exit_code == 0  # now it is remembered
    registry.status = 503
    plan = on_two("plan", *RUN[1:], "--json")
    assert "planned from what was read" in plan.json["warnings"][0]
    assert checked(plan.json, "plan", PLAN)["candidates"][0]["backend"] == "ollama"


def test_an_ollama_that_knows_less_than_the_registry_says_so(on_two: Mgpu) -> None:
    ended = on_two(*RUN, "--ask", "Hello", FAKE_LIBRARY="other:1b=4096")
    assert ended.exit_code == 3
    assert f"Ollama's library has no {TAG}" in ended.err
    assert "Listening on" in engine_log(on_two)
    on_two.assert_nothing_left()


def test_a_server_that_dies_while_it_fetches_is_explained(on_two: Mgpu) -> None:
    running = on_two.start(*RUN, "--json", FAKE_FAIL="pull-slow:2")
    pid = running.event("started")["pid"]
    running.event("fetching")
    on_two.kill(pid)
    ended = running.end()
    (error,) = ended.stream[-1]["errors"]
    assert (ended.exit_code, error["code"]) == (4, "killed"), error
    on_two.assert_nothing_left()
