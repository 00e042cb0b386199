"""`mgpu run --backend ollama` where an Ollama runs already, or something else at its address."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgpu.running import registry
from mgpu.running.ollama_client import OllamaClient
from tests.fakes.devices import free_port
from tests.fakes.ollama_running import MODEL, RunningOllama, running_ollama

from .contract import checked_stream
from .program import LIMIT_S, Mgpu, request, until
from .two_cards import CARDS, settings_of, warnings_of, with_two_cards

ON_TWO = ("--backend", "ollama", "--gpus", "2")
UNKNOWN = "on which cards the model is cannot be seen"


@pytest.fixture
def on_two(mgpu: Mgpu, nvml: dict[str, Path], tmp_path: Path) -> Mgpu:
    return with_two_cards(mgpu, nvml, tmp_path)


@pytest.fixture
def theirs(on_two: Mgpu, tmp_path: Path) -> Iterator[RunningOllama]:
    """An Ollama of the user's own, which has a model and holds it."""
    with running_ollama(tmp_path / "theirs", CARDS) as server:
        with OllamaClient(server.url, keep_alive=None) as client:
            client.pull(MODEL)
            client.create("tiny:q4_k_m", digest_of(server, MODEL))
            client.load(MODEL)
        on_two.environment["OLLAMA_HOST"] = server.url
        yield server


def digest_of(server: RunningOllama, model: str) -> str:
    name, _, tag = model.partition(":")
    manifest = server.models / "manifests/registry.ollama.ai/library" / name / tag
    return str(json.loads(manifest.read_text())["layers"][0]["digest"])


def states(mgpu: Mgpu) -> list[str]:
    records = (registry.read(folder).instance for folder in mgpu.state.iterdir() if folder.is_dir())
    return [record.state.value for record in records if record]


def manifests(server: RunningOllama) -> dict[str, bytes]:
    found = (path for path in (server.models / "manifests").rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in found}


def with_default_port(mgpu: Mgpu, port: int) -> Mgpu:
    """`mgpu` that takes `port` for the one where Ollama usually is: on this machine somebody may have the real one."""
    patched = f"import mgpu.cli.main as m, mgpu.running.ollama_attach as a; a._DEFAULT_PORT = {port}; m.run_main()"
    mgpu.command = lambda *words: [sys.executable, "-c", patched, *map(str, words)]  # type: ignore[method-assign]
    del mgpu.environment["OLLAMA_HOST"]
    return mgpu


def test_an_ollama_that_runs_is_used_and_left_as_it_was(on_two: Mgpu, theirs: RunningOllama, tiny: Path) -> None:
    before, settings = manifests(theirs), settings_of(theirs.process.pid)
    running = on_two.start("run", tiny, *ON_TWO, "--ctx", "6k", "--json", "--interval", "0.1")
    assert running.event("attached")["loaded"] == [MODEL]
    assert running.event("ready")["pid"] is None
    assert running.url() == theirs.url
    running.event("status")
    with OllamaClient(theirs.url, keep_alive=None) as client:
        loaded = {model.name: model.ctx_tokens for model in client.loaded()}
        ended = running.end(signal.SIGINT)
        assert client.is_up()
        assert {model.name for model in client.loaded()} == set(loaded)
    assert loaded == {MODEL: 4096, "mgpu/tiny:q4_k_m": 6144}
    assert ended.exit_code == 130
    assert "started" not in checked_stream(ended)
    by_itself, unknown = warnings_of(ended)
    assert "planned were 2 cards; the Ollama that runs already takes 1 by its own rules" in by_itself
    assert UNKNOWN in unknown
    assert (theirs.process.poll(), settings_of(theirs.process.pid)) == (None, settings)
    after = manifests(theirs)
    assert {path: after.get(path) for path in before} == before
    assert len(after) == len(before) + 1
    on_two.assert_nothing_left()


def test_an_ollama_at_its_usual_address_answers_a_question(on_two: Mgpu, theirs: RunningOllama, tiny: Path) -> None:
    with_default_port(on_two, int(theirs.url.rpartition(":")[2]))
    ended = on_two("run", tiny, *ON_TWO, "--ask", "Hello", MGPU_OLLAMA=None, PATH="/nonexistent")
    assert (ended.exit_code, ended.out.startswith("I am a fake engine")) == (0, True), ended
    assert f"attach   Ollama 0.32.15 at {theirs.url}, which holds {MODEL}; used as it is" in ended.err
    assert re.search(rf"(?m)^warning +{UNKNOWN}", ended.err)
    assert re.search(r"(?m)^ready: tiny on .*not started by mgpu", ended.err)
    assert theirs.process.poll() is None
    on_two.assert_nothing_left()


