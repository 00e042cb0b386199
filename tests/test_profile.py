from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from mgpu import profile
from mgpu.errors import Missing, ProfileError, UsageError
from mgpu.profile import (
    ModelShape,
    Profile,
    list_profiles,
    load_profile,
    new_profile_text,
    profile_schema,
    read_profile,
    shipped_profile_folder,
    user_profile_folder,
)

SHIPPED = sorted(shipped_profile_folder().glob("*.yaml"))
PARAMETERS_IN_BILLIONS = {
    "deepseek-r1-distill-70b": 70.55,
    "gemma-3-27b": 27.01,
    "gpt-oss-120b": 116.83,
    "gpt-oss-20b": 20.91,
    "llama-2-13b": 13.02,
    "llama-405b": 405.85,
    "llama-70b": 70.55,
    "llama-8b": 8.03,
    "mistral-small-24b": 23.57,
    "mixtral-8x7b": 46.70,
    "qwen3-14b": 14.77,
    "qwen3-30b-a3b": 30.53,
    "qwen3-32b": 32.76,
    "qwen3-8b": 8.19,
    "smollm2-135m": 0.1345,
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = user_profile_folder()
    folder.mkdir(parents=True)
    return folder


def matrix_parameters(shape: ModelShape) -> int:
    """Parameters in matrices; norms and biases are left out."""
    queries = shape.heads * shape.head_dim
    keys = shape.kv_heads * shape.head_dim
    attention = shape.embedding_length * (2 * queries + 2 * keys)
    feed_forward = 3 * shape.embedding_length * shape.feed_forward_length
    if shape.experts:
        feed_forward = 3 * shape.embedding_length * (shape.expert_feed_forward_length or 0) * shape.experts
    embeddings = shape.vocabulary * shape.embedding_length * (1 if shape.tied_embeddings else 2)
    return shape.layers * (attention + feed_forward) + embeddings


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.stem))
class TestEveryShippedProfile:
    def test_is_read_and_found_by_its_name(self, path: Path) -> None:
        loaded = load_profile(path.stem)
        assert (loaded.path, loaded.shipped) == (path, True)
        assert loaded.profile.name == path.stem

    def test_names_its_schema_and_says_what_it_takes(self, path: Path) -> None:
        first, *lines = path.read_text().splitlines()
        assert first == "# yaml-language-server: $schema=./profile.schema.json"
        comment = " ".join(line for line in lines[:8] if line.startswith("#"))
        assert re.search(r"Weights( at \w+)?: [0-9.]+ [GM]iB", comment)

    def test_agrees_with_the_schema_of_editors(self, path: Path) -> None:
        jsonschema.Draft202012Validator(profile_schema()).validate(yaml.safe_load(path.read_text()))

    def test_has_the_parameters_of_its_model(self, path: Path) -> None:
        shape = read_profile(path).model
        expected = PARAMETERS_IN_BILLIONS[path.stem] * 1e9
        assert matrix_parameters(shape) == pytest.approx(expected, rel=2e-3)

    def test_says_the_size_of_the_weights_it_starts_with(self, path: Path) -> None:
        source = (model := read_profile(path)).quantisations[model.default_quantisation]
        if source.bytes is not None:
            bits_per_weight = source.bytes * 8 / (PARAMETERS_IN_BILLIONS[path.stem] * 1e9)
            assert 4.3 < bits_per_weight < 6


def test_the_shipped_schema_is_the_generated_one() -> None:
    shipped = json.loads((shipped_profile_folder() / "profile.schema.json").read_text())
    assert shipped == profile_schema(), "regenerate it: mgpu profiles schema > profiles/profile.schema.json"
    jsonschema.Draft202012Validator.check_schema(profile_schema())


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        pytest.param("llama-8b", "modle", {}, id="an unknown key"),
        pytest.param("llama-8b", "quantisations", {"Q4_KM": {"repository": "a/b"}}, id="an unknown quantisation"),
        pytest.param("llama-8b", "parallel", "4", id="a number in quotes"),
    ],
)
def test_the_schema_shows_editors_what_is_wrong(name: str, key: str, value: object) -> None:
    data = yaml.safe_load(load_profile(name).path.read_text()) | {key: value}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(profile_schema()).validate(data)


def test_shapes_that_leave_the_head_length_out_have_one() -> None:
    assert load_profile("llama-8b").profile.model.head_dim == 128
    latent = ModelShape(
        architecture="deepseek2",
        layers=27,
        embedding_length=2048,
        feed_forward_length=10944,
        heads=16,
        kv_heads=1,
        vocabulary=102400,
        context_length=163840,
        experts=64,
        experts_used=6,
        expert_feed_forward_length=1408,
        shared_expert_feed_forward_length=2816,
        leading_dense_layers=1,
        kv_lora_rank=512,
        rope_head_dim=64,
        nope_head_dim=128,
        value_head_dim=128,
    )
    assert latent.head_dim == 192


