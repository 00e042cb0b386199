"""Models of Ollama's library, planned from Ollama's own copy or from the registry's first megabytes."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mgpu.errors import BadModel, MgpuError, Missing, UsageError
from mgpu.models.facts import ModelFacts
from mgpu.models.gguf_facts import facts_from_gguf
from mgpu.models.ollama_library import TaggedModel, find_tag
from mgpu.models.ollama_store import local_tags
from mgpu.models.source import OllamaTag, parse_model
from mgpu.models.tensors import GGML_TYPES, Tensor
from tests.fakes.ollama_registry import LAYER, MANIFEST, MANIFEST_LIST, FakeRegistry, manifest_of, running
from tests.fakes.shapes import SHAPES
from tests.fakes.sparse_gguf import make_sparse_gguf, text, u32, write_gguf

TAG = OllamaTag("llama3.3", "70b")
NAME = "library/llama3.3:70b"
MANIFESTS = "/v2/library/llama3.3/manifests/70b"
Q8_0 = GGML_TYPES["Q8_0"]
DIGEST = "sha256:" + "a" * 64
WEIGHTS = {"mediaType": LAYER + "model", "digest": DIGEST, "size": 100}


@pytest.fixture(autouse=True)
def _no_ollama(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No Ollama on this machine, and no registry."""
    monkeypatch.setenv("OLLAMA_MODELS", str(caches / "ollama"))
    monkeypatch.setattr("mgpu.models.ollama_store._SERVICE_FOLDER", str(caches / "service"))
    monkeypatch.setenv("MGPU_OLLAMA_REGISTRY", "http://127.0.0.1:1")
    for variable in ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRegistry]:
    with running(FakeRegistry()) as serving:
        monkeypatch.setenv("MGPU_OLLAMA_REGISTRY", serving.address)
        yield serving


@pytest.fixture
def big(registry: FakeRegistry, tmp_path: Path) -> Path:
    """41 GB of Llama 70B as llama3.3:70b."""
    path = make_sparse_gguf(tmp_path / "big.gguf", SHAPES["llama-3.3-70b"], "Q4_K_M")
    registry.add(NAME, path)
    return path


@pytest.fixture
def store(caches: Path) -> Path:
    """The folder of this user's Ollama."""
    return caches / "ollama"


def small(path: Path, *, name: str | None = None, layers: int = 1) -> bytes:
    """A GGUF of a few kilobytes that says what planning needs."""
    entries = [text("general.architecture", "llama"), u32("llama.block_count", layers)]
    entries += [u32("llama.attention.head_count", 2), u32("llama.embedding_length", 64)]
    entries += [text("general.name", name)] if name else []
    tensors = [Tensor("token_embd.weight", (64, 10), Q8_0)]
    tensors += [Tensor(f"blk.{i}.attn_q.weight", (64, 64), Q8_0) for i in range(layers)]
    write_gguf(path, entries, tensors)
    return path.read_bytes()


def keep(folder: Path, place: str, weights: bytes, *, linked: bool = False) -> Path:
    """Have Ollama keep a model; the manifest at `place` is a file, or a link as newer versions make it."""
    blob = folder / "blobs" / f"sha256-{hashlib.sha256(weights).hexdigest()}"
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(weights)
    digest = blob.name.replace("-", ":")
    manifest = json.dumps(manifest_of({"mediaType": LAYER + "model", "digest": digest, "size": len(weights)})).encode()
    target = folder / "blobs" / f"sha256-{hashlib.sha256(manifest).hexdigest()}" if linked else folder / place
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(manifest)
    if linked:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).symlink_to(target)
    return blob


def same(facts: ModelFacts, other: ModelFacts) -> bool:
    return replace(facts, source="", name="") == replace(other, source="", name="")


