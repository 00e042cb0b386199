"""The HTTP client against the fake llama-server, and against servers that answer nonsense."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import pytest

from mgpu.errors import EngineFailed
from mgpu.running import client as clients
from mgpu.running.client import Answer, Canary
from tests.fakes.devices import free_port
from tests.fakes.engines import LIMIT_S, connect, fake_engine, http_answer, scripted_engine, until
from tests.fakes.llama_server_engine import WORDS

FIRST_WORDS = " ".join(WORDS[:8])


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_an_engine_is_up_when_its_model_is_loaded(tmp_path: Path) -> None:
    with fake_engine(tmp_path) as (_, client):
        until(client.is_up)


def test_an_engine_that_still_loads_is_not_up_and_has_no_counters(tmp_path: Path) -> None:
    port = free_port()
    with fake_engine(tmp_path, "--metrics", port=port, FAKE_FAIL="hang-loading") as (_, client):
        until(lambda: listening(port))
        assert not client.is_up()
        assert client.sample() is None
        with pytest.raises(EngineFailed, match=r"HTTP 503.*Loading model"):
            client.canary()


def test_an_engine_that_is_not_there_is_not_up() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        with connect(f"http://127.0.0.1:{silent.getsockname()[1]}") as client:
            assert not client.is_up()
            assert client.sample() is None
            with pytest.raises(EngineFailed) as failed:
                client.canary()
    assert failed.value.code == "engine-died"


def test_proxies_in_the_environment_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")
    with fake_engine(tmp_path) as (_, client):
        until(client.is_up)
        assert client.canary().text == FIRST_WORDS


@pytest.mark.parametrize(
    ("fault", "text", "repeated"),
    [
        pytest.param("", FIRST_WORDS, False, id="a good answer"),
        pytest.param("repeat-token", "the the the the the the the the", True, id="one word again and again"),
        pytest.param("garbage", "� @@ ]} \x7f � @@ ]} \x7f", False, id="nonsense is still an answer"),
    ],
)
def test_the_canary_brings_an_answer(fault: str, text: str, repeated: bool, tmp_path: Path) -> None:
    with fake_engine(tmp_path, FAKE_FAIL=fault) as (_, client):
        until(client.is_up)
        canary = client.canary()
    assert (canary.text, canary.one_token_repeated) == (text, repeated)
    assert 0 < canary.seconds < LIMIT_S
    assert canary.generation_tok_s is not None
    assert canary.generation_tok_s > 0


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        pytest.param("die-in-request", "engine-died", id="it dies of the question"),
        pytest.param("hang-request", "no-answer", id="it never answers"),
    ],
)
def test_a_canary_that_dies(fault: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "_ANSWER_TIMEOUT_S", 0.5)
    with fake_engine(tmp_path, FAKE_FAIL=fault) as (process, client):
        until(client.is_up)
        with pytest.raises(EngineFailed) as failed:
            client.canary()
        assert failed.value.code == code
        assert process.wait(LIMIT_S if code == "engine-died" else 0.01) == (-6 if code == "engine-died" else None)
        process.stop(((signal.SIGKILL, LIMIT_S),))


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        ("", False),
        ("!!!!!!!!", True),
        ("!!!", False),
        ("the the the the", True),
        ("the the the", False),
        ("1 1 1 2", False),
        (" Alex, and I", False),
        ("\n\n\n\n", True),
    ],
)
def test_one_token_repeated(text: str, repeated: bool) -> None:
    assert Canary(text=text, seconds=1.0, generation_tok_s=None).one_token_repeated is repeated


@pytest.mark.parametrize("keys", ["k1", "k1,k2", "schlüssel"])
def test_the_api_key_is_sent(keys: str, tmp_path: Path) -> None:
    with scripted_engine({"/health": http_answer("")}) as (url, requests), connect(url, api_key=keys) as client:
        assert client.is_up()
    assert requests[0]["authorization"].encode("latin-1").decode() == f"Bearer {keys.split(',')[0]}"


def test_an_engine_with_keys_answers_its_own_client_only(tmp_path: Path) -> None:
    port = free_port()
    with fake_engine(tmp_path, "--metrics", port=port, api_key="k1,k2") as (_, client):
        until(client.is_up)
        assert client.canary().text == FIRST_WORDS
        with connect(f"http://127.0.0.1:{port}", api_key="wrong") as stranger:
            assert stranger.is_up()
            assert stranger.sample() is None
            with pytest.raises(EngineFailed, match="Invalid API Key") as failed:
                stranger.canary()
    assert failed.value.code == "wrong-answer"


DEEP = "[" * 100_000
NOT_A_COMPLETION = {
    "text": http_answer("hello"),
    "nothing": http_answer(""),
    "a list": http_answer("[1]"),
    "no choices": http_answer("{}"),
    "choices of another shape": http_answer('{"choices": [5]}'),
    "text that is no text": http_answer('{"choices": [{"text": 5}]}'),
    "nested without end": http_answer(DEEP),
    "bytes": http_answer(b"\xff\xfe\x00"),
    "an error without a body": http_answer("", 500),
    "an error that is text": http_answer("x" * 10_000, 502),
    "an error nested without end": http_answer(DEEP, 500),
    "an error of another shape": http_answer('{"error": ["a", "b"]}', 400),
}


@pytest.mark.parametrize("what", NOT_A_COMPLETION)
def test_what_is_no_completion_is_a_wrong_answer(what: str) -> None:
    with (
        scripted_engine({"/v1/completions": NOT_A_COMPLETION[what]}) as (url, _),
        connect(url) as client,
        pytest.raises(EngineFailed) as failed,
    ):
        client.canary()
    assert failed.value.code == "wrong-answer"
    assert len(failed.value.message) < 300


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"SSH-2.0-OpenSSH_9.6\r\n", id="another protocol"),
        pytest.param(http_answer('{"content": "x"}')[:-3], id="half an answer"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc", id="broken encoding"
        ),
    ],
)
def test_a_connection_that_breaks_is_a_dead_engine(answer: bytes) -> None:
    with scripted_engine({"/v1/completions": answer, "/health": answer}) as (url, _), connect(url) as client:
        assert not client.is_up() or answer.startswith(b"HTTP/1.1 200 OK\r\nContent-L")
        with pytest.raises(EngineFailed) as failed:
            client.canary()
    assert failed.value.code == "engine-died"


def test_an_empty_answer_is_an_answer() -> None:
    answer = http_answer('{"choices": [{"text": ""}], "timings": "none"}')
    with scripted_engine({"/v1/completions": answer}) as (url, _), connect(url) as client:
        canary = client.canary()
    assert (canary.text, canary.generation_tok_s) == ("", None)


def test_an_answer_is_streamed_piece_by_piece(tmp_path: Path) -> None:
    with fake_engine(tmp_path) as (_, client):
        until(client.is_up)
        *pieces, last = client.ask("Who are you?")
    assert "".join(map(str, pieces)) == " ".join(WORDS)
    assert len(pieces) == len(WORDS)
    assert isinstance(last, Answer)
    assert (last.generated_tokens, last.finish_reason) == (len(WORDS), "stop")
    assert (last.prompt_tokens or 0) > 0
    assert (last.prompt_tok_s or 0) > 0
    assert (last.generation_tok_s or 0) > 0


def stream(*chunks: object) -> bytes:
    """A stream of events; text is a line as it is."""
    lines = [chunk if isinstance(chunk, str) else f"data: {json.dumps(chunk)}" for chunk in chunks]
    return http_answer("\n\n".join(lines))


def delta(**content: object) -> dict[str, object]:
    return {"choices": [{"delta": content, "finish_reason": None}]}


END: dict[str, object] = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
THOUGHTS = (delta(role="assistant", content=None), delta(reasoning_content="hm, "), delta(content="yes"))
JUNK_LINES = (": ping", "data: {", "data: 5", f"data: {DEEP}", "event: x", "hello")
ODD_CHOICES: tuple[object, ...] = (None, 5, [], [5], [{"delta": 5}], [{}])
JUNK_CHUNKS = tuple({"choices": choices} for choices in ODD_CHOICES)
STREAMS: dict[str, tuple[tuple[object, ...], str, str | None]] = {
    "thoughts and answer": ((*THOUGHTS, END, "data: [DONE]"), "hm, yes", "stop"),
    "nothing after the end is read": ((delta(content="yes"), END, "data: [DONE]", delta(content="no")), "yes", "stop"),
    "no end": ((delta(content="yes"),), "yes", None),
    "pings and junk between": ((*JUNK_LINES, delta(content="yes"), *JUNK_CHUNKS, {"error": None}, END), "yes", "stop"),
    "content that is no text": ((delta(content=5), END), "5", "stop"),
}


@pytest.mark.parametrize("what", STREAMS)
def test_streams_of_all_kinds_are_read(what: str) -> None:
    chunks, text, finish_reason = STREAMS[what]
    with scripted_engine({"/v1/chat/completions": stream(*chunks)}) as (url, _), connect(url) as client:
        *pieces, last = client.ask("?")
    assert "".join(map(str, pieces)) == text
    assert last == Answer(
        prompt_tokens=None,
        generated_tokens=None,
        prompt_tok_s=None,
        generation_tok_s=None,
        finish_reason=finish_reason,
        timed_by_engine=False,
    )


def test_an_engine_that_counts_but_does_not_time_is_timed_here() -> None:
    counted = {"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 3}}
    answer = stream(delta(content="a"), delta(content="b"), END, counted, "data: [DONE]")
    with scripted_engine({"/v1/chat/completions": answer}) as (url, _), connect(url) as client:
        *_, last = client.ask("?")
    assert isinstance(last, Answer)
    assert (last.prompt_tokens, last.generated_tokens) == (12, 3)
    assert (last.prompt_tok_s or 0) > 0
    assert (last.generation_tok_s or 0) > 0


ERRORS = {
    "an error in the middle": ({"error": {"code": 500, "message": "lost a card"}}, "lost a card"),
    "an error of the older form": ('error: {"code": 500, "message": "lost a card"}', "lost a card"),
    "an error that is text": ({"error": "lost a card"}, "lost a card"),
    "an error without an end": ({"error": {"message": "x" * 10_000}}, "xxx"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_a_stream_that_breaks_off_says_why_after_its_text(what: str) -> None:
    error, why = ERRORS[what]
    answer = stream(delta(content="yes"), error)
    with scripted_engine({"/v1/chat/completions": answer}) as (url, _), connect(url) as client:
        pieces = client.ask("?")
        assert next(pieces) == "yes"
        with pytest.raises(EngineFailed, match=why) as failed:
            next(pieces)
    assert failed.value.code == "wrong-answer"
    assert len(failed.value.message) < 300


def test_a_stream_that_is_cut_is_a_dead_engine() -> None:
    cut = stream(delta(content="yes"), END)[:-10]
    with (
        scripted_engine({"/v1/chat/completions": cut}) as (url, _),
        connect(url) as client,
        pytest.raises(EngineFailed) as failed,
    ):
        list(client.ask("?"))
    assert failed.value.code == "engine-died"


def test_a_question_that_is_refused_says_why(tmp_path: Path) -> None:
    with fake_engine(tmp_path, "-c", "256", "-np", "1") as (_, client):
        until(client.is_up)
        with pytest.raises(EngineFailed, match=r"HTTP 400.*exceeds the available context size") as failed:
            list(client.ask("word " * 300))
    assert failed.value.code == "wrong-answer"


def test_a_sample_counts_what_was_done(tmp_path: Path) -> None:
    with fake_engine(tmp_path, "--metrics", "-np", "2") as (_, client):
        until(client.is_up)
        before = client.sample()
        assert before is not None
        assert (before.running, before.waiting, before.generation_tokens_total, before.kv_used) == (0, 0, 0, 0)
        client.canary()
        until(lambda: (after := client.sample()) is not None and after.generation_tokens_total == 8)


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        pytest.param(("--metrics", "--no-slots"), True, id="without slots the rest is known"),
        pytest.param((), False, id="without metrics nothing is"),
    ],
)
def test_endpoints_may_be_missing(arguments: tuple[str, ...], known: bool, tmp_path: Path) -> None:
    with fake_engine(tmp_path, *arguments) as (_, client):
        until(client.is_up)
        sample = client.sample()
    assert (sample is not None) == known
    assert sample is None or (sample.running, sample.kv_used) == (0, None)
