"""Which type a quantisation gives each tensor, following llama.cpp.

A name such as `Q4_K_M` is a recipe, not a type: more bits go where they matter most. The recipes here are
those of `llama_tensor_get_type` in llama.cpp's `llama-quant.cpp`, and were compared with its choices for each
tensor of a dozen models. IQ4 recipes are those with an importance matrix, as such files are published, the
others those without.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from mgpu.errors import UsageError
from mgpu.models.tensors import GGML_TYPES, GgmlType, Tensor, layer_of

# Recipe to the type of the tensors that it treats no other way (`llama_ftype_get_default_type`).
_BASE_TYPES = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    "Q8_0": "Q8_0",
    "Q6_K": "Q6_K",
    "Q5_K_M": "Q5_K",
    "Q5_K_S": "Q5_K",
    "Q5_1": "Q5_1",
    "Q5_0": "Q5_0",
    "Q4_K_M": "Q4_K",
    "Q4_K_S": "Q4_K",
    "Q4_1": "Q4_1",
    "Q4_0": "Q4_0",
    "IQ4_NL": "IQ4_NL",
    "IQ4_XS": "IQ4_XS",
    "Q3_K_L": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_S": "Q3_K",
    "Q2_K": "Q2_K",
    "MXFP4": "MXFP4",
}
QUANTISATIONS = tuple(_BASE_TYPES)

# `general.file_type` of a GGUF: the recipe that it was made with (`enum llama_ftype`).
FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4",
    39: "NVFP4",
    40: "Q1_0",
    41: "Q2_0",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A quantisation applied to one model: what its choices depend on beside a tensor's name and shape."""

    quantisation: str
    architecture: str
    layers: int
    heads: int
    kv_heads: int
    experts: int
    tied: bool

    def tensor(self, name: str, dimensions: tuple[int, ...]) -> Tensor:
        """The tensor called `name` in the type that this recipe gives it."""
        return Tensor(name, dimensions, self._fitting(self._chosen(name, dimensions), dimensions[0]))

    def _chosen(self, name: str, dimensions: tuple[int, ...]) -> GgmlType:
        if len(dimensions) < 2 or not name.endswith(".weight") or name.endswith(_NEVER_QUANTISED):
            return GGML_TYPES["F32"]
        base = GGML_TYPES[_BASE_TYPES[self.quantisation]]
        if base.block_elements == 1:
            return base
        if name == "output.weight" or (name == "token_embd.weight" and self.tied):
            if self.quantisation == "MXFP4" or dimensions[0] % base.block_elements:
                return GGML_TYPES["Q8_0"]
            return base if base.name == "Q8_0" else GGML_TYPES["Q6_K"]
        if self.quantisation == "MXFP4":
            return base if len(dimensions) > 2 else GGML_TYPES["Q8_0"]
        layer = layer_of(name)
        better = None if layer is None else self._better(name, layer)
        return base if better is None else GGML_TYPES[better]

    def _better(self, name: str, layer: int) -> str | None:
        """The type of a tensor that deserves another than the recipe's base type; None if it does not."""
        if name.endswith((".attn_v.weight", ".attn_kv_b.weight")):
            return "Q8_0" if self.experts == 8 else self._better_value(layer)
        if name.endswith(".attn_k.weight"):
            return "Q8_0" if self.experts == 8 else None
        if name.endswith(".attn_output.weight"):
            return self._better_attention_output()
        if ".ffn_down" in name:
            return self._better_down(layer)
        return None

    def _better_value(self, layer: int) -> str | None:
        shared = self.heads >= 4 * self.kv_heads
        better: str | None = None
        match self.quantisation:
            case "Q2_K":
                better = "Q4_K" if shared else "Q3_K"
            case "Q3_K_M":
                better = "Q5_K" if layer < 2 else "Q4_K"
            case "Q3_K_L":
                better = "Q5_K"
            case "IQ4_NL" | "IQ4_XS":
                better = "Q5_K" if shared else None
            case "Q4_K_M" | "Q5_K_M":
                better = "Q6_K" if self._deserves_more(layer) else None
            case "Q4_K_S":
                better = "Q5_K" if layer < 4 else None
        # Llama 2 and 3 70B, recognised as llama.cpp does it: eight heads share one value.
        seventy = self.architecture == "llama" and self.layers == 80 and self.heads != self.kv_heads
        if seventy and (better or _BASE_TYPES[self.quantisation]) in ("Q3_K", "Q4_K"):
            return "Q5_K"
        return better

    def _better_attention_output(self) -> str | None:
        if self.experts == 8:
            few_bits = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")
            return "Q5_K" if self.quantisation in few_bits else None
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(self.quantisation)

    def _better_down(self, layer: int) -> str | None:
        match self.quantisation:
            case "Q2_K":
                return "Q3_K"
            case "Q3_K_M":
                return "Q5_K" if layer < self.layers // 16 else "Q4_K"
            case "Q3_K_L":
                return "Q5_K"
            case "Q4_K_M" | "Q5_K_M":
                return "Q6_K" if self._deserves_more(layer) else None
            case "Q4_K_S":
                return "Q5_K" if layer < self.layers // 8 else None
        return None

    def _deserves_more(self, layer: int) -> bool:
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2

    def _fitting(self, kind: GgmlType, row: int) -> GgmlType:
        """`kind`, or what llama.cpp falls back to for rows that are not a whole number of its blocks."""
        if row % kind.block_elements == 0:
            return kind
        smaller = GGML_TYPES[_FALLBACKS.get(kind.name, "F16")]
        return smaller if row % smaller.block_elements == 0 else GGML_TYPES["F16"]


def known_quantisation(text: str) -> str:
    """The recipe that `text` names in any case (`q4_k_m`, `MXFP4_MOE`).

    Raises UsageError with the nearest names if there is none.
    """
    name = text.upper().removesuffix("_MOE")
    if name in _BASE_TYPES:
        return name
    near = difflib.get_close_matches(name, QUANTISATIONS, n=3, cutoff=0.5) or ["Q4_K_M", "Q8_0"]
    raise UsageError(
        f"unknown quantisation {text[:40]!r}",
        code="quantisation-unknown",
        hint=f"try {', '.join(near)}; known are {', '.join(QUANTISATIONS)}",
    )


_NEVER_QUANTISED = ("_norm.weight", "ffn_gate_inp.weight")
_FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}
