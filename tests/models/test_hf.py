"""Hugging Face models as facts: the shapes of well-known ones, real headers, and whatever may be in such a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.errors import BadModel
from mgpu.models.facts import ModelFacts
from mgpu.models.hf import facts_from_config, facts_from_folder
from mgpu.models.safetensors import folder_tensors
from tests.fakes import tiny_llama

# The keys that matter of published models' config.json.
LLAMA_8B: dict[str, object] = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
MIXTRAL: dict[str, object] = LLAMA_8B | {
    "model_type": "mixtral",
    "max_position_embeddings": 32768,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "vocab_size": 32000,
}
QWEN_30B_A3B: dict[str, object] = {
    "model_type": "qwen3_moe",
    "torch_dtype": "bfloat16",
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN2_7B: dict[str, object] = {
    "model_type": "qwen2",
    "torch_dtype": "bfloat16",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
GEMMA_12B: dict[str, object] = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "head_dim": 256,
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "max_position_embeddings": 131072,
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "sliding_window": 1024,
        "vocab_size": 262208,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"num_hidden_layers": 27, "hidden_size": 1152},
}
GPT_OSS_20B: dict[str, object] = {
    "model_type": "gpt_oss",
    "head_dim": 64,
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {"quant_method": "mxfp4"},
    "rope_scaling": {"factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn"},
    "sliding_window": 128,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
DEEPSEEK_V3: dict[str, object] = {
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "tie_word_embeddings": False,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def facts_of(config: object, weights: Any = 10_000_000_000) -> ModelFacts:
    return facts_from_config(config, weights, name="model", source="org/model")


@pytest.mark.parametrize(
    ("config", "billions", "active", "kv_token_bytes", "context_length"),
    [
        pytest.param(LLAMA_8B, 8.03, 8.03, 131_072, 131_072, id="Llama 3.1 8B"),
        pytest.param(MIXTRAL, 46.7, 12.9, 131_072, 32_768, id="Mixtral 8x7B"),
        pytest.param(QWEN_30B_A3B, 30.53, 3.35, 98_304, 40_960, id="Qwen3 30B A3B"),
        pytest.param(QWEN2_7B, 7.62, 7.62, 57_344, 32_768, id="Qwen2.5 7B"),
        pytest.param(GEMMA_12B, 11.77, 11.77, 393_216, 131_072, id="Gemma 3 12B, which sees, too"),
        pytest.param(GPT_OSS_20B, 20.9, 4.19, 49_152, 131_072, id="gpt-oss 20B"),
        pytest.param(DEEPSEEK_V3, 671.0, 37.5, 70_272, 163_840, id="DeepSeek V3"),
    ],
)
def test_a_well_known_shape(
    config: dict[str, object], billions: float, active: float, kv_token_bytes: int, context_length: int
) -> None:
    facts = facts_of(config)
    assert facts.parameters == pytest.approx(billions * 1e9, rel=0.005)
    assert facts.active_parameters == pytest.approx(active * 1e9, rel=0.01)
    assert facts.context_length == context_length
    cache = sum(layer.kv_heads * (layer.key_length + layer.value_length) * 2 for layer in facts.layers)
    assert cache == kv_token_bytes
    assert sum(layer.weights_bytes for layer in facts.layers) <= facts.file_bytes == 10_000_000_000


@pytest.mark.parametrize(
    ("config", "windowed"),
    [
        pytest.param(GEMMA_12B, [layer for layer in range(48) if (layer + 1) % 6], id="five of six"),
        pytest.param(GPT_OSS_20B, list(range(0, 24, 2)), id="as layer_types says"),
        pytest.param(QWEN2_7B, [], id="a window that is switched off"),
        pytest.param(LLAMA_8B | {"model_type": "mistral", "sliding_window": 4096}, list(range(32)), id="every layer"),
    ],
)
def test_windows_are_those_of_the_layers(config: dict[str, object], windowed: list[int]) -> None:
    layers = facts_of(config).layers
    assert [number for number, layer in enumerate(layers) if layer.sliding_window] == windowed


def test_layers_without_attention_keep_no_cache() -> None:
    types = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 8
    layers = facts_of(LLAMA_8B | {"layer_types": types}).layers
    assert [layer.kv_heads for layer in layers] == [0, 0, 0, 8] * 8


@pytest.mark.parametrize(
    ("described", "name"),
    [
        pytest.param({"dtype": "bfloat16"}, "bf16", id="none"),
        pytest.param({"dtype": None, "torch_dtype": "float16"}, "f16", id="none, an older spelling"),
        pytest.param(
            {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}, "awq-int4-g128", id="AWQ"
        ),
        pytest.param(
            {"quantization_config": {"quant_method": "awq", "w_bit": 4, "q_group_size": 64}},
            "awq-int4-g64",
            id="AWQ, an older spelling",
        ),
        pytest.param(
            {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": -1}}, "gptq-int4", id="no groups"
        ),
        pytest.param({"quantization_config": DEEPSEEK_V3["quantization_config"]}, "fp8-b128", id="FP8 in blocks"),
        pytest.param({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4", id="MXFP4"),
        pytest.param(
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 128}}},
                }
            },
            "compressed-tensors-int4-g128",
            id="compressed tensors",
        ),
        pytest.param(
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "group_size": None}}},
                }
            },
            "compressed-tensors",
            id="compressed tensors in FP8",
        ),
    ],
)
def test_the_quantisation_is_named(described: dict[str, object], name: str) -> None:
    assert facts_of(LLAMA_8B | described).quantisation == name


def test_a_real_folder(tmp_path: Path) -> None:
    facts = facts_from_folder(tiny_llama.make_tiny_llama(tmp_path / "tiny"))
    tensors = 2 * tiny_llama.VOCABULARY * tiny_llama.WIDTH
    assert (facts.name, facts.architecture, facts.quantisation) == ("tiny", "llama", "bf16")
    assert facts.embedding_bytes == tensors
    assert facts.head_bytes == tensors + 2 * tiny_llama.WIDTH, "the head and its norm"
    assert facts.file_bytes == 2 * facts.parameters + 2 * tiny_llama.WIDTH
    assert facts.file_bytes == facts.embedding_bytes + facts.head_bytes + 4 * facts.layers[0].weights_bytes
    assert (facts.heads, facts.kv_heads, facts.head_dim, facts.tied) == (8, 4, 32, False)


def test_weights_are_placed_by_their_names() -> None:
    weights = {
        "language_model.model.embed_tokens.weight": 1000,
        "language_model.model.norm.weight": 1,
        "vision_tower.encoder.layers.0.mlp.weight": 500,
        "model.layers.40.nextn.weight": 7000,  # predicts further tokens, and is not loaded
        **{f"model.layers.{layer}.self_attn.q_proj.qweight": 10 for layer in range(32)},
        **{f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": 20 for layer in range(32) for expert in (0, 1)},
        "model.layers.5.mlp.shared_experts.up_proj.weight": 3,
    }
    facts = facts_of(MIXTRAL, weights)
    assert (facts.embedding_bytes, facts.other_bytes, facts.tied, facts.head_bytes) == (1000, 500, True, 1001)
    assert facts.layers[0].weights_bytes == 50
    assert facts.layers[5].weights_bytes == 53
    assert {layer.expert_bytes for layer in facts.layers} == {40}


def test_a_split_model_is_all_the_files_of_its_index(tmp_path: Path) -> None:
    write_split(tmp_path)
    assert sum(folder_tensors(tmp_path).values()) == 2 * sum(rows * columns for rows, columns in SPLIT.values())
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(BadModel, match=r"b\.safetensors is missing"):
        folder_tensors(tmp_path)


def test_wide_tensors_are_counted_as_they_are_loaded(tmp_path: Path) -> None:
    header = {
        "small": {"dtype": "BF16", "shape": [10], "data_offsets": [0, 20]},
        "norm": {"dtype": "F32", "shape": [2], "data_offsets": [20, 28]},
    }
    write_raw(tmp_path / "model.safetensors", json.dumps(header).encode(), 28)
    assert folder_tensors(tmp_path) == {"small": 20, "norm": 4}


SPLIT = {"one": (4, 4), "two": (2, 8)}


def write_split(folder: Path) -> None:
    for file, name in (("a.safetensors", "one"), ("b.safetensors", "two")):
        tiny_llama.write_safetensors(folder / file, {name: SPLIT[name]})
    index = {"metadata": {"total_size": 64}, "weight_map": {"one": "a.safetensors", "two": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_raw(path: Path, header: bytes, data_bytes: int, length: int | None = None) -> None:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + bytes(data_bytes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"num_attention_heads": 0}, "num_attention_heads is 0", id="no heads"),
        pytest.param({"num_attention_heads": None}, "does not say num_attention_heads", id="heads missing"),
        pytest.param({"num_hidden_layers": 10**30}, "num_hidden_layers is 1000", id="absurdly many layers"),
        pytest.param({"hidden_size": -4096}, "hidden_size is -4096", id="a negative width"),
        pytest.param({"hidden_size": 4096.5}, "hidden_size is 4096.5", id="half a dimension"),
        pytest.param({"vocab_size": "many"}, "vocab_size is 'many'", id="a text for a number"),
        pytest.param({"vocab_size": True}, "vocab_size is True", id="yes for a number"),
        pytest.param({"layer_types": ["full_attention"]}, "do not name every layer", id="too few layer types"),
        pytest.param({"layer_types": 3}, "do not name every layer", id="layer types that are none"),
        pytest.param({"kv_lora_rank": 512}, "without the heads' dimensions", id="half a latent attention"),
        pytest.param({"moe_layer_freq": [1], "num_experts": 4}, "does not name every layer", id="too few mixtures"),
    ],
)
def test_an_impossible_configuration_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(BadModel) as caught:
        facts_of(LLAMA_8B | change)
    assert message in caught.value.message
    assert "org/model" in caught.value.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "is not JSON", id="empty"),
        pytest.param(b"[1, 2]", "not an object", id="a list"),
        pytest.param(b"\xff\xfe\x00", "is not JSON", id="not text"),
        pytest.param(b"[" * 200_000, "is not JSON", id="brackets without end"),
        pytest.param(b'{"hidden_size": ' + b"9" * 5000 + b"}", "is not JSON", id="a number of 5000 digits"),
        pytest.param(b" " * 10_000_001, "larger than any configuration", id="ten megabytes of blanks"),
    ],
)
def test_a_configuration_that_is_none(content: bytes, message: str, tmp_path: Path) -> None:
    tiny_llama.write_safetensors(tmp_path / "model.safetensors", {"x": (1,)})
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BadModel, match=message):
        facts_from_folder(tmp_path)


@pytest.mark.parametrize(
    ("header", "data_bytes", "length", "message"),
    [
        pytest.param(b"{}", 0, 1 << 60, "cut short", id="a header of an exabyte"),
        pytest.param(b"{}", 0, 3, "cut short", id="a header longer than the file"),
        pytest.param(b"", 0, 0, "cut short", id="no header"),
        pytest.param(b"{]", 4, None, "header is damaged", id="a header that is no JSON"),
        pytest.param(b"[]", 4, None, "header is damaged", id="a header that is a list"),
        pytest.param(b'{"x": 1}', 4, None, "damaged at the tensor 'x'", id="a tensor that is a number"),
        pytest.param(
            b'{"x": {"dtype": "BF16", "data_offsets": [0, 9]}}', 4, None, "ends behind the file's end", id="cut short"
        ),
        pytest.param(
            b'{"x": {"dtype": "BF16", "data_offsets": [4, 0]}}', 4, None, "damaged at the tensor", id="backwards"
        ),
    ],
)
def test_a_weight_file_that_is_damaged(
    header: bytes, data_bytes: int, length: int | None, message: str, tmp_path: Path
) -> None:
    write_raw(tmp_path / "model.safetensors", header, data_bytes, length)
    with pytest.raises(BadModel) as caught:
        folder_tensors(tmp_path)
    assert message in caught.value.message
    assert caught.value.code == "model-corrupt"


@pytest.mark.parametrize(
    "index",
    [
        pytest.param("[]", id="a list"),
        pytest.param('{"weight_map": {"x": "../../etc/passwd"}}', id="a way out of the folder"),
        pytest.param('{"weight_map": {"x": 3}}', id="a number for a file"),
        pytest.param('{"weight_map": {"x": ["a"]}}', id="a list for a file"),
        pytest.param("{", id="no JSON"),
    ],
)
def test_an_index_that_is_none(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BadModel, match="not an index"):
        folder_tensors(tmp_path)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=r"no config\.json"):
        facts_from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadModel, match=r"no \.safetensors file"):
        facts_from_folder(tmp_path)


def test_weights_that_are_not_the_configurations(tmp_path: Path) -> None:
    folder = tiny_llama.make_tiny_llama(tmp_path)
    (folder / "config.json").write_text(json.dumps(tiny_llama.CONFIG | {"num_hidden_layers": 5}))
    with pytest.raises(BadModel, match="it says 5 layers, but layer 4 has no weights"):
        facts_from_folder(folder)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted({*LLAMA_8B, *DEEPSEEK_V3, *GPT_OSS_20B, "text_config"})), _JSON))
def test_any_configuration_gets_facts_or_a_reason(change: dict[str, object]) -> None:
    try:
        text = repr(facts_of(LLAMA_8B | change))
    except BadModel as error:
        text = error.message
    assert text.isprintable()
