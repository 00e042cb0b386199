"""Tensors as files and engines hold them: their element types, their sizes, where the engine puts them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GgmlType:
    """An element type of ggml: `block_elements` consecutive elements of a row are stored in `block_bytes`."""

    id: int
    name: str
    block_elements: int
    block_bytes: int


# Every type that ggml 0.20 can load, read from its own table of type traits. The ids left out (4, 5, 31 to
# 33, 36 to 38) belonged to types that ggml removed; Q8_1 and Q8_K only ever hold activations.
_TYPES = (
    GgmlType(0, "F32", 1, 4),
    GgmlType(1, "F16", 1, 2),
    GgmlType(2, "Q4_0", 32, 18),
    GgmlType(3, "Q4_1", 32, 20),
    GgmlType(6, "Q5_0", 32, 22),
    GgmlType(7, "Q5_1", 32, 24),
    GgmlType(8, "Q8_0", 32, 34),
    GgmlType(9, "Q8_1", 32, 36),
    GgmlType(10, "Q2_K", 256, 84),
    GgmlType(11, "Q3_K", 256, 110),
    GgmlType(12, "Q4_K", 256, 144),
    GgmlType(13, "Q5_K", 256, 176),
    GgmlType(14, "Q6_K", 256, 210),
    GgmlType(15, "Q8_K", 256, 292),
    GgmlType(16, "IQ2_XXS", 256, 66),
    GgmlType(17, "IQ2_XS", 256, 74),
    GgmlType(18, "IQ3_XXS", 256, 98),
    GgmlType(19, "IQ1_S", 256, 50),
    GgmlType(20, "IQ4_NL", 32, 18),
    GgmlType(21, "IQ3_S", 256, 110),
    GgmlType(22, "IQ2_S", 256, 82),
    GgmlType(23, "IQ4_XS", 256, 136),
    GgmlType(24, "I8", 1, 1),
    GgmlType(25, "I16", 1, 2),
    GgmlType(26, "I32", 1, 4),
    GgmlType(27, "I64", 1, 8),
    GgmlType(28, "F64", 1, 8),
    GgmlType(29, "IQ1_M", 256, 56),
    GgmlType(30, "BF16", 1, 2),
    GgmlType(34, "TQ1_0", 256, 54),
    GgmlType(35, "TQ2_0", 256, 66),
    GgmlType(39, "MXFP4", 32, 17),
    GgmlType(40, "NVFP4", 64, 36),
    GgmlType(41, "Q1_0", 128, 18),
    GgmlType(42, "Q2_0", 64, 18),
)
GGML_TYPES = {kind.name: kind for kind in _TYPES}
GGML_TYPES_BY_ID = {kind.id: kind for kind in _TYPES}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A weight. `dimensions` is innermost first, as GGUF stores it; the first is a whole number of blocks."""

    name: str
    dimensions: tuple[int, ...]
    type: GgmlType

    @property
    def elements(self) -> int:
        """How many values it holds."""
        return math.prod(self.dimensions)

    @property
    def bytes(self) -> int:
        """Its size in a file and in memory, before alignment."""
        return self.elements // self.type.block_elements * self.type.block_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Tensors gathered by where llama.cpp loads them, in bytes; see `place`."""

    embedding_bytes: int
    head_bytes: int
    other_bytes: int
    tied: bool
    layer_bytes: tuple[int, ...]
    layer_expert_bytes: tuple[int, ...]
    parameters: int
    expert_parameters: int
    feed_forward_length: int | None
    expert_feed_forward_length: int | None
    shared_expert_feed_forward_length: int | None


def layer_of(name: str) -> int | None:
    """The repeating layer that the tensor called `name` belongs to, None if it belongs to none."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def place(tensors: Iterable[Tensor], layers: int) -> Placement:
    """Gather `tensors` of a model with `layers` repeating layers by where llama.cpp loads them.

    The rules are those of its table of tensor kinds (`LLM_TENSOR_INFOS`): input tensors (`token_embd`,
    `per_layer_token_embd`, position and type embeddings) stay in host memory; `output*` and what follows it
    go with the output, to the last device; the rotary factors and the embedding's norm go with the first
    layer. (Each further device holds its own copy of the rotary factors: a few hundred bytes, left out.)
    Without `output.weight` the token embedding is loaded a second time as the output matrix.

    Blocks from `layers` on hold next-token-prediction layers, which are not loaded: they count as parameters
    only.
    """
    layer_bytes = [0] * layers
    expert_bytes = [0] * layers
    embedding = head = other = parameters = expert_parameters = 0
    has_output = False
    lengths: dict[str, int] = {}
    for tensor in tensors:
        name, size = tensor.name, tensor.bytes
        parameters += tensor.elements
        layer = layer_of(name)
        if layer is None and name.startswith(_FIRST_LAYER):
            layer = 0
        if layer is not None:
            if layer >= layers:
                continue
            layer_bytes[layer] += size
            if _EXPERT.search(name):
                expert_bytes[layer] += size
                expert_parameters += tensor.elements
            kind = _DOWN.search(name)
            if kind:
                lengths[kind[1]] = max(lengths.get(kind[1], 0), tensor.dimensions[0])
        elif name == "token_embd.weight":
            embedding += size
        elif name.startswith(_OUTPUT):
            head += size
            has_output = has_output or name == "output.weight"
        else:
            other += size
    return Placement(
        embedding_bytes=embedding,
        head_bytes=head if has_output else head + embedding,
        other_bytes=other,
        tied=not has_output,
        layer_bytes=tuple(layer_bytes),
        layer_expert_bytes=tuple(expert_bytes),
        parameters=parameters,
        expert_parameters=expert_parameters,
        feed_forward_length=lengths.get(""),
        expert_feed_forward_length=lengths.get("_exps"),
        shared_expert_feed_forward_length=lengths.get("_shexp"),
    )


_LAYER = re.compile(r"blk\.(\d{1,6})\.")
# Routed experts: merged (`ffn_up_exps`), or one tensor each in files from before 2024-04 (`ffn_up.3.weight`).
_EXPERT = re.compile(r"\.ffn_(?:gate|up|down|gate_up)(?:_exps|_chexps|\.\d+)\.")
_DOWN = re.compile(r"\.ffn_down(_exps|_shexp|)\.weight$")
_FIRST_LAYER = (
    "rope_freqs",
    "rope_factors_",
    "token_embd_norm",
    "per_layer_model_proj",
    "per_layer_proj_norm",
)
_OUTPUT = ("output", "cls", "dense_2", "dense_3", "altup_")
