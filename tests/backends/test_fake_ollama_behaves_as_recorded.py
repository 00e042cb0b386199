"""The fake Ollama against what a real one was recorded doing: placement, answers, log lines, signals, lies."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from mgpu.backends.ollama_log import memory, planned_runner, runner_port
from tests.fakes.devices import free_port
from tests.fakes.ollama_running import LIMIT_S, MODEL, TWO_CARDS, RunningOllama, running_ollama
from tests.fakes.ollama_server import install

from . import recorded_ollama as recorded
from .planned_ollama import planned

HELLO = [{"role": "user", "content": "Say hello"}]
SPREAD = {"OLLAMA_SCHED_SPREAD": "1"}
MANY = {"OLLAMA_NUM_PARALLEL": "10", "OLLAMA_CONTEXT_LENGTH": "8192"}


def post(server: RunningOllama, path: str, **body: object) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=LIMIT_S, trust_env=False)


def get(server: RunningOllama, path: str) -> httpx.Response:
    return httpx.get(server.url + path, timeout=LIMIT_S, trust_env=False)


def loaded(server: RunningOllama, **options: int) -> httpx.Response:
    post(server, "/api/pull", model=MODEL, stream=False).raise_for_status()
    return post(server, "/api/generate", model=MODEL, options=options)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def shape(value: object) -> object:
    """The keys and types of JSON, with lists by their first element."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


@pytest.mark.parametrize(
    ("run", "environment", "options"),
    [
        pytest.param("vk2", {}, {}, id="one card by itself"),
        pytest.param("spread", SPREAD, {}, id="spread"),
        pytest.param("tsplit", {**SPREAD, "LLAMA_ARG_TENSOR_SPLIT": "3,1"}, {}, id="dealt 3,1"),
        pytest.param(
            "kvq8b", {**SPREAD, "OLLAMA_KV_CACHE_TYPE": "q8_0", "OLLAMA_FLASH_ATTENTION": "1"}, {}, id="quantised cache"
        ),
        pytest.param("fittarget", {**SPREAD, "LLAMA_ARG_FIT_TARGET": "1950"}, {}, id="a large margin"),
        pytest.param("autospread", MANY, {}, id="too large for one card"),
        pytest.param("fit1", {**MANY, "LLAMA_ARG_FIT_TARGET": "256,512"}, {}, id="small margins, card by card"),
        pytest.param("numgpu10", SPREAD, {"num_gpu": 10}, id="ten layers asked for"),
        pytest.param("tensor", {**SPREAD, "LLAMA_ARG_SPLIT_MODE": "tensor"}, {}, id="tensor mode"),
        pytest.param("badvk", {"GGML_VK_VISIBLE_DEVICES": "0,7", "FAKE_FAIL": "amx-lie"}, {}, id="a wrong index"),
    ],
)
def test_models_are_placed_as_in_the_recorded_run(
    tmp_path: Path, run: str, environment: dict[str, str], options: dict[str, int]
) -> None:
    with running_ollama(tmp_path, {"FAKE_DEVICES": TWO_CARDS, **environment}) as server:
        assert loaded(server, **options).json()["done_reason"] == "load"
        ours, theirs = server.lines(), recorded.lines(run)
        runner, real = planned_runner(ours), planned_runner(theirs)
        assert runner is not None
        assert real is not None
        assert (runner.layers, runner.of_layers) == (real.layers, real.of_layers)
        assert [device.id for device, _ in runner.cards] == [device.id for device, _ in real.cards]
        held, real_held = memory(ours, planned()), memory(theirs, planned())
        for index, there in real_held.items():
            assert held[index].weights_bytes == pytest.approx(there.weights_bytes, rel=0.002)
            assert held[index].kv_bytes == pytest.approx(there.kv_bytes, rel=0.002)
        assert runner.host.kv_bytes == real.host.kv_bytes


