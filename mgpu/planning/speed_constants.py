"""Every number that speed is predicted with, in one table: its value, its unit, and where it comes from.

"Fit" means that the value was fitted to published measurements and rounded; `rows` are how many of them it takes part
in and `sources` how many people measured those. `python -m benchmarks speed` prints the error of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Values = Mapping[str, float]
"""Constants by name. Every function of speed takes them, so that a benchmark can fit them again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """One number: `unit` "of the rate" is a share of what the card could do, "×" a factor, "µs" one layer's time.
    `origin` says how it was come by; `rows` of `sources` were fitted, none where it is not a fit."""

    value: float
    unit: str
    origin: str
    rows: int = 0
    sources: int = 0


def _of(unit: str) -> Callable[..., Constant]:
    def constant(value: float, origin: str, rows: int = 0, sources: int = 0) -> Constant:
        return Constant(value=value, unit=unit, origin=origin, rows=rows, sources=sources)

    return constant


_of_rate, _factor, _us, _gb_s = _of("of the rate"), _of("×"), _of("µs"), _of("GB/s")
_us_per_hop, _us_per_user, _power = _of("µs a hop"), _of("µs a user"), _of("power of the cards")
_users = _of("users")

CONSTANTS: dict[str, Constant] = {
    # How much of a card's memory bandwidth reading the weights reaches.
    "llama.cpp weights quantised": _of_rate(0.91, "fit", 184, 12),
    "llama.cpp weights 16-bit": _of_rate(0.95, "fit: nothing to unpack", 43, 3),
    "llama.cpp weights, HBM": _factor(0.62, "fit: too few loads in flight for memory this wide", 28, 3),
    "weights, LPDDR": _factor(0.76, "fit: the processor shares the memory", 6, 1),
    "vLLM weights": _of_rate(0.75, "fit", 42, 10),
    "vLLM weights, CDNA": _factor(0.75, "fit: kernels are tuned for later cards", 17, 2),
    # What a layer costs beside its bytes: starting its kernels, one after the other.
    "llama.cpp layer dense": _us(80, "fit", 157, 10),
    "llama.cpp layer experts": _us(130, "fit: routing and gathering are further kernels", 19, 7),
    "llama.cpp layer, AMD": _us(130, "fit: kernels start more slowly", 51, 5),
    "llama.cpp layer, Ada and later": _factor(0.78, "fit", 97, 7),
    "llama.cpp layer, no tensor cores": _factor(3.0, "fit: attention runs in fp32", 3, 2),
    "llama.cpp layer, before 2025": _factor(1.3, "fit: builds that start every kernel by itself", 90, 2),
    "vLLM layer dense": _us(30, "fit: a graph replays the kernels", 8, 4),
    "vLLM layer experts": _us(75, "fit", 17, 6),
    "vLLM layer dense, CDNA": _us(95, "fit", 5, 2),
    "vLLM layer experts, CDNA": _us(165, "fit", 12, 1),
    # From card to card.
    "hop": _us_per_hop(40, "fit: one hidden vector moves", 44, 6),
    "hop, before 2025": _us_per_hop(300, "fit: by way of the host, which waited", 60, 1),
    "llama.cpp reduction": _us(30, "fit, CUDA; times log2 of the cards", 15, 2),
    "llama.cpp cut, experts": _us(
        70, "fit: cut at each reduction, the many kernels cannot be replayed as one graph", 5, 1
    ),
    "llama.cpp reduction, staged": _us(115, "ROCm, Vulkan: llama.cpp PR 25051, 27B on two RX 7900 XTX: 34.5 → 41.6"),
    "llama.cpp reduction, SYCL": _us(1000, "llama.cpp issue 26409, 27B on two Arc Pro B70: layer 20.1, tensor 7.0"),
    "vLLM reduction": _us(37, "fit; times log2 of the cards", 37, 8),
    "link NVLink": _gb_s(100, "fit, MI100 on xGMI: large reductions, both ways", 80, 1),
    "link peer": _gb_s(50, "fit, RTX PRO 6000 on PCIe 5", 21, 3),
    "link host": _gb_s(2.5, "fit, RTX 3090 without peer access: through the host's memory", 6, 3),
    # How much of the bandwidth reading the KV cache reaches.
    "llama.cpp KV, CUDA": _of_rate(0.88, "fit", 77, 8),
    "llama.cpp KV, ROCm": _of_rate(0.72, "fit", 28, 4),
    "llama.cpp KV, other": _of_rate(0.30, "fit, Vulkan on AMD", 30, 4),
    "llama.cpp KV, no flash attention": _of_rate(0.38, "fit, builds of 2024", 90, 2),
    "vLLM KV": _of_rate(0.60, "fit", 42, 10),
    # Many users at once.
    "vLLM compute": _of_rate(0.80, "fit, of the fp16 rate with fp32 accumulation", 58, 7),
    "vLLM compute, CDNA": _of_rate(0.40, "fit", 80, 1),
    "vLLM user": _us_per_user(20, "fit: sampling, block tables", 58, 7),
    "vLLM user, CDNA": _us_per_user(400, "fit", 80, 1),
    "llama.cpp batch weights": _of_rate(0.50, "two rows: 27B on two RTX 5060 Ti, 2 and 4 users"),
    "llama.cpp user": _us_per_user(20, "not measured: as vLLM's"),
    "llama.cpp users dense": _users(
        4,
        "the most that were measured, of those two rows: for more the range goes from"
        " what these get to what the formula gives",
    ),
    "llama.cpp users experts": _users(1, "more were not measured"),
    # The prompt.
    "llama.cpp prefill dense": _of_rate(0.60, "fit, GeForce", 138, 5),
    "llama.cpp prefill, full-rate cards": _factor(
        0.45, "fit: professional cards accumulate in fp32 at the full rate", 68, 2
    ),
    "llama.cpp prefill, HBM": _factor(0.40, "fit", 27, 2),
    "llama.cpp prefill experts": _factor(0.20, "fit: few tokens for each expert", 30, 3),
    "llama.cpp prefill, layer split": _power(0.4, "fit: batches in a row", 138, 5),
    "vLLM prefill": _of_rate(0.45, "fit", 10, 2),
    "vLLM prefill, CDNA": _of_rate(0.075, "fit", 16, 1),
    "vLLM prefill experts": _factor(0.70, "fit", 19, 2),
    # The host's memory, for what is offloaded.
    "host bandwidth low": _gb_s(60, "two channels of DDR5, where nothing is known"),
    "host bandwidth high": _gb_s(75, "what is reached at best: 70B on an RTX 4090 and a Ryzen 7900X, 3.1 tokens/s"),
    "host weights low": _of_rate(0.50, "published offload runs: four dense, four with experts"),
    "host weights high": _of_rate(0.90, "published offload runs: four dense, four with experts"),
    "host experts low": _of_rate(0.40, "published offload runs: four dense, four with experts"),
    "host experts high": _of_rate(0.70, "published offload runs: four dense, four with experts"),
    # How far measurements lie from the prediction, up or down.
    "spread llama.cpp dense": _factor(0.14, "four of five of all rows are inside"),
    "spread llama.cpp experts": _factor(0.30, "four of five of all rows are inside"),
    "spread vLLM dense": _factor(0.18, "four of five of all rows are inside"),
    "spread vLLM experts": _factor(0.35, "four of five of all rows are inside"),
    "spread thin": _factor(0.15, "added where the evidence is thin"),
    "spread users": _factor(0.10, "added for several users"),
    "spread unequal": _factor(0.65, "added downwards, one measurement: RTX 5090 and 3090 Ti, 0.61 of two RTX 3090"),
    "spread prefill": _factor(1.00, "four of five of the rows with a prompt's rate are inside"),
    # A power limit below the card's own.
    "power shift": _factor(0.40, "fit: how much of the cut in power is lost in speed", 7, 3),
    "power spread": _factor(0.50, "added, downwards, times the cut: dense models lose more than experts"),
}

VALUES: Values = {name: constant.value for name, constant in CONSTANTS.items()}
"""The table's values."""
