"""Models on the hub, planned from the first megabytes of their files."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mgpu.errors import BadModel, MgpuError, Missing, UsageError
from mgpu.models.facts import ModelFacts
from mgpu.models.fetch import fetch
from mgpu.models.gguf_facts import facts_from_gguf
from mgpu.models.remote import RemoteConfig, RemoteGguf, facts_from_remote, model_on_hub
from mgpu.models.source import HubRepository
from mgpu.models.tensors import GGML_TYPES, Tensor
from tests.fakes import tiny_llama
from tests.fakes.hub_server import FakeHub
from tests.fakes.shapes import SHAPES
from tests.fakes.sparse_gguf import Entry, make_sparse_gguf, text, u32, write_gguf

SOURCE = HubRepository("org/repo")
Q8_0 = GGML_TYPES["Q8_0"]


@pytest.fixture
def big(hub: FakeHub, tmp_path: Path) -> Path:
    """41 GB of Llama 70B in the repository org/repo."""
    path = make_sparse_gguf(tmp_path / "big-Q4_K_M.gguf", SHAPES["llama-3.3-70b"], "Q4_K_M")
    hub.repositories["org/repo"] = {path.name: path}
    return path


def questions(hub: FakeHub) -> list[str]:
    """What the hub was asked since the last time, apart from whether it is there."""
    asked = [f"{method} {path.split('/')[1]}" for method, path, _ in hub.requests if path != "/"]
    hub.requests.clear()
    return asked


def same_but_named(facts: ModelFacts, other: ModelFacts) -> bool:
    return replace(facts, source="") == replace(other, source="")


def small(path: Path, *entries: Entry, layers: int = 1) -> Path:
    """A GGUF of a few kilobytes that says what planning needs."""
    common = [text("general.architecture", "llama"), u32("llama.block_count", layers)]
    common += [u32("llama.attention.head_count", 2), u32("llama.embedding_length", 64)]
    tensors = [Tensor("token_embd.weight", (64, 10), Q8_0)]
    tensors += [Tensor(f"blk.{i}.attn_q.weight", (64, 64), Q8_0) for i in range(layers)]
    write_gguf(path, [*common, *entries], tensors)
    return path


def gguf_on_hub(source: HubRepository) -> RemoteGguf:
    found = model_on_hub(source)
    assert isinstance(found, RemoteGguf)
    return found


def facts_on_hub(source: HubRepository) -> ModelFacts:
    return gguf_on_hub(source).facts


def test_a_model_of_40_gb_is_planned_from_its_first_megabytes(hub: FakeHub, big: Path) -> None:
    found = gguf_on_hub(SOURCE)
    assert same_but_named(found.facts, facts_from_gguf(big))
    assert found.facts.source == "hf:org/repo/big-Q4_K_M.gguf"
    assert (found.files.files, found.files.bytes) == ((big.name,), big.stat().st_size)
    assert hub.served_bytes == 4 << 20
    assert hub.downloads() == [f"bytes=0-{(4 << 20) - 1}"]
    assert found.unconfirmed is None


def test_a_second_plan_asks_only_whether_the_repository_has_changed(hub: FakeHub, big: Path) -> None:
    first = facts_on_hub(SOURCE)
    assert questions(hub) == ["GET api", "HEAD org", "GET org", "GET store"]
    assert facts_on_hub(SOURCE) == first
    assert questions(hub) == ["HEAD org"]


def test_a_changed_repository_is_read_again(hub: FakeHub, big: Path) -> None:
    facts_on_hub(SOURCE)
    make_sparse_gguf(big, SHAPES["llama-3.1-8b"], "Q4_K_M")
    hub.commit = "f" * 40
    assert len(facts_on_hub(SOURCE).layers) == 32


def test_a_new_commit_with_the_same_file_costs_no_second_header(hub: FakeHub, big: Path) -> None:
    first = facts_on_hub(SOURCE)
    hub.commit = "f" * 40
    hub.requests.clear()
    assert facts_on_hub(SOURCE) == first
    assert "GET store" not in questions(hub)


def test_another_quantisation_of_the_same_repository_is_read_too(hub: FakeHub, big: Path, tmp_path: Path) -> None:
    other = make_sparse_gguf(tmp_path / "big-Q8_0.gguf", SHAPES["llama-3.3-70b"], "Q8_0")
    hub.repositories["org/repo"][other.name] = other
    assert [facts_on_hub(HubRepository("org/repo", name)).quantisation for name in ("Q4_K_M", "Q8_0")] == [
        "Q4_K_M",
        "Q8_0",
    ]
    questions(hub)
    assert facts_on_hub(HubRepository("org/repo", "Q8_0")).quantisation == "Q8_0"
    assert facts_on_hub(HubRepository("org/repo")).quantisation == "Q4_K_M"
    assert questions(hub) == ["HEAD org"] * 2


@pytest.mark.parametrize("knows_ranges", [True, False], ids=["by ranges", "by a server that ignores ranges"])
def test_a_long_header_is_read_piece_by_piece(
    hub: FakeHub, big: Path, monkeypatch: pytest.MonkeyPatch, knows_ranges: bool
) -> None:
    monkeypatch.setattr("mgpu.models.remote._FIRST_BYTES", 1 << 18)
    hub.knows_ranges = knows_ranges
    assert same_but_named(facts_on_hub(SOURCE), facts_from_gguf(big))
    edges = [0, 1 << 18, 1 << 19, 1 << 20, 1 << 21, 1 << 22]
    assert hub.downloads() == [f"bytes={start}-{end - 1}" for start, end in itertools.pairwise(edges)]
    assert hub.served_bytes < big.stat().st_size // 100


def test_all_parts_of_a_split_model_are_read(hub: FakeHub, tmp_path: Path) -> None:
    names = [f"Q8_0/m-Q8_0-{part:05}-of-00003.gguf" for part in (1, 2, 3)]
    split: dict[str, bytes | Path] = {}
    for number, name in enumerate(names):
        marks = [u32("split.no", number), u32("split.count", 3), u32("split.tensors.count", 4)]
        path = tmp_path / Path(name).name
        if number == 0:
            small(path, *marks, u32("llama.context_length", 4096), layers=1)
        else:
            write_gguf(path, marks, [Tensor(f"blk.{number}.attn_q.weight", (64, 64), Q8_0)])
        split[name] = path.read_bytes()
    whole = (tmp_path / Path(names[0]).name).read_bytes().replace(b"block_count\4\0\0\0\1", b"block_count\4\0\0\0\3")
    hub.repositories["org/repo"] = {**split, names[0]: whole}
    found = gguf_on_hub(HubRepository("org/repo", "Q8_0"))
    assert len(found.facts.layers) == 3
    assert found.files.files == tuple(names)
    assert [start.name for start in found.starts] == [Path(name).name for name in names]
    assert (
        found.facts.file_bytes
        == found.files.bytes
        == sum((tmp_path / start.name).stat().st_size for start in found.starts)
    )
    questions(hub)
    assert gguf_on_hub(HubRepository("org/repo", "Q8_0")) == found
    assert questions(hub) == ["HEAD org"]

    del hub.repositories["org/repo"][names[2]]
    hub.commit = "f" * 40
    with pytest.raises(BadModel, match="one of 3 parts, and 2 are there"):
        gguf_on_hub(SOURCE)


def test_what_was_planned_is_what_is_fetched(hub: FakeHub, tmp_path: Path) -> None:
    content = small(tmp_path / "m.gguf").read_bytes()
    hub.repositories["org/repo"] = {"m-Q8_0.gguf": content, "m-Q4_0.gguf": b"another"}
    files = gguf_on_hub(HubRepository("org/repo", "Q8_0")).files
    assert fetch(files).read_bytes() == content
    hub.repositories["org/repo"]["m-Q8_0.gguf"] = content + bytes(100)
    with pytest.raises(Missing) as raised:
        fetch(files, folder=tmp_path / "anew")
    assert raised.value.code == "checksum-mismatch"


@pytest.mark.parametrize(
    "cut",
    [
        pytest.param(lambda hub, patch: setattr(hub, "status", 503), id="which is out of order"),
        pytest.param(lambda hub, patch: setattr(hub, "listing", b"{}"), id="which answers half"),
        pytest.param(
            lambda hub, patch: patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True), id="which is forbidden"
        ),
    ],
)
def test_without_the_hub_a_plan_is_made_from_what_is_remembered(
    hub: FakeHub,
    big: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut: Callable[[FakeHub, pytest.MonkeyPatch], None],
) -> None:
    first = facts_on_hub(SOURCE)
    cut(hub, monkeypatch)
    hub.commit = "f" * 40
    found = gguf_on_hub(SOURCE)
    assert found.facts == first
    assert found.unconfirmed
    with pytest.raises(MgpuError):
        gguf_on_hub(HubRepository("org/other"))


def test_what_is_remembered_may_be_damaged(hub: FakeHub, big: Path, caches: Path) -> None:
    first = facts_on_hub(SOURCE)
    files = [path for path in (caches / "cache" / "mgpu" / "hub").rglob("*") if path.is_file()]
    assert len(files) == 2
    for junk in (b"", b"{}", b'{"commit": 1}', b"[" * 100_000, b"\xff", b"GGUF" + bytes(100)):
        for path in files:
            path.write_bytes(junk)
        assert facts_on_hub(SOURCE) == first


def test_remembering_has_a_limit(hub: FakeHub, caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgpu.models.remembered._MOST_HEADERS", 2)
    content = small(tmp_path / "m.gguf").read_bytes()
    for number in range(4):
        hub.repositories["org/repo"] = {"m.gguf": content + bytes(number)}
        hub.commit = str(number) * 40
        facts_on_hub(SOURCE)
    assert len(list((caches / "cache" / "mgpu" / "hub" / "headers").iterdir())) == 2


def test_a_connection_that_breaks_is_tried_again(hub: FakeHub, big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.breaks_after_bytes = [100_000, 0]
    assert same_but_named(facts_on_hub(SOURCE), facts_from_gguf(big))
    hub.breaks_after_bytes = [0] * 3
    hub.repositories["org/repo"] = {"x.gguf": bytes(1000)}
    hub.commit = "f" * 40
    with pytest.raises(Missing) as raised:
        facts_on_hub(SOURCE)
    assert raised.value.code == "download-interrupted"


def test_a_slow_link_is_waited_for(hub: FakeHub, tmp_path: Path) -> None:
    path = make_sparse_gguf(tmp_path / "m.gguf", SHAPES["llama-3.2-1b"], "Q8_0", vocabulary=20_000)
    hub.repositories["org/repo"] = {path.name: path}
    hub.seconds_per_chunk = 0.01
    assert same_but_named(facts_on_hub(SOURCE), facts_from_gguf(path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(b"<!DOCTYPE html>" + bytes(100), "web page", id="a web page"),
        pytest.param(b"GGUF\3\0\0\0" + b"\xff" * 16, "claims", id="a header that claims too much"),
        pytest.param(b"GGUF\3\0\0\0", "points past the file's 8 bytes", id="a file that ends in its header"),
        pytest.param(random.Random(0).randbytes(300_000), "no GGUF file", id="noise"),
        pytest.param(b"", "is empty", id="nothing"),
    ],
)
def test_a_file_that_is_no_model_is_refused(hub: FakeHub, content: bytes, said: str) -> None:
    hub.repositories["org/repo"] = {"m.gguf": content}
    with pytest.raises(BadModel) as raised:
        facts_on_hub(SOURCE)
    assert said in raised.value.message
    assert "hf:org/repo/m.gguf" in raised.value.message


def test_a_header_without_end_is_given_up(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgpu.models.remote._FIRST_BYTES", 1 << 12)
    monkeypatch.setattr("mgpu.models.remote._MOST_BYTES", 1 << 16)
    path = make_sparse_gguf(tmp_path / "m.gguf", SHAPES["llama-3.2-1b"], "Q8_0", vocabulary=20_000)
    hub.repositories["org/repo"] = {path.name: path}
    with pytest.raises(BadModel, match="does not end within 65,536 bytes"):
        facts_on_hub(SOURCE)


@pytest.mark.parametrize(
    ("changes", "source", "code", "said"),
    [
        pytest.param({"gated": True}, SOURCE, "gated", "licence", id="gated"),
        pytest.param({"rejects_token": True}, SOURCE, "token-rejected", "does not accept", id="a bad token"),
        pytest.param({"status": 503}, SOURCE, "bad-server", "answered 503", id="out of order"),
        pytest.param({"status": 429}, SOURCE, "rate-limited", "no more requests", id="too many requests"),
        pytest.param({"listing": b'{"siblings": [{"rfile'}, SOURCE, "bad-server", "as Hugging Face", id="half a list"),
        pytest.param({"listing": b'{"siblings": 1}'}, SOURCE, "bad-server", "as Hugging Face", id="no list"),
        pytest.param({"is_a_proxy_page": True}, SOURCE, "bad-server", "proxy", id="a page of a proxy"),
        pytest.param({}, HubRepository("org/none"), "not-found", "no repository org/none", id="no repository"),
        pytest.param({}, HubRepository("org/text"), "not-found", "neither GGUF files nor", id="no model"),
    ],
)
def test_a_refusal_is_told_with_its_reason_and_what_to_do(
    hub: FakeHub,
    big: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    source: HubRepository,
    code: str,
    said: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecrettoken")
    hub.repositories["org/text"] = {"README.md": b"hello"}
    for name, value in changes.items():
        setattr(hub, name, value)
    with pytest.raises(Missing) as raised:
        facts_on_hub(source)
    assert raised.value.code == code
    assert said in raised.value.message
    assert str(source) in raised.value.message
    assert raised.value.hint
    assert "verysecret" not in f"{raised.value.message} {raised.value.hint}"
    if code == "gated":
        assert f"{hub.endpoint}/org/repo" in str(raised.value.hint)
        assert "HF_TOKEN" in str(raised.value.hint)


def test_a_quantisation_that_is_not_there_is_answered_with_those_that_are(hub: FakeHub, big: Path) -> None:
    facts_on_hub(SOURCE)
    with pytest.raises(UsageError) as raised:
        facts_on_hub(HubRepository("org/repo", "Q2_K"))
    assert (raised.value.code, raised.value.hint) == ("quantisation-unknown", "it has Q4_K_M")


@pytest.mark.parametrize("address", ["nonsense", "", "file:///etc", "http://", "ftp://127.0.0.1", "http://[::1", "\n"])
def test_an_endpoint_that_is_no_address_is_said_to_be_so(
    caches: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    with pytest.raises(Missing) as raised:
        facts_on_hub(SOURCE)
    assert raised.value.code == "bad-environment"
    assert "HF_ENDPOINT" in raised.value.message


def test_an_endpoint_that_breaks_huggingface_hub_is_no_bug() -> None:
    program = "from mgpu.models.fetch import find_local; from mgpu.models.source import HubRepository as R; "
    program += "find_local(R('org/repo'))"
    environment = {**os.environ, "HF_ENDPOINT": "http://[::1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("mgpu.errors.Missing: the environment's settings of Hugging Face")


def test_a_hub_that_is_not_there_is_given_up_at_once(caches: Path) -> None:
    began = time.monotonic()
    with pytest.raises(Missing) as raised:
        facts_on_hub(SOURCE)
    assert raised.value.code == "hub-unreachable"
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"])
def test_this_machine_is_never_asked_through_a_proxy(
    hub: FakeHub, big: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    assert facts_on_hub(SOURCE).quantisation == "Q4_K_M"


CONFIG = {**tiny_llama.CONFIG, "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}
PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = {"metadata": {"total_size": 30}, "weight_map": {"a": PARTS[0], "b": PARTS[1], "c": PARTS[0]}}
FOLDER: dict[str, bytes | Path] = {
    "config.json": json.dumps(CONFIG).encode(),
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    PARTS[0]: bytes(1_000_000),
    PARTS[1]: bytes(2_000_000),
    "consolidated.safetensors": bytes(3_000_000),
    "README.md": b"hello",
}


def folder_on_hub(source: HubRepository = SOURCE) -> RemoteConfig:
    found = model_on_hub(source)
    assert isinstance(found, RemoteConfig)
    return found


def test_a_repository_with_safetensors_gives_its_config_and_sizes(hub: FakeHub) -> None:
    hub.repositories["org/repo"] = FOLDER
    found = folder_on_hub()
    assert found.config == CONFIG
    assert (found.file_bytes, found.weights_bytes) == ({PARTS[0]: 1_000_000, PARTS[1]: 2_000_000}, 3_000_000)
    facts = facts_from_remote(found, "mine")
    assert (facts.name, facts.source, facts.file_bytes) == ("mine", "hf:org/repo", 3_000_000)
    assert (facts.quantisation, len(facts.layers)) == ("awq-int4-g128", tiny_llama.LAYERS)
    assert hub.served_bytes < 10_000


def test_a_second_plan_of_safetensors_asks_only_whether_they_have_changed(hub: FakeHub) -> None:
    hub.repositories["org/repo"] = FOLDER
    first = folder_on_hub()
    questions(hub)
    assert folder_on_hub() == first
    assert questions(hub) == ["HEAD org"]
    hub.repositories["org/repo"] = FOLDER | {PARTS[0]: bytes(7)}
    hub.commit = "f" * 40
    assert folder_on_hub().weights_bytes == 2_000_007


def test_without_the_hub_safetensors_are_planned_from_what_is_remembered(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["org/repo"] = FOLDER
    first = folder_on_hub()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = folder_on_hub()
    assert replace(found, unconfirmed=None) == first
    assert found.unconfirmed
    with pytest.raises(Missing):
        model_on_hub(HubRepository("org/other"))


@pytest.mark.parametrize(
    ("quantisation", "kind"),
    [
        pytest.param(None, RemoteGguf, id="GGUF where nothing else is asked for"),
        pytest.param("Q8_0", RemoteGguf, id="GGUF in its quantisation"),
        pytest.param("AWQ", RemoteConfig, id="safetensors in theirs"),
        pytest.param("INT4", RemoteConfig, id="safetensors by their usual name"),
    ],
)
def test_of_both_forms_the_quantisation_chooses(
    hub: FakeHub, tmp_path: Path, quantisation: str | None, kind: type
) -> None:
    hub.repositories["org/repo"] = FOLDER | {"m-Q8_0.gguf": small(tmp_path / "m.gguf").read_bytes()}
    for _ in range(2):  # what is remembered of one form does not hide the other
        assert isinstance(model_on_hub(HubRepository("org/repo", quantisation)), kind)
        assert isinstance(model_on_hub(HubRepository("org/repo", "AWQ")), RemoteConfig)


@pytest.mark.parametrize(
    ("others", "hint"),
    [
        pytest.param({}, "it has awq-int4-g128 (safetensors)", id="safetensors only"),
        pytest.param(
            {"m-Q8_0.gguf": b"", "m-Q4_0.gguf": b"x"}, "it has Q4_0, Q8_0, awq-int4-g128 (safetensors)", id="both"
        ),
    ],
)
def test_a_quantisation_that_no_form_has_is_answered_with_those_that_are(
    hub: FakeHub, others: dict[str, bytes], hint: str
) -> None:
    hub.repositories["org/repo"] = {**FOLDER, **others}
    with pytest.raises(UsageError) as raised:
        model_on_hub(HubRepository("org/repo", "FP8"))
    assert (raised.value.code, raised.value.hint) == ("quantisation-unknown", hint)


def test_weights_of_unknown_size_cannot_be_planned(hub: FakeHub) -> None:
    remote = RemoteConfig(repository="org/repo", commit="f", config=CONFIG, file_bytes={"a": 1, "b": None})
    with pytest.raises(Missing, match="how large the weights of hf:org/repo are") as raised:
        facts_from_remote(remote, "mine")
    assert raised.value.hint == "fetch them first: mgpu pull hf:org/repo"


@pytest.mark.parametrize(
    ("files", "loaded"),
    [
        pytest.param({"model.safetensors": 10, "consolidated.safetensors": 20}, {"model.safetensors": 10}, id="whole"),
        pytest.param({"weights.safetensors": 10}, {"weights.safetensors": 10}, id="by another name"),
        pytest.param({"a.safetensors": 10, "consolidated.safetensors": 20}, {"a.safetensors": 10}, id="in parts"),
    ],
)
def test_what_engines_load_is_what_counts(hub: FakeHub, files: dict[str, int], loaded: dict[str, int]) -> None:
    hub.repositories["org/repo"] = {"config.json": b"{}", **{path: bytes(size) for path, size in files.items()}}
    assert folder_on_hub().file_bytes == loaded


ONE: dict[str, bytes | Path] = {"m.safetensors": b""}


@pytest.mark.parametrize(
    ("files", "error", "said"),
    [
        pytest.param({"config.json": b"{}"}, Missing, "it holds config.json", id="no weights"),
        pytest.param({}, Missing, "it holds nothing", id="nothing"),
        pytest.param(ONE, Missing, "nor safetensors with a config.json; it holds m.safetensors", id="no config"),
        pytest.param(
            {"config.json": b"{}", "pytorch_model.bin": b""}, Missing, "but pytorch_model.bin, a format", id="pickles"
        ),
        pytest.param(dict.fromkeys("abcdef", b""), Missing, "a, b, c, d and 2 more", id="other things"),
        pytest.param(ONE | {"config.json": b"{"}, BadModel, "is not JSON", id="half a config"),
        pytest.param(ONE | {"config.json": b""}, BadModel, "is not JSON", id="an empty config"),
        pytest.param(ONE | {"config.json": b"[" * 99_999}, BadModel, "is not JSON", id="a deep config"),
        pytest.param(ONE | {"config.json": b"[]"}, BadModel, "no JSON object", id="a list"),
        pytest.param(FOLDER | {PARTS[0]: b""}, None, "", id="all is well"),
        pytest.param(
            {path: content for path, content in FOLDER.items() if path != PARTS[1]},
            Missing,
            f"no file '{PARTS[1]}', which its index names",
            id="a part is missing",
        ),
        pytest.param(
            FOLDER | {"model.safetensors.index.json": b'{"weight_map": {"a": ["b"]}}'},
            BadModel,
            "not an index of weight files",
            id="an index that names no files",
        ),
        pytest.param(
            FOLDER | {"model.safetensors.index.json": b'{"weight_map": {"a": "../../b.safetensors"}}'},
            BadModel,
            "not an index of weight files",
            id="an index that leads out",
        ),
    ],
)
def test_what_is_no_model_of_safetensors_is_refused(
    hub: FakeHub, files: dict[str, bytes | Path], error: type[MgpuError] | None, said: str
) -> None:
    hub.repositories["org/repo"] = files
    if error is None:
        folder_on_hub()
        return
    with pytest.raises(error) as raised:
        model_on_hub(SOURCE)
    assert said in raised.value.message
    assert raised.value.hint or error is BadModel
