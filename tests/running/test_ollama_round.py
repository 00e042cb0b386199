"""From a plan to an Ollama that answers, and back to what it really did: with the fake one and, where
MGPU_TEST_OLLAMA names a program, with the real one, on its CPU and on two software Vulkan devices."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from mgpu.backends.backend import Serving
from mgpu.backends.ollama import BACKEND, build_launch
from mgpu.backends.ollama_log import runner_port
from mgpu.backends.ollama_placement import missing_devices, verify_placement
from mgpu.machine.snapshot import Gpu, Host, Machine
from mgpu.models.gguf_facts import facts_from_gguf
from mgpu.planning.candidates import Candidate
from mgpu.planning.ollama_candidates import ollama_candidates
from mgpu.planning.wants import Wants
from mgpu.running.client import Answer
from mgpu.running.ollama_attach import Attached, attach
from mgpu.running.ollama_client import OllamaClient
from mgpu.running.ollama_import import create_from_gguf
from tests.fakes.devices import lavapipe_environment, require_or_skip
from tests.fakes.ollama_running import REAL_OLLAMA, TWO_CARDS, RunningOllama, running_ollama
from tests.fakes.shapes import SHAPES
from tests.fakes.sparse_gguf import make_sparse_gguf

MIB = 1 << 20
# One software device, seen twice.
MASK = {"GGML_VK_VISIBLE_DEVICES": "0,0"}
WANTS = Wants(ctx_tokens=4096)
REAL = os.environ.get(REAL_OLLAMA)
PROGRAMS = [
    pytest.param(None, id="fake"),
    *([pytest.param(Path(REAL), id="real", marks=pytest.mark.real_ollama)] if REAL else []),
]


@dataclass(frozen=True)
class Bench:
    """A program, and a small model it can run."""

    program: Path | None
    model: Path
    folder: Path

    @contextmanager
    def running(
        self, candidate: Candidate, environ: dict[str, str] | None = None, **overridden: str | None
    ) -> Iterator[tuple[RunningOllama, OllamaClient]]:
        """The server that was planned, with some settings `overridden` (None: left out)."""
        serving = Serving(
            program=self.program or Path("ollama"), model="m", name="m", host="127.0.0.1", port=1, folder=self.folder
        )
        env = dict(build_launch(candidate, serving, environ={"HOME": "/", **(environ or {})}).env)
        del env["OLLAMA_HOST"]
        fake = {} if self.program else {"FAKE_DEVICES": TWO_CARDS, "FAKE_FAIL": "amx-lie"}
        settings = {name: value for name, value in (env | fake | overridden).items() if value is not None}
        with (
            running_ollama(self.folder / "server", settings, program=self.program) as server,
            OllamaClient(server.url) as client,
        ):
            yield server, client

    def planned(self, gpus: Sequence[Gpu]) -> Candidate:
        machine = Machine(captured_at="2025-01-01T00:00:00Z", source="simulated", host=Host(), gpus=tuple(gpus))
        return ollama_candidates(facts_from_gguf(self.model), machine, gpus, WANTS)[0]

    def load(self, server: RunningOllama, client: OllamaClient) -> None:
        create_from_gguf(client, "round", self.model, models_folder=server.models)
        client.load("round")


@pytest.fixture(params=PROGRAMS)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    program: Path | None = request.param
    if program is None:
        model = make_sparse_gguf(tmp_path / "model.gguf", SHAPES["smollm2-135m"], "Q4_1")
    else:
        model = request.getfixturevalue("smollm2")
    return Bench(program=program, model=model, folder=tmp_path)


@pytest.fixture
def two_cards(bench: Bench) -> tuple[Gpu, ...]:
    if bench.program is not None:
        require_or_skip(lavapipe_environment() is not None, "Mesa's software Vulkan is not installed")
    return tuple(
        Gpu(
            index=index,
            vendor="other",
            name="llvmpipe",
            total_bytes=2048 * MIB,
            free_bytes=2048 * MIB,
            engine_devices=(f"Vulkan{index}",),
        )
        for index in range(2)
    )


def test_a_file_is_served_on_the_cpu_and_everything_about_it_is_known(bench: Bench) -> None:
    candidate = bench.planned(())
    with bench.running(candidate) as (server, client):
        assert client.is_up()
        assert missing_devices(candidate, server.lines()) is None
        bench.load(server, client)
        (loaded,) = client.loaded()
        assert verify_placement(candidate, server.lines(), loaded) == ()
        before = client.sample(runner_port(server.lines()))
        assert client.canary("round").text
        *_, end = client.chat("round", "Count to ten.")
        assert isinstance(end, Answer)
        assert end.generated_tokens
        assert end.generation_tok_s
        after = client.sample(runner_port(server.lines()))
        assert before is not None
        assert after is not None
        assert (after.generation_tokens_total or 0) > (before.generation_tokens_total or 0)
        found = attach(server.url)
        assert isinstance(found, Attached)
        assert found.loaded is not None
        assert [model.name for model in found.loaded] == ["round:latest"]


def test_two_cards_hold_what_was_planned_for_each(bench: Bench, two_cards: tuple[Gpu, ...]) -> None:
    candidate = bench.planned(two_cards)
    with bench.running(candidate, MASK) as (server, client):
        assert missing_devices(candidate, server.lines()) is None
        bench.load(server, client)
        assert verify_placement(candidate, server.lines(), client.loaded()[0]) == ()
        held = BACKEND.memory(server.lines(), candidate)
        for index, device in enumerate(candidate.devices):
            assert held[index].weights_bytes == pytest.approx(device.weights_bytes, rel=0.05)
            assert held[index].kv_bytes == device.kv_bytes


def test_a_card_that_ollama_does_not_find_is_told_before_anything_is_loaded(
    bench: Bench, two_cards: tuple[Gpu, ...]
) -> None:
    candidate = bench.planned(two_cards)
    with bench.running(candidate, MASK, GGML_VK_VISIBLE_DEVICES="0,7") as (server, client):
        problem = missing_devices(candidate, server.lines())
        assert problem is not None
        assert "no card" in problem
        bench.load(server, client)
        (loaded,) = client.loaded()
        complaints = verify_placement(candidate, server.lines(), loaded)
        assert any("runs on the CPU" in complaint for complaint in complaints)


def test_a_model_on_one_card_of_two_is_complained_about(bench: Bench, two_cards: tuple[Gpu, ...]) -> None:
    candidate = bench.planned(two_cards)
    with bench.running(candidate, MASK, OLLAMA_SCHED_SPREAD=None) as (server, client):
        bench.load(server, client)
        (complaint,) = verify_placement(candidate, server.lines(), client.loaded()[0])
        assert "the whole model is on gpu0; gpu1 holds nothing" in complaint


def test_a_margin_that_keeps_layers_off_the_cards_is_complained_about(bench: Bench, two_cards: tuple[Gpu, ...]) -> None:
    candidate = bench.planned(two_cards)
    with bench.running(candidate, MASK, LLAMA_ARG_FIT_TARGET="1950") as (server, client):
        bench.load(server, client)
        (complaint,) = verify_placement(candidate, server.lines(), client.loaded()[0])
        assert "of 31 layers are on cards" in complaint
