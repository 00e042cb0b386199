"""A real vLLM in two workers, planned, started, watched and ended as mgpu does it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from mgpu.backends.backend import Serving
from mgpu.backends.engine import Engine, engine_environment
from mgpu.backends.samples import Sample
from mgpu.backends.vllm import BACKEND
from mgpu.backends.vllm_log import PHASES, kv_tokens
from mgpu.backends.vllm_program import fit_to_help, installed_version, serve_help
from mgpu.machine.snapshot import Host
from mgpu.models.facts import ModelFacts
from mgpu.models.hf import facts_from_folder
from mgpu.planning.candidates import Candidate
from mgpu.planning.vllm_candidates import vllm_candidates
from mgpu.planning.vllm_memory import VllmWants
from mgpu.planning.vllm_placement import planned_kv_tokens
from mgpu.running.guard import Watch, private_folder, watch
from mgpu.running.process import EngineProcess
from mgpu.units import GIB
from tests.cli.contract import checked_stream
from tests.cli.program import Mgpu, until
from tests.fakes.devices import free_port
from tests.fakes.tiny_llama import make_tiny_llama
from tests.fakes.vllm_environment import real_vllm

pytestmark = pytest.mark.real_vllm

ROOT = Path(__file__).parents[2]
START_LIMIT_S = 300  # 20 s on an idle machine
ANSWER_LIMIT_S = 120  # the first answer compiles
END_LIMIT_S = 30
SECRET = "mgpu-test-secret"
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A vLLM that was just started."""

    facts: ModelFacts
    candidate: Candidate
    engine: EngineProcess
    guard: Watch
    folder: Path
    url: str

    def get(self, path: str) -> str | None:
        with contextlib.suppress(httpx.HTTPError):
            reply = httpx.get(self.url + path, trust_env=False, timeout=10)
            return reply.text if reply.status_code == 200 else None
        return None

    def complete(self, key: str = SECRET, **body: object) -> httpx.Response:
        body = {"model": "tiny", "prompt": "Hello, my name is", "temperature": 0, **body}
        headers = {"Authorization": f"Bearer {key}"}
        url = f"{self.url}/v1/completions"
        return httpx.post(url, json=body, headers=headers, trust_env=False, timeout=ANSWER_LIMIT_S)

    def sample(self) -> Sample:
        found = BACKEND.sample(time.monotonic(), self.get)
        assert found
        return found

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while self.get(BACKEND.ready_path) is None:
            status = self.engine.poll()
            assert status is None, BACKEND.diagnose(self.engine.log_lines(), status)
            assert time.monotonic() < deadline, self.engine.log_lines()[-20:]
            time.sleep(0.2)


def serve(program: Path, folder: Path) -> Served:
    """Start the tiny Llama over two workers, as mgpu would."""
    facts = facts_from_folder(make_tiny_llama(folder / "tiny"))
    wants = VllmWants(tensor_parallel=2, ctx_tokens=1024, parallel=4)
    (candidate,) = vllm_candidates(facts, wants, (), Host(ram_available_bytes=12 * GIB))
    assert candidate.verdict == "fits"
    port = free_port()
    serving = Serving(
        program=program,
        model=str(folder / "tiny"),
        name="tiny",
        host="127.0.0.1",
        port=port,
        folder=folder,
        arguments=("--enforce-eager",),  # compiling takes half a minute, and is not what is tested
        api_key=SECRET,
    )
    launch = BACKEND.launch(candidate, serving)
    found = Engine(backend="vllm", path=program, found_in="test")
    assert fit_to_help(launch, serve_help(found), installed_version(program)) == launch, "it knows every flag"
    temporary = private_folder(Path(launch.env["TMPDIR"]))
    env = engine_environment() | {"HF_HUB_OFFLINE": "1"} | dict(launch.env)
    engine = EngineProcess.start(launch.argv, env=env, log_path=folder / "engine.log")
    return Served(
        facts=facts,
        candidate=candidate,
        engine=engine,
        guard=watch(engine.pid, temporary),
        folder=temporary,
        url=f"http://127.0.0.1:{port}",
    )


def serve_until_killed(program: str, folder: str) -> None:
    """What mgpu is in the test below: it says when the engine is ready, and is killed."""
    served = serve(Path(program), Path(folder))
    served.wait_until_ready()
    print("ready", served.engine.pid, served.guard.pid, served.folder, flush=True)
    signal.pause()


