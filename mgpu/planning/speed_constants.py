"""Every number that speed is predicted with, in one table: its value, its unit, and where it comes from.

"Fit" means that the value was fitted to published measurements and rounded, "rows" how many of them it takes part in
and "sources" how many people measured those. `python -m benchmarks speed` prints the error of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Values = Mapping[str, float]
"""Constants by name. Every function of speed takes them, so that a benchmark can fit them again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """One number: `unit` "of the rate" is a share of what the card could do, "×" a factor, "µs" is per layer unless
    the name says otherwise. `origin` says how it was come by."""

    value: float
    unit: str
    origin: str


def _of_rate(value: float, origin: str) -> Constant:
    return Constant(value=value, unit="of the rate", origin=origin)


def _factor(value: float, origin: str) -> Constant:
    return Constant(value=value, unit="×", origin=origin)


def _us(value: float, origin: str) -> Constant:
    return Constant(value=value, unit="µs", origin=origin)


def _gb_s(value: float, origin: str) -> Constant:
    return Constant(value=value, unit="GB/s", origin=origin)


CONSTANTS: dict[str, Constant] = {
    # How much of a card's memory bandwidth reading the weights reaches.
    "llama.cpp weights quantised": _of_rate(0.91, "fit"),
    "llama.cpp weights 16-bit": _of_rate(0.95, "fit: nothing to unpack"),
    "llama.cpp weights, HBM": _factor(0.62, "fit: too few loads in flight for memory this wide"),
    "weights, LPDDR": _factor(0.76, "fit: the processor shares the memory"),
    "vLLM weights": _of_rate(0.75, "fit"),
    "vLLM weights, CDNA": _factor(0.75, "fit: kernels are tuned for later cards"),
    # What a layer costs beside its bytes: starting its kernels, one after the other.
    "llama.cpp layer dense": _us(80, "fit"),
    "llama.cpp layer experts": _us(130, "fit: routing and gathering are further kernels"),
    "llama.cpp layer, AMD": _us(130, "fit: kernels start more slowly"),
    "llama.cpp layer, Ada and later": _factor(0.78, "fit"),
    "llama.cpp layer, no tensor cores": _factor(3.0, "fit: attention runs in fp32"),
    "llama.cpp layer, before 2025": _factor(1.3, "fit: builds that start every kernel by itself"),
    "vLLM layer dense": _us(30, "fit: a graph replays the kernels"),
    "vLLM layer experts": _us(75, "fit"),
    "vLLM layer dense, CDNA": _us(95, "fit"),
    "vLLM layer experts, CDNA": _us(165, "fit"),
    # From card to card.
    "hop": Constant(value=40, unit="µs per hop", origin="fit: one hidden vector moves"),
    "hop, before 2025": Constant(value=300, unit="µs per hop", origin="fit: by way of the host, which waited"),
    "llama.cpp reduction": _us(30, "fit, CUDA; times log2 of the cards"),
    "llama.cpp cut, experts": _us(70, "fit: cut at each reduction, the many kernels cannot be replayed as one graph"),
    "llama.cpp reduction, staged": _us(115, "ROCm, Vulkan: llama.cpp PR 25051, 27B on two RX 7900 XTX: 34.5 → 41.6"),
    "llama.cpp reduction, SYCL": _us(1000, "llama.cpp issue 26409, 27B on two Arc Pro B70: layer 20.1, tensor 7.0"),
    "vLLM reduction": _us(37, "fit; times log2 of the cards"),
    "link NVLink": _gb_s(100, "fit, MI100 on xGMI: large reductions, both ways"),
    "link peer": _gb_s(50, "fit, RTX PRO 6000 on PCIe 5"),
    "link host": _gb_s(2.5, "fit, RTX 3090 without peer access: through the host's memory"),
    # How much of the bandwidth reading the KV cache reaches.
    "llama.cpp KV, CUDA": _of_rate(0.88, "fit"),
    "llama.cpp KV, ROCm": _of_rate(0.72, "fit"),
    "llama.cpp KV, other": _of_rate(0.30, "fit, Vulkan on AMD"),
    "llama.cpp KV, no flash attention": _of_rate(0.38, "fit, builds of 2024"),
    "vLLM KV": _of_rate(0.60, "fit"),
    # Many users at once.
    "vLLM compute": _of_rate(0.80, "fit, of the fp16 rate with fp32 accumulation"),
    "vLLM compute, CDNA": _of_rate(0.40, "fit"),
    "vLLM user": Constant(value=20, unit="µs per user", origin="fit: sampling, block tables"),
    "vLLM user, CDNA": Constant(value=400, unit="µs per user", origin="fit"),
    "llama.cpp batch weights": _of_rate(0.50, "two rows: 27B on two RTX 5060 Ti, 2 and 4 users"),
    # The prompt.
    "llama.cpp prefill dense": _of_rate(0.60, "fit, GeForce"),
    "llama.cpp prefill, full-rate cards": _factor(0.45, "fit: professional cards accumulate in fp32 at the full rate"),
    "llama.cpp prefill, HBM": _factor(0.40, "fit"),
    "llama.cpp prefill experts": _factor(0.20, "fit: few tokens for each expert"),
    "llama.cpp prefill, layer split": Constant(value=0.4, unit="power of the cards", origin="fit: batches in a row"),
    "vLLM prefill": _of_rate(0.45, "fit"),
    "vLLM prefill, CDNA": _of_rate(0.075, "fit"),
    "vLLM prefill experts": _factor(0.70, "fit"),
    # The host's memory, for what is offloaded.
    "host bandwidth low": _gb_s(60, "two channels of DDR5, where nothing is known"),
    "host bandwidth high": _gb_s(75, "what is reached at best: 70B on an RTX 4090 and a Ryzen 7900X, 3.1 tokens/s"),
    "host weights low": _of_rate(0.50, "published offload runs: four dense, four with experts"),
    "host weights high": _of_rate(0.90, "the same"),
    "host experts low": _of_rate(0.40, "the same"),
    "host experts high": _of_rate(0.70, "the same"),
    # How far measurements lie from the prediction: four of five rows are within it, up or down.
    "spread llama.cpp dense": _factor(0.14, "rows"),
    "spread llama.cpp experts": _factor(0.30, "rows"),
    "spread vLLM dense": _factor(0.18, "rows"),
    "spread vLLM experts": _factor(0.35, "rows"),
    "spread thin": _factor(0.15, "added where the evidence is thin"),
    "spread users": _factor(0.10, "added for several users"),
    "spread prefill": _factor(1.00, "rows"),
    # A power limit below the card's own.
    "power shift": _factor(0.40, "fit: how much of the cut in power is lost in speed"),
    "power spread": _factor(0.50, "added, downwards, times the cut: dense models lose more than experts"),
}

VALUES: Values = {name: constant.value for name, constant in CONSTANTS.items()}
"""The table's values."""
