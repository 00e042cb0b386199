"""From a model's shape to what a repository with safetensors holds of it, before any file is there.

The tensors are those of `mgpu.models.shape`; only their element types are others. Quantised repositories keep the
embedding, the head, the norms, the biases and the routers in 16 bits (`modules_to_not_convert`, `ignore`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mgpu.errors import UsageError
from mgpu.models.facts import ModelFacts
from mgpu.models.shape import facts_of_tensors, outlines
from mgpu.models.tensors import GgmlType, Tensor

if TYPE_CHECKING:  # pydantic is slow to import, and only the attributes are needed here
    from mgpu.profile import ModelShape


def facts_for_vllm(name: str, shape: ModelShape, quantisation: str, *, source: str) -> ModelFacts:
    """The facts of `shape`, named `name`, as vLLM loads it from a repository in `quantisation`.

    `quantisation` is one of a profile's names for vLLM ("awq", "fp8", "bf16", ..). The answer's own is in the form of
    `mgpu.models.hf_config.quantisation`, and its `file_bytes` are the tensors of the language model alone. With tied
    embeddings `head_bytes` includes a copy of the embedding, and `tied` is True. Raises UsageError for an unknown
    quantisation.
    """
    storage = _STORAGES.get(quantisation.lower())
    if storage is None:
        raise UsageError(
            f"vLLM's quantisation {quantisation[:80]!r} is unknown",
            code="quantisation-unknown",
            hint=f"known are {', '.join(_STORAGES)}",
        )
    tensors = [
        Tensor(outline, dimensions, storage.type if storage.holds.search(outline) else _HALF)
        for outline, dimensions in outlines(shape)
        if not outline.startswith("rope_freqs")  # computed from config.json
    ]
    return facts_of_tensors(name, shape, tensors, quantisation=storage.name, source=source)


# Routed experts, and besides them the projections of attention and of the feed-forward network.
_EXPERTS = re.compile(r"\.ffn_(?:gate|up|down)_exps\.weight$")
_LINEAR = re.compile(
    r"\.(?:attn_(?:q|k|v|output|q_a|q_b|kv_a_mqa|k_b|v_b)|ffn_(?:gate|up|down)(?:_exps|_shexp)?)\.weight$"
)


@dataclass(frozen=True, slots=True)
class _Storage:
    """How a quantisation stores the tensors whose names `holds` finds; `name` is what planning calls it."""

    name: str
    type: GgmlType
    holds: re.Pattern[str] = _LINEAR


# None of these is a type of ggml's, which gives each of its own a number.
_NO_ID = -1
_HALF = GgmlType(_NO_ID, "16 bits", 1, 2)
# The scale of each row takes two bytes of thousands.
_BYTES = GgmlType(_NO_ID, "8 bits", 1, 1)
# Two groups of 128 values in 4 bits, each with a scale of 16 bits and a zero point of 4.
_FOUR_BITS = GgmlType(_NO_ID, "4 bits in groups of 128", 256, 2 * 64 + 2 * 2 + 1)
# Without zero points.
_SYMMETRIC = GgmlType(_NO_ID, "4 bits in symmetric groups of 128", 128, 64 + 2)
_MXFP4 = GgmlType(_NO_ID, "MXFP4", 32, 16 + 1)
_NVFP4 = GgmlType(_NO_ID, "NVFP4", 16, 8 + 1)

# What a profile does not tell is taken as what forbids most, since a tensor-parallel size that vLLM refuses is found
# out only after the download: FP8 may have one scale for each row (fp8-dynamic, which any size cuts) or for blocks of
# 128 × 128 (Qwen's own), and groups of 4-bit weights are 128 long wherever they are not shorter. Rows of w8a8 have one
# scale each. MXFP4's groups of 32 bind nothing, for vLLM pads the experts; NVFP4's of 16 do.
_STORAGES = {
    "bf16": _Storage("bf16", _HALF),
    "fp16": _Storage("f16", _HALF),
    "fp8": _Storage("fp8-b128", _BYTES),
    "w8a8": _Storage("compressed-tensors-int8", _BYTES),
    "awq": _Storage("awq-int4-g128", _FOUR_BITS),
    "gptq": _Storage("gptq-int4-g128", _FOUR_BITS),
    "w4a16": _Storage("compressed-tensors-int4-g128", _SYMMETRIC),
    "mxfp4": _Storage("mxfp4", _MXFP4, _EXPERTS),
    "nvfp4": _Storage("modelopt-g16", _NVFP4),
}
