"""Models of many architectures with true headers and no data: what llama-server is asked about to check the plan.

Their sizes are no real model's: odd numbers of heads, tokens and experts, so that a rule which only fits the well-known
models shows. Tensors and keys are those that llama.cpp reads (`load_arch_hparams` and `load_arch_tensors` in
src/models/*.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from mgpu.models.tensors import GGML_TYPES, Tensor
from tests.fakes.sparse_gguf import Entry, f32, flag, text, u32, u32s, vocabulary_entries, write_gguf

Outline = tuple[str, tuple[int, ...]]
Value = int | float | bool | str | tuple[int, ...]
Block = Callable[[int], Iterator[Outline]]


@dataclass(frozen=True)
class SparseModel:
    """A model without data: the keys of its header, the tensors of each layer, and what its matrices are stored as."""

    architecture: str
    keys: Mapping[str, Value]
    block: Block
    vocabulary: int
    tied: bool = False
    type: str = "Q4_K"
    rope_freqs: int = 0

    @property
    def layers(self) -> int:
        return int(str(self.keys["block_count"]))

    @property
    def width(self) -> int:
        return int(str(self.keys["embedding_length"]))

    def write(self, path: Path) -> Path:
        """Write it to `path`, and return that."""
        entries = [entry(key, value) for key, value in self.metadata().items()]
        write_gguf(path, (*entries, *vocabulary_entries(self.vocabulary)), tuple(self.tensors()))
        return path

    def metadata(self) -> dict[str, Value]:
        """The keys of its header, but for the tokens themselves."""
        known = {"context_length": 131072, "vocab_size": self.vocabulary} | dict(self.keys)
        general: dict[str, Value] = {
            "general.architecture": self.architecture,
            "general.type": "model",
            "general.name": "sparse",
            "general.quantization_version": 2,
        }
        return general | {f"{self.architecture}.{name}": value for name, value in known.items()}

    def tensors(self) -> Iterator[Tensor]:
        """Its tensors, in the order of the file."""
        yield self._tensor("token_embd.weight", (self.width, self.vocabulary))
        yield self._tensor("output_norm.weight", (self.width,))
        if not self.tied:
            yield self._tensor("output.weight", (self.width, self.vocabulary))
        if self.rope_freqs:
            yield self._tensor("rope_freqs.weight", (self.rope_freqs,))
        for layer in range(self.layers):
            for name, dimensions in self.block(layer):
                yield self._tensor(f"blk.{layer}.{name}", dimensions)

    def _tensor(self, name: str, dimensions: tuple[int, ...]) -> Tensor:
        plain = len(dimensions) == 1 or "conv1d" in name or "ffn_gate_inp" in name or "ssm_a" in name or "ssm_d" in name
        kind = "F32" if plain else self.type
        if dimensions[0] % GGML_TYPES[kind].block_elements:
            kind = "Q8_0"
        if dimensions[0] % GGML_TYPES[kind].block_elements:
            kind = "F16"
        return Tensor(name, dimensions, GGML_TYPES[kind])


def entry(key: str, value: Value) -> Entry:
    """Return the entry of a header that holds `value`."""
    if isinstance(value, bool):
        return flag(key, value=value)
    if isinstance(value, float):
        return f32(key, value)
    if isinstance(value, str):
        return text(key, value)
    return u32s(key, value) if isinstance(value, tuple) else u32(key, value)


def _attention(
    width: int, heads: int, kv: int, head: int, *, norm: bool = False, gated: bool = False
) -> Iterator[Outline]:
    yield "attn_norm.weight", (width,)
    yield "attn_q.weight", (width, heads * head * (2 if gated else 1))
    yield "attn_k.weight", (width, kv * head)
    yield "attn_v.weight", (width, kv * head)
    yield "attn_output.weight", (heads * head, width)
    if norm:
        yield "attn_q_norm.weight", (head,)
        yield "attn_k_norm.weight", (head,)


def _dense(width: int, length: int, *, norm: str = "ffn_norm") -> Iterator[Outline]:
    if norm:
        yield f"{norm}.weight", (width,)
    yield "ffn_gate.weight", (width, length)
    yield "ffn_up.weight", (width, length)
    yield "ffn_down.weight", (length, width)


def _experts(width: int, length: int, count: int, *, shared: int = 0, norm: str = "ffn_norm") -> Iterator[Outline]:
    yield f"{norm}.weight", (width,)
    yield "ffn_gate_inp.weight", (width, count)
    yield "ffn_gate_exps.weight", (width, length, count)
    yield "ffn_up_exps.weight", (width, length, count)
    yield "ffn_down_exps.weight", (length, width, count)
    if shared:
        yield "ffn_gate_shexp.weight", (width, shared)
        yield "ffn_up_shexp.weight", (width, shared)
        yield "ffn_down_shexp.weight", (shared, width)


def _keys(layers: int, width: int, length: int, heads: int, kv: int, head: int, **more: Value) -> dict[str, Value]:
    named = {key.replace("__", "."): value for key, value in more.items()}
    return {
        "block_count": layers,
        "embedding_length": width,
        "feed_forward_length": length,
        "attention.head_count": heads,
        "attention.head_count_kv": kv,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": head,
        "attention.layer_norm_rms_epsilon": 1e-5,
        **named,
    }


def _linear(width: int, key: int, key_heads: int, value_heads: int) -> Iterator[Outline]:
    """A gated delta net (Qwen3-Next's and Qwen3.5's recurrent layers)."""
    value = key * value_heads
    convolved = 2 * key * key_heads + value
    yield "attn_norm.weight", (width,)
    yield "attn_qkv.weight", (width, convolved)
    yield "attn_gate.weight", (width, value)
    yield "ssm_conv1d.weight", (4, convolved)
    yield "ssm_dt.bias", (value_heads,)
    yield "ssm_a", (value_heads,)
    yield "ssm_beta.weight", (width, value_heads)
    yield "ssm_alpha.weight", (width, value_heads)
    yield "ssm_norm.weight", (key,)
    yield "ssm_out.weight", (value, width)


def _mamba2(width: int, inner: int, state: int, groups: int, heads: int) -> Iterator[Outline]:
    convolved = inner + 2 * groups * state
    yield "attn_norm.weight", (width,)
    yield "ssm_in.weight", (width, 2 * inner + 2 * groups * state + heads)
    yield "ssm_conv1d.weight", (4, convolved)
    yield "ssm_conv1d.bias", (convolved,)
    yield "ssm_dt.bias", (heads,)
    yield "ssm_a", (1, heads)
    yield "ssm_d", (1, heads)
    yield "ssm_norm.weight", (inner // groups, groups)
    yield "ssm_out.weight", (inner, width)


def _gemma3(_: int) -> Iterator[Outline]:
    yield from _attention(2560, 8, 4, 256, norm=True)
    yield from _dense(2560, 10240)
    yield "post_attention_norm.weight", (2560,)
    yield "post_ffw_norm.weight", (2560,)


def _gemma2(_: int) -> Iterator[Outline]:
    yield from _attention(3584, 16, 8, 256)
    yield from _dense(3584, 14336)
    yield "post_attention_norm.weight", (3584,)
    yield "post_ffw_norm.weight", (3584,)


def _gemma4(layer: int) -> Iterator[Outline]:
    local = (layer + 1) % 6 != 0
    yield from _attention(3840, 16, 8 if local else 1, 256 if local else 512, norm=True)
    yield from _dense(3840, 15360)
    yield "post_attention_norm.weight", (3840,)
    yield "post_ffw_norm.weight", (3840,)


def _phi3(_: int) -> Iterator[Outline]:
    yield "attn_norm.weight", (3072,)
    yield "attn_qkv.weight", (3072, 9216)
    yield "attn_output.weight", (3072, 3072)
    yield "ffn_norm.weight", (3072,)
    yield "ffn_up.weight", (3072, 16384)
    yield "ffn_down.weight", (8192, 3072)


def _glm(layer: int) -> Iterator[Outline]:
    yield from _attention(4096, 96, 8, 128)
    yield "attn_q.bias", (12288,)
    yield "attn_k.bias", (1024,)
    yield "attn_v.bias", (1024,)
    if layer < 1:
        yield from _dense(4096, 10944, norm="post_attention_norm")
    else:
        yield from _experts(4096, 1408, 128, shared=1408, norm="post_attention_norm")
        yield "exp_probs_b.bias", (128,)


def _llama4(layer: int) -> Iterator[Outline]:
    yield from _attention(5120, 40, 8, 128)
    if layer % 2:
        yield from _experts(5120, 8192, 16, shared=8192)
    else:
        yield from _dense(5120, 16384)


def _latent(width: int, heads: int, rank: int, query_rank: int) -> Iterator[Outline]:
    yield "attn_norm.weight", (width,)
    yield "attn_q_a.weight", (width, query_rank)
    yield "attn_q_a_norm.weight", (query_rank,)
    yield "attn_q_b.weight", (query_rank, heads * 192)
    yield "attn_kv_a_mqa.weight", (width, rank + 64)
    yield "attn_kv_a_norm.weight", (rank,)
    yield "attn_k_b.weight", (128, rank, heads)
    yield "attn_v_b.weight", (rank, 128, heads)
    yield "attn_output.weight", (heads * 128, width)


def _kimi(layer: int) -> Iterator[Outline]:
    yield from _latent(3584, 48, 384, 1024)
    if layer < 2:
        yield from _dense(3584, 9216)
    else:
        yield from _experts(3584, 1280, 96, shared=2560)
        yield "exp_probs_b.bias", (96,)


def _qwen35(layer: int) -> Iterator[Outline]:
    if (layer + 1) % 4:
        yield from _linear(5120, 128, 16, 48)
    else:
        yield from _attention(5120, 24, 4, 256, norm=True, gated=True)
    yield from _dense(5120, 17408, norm="post_attention_norm")


def _qwen35moe(layer: int) -> Iterator[Outline]:
    if (layer + 1) % 4:
        yield from _linear(2048, 128, 16, 32)
    else:
        yield from _attention(2048, 16, 2, 256, norm=True, gated=True)
    yield from _experts(2048, 512, 256, shared=512, norm="post_attention_norm")
    yield "ffn_gate_inp_shexp.weight", (2048,)


def _granite(layer: int) -> Iterator[Outline]:
    if layer in (5, 15, 25):
        yield from _attention(1536, 12, 4, 128)
    else:
        yield from _mamba2(1536, 3072, 128, 1, 48)
    yield from _experts(1536, 512, 62, shared=1024)


def _cohere2(_: int) -> Iterator[Outline]:
    yield from _attention(4096, 32, 8, 128)
    yield from _dense(4096, 14336, norm="")


_QWEN35_STATE: dict[str, Value] = {"ssm.conv_kernel": 4, "ssm.state_size": 128, "ssm.group_count": 16}

MODELS: dict[str, SparseModel] = {
    "llama-odd": SparseModel(
        "llama",
        _keys(39, 5120, 13824, 40, 40, 128),
        lambda _: chain(_attention(5120, 40, 40, 128), _dense(5120, 13824)),
        32003,
        type="Q5_K",
        rope_freqs=64,
    ),
    "llama-wide-vocabulary": SparseModel(
        "llama",
        _keys(11, 960, 2560, 15, 5, 64),
        lambda _: chain(_attention(960, 15, 5, 64), _dense(960, 2560)),
        200_000,
        tied=True,
        type="Q8_0",
    ),
    "qwen3-narrow": SparseModel(
        "qwen3",
        _keys(28, 1024, 3072, 16, 8, 128),
        lambda _: chain(_attention(1024, 16, 8, 128, norm=True), _dense(1024, 3072)),
        151_936,
        tied=True,
        type="F16",
    ),
    "gemma3": SparseModel(
        "gemma3", _keys(34, 2560, 10240, 8, 4, 256, attention__sliding_window=1024), _gemma3, 262_144, tied=True
    ),
    "gemma2": SparseModel(
        "gemma2",
        _keys(
            42,
            3584,
            14336,
            16,
            8,
            256,
            attention__sliding_window=4096,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
        ),
        _gemma2,
        256_000,
        tied=True,
    ),
    "gemma4": SparseModel(
        "gemma4",
        _keys(
            30,
            3840,
            15360,
            16,
            8,
            512,
            attention__sliding_window=1024,
            attention__key_length_swa=256,
            attention__value_length_swa=256,
            rope__dimension_count_swa=256,
            embedding_length_per_layer_input=0,
        )
        | {
            "attention.sliding_window_pattern": tuple(int((i + 1) % 6 != 0) for i in range(30)),
            "attention.head_count_kv": tuple(8 if (i + 1) % 6 else 1 for i in range(30)),
        },
        _gemma4,
        262_144,
        tied=True,
        rope_freqs=256,
    ),
    "phi3": SparseModel("phi3", _keys(32, 3072, 8192, 32, 32, 96), _phi3, 32_064),
    "cohere2": SparseModel(
        "cohere2",
        _keys(
            32,
            4096,
            14336,
            32,
            8,
            128,
            attention__sliding_window=4096,
            attention__layer_norm_epsilon=1e-5,
            logit_scale=0.25,
        ),
        _cohere2,
        256_000,
        tied=True,
    ),
    "qwen3moe-large": SparseModel(
        "qwen3moe",
        _keys(30, 4096, 12288, 64, 4, 128, expert_count=128, expert_used_count=8, expert_feed_forward_length=1536),
        lambda _: chain(_attention(4096, 64, 4, 128, norm=True), _experts(4096, 1536, 128)),
        151_936,
    ),
    "llama-16-experts": SparseModel(
        "llama",
        _keys(20, 3072, 6400, 24, 8, 128, expert_count=16, expert_used_count=3),
        lambda _: chain(_attention(3072, 24, 8, 128), _experts(3072, 6400, 16)),
        50_257,
    ),
    "glm4moe": SparseModel(
        "glm4moe",
        _keys(
            23,
            4096,
            10944,
            96,
            8,
            128,
            expert_count=128,
            expert_used_count=8,
            expert_feed_forward_length=1408,
            expert_shared_count=1,
            leading_dense_block_count=1,
            expert_weights_norm=True,
        ),
        _glm,
        151_552,
    ),
    "llama4": SparseModel(
        "llama4",
        _keys(
            24,
            5120,
            16384,
            40,
            8,
            128,
            expert_count=16,
            expert_used_count=1,
            expert_feed_forward_length=8192,
            interleave_moe_layer_step=2,
        ),
        _llama4,
        202_048,
    ),
    "deepseek2-narrow": SparseModel(
        "deepseek2",
        _keys(
            25,
            3584,
            9216,
            48,
            1,
            448,
            expert_count=96,
            expert_used_count=6,
            expert_feed_forward_length=1280,
            expert_shared_count=2,
            leading_dense_block_count=2,
            attention__kv_lora_rank=384,
            attention__q_lora_rank=1024,
            attention__key_length_mla=192,
            attention__value_length_mla=128,
            expert_weights_scale=1.0,
            expert_gating_func=2,
        )
        | {"attention.value_length": 384, "rope.dimension_count": 64},
        _kimi,
        163_840,
    ),
    "qwen35": SparseModel(
        "qwen35",
        _keys(
            32,
            5120,
            17408,
            24,
            4,
            256,
            full_attention_interval=4,
            rope__dimension_sections=(11, 11, 10, 0),
            ssm__inner_size=6144,
            ssm__time_step_rank=48,
        )
        | _QWEN35_STATE
        | {"rope.dimension_count": 64},
        _qwen35,
        248_320,
    ),
    "qwen35moe": SparseModel(
        "qwen35moe",
        _keys(
            40,
            2048,
            512,
            16,
            2,
            256,
            full_attention_interval=4,
            rope__dimension_sections=(11, 11, 10, 0),
            ssm__inner_size=4096,
            ssm__time_step_rank=32,
            expert_count=256,
            expert_used_count=8,
            expert_feed_forward_length=512,
            expert_shared_feed_forward_length=512,
        )
        | _QWEN35_STATE
        | {"rope.dimension_count": 64},
        _qwen35moe,
        248_320,
    ),
    "granitehybrid": SparseModel(
        "granitehybrid",
        _keys(
            32,
            1536,
            512,
            12,
            4,
            128,
            expert_count=62,
            expert_used_count=6,
            expert_feed_forward_length=512,
            expert_shared_feed_forward_length=1024,
            ssm__conv_kernel=4,
            ssm__inner_size=3072,
            ssm__state_size=128,
            ssm__group_count=1,
            ssm__time_step_rank=48,
        )
        | {"attention.head_count_kv": tuple(4 if i in (5, 15, 25) else 0 for i in range(32))},
        _granite,
        100_352,
        tied=True,
    ),
    "qwen3moe-small": SparseModel(
        "qwen3moe",
        _keys(16, 2048, 6144, 32, 4, 128, expert_count=96, expert_used_count=8, expert_feed_forward_length=768),
        lambda _: chain(_attention(2048, 32, 4, 128, norm=True), _experts(2048, 768, 96)),
        8192,
    ),
}
"""The models, by names of their own."""
