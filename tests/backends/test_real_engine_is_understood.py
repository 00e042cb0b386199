"""A real llama-server on real and fake RPC devices: what it writes and answers is read rightly."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mgpu.backends.cpu_library import cpu_library
from mgpu.backends.llama_cpp_failure import diagnose
from mgpu.backends.llama_cpp_log import (
    HOST,
    PHASES,
    ContextInfo,
    DeviceListed,
    Phase,
    buffers_by_device,
    parse_line,
)
from mgpu.backends.llama_cpp_metrics import sample_from_text
from mgpu.backends.samples import rates
from tests.fakes.devices import (
    NO_VULKAN,
    fake_rpc_devices,
    free_port,
    lavapipe_environment,
    real_llama_server,
    require_or_skip,
    rpc_devices,
)
from tests.fakes.shapes import SHAPES
from tests.fakes.sparse_gguf import make_sparse_gguf

pytestmark = pytest.mark.real_device

MIB = 1 << 20
LIMIT_S = 120
GONE = (OSError, http.client.HTTPException)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """141 MiB of zeros in the shape of a small Llama."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    return make_sparse_gguf(path, SHAPES["llama-3.2-1b"], "Q4_K_M", layers=4, vocabulary=1000)


class Server:
    """A running llama-server whose log can be read at any time."""

    def __init__(self, log: Path, environment: dict[str, str], *arguments: str) -> None:
        self.port = free_port()
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [real_llama_server(), *arguments, "--host", "127.0.0.1", "--port", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **cpu_library(real_llama_server()), **environment, "GGML_NO_BACKTRACE": "1"},
            )

    def lines(self) -> list[str]:
        return self._log.read_text(encoding="utf-8", errors="replace").splitlines()

    def get(self, path: str) -> str:
        return self.ask("GET", path)[1]

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def ready(self) -> bool:
        assert self.process.poll() is None, diagnose(self.lines(), self.process.returncode)
        with suppress(*GONE):
            return self.ask("GET", "/health")[0] == 200
        return False


Serve = Callable[..., Server]


@pytest.fixture
def serve(tmp_path: Path, tiny_model: Path) -> Iterator[Serve]:
    """Start llama-server on RPC endpoints, with the options mgpu uses."""
    started: list[Server] = []

    def start(endpoints: tuple[str, ...], *arguments: str, devices: int | None = None) -> Server:
        names = ",".join(f"RPC{index}" for index in range(devices or len(endpoints)))
        common = ["-m", str(tiny_model), "--rpc", ",".join(endpoints), "-dev", names, "-lv", "4", "-t", "1"]
        common += ["--fit", "off", "-ngl", "999", "-fa", "on", "--metrics"]
        started.append(Server(tmp_path / f"{len(started)}.log", NO_VULKAN, *common, *arguments))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.process.wait()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.02)


def test_real_rpc_devices_load_serve_and_stop(serve: Serve) -> None:
    with rpc_devices(2) as endpoints:
        server = serve(endpoints, "-ts", "3,1", "-c", "1024", "-np", "2")
        until(server.ready)
        events = [parse_line(line) for line in server.lines()]
        assert tuple(event.name for event in events if isinstance(event, Phase)) == PHASES
        assert ContextInfo(slots=2, ctx_per_slot_tokens=512) in events
        listed = {event.id: event.description for event in events if isinstance(event, DeviceListed)}
        assert (listed["RPC0"], listed["RPC1"]) == endpoints
        buffers = buffers_by_device(server.lines())
        # 4 layers and the head over 3:1: the first device has 4 of 5, the second the head and no cache.
        assert buffers.keys() == {"RPC0", "RPC1", HOST}
        assert buffers["RPC0"].kv_bytes == 4 * 1024 * 2 * 8 * 64 * 2
        assert buffers["RPC1"].weights_bytes > 0

        before = sample_from_text(time.monotonic(), server.get("/metrics"), server.get("/slots"))
        status, _ = server.ask("POST", "/completion", {"prompt": "a b", "n_predict": 4, "ignore_eos": True})
        assert status == 200
        after = sample_from_text(time.monotonic(), server.get("/metrics"), server.get("/slots"))
        assert after.generation_tokens_total == 4
        assert rates(before, after).generation_tok_s > 0  # type: ignore[operator]
        server.process.terminate()
        assert server.process.wait(LIMIT_S) == 0
        assert diagnose(server.lines(), 0).code == "stopped"


def test_what_the_log_says_is_what_the_devices_were_asked_for(serve: Serve, tmp_path: Path) -> None:
    notes = [tmp_path / "0.txt", tmp_path / "1.txt"]
    with fake_rpc_devices([24, 24], logs=notes) as endpoints:
        server = serve(endpoints, "-ts", "1,1", "-c", "4096", "-np", "1")
        until(server.ready)
        buffers = buffers_by_device(server.lines())
        for index, path in enumerate(notes):
            asked = [int(size) for size in re.findall(r"allocated (\d+) bytes", path.read_text(encoding="utf-8"))]
            found = buffers[f"RPC{index}"]
            sizes = [found.weights_bytes, found.kv_bytes, found.compute_bytes]
            assert sizes == pytest.approx(asked, abs=0.01 * MIB)


