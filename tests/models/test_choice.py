from __future__ import annotations

import pytest

from mgpu.models.choice import models_among, part_count, quantisation_in


def test_parts_are_one_model_and_what_lies_beside_models_is_none() -> None:
    paths = ["b-Q8_0-00002-of-00002.gguf", "mmproj-a.gguf", "a.gguf", "b-Q8_0-00001-of-00002.gguf", "x.imatrix.gguf"]
    assert models_among([*paths, "README.md"]) == {
        "a.gguf": ("a.gguf",),
        "b-Q8_0.gguf": ("b-Q8_0-00001-of-00002.gguf", "b-Q8_0-00002-of-00002.gguf"),
    }


@pytest.mark.parametrize(
    ("path", "count"), [("a.gguf", 1), ("q/a-00001-of-00009.gguf", 9), ("a-1-of-2.gguf", 1), ("00001-of-00002.gguf", 1)]
)
def test_a_part_says_how_many_there_are(path: str, count: int) -> None:
    assert part_count(path) == count


@pytest.mark.parametrize(
    ("path", "quantisation"),
    [
        ("Llama-3.3-70B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("qwen3-8b-iq4_xs.gguf", "IQ4_XS"),
        ("gpt-oss-20b-MXFP4.gguf", "MXFP4"),
        ("model-UD-Q4_K_XL-00001-of-00002.gguf", "Q4_K_XL"),
        ("model.bf16.gguf", "BF16"),
        ("Q6_K/model-00001-of-00002.gguf", "Q6_K"),
        ("Qwen2.5-7B.gguf", None),
    ],
)
def test_a_name_tells_the_quantisation(path: str, quantisation: str | None) -> None:
    assert quantisation_in(path) == quantisation
