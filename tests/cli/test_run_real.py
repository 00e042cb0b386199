"""`mgpu run` with the real llama-server: on the CPU, on RPC devices, on Vulkan devices, and a 70B over two cards."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mgpu.running.draining import DRAIN_S
from mgpu.units import GIB, MIB
from tests.fakes.devices import (
    NO_VULKAN,
    fake_rpc_devices,
    lavapipe_environment,
    real_llama_server,
    require_or_skip,
    rpc_devices,
)
from tests.fakes.shapes import SHAPES
from tests.fakes.sparse_gguf import make_sparse_gguf

from .program import Mgpu, request, until

pytestmark = pytest.mark.real_engine
ONE_THREAD = ("--", "--threads", "1", "--threads-batch", "1")
STORY = {"messages": [{"role": "user", "content": "Tell me a very long story about a dragon."}], "max_tokens": 900}


@pytest.fixture
def mgpu(tmp_path: Path) -> Iterator[Mgpu]:
    """mgpu on this machine, with the real engine and no Vulkan."""
    program = Mgpu(tmp_path, {**NO_VULKAN, "MGPU_LLAMA_SERVER": str(real_llama_server())})
    yield program
    program.end_all()


@pytest.fixture(scope="session")
def seventy_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sparse_gguf(tmp_path_factory.mktemp("70b") / "70b.gguf", SHAPES["llama-3.3-70b"], "Q4_K_M")


@pytest.fixture(scope="session")
def eight_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("70b") / "70b-8.gguf"
    return make_sparse_gguf(path, SHAPES["llama-3.3-70b"], "Q4_K_M", layers=8, vocabulary=2000)


def assert_as_planned(devices: list[dict[str, Any]], count: int) -> None:
    """Every card holds weights and KV cache, as much as was planned."""
    assert len(devices) == count
    for device in devices:
        assert device["weights_bytes"] > 0
        assert device["kv_bytes"] > 0
        # Buffers of a tiny model, where the plan keeps to the engine's own projection, which is a little high.
        assert device["actual_bytes"] == pytest.approx(device["planned_bytes"], rel=0.03, abs=4 * MIB)


def test_a_question_is_answered_and_nothing_is_left(mgpu: Mgpu, smollm2: Path) -> None:
    ended = mgpu("run", smollm2, "--ask", "Say hello.", "--ctx", "512", *ONE_THREAD)
    assert ended.exit_code == 0, ended
    assert ended.out.strip()
    assert "tokens/s" in ended.err
    mgpu.assert_nothing_left()


def test_a_server_answers_shows_its_rate_and_ends_with_ctrl_c(mgpu: Mgpu, smollm2: Path) -> None:
    running = mgpu.start("run", smollm2, "--name", "small", "--ctx", "512", "--interval", "0.2", "--json", *ONE_THREAD)
    url = running.url()
    _, models = request(url, "/v1/models")
    assert json.loads(models)["data"][0]["id"] == "small"
    status, _ = request(url, "/v1/chat/completions", {**STORY, "max_tokens": 60})
    assert status == 200

    def rate_was_seen() -> bool:
        entries = [json.loads(line)["data"] for line in running.out.splitlines() if '"status"' in line]
        return any((entry["rate"]["generation_tok_s"] or 0) > 0 for entry in entries)

    until(rate_was_seen, "a status with a generation rate")
    ended = running.end(signal.SIGINT)
    assert ended.exit_code == 130
    assert ended.events[-1] == "stopped"
    mgpu.assert_nothing_left()


@pytest.mark.parametrize("stream", [pytest.param(True, id="a stream"), pytest.param(False, id="an answer at once")])
def test_ctrl_c_ends_within_seconds_with_a_request_in_flight(mgpu: Mgpu, smollm2: Path, stream: bool) -> None:
    running = mgpu.start("run", smollm2, "--ctx", "2048", "--interval", "0.2", "--json", *ONE_THREAD)
    url = running.url()
    client = threading.Thread(target=_broken_off, args=(url, {**STORY, "stream": stream}))
    client.start()
    running.line(r'\{.*"status".*"running": 1')
    ended = running.end(signal.SIGINT)
    client.join(60)
    assert ended.exit_code == 130
    assert ended.event("stopped")["seconds"] < DRAIN_S + 8
    mgpu.assert_nothing_left()


def _broken_off(url: str, body: dict[str, Any]) -> None:
    """Ask what is not going to be answered whole."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        request(url, "/v1/chat/completions", body)