def test_a_model_of_40_gb_is_planned_from_its_first_megabytes(registry: FakeRegistry, big: Path) -> None:
    found = find_tag(TAG)
    assert same(found.facts, facts_from_gguf(big))
    assert (found.facts.name, found.facts.source) == ("sparse", "ollama:llama3.3:70b")
    assert (found.path, found.file_bytes, found.unconfirmed) == (None, big.stat().st_size, None)
    assert found.digest in registry.blobs
    assert found.projector_bytes == 0
    assert registry.served_bytes == 4 << 20
    assert registry.downloads() == [("localhost", f"bytes=0-{(4 << 20) - 1}")]
    assert registry.requests[0][2]["accept"] == MANIFEST


def test_a_second_plan_asks_only_for_the_manifest(registry: FakeRegistry, big: Path) -> None:
    first = find_tag(TAG)
    assert registry.asked() == [f"GET {MANIFESTS}", "GET /v2/library/llama3.3/blobs", "GET /store"]
    assert find_tag(TAG) == first
    assert registry.asked() == [f"GET {MANIFESTS}"]


def test_a_tag_that_moved_is_read_again(registry: FakeRegistry, big: Path, tmp_path: Path) -> None:
    find_tag(TAG)
    registry.add(NAME, make_sparse_gguf(tmp_path / "other.gguf", SHAPES["llama-3.1-8b"], "Q4_K_M"))
    assert len(find_tag(TAG).facts.layers) == 32


def test_another_tag_of_the_same_weights_costs_no_second_header(registry: FakeRegistry, big: Path) -> None:
    find_tag(TAG)
    registry.add("library/llama3.3:latest", big)
    registry.requests.clear()
    assert find_tag(OllamaTag("llama3.3")).facts.quantisation == "Q4_K_M"
    assert registry.downloads() == []


