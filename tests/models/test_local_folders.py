"""Models of safetensors on this machine, as `mgpu ls` shows them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mgpu.models.fetch import Progress
from mgpu.models.folder import fetch_folder
from mgpu.models.local import LocalModel, local_models
from mgpu.models.remote import model_on_hub
from mgpu.models.source import HubRepository
from mgpu.profile import load_profile
from tests.fakes.hub_server import FakeHub
from tests.fakes.tiny_llama import make_tiny_llama


@pytest.fixture
def tiny(hub: FakeHub, tmp_path: Path) -> dict[str, bytes | Path]:
    """The files of a model, in the repository org/repo."""
    folder = make_tiny_llama(tmp_path / "tiny")
    hub.repositories["org/repo"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return hub.repositories["org/repo"]


def the_model() -> LocalModel:
    (found,) = local_models()
    assert (found.format, found.repository, found.argument, found.name) == (
        "safetensors",
        "org/repo",
        "hf:org/repo",
        "repo",
    )
    return found


def size(files: dict[str, bytes | Path]) -> int:
    return sum(len(content) for content in files.values() if isinstance(content, bytes))


def interrupt(progress: Progress) -> None:
    if progress.done_bytes > 0:
        raise KeyboardInterrupt


def test_a_whole_model_is_one_entry(tiny: dict[str, bytes | Path]) -> None:
    folder = fetch_folder("org/repo")
    os.utime(folder / "model.safetensors", (2_000_000_000, 1_000_000_000))
    found = the_model()
    assert (found.path, found.quantisation, found.state, found.problem) == (folder, "bf16", "complete", None)
    assert (found.bytes, found.total_bytes) == (size(tiny), size(tiny))
    assert [the_model().last_used for _ in range(2)] == [2_000_000_000] * 2  # looking is not using


def test_a_model_belongs_to_the_profile_that_names_its_repository(tiny: dict[str, bytes | Path]) -> None:
    fetch_folder("org/repo")
    profile = load_profile("smollm2-135m").profile
    mine = profile.model_copy(update={"vllm": (profile.vllm[0].model_copy(update={"repository": "org/repo"}),)})
    (found,) = local_models([mine])
    assert (found.profile, found.argument) == ("smollm2-135m", "hf:org/repo")  # the name alone would mean its GGUF


def test_what_was_broken_off_is_partial(hub: FakeHub, tiny: dict[str, bytes | Path]) -> None:
    hub.stalls_after_bytes = 1 << 18
    with pytest.raises(KeyboardInterrupt):
        fetch_folder("org/repo", on_progress=lambda each: interrupt(each) if each.done_bytes > 1 << 18 else None)
    found = the_model()
    assert (found.state, found.problem) == ("partial", "it is being fetched, or that was broken off")
    assert 1 << 18 <= found.bytes < size(tiny) == found.total_bytes
    assert found.quantisation == "bf16"


def test_what_was_only_planned_is_not_here(tiny: dict[str, bytes | Path]) -> None:
    model_on_hub(HubRepository("org/repo"))
    assert local_models() == ()


INDEX = b'{"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}}'


@pytest.mark.parametrize(
    ("damage", "state", "said"),
    [
        pytest.param(lambda it: (it / "config.json").unlink(), "partial", "config.json is missing", id="no config"),
        pytest.param(lambda it: (it / "tokenizer.json").unlink(), "partial", "tokenizer is missing", id="no tokenizer"),
        pytest.param(
            lambda it: (it / "model.safetensors.index.json").write_bytes(INDEX),
            "partial",
            "1 of 2 weight files are there",
            id="a part is missing",
        ),
        pytest.param(
            lambda it: (it / "model.safetensors.index.json").write_bytes(b"{"), "broken", "not an index", id="no index"
        ),
        pytest.param(
            lambda it: (it / "model.safetensors").resolve().unlink(),
            "partial",
            "0 of 1 weight files",
            id="without content",
        ),
    ],
)
def test_a_damaged_folder_says_so(
    hub: FakeHub, tiny: dict[str, bytes | Path], damage: Callable[[Path], object], state: str, said: str
) -> None:
    tiny["model.safetensors.index.json"] = b'{"weight_map": {"a": "model.safetensors"}}'
    folder = fetch_folder("org/repo")
    for path in (folder.parents[3] / "cache").rglob("*.json"):  # as if another program had fetched it
        path.unlink()
    damage(folder)
    found = the_model()
    assert (found.state, found.total_bytes) == (state, None)
    assert said in (found.problem or "")


def test_a_strange_cache_is_no_bug(caches: Path) -> None:
    snapshot = caches / "hub/models--a--b/snapshots/x"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("model.safetensors")
    (snapshot / "config.json").mkdir()
    (snapshot / "model.safetensors.index.json").write_bytes(b"\xff" * 1000)
    (snapshot / "more.safetensors").mkdir()
    assert [model.state for model in local_models()] in ([], ["partial"], ["broken"])
