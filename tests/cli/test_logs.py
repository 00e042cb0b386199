"""`mgpu logs`: of those that run and of the dead, once and following."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from .contract import TEXT, checked, exactly, listed
from .program import Mgpu, until

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
