"""How long the command line takes to come up."""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.timing import MGPU, interleaved, spread, verdict
from tests.fakes.shapes import SHAPES
from tests.fakes.sparse_gguf import make_sparse_gguf

ROUNDS = 15
BARE_TYPER = """
import typer

app = typer.Typer()


@app.command()
def one(number: int = 1) -> None:
    print(number)


@app.command()
def two(number: int = 1) -> None:
    print(number)


app()
"""


def main() -> None:
    """mgpu --help and mgpu plan (a sparse 70B, this machine) against bare Python and a bare Typer app."""
    with tempfile.TemporaryDirectory() as folder:
        app = Path(folder) / "bare.py"
        app.write_text(BARE_TYPER)
        model = make_sparse_gguf(Path(folder) / "70b.gguf", SHAPES["llama-3.3-70b"], "Q4_K_M")
        seconds = interleaved(
            {
                "python -c pass": [sys.executable, "-c", "pass"],
                "bare Typer --help": [sys.executable, str(app), "--help"],
                "mgpu --help": [str(MGPU), "--help"],
                "mgpu plan 70b.gguf": [str(MGPU), "plan", str(model)],
                "mgpu plan --machine": [str(MGPU), "plan", str(model), "--machine", "2x4090"],
                "mgpu plan PROFILE": [str(MGPU), "plan", "llama-70b", "--machine", "2x4090"],
            },
            rounds=ROUNDS,
        )
    bare = statistics.median(seconds["bare Typer --help"])
    bars = {"mgpu --help": 1.4, "mgpu plan 70b.gguf": 3.0}
    for name, values in seconds.items():
        times = statistics.median(values) / bare
        judged = f"   bar {bars[name]}: {verdict(times, bars[name])}" if name in bars else ""
        print(f"{name:<20} {spread(values)}   {times:.2f} x bare Typer{judged}")