def test_an_ollama_that_goes_away_while_it_is_followed_is_the_end(
    on_two: Mgpu, theirs: RunningOllama, tiny: Path
) -> None:
    running = on_two.start("run", tiny, *ON_TWO, "--json", "--interval", "0.1")
    running.event("status")
    os.kill(theirs.process.pid, signal.SIGTERM)
    ended = running.end()
    assert ended.exit_code == 4, ended
    assert [error["code"] for error in ended.stream[-1]["errors"]] == ["engine-died"]
    checked_stream(ended)
    on_two.assert_nothing_left()


def test_an_ollama_that_comes_back_is_used_again(on_two: Mgpu, tmp_path: Path, tiny: Path) -> None:
    """As `systemctl restart ollama` has it."""
    with running_ollama(tmp_path / "theirs", CARDS) as first:
        words = ("--restart", "on-failure", "--json", "--interval", "0.1")
        running = on_two.start("run", tiny, *ON_TWO, *words, OLLAMA_HOST=first.url)
        running.event("status")
    until(lambda: states(on_two) == ["restarting"], "it is missed")
    running.process.send_signal(signal.SIGSTOP)  # else an Ollama of mgpu's own may be faster
    with running_ollama(tmp_path / "theirs", CARDS, port=int(first.url.rpartition(":")[2])):
        running.process.send_signal(signal.SIGCONT)
        until(lambda: running.out.count('"event": "ready"') == 2 or running.process.poll() is not None, "ready again")
        ended = running.end(signal.SIGTERM)
    assert (ended.exit_code, ended.event("ready")["url"]) == (130, f"{first.url}/v1"), ended
    on_two.assert_nothing_left()


def test_a_service_manager_hears_of_life_while_a_running_ollama_loads(on_two: Mgpu, tmp_path: Path, tiny: Path) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear,
        running_ollama(tmp_path / "theirs", {**CARDS, "FAKE_FAIL": "slow-load:600"}) as server,
    ):
        ear.bind(str(tmp_path / "notify"))
        ear.settimeout(LIMIT_S)
        systemd = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000"}
        running = on_two.start("run", tiny, *ON_TWO, "--json", **systemd, OLLAMA_HOST=server.url)
        while b": loading" not in ear.recv(65536):
            pass
        signs = 0
        while signs < 3:
            signs += ear.recv(65536) == b"WATCHDOG=1"
        ended = running.end(signal.SIGTERM)
        server.process.kill()  # it would load first
    assert ended.exit_code == 130


def test_an_exported_unit_uses_the_ollama_that_runs_where_it_is(
    on_two: Mgpu, theirs: RunningOllama, tiny: Path
) -> None:
    text = on_two("export", tiny, *ON_TWO, "--as", "systemd", "--json").json["data"]["text"]
    (command,) = re.findall(r"(?m)^ExecStart=\S+ (.*)", text)
    words = shlex.split(command)
    assert "--port" not in words
    running = on_two.start(*words)
    assert running.url() == theirs.url
    assert running.end(signal.SIGTERM).exit_code == 130
    os.kill(theirs.process.pid, signal.SIGTERM)
    theirs.process.wait(LIMIT_S)
    assert "--port" in on_two("export", tiny, *ON_TWO, "--as", "systemd").out


def test_an_ollama_that_goes_away_in_an_answer_is_the_end(on_two: Mgpu, tmp_path: Path, tiny: Path) -> None:
    with running_ollama(tmp_path / "theirs", {**CARDS, "FAKE_TOKENS_PER_SECOND": "10"}) as server:
        running = on_two.start("run", tiny, *ON_TWO, "--ask", "Hello", OLLAMA_HOST=server.url)
        until(lambda: running.out.startswith("I am"), "an answer begins")
        os.kill(server.process.pid, signal.SIGKILL)
        ended = running.end()
    assert ended.exit_code == 4
    assert "error    Ollama closed the connection" in ended.err
    assert ended.out.endswith("\n")


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        pytest.param("load-oom", "out-of-memory", id="a model that is too large"),
        pytest.param("runner-dies", "exited", id="a runner that dies in its first answer"),
    ],
)
def test_what_a_running_ollama_cannot_do_is_explained(
    on_two: Mgpu, tmp_path: Path, tiny: Path, fault: str, code: str
) -> None:
    variables = {**CARDS, "FAKE_FAIL": fault, "FAKE_TOKENS_PER_SECOND": "20"}
    with running_ollama(tmp_path / "theirs", variables) as server:
        ended = on_two("run", tiny, *ON_TWO, "--json", OLLAMA_HOST=server.url)
        assert server.process.poll() is None
    assert (ended.exit_code, [error["code"] for error in ended.stream[-1]["errors"]]) == (4, [code])


