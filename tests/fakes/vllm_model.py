"""What vLLM reads from a model's folder, and what it makes of it: weights, KV cache, memory of each card."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 1 << 30
MIB = 1 << 20
CARD_BYTES = "FAKE_CARD_BYTES"
FREE_BYTES = "FAKE_FREE_BYTES"
RAM_BYTES = "FAKE_RAM_BYTES"
OVERHEAD_BYTES = "FAKE_OVERHEAD_BYTES"
_CARD_BLOCK_TOKENS = 16
_CPU_BLOCK_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A folder as Hugging Face lays it out."""

    folder: Path
    architecture: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    longest: int
    vocabulary: int
    element_bytes: int
    files: tuple[Path, ...]

    @property
    def weights_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def count_tokens(self, text: str) -> int:
        """Tokens of a text: its bytes where the vocabulary has little else, else some four bytes each."""
        size = len(text.encode(errors="replace"))
        return size if self.vocabulary < 1000 else -(-size // 4)


def read_model(folder: Path) -> Model:
    """Read config.json and the names of the weights. Raises OSError and ValueError where it cannot be read."""
    whole: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config: dict[str, Any] = {**whole, **whole.get("text_config", {})}
    heads = int(config.get("num_attention_heads", 1))
    kind = str(config.get("dtype", config.get("torch_dtype", "bfloat16")))
    return Model(
        folder=folder,
        architecture=(whole.get("architectures") or ["LlamaForCausalLM"])[0],
        layers=int(config.get("num_hidden_layers", 1)),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads", heads)),
        head_dim=int(config.get("head_dim") or int(config.get("hidden_size", heads)) // heads),
        longest=int(config.get("max_position_embeddings", 2048)),
        vocabulary=int(config.get("vocab_size", 32000)),
        element_bytes=4 if kind == "float32" else 2,
        files=tuple(sorted(folder.glob("*.safetensors"))),
    )


def damage(path: Path) -> str | None:
    """What is wrong with a safetensors file, in the words of its library; None for a whole one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = file.read(8)
        length = int.from_bytes(begin, "little")
        if len(begin) < 8 or size < 8 + length:
            return "Error while deserializing header: header too small" if len(begin) < 8 else _INCOMPLETE
        header = json.loads(file.read(length))
    end = max((value["data_offsets"][1] for name, value in header.items() if name != "__metadata__"), default=0)
    return None if size == 8 + length + end else _INCOMPLETE


_INCOMPLETE = "Error while deserializing header: incomplete metadata, file not fully covered"


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What the workers of one replica take, each by its rank in the replica."""

    weights_bytes: tuple[int, ...]
    kv_bytes: tuple[int, ...]
    token_bytes: tuple[int, ...]
    card_bytes: tuple[int, ...]
    free_bytes: tuple[int, ...]
    wanted_bytes: tuple[int, ...]
    block_tokens: int

    @property
    def kv_tokens(self) -> int:
        """How many tokens the KV cache holds, in whole blocks."""
        blocks = [kv // (each * self.block_tokens) for kv, each in zip(self.kv_bytes, self.token_bytes, strict=True)]
        return max(0, min(blocks)) * self.block_tokens


def card_memory(model: Model, *, tensor: int, pipeline: int, share: float, element_bytes: int, eager: bool) -> Memory:
    """On cards: of each the share, less the weights, what a batch needs and CUDA graphs, is KV cache."""
    workers = tensor * pipeline
    cards = _of_each(CARD_BYTES, workers, 24 * GIB)
    weights = _weights(model, tensor, pipeline)
    beside = int(os.environ.get(OVERHEAD_BYTES, str(GIB // 2))) + (0 if eager else 400 * MIB)
    wanted = tuple(int(card * share) for card in cards)
    return Memory(
        weights_bytes=weights,
        kv_bytes=tuple(take - own - beside for take, own in zip(wanted, weights, strict=True)),
        token_bytes=_token_bytes(model, tensor, pipeline, element_bytes),
        card_bytes=cards,
        free_bytes=_of_each(FREE_BYTES, workers, *(card - 300 * MIB for card in cards)),
        wanted_bytes=wanted,
        block_tokens=_CARD_BLOCK_TOKENS,
    )


def cpu_memory(model: Model, *, tensor: int, pipeline: int, space_bytes: int, element_bytes: int) -> Memory:
    """On a CPU: every worker takes the KV cache it was told to."""
    workers = tensor * pipeline
    ram = int(os.environ.get(RAM_BYTES, str(24 * GIB)))
    return Memory(
        weights_bytes=_weights(model, tensor, pipeline),
        kv_bytes=(space_bytes,) * workers,
        token_bytes=_token_bytes(model, tensor, pipeline, element_bytes),
        card_bytes=(ram,) * workers,
        free_bytes=(ram * 9 // 10,) * workers,
        wanted_bytes=(space_bytes,) * workers,
        block_tokens=_CPU_BLOCK_TOKENS,
    )


def stage_layers(layers: int, pipeline: int, environment: Mapping[str, str] = os.environ) -> tuple[int, ...]:
    """The layers of each stage of a pipeline: as VLLM_PP_LAYER_PARTITION says, or evenly."""
    if told := environment.get("VLLM_PP_LAYER_PARTITION"):
        return tuple(int(part) for part in told.split(","))
    return tuple(layers // pipeline + (stage < layers % pipeline) for stage in range(pipeline))


def _weights(model: Model, tensor: int, pipeline: int) -> tuple[int, ...]:
    parts = stage_layers(model.layers, pipeline)
    return tuple(model.weights_bytes * part // (model.layers * tensor) for part in parts for _ in range(tensor))


def _token_bytes(model: Model, tensor: int, pipeline: int, element_bytes: int) -> tuple[int, ...]:
    each = 2 * max(1, model.kv_heads // tensor) * model.head_dim * element_bytes
    return tuple(max(1, part * each) for part in stage_layers(model.layers, pipeline) for _ in range(tensor))


def _of_each(name: str, count: int, *default: int) -> tuple[int, ...]:
    """Numbers of the environment, one a card; the last one stands for those that are missing."""
    told = [int(word) for word in os.environ.get(name, "").split(",") if word] or list(default)
    return tuple(told[min(index, len(told) - 1)] for index in range(count))
