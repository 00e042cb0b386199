from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mgpu.errors import BadModel
from mgpu.models.facts import ModelFacts
from mgpu.models.gguf_facts import facts_from_gguf
from mgpu.models.quantisation import QUANTISATIONS
from mgpu.models.shape import facts_from_shape, tensor_table
from mgpu.models.tensors import GGML_TYPES, Tensor
from tests.fakes.shapes import SHAPES, resized
from tests.fakes.sparse_gguf import Entry, f32, flag, make_sparse_gguf, text, texts, u32, u32s, write_gguf

F16 = GGML_TYPES["F16"]
WIDTH = 64
LLAMA = (
    u32("x.block_count", 2),
    u32("x.embedding_length", WIDTH),
    u32("x.attention.head_count", 4),
    u32("x.attention.head_count_kv", 2),
)


def weights(layers: int = 2) -> list[Tensor]:
    blocks = [Tensor(f"blk.{layer}.attn_q.weight", (WIDTH, WIDTH), F16) for layer in range(layers)]
    return [
        Tensor("token_embd.weight", (WIDTH, 100), F16),
        Tensor("output.weight", (WIDTH, 100), F16),
        *blocks,
    ]


def facts_of(
    folder: Path, *entries: Entry, architecture: str = "llama", tensors: list[Tensor] | None = None
) -> ModelFacts:
    """The facts of a small model whose keys are LLAMA and `entries`; "x." stands for the architecture."""
    replaced = {entry[0]: entry for entry in (text("general.architecture", architecture), *LLAMA, *entries)}
    named = [(key.replace("x.", architecture + "."), kind, raw) for key, kind, raw in replaced.values()]
    path = folder / "model.gguf"
    write_gguf(path, named, weights() if tensors is None else tensors)
    return facts_from_gguf(path)


def without_source(facts: ModelFacts) -> ModelFacts:
    return dataclasses.replace(facts, source="", weights_basis="", file_bytes=0)


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_a_file_and_its_shape_have_the_same_facts(tmp_path: Path, model: str, quantisation: str) -> None:
    shape = resized(SHAPES[model], layers=min(SHAPES[model].layers, 17), vocabulary=512)
    path = make_sparse_gguf(tmp_path / "model.gguf", shape, quantisation, name=model)
    facts = facts_from_gguf(path)
    computed = facts_from_shape(model, shape, quantisation)
    assert without_source(facts) == without_source(computed)
    assert facts.source == str(path)
    # The file is what the tensors take and a header.
    assert 0 < facts.file_bytes - computed.file_bytes < 1 << 20
    assert sum(layer.weights_bytes for layer in facts.layers) + facts.embedding_bytes + facts.other_bytes + (
        facts.head_bytes - (facts.embedding_bytes if facts.tied else 0)
    ) == sum(tensor.bytes for tensor in tensor_table(shape, quantisation))


def test_the_facts_of_a_dense_model(tmp_path: Path) -> None:
    path = make_sparse_gguf(tmp_path / "m.gguf", SHAPES["llama-3.1-8b"], "Q4_K_M", name="Llama 3.1 8B")
    facts = facts_from_gguf(path)
    assert facts.name == "Llama 3.1 8B"
    assert (facts.architecture, facts.quantisation) == ("llama", "Q4_K_M")
    assert facts.parameters == facts.active_parameters == 8_030_261_312  # as published, with the 64 rotary factors
    assert (facts.heads, facts.kv_heads, facts.head_dim) == (32, 8, 128)
    assert (facts.vocabulary, facts.context_length) == (128256, 131072)
    assert facts.embedding_bytes == 128256 * 4096 * 144 // 256
    assert facts.head_bytes == 128256 * 4096 * 210 // 256 + 4096 * 4
    assert not facts.tied
    assert {(each.kv_heads, each.key_length, each.value_length) for each in facts.layers} == {(8, 128, 128)}
    # The rotary factors are in the first layer, which is otherwise like the second.
    assert facts.layers[0].weights_bytes - facts.layers[1].weights_bytes == 64 * 4


