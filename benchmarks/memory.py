"""How far the plan is from the engine: llama.cpp's memory, device by device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median

from benchmarks.timing import verdict
from mgpu.planning.candidates import PlannedDevice
from mgpu.units import MIB
from tests.planning import test_memory_against_engine as layer_split
from tests.planning import test_tensor_split as tensor_split
from tests.planning.engine_rows import plan, read_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Planned less projected, in MiB; `total_mib` is all that the engine puts on the device. None where it did not
    say."""

    weights: float
    cache: float | None
    compute: float | None
    total_mib: float


def main() -> None:
    """Planned against what llama-server projects or allocates, device by device.

    Bars: weights and KV cache within 1 MiB, compute never low by more than 1 MiB and at most 5 % of the device's total
    high.
    """
    _report("layer split, known models", _layers())
    _report("tensor split, known models", _tensors())
    _report("layer split, models made to try the rules", _sparse())


def _layers() -> Iterator[Difference]:
    for rows in layer_split.configurations():
        devices = {device.device: device for device in layer_split.planned(rows).devices}
        for row in rows:
            if device := devices.get(row["device"]):
                exact = float(row["compute_exact_mib"] or 0)
                yield _difference(device, float(row["model_mib"]), float(row["context_mib"]), exact, rounded=1)


def _tensors() -> Iterator[Difference]:
    for rows in tensor_split.configurations():
        for row, device in zip(rows, tensor_split.planned(rows).devices, strict=True):
            weights, cache, compute = (None if each is None else each / MIB for each in tensor_split.allocated(row))
            if weights is not None:
                yield _difference(device, weights, cache, compute, rounded=0)


def _sparse() -> Iterator[Difference]:
    for asked, answers in read_rows().items():
        devices = {device.device: device for device in plan(asked).devices}
        for answer in answers:
            if device := devices.get(answer.device):
                yield _difference(device, answer.weights_mib, answer.kv_mib, answer.compute_mib, rounded=1)


def _difference(
    device: PlannedDevice, weights: float, cache: float | None, compute: float | None, *, rounded: int
) -> Difference:
    return Difference(
        weights=_excess(device.weights_bytes / MIB - weights, rounded),
        cache=None if cache is None else _excess(device.kv_bytes / MIB - cache, rounded),
        compute=None if compute is None else device.compute_bytes / MIB - compute,
        total_mib=weights + (cache or 0) + (compute or 0),
    )


def _excess(off: float, rounded: int) -> float:
    """MiB off; the engine prints whole MiB rounded down, so up to 1 above its figure is no difference."""
    return max(off - rounded, -off, 0.0) + 0.0


def _report(title: str, differences: Iterable[Difference]) -> None:
    found = tuple(differences)
    caches = [each.cache for each in found if each.cache is not None]
    compute = [(each.compute, each.total_mib) for each in found if each.compute is not None]
    weights = [each.weights for each in found]
    low = max(-off for off, _ in compute)
    high = [off / total * 100 for off, total in compute if total]
    print(f"{title}: {len(found)} device rows, {len(compute)} with a compute buffer")
    print(f"  weights   worst {max(weights):5.2f} MiB off, median {median(weights):.2f}   bar 1: {_met(weights, 1)}")
    print(f"  KV cache  worst {max(caches):5.2f} MiB off, median {median(caches):.2f}   bar 1: {_met(caches, 1)}")
    print(f"  compute   worst {max(low, 0):5.2f} MiB low   bar 1: {verdict(low, 1)}")
    print(f"  compute   worst {max(high):5.2f} % high, median {median(high):.2f} %   bar 5: {_met(high, 5)}")


def _met(values: Iterable[float], bar: float) -> str:
    return verdict(max(values), bar)
