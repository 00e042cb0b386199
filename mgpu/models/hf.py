"""A Hugging Face model (config.json and safetensors) as what planning needs to know of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mgpu.errors import BadModel
from mgpu.models.facts import Layer, ModelFacts
from mgpu.models.hf_config import Config, Shape, read_shape
from mgpu.models.safetensors import folder_tensors

_LARGEST_CONFIG_BYTES = 10_000_000


def facts_from_folder(path: Path) -> ModelFacts:
    """Return the facts of the model in the folder `path`, from its config.json and the headers of its weights.

    Raises BadModel when it is no such folder, is damaged, or is no language model.
    """
    config_path = path / "config.json"
    try:
        if config_path.stat().st_size > _LARGEST_CONFIG_BYTES:
            raise BadModel(f"{config_path} is unusable: it is larger than any configuration")
        config = json.loads(config_path.read_bytes())
    except FileNotFoundError:
        raise BadModel(
            f"{path} holds no model: there is no config.json in it",
            code="model-missing",
            hint="give the folder that holds config.json, or a .gguf file",
        ) from None
    except NotADirectoryError:
        raise BadModel(
            f"{path} is neither a .gguf file nor a folder",
            code="model-missing",
            hint="give the folder that holds config.json, or a .gguf file",
        ) from None
    except OSError as error:
        raise BadModel(f"{config_path} cannot be read: {error.strerror}", code="model-missing") from None
    except (ValueError, RecursionError):
        raise BadModel(f"{config_path} is unusable: it is not JSON", hint="fetch the model again") from None
    name = path.resolve().name
    return facts_from_config(config, folder_tensors(path), name=name, source=str(path))


def facts_from_config(config: object, weights: Mapping[str, int] | int, *, name: str, source: str) -> ModelFacts:
    """Return the facts of a model from its parsed config.json and its weights: the bytes of each tensor by name or,
    before they can be known, of all together, which are then dealt to the layers by their parameters.

    `parameters` are computed from the shape, and leave out biases and what is beside the language model. Raises
    BadModel when a value that is needed is missing or impossible; the message names `source` and the key.
    """
    read = Config(config, source)
    shape = read_shape(read)
    placed = _estimated(shape, weights) if isinstance(weights, int) else _placed(read, shape, weights)
    active_share = shape.experts_used / shape.experts if shape.experts else 1.0
    parameters = shape.parameters
    expert_parameters = shape.expert_parameters * sum(shape.mixture)
    return ModelFacts(
        name=name,
        architecture=shape.architecture,
        quantisation=shape.quantisation,
        parameters=parameters,
        active_parameters=parameters - round(expert_parameters * (1 - active_share)),
        context_length=shape.context_length,
        vocabulary=shape.vocabulary,
        embedding_length=shape.embedding_length,
        feed_forward_length=shape.feed_forward_length,
        expert_feed_forward_length=shape.expert_feed_forward_length,
        shared_expert_feed_forward_length=shape.shared_expert_feed_forward_length,
        heads=shape.heads,
        kv_heads=max(each.kv_heads for each in shape.attention),
        head_dim=shape.head_dim,
        experts=shape.experts,
        experts_used=shape.experts_used,
        sliding_window=next((each.sliding_window for each in shape.attention if each.sliding_window), None),
        kv_lora_rank=shape.kv_lora_rank,
        tied=placed.tied,
        embedding_bytes=placed.embedding_bytes,
        head_bytes=placed.head_bytes + (placed.embedding_bytes if placed.tied else 0),
        other_bytes=placed.other_bytes,
        layers=tuple(
            Layer(
                weights_bytes=size,
                expert_bytes=experts,
                kv_heads=each.kv_heads,
                key_length=each.key_length,
                value_length=each.value_length,
                sliding_window=each.sliding_window,
            )
            for size, experts, each in zip(placed.layer_bytes, placed.expert_bytes, shape.attention, strict=True)
        ),
        file_bytes=weights if isinstance(weights, int) else sum(weights.values()),
        source=source,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """Weights by where they belong, in bytes; `head_bytes` without the embedding it may be tied to."""

    embedding_bytes: int
    head_bytes: int
    other_bytes: int
    tied: bool
    layer_bytes: Sequence[int]
    expert_bytes: Sequence[int]


# What is beside the language model: it has layers of its own.
_BESIDE = re.compile(r"(?:^|\.)(?:vision|visual|audio|image|multi_modal|mm_|vit|speech|embed_vision|embed_audio)")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,6})\.")
_EXPERT = re.compile(r"\.experts\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|tok_embeddings|word_embeddings)\.")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|output)\.")
_NORM = re.compile(r"(?:^|\.)(?:norm|final_layernorm|ln_f)\.")


def _placed(read: Config, shape: Shape, weights: Mapping[str, int]) -> _Placed:
    layers = len(shape.attention)
    layer_bytes, expert_bytes = [0] * layers, [0] * layers
    embedding = head = other = 0
    has_head = False
    for name, size in weights.items():
        match = _LAYER.search(name)
        if _BESIDE.search(name):
            other += size
        elif match:
            layer = int(match[1])
            if layer < layers:  # behind them come layers that predict further tokens, which are not loaded
                layer_bytes[layer] += size
                expert_bytes[layer] += size if _EXPERT.search(name) else 0
        elif _EMBEDDING.search(name):
            embedding += size
        elif _HEAD.search(name) or _NORM.search(name):
            head += size
            has_head = has_head or _HEAD.search(name) is not None
        else:
            other += size
    if 0 in layer_bytes:
        raise read.bad(f"it says {layers} layers, but layer {layer_bytes.index(0)} has no weights")
    if not embedding:
        raise read.bad("its weights have no token embedding")
    return _Placed(
        embedding_bytes=embedding,
        head_bytes=head,
        other_bytes=other,
        tied=not has_head,
        layer_bytes=layer_bytes,
        expert_bytes=expert_bytes,
    )


def _estimated(shape: Shape, weights_bytes: int) -> _Placed:
    """Embedding and head in 16 bits, as quantised models keep them, and the rest on the layers."""
    embedding = min(2 * shape.embedding_parameters, weights_bytes // 2)
    head = 0 if shape.tied else min(embedding, weights_bytes // 4)
    rest = max(0, weights_bytes - embedding - head)
    layers = [
        shape.layer_parameters
        + (shape.shared_parameters + shape.expert_parameters if mixture else shape.dense_parameters)
        for mixture in shape.mixture
    ]
    layer_bytes = [rest * size // max(1, sum(layers)) for size in layers]
    expert_bytes = [
        size * shape.expert_parameters // max(1, parameters) if mixture else 0
        for size, parameters, mixture in zip(layer_bytes, layers, shape.mixture, strict=True)
    ]
    return _Placed(
        embedding_bytes=embedding,
        head_bytes=head,
        other_bytes=0,
        tied=shape.tied,
        layer_bytes=layer_bytes,
        expert_bytes=expert_bytes,
    )