def test_experts_that_a_token_does_not_use_are_not_active(tmp_path: Path) -> None:
    facts = facts_from_gguf(make_sparse_gguf(tmp_path / "m.gguf", SHAPES["qwen3-30b-a3b"], "Q8_0", vocabulary=512))
    assert (facts.experts, facts.experts_used, facts.expert_feed_forward_length) == (128, 8, 768)
    an_expert = 3 * 2048 * 768
    assert facts.parameters - facts.active_parameters == 48 * 120 * an_expert
    assert all(layer.expert_bytes == 128 * an_expert * 34 // 32 for layer in facts.layers)


def test_experts_in_tensors_of_their_own_count_as_experts(tmp_path: Path) -> None:
    experts = [Tensor(f"blk.1.ffn_{part}.{i}.weight", (WIDTH, 32), F16) for part in ("up", "down") for i in (0, 1)]
    facts = facts_of(tmp_path, u32("x.expert_count", 2), u32("x.expert_used_count", 1), tensors=weights() + experts)
    assert [layer.expert_bytes for layer in facts.layers] == [0, 4 * WIDTH * 32 * 2]
    assert facts.parameters - facts.active_parameters == 2 * WIDTH * 32


@pytest.mark.parametrize(
    ("model", "local", "window"),
    [
        pytest.param("gemma-3-27b", [i % 6 != 5 for i in range(62)], 1024, id="gemma3: every sixth is global"),
        pytest.param("gpt-oss-20b", [i % 2 == 0 for i in range(24)], 128, id="gpt-oss: even layers are local"),
        pytest.param("qwen3-32b", [False] * 64, None, id="qwen3: none is local"),
    ],
)
def test_which_layers_have_a_sliding_window(tmp_path: Path, model: str, local: list[bool], window: int | None) -> None:
    quantisation = "MXFP4" if "oss" in model else "Q4_K_M"
    facts = facts_from_gguf(make_sparse_gguf(tmp_path / "m.gguf", SHAPES[model], quantisation, vocabulary=512))
    assert [layer.sliding_window for layer in facts.layers] == [window if each else None for each in local]
    assert facts.sliding_window == window


def test_latent_attention_caches_one_vector_and_no_values(tmp_path: Path) -> None:
    path = make_sparse_gguf(tmp_path / "m.gguf", SHAPES["deepseek-v2-lite"], "Q4_K_M", vocabulary=512)
    facts = facts_from_gguf(path)
    assert {(each.kv_heads, each.key_length, each.value_length) for each in facts.layers} == {(1, 576, 0)}
    assert (facts.kv_lora_rank, facts.head_dim) == (512, 192)
    assert (facts.expert_feed_forward_length, facts.shared_expert_feed_forward_length) == (1408, 2816)
    assert facts.layers[0].expert_bytes == 0 < facts.layers[1].expert_bytes


def kv_heads(facts: ModelFacts) -> list[int]:
    return [layer.kv_heads for layer in facts.layers]


def test_kv_heads_of_each_layer_come_from_an_array(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, u32s("x.attention.head_count_kv", [0, 2]), architecture="deci")
    assert kv_heads(facts) == [0, 2]
    assert facts.kv_heads == 2


def test_without_kv_heads_every_head_has_its_own(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    entries = [(key.replace("x.", "llama."), kind, raw) for key, kind, raw in LLAMA[:3]]
    write_gguf(path, [text("general.architecture", "llama"), *entries], weights())
    assert kv_heads(facts_from_gguf(path)) == [4, 4]


def test_recurrent_layers_keep_no_cache(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, u32("x.block_count", 8), architecture="qwen3next", tensors=weights(8))
    assert kv_heads(facts) == [0, 0, 0, 2, 0, 0, 0, 2]


def test_layers_that_read_the_cache_of_others_keep_none(tmp_path: Path) -> None:
    facts = facts_of(
        tmp_path,
        u32("x.block_count", 5),
        u32("x.attention.shared_kv_layers", 2),
        u32("x.attention.sliding_window", 512),
        u32s("x.attention.sliding_window_pattern", [1, 0, 1, 0, 1]),
        u32("x.attention.key_length", 32),
        u32("x.attention.key_length_swa", 16),
        architecture="gemma4",
        tensors=weights(5),
    )
    assert kv_heads(facts) == [2, 2, 2, 0, 0]
    assert [(layer.sliding_window, layer.key_length) for layer in facts.layers[:2]] == [(512, 16), (None, 32)]


def test_prediction_layers_are_parameters_that_take_no_memory(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, u32("x.block_count", 3), u32("x.nextn_predict_layers", 1), tensors=weights(3))
    assert len(facts.layers) == 2
    assert facts.parameters == 2 * WIDTH * 100 + 3 * WIDTH * WIDTH


def test_an_unknown_architecture_is_read_by_the_keys_all_share(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, u32("x.context_length", 4096), architecture="next-year")
    assert (facts.architecture, facts.heads, facts.head_dim, facts.context_length) == (
        "next-year",
        4,
        16,
        4096,
    )
    assert facts.vocabulary == 100
    assert facts.quantisation == "F16"


def test_names_are_shown_without_what_could_steer_a_terminal(tmp_path: Path) -> None:
    assert facts_of(tmp_path, text("general.name", "\x1b[2Jnice\n")).name == "[2Jnice"
    assert facts_of(tmp_path, text("general.name", "\n")).name == "model"


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        pytest.param([u32("x.block_count", 0)], "block_count is impossible", id="no layers"),
        pytest.param([u32("x.block_count", 10**9)], "block_count is impossible", id="10^9 layers"),
        pytest.param([u32("x.block_count", 5)], "number of layers is impossible", id="more layers than tensors"),
        pytest.param([u32("x.block_count", 3)], "layer 2 has no tensors", id="a layer without tensors"),
        pytest.param([u32("x.nextn_predict_layers", 2)], "number of layers", id="only prediction layers"),
        pytest.param([u32("x.attention.head_count", 0)], "no attention heads", id="no heads"),
        pytest.param([f32("x.attention.head_count", 4.0)], "head_count is impossible", id="heads as a float"),
        pytest.param([text("x.attention.head_count", "4")], "head_count is impossible", id="heads as a text"),
        pytest.param([texts("x.attention.head_count", ["4"])], "is impossible", id="heads as texts"),
        pytest.param([u32s("x.attention.head_count_kv", [2])], "1 values for 2 layers", id="a short array"),
        pytest.param([u32("x.embedding_length", 0)], "embedding_length is impossible", id="no width"),
        pytest.param([text("general.architecture", "")], "no general.architecture", id="no architecture"),
        pytest.param([text("general.type", "mmproj")], "vision projector", id="a vision projector"),
        pytest.param([text("general.type", "adapter")], "'adapter'", id="an adapter"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused_with_the_reason(
    tmp_path: Path, entries: list[Entry], said: str
) -> None:
    with pytest.raises(BadModel) as raised:
        facts_of(tmp_path, *entries)
    assert said in raised.value.message
    assert raised.value.hint


def test_a_vocabulary_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="only a vocabulary"):
        facts_of(tmp_path, tensors=[])


def test_a_model_without_an_embedding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="no token embedding"):
        facts_of(tmp_path, tensors=weights()[2:])


def test_an_architecture_without_layers_or_heads_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, [text("general.architecture", "diffusion"), flag("diffusion.yes", value=True)], weights())
    with pytest.raises(BadModel, match="'diffusion'") as raised:
        facts_from_gguf(path)
    assert raised.value.code == "architecture-unknown"