@pytest.mark.parametrize(
    ("recording", "environment"),
    [
        pytest.param("spread_ps.json", {**SPREAD, "FAKE_DEVICES": TWO_CARDS}, id="spread"),
        pytest.param(
            "tsplit_ps.json", {**SPREAD, "FAKE_DEVICES": TWO_CARDS, "LLAMA_ARG_TENSOR_SPLIT": "3,1"}, id="3,1"
        ),
        pytest.param("ps_cpu.json", {"FAKE_FAIL": "amx-lie"}, id="the CPU that counts as a card"),
    ],
)
def test_sizes_are_told_as_recorded(tmp_path: Path, recording: str, environment: dict[str, str]) -> None:
    theirs: dict[str, Any] = json.loads(recorded.text(recording))["models"][0]
    with running_ollama(tmp_path, environment) as server:
        loaded(server)
        ours: dict[str, Any] = get(server, "/api/ps").json()["models"][0]
    names = ("size", "size_vram", "context_length")
    assert [ours[name] for name in names] == [theirs[name] for name in names]


def test_answers_have_the_recorded_shapes(tmp_path: Path) -> None:
    with running_ollama(tmp_path) as server:
        assert get(server, "/api/ps").json() == json.loads(recorded.text("ps_empty.json"))
        pulled = [json.loads(line) for line in post(server, "/api/pull", model=MODEL).text.splitlines()]
        lines = recorded.text("pull_progress.txt").splitlines()[:-3]
        theirs = [shape(json.loads(line.replace("'", '"'))) for line in lines if line.startswith("{")]
        assert all(shape(record) in theirs or "total" in record for record in pulled)
        assert [record["status"] for record in pulled[-3:]] == [
            "verifying sha256 digest",
            "writing manifest",
            "success",
        ]
        chat = post(server, "/api/chat", model=MODEL, messages=HELLO, stream=False).json()
        assert shape(chat) == shape(json.loads(recorded.text("chat.json")))
        ours = [
            shape(json.loads(line)) for line in post(server, "/api/generate", model=MODEL, prompt="x").text.splitlines()
        ]
        first, *_, last = (json.loads(line) for line in recorded.text("generate_stream.ndjson").splitlines())
        del last["context"]  # deprecated, and not sent by the fake
        assert (ours[0], ours[-1]) == (shape(first), shape(last))
        for path, name in (("/api/tags", "tags.json"), ("/v1/models", "v1_models.json"), ("/api/ps", "spread_ps.json")):
            assert shape(get(server, path).json()) == shape(json.loads(recorded.text(name))), path
        openai = post(server, "/v1/chat/completions", model=MODEL, messages=HELLO).json()
        assert shape(openai) == shape(json.loads(recorded.text("v1_chat.json")))


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        pytest.param("/", 200, "Ollama is running", id="the root"),
        pytest.param("/api/version", 200, '{"version": "0.32.15"}', id="the version"),
        pytest.param("/health", 404, "404 page not found", id="no health"),
        pytest.param("/metrics", 404, "404 page not found", id="no metrics"),
    ],
)
def test_plain_answers_are_the_recorded_ones(tmp_path: Path, path: str, status: int, body: str) -> None:
    with running_ollama(tmp_path) as server:
        answer = get(server, path)
    assert (answer.status_code, answer.text) == (status, body)


def test_a_missing_model_is_told_as_recorded(tmp_path: Path) -> None:
    texts = recorded.text("missing_model.txt")
    with running_ollama(tmp_path) as server:
        for path in ("/api/generate", "/api/chat", "/v1/chat/completions"):
            answer = post(server, path, model="nope", messages=HELLO, prompt="x")
            assert answer.status_code == 404
            assert json.dumps(answer.json(), separators=(",", ":")) in texts


