"""The kernel's log from systemd's journal: the same lines with the same ages, or the reason why it is unknown."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgpu.machine import journal, kernel_log
from mgpu.machine.inspection import LogEntry
from mgpu.machine.kernel_log import read_kernel_log
from tests.fakes.sysfs_tree import SysfsTree

CARD = "0000:01:00.0"
XID = "NVRM: Xid (PCI:0000:01:00): 79, pid=1, name=python3, GPU has fallen off the bus."
HINT = "Hint: You are currently not seeing messages from other users and the system."
REFUSED = "No journal files were opened due to insufficient permissions."

Journal = Callable[..., Path]


def line(message: object, at_us: object = "400000000", **others: object) -> str:
    fields = {"MESSAGE": message, "_SOURCE_MONOTONIC_TIMESTAMP": at_us, "__MONOTONIC_TIMESTAMP": "1", **others}
    return json.dumps({name: value for name, value in fields.items() if value is not None})


@pytest.fixture
def journalctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Journal:
    """journalctl(output, complaint=, exit_code=, body=) puts a program of that name first on PATH, and gives a root
    with a journal and without the kernel's device; `asked` beside the root has the program's words."""

    def write(output: str = "", *, complaint: str = "", exit_code: int = 0, body: str = "") -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (tmp_path / "output").write_text(output)
        body = body or f"cat {shlex.quote(str(tmp_path / 'output'))}; echo {shlex.quote(complaint)} >&2"
        program = folder / "journalctl"
        program.write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$LC_ALL" "$@" > {shlex.quote(str(tmp_path / "asked"))}\n{body}\n'
            f"exit {exit_code}\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        files: dict[str, str | bytes] = {"var/log/journal/5c3f/system.journal": "", "proc/uptime": "1000.00 1.0\n"}
        return SysfsTree(tmp_path / "root").files(files).root

    return write


def test_where_the_device_is_closed_the_journal_is_read(journalctl: Journal, tmp_path: Path) -> None:
    root = journalctl("\n".join([line("Linux version 6.8.0", "0"), line(XID), line("usb 1-1: new", "400000001")]))
    found = read_kernel_log(root)
    assert found == ((LogEntry(kind="xid", text=XID, age_s=600.0, number=79, bus_id=CARD),), True, ())
    language, *words = (tmp_path / "asked").read_text().split()
    assert language == "C"
    assert {"-k", "-b", "--no-pager", "json", f"--directory={root}/var/log/journal"} <= set(words)


def test_the_device_comes_first(journalctl: Journal, tmp_path: Path) -> None:
    root = journalctl(line(XID))
    SysfsTree(root).files({"dev/kmsg": "6,1,0,-;Linux version 6.8.0\n"})
    assert read_kernel_log(root) == ((), True, ())
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize(
    ("entry", "text", "age_s"),
    [
        pytest.param(line(list(XID.encode())), XID, 600.0, id="a text as bytes, as of what cannot be printed"),
        pytest.param(line(XID, None), XID, None, id="no time"),
        pytest.param(line(XID, "soon"), XID, None, id="a time that is none"),
        pytest.param(line(XID, "1000500000"), XID, 0.0, id="a moment ahead of the clock"),
        pytest.param(line(XID, "9" * 30), XID, None, id="a time beyond all clocks"),
    ],
)
def test_an_entry_is_as_it_was_logged(journalctl: Journal, entry: str, text: str, age_s: float | None) -> None:
    (found,) = read_kernel_log(journalctl(entry))[0]
    assert (found.text, found.age_s) == (text, age_s)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        pytest.param({"complaint": HINT}, "none of the groups", id="only this user's own messages"),
        pytest.param({"output": line("x"), "complaint": HINT}, "none of the groups", id="not all messages"),
        pytest.param({"complaint": REFUSED, "exit_code": 1}, "none of the groups", id="no file may be opened"),
        pytest.param({}, "no message of the kernel", id="nothing"),
        pytest.param({"output": "-- No entries --\n"}, "no message of the kernel", id="no entry"),
        pytest.param({"output": "\x00{]\n[]\n7\n" + "[" * 99_999}, "no message of the kernel", id="no JSON"),
        pytest.param({"output": line(None) + "\n" + line([300])}, "no message of the kernel", id="no text"),
        pytest.param({"exit_code": 1}, "no message of the kernel", id="a program that fails"),
        pytest.param({"body": "exec sleep 600"}, "no answer", id="a program that hangs"),
        pytest.param({"body": "sleep 600 & exec sleep 600"}, "no answer", id="a program that leaves another behind"),
    ],
)
def test_a_journal_that_proves_nothing_is_unknown_and_never_clean(
    journalctl: Journal, monkeypatch: pytest.MonkeyPatch, said: dict[str, object], why: str
) -> None:
    monkeypatch.setattr(journal, "PATIENCE_S", 0.5 if "body" in said else 10.0)
    started = time.monotonic()
    entries, known, (unread,) = read_kernel_log(journalctl(**said))
    assert time.monotonic() - started < 10
    assert (entries, known, unread.what) == ((), False, "/dev/kmsg")
    assert why in unread.why


@pytest.mark.parametrize(
    ("folder", "why"),
    [
        pytest.param(None, "keeps no journal", id="no journal"),
        pytest.param("var/log/journal/5c3f/system.journal", "journalctl is not installed", id="no journalctl"),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str | None, why: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    SysfsTree(tmp_path).files({folder: ""} if folder else {})
    (unread,) = read_kernel_log(tmp_path)[2]
    assert why in unread.why


def test_on_this_computer_ages_are_by_its_own_clock(
    journalctl: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> tuple[bytes, bool]:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(kernel_log, "_kernel_messages", refuse)
    monkeypatch.setattr(journal, "_has_entries", lambda _: True)
    now_us = int(time.monotonic() * 1e6)
    journalctl("\n".join([line("Linux version 6.8.0", "0"), line(XID, str(max(now_us - 5_000_000, 0)))]))
    (entry,) = read_kernel_log(Path("/"))[0]
    assert entry.age_s is not None
    assert 5 <= entry.age_s < 60
    assert "--directory" not in (tmp_path / "asked").read_text()


def test_of_a_flood_the_newest_lines_are_asked_for(journalctl: Journal, tmp_path: Path) -> None:
    root = journalctl("\n".join([line(XID)] * 10_000))
    assert len(read_kernel_log(root)[0]) == 32
    words = (tmp_path / "asked").read_text().split()
    assert words[words.index("-n") + 1] == "10000"


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=100).map(lambda text: line(text).encode()))
def test_whatever_a_line_holds_it_is_a_record_or_nothing(content: bytes) -> None:
    record = journal._record(content)
    assert record is None or isinstance(record[1], str)
