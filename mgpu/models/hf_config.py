"""A config.json as a model's shape: which of its many spellings means what, and which values are impossible."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mgpu.errors import BadModel
from mgpu.models.attention import Attention

_MOST_LAYERS = 4096
_MOST_HEADS = 1 << 16
_LONGEST = 1 << 24
_NESTED = ("text_config", "llm_config", "language_config")
# Where the class and not the file says that embedding and head are one matrix.
_TIED_TYPES = ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "cohere", "cohere2", "gpt2", "starcoder2")
# Every how many layers one has full attention, where the file gives the window alone.
_WINDOW_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "gpt_oss": 2, "cohere2": 4}


class Config:
    """A parsed config.json, read with care: values come typed and within bounds, or BadModel is raised.

    Where a model sees or hears too, its language model's part is what is read.
    """

    def __init__(self, config: object, source: str) -> None:
        self._source = source
        if not isinstance(config, dict):
            raise self.bad("it is not an object")
        nested = [config[key] for key in _NESTED if isinstance(config.get(key), dict)]
        self._values: dict[str, object] = {**config, **nested[0]} if nested else config

    def bad(self, why: str) -> BadModel:
        """Return the error that says what is wrong with this model."""
        return BadModel(f"the model {self._source} cannot be used: {why}", hint="fetch the model again")

    def get(self, *keys: str) -> object:
        """Return the value of the first of `keys` that is there and not null."""
        return next((self._values[key] for key in keys if self._values.get(key) is not None), None)

    def number(self, *keys: str, low: int = 1, high: int = _LONGEST, default: int | None = None) -> int:
        """Return a whole number between `low` and `high`; `default` where none of `keys` is there."""
        value = self.get(*keys)
        if value is None:
            if default is None:
                raise self.bad(f"its config.json does not say {keys[0]}")
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.bad(f"its config.json says {keys[0]} is {repr(value)[:40]}")
        return value

    def text(self, *keys: str) -> str | None:
        """Return a text, None where there is none."""
        value = self.get(*keys)
        return value[:80] if isinstance(value, str) and value.isprintable() else None

    def mapping(self, *keys: str) -> dict[str, object]:
        """Return an object, an empty one where there is none."""
        value = self.get(*keys)
        return value if isinstance(value, dict) else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model's dimensions. `mixture` says of each layer whether it has experts; parameters are counted without
    biases, `expert_parameters` for all routed experts of one layer."""

    architecture: str
    quantisation: str | None
    context_length: int | None
    vocabulary: int
    embedding_length: int
    feed_forward_length: int
    expert_feed_forward_length: int | None
    shared_expert_feed_forward_length: int | None
    heads: int
    head_dim: int
    experts: int
    experts_used: int
    kv_lora_rank: int | None
    tied: bool
    attention: tuple[Attention, ...]
    mixture: tuple[bool, ...]
    attention_parameters: int

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding, and of the head where that is another matrix."""
        return self.vocabulary * self.embedding_length

    @property
    def layer_parameters(self) -> int:
        """Of what every layer has: attention and norms."""
        return self.attention_parameters + 2 * self.embedding_length

    @property
    def shared_parameters(self) -> int:
        """Of what a layer with experts has besides them: the router, and the experts that all tokens use."""
        return self.embedding_length * (self.experts + 3 * (self.shared_expert_feed_forward_length or 0))

    @property
    def dense_parameters(self) -> int:
        """Of the feed-forward network of a layer without experts."""
        return 3 * self.embedding_length * self.feed_forward_length

    @property
    def expert_parameters(self) -> int:
        """Of all routed experts of one layer."""
        return 3 * self.embedding_length * (self.expert_feed_forward_length or 0) * self.experts

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        mixtures = sum(self.mixture)
        dense = len(self.mixture) - mixtures
        embeddings = self.embedding_parameters * (1 if self.tied else 2)
        layers = self.layer_parameters * len(self.mixture)
        experts = self.shared_parameters + self.expert_parameters
        return embeddings + layers + dense * self.dense_parameters + mixtures * experts


def read_shape(config: Config) -> Shape:
    """Return the shape that `config` gives. Raises BadModel for a missing or impossible value."""
    kind = config.text("model_type") or "unknown"
    layers = config.number("num_hidden_layers", "n_layer", "num_layers", high=_MOST_LAYERS)
    width = config.number("hidden_size", "n_embd", "d_model")
    heads = config.number("num_attention_heads", "n_head", high=_MOST_HEADS)
    rank = config.number("kv_lora_rank", low=0, default=0)
    rope, nope, value = (config.number(key, low=0, default=0) for key in _LATENT_KEYS)
    head_dim = nope + rope if rank else config.number("head_dim", default=max(1, width // heads))
    kv_heads = config.number("num_key_value_heads", "num_kv_heads", high=_MOST_HEADS, default=heads)
    experts = config.number("n_routed_experts", "num_local_experts", "num_experts", low=0, high=_MOST_HEADS, default=0)
    used = config.number("num_experts_per_tok", "experts_per_token", low=0, high=_MOST_HEADS, default=min(experts, 2))
    feed_forward = config.number("intermediate_size", "n_inner", "ffn_dim", default=4 * width)
    expert_length = config.number("moe_intermediate_size", default=feed_forward) if experts else None
    if rank:
        attention_parameters = _latent_parameters(config, width, heads, rank)
        cache = Attention(kv_heads=1, key_length=rank + rope, value_length=0)
    else:
        attention_parameters = width * head_dim * (2 * heads + 2 * kv_heads)
        cache = Attention(kv_heads=kv_heads, key_length=head_dim, value_length=head_dim)
    if rank and not (head_dim and value):
        raise config.bad("its config.json gives kv_lora_rank without the heads' dimensions")
    return Shape(
        architecture=kind,
        quantisation=quantisation(config),
        context_length=_context_length(config),
        vocabulary=config.number("vocab_size", high=1 << 31),
        embedding_length=width,
        feed_forward_length=feed_forward,
        expert_feed_forward_length=expert_length,
        shared_expert_feed_forward_length=_shared_length(config, expert_length),
        heads=heads,
        head_dim=head_dim,
        experts=experts,
        experts_used=min(used, experts),
        kv_lora_rank=rank or None,
        tied=config.get("tie_word_embeddings") is True
        or (config.get("tie_word_embeddings") is None and kind in _TIED_TYPES),
        attention=tuple(_attention(config, kind, layers, cache)),
        mixture=_mixture(config, layers, experts),
        attention_parameters=attention_parameters,
    )


def quantisation(config: Config) -> str | None:
    """Return how the weights are stored: METHOD, then `-intBITS` where they are whole numbers, then `-gGROUP` for
    scales of so many values in a row or `-bBLOCK` for scales of square blocks; "bf16", "f16" or "f32" for plain ones.
    None where the file does not say.
    """
    described = config.mapping("quantization_config", "compression_config")
    method = described.get("quant_method")
    if not isinstance(method, str) or not method.isprintable():
        kind = config.text("dtype", "torch_dtype")
        return _PLAIN.get(kind.removeprefix("torch."), kind) if kind else None
    weights = described
    groups = described.get("config_groups")
    if isinstance(groups, dict) and groups:
        first = next(iter(groups.values()))
        nested = first.get("weights") if isinstance(first, dict) else None
        weights = nested if isinstance(nested, dict) else {}
    words = [method[:40].lower()]
    bits = _positive(weights, "bits", "w_bit", "num_bits")
    if bits and weights.get("type") != "float":
        words.append(f"int{bits}")
    block = described.get("weight_block_size") or weights.get("block_structure")
    group = _positive(weights, "group_size", "q_group_size")
    if isinstance(block, list) and len(block) == 2 and type(block[1]) is int and block[1] > 0:
        words.append(f"b{block[1]}")
    elif group:
        words.append(f"g{group}")
    return "-".join(words)


def is_called(stored: str | None, wanted: str) -> bool:
    """Return whether weights that `quantisation` says are `stored` may be called `wanted` (in any case): by that name,
    by its beginning ("awq" of "awq-int4-g128"), or as repositories and profiles call it ("w4a16", "fp8")."""
    name = wanted.lower()
    if stored is None:
        return False
    usual = _USUAL_NAMES.get(name)
    return f"{stored}-".startswith(f"{name}-") or (usual is not None and usual.fullmatch(stored) is not None)


_USUAL_NAMES = {
    "fp16": re.compile("f16"),
    "fp32": re.compile("f32"),
    "fp8": re.compile(r"(?:fbgemm_fp8|modelopt|compressed-tensors)(?:-b\d+)?"),
    "w8a8": re.compile("compressed-tensors-int8.*"),
    "int8": re.compile("compressed-tensors-int8.*"),
    "w4a16": re.compile("compressed-tensors-int4.*"),
    "int4": re.compile(".*-int4.*"),
    "nvfp4": re.compile("(?:modelopt|compressed-tensors)-g16"),
}
_LATENT_KEYS = ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
_PLAIN = {"bfloat16": "bf16", "float16": "f16", "half": "f16", "float32": "f32", "float": "f32"}


def _latent_parameters(config: Config, width: int, heads: int, rank: int) -> int:
    """Multi-head latent attention: queries (through a latent of their own, or not), keys and values, output."""
    rope, nope, value = (config.number(key, low=0, default=0) for key in _LATENT_KEYS)
    query = heads * (nope + rope)
    query_rank = config.number("q_lora_rank", low=0, default=0)
    queries = query_rank * (width + query) if query_rank else width * query
    return queries + width * (rank + rope) + rank * heads * (nope + value) + heads * value * width


def _attention(config: Config, kind: str, layers: int, cache: Attention) -> Sequence[Attention]:
    """The cache of each layer: with a window where the layer has one, with no heads where it has no attention."""
    window = config.number("sliding_window", low=0, default=0)
    if config.get("use_sliding_window") is False:
        window = 0
    windowed = Attention(
        kv_heads=cache.kv_heads,
        key_length=cache.key_length,
        value_length=cache.value_length,
        sliding_window=window or None,
    )
    none = Attention(kv_heads=0, key_length=0, value_length=0)
    types = config.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) < layers or not all(isinstance(each, str) for each in types):
            raise config.bad("the layer_types of its config.json do not name every layer")
        return [
            windowed if "sliding" in each else none if "linear" in each or "mamba" in each else cache
            for each in types[:layers]
        ]
    pattern = config.number("sliding_window_pattern", low=1, default=_WINDOW_PATTERNS.get(kind, 0))
    if not window:
        return [cache] * layers
    return [cache if pattern and (layer + 1) % pattern == 0 else windowed for layer in range(layers)]


def _mixture(config: Config, layers: int, experts: int) -> tuple[bool, ...]:
    if not experts:
        return (False,) * layers
    each = config.get("moe_layer_freq")
    if isinstance(each, list):
        if len(each) < layers:
            raise config.bad("the moe_layer_freq of its config.json does not name every layer")
        return tuple(bool(value) for value in each[:layers])
    first = config.number("first_k_dense_replace", low=0, default=0)
    step = config.number("decoder_sparse_step", "moe_layer_freq", default=1)
    dense = config.get("mlp_only_layers")
    dense = dense if isinstance(dense, list) else []
    return tuple(layer >= first and (layer + 1) % step == 0 and layer not in dense for layer in range(layers))


def _shared_length(config: Config, expert_length: int | None) -> int | None:
    if expert_length is None:
        return None
    shared = config.number("n_shared_experts", low=0, high=_MOST_HEADS, default=0) * expert_length
    return config.number("shared_expert_intermediate_size", low=0, default=shared) or None


def _context_length(config: Config) -> int | None:
    """The longest context vLLM accepts: the trained one, stretched where the file says so (YaRN)."""
    trained = config.number("max_position_embeddings", "n_positions", high=1 << 40, default=0)
    scaling = config.mapping("rope_scaling") or config.mapping("rope_parameters")
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    if scaling.get("rope_type", scaling.get("type")) != "yarn":
        return trained or None
    if type(original) is int and 0 < original < 1 << 40 and isinstance(factor, (int, float)) and 1 <= factor <= 1024:
        trained = max(trained, int(original * factor))
    return trained or None


def _positive(values: dict[str, object], *keys: str) -> int | None:
    return next((value for key in keys if type(value := values.get(key)) is int and 0 < value < 1 << 20), None)