def test_another_context_than_the_models_own_is_said(on_two: Mgpu, theirs: RunningOllama, tiny: Path) -> None:
    ended = on_two("run", tiny, *ON_TWO, "--ctx", "16k", "--ask", "Hello", "--json")
    assert any("each user gets 8192 tokens of context instead of the 16384" in each for each in warnings_of(ended))


def test_a_running_ollama_cannot_be_moved_to_another_port(on_two: Mgpu, theirs: RunningOllama, tiny: Path) -> None:
    ended = on_two("run", tiny, *ON_TWO, "--port", "8123")
    assert (ended.exit_code, "--port 8123 cannot move it" in ended.err) == (2, True), ended
    assert "mgpu/tiny" not in str(manifests(theirs))


class TestSomethingElse:
    """At the address of Ollama."""

    @pytest.fixture
    def foreign(self, tmp_path: Path) -> Iterator[RunningOllama]:
        with running_ollama(tmp_path / "foreign", {"FAKE_FAIL": "not-ollama"}) as server:
            yield server

    def test_where_the_user_says_that_ollama_is(self, on_two: Mgpu, foreign: RunningOllama, tiny: Path) -> None:
        ended = on_two("run", tiny, *ON_TWO, "--ask", "Hello", OLLAMA_HOST=foreign.url)
        assert ended.exit_code == 3
        assert f"error    there is no Ollama at {foreign.url}: something else answers there" in ended.err
        assert re.search(r"(?m)^next +unset OLLAMA_HOST", ended.err)

    def test_where_it_usually_is_makes_mgpu_start_its_own(
        self, on_two: Mgpu, foreign: RunningOllama, tiny: Path
    ) -> None:
        with_default_port(on_two, int(foreign.url.rpartition(":")[2]))
        ended = on_two("run", tiny, *ON_TWO, "--ask", "Hello", "--json")
        assert ended.exit_code == 0
        (warning,) = warnings_of(ended)
        assert f"{foreign.url} is not Ollama" in warning
        assert not ended.event("ready")["url"].startswith(foreign.url)
        on_two.assert_nothing_left()

    def test_where_no_other_is_installed(self, on_two: Mgpu, foreign: RunningOllama, tiny: Path) -> None:
        with_default_port(on_two, int(foreign.url.rpartition(":")[2]))
        ended = on_two("run", tiny, *ON_TWO, MGPU_OLLAMA=None, PATH="/nonexistent")
        assert ended.exit_code == 3
        assert "https://ollama.com/download" in ended.err

    def test_that_never_answers(self, on_two: Mgpu, tiny: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
            ended = on_two("run", tiny, *ON_TWO, "--ask", "Hello", OLLAMA_HOST=address)
        assert ended.exit_code == 3
        assert "something listens there and does not answer within 2 s" in ended.err


@pytest.mark.parametrize(
    ("words", "exit_code"),
    [
        pytest.param(ON_TWO, 2, id="who asks for Ollama is told"),
        pytest.param(("--gpus", "2"), 0, id="who does not is not bothered"),
    ],
)
def test_an_address_that_makes_no_sense(on_two: Mgpu, tiny: Path, words: tuple[str, ...], exit_code: int) -> None:
    ended = on_two("run", tiny, *words, "--ask", "Hello", OLLAMA_HOST="ftp://box")
    assert ended.exit_code == exit_code, ended
    assert ("OLLAMA_HOST 'ftp://box' is no address of a server" in ended.err) == (exit_code == 2)


def test_an_address_where_nothing_runs_is_not_where_mgpus_own_listens(on_two: Mgpu, tiny: Path) -> None:
    port = free_port()
    ended = on_two("run", tiny, *ON_TWO, "--ask", "Hello", "--json", OLLAMA_HOST=f"0.0.0.0:{port}")
    assert ended.exit_code == 0
    assert warnings_of(ended) == []
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", ended.event("ready")["url"])
    assert f":{port}/" not in ended.event("ready")["url"]


def test_a_request_goes_to_the_model_by_the_name_that_is_told(on_two: Mgpu, theirs: RunningOllama, tiny: Path) -> None:
    running = on_two.start("run", tiny, *ON_TWO, "--interval", "0.1")
    model = running.line(r"model +clients ask for (\S+)")[1]
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    assert request(running.url(), "/v1/chat/completions", body)[0] == 200
    running.line("ready .*")
    assert running.end(signal.SIGTERM).exit_code == 130
