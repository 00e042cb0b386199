"""From a GGUF header to what planning needs to know of the model."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from mgpu.errors import BadModel
from mgpu.models.attention import Attention, windows
from mgpu.models.cuts import tensor_cuts
from mgpu.models.facts import Layer, ModelFacts
from mgpu.models.gguf import GgufHeader, LongValue, Value, read_gguf
from mgpu.models.quantisation import FILE_TYPES
from mgpu.models.tensors import layer_of, place


def facts_from_gguf(path: Path) -> ModelFacts:
    """The facts of the GGUF model at `path` (of a split model: its first part).

    An architecture that mgpu does not know by name is read by the keys that all of them share. Raises what
    `read_gguf` raises, and BadModel if the file is no language model or leaves out or garbles what is needed.
    """
    return facts_from_header(read_gguf(path))


def facts_from_header(header: GgufHeader) -> ModelFacts:
    """As `facts_from_gguf`, from a header already read."""
    keys = _Keys(header)
    architecture = keys.text("general.architecture")
    kind = keys.text("general.type", "model")
    if kind != "model" or architecture == "clip":
        what = "a vision projector (mmproj)" if kind == "mmproj" or architecture == "clip" else f"of type {kind!r}"
        raise BadModel(f"{header.path} is {what}, not a language model", hint="give the model's own .gguf file")
    if not header.tensors:
        raise keys.bad("it holds no tensors, only a vocabulary")
    if not keys.has("block_count") or not keys.has("attention.head_count"):
        raise BadModel(
            f"{header.path} has the architecture {architecture!r}, which mgpu cannot plan: "
            "its header names no layers or no attention heads",
            code="architecture-unknown",
            hint="ask the engine: llama-server --fit on -lv 4 -m FILE",
        )
    # Next-token-prediction layers at the end count as blocks, but engines do not load them.
    layers = keys.number("block_count", 1, _MOST_LAYERS) - keys.number("nextn_predict_layers", 0, 64, 0)
    if layers < 1 or layers > len(header.tensors):
        raise keys.bad("its number of layers is impossible")
    placement = place(header.tensors, layers)
    if 0 in placement.layer_bytes:
        raise keys.bad(f"it says {layers} layers, but layer {placement.layer_bytes.index(0)} has no tensors")
    if not placement.embedding_bytes:
        raise keys.bad("it has no token embedding (token_embd.weight)")
    embedding_length = keys.number("embedding_length", 1, 1 << 24)
    heads = max(keys.per_layer("attention.head_count", layers, 1 << 16))
    if not heads:
        raise keys.bad("it has no attention heads")
    attention = _attention(keys, architecture, layers, embedding_length // heads)
    cuts, head_cut = tensor_cuts(header.tensors, attention, heads)
    states = _states(keys, header, layers, embedding_length)
    experts = keys.number("expert_count", 0, 1 << 16, 0)
    used = min(experts, keys.number("expert_used_count", 0, 1 << 16, 0))
    unused = placement.expert_parameters * (experts - used) // max(1, experts)
    head_dim = keys.number("attention.key_length", 1, 1 << 16, max(1, embedding_length // heads))
    return ModelFacts(
        name=keys.text("general.name", header.path.stem),
        architecture=architecture,
        quantisation=quantisation_of(header),
        parameters=placement.parameters,
        active_parameters=placement.parameters - unused,
        context_length=keys.number("context_length", 0, 1 << 40, 0) or None,
        vocabulary=_vocabulary(keys),
        embedding_length=embedding_length,
        feed_forward_length=max(keys.per_layer("feed_forward_length", layers, 1 << 24, 0))
        or placement.feed_forward_length
        or 0,
        expert_feed_forward_length=placement.expert_feed_forward_length,
        shared_expert_feed_forward_length=placement.shared_expert_feed_forward_length,
        heads=heads,
        kv_heads=max(each.kv_heads for each in attention),
        head_dim=keys.number("attention.key_length_mla", 1, 1 << 16, head_dim),
        experts=experts,
        experts_used=used,
        sliding_window=next((each.sliding_window for each in attention if each.sliding_window), None),
        kv_lora_rank=keys.number("attention.kv_lora_rank", 0, 1 << 16, 0) or None,
        tied=placement.tied,
        embedding_bytes=placement.embedding_bytes,
        head_bytes=placement.head_bytes,
        other_bytes=placement.other_bytes,
        head_cut=head_cut,
        layers=tuple(
            Layer(
                weights_bytes=weights,
                expert_bytes=expert,
                kv_heads=each.kv_heads,
                key_length=each.key_length,
                value_length=each.value_length,
                sliding_window=each.sliding_window,
                state_bytes=state,
                cuts=cut,
            )
            for weights, expert, each, state, cut in zip(
                placement.layer_bytes, placement.layer_expert_bytes, attention, states, cuts, strict=True
            )
        ),
        file_bytes=header.file_bytes,
        source=str(header.path),
    )


def quantisation_of(header: GgufHeader) -> str | None:
    """The recipe that the file names, or else the type that most of its weights have; None without weights."""
    named = header.metadata.get("general.file_type")
    if isinstance(named, int) and named in FILE_TYPES:
        return FILE_TYPES[named]
    sizes: Counter[str] = Counter()
    for tensor in header.tensors:
        sizes[tensor.type.name] += tensor.elements
    return sizes.most_common(1)[0][0] if sizes else None


_MOST_LAYERS = 10_000


class _Keys:
    """Typed reading of a header's metadata; the names are the architecture's (`block_count` reads
    `llama.block_count`). A value of a wrong type or out of range is a BadModel."""

    def __init__(self, header: GgufHeader) -> None:
        self._header = header
        self._prefix = ""
        self._prefix = self.text("general.architecture") + "."

    def has(self, name: str) -> bool:
        return self._prefix + name in self._header.metadata

    def value(self, name: str) -> Value | None:
        return self._header.metadata.get(self._prefix + name)

    def text(self, key: str, default: str | None = None) -> str:
        """A general text; without its unprintable characters, since it is shown on terminals."""
        value = self._header.metadata.get(key, default)
        text = "".join(filter(str.isprintable, value)).strip()[:200] if isinstance(value, str) else ""
        if not text and default is None:
            raise self.bad(f"its header has no {key}")
        return text or str(default)

    def number(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self.value(name)
        if value is None and default is not None:
            return default
        return self._checked(name, value, low, high)

    def per_layer(self, name: str, layers: int, high: int, default: int | None = None) -> tuple[int, ...]:
        """A number for each layer, from one for all or from an array (which may go on past `layers`)."""
        value = self.value(name)
        if isinstance(value, tuple):
            if len(value) < layers:
                raise self.bad(f"its {self._prefix + name} has {len(value)} values for {layers} layers")
            return tuple(self._checked(name, each, 0, high) for each in value[:layers])
        return (self.number(name, 0, high, default),) * layers

    def vocabulary_size(self) -> int | None:
        tokens = self._header.metadata.get("tokenizer.ggml.tokens")
        return tokens.length if isinstance(tokens, LongValue) else None

    def embedding_rows(self) -> int:
        (tensor,) = (each for each in self._header.tensors if each.name == "token_embd.weight")
        return tensor.dimensions[-1]

    def bad(self, reason: str) -> BadModel:
        return BadModel(
            f"{self._header.path} is not a usable model: {reason}",
            hint="download it again, or give another file",
        )

    def _checked(self, name: str, value: object, low: int, high: int) -> int:
        if value is None:
            raise self.bad(f"its header has no {self._prefix + name}")
        if not isinstance(value, int) or not low <= value <= high:
            raise self.bad(f"its {self._prefix + name} is impossible")
        return value


def _attention(keys: _Keys, architecture: str, layers: int, head_dim: int) -> tuple[Attention, ...]:
    """Each layer's cache, by the keys that llama.cpp reads (`load_hparams` of the architectures)."""
    heads = keys.per_layer("attention.head_count", layers, 1 << 16)
    kv_heads = (
        keys.per_layer("attention.head_count_kv", layers, 1 << 16) if keys.has("attention.head_count_kv") else heads
    )
    key_length = keys.number("attention.key_length", 1, 1 << 16, head_dim)
    value_length = keys.number("attention.value_length", 0, 1 << 16, head_dim)
    rank = keys.number("attention.kv_lora_rank", 0, 1 << 16, 0)
    if rank and keys.has("attention.key_length_mla"):
        # Absorbed latent attention caches the latent vector and the rotary part once, and no V.
        kv_heads = tuple(min(1, each) for each in kv_heads)
        key_length = rank + keys.number("rope.dimension_count", 0, 1 << 16, max(0, key_length - rank))
        value_length = 0
    local_key = keys.number("attention.key_length_swa", 1, 1 << 16, key_length)
    local_value = keys.number("attention.value_length_swa", 0, 1 << 16, value_length)
    return tuple(
        Attention(
            kv_heads=kv_heads[i] if _keeps_cache(keys, architecture, i, layers) else 0,
            key_length=local_key if window else key_length,
            value_length=local_value if window else value_length,
            sliding_window=window,
        )
        for i, window in enumerate(_windows(keys, architecture, layers))
    )


