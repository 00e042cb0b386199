"""From a model's shape and a quantisation to its tensors and facts, before any file is there.

The tensor tables are those of the GGUF files that llama.cpp's converter writes. Checked against llama-server:
it accepts files made from them and reports the same bytes for each device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mgpu.models.attention import Attention, windows
from mgpu.models.cuts import tensor_cuts
from mgpu.models.facts import Layer, ModelFacts
from mgpu.models.quantisation import Recipe, known_quantisation
from mgpu.models.tensors import Tensor, place

if TYPE_CHECKING:  # pydantic is slow to import, and only the attributes are needed here
    from mgpu.profile import ModelShape


Outline = tuple[str, tuple[int, ...]]


def tensor_table(shape: ModelShape, quantisation: str) -> tuple[Tensor, ...]:
    """Every tensor of the GGUF file that holds `shape` in `quantisation`.

    An architecture that is not known by name gets the tensors of a Llama (dense, or a mixture of experts).
    Raises UsageError for an unknown quantisation.
    """
    recipe = Recipe(
        quantisation=known_quantisation(quantisation),
        architecture=shape.architecture,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=1 if shape.kv_lora_rank else shape.kv_heads,
        experts=shape.experts,
        tied=shape.tied_embeddings,
    )
    return tuple(recipe.tensor(name, dimensions) for name, dimensions in outlines(shape))


def facts_from_shape(name: str, shape: ModelShape, quantisation: str) -> ModelFacts:
    """The facts of `shape` in `quantisation`, named `name`.

    `file_bytes` is the tensors alone: the file's header adds about 60 bytes per token of the vocabulary.
    Raises UsageError for an unknown quantisation.
    """
    tensors = tensor_table(shape, quantisation)
    facts = facts_of_tensors(
        name, shape, tensors, quantisation=known_quantisation(quantisation), source=f"profile {name}"
    )
    cuts, head_cut = tensor_cuts(tensors, _attention(shape), shape.heads)
    layers = tuple(replace(layer, cuts=cut) for layer, cut in zip(facts.layers, cuts, strict=True))
    return replace(facts, layers=layers, head_cut=head_cut, weights_basis="table")


def facts_of_tensors(
    name: str, shape: ModelShape, tensors: Sequence[Tensor], *, quantisation: str, source: str
) -> ModelFacts:
    """The facts of `shape` when it is stored as `tensors`, which are those of `outlines`."""
    placement = place(tensors, shape.layers)
    attention = _attention(shape)
    unused = placement.expert_parameters * (shape.experts - shape.experts_used) // max(1, shape.experts)
    return ModelFacts(
        name=name,
        architecture=shape.architecture,
        quantisation=quantisation,
        parameters=placement.parameters,
        active_parameters=placement.parameters - unused,
        context_length=shape.context_length,
        vocabulary=shape.vocabulary,
        embedding_length=shape.embedding_length,
        feed_forward_length=shape.feed_forward_length,
        expert_feed_forward_length=placement.expert_feed_forward_length,
        shared_expert_feed_forward_length=placement.shared_expert_feed_forward_length,
        heads=shape.heads,
        kv_heads=attention[0].kv_heads,
        head_dim=_latent_head_dim(shape) if shape.kv_lora_rank else shape.head_dim,
        experts=shape.experts,
        experts_used=shape.experts_used,
        sliding_window=next((each.sliding_window for each in attention if each.sliding_window), None),
        kv_lora_rank=shape.kv_lora_rank or None,
        tied=placement.tied,
        embedding_bytes=placement.embedding_bytes,
        head_bytes=placement.head_bytes,
        other_bytes=placement.other_bytes,
        layers=tuple(
            Layer(
                weights_bytes=weights,
                expert_bytes=experts,
                kv_heads=each.kv_heads,
                key_length=each.key_length,
                value_length=each.value_length,
                sliding_window=each.sliding_window,
            )
            for weights, experts, each in zip(
                placement.layer_bytes, placement.layer_expert_bytes, attention, strict=True
            )
        ),
        file_bytes=sum(tensor.bytes for tensor in tensors),
        source=source,
    )


def outlines(shape: ModelShape) -> Iterator[Outline]:
    """Yield name and dimensions (innermost first) of every tensor of `shape`, as llama.cpp's converter names them."""
    embedding = (shape.embedding_length, shape.vocabulary)
    yield "token_embd.weight", embedding
    yield "output_norm.weight", (shape.embedding_length,)
    if not shape.tied_embeddings:
        yield "output.weight", embedding
    if shape.rope_freqs:
        yield "rope_freqs.weight", (shape.head_dim // 2,)
    for layer in range(shape.layers):
        attention = _latent_attention(shape) if shape.kv_lora_rank else _plain_attention(shape)
        mixture = shape.experts and layer >= shape.leading_dense_layers
        feed_forward = _experts(shape) if mixture else _dense(shape)
        for part in (attention, _norms(shape), feed_forward):
            for name, dimensions in part:
                yield f"blk.{layer}.{name}", dimensions


_QK_NORM = ("qwen3", "qwen3moe", "gemma3")
_QKV_BIAS = ("qwen2", "gpt-oss")


def _plain_attention(shape: ModelShape) -> Iterator[Outline]:
    width, queries, keys = (
        shape.embedding_length,
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
    )
    yield "attn_q.weight", (width, queries)
    yield "attn_k.weight", (width, keys)
    yield "attn_v.weight", (width, keys)
    yield "attn_output.weight", (queries, width)
    if shape.architecture in _QKV_BIAS:
        yield "attn_q.bias", (queries,)
        yield "attn_k.bias", (keys,)
        yield "attn_v.bias", (keys,)
    if shape.architecture == "gpt-oss":
        yield "attn_output.bias", (width,)
        yield "attn_sinks.weight", (shape.heads,)
    if shape.architecture in _QK_NORM:
        yield "attn_q_norm.weight", (shape.head_dim,)
        yield "attn_k_norm.weight", (shape.head_dim,)


def _latent_attention(shape: ModelShape) -> Iterator[Outline]:
    """Multi-head latent attention in the absorbed form (`attn_k_b` and `attn_v_b` apart)."""
    width, heads, rank = shape.embedding_length, shape.heads, shape.kv_lora_rank or 0
    rope, nope, value = shape.rope_head_dim or 0, shape.nope_head_dim or 0, shape.value_head_dim or 0
    if shape.q_lora_rank:
        yield "attn_q_a.weight", (width, shape.q_lora_rank)
        yield "attn_q_a_norm.weight", (shape.q_lora_rank,)
        yield "attn_q_b.weight", (shape.q_lora_rank, heads * (nope + rope))
    else:
        yield "attn_q.weight", (width, heads * (nope + rope))
    yield "attn_kv_a_mqa.weight", (width, rank + rope)
    yield "attn_kv_a_norm.weight", (rank,)
    yield "attn_k_b.weight", (nope, rank, heads)
    yield "attn_v_b.weight", (rank, value, heads)
    yield "attn_output.weight", (heads * value, width)


def _norms(shape: ModelShape) -> Iterator[Outline]:
    width = (shape.embedding_length,)
    yield "attn_norm.weight", width
    if shape.architecture in ("gemma3", "gpt-oss"):
        yield "post_attention_norm.weight", width
    if shape.architecture == "gemma3":
        yield "post_ffw_norm.weight", width
    if shape.architecture != "gpt-oss":
        yield "ffn_norm.weight", width


def _dense(shape: ModelShape) -> Iterator[Outline]:
    width, length = shape.embedding_length, shape.feed_forward_length
    yield "ffn_gate.weight", (width, length)
    yield "ffn_down.weight", (length, width)
    yield "ffn_up.weight", (width, length)


def _experts(shape: ModelShape) -> Iterator[Outline]:
    width, experts = shape.embedding_length, shape.experts
    length = shape.expert_feed_forward_length or shape.feed_forward_length
    yield "ffn_gate_inp.weight", (width, experts)
    yield "ffn_gate_exps.weight", (width, length, experts)
    yield "ffn_down_exps.weight", (length, width, experts)
    yield "ffn_up_exps.weight", (width, length, experts)
    if shape.architecture == "gpt-oss":
        yield "ffn_gate_inp.bias", (experts,)
        yield "ffn_gate_exps.bias", (length, experts)
        yield "ffn_down_exps.bias", (width, experts)
        yield "ffn_up_exps.bias", (length, experts)
    if shape.architecture == "deepseek2" and shape.q_lora_rank:
        yield "exp_probs_b.bias", (experts,)
    if shape.shared_expert_feed_forward_length:
        shared = shape.shared_expert_feed_forward_length
        yield "ffn_gate_shexp.weight", (width, shared)
        yield "ffn_down_shexp.weight", (shared, width)
        yield "ffn_up_shexp.weight", (width, shared)


def _attention(shape: ModelShape) -> tuple[Attention, ...]:
    if shape.kv_lora_rank:
        key_length = shape.kv_lora_rank + (shape.rope_head_dim or 0)
        return (Attention(kv_heads=1, key_length=key_length, value_length=0),) * shape.layers
    per_layer = windows(shape.architecture, shape.layers, shape.sliding_window, shape.sliding_window_pattern)
    return tuple(
        Attention(
            kv_heads=shape.kv_heads,
            key_length=shape.head_dim,
            value_length=shape.head_dim,
            sliding_window=window,
        )
        for window in per_layer
    )


def _latent_head_dim(shape: ModelShape) -> int:
    return (shape.nope_head_dim or 0) + (shape.rope_head_dim or 0)
