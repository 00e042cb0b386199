"""Faults injected into mgpu, and what became of it: a table with one row a fault.

    MGPU_FAULTS=storage,answers,cycles,deaths   only these parts
    MGPU_FAULT_CYCLES=500                       starts and stops; a tenth of them through the program
    MGPU_FAULT_INSTANCES=50                     at once

Every process that is started carries a mark in its environment, by which it is found wherever it went. What is left
behind is processes, ports, locks, temporary folders and files, segments of shared memory, and the memory of these.
"""

from __future__ import annotations

import os
import time

from benchmarks.faults import answers, cycles, deaths, storage
from benchmarks.faults.ground import ground
from benchmarks.faults.row import headings

_PARTS = {"storage": storage.rows, "answers": answers.rows, "cycles": cycles.rows, "deaths": deaths.rows}


def main() -> int:
    """Faults injected and survived. Returns 1 if a row is not clean, or is skipped where all can be had."""
    begun = time.monotonic()
    print(headings())
    rows = []
    with ground() as place:
        wanted = os.environ.get("MGPU_FAULTS")
        for name in wanted.split(",") if wanted else _PARTS:
            for row in _PARTS[name](place):
                rows.append(row)
                for line in row.lines():
                    print(line, flush=True)
    skipped = [row for row in rows if row.skipped]
    bad = [row for row in rows if not row.skipped and not row.is_clean]
    told = [f"{len(bad)} not clean" if bad else "all clean", *([f"{len(skipped)} skipped"] if skipped else [])]
    print(f"{len(rows) - len(skipped)} rows in {time.monotonic() - begun:.0f} s; {', '.join(told)}")
    return 1 if bad or (skipped and os.environ.get("MGPU_TEST_REQUIRE_REAL")) else 0
