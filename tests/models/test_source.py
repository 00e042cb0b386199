from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.errors import UsageError
from mgpu.models.source import (
    GgufFile,
    HubRepository,
    ModelFolder,
    ModelSource,
    OllamaTag,
    ProfileName,
    parse_model,
)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("llama-70b", ProfileName("llama-70b")),
        ("qwen2.5-7b", ProfileName("qwen2.5-7b")),
        ("model.gguf", GgufFile(Path("model.gguf"))),
        ("MODEL.GGUF", GgufFile(Path("MODEL.GGUF"))),
        ("./model.gguf", GgufFile(Path("model.gguf"))),
        ("../up/model.gguf", GgufFile(Path("../up/model.gguf"))),
        ("/models/Größe 70B.gguf", GgufFile(Path("/models/Größe 70B.gguf"))),
        ("~/model.gguf", GgufFile(Path.home() / "model.gguf")),
        ("/models/llama", ModelFolder(Path("/models/llama"))),
        ("models/llama", ModelFolder(Path("models/llama"))),
        (".", ModelFolder(Path())),
        ("./llama", ModelFolder(Path("llama"))),
        ("./~llama.gguf", GgufFile(Path("~llama.gguf"))),
        ("./hf:org/repo", ModelFolder(Path("hf:org/repo"))),
        ("hf:org/repo", HubRepository("org/repo")),
        ("hf:org/Repo-7B-GGUF:q4_k_m", HubRepository("org/Repo-7B-GGUF", "Q4_K_M")),
        ("ollama:llama3.1", OllamaTag("llama3.1")),
        ("ollama:llama3.1:8b", OllamaTag("llama3.1", "8b")),
        ("ollama:hf.co/org/repo:Q4_K_M", OllamaTag("hf.co/org/repo", "Q4_K_M")),
    ],
)
def test_what_an_argument_names(text: str, source: ModelSource) -> None:
    assert parse_model(text) == source
    assert parse_model(str(source)) == source


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("", "empty", id="nothing"),
        pytest.param("  ", "empty", id="blanks"),
        pytest.param("x" * 513, "513 characters", id="a very long name"),
        pytest.param("a\0.gguf", "cannot be printed", id="a NUL in a path"),
        pytest.param("/models/\x1b[2J", "cannot be printed", id="an escape sequence"),
        pytest.param("a..b", "neither", id="two dots in a name"),
        pytest.param("llama 70b", "neither", id="a blank in a name"),
        pytest.param("-rf", "neither", id="what looks like an option"),
        pytest.param("s3:bucket", "neither", id="an unknown scheme"),
        pytest.param("hf:repo", "not hf:ORG/REPO", id="a repository without its owner"),
        pytest.param("hf:", "not hf:ORG/REPO", id="no repository"),
        pytest.param("hf:a/b/c", "not hf:ORG/REPO", id="a path in a repository"),
        pytest.param("hf:a/..", "not hf:ORG/REPO", id="a repository that climbs"),
        pytest.param("hf:a/b:", "not hf:ORG/REPO", id="an empty quantisation"),
        pytest.param("ollama:", "not ollama:NAME", id="no tag"),
        pytest.param("ollama:a:b:c", "not ollama:NAME", id="two tags"),
        pytest.param("ollama:a/../b", "not ollama:NAME", id="a tag that climbs"),
        pytest.param("~no-such-user-here/x.gguf", "home", id="the home of nobody"),
    ],
)
def test_what_can_name_nothing_is_a_usage_error_with_a_hint(text: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_model(text)
    assert said in raised.value.message
    assert raised.value.message.isprintable()
    assert raised.value.hint


def test_the_address_of_a_repository_is_answered_with_how_to_write_it() -> None:
    with pytest.raises(UsageError) as raised:
        parse_model("https://huggingface.co/org/repo-GGUF/blob/main/x.gguf")
    assert raised.value.hint == "hf:org/repo-GGUF"


@given(st.text(max_size=600) | st.text(alphabet="./~:a -hf", max_size=12))
def test_any_text_is_a_source_or_a_usage_error(text: str) -> None:
    try:
        source = parse_model(text)
    except UsageError:
        return
    assert parse_model(str(source)) == source
