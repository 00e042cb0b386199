"""The client against a fake Ollama, and against a real one where there is one: pull, load, chat, create, and errors."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import ollama
import pytest

from mgpu.backends.ollama_log import runner_port
from mgpu.backends.ollama_placement import LoadedModel
from mgpu.errors import BadModel, EngineFailed, MgpuError, Missing, UsageError
from mgpu.models.transfer import Progress
from mgpu.running.client import Answer
from mgpu.running.ollama_client import OllamaClient, Tag
from mgpu.running.ollama_import import create_from_gguf
from tests.fakes.devices import free_port
from tests.fakes.engines import http_answer, scripted_engine
from tests.fakes.ollama_running import MODEL, TWO_CARDS, RunningOllama, running_ollama

MIB = 1 << 20
CARDS = {"FAKE_DEVICES": TWO_CARDS, "LLAMA_ARG_ENDPOINT_METRICS": "1"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningOllama]:
    with running_ollama(tmp_path_factory.mktemp("ollama"), CARDS) as running, OllamaClient(running.url) as client:
        client.pull(MODEL)
        yield running


@pytest.fixture
def client(server: RunningOllama) -> Iterator[OllamaClient]:
    with OllamaClient(server.url) as connection:
        yield connection


def answered(client: OllamaClient, model: str = MODEL) -> tuple[str, Answer]:
    *pieces, end = client.chat(model, "Say hello")
    assert isinstance(end, Answer)
    return "".join(piece for piece in pieces if isinstance(piece, str)), end


def names(client: OllamaClient) -> set[str]:
    return {model.name for model in client.models()}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param({"models": []}, (), id="none"),
        pytest.param(
            {
                "models": [
                    {
                        "name": "a:1b",
                        "size": 5,
                        "modified_at": "1970-01-01T00:01:00.345293519Z",
                        "details": {"quantization_level": "Q4_0"},
                    }
                ]
            },
            (Tag(name="a:1b", size_bytes=5, quantisation="Q4_0", modified=60),),
            id="as Ollama says it",
        ),
        pytest.param(
            {
                "models": [
                    {"name": "a\x1b[2J", "size": True, "modified_at": 7, "details": {"quantization_level": "unknown"}},
                    {"name": "b", "size": -1, "details": "none"},
                ]
            },
            (
                Tag(name="a[2J", size_bytes=0, quantisation=None, modified=0),
                Tag(name="b", size_bytes=0, quantisation=None, modified=0),
            ),
            id="of a strange shape",
        ),
        pytest.param({"models": None}, None, id="no list"),
        pytest.param({"models": ["a"]}, None, id="a list of words"),
        pytest.param({"models": [{"size": 5}]}, None, id="a model without a name"),
        pytest.param([], None, id="another list"),
    ],
)
def test_the_models_are_what_the_server_says(answer: object, expected: tuple[Tag, ...] | None) -> None:
    with scripted_engine({"/api/tags": http_answer(json.dumps(answer))}) as (url, _), OllamaClient(url) as client:
        if expected is None:
            with pytest.raises(EngineFailed) as caught:
                client.models()
            assert caught.value.code == "wrong-answer"
        else:
            assert client.models() == expected


def test_a_pull_reports_one_total_over_all_layers(tmp_path: Path) -> None:
    seen: list[Progress] = []
    with running_ollama(tmp_path) as running, OllamaClient(running.url) as client:
        client.pull(MODEL, seen.append)
        assert names(client) == {MODEL}
    assert {progress.stage for progress in seen} == {"downloading"}
    done = [progress.done_bytes for progress in seen]
    assert done == sorted(done)
    assert (seen[-1].done_bytes, seen[-1].total_bytes) == (98362432 + 358, 98362432 + 358)


@pytest.mark.parametrize(
    ("tag", "fail", "kind", "code"),
    [
        pytest.param("nonesuch:7b", "", Missing, "not-found", id="a model the library does not have"),
        pytest.param(MODEL, "pull-fails", Missing, "disk-full", id="a disk that is full"),
        pytest.param(MODEL, "pull-breaks", EngineFailed, "download-interrupted", id="a connection that breaks"),
    ],
)
def test_a_pull_that_fails_says_why(tmp_path: Path, tag: str, fail: str, kind: type[MgpuError], code: str) -> None:
    with running_ollama(tmp_path, {"FAKE_FAIL": fail}) as running, OllamaClient(running.url) as client:
        with pytest.raises(kind) as caught:
            client.pull(tag)
        assert caught.value.code == code
        assert client.models() == ()


def test_an_error_of_who_watches_a_pull_is_not_taken_for_ollamas(client: OllamaClient) -> None:
    def watch(progress: Progress) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        client.pull(MODEL, watch)


def test_a_loaded_model_is_listed(client: OllamaClient) -> None:
    client.load(MODEL, options={"num_ctx": 2048})
    (loaded,) = client.loaded()
    assert loaded.name == MODEL
    assert loaded.ctx_tokens == 2048
    assert loaded.size_bytes == loaded.size_vram_bytes


def test_loading_the_recorded_model_gives_the_recorded_sizes(client: OllamaClient) -> None:
    client.load(MODEL)
    assert client.loaded() == (
        LoadedModel(name=MODEL, size_bytes=206946958, size_vram_bytes=206946958, ctx_tokens=4096),
    )


def test_a_chat_ends_with_what_was_counted(client: OllamaClient) -> None:
    text, end = answered(client)
    assert text == "I am a fake engine and every word of this answer was made up in advance ."
    assert end.generated_tokens == len(text.split())
    assert end.finish_reason == "stop"
    assert end.generation_tok_s == pytest.approx(200, rel=0.5)
    assert end.prompt_tok_s is not None


def test_a_chat_that_is_given_up_leaves_the_server_usable(client: OllamaClient) -> None:
    pieces = client.chat(MODEL, "Say hello")
    assert isinstance(pieces, Iterator)
    assert next(pieces) == "I"
    del pieces
    assert answered(client)[1].finish_reason == "stop"


def test_a_canary_is_eight_tokens(client: OllamaClient) -> None:
    canary = client.canary(MODEL)
    assert len(canary.text.split()) == 8
    assert not canary.one_token_repeated
    assert canary.generation_tok_s is not None


def test_the_runners_counters_grow_with_each_answer(client: OllamaClient, server: RunningOllama) -> None:
    client.load(MODEL)
    port = runner_port(server.lines())
    before = client.sample(port)
    _, end = answered(client)
    after = client.sample(port)
    assert before is not None
    assert after is not None
    assert before.generation_tokens_total is not None
    assert end.generated_tokens is not None
    assert after.generation_tokens_total == before.generation_tokens_total + end.generated_tokens
    assert after.at > before.at
    assert client.sample(None) is None
    assert client.sample(free_port()) is None


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda client: client.load("nope"), id="loading it"),
        pytest.param(lambda client: client.canary("nope"), id="a canary"),
        pytest.param(lambda client: list(client.chat("nope", "hello")), id="a chat, which is a stream"),
    ],
)
def test_a_model_ollama_does_not_have_is_missing(client: OllamaClient, use: Callable[[OllamaClient], object]) -> None:
    with pytest.raises(Missing, match="does not have the model nope") as caught:
        use(client)
    assert (caught.value.code, caught.value.hint) == ("not-found", "mgpu pull ollama:nope")


@pytest.mark.parametrize(
    ("fail", "code", "says"),
    [
        pytest.param("bad-arch", "architecture-unknown", "lxama", id="an architecture it does not know"),
        pytest.param("load-oom", "out-of-memory", "allocate|memory", id="a card that is too small"),
    ],
)
def test_a_load_that_fails_names_the_cause_of_the_runner(tmp_path: Path, fail: str, code: str, says: str) -> None:
    environment = {**CARDS, "FAKE_FAIL": fail}
    with running_ollama(tmp_path, environment) as running, OllamaClient(running.url) as client:
        client.pull(MODEL)
        with pytest.raises(EngineFailed, match=says) as caught:
            client.load(MODEL)
        assert caught.value.code == code


def test_a_wrong_kind_of_option_is_told_in_ollamas_words(client: OllamaClient) -> None:
    with pytest.raises(EngineFailed, match="num_gpu"):
        client.load(MODEL, options={"num_gpu": 10.5})


def test_a_runner_that_dies_breaks_off_the_answer_and_is_started_anew(tmp_path: Path) -> None:
    environment = {**CARDS, "FAKE_FAIL": "runner-dies", "FAKE_TOKENS_PER_SECOND": "20"}
    with running_ollama(tmp_path, environment) as running, OllamaClient(running.url) as client:
        client.pull(MODEL)
        client.load(MODEL)
        first = runner_port(running.lines())
        with pytest.raises(EngineFailed) as caught:
            answered(client)
        assert caught.value.code in ("killed", "exited", "engine-died")
        assert [model.name for model in client.loaded()] == [MODEL], "Ollama goes on listing it"
        client.load(MODEL)
        assert runner_port(running.lines()) not in (None, first)


def test_a_server_that_dies_in_an_answer_is_an_engine_that_died(tmp_path: Path) -> None:
    environment = {**CARDS, "FAKE_TOKENS_PER_SECOND": "20"}
    with running_ollama(tmp_path, environment) as running, OllamaClient(running.url) as client:
        client.pull(MODEL)
        pieces = client.chat(MODEL, "Say hello")
        next(pieces)
        os.kill(running.process.pid, signal.SIGKILL)
        with pytest.raises(EngineFailed) as caught:
            list(pieces)
        assert caught.value.code == "engine-died"


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda client: client.loaded(), id="a request in one piece"),
        pytest.param(lambda client: client.load(MODEL), id="a load"),
        pytest.param(lambda client: list(client.chat(MODEL, "hello")), id="a stream"),
        pytest.param(lambda client: client.version(), id="the version"),
        pytest.param(lambda client: client.has_blob("sha256:" + "0" * 64), id="a blob"),
    ],
)
def test_a_server_that_is_not_there_is_an_engine_that_died(use: Callable[[OllamaClient], object]) -> None:
    with OllamaClient(f"http://127.0.0.1:{free_port()}") as client:
        assert not client.is_up()
        with pytest.raises(EngineFailed) as caught:
            use(client)
        assert caught.value.code == "engine-died"


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgpu.running.ollama_client._POLL_TIMEOUT_S", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        OllamaClient(f"http://127.0.0.1:{listener.getsockname()[1]}") as client,
    ):
        with pytest.raises(EngineFailed) as caught:
            client.loaded()
        assert caught.value.code == "no-answer"


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda client: client.loaded(), id="the loaded models"),
        pytest.param(lambda client: client.models(), id="the models"),
        pytest.param(lambda client: client.load(MODEL), id="a load"),
        pytest.param(lambda client: list(client.chat(MODEL, "hello")), id="a stream"),
    ],
)
def test_another_program_on_the_port_answers_wrongly(tmp_path: Path, use: Callable[[OllamaClient], object]) -> None:
    with running_ollama(tmp_path, {"FAKE_FAIL": "not-ollama"}) as running, OllamaClient(running.url) as client:
        assert not client.is_up()
        with pytest.raises(EngineFailed):
            use(client)


def test_a_proxy_in_the_environment_never_sees_a_request(
    server: RunningOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, address)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        with OllamaClient(server.url) as client:
            client.load(MODEL)
            assert answered(client)[1].generated_tokens
            assert client.sample(runner_port(server.lines())) is not None
        proxy.settimeout(0)
        with pytest.raises(BlockingIOError):
            proxy.accept()


class TestGgufFile:
    @pytest.fixture
    def gguf(self, tmp_path: Path) -> Path:
        path = tmp_path / "tiny.gguf"
        path.write_bytes(b"GGUF" + os.urandom(3 * MIB))
        return path

    def test_a_file_becomes_a_model_that_answers(self, client: OllamaClient, gguf: Path) -> None:
        seen: list[Progress] = []
        digest = create_from_gguf(client, "tiny:q4", gguf, parameters={"num_ctx": 2048}, on_progress=seen.append)
        assert digest == f"sha256:{hashlib.sha256(gguf.read_bytes()).hexdigest()}"
        assert [progress.stage for progress in seen if progress.done_bytes == progress.total_bytes] == [
            "hashing",
            "uploading",
        ]
        assert "tiny:q4" in names(client)
        assert answered(client, "tiny:q4")[1].generated_tokens

    def test_a_file_the_server_has_is_not_uploaded_again(self, client: OllamaClient, gguf: Path) -> None:
        create_from_gguf(client, "one", gguf)
        seen: list[Progress] = []
        create_from_gguf(client, "two", gguf, on_progress=seen.append)
        assert {progress.stage for progress in seen} == {"hashing"}
        assert {"one:latest", "two:latest"} <= names(client)

    def test_a_file_on_the_same_disk_is_linked_not_copied(
        self, client: OllamaClient, server: RunningOllama, gguf: Path
    ) -> None:
        seen: list[Progress] = []
        create_from_gguf(client, "linked", gguf, models_folder=server.models, on_progress=seen.append)
        assert {progress.stage for progress in seen} == {"hashing"}
        assert gguf.stat().st_nlink == 2

    def test_a_folder_that_cannot_be_linked_into_means_an_upload(self, client: OllamaClient, gguf: Path) -> None:
        seen: list[Progress] = []
        create_from_gguf(client, "copied", gguf, models_folder=Path("/proc/nowhere"), on_progress=seen.append)
        assert {progress.stage for progress in seen} == {"hashing", "uploading"}

    @pytest.mark.parametrize(
        ("name", "content", "kind", "code"),
        [
            pytest.param("tiny.gguf", None, Missing, "model-missing", id="a file that is not there"),
            pytest.param("tiny.gguf", b"PK\3\4zip", BadModel, "model-not-gguf", id="a file that is no GGUF"),
            pytest.param("tiny.gguf", b"", BadModel, "model-not-gguf", id="an empty file"),
            pytest.param("m-00002-of-00003.gguf", b"GGUF", BadModel, "split-model", id="a part of a split model"),
        ],
    )
    def test_what_is_no_whole_gguf_is_refused_before_anything_is_sent(
        self, client: OllamaClient, tmp_path: Path, name: str, content: bytes | None, kind: type[MgpuError], code: str
    ) -> None:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(kind) as caught:
            create_from_gguf(client, "tiny", path)
        assert caught.value.code == code

    @pytest.mark.parametrize("name", ["", "../etc", "a b", "-x", "a:b:c", "x" * 3 + "/\n", "ä"])
    def test_a_name_ollama_would_refuse_is_refused_here(self, client: OllamaClient, gguf: Path, name: str) -> None:
        with pytest.raises(UsageError, match="cannot name a model in Ollama"):
            create_from_gguf(client, name, gguf)

    def test_a_blob_that_is_not_what_it_says_is_refused(self, client: OllamaClient) -> None:
        with pytest.raises(EngineFailed, match="digest mismatch") as caught:
            client.upload_blob("sha256:" + "0" * 64, iter([b"GGUF"]))
        assert caught.value.code == "create-failed"

    def test_a_model_of_a_missing_blob_cannot_be_made(self, client: OllamaClient) -> None:
        with pytest.raises(EngineFailed, match="not found") as caught:
            client.create("ghost", "sha256:" + "0" * 64)
        assert caught.value.code == "create-failed"


def test_the_official_client_and_openais_protocol_see_the_same_server(server: RunningOllama) -> None:
    official = ollama.Client(server.url, trust_env=False)
    with official._client:
        assert official.show(MODEL).modelinfo is not None
    answer = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
        trust_env=False,
    ).json()
    assert answer["usage"]["completion_tokens"] == 3
    assert {model["id"] for model in httpx.get(f"{server.url}/v1/models", trust_env=False).json()["data"]} >= {MODEL}


def test_two_clients_at_once_get_their_own_answers(server: RunningOllama) -> None:
    texts: list[str] = []

    def ask() -> None:
        with OllamaClient(server.url) as client:
            texts.append(answered(client)[0])

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 2
    assert len(set(texts)) == 1
