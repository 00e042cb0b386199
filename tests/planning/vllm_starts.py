"""What vLLM logged of its memory at 44 starts of versions 0.11 to 0.13, and the plan for each (`vllm_memory.csv`)."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from mgpu.machine.snapshot import Gpu, Host
from mgpu.models.facts import ModelFacts
from mgpu.models.hf import facts_from_config
from mgpu.planning.candidates import Candidate
from mgpu.planning.vllm_memory import VllmWants, visible_bytes
from mgpu.planning.vllm_placement import vllm_candidate
from mgpu.units import GIB
from tests.models.test_hf import GEMMA_12B, GPT_OSS_20B, LLAMA_8B, QWEN_30B_A3B

DATA = Path(__file__).parent.parent / "data" / "vllm_memory.csv"
BAR = 0.02
"""How far the planned tokens of the cache may be from those that vLLM logged."""

# What CUDA sees of each card, by the same logs; of the last one, which these do not say, as the planner takes it.
_VISIBLE_GIB = {"3090": 23.56, "4090": 23.52, "5090": 31.36, "a100": 39.39, "ada5000": 31.35}
# vLLM's default in these versions, for logs that do not say which share they were told to take.
_DEFAULT_SHARE = 0.9

QWEN_14B: dict[str, object] = LLAMA_8B | {
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "hidden_size": 5120,
    "vocab_size": 151936,
}
GEMMA_27B: dict[str, object] = LLAMA_8B | {
    "num_hidden_layers": 62,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
}
CONFIGS: dict[str, dict[str, object]] = {
    "Qwen3-14B-FP8-dynamic": QWEN_14B | {"head_dim": 128},
    "gemma-3-12b-it-FP8-dynamic": GEMMA_12B,
    "gemma-3-27b-it-FP8-dynamic": GEMMA_27B,
    "Qwen3-Coder-30B-A3B-Instruct-GPTQ-4bit": QWEN_30B_A3B,
    "Meta-Llama-3.1-8B-Instruct": LLAMA_8B,
    "gpt-oss-20b": GPT_OSS_20B,
}


EXCEPTIONS = {"3090 Qwen3-14B-FP8-dynamic": 0.046, "4090 gpt-oss-20b": 0.025}
"""Starts that are further off: the FP8 model on a card that cannot compute in FP8 left 0.29 GiB beside weights and
cache where others left 0.4 to 0.5, and the one with sliding windows 0.34."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One logged start."""

    gpu: str
    model: str
    tensor_parallel: int
    weights_gib: float
    kv_gib: float
    kv_tokens: int
    ctx_tokens: int
    concurrency: float
    utilisation: float | None

    @property
    def name(self) -> str:
        """The card and the model."""
        return f"{self.gpu} {self.model}"


@cache
def starts() -> tuple[Start, ...]:
    """All logged starts."""
    with DATA.open(newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return tuple(
            Start(
                gpu=row["gpu"],
                model=row["model"],
                tensor_parallel=int(row["tensor_parallel"]),
                weights_gib=float(row["weights_gib"]),
                kv_gib=float(row["kv_gib"]),
                kv_tokens=int(row["kv_tokens"]),
                ctx_tokens=int(row["ctx_tokens"]),
                concurrency=float(row["concurrency"]),
                utilisation=float(row["utilisation"]) if row["utilisation"] else None,
            )
            for row in rows
        )


def facts_of(model: str, weights_gib: float = 15.0) -> ModelFacts:
    """Return the model of a start, of which a card held as much."""
    return facts_from_config(CONFIGS[model], round(weights_gib * GIB), name=model, source=model)


def on_cuda() -> tuple[Start, ...]:
    """Return the starts whose cache can be planned from the start: those on one NVIDIA card.

    On AMD's cards what vLLM holds beside weights and cache depends on the attention that it chooses: 0.7 to 4 GiB.
    """
    return tuple(start for start in starts() if start.gpu in _VISIBLE_GIB)


def planned(start: Start, *, enforce_eager: bool = True) -> tuple[Candidate, ModelFacts]:
    """Return the plan for a start on CUDA. These versions took CUDA graphs beside their share of the card, as if there
    were none (`enforce_eager`)."""
    facts = replace(facts_of(start.model, start.weights_gib), tied=False)
    visible = _VISIBLE_GIB[start.gpu] * GIB
    card = Gpu(
        index=0,
        vendor="nvidia",
        name=start.gpu,
        total_bytes=round(visible / visible_bytes(GIB) * GIB),
        free_bytes=round(visible),
    )
    wants = VllmWants(gpu_memory_utilization=start.utilisation or _DEFAULT_SHARE, enforce_eager=enforce_eager)
    return vllm_candidate(facts, wants, [card], Host(), start.ctx_tokens), facts
