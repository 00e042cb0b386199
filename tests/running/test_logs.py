"""Logs that a real program writes to without end: they stay small, lose no line, and can be followed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mgpu.running import logs
from mgpu.running.logs import follow, keep_first, keep_small
from mgpu.running.process import EngineProcess

MOST_BYTES = 1 << 20
BURST = 4000  # lines of 40 bytes: less than stays when the middle is taken out
WRITER = """
import os, sys
number = 0
for _ in sys.stdin:
    for number in range(number, number + 4000):
        os.write(1, b"line %08d of what an engine may say\\n" % number)
    number += 1
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_POLL_S", 0.001)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "engine.log"


@pytest.fixture
def writer(log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program that writes a burst of lines for each line that it is told, as an engine does: by appending."""
    with log.open("ab") as out, subprocess.Popen([sys.executable, "-c", WRITER], stdin=-1, stdout=out) as process:
        yield process
        process.kill()


def burst(writer: subprocess.Popen[bytes]) -> None:
    assert writer.stdin
    writer.stdin.write(b"go on\n")
    writer.stdin.flush()


def numbers(lines: list[str]) -> list[int]:
    return [int(line.split()[1]) for line in lines if line.startswith("line ")]


def never() -> bool:
    return False


def all_lines(path: Path, last: int | None = None) -> list[str]:
    return list(follow(path, lambda: True, last_lines=last))


def test_a_log_stays_small_and_whoever_follows_it_misses_nothing(log: Path, writer: subprocess.Popen[bytes]) -> None:
    bursts, followed, taken = 40, follow(log, never), 0
    for number in range(bursts):
        burst(writer)
        for expected in range(number * BURST, (number + 1) * BURST):
            assert next(followed) == f"line {expected:08} of what an engine may say\n"
            if expected % 50 == 0:  # while it writes
                taken += keep_small(log, MOST_BYTES)
        assert log.stat().st_blocks * 512 < 1.5 * MOST_BYTES
    assert taken > 5
    assert log.stat().st_size > 5 * MOST_BYTES
    lines = all_lines(log)
    (mark,) = (at for at, line in enumerate(lines) if "mgpu has taken" in line)
    first, last = numbers(lines[:mark]), numbers(lines[mark:])
    assert first == list(range(len(first)))
    assert last == list(range(last[0], bursts * BURST))
    assert len(first) > MOST_BYTES / 8 / 40 - 1
    assert len(last) > MOST_BYTES / 2 / 40 - 1
    assert set(lines) - {lines[mark], "\n"} == {f"line {n:08} of what an engine may say\n" for n in (*first, *last)}


def test_a_reader_of_the_log_has_its_beginning_and_its_end(log: Path, writer: subprocess.Popen[bytes]) -> None:
    followed = follow(log, never)
    for number in range(20):
        burst(writer)
        while numbers([next(followed)])[0] != number * BURST + BURST - 1:
            pass
        keep_small(log, MOST_BYTES)
    found = numbers(EngineProcess(writer, log).log_lines())
    assert (found[0], found[-1]) == (0, 20 * BURST - 1)


def test_where_no_hole_can_be_made_the_last_part_is_kept_beside(
    log: Path, writer: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_punch", lambda *_: False)
    followed, kept = follow(log, never), log.with_name("engine.log.1")
    for number in range(7):
        burst(writer)
        while numbers([next(followed)])[0] != number * BURST + BURST - 1:
            pass
    assert keep_small(log, MOST_BYTES)
    assert (kept.stat().st_mode & 0o777, len(list(log.parent.iterdir()))) == (0o600, 2)
    burst(writer)
    again = next(followed)  # it begins anew
    while numbers([again])[0] != 8 * BURST - 1:
        again = next(followed)
    head, tail = numbers(all_lines(kept)), numbers(all_lines(log))
    beginning = tail[: len(tail) - BURST]
    assert [*beginning, *head, *tail[-BURST:]] == list(range(8 * BURST))
    assert log.stat().st_size < MOST_BYTES / 2


def test_what_is_small_or_no_log_is_left_alone(log: Path, tmp_path: Path) -> None:
    assert not keep_small(log, 10)
    log.write_bytes(b"x\n" * 50)
    assert not keep_small(log, 100)
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(log)
    os.mkfifo(pipe)
    assert [keep_small(path, 10) for path in (link, pipe, tmp_path)] == [False, False, False]
    assert log.read_bytes() == b"x\n" * 50


Step = Callable[[Path], object]


def says(text: str | bytes) -> Step:
    def append(log: Path) -> None:
        with log.open("ab") as file:
            file.write(text.encode() if isinstance(text, str) else text)

    return append


def rotate(log: Path) -> None:
    log.replace(log.with_name("engine.log.1"))


def truncate(log: Path) -> None:
    os.truncate(log, 0)


@pytest.mark.parametrize(
    ("steps", "lines"),
    [
        pytest.param([], [], id="no log"),
        pytest.param([says("a\nb\n"), says("c\n")], ["a\n", "b\n", "c\n"], id="lines"),
        pytest.param([says(""), says("a\n")], ["a\n"], id="an empty one first"),
        pytest.param([says("half "), says("a line\n")], ["half a line\n"], id="a line in two parts"),
        pytest.param([says("a\n"), says("no end")], ["a\n", "no end"], id="the last line without an end"),
        pytest.param([says("a\nb"), rotate, says("c\n")], ["a\n", "b", "c\n"], id="replaced by another"),
        pytest.param([says("a\n"), rotate, says("a\n"), rotate], ["a\n", "a\n"], id="moved away"),
        pytest.param([says("abc\n"), truncate, says("d\n")], ["abc\n", "d\n"], id="truncated"),
        pytest.param([says("1%\r2%\r"), says("\n3\r"), says("4\n")], ["1%\r", "2%\r\n", "3\r", "4\n"], id="progress"),
        pytest.param([says(b"\xff\0\xc3"), says(b"\xa9\n")], ["\ufffdé\n"], id="no text"),
        pytest.param([says("x" * 3_000_000)], ["x" * (2**20 + 2**16)] * 2 + ["x" * 771_776], id="a line without end"),
    ],
)
def test_a_log_is_followed_whatever_happens_to_it(log: Path, steps: list[Step], lines: list[str]) -> None:
    left = iter([step for each in steps for step in (each, None)])  # a look at the log between any two

    def is_over() -> bool:
        for step in left:
            if step:
                step(log)
            return False
        return True

    assert list(follow(log, is_over)) == lines


@pytest.mark.parametrize(
    ("text", "last", "lines"),
    [
        ("a\nb\nc\n", 2, ["b\n", "c\n"]),
        ("a\nb\nc", 2, ["b\n", "c"]),
        ("a\nb\n", 9, ["a\n", "b\n"]),
        ("a\n", 0, []),
        ("", 3, []),
        ("\n\n", 1, ["\n"]),
        ("a\n" * 100_000 + "b\n", 2, ["a\n", "b\n"]),
        ("a\n" + "b" * 200_000 + "\n", 1, ["b" * 200_000 + "\n"]),
    ],
)
def test_the_last_lines(log: Path, text: str, last: int, lines: list[str]) -> None:
    log.write_text(text)
    assert all_lines(log, last) == lines


def test_the_last_lines_of_a_log_with_a_huge_hole_take_no_time(log: Path) -> None:
    with log.open("wb") as file:
        file.write(b"first\n")
        file.seek(1 << 40)
        file.write(b"\nlast\n")
    assert all_lines(log, 1) == ["last\n"]
    assert all_lines(log, 99) == ["first\n", "\n", "last\n"]


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        pytest.param(
            [says("the crash\n"), keep_first, rotate, says("later\n"), rotate], "the crash\n", id="rotated away"
        ),
        pytest.param([says("old\n"), keep_first, rotate, says("new\n"), keep_first], "new\n", id="a later first one"),
        pytest.param([says("old\n"), keep_first, rotate, says(""), keep_first], "old\n", id="an empty one is none"),
        pytest.param([keep_first], None, id="no log"),
        pytest.param([lambda log: log.symlink_to("/etc/hostname"), keep_first], "link", id="a link is kept as one"),
    ],
)
def test_the_log_of_a_first_failure_is_kept(log: Path, steps: list[Step], kept: str | None) -> None:
    for step in steps:
        step(log)
    found = log.with_name(f"{log.name}.first")
    if kept == "link":
        assert found.is_symlink()
    else:
        assert (found.read_text() if found.exists() else None) == kept
    assert not log.with_name(f"{log.name}.first.new").exists()
