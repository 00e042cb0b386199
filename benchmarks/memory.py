"""How far the plan is from the engines: llama.cpp's memory, device by device, and the tokens of vLLM's cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median

from benchmarks.timing import verdict
from mgpu.planning.candidates import PlannedDevice
from mgpu.planning.vllm_placement import planned_kv_tokens
from mgpu.units import MIB
from tests.planning import test_memory_against_engine as layer_split
from tests.planning import test_tensor_split as tensor_split
from tests.planning import vllm_starts
from tests.planning.engine_rows import plan, read_rows
from tests.planning.vllm_starts import BAR, EXCEPTIONS, on_cuda


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Planned less projected, in MiB; `total_mib` is all that the engine puts on the device. None where it did not
    say."""

    weights: float
    cache: float | None
    compute: float | None
    total_mib: float


def main() -> None:
    """Planned against what llama-server projects or allocates, device by device, and what vLLM logs.

    Bars: weights and KV cache within 1 MiB, compute never low by more than 1 MiB and at most 5 % of the device's total
    high; vLLM's KV cache within 2 % of the tokens that it logged.
    """
    _report("layer split, known models", _layers())
    _report("tensor split, known models", _tensors())
    _report("layer split, models made to try the rules", _sparse())
    _vllm()


def _vllm() -> None:
    """The tokens of vLLM's cache, planned from the card and the weights alone, against its logs."""
    off: dict[str, float] = {}
    windows = set()
    for start in on_cuda():
        candidate, facts = vllm_starts.planned(start)
        off[start.name] = planned_kv_tokens(candidate, facts) / start.kv_tokens - 1
        windows |= {start.name} if any(layer.sliding_window for layer in facts.layers) else set()
    kept = {name: abs(each) for name, each in off.items() if name not in EXCEPTIONS}
    others = len(vllm_starts.starts()) - len(off)
    print(f"vLLM's KV cache: {len(off)} of {len(vllm_starts.starts())} logged starts, {len(windows)} with windows")
    print(
        f"  tokens    worst {max(kept.values()):5.1%} off, median {median(kept.values()):.1%} of {len(kept)} starts"
        f"   bar {BAR:.0%}: {_met(kept.values(), BAR)}"
    )
    for name in EXCEPTIONS:
        print(f"  exception {name}: {off[name]:+.1%}")
    print(f"  without   {others} starts on AMD: 0.7 to 4 GiB beside weights and cache, by the attention vLLM chooses")


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
