"""How far the plan is from the engine."""

from __future__ import annotations

from benchmarks.timing import verdict
from mgpu.units import MIB
from tests.planning.test_memory_against_engine import configurations, planned


def main() -> None:
    """Planned against projected by llama-server, over every layer-split row: MiB off, and per cent of the total."""
    weights, caches, totals, compute_low = [], [], [], []
    for rows in configurations():
        devices = {device.device: device for device in planned(rows).devices}
        for row in rows:
            if device := devices.get(row["device"]):
                weights.append(_excess(device.weights_bytes, row["model_mib"]))
                caches.append(_excess(device.kv_bytes, row["context_mib"]))
                total = float(row["self_mib"])
                off = (device.total_bytes - device.runtime_bytes) / MIB - total
                totals.append(abs(off) / total * 100 if total else 0.0)
                compute_low.append(float(row["compute_exact_mib"] or 0) - device.compute_bytes / MIB)
    worst = max(totals)
    print(f"{len(totals)} device rows")
    print(f"weights   worst {max(weights):5.2f} MiB off   bar 1: {verdict(max(weights), 1)}")
    print(f"KV cache  worst {max(caches):5.2f} MiB off   bar 1: {verdict(max(caches), 1)}")
    print(
        f"total     worst {worst:5.2f} %, median {sorted(totals)[len(totals) // 2]:.2f} %   bar 2: {verdict(worst, 2)}"
    )
    low = [mib for mib in compute_low if mib > 1]
    print(f"compute   low by more than 1 MiB in {len(low)} rows, worst {max(compute_low):.2f} MiB")


def _excess(planned_bytes: int, printed_mib: str) -> float:
    """MiB off; the engine prints whole MiB rounded down, so up to 1 above its figure is no difference."""
    off = planned_bytes / MIB - float(printed_mib)
    return max(off - 1, -off, 0.0)