def members(group: int) -> list[str]:
    """The commands of the processes in a group; of those that are gone for good, none."""
    listed = subprocess.run(
        ["ps", "-ww", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    rows = (line.split(None, 2) for line in listed)
    return [row[2] for row in rows if row[0] == str(group) and row[1][0] not in "ZX"]


def shared_files() -> set[str]:
    return {path.name for path in SHARED_MEMORY.iterdir()}


def until_gone(group: int) -> None:
    deadline = time.monotonic() + END_LIMIT_S
    while found := members(group):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    found = serve(real_vllm(), tmp_path)
    try:
        yield found
    finally:
        found.engine.stop(((signal.SIGKILL, END_LIMIT_S),))
        found.guard.close()


def test_from_the_plan_to_a_clean_end(served: Served) -> None:
    before = shared_files()
    served.wait_until_ready()
    log = served.engine.log_lines()
    named = {name.partition(",")[0] for line in log if (name := BACKEND.phase(line))}
    assert named >= set(PHASES) - {"compiling", "capturing CUDA graphs"}
    assert kv_tokens(log) == planned_kv_tokens(served.candidate, served.facts)

    answer: dict[str, Any] = served.complete(max_tokens=8, ignore_eos=True).json()
    assert answer["usage"]["completion_tokens"] == 8
    assert "-tp2-" in answer["system_fingerprint"], "both workers take part"
    assert served.complete(key="wrong", max_tokens=1).status_code == 401
    assert SECRET not in "\n".join(served.engine.log_lines())
    assert SECRET not in " ".join(members(served.engine.pid))

    idle = served.sample()
    assert (idle.running, idle.waiting, idle.kv_used) == (0, 0, 0.0)
    assert (idle.generation_tokens_total, idle.prompt_tokens_total) == (8.0, len("Hello, my name is"))
    assert idle.generation_seconds_total

    long = threading.Thread(target=request_until_broken_off, args=(served,))
    long.start()
    while not (busy := served.sample()).running:
        assert long.is_alive()
    assert busy.running
    assert len(members(served.engine.pid)) >= 4, "a server, a core, two workers"
    assert any(path.is_socket() for path in served.folder.iterdir())
    made = shared_files() - before
    assert made

    begun = time.monotonic()
    status = served.engine.stop(((signal.SIGTERM, BACKEND.stop_grace_s), (signal.SIGKILL, END_LIMIT_S)))
    took_s = time.monotonic() - begun
    served.guard.close()
    long.join(END_LIMIT_S)
    assert not long.is_alive(), "the client hangs on"
    assert status in (0, -signal.SIGKILL)
    assert took_s < BACKEND.stop_grace_s + END_LIMIT_S
    assert members(served.engine.pid) == []
    assert not served.folder.exists()
    assert not shared_files() & made
    with pytest.raises(ProcessLookupError):
        os.kill(served.guard.pid, 0)


def request_until_broken_off(served: Served) -> None:
    with contextlib.suppress(httpx.HTTPError):
        reply = served.complete(max_tokens=900, ignore_eos=True, temperature=1, n=4)
        assert reply.status_code in (200, 500), reply.text


def test_nothing_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    program = real_vllm()
    before = shared_files()
    script = (
        "import sys; from tests.running.test_real_vllm import serve_until_killed; serve_until_killed(*sys.argv[1:])"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", script, str(program), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    with launcher:
        try:
            assert launcher.stdout
            word, engine, guard, folder = launcher.stdout.readline().split(None, 3)
            assert word == "ready"
            made = shared_files() - before
            assert len(members(int(engine))) >= 4
            assert made
        finally:
            launcher.kill()
    until_gone(int(engine))
    until_gone(int(guard))
    assert not Path(folder.strip()).exists()
    assert not shared_files() & made


@pytest.fixture
def mgpu(tmp_path: Path) -> Iterator[Mgpu]:
    """The program itself, with the real engine."""
    program = Mgpu(tmp_path, {"MGPU_VLLM": str(real_vllm()), "HF_HUB_OFFLINE": "1"})
    yield program
    program.end_all()


def assert_run_answers(mgpu: Mgpu, model: Path, *shape: str) -> list[dict[str, Any]]:
    """Type the line, see that two workers answer it and that nothing is left; returns what was checked of each card."""
    before = shared_files()
    asked = ("--ctx", "1024", "--ask", "Hello", "--max-tokens", "8", "--json", "--", "--enforce-eager")
    running = mgpu.start("run", model, *shape, *asked)
    running.process.wait(START_LIMIT_S + ANSWER_LIMIT_S)
    ended = running.end()
    assert ended.exit_code == 0, ended
    steps = ["planned", "started", "loading", "checked", "ready", "answer", "answered", "stopping", "stopped"]
    assert [event for event in dict.fromkeys(checked_stream(ended)) if event != "warning"] == steps
    assert 1 <= ended.event("answered")["generated_tokens"] <= 8
    log = Path(ended.event("started")["log_path"]).read_text()
    assert all(f"(Worker_TP{rank} pid=" in log for rank in range(2)), "both workers take part"
    assert members(ended.event("started")["pid"]) == []
    assert not list(mgpu.state.glob("*/tmp"))
    until(lambda: not shared_files() - before, "no shared memory is left")
    mgpu.assert_nothing_left()
    return list(ended.event("checked")["devices"])


def test_the_whole_program_answers_from_two_workers(mgpu: Mgpu, tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "tiny")
    assert assert_run_answers(mgpu, model, "--tensor-parallel", "2") == []


def test_the_line_for_two_cards_answers_from_two_workers(mgpu: Mgpu, tmp_path: Path, nvml: dict[str, Path]) -> None:
    """The cards are a fake driver's. The engine looks like one for cards, is given all that such a one is given, and
    computes on the CPU."""
    cores = sorted(os.sched_getaffinity(0))
    bind = f"{cores[0]}|{cores[1]}" if len(cores) > 1 else "nobind"
    program = tmp_path / "vllm"
    program.write_text(
        f"#!/bin/sh\nVLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND='{bind}' exec '{real_vllm()}' \"$@\"\n"
    )
    program.chmod(0o755)
    rig = ROOT / "tests" / "machines" / "rigs" / "2x4090-x670e.txt"
    mgpu.environment |= {
        "MGPU_VLLM": str(program),
        "LD_LIBRARY_PATH": str(nvml["new"]),
        "FAKE_NVML": str(rig),
    }
    cards = assert_run_answers(mgpu, make_tiny_llama(tmp_path / "tiny"), "--backend", "vllm", "--gpus", "2")
    assert [card["gpu"] for card in cards] == [0, 1]
