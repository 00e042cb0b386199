"""Run all benchmarks but the long ones, or those named on the command line, and print their tables."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from benchmarks import doctor, faults, follow, growth, memory, planner, ready, speed, startup

BENCHMARKS: dict[str, Callable[[], int | None]] = {
    "startup": startup.main,
    "ready": ready.main,
    "follow": follow.main,
    "growth": growth.main,
    "memory": memory.main,
    "planner": planner.main,
    "speed": speed.main,
    "doctor": doctor.main,
    "faults": faults.main,
}
# They take half an hour, and must be asked for by name.
LONG = ("faults",)


def main(names: list[str]) -> int:
    """Run the benchmarks in `names`, all but the long ones when it is empty; returns the exit code."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    worst = 0
    for name in names or [name for name in BENCHMARKS if name not in LONG]:
        print(f"\n== {name}: {(BENCHMARKS[name].__doc__ or '').splitlines()[0]}")
        worst = max(worst, BENCHMARKS[name]() or 0)
    return worst


if __name__ == "__main__":
    # A script's background job starts with interrupts ignored and hands that on to each program it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
