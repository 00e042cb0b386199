"""What a diagnosis costs."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.timing import MGPU, interleaved, spread, verdict
from tests.doctor.rigged import REPOSITORY, environment

ROUNDS = 9
BAR_S = 2.0
RIGS = ("8xh100-sxm", "2x4090-x670e", "no-card")

# The whole program in one process that notes what it opens and starts.
AUDITED = """
import contextlib, io, json, os, runpy, sys

opened, started = [], []

def note(event, arguments):
    if event == "open" and not isinstance(arguments[0], int):
        opened.append(os.fsdecode(arguments[0]))
    elif event == "subprocess.Popen":
        started.append(str(arguments[0]))

sys.argv = ["mgpu", "doctor"]
sys.addaudithook(note)
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    runpy.run_module("mgpu", run_name="__main__")
root = os.environ["MGPU_ROOT"] + "/"
print(json.dumps({"machine": sum(path.startswith(root) for path in opened), "all": len(opened), "started": started}))
"""


def main() -> None:
    """A default `mgpu doctor` on eight cards, two and none (a fake driver, a fake root): time, and files opened."""
    with tempfile.TemporaryDirectory() as place:
        library = Path(place) / "driver"
        library.mkdir()
        build = [sys.executable, str(REPOSITORY / "tests/fakes/nvml/build.py"), str(library), "--new"]
        subprocess.run(build, check=True, capture_output=True)
        variables: dict[str, dict[str, str]] = {}
        for name in RIGS:
            folder = Path(place) / name
            folder.mkdir()
            variables[name] = environment(name, folder, library)
        commands = {
            name: ["env", "-i", *(f"{key}={value}" for key, value in each.items()), str(MGPU), "doctor"]
            for name, each in variables.items()
        }
        seconds = interleaved(commands, rounds=ROUNDS)
        for name, values in seconds.items():
            opened = _opened(variables[name])
            median = statistics.median(values)
            judged = f"   bar {BAR_S} s: {verdict(median, BAR_S)}, {median / BAR_S:.0%} of it"
            print(f"{name:<14} {spread(values)}{judged if name == RIGS[0] else ''}")
            print(f"{'':<14} {opened['machine']} files of the machine, {opened['all']} with Python's own", end="")
            print(f"; programs started: {len(opened['started'])}")


def _opened(variables: dict[str, str]) -> dict[str, Any]:
    ended = subprocess.run([sys.executable, "-c", AUDITED], env=variables, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(ended.stdout)
    return found