def test_a_profile_with_a_gated_source_is_gated_and_says_where() -> None:
    llama, gpt_oss = load_profile("llama-8b").profile, load_profile("gpt-oss-20b").profile
    assert llama.gated
    assert llama.license_page == "https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct"
    assert not gpt_oss.gated


def test_a_file_that_is_no_model_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").touch()
    with pytest.raises(UsageError, match=r"notes\.md is a file, but neither a profile nor a GGUF") as caught:
        load_profile("notes.md")
    assert caught.value.code == "profile-unknown"
    assert ".gguf" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        pytest.param("llama-7b", ["llama-70b", "llama-8b"], id="a typo offers the nearest"),
        pytest.param("Llama-8B", ["llama-8b"], id="capitals offer the lower-case name"),
        pytest.param("../profiles/llama-8b", [], id="a path upwards is not followed"),
        pytest.param("/etc/passwd", [], id="an absolute path is not followed"),
        pytest.param("a\0b", [], id="a NUL byte"),
        pytest.param("", [], id="nothing"),
        pytest.param("x" * 5000, [], id="a name of 5000 letters"),
    ],
)
def test_an_unknown_name_is_a_usage_error(name: str, offered: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_profile(name)
    assert type(caught.value) is UsageError
    assert (caught.value.code, caught.value.exit_code) == ("profile-unknown", 2)
    assert caught.value.hint == "mgpu profiles list"
    assert len(caught.value.message) < 300
    assert all(nearest in caught.value.message for nearest in offered)


def test_a_profile_of_the_user_goes_before_the_shipped_one(own_folder: Path) -> None:
    shipped = load_profile("llama-8b")
    own = own_folder / "llama-8b.yaml"
    own.write_text(shipped.path.read_text().replace("description: ", "description: Mine, "))
    loaded = load_profile("llama-8b")
    assert (loaded.path, loaded.shipped) == (own, False)
    assert loaded.profile.description == "Mine, Llama 3.1 8B Instruct"
    listed = {(entry.shipped, entry.overridden) for entry in list_profiles() if entry.name == "llama-8b"}
    assert listed == {(False, False), (True, True)}


def test_a_broken_profile_of_the_user_is_not_passed_over(own_folder: Path) -> None:
    (own_folder / "llama-8b.yaml").symlink_to(own_folder / "nowhere")
    with pytest.raises(ProfileError, match="there is no such file"):
        load_profile("llama-8b")


def test_the_list_shows_broken_profiles_with_their_error(own_folder: Path) -> None:
    (own_folder / "broken.yaml").write_text("name: broken\nnmae: x\n")
    (own_folder / "other.yml").write_text(load_profile("llama-8b").path.read_text())
    (own_folder / "notes.txt").write_text("not a profile")
    entries = {entry.name: entry for entry in list_profiles()}
    assert set(entries) == {path.stem for path in SHIPPED} | {"broken", "other"}
    assert "did you mean 'name'?" in (entries["broken"].error or "")
    assert "must end in .yaml" in (entries["other"].error or "")
    assert entries["broken"].description is None
    assert [name for name, entry in entries.items() if entry.error] == ["broken", "other"]
    assert all(entries[path.stem].description for path in SHIPPED)


@pytest.mark.parametrize("base", ["llama-8b", "gpt-oss-120b", "smollm2-135m"])
def test_a_new_profile_passes_as_it_is_and_keeps_the_comments(own_folder: Path, base: str) -> None:
    text = new_profile_text("my-model", based_on=base)
    path = own_folder / "my-model.yaml"
    path.write_text(text)
    made, original = load_profile("my-model").profile, load_profile(base).profile
    assert made == Profile.model_validate({**original.model_dump(), "name": "my-model"})
    assert str(shipped_profile_folder() / "profile.schema.json") in text.splitlines()[0]
    inner_comments = [line for line in load_profile(base).path.read_text().splitlines()[8:] if "# " in line]
    assert all(line in text for line in inner_comments)


@pytest.mark.parametrize("name", ["My Model", "a/b", "..", "", "a\nb", "x" * 65])
def test_a_new_profile_needs_a_name_that_can_be_one(name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a profile"):
        new_profile_text(name)


def test_shipped_profiles_are_found_in_an_installed_package_and_missed_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "mgpu"
    monkeypatch.setattr(profile, "__file__", str(package / "profile.py"))
    with pytest.raises(Missing):
        shipped_profile_folder()
    (package / "profiles").mkdir(parents=True)
    (package / "profiles" / "profile.schema.json").write_text("{}")
    assert shipped_profile_folder() == package / "profiles"
