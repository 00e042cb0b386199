"""The fake vLLM against what a real one was recorded answering, and how it ended."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from mgpu.backends.vllm import BACKEND
from tests.fakes.vllm_server_running import Installed, RunningVllm, Start, install_both, starting, until

from . import recorded_vllm as recorded

HELLO: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "max_tokens": 4}
ENDLESS: dict[str, Any] = {**HELLO, "max_tokens": 2000, "ignore_eos": True}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Say hello"}], "max_tokens": 3}
# As 0.32.0 with two workers gave them; what differs every time is a *.
USAGE = '"usage":{"prompt_tokens":5,"total_tokens":9,"completion_tokens":4'
END = '"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}'
COMPLETION = (
    '{"id":"cmpl-*","object":"text_completion","created":*,"model":"tiny","choices":[{"index":0,"text":"*",'
    '"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null,"prompt_logprobs":null,'
    '"prompt_token_ids":null,"routed_experts":null}],"service_tier":null,"system_fingerprint":"vllm-0.32.0-tp2-*",'
    + USAGE
    + ',"prompt_tokens_details":null,"completion_tokens_details":null},'
    + END
)
CHAT_COMPLETION = (
    '{"id":"chatcmpl-*","object":"chat.completion","created":*,"model":"tiny","choices":[{"index":0,"message":{"role":'
    '"assistant","content":"*","refusal":null,"annotations":null,"audio":null,"function_call":null,"reasoning":null},'
    '"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null,"routed_experts":null}],'
    '"service_tier":null,"system_fingerprint":"vllm-0.32.0-tp2-*","usage":{"prompt_tokens":28,"total_tokens":31,'
    '"completion_tokens":3,"prompt_tokens_details":null,"completion_tokens_details":null},"prompt_logprobs":null,'
    '"prompt_token_ids":null,"prompt_text":null,' + END
)
CHUNK = '{"id":"chatcmpl-*","object":"chat.completion.chunk","created":*,"model":"tiny","choices":['
CHAT_CHUNKS = [
    CHUNK + '{"index":0,"delta":{"role":"assistant","content":"*"},"logprobs":null,"finish_reason":null}],'
    '"prompt_token_ids":null,"prompt_text":null}',
    CHUNK + '{"index":0,"delta":{"content":"*"},"logprobs":null,"finish_reason":null,"token_ids":null}]}',
    CHUNK + '{"index":0,"delta":{"content":"*"},"logprobs":null,"finish_reason":null,"token_ids":null}]}',
    CHUNK + '{"index":0,"delta":{"content":"*"},"logprobs":null,"finish_reason":"length","stop_reason":null,'
    '"token_ids":null}]}',
    CHUNK + '],"usage":{"prompt_tokens":28,"total_tokens":31,"completion_tokens":3},'
    '"system_fingerprint":"vllm-0.32.0-tp2-*"}',
    "[DONE]",
]
TEXT_CHUNK = (
    '{"id":"cmpl-*","object":"text_completion","created":*,"model":"tiny","choices":[{"index":0,"text":"*","logprobs":'
    'null,"finish_reason":%s,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]%s}'
)
TEXT_CHUNKS = [
    *[TEXT_CHUNK % ("null", "")] * 3,
    TEXT_CHUNK % ('"length"', ',"system_fingerprint":"vllm-0.32.0-tp2-*"'),
    "[DONE]",
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install_both(tmp_path_factory.mktemp("vllm"))


@pytest.fixture
def start(installed: Installed) -> Iterator[Start]:
    with starting(installed) as begin:
        yield begin


def blurred(text: str) -> str:
    text = re.sub(r'("id":"\w+-|"vllm-0\.32\.0-tp2-)[0-9a-f]+"', r'\1*"', text)
    return re.sub(r'("created":)\d+', r"\1*", re.sub(r'("(?:text|content)":)"[^"]*"', r'\1"*"', text))


def events(text: str) -> list[str]:
    return [blurred(line.removeprefix("data: ")) for line in text.splitlines() if line]


def post(running: RunningVllm, body: object, path: str = "/v1/completions", **headers: str) -> httpx.Response:
    return running.request("POST", path, body, **headers)


def test_answers_are_the_recorded_ones_to_the_byte(start: Start) -> None:
    running, chat = start("-tp", "2"), "/v1/chat/completions"
    assert blurred(post(running, HELLO).text) == COMPLETION
    assert blurred(post(running, CHAT, chat).text) == CHAT_COMPLETION
    streamed = post(running, {**CHAT, "stream": True, "stream_options": {"include_usage": True}}, chat)
    assert events(streamed.text) == CHAT_CHUNKS
    assert events(post(running, {**HELLO, "stream": True}).text) == TEXT_CHUNKS
    assert running.get("/version") == '{"version":"0.32.0"}'
    (model,) = running.request("GET", "/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"], model["permission"][0]["organization"]) == ("tiny", 2048, "*")
    both = post(running, {**HELLO, "n": 2}).json()
    assert ([each["index"] for each in both["choices"]], both["usage"]["completion_tokens"]) == ([0, 1], 8)


def test_an_answer_ends_by_itself_unless_that_is_ignored(start: Start) -> None:
    running = start()
    ended = post(running, {**HELLO, "max_tokens": 100}).json()["choices"][0]
    assert ended["finish_reason"] == "stop"
    assert len(set(ended["text"].split())) > 8
    assert post(running, {**ENDLESS, "max_tokens": 30}).json()["usage"]["completion_tokens"] == 30
    assert "-tp" not in post(running, HELLO).json()["system_fingerprint"], "nothing is said of one card"


@pytest.mark.parametrize(
    ("body", "status", "message", "param"),
    [
        pytest.param(
            {**HELLO, "model": "other"},
            404,
            "The model `other` does not exist. Valid aliases: tiny.",
            "model",
            id="name",
        ),
        pytest.param(
            {**HELLO, "prompt": "x" * 3000},
            400,
            "This model's maximum context length is 2048 tokens. However, your prompt contains at least 2049 input",
            "input_tokens",
            id="too long a prompt",
        ),
        pytest.param(
            {**HELLO, "max_tokens": 8000}, 400, "max_tokens=8000 cannot be greater than", "max_tokens", id="too many"
        ),
        pytest.param({**HELLO, "max_tokens": 0}, 400, "max_tokens must be at least 1, got 0.", "max_tokens", id="none"),
        pytest.param({"model": "tiny"}, 400, "Either prompt or prompt_embeds must be", "prompt", id="no prompt"),
        pytest.param(
            [1], 400, "1 validation error:\n  {'type': 'model_attributes_type', 'loc': 'body'", "body", id="list"
        ),
    ],
)
def test_bad_requests_are_refused_as_recorded(
    start: Start, body: object, status: int, message: str, param: str
) -> None:
    reply = post(start(), body)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (status, status, param)
    assert error["message"].startswith(message)


def test_a_key_guards_v1_and_nothing_else(start: Start) -> None:
    running = start(VLLM_API_KEY="right")
    for path in ("/health", "/metrics", "/version", "/ping"):
        assert running.request("GET", path).status_code == 200
    for key in ({}, {"Authorization": "Bearer wrong"}):
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/v1/nope")):
            reply = running.request(method, path, HELLO, **key)
            assert (reply.status_code, reply.text) == (401, '{"error":"Unauthorized"}')
    assert post(running, HELLO, Authorization="Bearer right").status_code == 200
    assert running.request("GET", "/nope").json() == {"detail": "Not Found"}
    assert running.request("POST", "/health").status_code == 405


def series(text: str) -> list[str]:
    """What is counted, in its order; of what only describes the engine just the name."""
    return re.findall(r"(?m)^([a-z]\S*_info|[a-z]\S*)[{ ].*$", text)


def test_metrics_have_the_recorded_names_and_move_with_every_token(start: Start) -> None:
    running = start("--max-num-seqs", "1", FAKE_TOKENS_PER_SECOND="50")
    assert series(running.get("/metrics") or "") == series(recorded.text("metrics_idle.txt"))
    with running.open({**ENDLESS, "stream": True}), socket.create_connection(("127.0.0.1", running.port)) as second:
        first = running.counter("generation_tokens_total")
        text = json.dumps(HELLO)
        second.sendall(f"POST /v1/completions HTTP/1.1\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
        until(lambda: running.counter("waiting") == 1)
        until(lambda: running.counter("generation_tokens_total") > first + 2)
        assert running.counter("running") == 1
        assert 0 < running.counter("kv_used") < 0.01
        assert running.counter("prompt_tokens_total") == len("Hello")
    until(lambda: running.counter("running") == running.counter("waiting") == 0)  # who left is forgotten
    replicas = start("-dp", "2")
    for _ in range(2):
        post(replicas, HELLO)
    assert replicas.counter("generation_tokens_total") == 8
    assert 'vllm:num_requests_running{engine="1",model_name="tiny"} 0.0' in (replicas.get("/metrics") or "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("group", [False, True], ids=["to the server", "to all"])
def test_a_signal_while_idle_ends_it(start: Start, number: signal.Signals, group: bool) -> None:
    running = start("-tp", "2", "--shutdown-timeout", "3")
    (os.killpg if group else os.kill)(running.process.pid, number)
    assert running.ended() == 0
    assert running.logged("[shutdown] API server: shutdown triggered")
    assert BACKEND.diagnose(running.lines(), 0).code == "stopped"
    until(lambda: not running.members())


def test_a_single_signal_while_it_loads_is_lost(start: Start) -> None:
    running = start("-tp", "2", wait=False, FAKE_FAIL="slow-load:1")
    until(lambda: running.logged("Starting to load model"))
    running.process.terminate()
    until(running.ready)
    running.process.terminate()
    assert running.ended() == 0


@pytest.mark.parametrize(("number", "times"), [(signal.SIGTERM, 5), (signal.SIGINT, 1)])
def test_signals_while_it_loads_end_it_at_last(start: Start, number: signal.Signals, times: int) -> None:
    running = start("-tp", "2", wait=False, FAKE_FAIL="hang-loading")
    until(lambda: running.logged("Starting to load model"))
    for _ in range(times):
        assert running.process.poll() is None
        running.process.send_signal(number)
        until_taken(running)
    assert running.ended() == -number
    assert BACKEND.diagnose(running.lines(), -number).code == "stopped"
    until(lambda: not running.members())


def until_taken(running: RunningVllm) -> None:
    """Wait until it has taken a signal, for of two that wait it would see one."""
    status = Path(f"/proc/{running.process.pid}/status")
    until(lambda: running.process.poll() is not None or "ShdPnd:\t0000000000000000" in status.read_text())


def test_a_signal_to_all_while_it_loads_leaves_the_server_waiting(start: Start) -> None:
    running = start("-tp", "2", wait=False, FAKE_FAIL="hang-loading")
    until(lambda: running.logged("Starting to load model"))
    os.killpg(running.process.pid, signal.SIGTERM)
    until(lambda: len(running.members()) == 2)
    assert running.process.poll() is None
    assert any("resource_tracker" in name for name in running.members())


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "in one piece"])
def test_what_is_in_flight_is_drained(start: Start, stream: bool) -> None:
    running = start("-tp", "2", "--shutdown-timeout", "20")
    with running.open({**ENDLESS, "max_tokens": 60, "stream": stream}) as client:
        running.process.terminate()
        until(lambda: running.logged("EngineCore: start mode=drain"))
        assert running.ready(), "it answers while it drains"
        received = b"".join(iter(lambda: client.recv(1 << 16), b""))
    assert b'"finish_reason":"length"' in received
    assert running.ended() == 0


@pytest.mark.parametrize(
    ("timeout", "group", "drains"),
    [
        pytest.param("0", False, None, id="at once"),
        pytest.param("1", False, True, id="in the end"),
        pytest.param("1", True, False, id="as late, but in vain, for workers that were told to end answer no more"),
    ],
)
def test_a_server_without_engine_waits_for_the_client(
    start: Start, timeout: str, group: bool, drains: bool | None
) -> None:
    running = start("-tp", "2", "--shutdown-timeout", timeout)
    with running.open(ENDLESS):
        (os.killpg if group else os.kill)(running.process.pid, signal.SIGTERM)
        until(lambda: running.logged("Waiting for connections to close"))
        until(lambda: not [name for name in running.members() if name.startswith("VLLM")])
        assert drains in (None, running.logged("EngineCore: start mode=drain"))
        with pytest.raises(httpx.ConnectError):
            running.request("GET", "/health")
        running.process.terminate()
        assert running.process.poll() is None
    assert running.ended() == 0


def test_a_kill_leaves_all_the_others_behind(start: Start) -> None:
    running = start("-tp", "2")
    os.kill(running.process.pid, signal.SIGKILL)
    assert running.ended() == -signal.SIGKILL
    assert len(running.members()) == 4
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", running.port))
        free.listen()
    os.killpg(running.process.pid, signal.SIGKILL)
    until(lambda: not running.members())


@pytest.mark.parametrize(
    ("victim", "log"),
    [
        pytest.param("Worker_TP1", "sig_kill_worker1_idle", id="a worker that was killed"),
        pytest.param("EngineCore", "sig_kill_enginecore_idle", id="an engine core that was killed"),
    ],
)
def test_a_death_while_idle_is_told_with_503_and_status_0(start: Start, victim: str, log: str) -> None:
    running = start("-tp", "2")
    os.kill(running.worker(victim), signal.SIGKILL)
    until(lambda: running.request("GET", "/health").status_code == 503)
    assert running.ended() == 0
    ours, theirs = (BACKEND.diagnose(lines, 0) for lines in (running.lines(), recorded.lines(log)))
    assert (ours.code, ours.message, ours.hint) == (theirs.code, theirs.message, theirs.hint)
    until(lambda: not running.members())


def test_a_death_in_a_request_is_told_with_500_and_status_0(start: Start) -> None:
    running = start("-tp", "2", FAKE_FAIL="worker-dies-in-request")
    reply = post(running, HELLO)
    assert (reply.status_code, reply.json()["error"]["type"]) == (500, "InternalServerError")
    assert running.ended() == 0
    theirs = BACKEND.diagnose(recorded.lines("sig_kill_worker1_inflight"), 0)
    assert BACKEND.diagnose(running.lines(), 0).message == theirs.message
    streaming = start(FAKE_FAIL="worker-dies-in-request")
    with suppress(httpx.HTTPError):
        assert "InternalServerError" in post(streaming, {**HELLO, "stream": True}).text
    assert streaming.ended() == 0


def test_a_worker_that_hangs_leaves_health_green(start: Start) -> None:
    running = start("-tp", "2", FAKE_FAIL="hang-request")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"http://127.0.0.1:{running.port}/v1/completions", json=HELLO, timeout=0.5, trust_env=False)
    assert running.ready()
    assert running.counter("running") == 0
    running.process.terminate()
    assert running.ended() == 0
    until(lambda: not running.members())


@pytest.mark.parametrize(("fault", "distinct"), [("garbage", 1), ("nonsense", 5), ("", 8)])
def test_nonsense_can_be_had(start: Start, fault: str, distinct: int) -> None:
    text = post(start(FAKE_FAIL=fault), {**HELLO, "max_tokens": 8}).json()["choices"][0]["text"]
    assert len(set(text.split() if distinct > 5 else text)) == distinct
