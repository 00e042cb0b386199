"""The fake llama-server against what a real one was recorded doing."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mgpu.backends.llama_cpp_failure import diagnose
from mgpu.backends.llama_cpp_log import PHASES, DeviceBuffers, Phase, buffers_by_device, parse_line
from mgpu.backends.llama_cpp_metrics import sample_from_text
from mgpu.backends.samples import parse_metrics
from tests.fakes.llama_server import LOSE_DEVICE, install
from tests.fakes.llama_server_options import options

from . import recorded

MIB = 1 << 20
LIMIT_S = 120
GONE = (OSError, http.client.HTTPException)
TWO_CARDS = (
    "CUDA0: NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free);"
    "CUDA1: NVIDIA GeForce RTX 4090 (24081 MiB, 2000 MiB free)"
)
HELLO = {"messages": [{"role": "user", "content": "Say hello"}], "max_tokens": 4}
ENDLESS = {"messages": [{"role": "user", "content": "Go on"}], "max_tokens": 100_000, "ignore_eos": True}


@dataclass
class Running:
    process: subprocess.Popen[bytes]
    log: Path
    port: int

    def lines(self) -> list[str]:
        return self.log.read_text(encoding="utf-8").splitlines()

    def ended(self) -> int:
        return self.process.wait(LIMIT_S)

    def request(self, method: str, path: str, body: object = None, key: str | None = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)
        text = body if isinstance(body, str) else json.dumps(body) if body is not None else None
        try:
            connection.request(method, path, text, {"Authorization": f"Bearer {key}"} if key else {})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def json(self, path: str) -> Any:
        return json.loads(self.request("GET", path)[1])

    def open(self, body: object) -> socket.socket:
        """A completion request whose answer is not awaited."""
        text = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT_S)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n\r\n"
        connection.sendall(head.encode() + text)
        until(lambda: any(slot["is_processing"] for slot in self.json("/slots")))
        return connection

    def ready(self) -> bool:
        with suppress(*GONE):
            return self.request("GET", "/health")[0] == 200
        return False


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.01)


def decoded(slot: dict[str, Any]) -> int:
    return slot["next_token"][0]["n_decoded"] if slot["is_processing"] else 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


Start = Callable[..., Running]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF")
        file.truncate(1000 * MIB)
    return path


@pytest.fixture
def start(tmp_path: Path, model: Path) -> Iterator[Start]:
    program = install(tmp_path)
    with starting(program, model, tmp_path) as start_one:
        yield start_one


@contextmanager
def starting(program: Path, model: Path, folder: Path) -> Iterator[Start]:
    started: list[Running] = []

    def start_one(*arguments: str, wait: bool = True, **environment: str) -> Running:
        port, log = free_port(), folder / f"{len(started)}.log"
        common = ("-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-lv", "4")
        with log.open("wb") as file:
            process = subprocess.Popen(
                [program, *common, *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        started.append(Running(process=process, log=log, port=port))
        if wait:
            until(lambda: started[-1].ready() or process.poll() is not None)
        return started[-1]

    try:
        yield start_one
    finally:
        for running in started:
            with suppress(ProcessLookupError):
                os.killpg(running.process.pid, signal.SIGKILL)
            running.process.wait()


def shape(value: object) -> object:
    """What kinds of values lie where, so that two answers can be compared."""
    match value:
        case dict():
            return {key: shape(entry) for key, entry in value.items()}
        case list():
            return [shape(value[0])] if value else []
        case int() | float() if not isinstance(value, bool):
            return "number"
        case _:
            return type(value).__name__


def stream_shapes(text: str) -> list[object]:
    """The shapes of a stream's events; a run of equal ones counts once."""
    events = re.findall(r"^data: (.*)$", text, re.MULTILINE)
    shapes = [event if event == "[DONE]" else shape(json.loads(event)) for event in events]
    return [one for one, _ in itertools.groupby(shapes)]


@pytest.mark.parametrize(
    ("fault", "log", "status"),
    [
        ("oom-weights", "oom_model", 1),
        ("oom-kv", "oom_kv", 1),
        ("oom-compute", "oom_compute", 1),
        ("port", "fail_port_in_use", 1),
        ("bad-arch", "fail_unknown_arch", 1),
        ("corrupt", "fail_truncated", 1),
        ("", "oom_die_midgen", -6),  # a device is lost while it serves
        ("exit0", None, 0),
        ("segv", None, -11),
        ("abort", None, -6),
        ("empty-log", "fail_host_bad", 1),
    ],
)
def test_a_fault_ends_like_the_recorded_failure(start: Start, fault: str, log: str | None, status: int) -> None:
    running = start(FAKE_FAIL=fault, FAKE_DEVICES=TWO_CARDS.replace("CUDA", "Vulkan"))
    if not fault:
        running.process.send_signal(LOSE_DEVICE)
    assert running.ended() == status
    if log is not None:
        expected, found = diagnose(recorded.lines(log), status), diagnose(running.lines(), status)
        assert (found.code, found.part) == (expected.code, expected.part)