def test_a_registry_does_not_speak_for_the_weights_of_another(
    registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = registry.add(NAME, small(tmp_path / "m.gguf", layers=2))
    assert len(find_tag(TAG).facts.layers) == 2
    registry.blobs[digest] = small(tmp_path / "other.gguf", layers=1) + bytes(10_000)
    monkeypatch.setenv("MGPU_OLLAMA_REGISTRY", f"http://localhost:{registry.port}")
    assert len(find_tag(TAG).facts.layers) == 1


@pytest.mark.parametrize("knows_ranges", [True, False], ids=["by ranges", "by a server that ignores ranges"])
def test_a_long_header_is_read_piece_by_piece(
    registry: FakeRegistry, big: Path, monkeypatch: pytest.MonkeyPatch, knows_ranges: bool
) -> None:
    monkeypatch.setattr("mgpu.models.ollama_library._FIRST_BYTES", 1 << 20)
    registry.knows_ranges = knows_ranges
    assert same(find_tag(TAG).facts, facts_from_gguf(big))
    edges = [0, 1 << 20, 1 << 21, 1 << 22]
    ranges = [f"bytes={start}-{end - 1}" for start, end in itertools.pairwise(edges)]
    assert registry.downloads() == [("localhost", each) for each in ranges]
    assert registry.served_bytes < big.stat().st_size // 100


def test_a_header_without_end_is_given_up(registry: FakeRegistry, big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgpu.models.ollama_library._FIRST_BYTES", 1 << 12)
    monkeypatch.setattr("mgpu.models.ollama_library._MOST_BYTES", 1 << 16)
    with pytest.raises(BadModel, match="does not end within 65,536 bytes"):
        find_tag(TAG)


def test_a_projector_is_counted_beside_the_model(
    registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = small(tmp_path / "m.gguf")
    registry.add("library/llava:7b", weights, projector=bytes(5000))
    found = find_tag(OllamaTag("llava", "7b"))
    assert (found.projector_bytes, found.file_bytes) == (5000, len(weights))
    monkeypatch.setattr(registry, "status", 503)
    assert find_tag(OllamaTag("llava", "7b")) == replace(found, unconfirmed="it answered 503")


@pytest.mark.parametrize(
    ("named", "shown"), [("Smol LM", "Smol LM"), (None, "smol:1b.q8")], ids=["by itself", "by its tag"]
)
def test_a_model_has_a_name(registry: FakeRegistry, tmp_path: Path, named: str | None, shown: str) -> None:
    registry.add("library/smol:1b.q8", small(tmp_path / "m.gguf", name=named))
    assert find_tag(OllamaTag("smol", "1b.q8")).facts.name == shown


@pytest.mark.parametrize(
    "cut",
    [
        pytest.param(lambda registry, patch: setattr(registry, "status", 503), id="which is out of order"),
        pytest.param(lambda registry, patch: setattr(registry, "status", 429), id="which has enough"),
        pytest.param(lambda registry, patch: registry.enter(NAME, b"<html>Please log in"), id="behind a proxy's page"),
        pytest.param(lambda registry, patch: _hang(registry, patch), id="which never comes to an end"),
    ],
)
def test_without_the_registry_a_plan_is_made_from_what_is_remembered(
    registry: FakeRegistry,
    big: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut: Callable[[FakeRegistry, pytest.MonkeyPatch], None],
) -> None:
    first = find_tag(TAG)
    cut(registry, monkeypatch)
    found = find_tag(TAG)
    assert found.unconfirmed
    assert replace(found, unconfirmed=None) == first
    with pytest.raises(Missing):
        find_tag(OllamaTag("another"))


def _hang(registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.seconds_per_manifest_byte = 0.05
    monkeypatch.setattr("mgpu.models.ollama_library._PATIENCE_SECONDS", 0.3)


def test_a_registry_that_is_gone_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(FakeRegistry()) as registry:
        monkeypatch.setenv("MGPU_OLLAMA_REGISTRY", registry.address)
        registry.add("library/m:latest", small(tmp_path / "m.gguf"))
        first = find_tag(OllamaTag("m"))
    began = time.monotonic()
    found = find_tag(OllamaTag("m"))
    assert "cannot be reached" in str(found.unconfirmed)
    assert found.facts == first.facts
    assert time.monotonic() - began < 5


def test_what_is_remembered_may_be_damaged(registry: FakeRegistry, big: Path, caches: Path) -> None:
    first = find_tag(TAG)
    files = [path for path in (caches / "cache" / "mgpu").rglob("*") if path.is_file()]
    assert len(files) == 2
    for junk in (b"", b"{}", b"\xff", b"GGUF" + bytes(100)):
        for path in files:
            path.write_bytes(junk)
        assert find_tag(TAG) == first
    for path in files:
        path.write_bytes(b"{}")
    registry.status = 500
    with pytest.raises(Missing, match="answered 500"):
        find_tag(TAG)


def test_a_connection_that_breaks_is_tried_again(
    registry: FakeRegistry, big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    registry.breaks_after_bytes = [0] * 3
    with pytest.raises(Missing) as raised:
        find_tag(TAG)
    assert raised.value.code == "download-interrupted"
    registry.breaks_after_bytes = [100_000, 0]
    assert same(find_tag(TAG).facts, facts_from_gguf(big))


def test_a_slow_link_is_waited_for(registry: FakeRegistry, tmp_path: Path) -> None:
    path = make_sparse_gguf(tmp_path / "m.gguf", SHAPES["llama-3.2-1b"], "Q8_0", vocabulary=20_000)
    registry.add(NAME, path)
    registry.seconds_per_chunk = 0.01
    assert same(find_tag(TAG).facts, facts_from_gguf(path))


@pytest.mark.parametrize(
    ("changes", "code", "said", "hint"),
    [
        pytest.param({"status": 404}, "not-found", "no llama3.3:70b", "ollama.com/library/llama3.3/tags", id="unknown"),
        pytest.param(
            {"status": 401}, "not-found", "or it is private", "ollama.com/library/llama3.3/tags", id="private"
        ),
        pytest.param({"status": 429}, "rate-limited", "no more requests", "wait", id="too many requests"),
        pytest.param({"status": 500}, "bad-server", "answered 500", "later", id="out of order"),
        pytest.param({"status": 304}, "bad-server", "answered 304", "later", id="an answer to another question"),
        pytest.param({"blob_status": 404}, "bad-server", "answered 404", "network", id="a manifest without its blob"),
        pytest.param({"store": "http://models.invalid/"}, "bad-server", "without encryption", "", id="in the open"),
        pytest.param({"store": "ftp://127.0.0.1/"}, "bad-server", "without encryption", "", id="another protocol"),
        pytest.param(
            {"manifest_headers": {"Docker-Content-Digest": DIGEST}}, "checksum-mismatch", "checksum", "", id="changed"
        ),
        pytest.param({"manifests": {}}, "not-found", "no llama3.3:70b", "/tags", id="no manifest"),
    ],
)
def test_a_refusal_is_told_with_its_reason_and_what_to_do(
    registry: FakeRegistry, big: Path, changes: dict[str, Any], code: str, said: str, hint: str
) -> None:
    for name, value in changes.items():
        setattr(registry, name, value)
    with pytest.raises(Missing) as raised:
        find_tag(TAG)
    assert raised.value.code == code
    assert said in raised.value.message
    assert "ollama:llama3.3:70b" in raised.value.message
    assert hint in str(raised.value.hint)
    assert raised.value.hint


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(b"<!DOCTYPE html>" + bytes(100), "web page", id="a web page"),
        pytest.param(b"GGUF\3\0\0\0" + b"\xff" * 16, "claims", id="a header that claims too much"),
        pytest.param(b"GGUF\3\0\0\0", "points past the file's 8 bytes", id="a file that ends in its header"),
        pytest.param(b"", "is empty", id="nothing"),
    ],
)
def test_weights_that_are_no_model_are_refused(registry: FakeRegistry, store: Path, content: bytes, said: str) -> None:
    registry.add(NAME, content)
    with pytest.raises(BadModel, match=said) as raised:
        find_tag(TAG)
    assert "ollama:llama3.3:70b" in raised.value.message
    keep(store, "manifests/registry.ollama.ai/library/llama3.3/70b", content)
    with pytest.raises(BadModel, match=said) as raised:
        find_tag(TAG)
    assert raised.value.hint == "fetch it anew: ollama pull llama3.3:70b"


MALFORMED = [
    pytest.param(b"", "not JSON", id="nothing"),
    pytest.param(b"<html>", "not JSON", id="a page"),
    pytest.param(b'{"layers": [', "not JSON", id="half"),
    pytest.param(b"\xff\xfe", "not JSON", id="no text"),
    pytest.param(b"[" * 100_000, "not JSON", id="a deep one"),
    pytest.param(b"[]", "no JSON object", id="a list"),
    pytest.param({}, "no layers", id="an empty object"),
    pytest.param({"errors": []}, "no layers", id="an error"),
    pytest.param({"layers": 1}, "no list", id="layers that are a number"),
    pytest.param({"layers": [1]}, "no list of objects", id="a layer that is a number"),
    pytest.param({"layers": [{}]}, "no media type", id="an empty layer"),
    pytest.param({"layers": [{**WEIGHTS, "mediaType": None}]}, "no media type", id="no media type"),
    pytest.param({"layers": [{**WEIGHTS, "digest": "../../etc/passwd"}]}, "no SHA-256", id="a path for a digest"),
    pytest.param({"layers": [{**WEIGHTS, "digest": "md5:" + "a" * 64}]}, "no SHA-256", id="another digest"),
    pytest.param({"layers": [{**WEIGHTS, "size": -1}]}, "no possible size", id="a negative size"),
    pytest.param({"layers": [{**WEIGHTS, "size": "1"}]}, "no possible size", id="a size in words"),
    pytest.param({"layers": [{**WEIGHTS, "size": True}]}, "no possible size", id="a size that is true"),
    pytest.param({"layers": [{**WEIGHTS, "size": 1 << 60}]}, "no possible size", id="a size beyond all disks"),
    pytest.param({"mediaType": MANIFEST_LIST, "manifests": 1}, "no list", id="a list that is a number"),
    pytest.param({"mediaType": MANIFEST_LIST, "manifests": [{}]}, "no SHA-256", id="a list of nothing"),
]
UNSUPPORTED = [
    pytest.param({"layers": None}, "cloud", id="of the cloud"),
    pytest.param({"layers": [{"mediaType": LAYER + "license"}]}, "cloud", id="of the cloud, with a licence"),
    pytest.param({"layers": [{"mediaType": LAYER + "tensor"}] * 3}, "safetensors", id="safetensors"),
    pytest.param({"layers": [{"mediaType": LAYER + "tensor; name=a"}]}, "safetensors", id="safetensors with names"),
    pytest.param({"layers": [WEIGHTS, WEIGHTS]}, "2 layers", id="in parts"),
    pytest.param(
        {"mediaType": MANIFEST_LIST, "manifests": [{"runner": "mlx", "layers": [WEIGHTS]}]}, "another engine", id="MLX"
    ),
]


@pytest.mark.parametrize(("manifest", "said"), MALFORMED)
def test_a_malformed_manifest_is_told_in_a_sentence(
    registry: FakeRegistry, store: Path, manifest: Any, said: str
) -> None:
    registry.enter(NAME, manifest)
    with pytest.raises(Missing, match=said) as raised:
        find_tag(TAG)
    assert raised.value.code == "bad-server"
    path = store / "manifests/registry.ollama.ai/library/llama3.3/70b"
    path.parent.mkdir(parents=True)
    path.write_bytes(registry.manifests[NAME])
    with pytest.raises(BadModel, match=said) as bad:
        find_tag(TAG)
    assert "ollama pull llama3.3:70b" in str(bad.value.hint)
    assert local_tags() == ()


@pytest.mark.parametrize(("manifest", "said"), UNSUPPORTED)
def test_a_model_that_is_no_single_gguf_is_not_supported(
    registry: FakeRegistry, store: Path, manifest: Any, said: str
) -> None:
    registry.enter(NAME, manifest)
    path = store / "manifests/registry.ollama.ai/library/m/latest"
    path.parent.mkdir(parents=True)
    path.write_bytes(registry.manifests[NAME])
    for tag in (TAG, OllamaTag("m")):
        with pytest.raises(Missing, match=said) as raised:
            find_tag(tag)
        assert raised.value.code == "not-supported"
        assert f"{tag.name}:{tag.tag}" in raised.value.message
    assert local_tags() == ()


def test_an_endless_manifest_is_left(registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.enter(NAME, {"layers": [WEIGHTS], "more": "x" * (5 << 20)})
    with pytest.raises(Missing, match="more than 4,194,304 bytes"):
        find_tag(TAG)


@pytest.mark.parametrize("at_the_registry", [True, False], ids=["at the registry", "on this machine"])
def test_of_a_list_of_manifests_the_one_for_ggufs_is_taken(
    registry: FakeRegistry, store: Path, tmp_path: Path, at_the_registry: bool
) -> None:
    weights = small(tmp_path / "m.gguf")
    tensors = manifest_of({"mediaType": LAYER + "tensor"}, runner="mlx", format="safetensors")
    child = json.dumps(manifest_of(registry.layer("model", weights))).encode()
    reference = {"mediaType": MANIFEST, "digest": registry.layer("", child)["digest"], "runner": "ollama"}
    registry.enter(NAME, {"mediaType": MANIFEST_LIST, "manifests": [tensors, reference]})
    if not at_the_registry:
        keep(store, "manifests/registry.ollama.ai/library/another/latest", weights)
        keep(store, "blobs/unused", child)
        path = store / "manifests/registry.ollama.ai/library/llama3.3/70b"
        path.parent.mkdir(parents=True)
        path.write_bytes(registry.manifests[NAME])
    found = find_tag(TAG)
    assert (found.file_bytes, found.path is None) == (len(weights), at_the_registry)
    damaged = {digest: b"{}" if content == child else content for digest, content in registry.blobs.items()}
    registry.blobs = damaged
    (store / "blobs" / str(reference["digest"]).replace(":", "-")).unlink(missing_ok=True)
    if not at_the_registry:
        with pytest.raises(BadModel, match="does not match its checksum"):
            find_tag(TAG)
    else:
        assert "does not match its checksum" in str(find_tag(TAG).unconfirmed)


PLACES = [
    pytest.param("manifests/registry.ollama.ai/library/llama3.3/70b", False, "llama3.3", id="in the library"),
    pytest.param("manifests-v2/ollama.com/library/llama3.3/70b", True, "llama3.3", id="by a link"),
    pytest.param("manifests/registry.ollama.ai/someone/llama3.3/70b", False, "someone/llama3.3", id="of a user"),
    pytest.param("manifests/hf.co/org/llama-GGUF/70b", False, "hf.co/org/llama-GGUF", id="of another host"),
]


@pytest.mark.parametrize("folder", ["ollama", "service"])
@pytest.mark.parametrize(("place", "linked", "name"), PLACES)
def test_what_ollama_has_is_read_where_it_is(
    caches: Path, tmp_path: Path, folder: str, place: str, linked: bool, name: str
) -> None:
    weights = small(tmp_path / "m.gguf")
    blob = keep(caches / folder, place, weights, linked=linked)
    tag = parse_model(f"ollama:{name}:70b")
    assert isinstance(tag, OllamaTag)
    found = find_tag(tag)
    digest = f"sha256:{hashlib.sha256(weights).hexdigest()}"
    assert found == TaggedModel(tag=tag, facts=found.facts, path=blob, file_bytes=len(weights), digest=digest)
    assert (found.facts.name, found.facts.source) == (f"{name}:70b", str(blob))
    (local,) = local_tags()
    assert (local.name, local.tag, local.bytes, local.path) == (name, "70b", len(weights), blob)
    assert parse_model(local.argument) == tag
    assert local.modified == pytest.approx(time.time(), abs=600)


def test_what_ollama_has_half_is_read_at_the_registry(registry: FakeRegistry, store: Path, tmp_path: Path) -> None:
    weights = small(tmp_path / "m.gguf")
    keep(store, "manifests/registry.ollama.ai/library/llama3.3/70b", weights).unlink()
    registry.add(NAME, weights)
    assert find_tag(TAG).path is None
    assert local_tags() == ()


def test_a_linked_manifest_that_was_changed_is_refused(store: Path, tmp_path: Path) -> None:
    place = "manifests-v2/ollama.com/library/llama3.3/70b"
    keep(store, place, small(tmp_path / "m.gguf"), linked=True)
    (store / place).write_bytes((store / place).read_bytes() + b" ")
    with pytest.raises(BadModel, match="does not match its checksum"):
        find_tag(TAG)


def test_local_tags_are_listed_once_and_by_name(caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", f' "{caches / "ollama"}" ')
    weights = small(tmp_path / "m.gguf")
    for folder, place in (
        ("ollama", "manifests/registry.ollama.ai/library/zeta/latest"),
        ("ollama", "manifests/registry.ollama.ai/library/alpha/8b"),
        ("ollama", "manifests/registry.ollama.ai/library/alpha/.8b.partial"),
        ("ollama", "manifests-v2/ollama.com/library/alpha/8b"),
        ("service", "manifests/registry.ollama.ai/library/alpha/8b"),
        ("service", "manifests/registry.ollama.ai/library/alpha/70b"),
    ):
        keep(caches / folder, place, weights)
    (caches / "ollama/manifests/registry.ollama.ai/library/alpha/folder").mkdir()
    assert [f"{each.name}:{each.tag}" for each in local_tags()] == ["alpha:70b", "alpha:8b", "zeta:latest"]
    assert {each.path.parent.parent.name for each in local_tags() if each.tag == "8b"} == {"ollama"}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        pytest.param("smol", "/v2/library/smol/manifests/latest", id="in the library"),
        pytest.param("someone/smol", "/v2/someone/smol/manifests/latest", id="of a user"),
        pytest.param("ollama.com/library/smol", "/v2/library/smol/manifests/latest", id="by the site"),
        pytest.param("registry.ollama.ai/someone/smol", "/v2/someone/smol/manifests/latest", id="by the registry"),
    ],
)
def test_a_name_is_completed_as_ollama_does(registry: FakeRegistry, name: str, path: str) -> None:
    with pytest.raises(Missing):
        find_tag(OllamaTag(name))
    assert registry.asked() == [f"GET {path}"]


@pytest.mark.parametrize(
    "name", ["a/b/c/d", "../../etc/passwd", "", "a b", "a\n", "host:80/a/b", "a?b", "é", "a" * 200]
)
def test_a_name_that_ollama_has_no_place_for_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no name that Ollama has a place for"):
        find_tag(OllamaTag(name))


@pytest.mark.parametrize(
    "address",
    [
        "nonsense",
        "ftp://127.0.0.1",
        "http://registry.ollama.ai",
        "http://127.0.0.1.evil.example",
        "https://",
        "https://a b",
        "http://[::1",
        "https://host:99999",
        "https://user:secret@host",
        "https://host/path",
        "https://host?x",
        "https://ho\nst",
    ],
)
def test_an_address_that_is_none_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("MGPU_OLLAMA_REGISTRY", address)
    with pytest.raises(Missing) as raised:
        find_tag(TAG)
    assert raised.value.code == "bad-environment"
    assert "MGPU_OLLAMA_REGISTRY" in raised.value.message


@pytest.mark.parametrize("host", ["127.0.0.1:1", "localhost:1"])
def test_a_registry_that_is_not_there_is_given_up_at_once(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("MGPU_OLLAMA_REGISTRY", f"http://{host}")
    began = time.monotonic()
    with pytest.raises(Missing) as raised:
        find_tag(TAG)
    assert raised.value.code == "hub-unreachable"
    assert time.monotonic() - began < 5


def test_a_host_that_can_be_none_is_unreachable() -> None:
    with pytest.raises(Missing) as raised:
        find_tag(OllamaTag(f"{'a' * 100}.example/library/m"))
    assert raised.value.code == "hub-unreachable"


def test_other_hosts_are_asked_through_the_proxy(registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", registry.address)
    with pytest.raises(Missing):
        find_tag(OllamaTag("models.invalid/library/m"))
    assert registry.asked() == ["CONNECT models.invalid:443"]


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"])
def test_this_machine_is_never_asked_through_a_proxy(
    registry: FakeRegistry, big: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    assert find_tag(TAG).facts.quantisation == "Q4_K_M"


def test_the_registry_is_one_that_ollama_can_pull_from(registry: FakeRegistry, tmp_path: Path) -> None:
    """What Ollama does, as it was seen to: it takes the size from HEAD and insists on another host's name."""
    registry.add(NAME, small(tmp_path / "m.gguf"), projector=bytes(50))
    with httpx.Client(trust_env=False) as http:
        manifest = http.get(f"{registry.address}{MANIFESTS}").json()
        assert len(manifest["layers"]) == 4
        for layer in [*manifest["layers"], manifest["config"]]:
            blob = f"{registry.address}/v2/library/llama3.3/blobs/{layer['digest']}"
            assert http.head(blob).headers["Content-Length"] == str(layer["size"])
            redirected = http.get(blob)
            assert (redirected.status_code, httpx.URL(redirected.headers["Location"]).host) == (307, "localhost")
            content = http.get(redirected.headers["Location"], headers={"Range": f"bytes=0-{layer['size'] - 1}"})
            assert f"sha256:{hashlib.sha256(content.content).hexdigest()}" == layer["digest"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([DIGEST, MANIFEST]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
LAYERS = st.fixed_dictionaries(
    {},
    optional={
        "mediaType": st.sampled_from([LAYER + "model", LAYER + "projector", LAYER + "license"]) | JSON,
        "digest": st.just(DIGEST) | JSON,
        "size": st.integers(0, 1 << 40) | JSON,
        "layers": JSON,
        "runner": JSON,
    },
)
LISTS = st.lists(LAYERS, max_size=3) | JSON
DOCUMENTS = st.fixed_dictionaries(
    {}, optional={"mediaType": st.just(MANIFEST_LIST) | JSON, "layers": LISTS, "manifests": LISTS}
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(DOCUMENTS)
@example({"layers": [WEIGHTS]})
def test_whatever_a_manifest_holds_the_answer_is_an_error_of_mgpu(store: Path, document: object) -> None:
    path = store / "manifests/registry.ollama.ai/library/llama3.3/70b"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    local_tags()
    with pytest.raises(MgpuError) as raised:
        find_tag(TAG)
    assert raised.value.message
