"""How fast a prompt is read: computing limits it, two operations for each active parameter and token.

A layer split computes a micro-batch on one card after the other; a prompt of several keeps more than one card busy,
but not all. A tensor split computes on all of them.
"""

from __future__ import annotations

from mgpu.planning.speed_constants import VALUES, Values
from mgpu.planning.work import Chip, Stage, Work


def prefill_tok_s(work: Work, constants: Values = VALUES) -> float | None:
    """Return the tokens of a prompt per second, for one replica; None where a card's compute rate or the number of
    parameters is unknown."""
    if not work.active_parameters or not work.stages or not all(chip.tensor_tflops for chip in work.chips):
        return None
    seconds = 0.0
    for stage in work.stages:
        part = stage.layers / max(1, work.layers)
        slowest = min((chip.tensor_tflops or 0) * compute_reached(work, chip, constants) for chip in _chips(stage))
        seconds += part * 2 * work.active_parameters / (slowest * len(stage.shares) * 1e12)
    at_once = 1.0 if work.vllm else len(work.stages) ** constants["llama.cpp prefill, layer split"]
    return at_once / seconds


def prefill_words(work: Work, constants: Values = VALUES) -> str:
    """Return the sum that gives `prefill_tok_s`, which must not be None."""
    rates: dict[str, int] = {}
    for stage in work.stages:
        chip = min(_chips(stage), key=lambda chip: (chip.tensor_tflops or 0) * compute_reached(work, chip, constants))
        at_once = f"{len(stage.shares)} × " if len(stage.shares) > 1 else ""
        rate = f"{at_once}{chip.tensor_tflops:.4g} TFLOPS × {compute_reached(work, chip, constants):.3g}"
        rates[rate] = rates.get(rate, 0) + stage.layers
    if len(rates) == 1:
        reached = next(iter(rates))
    else:
        parts = " + ".join(f"{layers / work.layers:.2f} ÷ ({rate})" for rate, layers in rates.items())
        reached = f"1 ÷ ({parts})"
    overlap = len(work.stages) ** constants["llama.cpp prefill, layer split"]
    besides = "" if work.vllm or len(work.stages) == 1 else f" × {overlap:.2f} for {len(work.stages)} cards in turn"
    return f"{reached}{besides} ÷ (2 × {(work.active_parameters or 0) / 1e9:.2f} G parameters)"


def compute_reached(work: Work, chip: Chip, constants: Values = VALUES) -> float:
    """Return the share of a card's compute rate that a prompt reaches."""
    if work.vllm:
        reached = constants["vLLM prefill, CDNA" if chip.cdna else "vLLM prefill"]
        return reached * (constants["vLLM prefill experts"] if work.experts else 1)
    reached = constants["llama.cpp prefill dense"]
    if chip.memory == "hbm":
        reached *= constants["llama.cpp prefill, HBM"]
    elif chip.full_rate:
        reached *= constants["llama.cpp prefill, full-rate cards"]
    return reached * (constants["llama.cpp prefill experts"] if work.experts else 1)


def _chips(stage: Stage) -> tuple[Chip, ...]:
    return tuple(share.chip for share in stage.shares)
