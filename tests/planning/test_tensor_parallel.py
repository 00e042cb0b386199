"""Which cuts vLLM accepts, as its own checks decide, for well-known models."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.machine.simulate import simulate
from mgpu.models.facts import ModelFacts
from mgpu.models.hf import facts_from_config
from mgpu.planning.tensor_parallel import best_shape, check_shape, legal_sizes, pipeline_partition
from tests.models.test_hf import DEEPSEEK_V3, GEMMA_12B, GPT_OSS_20B, LLAMA_8B, MIXTRAL, QWEN2_7B, QWEN_30B_A3B

LLAMA_70B: dict[str, object] = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
SMOLLM2_135M: dict[str, object] = LLAMA_8B | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "vocab_size": 49152,
}
AWQ: dict[str, object] = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}
FP8: dict[str, object] = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def facts_of(config: dict[str, object], quantised: dict[str, object] | None = None) -> ModelFacts:
    return facts_from_config(config | (quantised or {}), 1 << 34, name="model", source="org/model")


@pytest.mark.parametrize(
    ("facts", "sizes"),
    [
        pytest.param(facts_of(LLAMA_70B), (1, 2, 4, 8, 16, 32), id="Llama 70B: 64 heads, 8 KV heads, 28672"),
        pytest.param(facts_of(LLAMA_70B, AWQ), (1, 2, 4, 8, 16, 32), id="Llama 70B in AWQ: 28672 is 224 groups"),
        pytest.param(facts_of(LLAMA_70B, FP8), (1, 2, 4, 8, 16, 32), id="Llama 70B in FP8 blocks"),
        pytest.param(facts_of(QWEN2_7B), (1, 2, 4), id="Qwen2.5 7B: 28 heads would allow 7, 4 KV heads do not"),
        pytest.param(facts_of(QWEN2_7B, AWQ), (1, 2, 4), id="Qwen2.5 7B in AWQ: 18944 is 148 groups"),
        pytest.param(facts_of(QWEN_30B_A3B), (1, 2, 4, 8, 16, 32), id="Qwen3 30B A3B"),
        pytest.param(facts_of(QWEN_30B_A3B, AWQ), (1, 2), id="Qwen3 30B A3B in AWQ: experts of 768 are 6 groups"),
        pytest.param(facts_of(QWEN_30B_A3B, FP8), (1, 2), id="Qwen3 30B A3B in FP8 blocks"),
        pytest.param(facts_of(GPT_OSS_20B), (1, 2, 4, 8, 16, 32), id="gpt-oss 20B"),
        pytest.param(facts_of(GEMMA_12B), (1, 2, 4, 8, 16), id="Gemma 3 12B"),
        pytest.param(facts_of(MIXTRAL), (1, 2, 4, 8, 16, 32), id="Mixtral"),
        pytest.param(facts_of(DEEPSEEK_V3), (1, 2, 4, 8, 16), id="DeepSeek V3: latent attention, experts of 2048"),
        pytest.param(facts_of(SMOLLM2_135M), (1, 3), id="SmolLM2: 9 heads; a vocabulary of 49152 is no obstacle"),
    ],
)
def test_the_sizes_a_model_allows(facts: ModelFacts, sizes: tuple[int, ...]) -> None:
    assert legal_sizes(facts, 32) == sizes


@pytest.mark.parametrize(
    ("facts", "size", "why"),
    [
        pytest.param(facts_of(LLAMA_70B), 3, "64 attention heads ÷ 3 cards = 21.33", id="heads"),
        pytest.param(facts_of(LLAMA_70B), 3, "a feed-forward width of 28672 ÷ 3 cards = 9557.33", id="feed-forward"),
        pytest.param(facts_of(LLAMA_70B), 5, "a vocabulary of 128256 ÷ 5 cards = 25651.2", id="vocabulary"),
        pytest.param(facts_of(QWEN2_7B), 7, "4 KV heads can be neither dealt to 7 cards", id="KV heads"),
        pytest.param(
            facts_of(QWEN_30B_A3B, AWQ), 4, "an expert's width ÷ 4 cards is 192, which is 1.5 groups of 128", id="group"
        ),
        pytest.param(
            facts_of(QWEN_30B_A3B, FP8), 4, "an expert's width ÷ 4 cards is 192, which is 1.5 blocks of 128", id="block"
        ),
        pytest.param(facts_of(SMOLLM2_135M), 2, "tensor parallel sizes that work: 1, 3", id="what would work"),
    ],
)
def test_the_arithmetic_is_shown(facts: ModelFacts, size: int, why: str) -> None:
    found = check_shape(facts, (), tensor_parallel=size, pipeline_parallel=1)
    assert not found.legal
    assert any(why in problem for problem in found.problems)


@pytest.mark.parametrize(
    ("machine", "shape", "problem", "note"),
    [
        pytest.param("2x4090", (2, 1), None, None, id="two alike"),
        pytest.param("4090+4080", (2, 1), None, "the slowest card sets the pace", id="two models"),
        pytest.param("4090+4080", (2, 1), None, "of up to 24.0 GiB is used", id="two sizes"),
        pytest.param("4090+4080", (1, 2), None, None, id="a pipeline does not mind"),
        pytest.param("2x4090", (4, 1), "a shape of 4 takes 4 cards, and there are 2", None, id="too few cards"),
        pytest.param("4x4090", (2, 1), "takes 2 cards, and there are 4", None, id="too many cards"),
        pytest.param("4x4090", (2, 2), None, None, id="both"),
        pytest.param("8x4090", (8, 1), None, None, id="a KV head each"),
        pytest.param("16x4090", (16, 1), None, "8 KV heads on 16 cards: each is held 2 times", id="KV heads repeated"),
    ],
)
def test_the_cards_count(machine: str, shape: tuple[int, int], problem: str | None, note: str | None) -> None:
    tensor, pipeline = shape
    found = check_shape(facts_of(LLAMA_70B), simulate(machine).gpus, tensor_parallel=tensor, pipeline_parallel=pipeline)
    assert found.legal == (problem is None)
    assert problem is None or any(problem in each for each in found.problems)
    assert (note is None and not found.notes) or any(note in each for each in found.notes if note)


def test_a_stage_needs_a_layer() -> None:
    facts = facts_of(LLAMA_8B | {"num_hidden_layers": 4})
    found = check_shape(facts, (), tensor_parallel=1, pipeline_parallel=5)
    assert found.problems == ("4 layers ÷ 5 stages: a stage needs at least one layer",)
    assert check_shape(facts, (), tensor_parallel=1, pipeline_parallel=4).legal


@pytest.mark.parametrize(
    ("facts", "cards", "shape"),
    [
        (facts_of(LLAMA_70B), 8, (8, 1)),
        (facts_of(LLAMA_70B), 6, (2, 3)),
        (facts_of(LLAMA_70B), 3, (1, 3)),
        (facts_of(QWEN_30B_A3B, AWQ), 4, (2, 2)),
        (facts_of(SMOLLM2_135M), 3, (3, 1)),
    ],
)
def test_the_best_shape_cuts_as_often_as_it_can(facts: ModelFacts, cards: int, shape: tuple[int, int]) -> None:
    assert best_shape(facts, cards) == shape


@pytest.mark.parametrize(
    ("layers", "first", "last", "capacities", "counts"),
    [
        pytest.param(32, 0, 0, (24, 24), (16, 16), id="alike"),
        pytest.param(32, 0, 0, (24, 8), (24, 8), id="three to one"),
        pytest.param(32, 4, 4, (24, 24), (16, 16), id="embedding and head weigh the same"),
        pytest.param(32, 0, 8, (24, 24), (20, 12), id="the head makes room"),
        pytest.param(4, 0, 0, (100, 1, 1, 1), (1, 1, 1, 1), id="nobody goes without"),
        pytest.param(5, 0, 0, (100, 1, 1), (3, 1, 1), id="nobody goes without, the largest takes the rest"),
    ],
)
def test_a_pipeline_is_dealt_by_what_the_cards_hold(
    layers: int, first: int, last: int, capacities: tuple[int, ...], counts: tuple[int, ...]
) -> None:
    assert pipeline_partition([1] * layers, first, last, capacities) == counts


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=40),
    st.integers(0, 500),
    st.integers(0, 500),
    st.lists(st.integers(0, 2000), min_size=1, max_size=8),
)
def test_every_partition_is_whole(layers: list[int], first: int, last: int, capacities: list[int]) -> None:
    capacities = capacities[: len(layers)]
    counts = pipeline_partition(layers, first, last, capacities)
    assert len(counts) == len(capacities)
    assert sum(counts) == len(layers)
    assert min(counts) >= 1


@given(st.sampled_from([LLAMA_70B, QWEN2_7B, QWEN_30B_A3B, DEEPSEEK_V3]), st.integers(1, 64))
def test_a_size_is_legal_exactly_when_nothing_is_said_against_it(config: dict[str, object], size: int) -> None:
    facts = facts_of(config)
    assert check_shape(facts, (), tensor_parallel=size, pipeline_parallel=1).legal == (size in legal_sizes(facts, size))


def test_padding_the_vocabulary_is_counted() -> None:
    facts = replace(facts_of(LLAMA_8B), vocabulary=32001)  # vLLM pads it to 32064
    assert legal_sizes(facts, 4) == (1, 2, 4)
