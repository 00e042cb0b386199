"""How planning grows with layers and cards."""

from __future__ import annotations

import statistics
import time

from mgpu.machine.simulate import simulate
from mgpu.machine.snapshot import Machine
from mgpu.models.facts import ModelFacts
from mgpu.models.shape import facts_from_shape
from mgpu.planning.plan import make_plan
from mgpu.planning.wants import Wants
from tests.fakes.shapes import SHAPES, resized

LAYERS = (16, 32, 64, 126)
CARDS = (1, 2, 4, 8, 16)
ROUNDS = 5


def main() -> None:
    """Milliseconds for a whole plan (all candidates, largest context), without imports."""
    print("layers  " + "".join(f"{cards:>4} cards" for cards in CARDS))
    for layers in LAYERS:
        facts = facts_from_shape("model", resized(SHAPES["llama-3.3-70b"], layers=layers), "Q4_K_M")
        cells = []
        for cards in CARDS:
            machine = simulate(f"{cards}x4090")
            cells.append(statistics.median(_timed(facts, machine) for _ in range(ROUNDS)))
        print(f"{layers:>6}  " + "".join(f"{cell * 1e3:>10.1f}" for cell in cells))


def _timed(facts: ModelFacts, machine: Machine) -> float:
    begun = time.perf_counter()
    make_plan(facts, machine, machine.gpus, Wants())
    return time.perf_counter() - begun
