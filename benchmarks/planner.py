"""What planning costs, and how it grows with cards and models."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from benchmarks.timing import verdict
from mgpu.cli.contenders import contenders
from mgpu.cli.options import PlannerOptions
from mgpu.cli.prepare import ask_about
from mgpu.planning.together import place_together

ROUNDS = 5
BAR_MS = 100.0
CARDS = (1, 2, 4, 8, 16)
MODELS = (1, 2, 4, 5, 10, 20)
# Ten of different sizes, 0.1 to 19 GiB; with more models each comes twice.
PROFILES = (
    "llama-8b", "qwen3-8b", "qwen3-14b", "gpt-oss-20b", "smollm2-135m", "mistral-small-24b", "llama-2-13b",
    "gemma-3-27b", "qwen3-32b", "qwen3-30b-a3b",
)  # fmt: skip


def main() -> None:
    """A 70B with all engines (all candidates, largest contexts), and models together; processor time, after imports."""
    print("one 70B, by cards, for one user and for eight:")
    for options in (PlannerOptions(), PlannerOptions(parallel=8)):
        cells = []
        for cards in CARDS:
            milliseconds = _one("llama-70b", f"{cards}x4090", options)
            cells.append(f"{cards:>2} cards {milliseconds:6.1f} ms")
            if cards == 8:
                cells[-1] += f" (bar {BAR_MS:.0f}: {verdict(milliseconds, BAR_MS)})"
        print(f"  {options.users or 1} user{'s' if options.users else ' '}  " + "   ".join(cells))
    print("several models together, by models and cards:")
    print("          " + "".join(f"{cards:>5} cards" for cards in CARDS) + "   unlike 16")
    unlike = "4090+3090+4080+5090+3060+3080+A100-40+A100-80+4070+4060+A6000+L40S+5080+5070+3070+T4"
    for models in MODELS:
        names = (PROFILES * 2)[:models]
        cells = [_together(names, machine) for machine in (*(f"{cards}x4090" for cards in CARDS), unlike)]
        print(f"{models:>3} models" + "".join(f"{cell:>11}" for cell in cells))
    print("  milliseconds, and how many find room where not all do")


def _one(model: str, machine: str, options: PlannerOptions) -> float:
    (asked,) = ask_about((model,), options, machine=machine)
    return _milliseconds(asked.planned)


def _together(models: Sequence[str], machine: str) -> str:
    asked = ask_about(models, PlannerOptions(), machine=machine)
    wanting = contenders(asked)
    milliseconds = _milliseconds(lambda: place_together(wanting, asked[0].machine), rounds=1)
    placed = sum(each.placed for each in place_together(wanting, asked[0].machine).placements)
    return f"{milliseconds:.0f}" + (f" ({placed})" if placed < len(models) else "")


def _milliseconds(work: Callable[[], object], *, rounds: int = ROUNDS) -> float:
    """Processor time of the median round; one before them pays for the imports."""
    work()
    taken = []
    for _ in range(rounds):
        begun = time.process_time()
        work()
        taken.append(time.process_time() - begun)
    return statistics.median(taken) * 1e3
