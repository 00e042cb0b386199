"""The fake vLLM against what a real one was recorded doing: log, processes, answers, signals, ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mgpu.backends.backend import Launch
from mgpu.backends.engine import Engine
from mgpu.backends.vllm import BACKEND
from mgpu.backends.vllm_log import PHASES, kv_tokens
from mgpu.backends.vllm_program import fit_to_help, installed_version, serve_help
from mgpu.errors import EngineFailed
from mgpu.running.guard import watch
from mgpu.running.process import EngineProcess
from tests.fakes.devices import free_port
from tests.fakes.tiny_llama import make_tiny_llama
from tests.fakes.vllm_server_running import (
    LIMIT_S,
    ON_CPU,
    SHARED_MEMORY,
    Installed,
    RunningVllm,
    Start,
    install_both,
    starting,
    until,
)

from . import recorded_vllm as recorded
from .test_vllm_log import candidate

GIB = 1 << 30
COMMAND = ("vllm", "serve", "m", "--host", "::1", "--max-num-seqs", "4", "--shutdown-timeout", "3")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install_both(tmp_path_factory.mktemp("vllm"))


@pytest.fixture
def start(installed: Installed) -> Iterator[Start]:
    with starting(installed) as begin:
        yield begin


def phases(lines: list[str]) -> list[str]:
    named = [name for line in lines if (name := BACKEND.phase(line))]
    return [name for number, name in enumerate(named) if number == 0 or named[number - 1] != name]


def test_help_lists_the_flags_that_mgpu_looks_for(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launch = Launch(argv=COMMAND, env={})

    def fitted(folder: str) -> tuple[str, ...]:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / folder))  # the help is remembered
        help_text = serve_help(Engine(backend="vllm", path=installed.cards, found_in="test"))
        return fit_to_help(launch, help_text, installed_version(installed.cards)).argv

    assert fitted("new") == COMMAND
    monkeypatch.setenv("FAKE_FAIL", "old")
    assert fitted("old") == COMMAND[:-2]
    monkeypatch.setenv("FAKE_MISSING_FLAGS", "--max-num-seqs")
    with pytest.raises(EngineFailed, match=r"vLLM 0\.32\.0 does not know --max-num-seqs"):
        fitted("missing")
    assert installed_version(installed.cpu) == "0.32.0+cpu"


def test_a_load_is_told_as_recorded(start: Start) -> None:
    ours, theirs = start("-tp", "2", "--enforce-eager", cpu=True).lines(), recorded.lines("tp2")
    assert phases(ours) == phases(theirs)
    assert kv_tokens(ours) == kv_tokens(theirs)

    def kinds(lines: list[str]) -> set[str]:
        """Which process says what, without numbers and names of files."""
        told = (re.sub(r"/\S+|[\d.,]+", "", re.sub(r"(config|args): .*|'.*", "", line)) for line in lines)
        return {line for line in told if "http" not in line and "Route" not in line and "GET" not in line}

    told = {re.sub(r"\[\S*\] ", "", line) for line in kinds(theirs)}
    assert {re.sub(r"\[\S*\] ", "", line) for line in kinds(ours)} <= told


@pytest.mark.parametrize(
    ("shape", "workers"),
    [
        pytest.param((1, 1, 1), [], id="one card, in the engine core"),
        pytest.param((2, 1, 1), ["Worker_TP0", "Worker_TP1"], id="tensor parallel"),
        pytest.param((1, 2, 1), ["Worker_PP0", "Worker_PP1"], id="a pipeline"),
        pytest.param((2, 1, 2), [f"Worker_DP{i}_TP{j}" for i in (0, 1) for j in (0, 1)], id="replicas"),
    ],
)
def test_on_cards_it_tells_what_it_holds(start: Start, shape: tuple[int, int, int], workers: list[str]) -> None:
    tensor, pipeline, replicas = shape
    flags = ("-tp", str(tensor), "-pp", str(pipeline), "-dp", str(replicas), "--gpu-memory-utilization", "0.9")
    running = start(*flags, FAKE_CARD_BYTES=str(8 * GIB), FAKE_OVERHEAD_BYTES="0")
    assert {name.partition(",")[0] for name in phases(running.lines())} == set(PHASES)
    assert {name for name in running.members() if "Worker" in name} == {f"VLLM::{name}" for name in workers}
    plan = candidate(tensor=tensor, pipeline=pipeline, replicas=replicas)
    found = BACKEND.memory(running.lines(), plan)
    assert set(found) == (set(range(len(plan.devices))) if pipeline == 1 else {0}), "only the first stage tells"
    kv_gib = 0.9 * 8 - 400 / 1024  # less CUDA graphs
    assert found[0].kv_bytes == pytest.approx(kv_gib * GIB, rel=0.005)
    assert found[0].weights_bytes is not None
    each = 4 * 2 * 4 * 32 * 2 // (tensor * pipeline)  # bytes of a token in four layers of four heads
    assert kv_tokens(running.lines()) == pytest.approx(kv_gib * GIB / each, rel=0.005)


@pytest.mark.parametrize(
    ("arguments", "environment", "status", "log"),
    [
        pytest.param(["--no-such-flag"], {}, 2, "fail_flag", id="an unknown flag"),
        pytest.param(["--max-model-len", "100000"], {}, 1, "fail_maxlen", id="too long a context"),
        pytest.param(["-tp", "3"], {}, 1, "fail_tp3", id="heads that cannot be dealt"),
        pytest.param([], {"FAKE_FAIL": "kv-too-small"}, 1, "fail_kv", id="a small KV cache"),
        pytest.param([], {"VLLM_CPU_KVCACHE_SPACE": "500"}, 1, "fail_kvhuge", id="a huge KV cache"),
        pytest.param(["-tp", "2"], {"FAKE_FAIL": "truncated"}, 1, "fail_trunc", id="a damaged file"),
        pytest.param(["-tp", "2"], {"VLLM_CPU_OMP_THREADS_BIND": "auto"}, 1, "tp2_auto", id="no cores given"),
    ],
)
def test_a_failed_start_is_told_as_recorded(
    start: Start, arguments: list[str], environment: dict[str, str], status: int, log: str
) -> None:
    running = start(*arguments, "--enforce-eager", cpu=True, **environment)
    assert running.ended() == status
    ours, theirs = (BACKEND.diagnose(lines, status) for lines in (running.lines(), recorded.lines(log)))
    what = ("code", "part", "device", "deterministic", "hint")
    assert [getattr(ours, name) for name in what[:4]] == [getattr(theirs, name) for name in what[:4]]
    assert re.sub(r"\d+", "N", ours.hint or "") == re.sub(r"\d+", "N", theirs.hint or "")
    assert re.sub(r"[\d.]+", "N", ours.message) == re.sub(r"[\d.]+", "N", theirs.message)
    until(lambda: not running.members())


def test_what_is_wrong_is_found_without_being_told(start: Start, tmp_path: Path) -> None:
    def cause(*arguments: str, **more: Any) -> tuple[str, str | None]:
        running = start(*arguments, **more)
        assert running.ended() == 1
        failure = BACKEND.diagnose(running.lines(), 1)
        return failure.code, failure.device

    model = make_tiny_llama(tmp_path / "cut")
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    assert cause(model=model) == ("model-corrupt", None)
    (model / "config.json").unlink()
    assert cause(model=model) == ("model-missing", None)
    assert cause(model=tmp_path / "nowhere") == ("model-missing", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cause("--port", str(taken.getsockname()[1])) == ("port-in-use", None)
    free = {"FAKE_CARD_BYTES": str(24 * GIB), "FAKE_FREE_BYTES": f"{23 * GIB},{9 * GIB}"}
    assert cause("-tp", "2", **free) == ("out-of-memory", "CUDA1")
    small = {"FAKE_CARD_BYTES": str(4 << 20), "FAKE_FREE_BYTES": str(4 << 20)}
    assert cause(**small) == ("out-of-memory", "CUDA0")
    assert cause(FAKE_CARD_BYTES=str(GIB), FAKE_FREE_BYTES=str(GIB), FAKE_OVERHEAD_BYTES=str(GIB)) == (
        "out-of-memory", None)  # fmt: skip
    far = tmp_path / ("x" * 90)
    far.mkdir()
    assert cause(TMPDIR=str(far)) == ("exited", None), "a unix socket's path is too long"


@pytest.mark.parametrize(
    ("fault", "status", "code", "part"),
    [
        pytest.param("oom-weights", 1, "out-of-memory", "weights", id="out of memory with the weights"),
        pytest.param("oom-compute", 1, "out-of-memory", "compute", id="out of memory in the first batch"),
        pytest.param("oom-kv", 1, "out-of-memory", "kv", id="out of memory with the KV cache"),
        pytest.param("nccl", 1, "cards-unreachable", None, id="cards that cannot talk"),
        pytest.param("port", 1, "port-in-use", None, id="a port that is said to be taken"),
        pytest.param("no-such-flag", 2, "bad-flag", None, id="a flag it does not know"),
        pytest.param("exit0", 0, "exited", None, id="an end without a word"),
    ],
)
def test_failures_come_on_demand(start: Start, fault: str, status: int, code: str, part: str | None) -> None:
    running = start("-tp", "2", FAKE_FAIL=fault)
    assert running.ended() == status
    failure = BACKEND.diagnose(running.lines(), status)
    assert (failure.code, failure.part) == (code, part)
    until(lambda: not running.members())


def test_it_can_fail_the_first_time_only(start: Start, tmp_path: Path) -> None:
    once = {"FAKE_FAIL": "oom-kv", "FAKE_FAIL_STARTS": f"1:{tmp_path / 'starts'}"}
    assert start(**once).ended() == 1
    assert start(**once).ready()


def test_the_port_is_bound_before_it_listens(start: Start) -> None:
    running = start(wait=False, FAKE_FAIL="hang-loading")
    until(lambda: running.logged("Starting to load model"))
    with pytest.raises(httpx.ConnectError):
        running.request("GET", "/health")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", running.port))


def test_its_processes_are_the_recorded_ones(start: Start) -> None:
    running = start("-tp", "2", cpu=True, VLLM_API_KEY="secret")
    names = list(running.members())
    assert [name for name in names if name.startswith("VLLM")] == [
        "VLLM::EngineCore", "VLLM::Worker_TP0", "VLLM::Worker_TP1"]  # fmt: skip
    assert len(names) == 5
    assert any("multiprocessing.resource_tracker" in name for name in names)
    core = running.worker("EngineCore")
    assert b"secret" not in Path(f"/proc/{core}/environ").read_bytes(), "overwritten with the title"
    assert len([path for path in running.folder.iterdir() if path.is_socket()]) == 11
    (group,) = running.folder.glob("vllm_dist_*")
    kinds = {name: re.sub(r"[0-9a-f]{8,}", "N", name).replace(group.name, "N") for name in running.shared()}
    assert len([kind for kind in kinds.values() if kind.startswith("psm_")]) == 4
    assert len([kind for kind in kinds.values() if kind.startswith("sem.mp-")]) == 2
    assert {name for name in kinds if "cpushm" in name} == {f"{group.name}-tp:0-[0-1]-cpushm_{i}" for i in (0, 1)}
    running.process.terminate()
    assert running.ended() == 0
    until(lambda: not running.members())
    left = {name for name in kinds if (SHARED_MEMORY / name).exists()}
    assert left == {name for name in kinds if "cpushm" in name}, "a clean end leaves the group's, and the sockets"
    assert any(path.is_socket() for path in running.folder.iterdir())


def test_mgpus_reaper_removes_what_a_killed_one_leaves(installed: Installed, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="v", dir="/tmp") as short:
        folder = Path(short) / "tmp"
        folder.mkdir()
        port = free_port()
        argv = [str(installed.cpu), "serve", str(installed.model), "--port", str(port), "-tp", "2"]
        # It loads slowly: what is in /dev/shm before the reaper looks is not the engine's.
        env = {**os.environ, **ON_CPU, "TMPDIR": str(folder), "FAKE_DELAY": "2"}
        engine = EngineProcess.start(argv, env=env, log_path=tmp_path / "engine.log")
        guard = watch(engine.pid, folder)
        running = RunningVllm(process=engine._process, log=tmp_path / "engine.log", port=port, folder=folder)
        until(running.ready)
        made = running.shared()
        assert len(made) == 8
        os.kill(engine.pid, signal.SIGKILL)
        engine._process.wait(LIMIT_S)
        assert len(running.members()) == 4, "they live on without their server"
        guard.close()
        assert running.members() == {}
        assert not [name for name in made if (SHARED_MEMORY / name).exists()]
        assert not folder.exists()
