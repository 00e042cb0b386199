from __future__ import annotations

from collections import Counter

import pytest

from mgpu.errors import UsageError
from mgpu.models.quantisation import known_quantisation
from mgpu.models.shape import facts_from_shape, tensor_table
from mgpu.profile import ProfileEntry, list_profiles, read_profile
from tests.fakes.shapes import SHAPES

# The header of a published file is its vocabulary with scores, types and merges: 30 to 65 bytes per token.
HEADER_BYTES_PER_TOKEN = 60


@pytest.mark.parametrize(
    ("model", "quantisation", "published_gb"),
    [
        ("llama-3.1-8b", "F16", 16.07),
        ("llama-3.1-8b", "Q8_0", 8.54),
        ("llama-3.1-8b", "Q6_K", 6.60),
        ("llama-3.1-8b", "Q5_K_M", 5.73),
        ("llama-3.1-8b", "Q5_K_S", 5.60),
        ("llama-3.1-8b", "Q4_K_M", 4.92),
        ("llama-3.1-8b", "Q4_K_S", 4.69),
        ("llama-3.1-8b", "Q4_0", 4.66),
        ("llama-3.1-8b", "IQ4_XS", 4.45),
        ("llama-3.1-8b", "Q3_K_L", 4.32),
        ("llama-3.1-8b", "Q3_K_M", 4.02),
        ("llama-3.1-8b", "Q3_K_S", 3.66),
        ("llama-3.1-8b", "Q2_K", 3.18),
        ("llama-3.3-70b", "Q8_0", 74.98),
        ("llama-3.3-70b", "Q6_K", 57.89),
        ("llama-3.3-70b", "Q5_K_M", 49.95),
        ("llama-3.3-70b", "Q4_K_M", 42.52),
        ("llama-3.3-70b", "IQ4_XS", 37.90),
        ("llama-3.3-70b", "Q3_K_M", 34.27),
        ("llama-3.3-70b", "Q2_K", 26.38),
        ("llama-3.1-405b", "Q4_K_M", 243.06),
        ("qwen2.5-7b", "Q4_K_M", 4.68),
        ("qwen3-32b", "Q4_K_M", 19.76),
        ("qwen3-30b-a3b", "Q4_K_M", 18.56),
        ("mixtral-8x7b", "Q4_K_M", 28.45),
        ("gemma-3-27b", "Q4_K_M", 16.55),
        ("gpt-oss-20b", "MXFP4", 12.11),
        ("gpt-oss-120b", "MXFP4", 63.39),
        ("deepseek-v2-lite", "Q4_K_M", 10.36),
        ("deepseek-v3", "Q4_K_M", 404.4),
    ],
)
def test_files_have_the_published_size(model: str, quantisation: str, published_gb: float) -> None:
    shape = SHAPES[model]
    facts = facts_from_shape(model, shape, quantisation)
    file_bytes = facts.file_bytes + HEADER_BYTES_PER_TOKEN * shape.vocabulary
    assert file_bytes / 1e9 == pytest.approx(published_gb, rel=0.005)


@pytest.mark.parametrize("entry", [entry for entry in list_profiles() if entry.shipped], ids=lambda entry: entry.name)
def test_profiles_describe_models_of_the_size_of_their_files(entry: ProfileEntry) -> None:
    profile = read_profile(entry.path)
    for quantisation, source in profile.quantisations.items():
        facts = facts_from_shape(profile.name, profile.model, quantisation)
        file_bytes = facts.file_bytes + HEADER_BYTES_PER_TOKEN * facts.vocabulary
        if source.bytes:
            header_may_differ = 30 * facts.vocabulary  # by how long a vocabulary's words are
            assert file_bytes == pytest.approx(source.bytes, abs=source.bytes / 200 + header_may_differ), quantisation


@pytest.mark.parametrize(
    ("model", "parameters_b", "active_b"),
    [
        ("llama-3.2-1b", 1.24, 1.24),
        ("llama-3.3-70b", 70.55, 70.55),
        ("mixtral-8x7b", 46.70, 12.88),
        ("qwen3-30b-a3b", 30.53, 3.35),
        ("gpt-oss-120b", 116.83, 5.71),
        ("deepseek-v3", 671.03, 37.55),
    ],
)
def test_models_have_the_published_number_of_parameters(model: str, parameters_b: float, active_b: float) -> None:
    facts = facts_from_shape(model, SHAPES[model], "F16")
    assert facts.parameters / 1e9 == pytest.approx(parameters_b, abs=0.01)
    assert facts.active_parameters / 1e9 == pytest.approx(active_b, abs=0.01)


