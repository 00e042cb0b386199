"""Asking an engine what it would hold, with programs that behave as engines should not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mgpu.backends.backend import Launch
from mgpu.errors import EngineFailed, Missing
from mgpu.running.projection import project, work_folder

TABLE = """\
0.1 I common_memory_breakdown_print: | memory breakdown [MiB] | total free self model context compute unaccounted |
0.1 I common_memory_breakdown_print: |   - Host | 6 = 1 + 2 + 3 |
0.1 I common_params_fit_impl: projected to use 6 MiB of host memory
"""


def launch(folder: Path, script: str) -> Launch:
    program = folder / "engine"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return Launch(argv=(str(program), "-dev", "none", "--fit", "off"), env={})


def said(text: str) -> str:
    return f"cat <<'END'\n{text}\nEND\n"


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z"
    except OSError:
        return True


def test_an_engine_is_heard_and_ended(tmp_path: Path) -> None:
    began = time.monotonic()
    found = project(launch(tmp_path, f"echo $$ > {tmp_path}/pid\n{said(TABLE)}\nexec sleep 1000"), tmp_path)
    assert found["host"].total_bytes == 6 << 20
    assert time.monotonic() - began < 10
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_table_that_is_the_last_word_is_heard(tmp_path: Path) -> None:
    assert project(launch(tmp_path, f"{said(TABLE)}\nexit 1"), tmp_path)["host"].kv_bytes == 2 << 20


@pytest.mark.parametrize(
    ("script", "code", "words"),
    [
        pytest.param("exit 3", "exited", "3", id="one that ends"),
        pytest.param("kill -ABRT $$", "crashed", "", id="one that crashes"),
        pytest.param(said("error: invalid argument: --fit") + "exit 1", "bad-flag", "--fit", id="one too old"),
        pytest.param(
            said("W common_fit_params: failed to fit params to free device memory: not for you, abort") + "sleep 1000",
            "projection-refused",
            "not for you",
            id="one that refuses",
        ),
    ],
)
def test_an_engine_that_does_not_answer_is_an_error_with_its_cause(
    tmp_path: Path, script: str, code: str, words: str
) -> None:
    with pytest.raises(EngineFailed) as raised:
        project(launch(tmp_path, script), tmp_path)
    assert raised.value.code == code
    assert words in raised.value.message
    assert raised.value.hint


def test_an_engine_that_says_nothing_is_given_up_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgpu.running.projection._LIMIT_S", 0.5)
    with pytest.raises(EngineFailed) as raised:
        project(launch(tmp_path, f"trap '' TERM\necho $$ > {tmp_path}/pid\nsleep 1000"), tmp_path)
    assert raised.value.code == "stalled"
    assert gone(int((tmp_path / "pid").read_text()))


def test_an_interrupt_leaves_neither_engine_nor_files(tmp_path: Path) -> None:
    script = tmp_path / "engine"
    script.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 1000\n")
    script.chmod(0o755)
    program = (
        "import sys; from mgpu.backends.backend import Launch; from mgpu.running.projection import *\n"
        "with work_folder() as folder:\n"
        f"    project(Launch(argv=({str(script)!r}, '--fit', 'off'), env={{}}), folder)\n"
    )
    room = tmp_path / "room"
    room.mkdir()
    asking = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "TMPDIR": str(room)}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(list(room.iterdir())) == 1
    asking.send_signal(signal.SIGINT)
    asking.wait(30)
    assert list(room.iterdir()) == []
    assert gone(int((tmp_path / "pid").read_text()))


def test_where_nothing_can_be_written_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*arguments: object, **more: object) -> str:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(Missing) as raised, work_folder():
        pass
    assert raised.value.code == "disk-full"
    assert "TMPDIR" in (raised.value.hint or "")