@pytest.mark.real_device
def test_a_model_is_split_over_two_rpc_devices(mgpu: Mgpu, smollm2: Path) -> None:
    with rpc_devices(2) as endpoints:
        words = ("run", smollm2, "--ctx", "1024", "--ask", "Hello", "--json", "--", "--rpc", ",".join(endpoints))
        ended = mgpu(*words)
    assert ended.exit_code == 0, ended
    assert_as_planned(ended.event("checked")["devices"], 2)
    assert ended.event("answered")["generated_tokens"] > 0
    mgpu.assert_nothing_left()


@pytest.mark.real_device
def test_a_model_is_split_over_two_vulkan_devices(mgpu: Mgpu, smollm2: Path) -> None:
    environment = lavapipe_environment()
    require_or_skip(environment is not None, "Mesa's lavapipe (mesa-vulkan-drivers) is not installed")
    assert environment
    running = mgpu.start("run", smollm2, "--ctx", "256", "--json", **environment)
    checked = running.event("checked")
    running.url()
    assert running.end(signal.SIGINT).exit_code == 130
    assert_as_planned(checked["devices"], 2)
    mgpu.assert_nothing_left()


@pytest.mark.real_device
def test_a_70b_is_planned_in_full_over_two_cards(mgpu: Mgpu, seventy_b: Path) -> None:
    with fake_rpc_devices([23.5, 23.5]) as endpoints:
        plan = mgpu("plan", seventy_b, "--ctx", "8192", "--json", "--", "--rpc", ",".join(endpoints)).json["data"]
    best = plan["candidates"][plan["best"]]
    assert best["verdict"] == "fits"
    assert [device["layers"] for device in best["devices"]] == [41, 39]
    totals = [device["total_bytes"] / GIB for device in best["devices"]]
    # 19.57 + 1.28 and 19.47 + 1.22 GiB of weights and KV cache, and the buffers llama-server projects.
    assert totals == pytest.approx([21.07, 20.90], rel=0.02)
    assert sum(device["layers"] for device in best["devices"]) == 80


@pytest.mark.real_device
def test_eight_layers_of_a_70b_are_served_over_two_cards(mgpu: Mgpu, eight_layers: Path) -> None:
    with fake_rpc_devices([24, 24]) as endpoints:
        rpc = ",".join(endpoints)
        running = mgpu.start("run", eight_layers, "--ctx", "1024", "--json", *ONE_THREAD, "--no-warmup", "--rpc", rpc)
        devices = running.event("checked")["devices"]
        url = running.url()
        status, text = request(url, "/completion", {"prompt": "Hello", "n_predict": 2})
        ended = running.end(signal.SIGINT)
    assert status == 200
    assert "content" in json.loads(text)
    assert_as_planned(devices, 2)
    assert ended.exit_code == 130
    mgpu.assert_nothing_left()


@pytest.mark.real_device
def test_a_device_that_is_not_there_is_missing(mgpu: Mgpu, smollm2: Path) -> None:
    ended = mgpu("run", smollm2, "--ask", "Hello", "--json", "--", "--rpc", "127.0.0.1:9")
    assert ended.exit_code == 3
    assert ended.json["errors"][0]["code"] == "device-missing"
    mgpu.assert_nothing_left()


@pytest.mark.real_device
def test_a_device_that_dies_is_named_as_the_cause(mgpu: Mgpu, smollm2: Path) -> None:
    with rpc_devices(2) as endpoints:
        running = mgpu.start("run", smollm2, "--ctx", "1024", "--json", *ONE_THREAD, "--rpc", ",".join(endpoints))
        url = running.url()
    # The devices are gone; the next request finds out.
    _broken_off(url, STORY)
    ended = running.end()
    assert ended.exit_code == 4
    assert ended.stream[-1]["errors"][0]["code"] == "device-lost"
    mgpu.assert_nothing_left()


@pytest.mark.real_device
def test_a_card_smaller_than_it_claims_runs_out_of_memory(mgpu: Mgpu, eight_layers: Path) -> None:
    with fake_rpc_devices([24, 24], "--fail-alloc-over-gib", "0.5") as endpoints:
        ended = mgpu("run", eight_layers, "--ctx", "1024", "--json", "--", "--rpc", ",".join(endpoints))
    assert ended.exit_code == 4
    error = ended.stream[-1]["errors"][0]
    assert error["code"] == "out-of-memory"
    assert re.fullmatch(r"out of memory on RPC[01]: [\d.]+ GiB asked for the weights", error["message"])
    mgpu.assert_nothing_left()


def test_the_environment_of_the_tests_names_no_other_engine() -> None:
    assert "MGPU_LLAMA_SERVER" not in os.environ