def test_two_devices_of_one_rpc_server_are_told_apart(serve: Serve) -> None:
    with fake_rpc_devices([8], "--devices", "2") as endpoints:
        server = serve(endpoints, "-ts", "3,1", "-c", "512", "-np", "1", devices=2)
        until(server.ready)
        buffers = buffers_by_device(server.lines())
        assert buffers.keys() == {"RPC0", "RPC1", HOST}
        assert buffers["RPC0"].weights_bytes > buffers["RPC1"].weights_bytes


@pytest.mark.parametrize(
    ("mem_gib", "options", "arguments", "part"),
    [
        pytest.param(0.01, (), ("-c", "512"), "weights", id="no room for the weights"),
        pytest.param(1, (), ("-c", "1048576"), "kv", id="no room for the KV cache"),
        pytest.param(
            1, ("--fail-alloc-over-gib", "0.1"), ("-c", "4096", "-ub", "4096", "-b", "4096"), "compute",
            id="no room for the compute buffer",
        ),
    ],
)  # fmt: skip
def test_a_device_that_is_too_small_is_named(
    serve: Serve, mem_gib: float, options: tuple[str, ...], arguments: tuple[str, ...], part: str
) -> None:
    with fake_rpc_devices([24]) as large, fake_rpc_devices([mem_gib], *options) as small:
        server = serve((*large, *small), "-ts", "1,1", "-np", "1", *arguments)
        until(lambda: server.process.poll() is not None or any("listening on" in line for line in server.lines()))
        failure = diagnose(server.lines(), server.process.returncode)
        assert (failure.code, failure.device, failure.part) == ("out-of-memory", "RPC1", part)
        assert server.process.returncode == 1
        assert failure.wanted_bytes


def test_a_device_that_dies_in_a_request_is_named(serve: Serve) -> None:
    with fake_rpc_devices([24], "--die-after-computes", "12") as endpoints:
        server = serve(endpoints, "-c", "512", "-np", "1")
        until(server.ready)
        with pytest.raises(GONE):
            server.ask("POST", "/completion", {"prompt": "a", "n_predict": 100, "ignore_eos": True})
        assert server.process.wait(LIMIT_S) == -signal.SIGABRT
        assert diagnose(server.lines(), -6).code == "device-lost"


def test_a_device_that_hangs_in_a_request_leaves_health_green(serve: Serve) -> None:
    with fake_rpc_devices([24], "--hang-after-computes", "12") as endpoints:
        server = serve(endpoints, "-c", "512", "-np", "1")
        until(server.ready)
        body = b'{"prompt": "a", "n_predict": 100, "ignore_eos": true}'
        with socket.create_connection(("127.0.0.1", server.port)) as request:
            head = b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
            request.sendall(head + body)
            until(lambda: sample_from_text(0.0, server.get("/metrics")).running == 1)
            assert server.ready()
            server.process.terminate()
            # Whether its port closes now depends on where the engine waits for the device.
            with pytest.raises(subprocess.TimeoutExpired):
                server.process.wait(0.3)
            server.process.terminate()
            assert server.process.wait(LIMIT_S) == 1
        assert diagnose(server.lines(), 1).code == "stopped"


def test_an_rpc_device_that_is_not_there_is_named(serve: Serve) -> None:
    server = serve((f"127.0.0.1:{free_port()}",))
    status = server.process.wait(LIMIT_S)
    assert diagnose(server.lines(), status).code == "device-lost"


def test_software_vulkan_counts_as_two_devices() -> None:
    environment = lavapipe_environment()
    require_or_skip(environment is not None, "Mesa's lavapipe is not installed")
    assert environment is not None
    listed = subprocess.run(
        [real_llama_server(), "--list-devices"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    ).stdout
    devices = [event for line in listed.splitlines() if isinstance(event := parse_line(line), DeviceListed)]
    assert [device.id for device in devices] == ["Vulkan0", "Vulkan1"]
    assert all(device.free_bytes > 0 for device in devices)


@pytest.mark.parametrize(("required", "outcome"), [("1", "failed"), ("0", "skipped")])
def test_a_missing_device_skips_at_home_and_fails_in_ci(
    monkeypatch: pytest.MonkeyPatch, required: str, outcome: str
) -> None:
    monkeypatch.setenv("MGPU_TEST_REQUIRE_REAL", required)
    require_or_skip(True, "there")
    expected = pytest.fail.Exception if outcome == "failed" else pytest.skip.Exception
    with pytest.raises(expected, match="not there"):
        require_or_skip(False, "not there")