@pytest.mark.parametrize(
    ("arguments", "log"),
    [
        (["--no-such-flag"], "fail_bad_flag"),
        (["-c", "many"], "fail_bad_value"),
        (["-dev", "CUDA0"], "fail_bad_dev"),
        (["-ctk", "q3_0"], "fail_bad_kvtype"),
        (["-ts", "x,y"], "fail_bad_ts"),
        (["-ts", ",".join("1" * 40)], "fail_ts_too_many"),
    ],
)
def test_options_are_refused_word_for_word(start: Start, arguments: list[str], log: str) -> None:
    running = start(*arguments)
    assert running.ended() == 1
    assert running.log.read_text(encoding="utf-8") == recorded.text(f"{log}.log")


@pytest.mark.parametrize(
    ("content", "log"),
    [(b"hello world", "fail_not_gguf"), (b"", "fail_empty_file"), (None, "fail_missing_model")],
)
def test_what_is_no_model_is_refused(start: Start, model: Path, content: bytes | None, log: str) -> None:
    model.unlink()
    if content is not None:
        model.write_bytes(content)
    running = start()
    assert running.ended() == 1
    assert diagnose(running.lines(), 1).code == diagnose(recorded.lines(log), 1).code


def test_options_mgpu_relies_on_are_in_the_help() -> None:
    known = options()
    assert {name: known[name].values for name in ("-m", "--fit", "-ngl", "--metrics", "-nkvo", "--rpc")} == {
        "-m": 1,
        "--fit": 1,
        "-ngl": 1,
        "--metrics": 0,
        "-nkvo": 0,
        "--rpc": 1,
    }