def test_every_line_it_logs_is_one_of_the_recorded_kinds(tmp_path: Path) -> None:
    def kinds(lines: list[str]) -> set[str]:
        found = set()
        for line in lines:
            if match := re.search(r'source=(\w+\.go):\d+ msg=("(?:[^"\\]|\\.)*"|\S+)', line):
                found.add(match[1] + " " + re.sub(r"[\d.:]+", "N", match[2]))
            elif match := re.match(
                r"(\S+: +\S+ +(?:model|KV|compute|output) buffer size)|(llama_\w+: using device)", line
            ):
                found.add(re.sub(r" +", " ", re.sub(r"\d+", "N", match[0])))
        return found

    known = kinds([line for path in sorted(recorded.FOLDER.glob("*.log")) for line in recorded.lines(path.stem)])
    environment = {"FAKE_DEVICES": TWO_CARDS, "FAKE_FAIL": "runner-dies", "GGML_VK_VISIBLE_DEVICES": "0,1"}
    with running_ollama(tmp_path, environment) as server:
        loaded(server)
        post(server, "/api/chat", model=MODEL, messages=HELLO)
        loaded(server)
        assert kinds(server.lines()) <= known


def test_it_accepts_connections_before_it_answers(tmp_path: Path) -> None:
    port = free_port()
    environment = {**os.environ, "OLLAMA_HOST": f"127.0.0.1:{port}", "HOME": str(tmp_path), "FAKE_DISCOVERY_S": "600"}
    process = subprocess.Popen([install(tmp_path), "serve"], stderr=subprocess.DEVNULL, env=environment)
    try:

        def accepts() -> bool:
            with closing(socket.socket()) as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_until(accepts)
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(f"http://127.0.0.1:{port}/api/version", timeout=0.2, trust_env=False)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("environment", "status", "says"),
    [
        pytest.param({}, 1, "Error: listen tcp {host}: bind: address already in use", id="a port in use"),
        pytest.param({"HOME": ""}, 2, "panic: $HOME is not defined", id="no home"),
    ],
)
def test_it_fails_to_start_in_ollamas_words(
    tmp_path: Path, environment: dict[str, str], status: int, says: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        host = f"127.0.0.1:{other.getsockname()[1]}"
        ended = subprocess.run(
            [install(tmp_path), "serve"],
            env={**os.environ, "HOME": str(tmp_path), "OLLAMA_HOST": host, **environment},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    assert ended.returncode == status
    assert ended.stderr.startswith(says.format(host=host))


def _answers(port: int | None) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port or 0)) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_end_takes_the_runner_along(tmp_path: Path, number: signal.Signals) -> None:
    with running_ollama(tmp_path) as server:
        loaded(server)
        port = runner_port(server.lines())
        assert _answers(port)
        os.kill(server.process.pid, number)
        assert server.process.wait(LIMIT_S) == 0
        assert not _answers(port)


def test_a_kill_leaves_the_runner_behind_in_the_same_group(tmp_path: Path) -> None:
    with running_ollama(tmp_path) as server:
        loaded(server)
        port = runner_port(server.lines())
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(LIMIT_S)
        assert _answers(port)
        os.killpg(server.process.pid, signal.SIGKILL)
        wait_until(lambda: not _answers(port))


def test_cards_that_vanish_and_models_that_are_misplaced_come_on_demand(tmp_path: Path) -> None:
    base = {"FAKE_DEVICES": TWO_CARDS, **SPREAD}
    with running_ollama(tmp_path / "cpu", {**base, "FAKE_FAIL": "silent-cpu"}) as server:
        assert loaded(server).status_code == 200
        runner = planned_runner(server.lines())
        assert runner is not None
        assert runner.cards == ()
    with running_ollama(tmp_path / "one", {**base, "FAKE_FAIL": "one-card"}) as server:
        loaded(server)
        assert list(memory(server.lines(), planned())) == [0]


def test_the_version_is_told_without_a_server(tmp_path: Path) -> None:
    told = subprocess.run([install(tmp_path), "--version"], capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert told.stdout.endswith("client version is 0.32.15\n")