def types(model: str, quantisation: str, part: str) -> list[str]:
    """The types of the tensors called `part`, in the order of layers."""
    return [each.type.name for each in tensor_table(SHAPES[model], quantisation) if each.name.endswith(part)]


@pytest.mark.parametrize(
    ("model", "quantisation", "part", "expected"),
    [
        pytest.param("llama-3.1-8b", "Q4_K_M", "output.weight", {"Q6_K": 1, "Q4_K": 32}, id="a better head"),
        pytest.param("llama-3.1-8b", "Q4_K_M", "ffn_down.weight", {"Q6_K": 16, "Q4_K": 16}, id="better edges"),
        pytest.param("llama-3.3-70b", "Q4_K_M", "attn_v.weight", {"Q6_K": 40, "Q5_K": 40}, id="70B: better values"),
        pytest.param("llama-3.3-70b", "Q3_K_M", "attn_v.weight", {"Q5_K": 80}, id="70B: better values in Q3_K_M"),
        pytest.param("mixtral-8x7b", "Q4_K_M", "attn_k.weight", {"Q8_0": 32}, id="eight experts: Q8_0 keys"),
        pytest.param("mixtral-8x7b", "Q4_K_M", "attn_output.weight", {"Q5_K": 32}, id="eight experts: outputs"),
        pytest.param("llama-3.2-1b", "Q4_K_M", "token_embd.weight", {"Q6_K": 1}, id="tied: the embedding is the head"),
        pytest.param("gpt-oss-20b", "MXFP4", "ffn_up_exps.weight", {"MXFP4": 24}, id="MXFP4: the experts"),
        pytest.param("gpt-oss-20b", "MXFP4", "attn_q.weight", {"Q8_0": 24}, id="MXFP4: the rest"),
        pytest.param("gpt-oss-20b", "Q4_K_S", "attn_q.weight", {"Q5_0": 24}, id="rows of 2880: a smaller block"),
        pytest.param("deepseek-v2-lite", "Q4_K_M", "attn_k_b.weight", {"Q5_0": 27}, id="rows of 128: a smaller block"),
        pytest.param("qwen3-30b-a3b", "Q4_0", "ffn_gate_inp.weight", {"F32": 48}, id="routers stay F32"),
        pytest.param("qwen2.5-7b", "Q4_0", "attn_q.bias", {"F32": 28}, id="biases stay F32"),
        pytest.param("llama-3.1-8b", "BF16", "ffn_up.weight", {"BF16": 32}, id="half precision has no recipe"),
    ],
)
def test_recipes_choose_types_as_llama_cpp_does(
    model: str, quantisation: str, part: str, expected: dict[str, int]
) -> None:
    assert Counter(types(model, quantisation, part)) == expected


def test_more_bits_go_to_the_first_and_last_eighth_and_every_third_between() -> None:
    better = [i for i, name in enumerate(types("llama-3.1-8b", "Q4_K_M", "ffn_down.weight")) if name == "Q6_K"]
    assert better == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]


def test_a_tied_model_has_its_embedding_twice_but_in_its_file_once() -> None:
    shape = SHAPES["llama-3.2-1b"]
    facts = facts_from_shape("1b", shape, "Q8_0")
    assert facts.tied
    assert facts.head_bytes == facts.embedding_bytes + 2048 * 4
    weights = sum(layer.weights_bytes for layer in facts.layers)
    assert facts.file_bytes == weights + facts.head_bytes


def test_rows_that_fit_no_block_fall_back_to_half_precision() -> None:
    odd = SHAPES["llama-3.2-1b"].model_copy(update={"feed_forward_length": 100})
    assert {each.type.name for each in tensor_table(odd, "Q4_K_M") if "ffn_down" in each.name} == {"F16"}


@pytest.mark.parametrize(
    ("given", "known"), [("q4_k_m", "Q4_K_M"), ("MXFP4_MOE", "MXFP4"), ("bf16", "BF16"), ("Q8_0", "Q8_0")]
)
def test_quantisations_are_known_in_any_case(given: str, known: str) -> None:
    assert known_quantisation(given) == known


@pytest.mark.parametrize(
    ("given", "nearest"), [("Q4_K_N", "Q4_K_M"), ("q4km", "Q4_K_M"), ("", "Q4_K_M"), ("\x1b[2J", "Q4_K_M")]
)
def test_an_unknown_quantisation_is_refused_with_the_nearest(given: str, nearest: str) -> None:
    with pytest.raises(UsageError) as raised:
        known_quantisation(given)
    assert raised.value.code == "quantisation-unknown"
    assert nearest in (raised.value.hint or "")
    assert raised.value.message.isprintable()