def test_rpc_devices_are_known_only_after_their_option(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as device:
        endpoint = f"127.0.0.1:{device.getsockname()[1]}"
        assert start("-dev", "RPC0", "--rpc", endpoint).ended() == 1
        running = start("--rpc", endpoint, "-dev", "RPC0")
        assert "RPC0" in buffers_by_device(running.lines())


def test_a_load_goes_through_every_phase_and_splits_as_told(start: Start) -> None:
    running = start("-dev", "CUDA0,CUDA1", "-ts", "3,1", "-c", "4096", "-np", "2", FAKE_DEVICES=TWO_CARDS)
    events = [parse_line(line) for line in running.lines()]
    assert tuple(event.name for event in events if isinstance(event, Phase)) == PHASES
    buffers = buffers_by_device(running.lines())
    assert buffers["CUDA0"] == DeviceBuffers(weights_bytes=750 * MIB, kv_bytes=480 * MIB, compute_bytes=256 * MIB)
    assert buffers["CUDA1"] == DeviceBuffers(weights_bytes=250 * MIB, kv_bytes=160 * MIB, compute_bytes=256 * MIB)


def test_a_device_that_is_too_small_is_out_of_memory(start: Start) -> None:
    arguments = ("-dev", "CUDA0,CUDA1", "-ts", "1,1", "-c", "65536")
    running = start(*arguments, FAKE_DEVICES=TWO_CARDS)
    assert running.ended() == 1
    failure = diagnose(running.lines(), 1)
    assert (failure.code, failure.device, failure.part) == ("out-of-memory", "CUDA1", "kv")
    assert start(*arguments, "-ctk", "q4_0", "-ctv", "q4_0", "-c", "8192", FAKE_DEVICES=TWO_CARDS).ready()


@pytest.mark.parametrize(
    ("visible", "free_mib"),
    [("1", [2000]), ("1,0", [2000, 23600]), ("GPU-b", [2000]), ("", [])],
)
def test_visible_devices_are_numbered_anew(tmp_path: Path, visible: str, free_mib: list[int]) -> None:
    environment = {"FAKE_DEVICES": TWO_CARDS, "FAKE_UUIDS": "GPU-a1,GPU-b2", "CUDA_VISIBLE_DEVICES": visible}
    listed = subprocess.run(
        [install(tmp_path), "--list-devices"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    ).stdout
    assert re.findall(r"CUDA(\d): .*, (\d+) MiB free", listed) == [
        (str(index), str(mib)) for index, mib in enumerate(free_mib)
    ]
    assert ("(none)" in listed) == (not free_mib)


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics", "/slots", "/props"])
def test_everything_is_unavailable_while_loading(start: Start, path: str) -> None:
    running = start(wait=False, FAKE_FAIL="hang-loading")
    until(lambda: not refused(running))
    status, body = running.request("GET", path)
    assert status == 503
    assert json.loads(body) == {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
    running.process.terminate()
    assert running.ended() == -signal.SIGTERM


def refused(running: Running) -> bool:
    with suppress(*GONE):
        running.request("GET", "/health")
        return False
    return True


@pytest.mark.parametrize(
    ("path", "log"), [("/v1/models", "v1_models.json"), ("/props", "props.json"), ("/slots", "slots_busy.json")]
)
def test_what_an_engine_says_of_itself_has_the_recorded_shape(start: Start, path: str, log: str) -> None:
    running = start("-np", "2", "--alias", "smol", "--metrics")
    status, _ = running.request("POST", "/v1/chat/completions", HELLO)
    assert status == 200
    # Only a slot that was used has everything; the last is used first.
    assert shape(running.json(path)[-1:] if path == "/slots" else running.json(path)) == shape(
        json.loads(recorded.text(log))
    )


@pytest.mark.parametrize(
    ("more", "log"),
    [
        ({}, "chat_stream_plain.sse"),
        ({"stream_options": {"include_usage": True}, "timings_per_token": True}, "chat_stream.sse"),
    ],
)
def test_a_stream_has_the_recorded_events(start: Start, more: dict[str, object], log: str) -> None:
    status, text = start().request("POST", "/v1/chat/completions", {**HELLO, "stream": True, **more})
    assert status == 200
    assert stream_shapes(text) == stream_shapes(recorded.text(log))


def test_an_answer_in_one_piece_has_the_recorded_shape(start: Start) -> None:
    _, text = start("--alias", "smol").request("POST", "/v1/chat/completions", HELLO)
    answer = json.loads(text)
    assert shape(answer) == shape(json.loads(recorded.text("chat.json")))
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == HELLO["max_tokens"]


def test_metrics_have_the_recorded_names_and_count_answers_when_they_end(start: Start) -> None:
    running = start("--metrics", "-np", "1", "-c", "1000000", FAKE_KV_BYTES_PER_TOKEN="4")
    assert (
        parse_metrics(running.request("GET", "/metrics")[1]).keys()
        == parse_metrics(recorded.text("metrics.txt")).keys()
    )
    with running.open({**ENDLESS, "stream": True}):
        until(lambda: decoded(running.json("/slots")[0]) > 5)
        busy = sample_from_text(0.0, running.request("GET", "/metrics")[1], running.request("GET", "/slots")[1])
        assert (busy.running, busy.generation_tokens_total) == (1, 0)
        assert busy.unfinished_tokens > 5
        assert busy.kv_used is not None
        assert busy.kv_used > 0
    until(lambda: running.json("/slots")[0]["is_processing"] is False)
    done = parse_metrics(running.request("GET", "/metrics")[1])
    assert done["llamacpp:tokens_predicted_total"] >= busy.unfinished_tokens


def test_requests_wait_for_a_slot(start: Start) -> None:
    running = start("--metrics", "-np", "1")
    with running.open({**ENDLESS, "stream": True}), running.open(HELLO):
        until(lambda: sample_from_text(0.0, running.request("GET", "/metrics")[1]).waiting == 1)
        assert running.request("GET", "/slots?fail_on_no_slot=1")[0] == 503
        assert running.request("GET", "/health")[0] == 200


def test_keys_guard_all_but_health_and_models(start: Start) -> None:
    running = start("--metrics", LLAMA_API_KEY="one,two")
    guarded = [("GET", "/metrics"), ("GET", "/slots"), ("GET", "/nowhere"), ("POST", "/v1/chat/completions")]
    for method, path in guarded:
        status, body = running.request(method, path, HELLO if method == "POST" else None)
        assert status == 401
        assert json.loads(body)["error"]["message"] == "Invalid API Key"
    assert running.request("GET", "/metrics", key="two")[0] == 200
    assert running.request("GET", "/nowhere", key="two")[0] == 404
    assert running.request("GET", "/health")[0] == running.request("GET", "/v1/models")[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("{b", 500, "parse error"),
        ({"messages": 5}, 400, "Expected 'messages' to be an array"),
        ({}, 400, "'messages' is required"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "exceeds the available context size"),
    ],
)
def test_bad_requests_are_answered_as_the_real_one_does(start: Start, body: object, status: int, message: str) -> None:
    found, text = start().request("POST", "/v1/chat/completions", body)
    assert found == status
    assert message in json.loads(text)["error"]["message"]


def test_metrics_must_be_asked_for(start: Start) -> None:
    assert start().request("GET", "/metrics")[0] == 501


def test_a_signal_while_idle_ends_it_at_once(start: Start) -> None:
    running = start()
    running.process.terminate()
    assert running.ended() == 0
    assert diagnose(running.lines(), 0).code == "stopped"


def test_a_stream_in_flight_ends_at_the_next_ping(start: Start) -> None:
    running = start("--sse-ping-interval", "1")
    with running.open({**ENDLESS, "stream": True}) as stream:
        until(lambda: any(decoded(slot) > 2 for slot in running.json("/slots")))
        running.process.terminate()
        assert running.ended() == 0
        received = b"".join(iter(lambda: stream.recv(1 << 16), b""))
    assert received.count(b"data: ") > 1
    assert b"[DONE]" not in received


def test_an_answer_in_one_piece_in_flight_holds_it_until_the_client_leaves(start: Start) -> None:
    running = start("-c", "1000000", "-np", "1", FAKE_KV_BYTES_PER_TOKEN="4")
    with running.open(ENDLESS):
        running.process.terminate()
        until(lambda: refused(running))
        with pytest.raises(subprocess.TimeoutExpired):
            running.process.wait(0.3)
    assert running.ended() == 0


@pytest.mark.parametrize("fault", ["", "hang-request"])
def test_a_second_signal_ends_it_at_once(start: Start, fault: str) -> None:
    running = start(FAKE_FAIL=fault)
    with running.open(ENDLESS):
        running.process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            running.process.wait(0.3)
        assert running.ready() == (fault == "hang-request")
        running.process.terminate()
        assert running.ended() == 1
    assert running.lines()[-1] == recorded.lines("sig_gen2_SIGTERM")[-1]


def test_a_hanging_device_leaves_health_green(start: Start) -> None:
    running = start(FAKE_FAIL="hang-request")
    with running.open(HELLO) as request:
        request.settimeout(0.3)
        with pytest.raises(TimeoutError):
            request.recv(1)
        assert running.ready()


def test_a_card_lost_in_a_request_is_named(start: Start) -> None:
    running = start(FAKE_FAIL="die-in-request", FAKE_DEVICES=TWO_CARDS)
    with pytest.raises(GONE):
        running.request("POST", "/v1/chat/completions", HELLO)
    assert running.ended() == -signal.SIGABRT
    failure = diagnose(running.lines(), -6)
    assert (failure.code, failure.device) == ("device-lost", "CUDA1")


@pytest.mark.parametrize(("fault", "distinct"), [("repeat-token", 1), ("garbage", 4), ("", 8)])
def test_nonsense_can_be_had(start: Start, fault: str, distinct: int) -> None:
    _, text = start(FAKE_FAIL=fault).request("POST", "/v1/chat/completions", {**HELLO, "max_tokens": 8})
    assert len(set(json.loads(text)["choices"][0]["message"]["content"].split())) == distinct


def test_it_can_refuse_to_end(start: Start) -> None:
    running = start(FAKE_FAIL="ignore-term")
    running.process.terminate()
    running.process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        running.process.wait(0.3)
    assert running.ready()


def test_a_child_can_outlive_it(start: Start) -> None:
    running = start(FAKE_FAIL="spawn-child")
    found = re.search(r"child process (\d+)", running.log.read_text(encoding="utf-8"))
    assert found
    running.process.terminate()
    assert running.ended() == 0
    os.kill(int(found[1]), signal.SIGTERM)
    os.kill(int(found[1]), 0)


def test_it_can_fail_the_first_time_only(start: Start, tmp_path: Path) -> None:
    once = {"FAKE_FAIL": "oom-kv", "FAKE_FAIL_STARTS": f"1:{tmp_path / 'starts'}", "FAKE_DEVICES": TWO_CARDS}
    assert start("-c", "4096", **once).ended() == 1
    assert start("-c", "4096", **once).ready()


def test_it_is_a_program_of_its_own(tmp_path: Path) -> None:
    version = subprocess.run([install(tmp_path), "--version"], capture_output=True, text=True, check=True)
    assert re.match(r"version: .* \(build 1, commit 7e4c0a9\)\n", version.stderr)
    assert sys.executable in (tmp_path / "llama-server").read_text(encoding="utf-8")
