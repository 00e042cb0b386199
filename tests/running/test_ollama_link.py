"""One model on an Ollama, as mgpu talks to it: with a server of its own, whose log it reads, and somebody else's."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from mgpu.backends.ollama_log import models_folder
from mgpu.errors import EngineFailed, Missing
from mgpu.models.source import OllamaTag
from mgpu.models.transfer import Progress
from mgpu.planning.candidates import Candidate
from mgpu.running.client import Answer
from mgpu.running.ollama_client import OllamaClient
from mgpu.running.ollama_link import OllamaLink, model_name
from tests.backends import recorded_ollama as recorded
from tests.backends.planned_ollama import planned
from tests.fakes.devices import free_port
from tests.fakes.ollama_running import MODEL, TWO_CARDS, RunningOllama, running_ollama
from tests.fakes.shapes import SHAPES
from tests.fakes.sparse_gguf import make_sparse_gguf

TAG = OllamaTag("smollm2", "135m")
SPREAD = {"FAKE_DEVICES": TWO_CARDS, "OLLAMA_SCHED_SPREAD": "1", "LLAMA_ARG_ENDPOINT_METRICS": "1"}
ON_TWO = planned(layers=(16, 14))
ServerOf = Callable[[Path], AbstractContextManager[tuple[OllamaLink, RunningOllama]]]
BEGINNING = "on which cards the model is cannot be seen"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return make_sparse_gguf(tmp_path / "m.gguf", SHAPES["smollm2-135m"], "Q4_1", layers=2, vocabulary=1000)


@contextmanager
def own(folder: Path, model: str = MODEL, **variables: str) -> Iterator[tuple[OllamaLink, RunningOllama]]:
    """A server of mgpu's, and the link to it."""
    with (
        running_ollama(folder / "own", {**SPREAD, **variables}) as server,
        OllamaLink(server.url, model, lines=server.lines) as link,
    ):
        yield link, server


@contextmanager
def theirs(folder: Path, model: str = MODEL, **variables: str) -> Iterator[tuple[OllamaLink, RunningOllama]]:
    """A server of somebody else's, and the link to it."""
    with (
        running_ollama(folder / "theirs", {**SPREAD, **variables}) as server,
        OllamaLink(server.url, model, lines=None) as link,
    ):
        yield link, server


def ready(link: OllamaLink, candidate: Candidate = ON_TWO) -> None:
    link.take_in(TAG, candidate, lambda _: None)
    link.load()


def answered(link: OllamaLink) -> Answer:
    *pieces, end = link.ask("Say hello")
    assert isinstance(end, Answer)
    assert "".join(map(str, pieces)).startswith("I am a fake engine")
    return end


def test_all_of_a_model_on_a_server_of_its_own(tmp_path: Path) -> None:
    with own(tmp_path) as (link, _):
        assert link.is_up()
        assert link.sample() is not None, "the server is up, and counts nothing yet"
        link.require_devices(ON_TWO)
        ready(link)
        assert link.complaints(ON_TWO) == ()
        held = link.memory(ON_TWO)
        assert all(held[index].weights_bytes and held[index].kv_bytes for index in (0, 1))
        assert link.canary(patience_s=60).text
        before = link.sample()
        assert answered(link).generated_tokens == 17
        after = link.sample()
        assert before is not None
        assert after is not None
        assert (after.generation_tokens_total or 0) - (before.generation_tokens_total or 0) == 17


def test_a_limit_is_kept(tmp_path: Path) -> None:
    with own(tmp_path) as (link, _):
        ready(link)
        *_, end = link.ask("Say hello", max_tokens=3)
        assert isinstance(end, Answer)
        assert (end.generated_tokens, end.finish_reason) == (3, "length")


def test_the_counters_of_a_runner_that_was_started_anew_are_found(tmp_path: Path) -> None:
    with own(tmp_path, FAKE_FAIL="runner-dies", FAKE_TOKENS_PER_SECOND="20") as (link, _):
        ready(link)
        counted = link.sample()
        assert counted is not None
        assert counted.generation_tokens_total == 0
        with pytest.raises(EngineFailed, match="ended while it answered"):
            answered(link)
        unknown = link.sample()
        assert unknown is not None, "Ollama itself is up"
        assert unknown.generation_tokens_total is None
        link.load()
        again = link.sample()
        assert again is not None
        assert again.generation_tokens_total == 0


@pytest.mark.parametrize("server_of", [own, theirs])
def test_a_tag_is_pulled_once(tmp_path: Path, server_of: ServerOf) -> None:
    seen: list[Progress] = []
    with server_of(tmp_path) as (link, _):
        link.take_in(TAG, ON_TWO, seen.append)
        assert seen[-1].done_bytes == seen[-1].total_bytes
        pulled = len(seen)
        link.take_in(TAG, ON_TWO, seen.append)
        assert len(seen) == pulled


def test_a_tag_that_the_library_does_not_have_is_missing(tmp_path: Path) -> None:
    with own(tmp_path, "nosuch:1b") as (link, _), pytest.raises(Missing, match="no nosuch:1b"):
        link.take_in(OllamaTag("nosuch", "1b"), ON_TWO, lambda _: None)