def _windows(keys: _Keys, architecture: str, layers: int) -> tuple[int | None, ...]:
    default = _DEFAULT_WINDOWS.get(architecture, 0)
    window = keys.number("attention.sliding_window", 0, 1 << 40, default)
    pattern = keys.value("attention.sliding_window_pattern")
    if isinstance(pattern, tuple):
        return windows(architecture, layers, window, keys.per_layer("attention.sliding_window_pattern", layers, 1))
    return windows(architecture, layers, window, pattern if isinstance(pattern, int) and pattern > 0 else None)


def _states(keys: _Keys, header: GgufHeader, layers: int, embedding_length: int) -> tuple[int, ...]:
    """The bytes of each layer's recurrent state for one user, in 32-bit floats (llama-hparams.cpp, `n_embd_r` and
    `n_embd_s`): the last inputs of its convolution, and the state itself."""
    kernel = keys.number("ssm.conv_kernel", 0, 1 << 16, 0)
    inner, state = keys.number("ssm.inner_size", 0, 1 << 24, 0), keys.number("ssm.state_size", 0, 1 << 16, 0)
    groups = keys.number("ssm.group_count", 0, 1 << 16, 0)
    mixed = max(0, kernel - 1) * (inner + 2 * groups * state) + state * inner
    short = max(0, keys.number("shortconv.l_cache", 0, 1 << 16, 0) - 1) * embedding_length
    recurrent = {layer_of(each.name) for each in header.tensors if _RECURRENT.search(each.name)}
    return tuple(_F32 * (mixed or short) if layer in recurrent else 0 for layer in range(layers))


def _keeps_cache(keys: _Keys, architecture: str, layer: int, layers: int) -> bool:
    """False for a recurrent layer and for one that reads an earlier layer's cache."""
    interval = keys.number("full_attention_interval", 0, 1 << 16, _FULL_ATTENTION_INTERVALS.get(architecture, 0))
    if interval and (layer + 1) % interval:
        return False
    if architecture == "gemma3n":
        return layer < _GEMMA3N_CACHED_LAYERS
    return layer < layers - keys.number("attention.shared_kv_layers", 0, layers, 0)


_F32 = 4
_RECURRENT = re.compile(r"\.(ssm|shortconv)_?")
# Built into llama.cpp for files that do not say.
_DEFAULT_WINDOWS = {"gemma2": 4096, "llama4": 8192}
_FULL_ATTENTION_INTERVALS = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4}
_GEMMA3N_CACHED_LAYERS = 20


def _vocabulary(keys: _Keys) -> int:
    return keys.vocabulary_size() or keys.number("vocab_size", 1, 1 << 32, keys.embedding_rows())
