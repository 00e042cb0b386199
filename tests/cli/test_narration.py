"""A supervisor speaks on when its log cannot be written, and supervises on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mgpu.cli.narration import UnfailingFile

ROOT = Path(__file__).parents[2]
NARRATES = """
import sys
from mgpu.cli.narration import keep_talking
from mgpu.cli.output import Output
from mgpu.errors import EngineFailed
out = Output(as_json={as_json})
if {unfailing}:
    keep_talking()
out.note("a step")
out.warn("a warning")
out.write_text("a piece")
out.lines("a line")
out.json_line(dict(a=1))
out.error(EngineFailed("an error"))
sys.stdout.flush()
sys.stderr.flush()
raise SystemExit(7)
"""


def narrated(where: Path, *, unfailing: bool = True, as_json: bool = False) -> int:
    script = NARRATES.format(unfailing=unfailing, as_json=as_json)
    with where.open("ab") as log:
        return subprocess.run([sys.executable, "-c", script], stdout=log, stderr=log, cwd=ROOT, check=False).returncode


@pytest.mark.parametrize("as_json", [pytest.param(False, id="for people"), pytest.param(True, id="for programs")])
def test_a_full_disk_does_not_end_who_speaks(as_json: bool) -> None:
    assert narrated(Path("/dev/full"), as_json=as_json) == 7
    assert narrated(Path("/dev/full"), unfailing=False, as_json=as_json) != 7


def test_what_can_be_written_is(tmp_path: Path) -> None:
    assert narrated(tmp_path / "log") == 7
    assert [
        line for line in (tmp_path / "log").read_text().splitlines() if line.startswith(("a step", "warning "))
    ] == [
        "a step",
        "warning  a warning",
    ]


def test_a_reader_who_has_left_and_a_closed_file_are_not_told_of() -> None:
    read, write = os.pipe()
    os.close(read)
    file = UnfailingFile(write)
    assert file.write(b"unheard") == 7
    os.close(write)
    assert file.write(b"unheard") == 7
