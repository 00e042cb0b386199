"""Run all benchmarks, or those named on the command line, and print their tables."""

from __future__ import annotations

import sys

from benchmarks import doctor, follow, growth, memory, ready, startup

BENCHMARKS = {
    "startup": startup.main,
    "ready": ready.main,
    "follow": follow.main,
    "growth": growth.main,
    "memory": memory.main,
    "doctor": doctor.main,
}


def main(names: list[str]) -> int:
    """Run the benchmarks in `names`, all of them when it is empty; returns the exit code."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    for name in names or BENCHMARKS:
        print(f"\n== {name}: {(BENCHMARKS[name].__doc__ or '').splitlines()[0]}")
        BENCHMARKS[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