def test_a_file_becomes_a_model_in_the_store_that_the_server_names(tmp_path: Path, gguf: Path) -> None:
    store = tmp_path / 'with "quotes" and blanks'
    with own(tmp_path, "mgpu/m:q4_1", OLLAMA_MODELS=str(store)) as (link, _):
        link.take_in(gguf, ON_TWO, lambda _: None)
        assert [blob.samefile(gguf) for blob in (store / "blobs").iterdir()] == [True]
        link.load()
        assert answered(link).generated_tokens


@pytest.mark.parametrize(
    ("lines", "folder"),
    [
        pytest.param(recorded.lines("spread"), "/srv/ollama/models", id="recorded"),
        pytest.param(recorded.lines("create"), "/srv/ollama/models3", id="recorded with another one"),
        pytest.param(recorded.OLD, None, id="a log without its beginning"),
        pytest.param([], None, id="no log"),
    ],
)
def test_the_store_stands_in_the_log(lines: list[str], folder: str | None) -> None:
    assert models_folder(lines) == (Path(folder) if folder else None)


def test_a_file_goes_to_somebody_elses_server_by_upload_with_its_context(tmp_path: Path, gguf: Path) -> None:
    wanted = replace(ON_TWO, ctx_tokens=2048)
    stages: set[str] = set()
    with theirs(tmp_path, "mgpu/m:q4_1") as (link, server):
        link.take_in(gguf, wanted, lambda progress: stages.add(progress.stage))
        link.load()
        (complaint,) = link.complaints(wanted)
        assert complaint.startswith(BEGINNING)
        assert link.memory(wanted) == {}
        with OllamaClient(server.url) as client:
            assert [loaded.ctx_tokens for loaded in client.loaded()] == [2048]
    assert stages == {"hashing", "uploading"}
    assert gguf.stat().st_nlink == 1


def test_only_ones_own_server_is_told_how_long_to_keep_a_model(tmp_path: Path) -> None:
    seconds = []
    for server_of in (own, theirs):
        with server_of(tmp_path) as (link, server):
            ready(link)
            (entry,) = httpx.get(f"{server.url}/api/ps", trust_env=False).json()["models"]
            seconds.append((datetime.fromisoformat(entry["expires_at"]) - datetime.now(UTC)).total_seconds())
    assert seconds[0] > 86400 > 300 >= seconds[1]


def test_another_context_is_complained_about_with_either_server(tmp_path: Path) -> None:
    wanted = replace(ON_TWO, ctx_tokens=6000)
    with own(tmp_path) as (link, _):
        ready(link)
        assert any("4096 tokens of context instead of the 6000 planned" in each for each in link.complaints(wanted))
    with theirs(tmp_path) as (link, _):
        ready(link)
        assert any("4096 tokens of context instead of the 6000 planned" in each for each in link.complaints(wanted))
        assert not any(BEGINNING in each for each in link.complaints(planned(devices=(), layers=())))


def test_cards_that_are_not_found_are_an_error_of_ones_own_server_only(tmp_path: Path) -> None:
    with own(tmp_path, FAKE_FAIL="silent-cpu") as (link, _), pytest.raises(EngineFailed) as caught:
        link.require_devices(ON_TWO)
    assert caught.value.code == "bad-device"
    with theirs(tmp_path, FAKE_FAIL="silent-cpu") as (link, _):
        link.require_devices(ON_TWO)


def test_a_load_that_fails_names_the_card_from_the_log(tmp_path: Path) -> None:
    with own(tmp_path, FAKE_FAIL="load-oom") as (link, _):
        link.take_in(TAG, ON_TWO, lambda _: None)
        with pytest.raises(EngineFailed, match=r"Vulkan1: \d+ MiB asked for the weights") as caught:
            link.load()
    assert caught.value.code == "out-of-memory"


def test_a_server_that_is_gone_is_an_engine_that_died(tmp_path: Path) -> None:
    with own(tmp_path) as (link, server):
        ready(link)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        assert not link.is_up()
        for use in (link.load, link.canary, lambda: link.complaints(ON_TWO), lambda: list(link.ask("Hello"))):
            with pytest.raises(EngineFailed) as caught:
                use()
            assert caught.value.code == "engine-died"


def test_nothing_at_the_address_is_not_up() -> None:
    with OllamaLink(f"http://127.0.0.1:{free_port()}", MODEL, lines=None) as link:
        assert not link.is_up()
        assert link.sample() is None


@pytest.mark.parametrize(
    ("name", "quantisation", "expected"),
    [
        pytest.param("llama-8b", "Q4_K_M", "mgpu/llama-8b:q4_k_m", id="a profile"),
        pytest.param("llama-8b", None, "mgpu/llama-8b:latest", id="an unknown quantisation"),
        pytest.param("It's (my) model", "UD-Q4_K_XL", "mgpu/It-s-my-model:ud-q4_k_xl", id="a file's name"),
        pytest.param("Größe", "ä", "mgpu/Gr-e:model", id="letters of other alphabets"),
        pytest.param("../etc", "a:b", "mgpu/etc:a-b", id="a path"),
        pytest.param("_.-", "", "mgpu/model:latest", id="nothing that can begin a name"),
        pytest.param("x" * 200, "Q8_0", f"mgpu/{'x' * 80}:q8_0", id="a long name"),
    ],
)
def test_a_file_has_a_name_that_ollama_takes(name: str, quantisation: str | None, expected: str) -> None:
    assert model_name(name, quantisation) == expected
