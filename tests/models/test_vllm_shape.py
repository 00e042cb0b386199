"""A profile's shape in vLLM's quantisations, against the repositories themselves and what vLLM logged of them."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from mgpu.errors import UsageError
from mgpu.models.facts import ModelFacts
from mgpu.models.hf import facts_from_config, facts_from_folder
from mgpu.models.vllm_shape import facts_for_vllm
from mgpu.planning.tensor_parallel import legal_sizes
from mgpu.profile import ModelShape, load_profile
from mgpu.profile_schema import VllmQuantisation
from mgpu.units import GIB
from tests.fakes import tiny_llama
from tests.fakes.shapes import SHAPES
from tests.models.test_hf import DEEPSEEK_V3, GPT_OSS_20B, LLAMA_8B, MIXTRAL, QWEN_30B_A3B


def of_profile(profile: str, quantisation: str) -> ModelFacts:
    return facts_for_vllm(profile, load_profile(profile).profile.model, quantisation, source="profile")


# The safetensors of each repository together.
@pytest.mark.parametrize(
    ("profile", "quantisation", "published_gb"),
    [
        pytest.param("llama-70b", "awq", 39.77, id="casperhansen/llama-3.3-70b-instruct-awq"),
        pytest.param("llama-70b", "fp8", 72.7, id="RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic"),
        pytest.param("llama-70b", "bf16", 141.1, id="meta-llama/Llama-3.3-70B-Instruct"),
        pytest.param("llama-8b", "awq", 5.73, id="hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4"),
        pytest.param("llama-8b", "bf16", 16.06, id="meta-llama/Llama-3.1-8B-Instruct"),
        pytest.param("qwen3-32b", "awq", 19.33, id="Qwen/Qwen3-32B-AWQ"),
        pytest.param("qwen3-30b-a3b", "bf16", 61.06, id="Qwen/Qwen3-30B-A3B"),
        pytest.param("mixtral-8x7b", "bf16", 93.4, id="mistralai/Mixtral-8x7B-Instruct-v0.1"),
        pytest.param("gpt-oss-20b", "mxfp4", 13.76, id="openai/gpt-oss-20b"),
        pytest.param("gpt-oss-120b", "mxfp4", 65.25, id="openai/gpt-oss-120b"),
        pytest.param("smollm2-135m", "bf16", 0.269, id="HuggingFaceTB/SmolLM2-135M-Instruct"),
    ],
)
def test_sizes_are_those_of_the_repositories(profile: str, quantisation: str, published_gb: float) -> None:
    assert of_profile(profile, quantisation).file_bytes / 1e9 == pytest.approx(published_gb, rel=0.01)


# "Model loading took" on one card (tests/data/vllm_memory.csv, version 0.12.0). Not among them: gpt-oss, whose experts
# vLLM pads by 7 %, and Gemma, which comes with a vision tower that a profile does not describe.
@pytest.mark.parametrize(
    ("profile", "quantisation", "logged_gib"),
    [
        pytest.param("llama-8b", "bf16", 14.9889, id="Meta-Llama-3.1-8B-Instruct"),
        pytest.param("qwen3-14b", "fp8", 15.3291, id="Qwen3-14B-FP8-dynamic"),
        pytest.param("qwen3-30b-a3b", "gptq", 15.6116, id="Qwen3-Coder-30B-A3B-Instruct-GPTQ-4bit"),
    ],
)
def test_sizes_are_those_that_vllm_loads(profile: str, quantisation: str, logged_gib: float) -> None:
    assert of_profile(profile, quantisation).file_bytes / GIB == pytest.approx(logged_gib, rel=0.01)


@pytest.mark.parametrize(
    ("shape", "config", "quantisation"),
    [
        pytest.param("llama-3.1-8b", LLAMA_8B, "bf16", id="Llama"),
        pytest.param("mixtral-8x7b", MIXTRAL, "bf16", id="Mixtral"),
        pytest.param("qwen3-30b-a3b", QWEN_30B_A3B, "bf16", id="Qwen 3 with experts"),
        pytest.param("gpt-oss-20b", GPT_OSS_20B, "mxfp4", id="gpt-oss"),
        pytest.param("deepseek-v3", DEEPSEEK_V3, "fp8", id="DeepSeek V3"),
    ],
)
def test_a_shape_means_what_its_config_json_means(shape: str, config: dict[str, object], quantisation: str) -> None:
    planned = facts_for_vllm(shape, SHAPES[shape], quantisation, source="profile")
    read = facts_from_config(config, planned.file_bytes, name=shape, source="hub")
    for key in ("quantisation", "vocabulary", "embedding_length", "heads", "kv_heads", "head_dim", "experts"):
        assert getattr(planned, key) == getattr(read, key), key
    for key in ("experts_used", "kv_lora_rank", "tied", "context_length", "sliding_window", "embedding_bytes"):
        assert getattr(planned, key) == getattr(read, key), key
    assert planned.head_bytes == pytest.approx(read.head_bytes, rel=1e-4)
    assert planned.active_parameters == pytest.approx(read.active_parameters, rel=0.01)
    for mine, theirs in zip(planned.layers, read.layers, strict=True):
        for key in ("kv_heads", "key_length", "value_length", "sliding_window"):
            assert getattr(mine, key) == getattr(theirs, key), key
        # A total is dealt by parameters, as if all had as many bits.
        assert mine.weights_bytes == pytest.approx(theirs.weights_bytes, rel=0.03)


@pytest.mark.parametrize("tied", [False, True], ids=["with a head", "with the embedding as head"])
def test_a_shape_has_the_bytes_of_the_files_themselves(tmp_path: Path, tied: bool) -> None:
    tensors = dict(tiny_llama.shapes())
    if tied:
        del tensors["lm_head.weight"]
    folder = tiny_llama.make_tiny_llama(tmp_path / "tiny")
    tiny_llama.write_safetensors(folder / "model.safetensors", tensors, values=False)
    shape = ModelShape(
        architecture="llama",
        layers=tiny_llama.LAYERS,
        embedding_length=tiny_llama.WIDTH,
        feed_forward_length=tiny_llama.FEED_FORWARD,
        heads=tiny_llama.HEADS,
        kv_heads=tiny_llama.KV_HEADS,
        head_dim=tiny_llama.HEAD_DIM,
        vocabulary=tiny_llama.VOCABULARY,
        context_length=tiny_llama.CONTEXT_LENGTH,
        tied_embeddings=tied,
    )
    read = facts_from_folder(folder)
    planned = facts_for_vllm(read.name, shape, "bf16", source=read.source)
    for key in ("layers", "embedding_bytes", "head_bytes", "other_bytes", "tied", "file_bytes", "quantisation"):
        assert getattr(planned, key) == getattr(read, key), key


@pytest.mark.parametrize("quantisation", get_args(VllmQuantisation))
def test_every_quantisation_of_a_profile_is_known(quantisation: str) -> None:
    facts = facts_for_vllm("m", SHAPES["llama-3.1-8b"], quantisation, source="profile")
    assert facts.embedding_bytes == 2 * 4096 * 128256
    assert 0 < facts.layers[0].weights_bytes <= 2 * 218_112_000
    assert legal_sizes(facts, 8) == (1, 2, 4, 8)


@pytest.mark.parametrize(
    ("quantisation", "sizes"),
    [
        pytest.param("bf16", (1, 2, 4), id="plain: any cut"),
        pytest.param("w8a8", (1, 2, 4), id="a scale a row: any cut"),
        pytest.param("fp8", (1, 2), id="blocks of 128: no half ones"),
        pytest.param("gptq", (1, 2), id="groups of 128: no half ones"),
        pytest.param("nvfp4", (1, 2, 4), id="groups of 16 fit"),
    ],
)
def test_scales_limit_how_experts_of_768_are_cut(quantisation: str, sizes: tuple[int, ...]) -> None:
    assert legal_sizes(of_profile("qwen3-30b-a3b", quantisation), 4) == sizes


@pytest.mark.parametrize("given", ["Q4_K_M", "", "\x1b[2J", "awq2"])
def test_an_unknown_quantisation_is_refused_with_those_that_are_known(given: str) -> None:
    with pytest.raises(UsageError) as raised:
        facts_for_vllm("m", SHAPES["llama-3.1-8b"], given, source="profile")
    assert raised.value.code == "quantisation-unknown"
    assert "awq" in str(raised.value.hint)
    assert raised.value.message.isprintable()
