"""Timing whole commands, in turn, so that a slow moment of the machine hits all of them."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

MGPU = Path(sys.executable).with_name("mgpu")


def interleaved(commands: Mapping[str, Sequence[str]], *, rounds: int) -> dict[str, list[float]]:
    """Return the wall seconds of each command in each round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for round_number in range(rounds + 1):
        for name, command in commands.items():
            begun = time.perf_counter()
            subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if round_number:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def spread(values: Sequence[float]) -> str:
    """Return median, fastest and slowest in milliseconds."""
    return f"{statistics.median(values) * 1e3:7.0f} ms  ({min(values) * 1e3:.0f}-{max(values) * 1e3:.0f})"


def verdict(value: float, bar: float) -> str:
    """Return whether a bar is met, and by how much it is missed."""
    return "met" if value <= bar else f"MISSED by {value - bar:.2f}"
