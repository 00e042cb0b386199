"""`mgpu logs`: of those that run and of the dead, once and following."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from .contract import TEXT, checked, exactly, listed
from .program import Mgpu, until
from .records import engine, record, supervisor

WHOLE = exactly(name=TEXT, log_path=TEXT, lines=listed(TEXT))
LINE = exactly(name=TEXT, line=TEXT)


def dead(mgpu: Mgpu, name: str, text: str | None = "one\ntwo\nthree\n") -> Path:
    """An instance that was."""
    folder = mgpu.state / name
    folder.mkdir(parents=True, mode=0o700)
    (folder / "lock").touch()
    if text is not None:
        (folder / "engine.log").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("words", "out"),
    [
        pytest.param((), "one\ntwo\nthree\n", id="all of it"),
        pytest.param(("--lines", "2"), "two\nthree\n", id="the last lines"),
        pytest.param(("-n", "0"), "", id="nothing"),
        pytest.param(("-f",), "one\ntwo\nthree\n", id="nothing more comes of the dead"),
    ],
)
def test_the_log_of_the_dead(mgpu: Mgpu, words: tuple[str, ...], out: str) -> None:
    dead(mgpu, "llama")
    ended = mgpu("logs", "llama", *words)
    assert (ended.exit_code, ended.out, ended.err) == (0, out, "")


def test_the_text_is_as_the_engine_wrote_it(mgpu: Mgpu) -> None:
    text = "\033[1mbold[/bold]\033[0m\ttab\r10%\r20%\nno end é"
    dead(mgpu, "llama", text)
    assert mgpu("logs", "llama").out.encode() == text.encode().replace(b"\r", b"\n")  # read as text, here
    assert mgpu("logs", "llama", "--json").json["data"]["lines"][1:] == ["10%", "20%", "no end é"]


def test_json_is_one_object_and_a_stream_of_them_where_it_follows(mgpu: Mgpu) -> None:
    dead(mgpu, "llama")
    whole = checked(mgpu("logs", "llama", "--json").json, "logs", WHOLE)
    assert whole["lines"] == ["one", "two", "three"]
    stream = mgpu("logs", "llama", "-f", "-n", "2", "--json").stream
    assert [checked(entry, "logs", LINE)["line"] for entry in stream] == ["two", "three"]


def test_following_ends_with_the_instance(mgpu: Mgpu, tiny: Path) -> None:
    running = mgpu.start("run", tiny)
    running.line("start ")
    follower = mgpu.start("logs", "tiny", "-f")
    until(lambda: "listening" in follower.out, "what the engine says when it is ready")
    assert follower.process.poll() is None
    running.end(signal.SIGINT)
    ended = follower.end()
    assert ended.exit_code == 0
    assert ended.out == (mgpu.state / "tiny" / "engine.log").read_text() == mgpu("logs", "tiny").out


def test_what_an_orphan_writes_is_followed_too(mgpu: Mgpu) -> None:
    script = "echo up; while ! read -r _ < go; do sleep 0.01; done; echo more; exec sleep 600"
    folder = record("llama")
    with engine(mgpu, "llama", f"cd {folder}; touch go; {script}") as process:
        follower = mgpu.start("logs", "llama", "-f")
        until(lambda: "up" in follower.out, "what was there before")
        (folder / "go").write_text("go\n")
        until(lambda: "more" in follower.out, "what comes")
        assert follower.process.poll() is None
        process.kill()
        assert follower.end().exit_code == 0


def test_ctrl_c_ends_the_following_and_not_the_engine(mgpu: Mgpu, tiny: Path) -> None:
    running = mgpu.start("run", tiny)
    running.url()
    follower = mgpu.start("logs", "tiny", "-f", "--json")
    until(lambda: follower.out, "the first line")
    ended = follower.end(signal.SIGINT)
    assert (ended.exit_code, ended.stream[-1]["exit_code"]) == (130, 130)
    assert running.process.poll() is None
    running.end(signal.SIGINT)


@pytest.mark.parametrize(
    ("name", "code", "hint"),
    [
        pytest.param("lama-8b", "unknown-instance", "mgpu logs llama-8b", id="a slip"),
        pytest.param("cleared", "unknown-instance", "mgpu logs llama-8b", id="one that was cleared"),
        pytest.param("../mgpu/llama-8b", "unknown-instance", "mgpu logs llama-8b", id="a path"),
        pytest.param("x" * 9999, "unknown-instance", "mgpu logs llama-8b", id="a long one"),
        pytest.param("silent", "no-log", "mgpu logs silent --supervisor", id="one whose engine never began"),
    ],
)
def test_what_has_no_log_is_no(mgpu: Mgpu, name: str, code: str, hint: str) -> None:
    dead(mgpu, "llama-8b")
    dead(mgpu, "cleared", None)
    (dead(mgpu, "silent", None) / "instance.json").write_text("damaged")
    ended = mgpu("logs", name, "--json")
    (error,) = ended.json["errors"]
    assert (ended.exit_code, error["code"]) == (1, code)
    assert hint in error["hint"]
    assert len(error["message"]) < 200


def test_what_mgpu_said_of_a_detached_instance(mgpu: Mgpu) -> None:
    (dead(mgpu, "llama", None) / "supervisor.log").write_text("plan     llama.cpp\n")
    (mgpu.state / "llama" / "instance.json").touch()
    assert mgpu("logs", "llama", "--supervisor").out == "plan     llama.cpp\n"


@pytest.mark.parametrize(
    ("words", "out"),
    [
        pytest.param(("--first",), "the first failure\n", id="of the first failure"),
        pytest.param(("--previous",), "the run before\n", id="of the run before"),
        pytest.param(("--previous", "-f"), "the run before\n", id="nothing more comes there"),
        pytest.param(("--supervisor", "--previous"), "the mgpu before\n", id="of mgpu before"),
    ],
)
def test_logs_that_were_kept(mgpu: Mgpu, words: tuple[str, ...], out: str) -> None:
    with supervisor(mgpu, "llama") as folder:
        (folder / "engine.log").write_text("now\n")
        (folder / "engine.log.first").write_text("the first failure\n")
        (folder / "engine.log.1").write_text("the run before\n")
        (folder / "supervisor.log.1").write_text("the mgpu before\n")
        ended = mgpu("logs", "llama", *words)
    assert (ended.exit_code, ended.out, ended.err) == (0, out, "")


@pytest.mark.parametrize(
    ("words", "exit_code", "hint"),
    [
        pytest.param(("--first",), 1, "mgpu logs llama", id="nothing has failed"),
        pytest.param(("--previous",), 1, "mgpu logs llama", id="the first run"),
        pytest.param(("--supervisor", "--previous"), 1, "mgpu logs llama --supervisor", id="the first mgpu"),
        pytest.param(("--first", "--previous"), 2, "mgpu logs llama --first", id="two of them"),
        pytest.param(("--first", "--supervisor"), 2, "mgpu logs llama --first", id="what mgpu does not keep"),
    ],
)
def test_logs_that_were_not_kept(mgpu: Mgpu, words: tuple[str, ...], exit_code: int, hint: str) -> None:
    dead(mgpu, "llama")
    ended = mgpu("logs", "llama", *words, "--json")
    assert (ended.exit_code, ended.json["errors"][0]["hint"]) == (exit_code, hint)


def test_a_log_that_cannot_be_read_is_said_so(mgpu: Mgpu) -> None:
    (dead(mgpu, "llama", None) / "instance.json").touch()
    (mgpu.state / "llama" / "engine.log").mkdir()
    assert mgpu("logs", "llama").exit_code == 1


def test_a_reader_that_leaves_is_no_failure(mgpu: Mgpu) -> None:
    dead(mgpu, "llama", "many lines\n" * 100_000)
    with mgpu.piped("logs", "llama") as reader:
        assert reader.stdout
        assert reader.stderr
        reader.stdout.readline()
        reader.stdout.close()
        assert (reader.wait(), reader.stderr.read()) == (0, b"")
