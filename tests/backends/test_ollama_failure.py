"""Why Ollama ended or could not load: recorded logs, and messages of its API."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.backends.failure import LONGEST_MESSAGE
from mgpu.backends.ollama_failure import diagnose, explain_load, explain_pull, load_failure
from mgpu.errors import EngineFailed, MgpuError, Missing

from . import recorded_ollama as recorded

PANIC = ["panic: $HOME is not defined", "", "goroutine 1 [running]:"]


@pytest.mark.parametrize(
    ("lines", "status", "code", "says"),
    [
        pytest.param(
            ["Error: listen tcp 127.0.0.1:11999: bind: address already in use"],
            1,
            "port-in-use",
            "127.0.0.1:11999 is taken by another program",
            id="a port in use",
        ),
        pytest.param(
            ["Error: listen tcp 10.9.8.7:1: bind: cannot assign requested address"],
            1,
            "bad-host",
            "cannot listen on 10.9.8.7:1",
            id="an address of another machine",
        ),
        pytest.param(PANIC, 2, "engine-broken", "HOME is not set", id="no home"),
        pytest.param(["panic: runtime error: index out of range"], 2, "crashed", "index out of range", id="a panic"),
        pytest.param(
            ["Error: mkdir /srv/models: permission denied"], 1, "engine-broken", "permission denied", id="a folder"
        ),
        pytest.param(
            ["ollama: error while loading shared libraries: libgcc_s.so.1: cannot open"],
            127,
            "engine-broken",
            "libgcc_s.so.1",
            id="a missing library",
        ),
        pytest.param(recorded.lines("nollama"), -15, "engine-broken", "without its llama-server", id="no llama-server"),
        pytest.param(recorded.lines("kvq8"), -9, "split-unsupported", "row split", id="a load that failed"),
        pytest.param(recorded.lines("sig1"), 0, "stopped", "asked to stop", id="a polite end from outside"),
        pytest.param(recorded.lines("spread"), -9, "killed", "SIGKILL", id="killed while it served"),
        pytest.param([], 0, "exited", "ended by itself", id="an end without a word"),
        pytest.param(["Error: something new"], 1, "exited", "something new", id="an unknown error"),
        pytest.param([], None, "exited", "is gone", id="gone"),
    ],
)
def test_an_end_has_a_cause(lines: list[str], status: int | None, code: str, says: str) -> None:
    failure = diagnose(lines, status)
    assert failure.code == code
    assert says in failure.message
    assert len(failure.message) <= LONGEST_MESSAGE


def test_the_decisive_line_is_named() -> None:
    failure = diagnose(["something", *PANIC], 2)
    assert (failure.line_number, failure.line) == (2, PANIC[0])


@pytest.mark.parametrize(
    ("name", "code"),
    [
        pytest.param("kvq8", "split-unsupported", id="an error of the runner"),
        pytest.param("nollama", "engine-broken", id="no runner at all"),
        pytest.param("spread", None, id="a load that went well"),
        pytest.param("rk", None, id="a runner that died and was started again"),
        pytest.param("pull", None, id="nothing loaded"),
    ],
)
def test_a_failed_load_is_found_in_the_log(name: str, code: str | None) -> None:
    failure = load_failure(recorded.lines(name))
    assert (failure.code if failure else None) == code


def test_a_runner_that_was_killed_is_found_in_the_log() -> None:
    lines = recorded.lines("rk")
    last = max(i for i, line in enumerate(lines) if "no longer running" in line)
    failure = load_failure(lines[: last + 1])
    assert failure is not None
    assert (failure.code, failure.deterministic) == ("killed", False)
    assert "Ollama's llama-server was killed" in failure.message


@pytest.mark.parametrize(
    ("text", "kind", "code", "says"),
    [
        pytest.param("model 'nope' not found", Missing, "not-found", "nope", id="a missing model"),
        pytest.param('{"error":"model \'nope\' not found"}', Missing, "not-found", "nope", id="as JSON"),
        pytest.param(
            '{"error":{"message":"model \'nope\' not found","type":"not_found_error"}}',
            Missing,
            "not-found",
            "nope",
            id="as OpenAI's JSON",
        ),
        pytest.param(
            "llama-server process has terminated: exit status 1: error loading model: unknown model architecture: 'x'",
            EngineFailed,
            "architecture-unknown",
            "'x'",
            id="an architecture",
        ),
        pytest.param(
            "llama-server process has terminated: signal: killed", EngineFailed, "killed", "SIGKILL", id="a kill"
        ),
        pytest.param(
            "llama-server process has terminated: exit status 1: CUDA error: out of memory",
            EngineFailed,
            "out-of-memory",
            "memory",
            id="out of memory",
        ),
        pytest.param(
            "model requires more system memory (41.2 GiB) than is available (21.5 GiB)",
            EngineFailed,
            "host-out-of-memory",
            "41.2 GiB wanted, 21.5 GiB available",
            id="out of RAM",
        ),
        pytest.param(
            "timed out waiting for llama-server to start - progress 0.00 - ",
            EngineFailed,
            "stalled",
            "no progress",
            id="a load that stands still",
        ),
        pytest.param(
            "llama-server binary not found (checked: /a, /b)", EngineFailed, "engine-broken", "without", id="no runner"
        ),
        pytest.param(
            'option "num_gpu" must be of type integer', EngineFailed, "load-failed", "num_gpu", id="an option"
        ),
        pytest.param("", EngineFailed, "load-failed", "could not load", id="nothing"),
    ],
)
def test_what_ollama_answers_to_a_load_has_a_cause(text: str, kind: type[MgpuError], code: str, says: str) -> None:
    error = explain_load("nope", text)
    assert type(error) is kind
    assert (error.code, says in error.message) == (code, True)


@pytest.mark.parametrize(
    ("text", "kind", "code"),
    [
        pytest.param("pull model manifest: file does not exist", Missing, "not-found", id="unknown"),
        pytest.param(
            'pull model manifest: Get "https://registry.ollama.ai/v2/": dial tcp: lookup ollama.ai: no such host',
            Missing,
            "hub-unreachable",
            id="no network",
        ),
        pytest.param("write /m/blobs/x: no space left on device", Missing, "disk-full", id="a full disk"),
        pytest.param(
            'pull model manifest: 400: {"error":"The specified repository contains sharded GGUF."}',
            Missing,
            "split-model",
            id="a split model",
        ),
        pytest.param(
            "pull model manifest: 412: The model you are attempting to pull requires a newer version of Ollama.",
            EngineFailed,
            "engine-too-old",
            id="too new a model",
        ),
        pytest.param("digest mismatch", EngineFailed, "pull-failed", id="anything else"),
    ],
)
def test_what_ollama_answers_to_a_pull_has_a_cause(text: str, kind: type[MgpuError], code: str) -> None:
    error = explain_pull("smollm2:135m", text)
    assert (type(error), error.code) == (kind, code)
    assert len(error.message) <= LONGEST_MESSAGE


@given(st.lists(st.text(max_size=100) | st.sampled_from(recorded.lines("kvq8")), max_size=20), st.integers(-64, 255))
def test_no_log_is_too_strange_to_be_explained(lines: list[str], status: int) -> None:
    assert diagnose(lines, status).message
    load_failure(lines)
    for line in lines:
        explain_load("m", line)
        explain_pull("m", line)
