"""Repositories with safetensors: fetched whole, several files at once, into the cache that all share."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from mgpu.errors import BadModel, Missing
from mgpu.models.choice import folder_files
from mgpu.models.fetch import Progress, fetch, require_space_for
from mgpu.models.folder import fetch_folder, find_local_folder, survey_folder
from mgpu.models.hf import facts_from_folder
from mgpu.models.source import HubRepository
from tests.fakes.hub_server import COMMIT, FakeHub
from tests.fakes.tiny_llama import make_tiny_llama

SHARDS = tuple(f"model-{part:05}-of-00006.safetensors" for part in range(1, 7))
INDEX = '{"weight_map": {' + ", ".join(f'"t{i}": "{name}"' for i, name in enumerate(SHARDS)) + "}}"
SHARD_BYTES = 400_000
SHARDED: dict[str, bytes | Path] = {
    "config.json": b"{}",
    "tokenizer.json": b"{} ",
    "model.safetensors.index.json": INDEX.encode(),
    **{name: random.Random(name).randbytes(SHARD_BYTES) for name in SHARDS},
}
TOTAL_BYTES = sum(len(content) for content in SHARDED.values() if isinstance(content, bytes))


@pytest.fixture
def sharded(hub: FakeHub) -> FakeHub:
    hub.repositories["org/repo"] = dict(SHARDED)
    return hub


@pytest.fixture
def tiny(hub: FakeHub, tmp_path: Path) -> Path:
    """A model that engines can load, in the repository org/repo."""
    folder = make_tiny_llama(tmp_path / "tiny")
    hub.repositories["org/repo"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return folder


def contents(folder: Path) -> dict[str, bytes | Path]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unfinished(caches: Path) -> list[Path]:
    return list(caches.rglob("*.incomplete"))


def interrupt(progress: Progress) -> None:
    if progress.done_bytes > 0:
        raise KeyboardInterrupt


def failure() -> Missing:
    with pytest.raises(Missing) as raised:
        fetch_folder("org/repo")
    assert raised.value.hint
    assert find_local_folder("org/repo") is None
    return raised.value


def test_a_repository_becomes_a_folder_that_engines_load(hub: FakeHub, tiny: Path, caches: Path) -> None:
    hub.repositories["org/repo"] |= {"README.md": b"x", "modeling_tiny.py": b"x", "pytorch_model.bin": b"x"}
    hub.repositories["org/repo"] |= {"original/consolidated.00.pth": b"x", "onnx/model.onnx": b"x"}
    assert find_local_folder("org/repo") is None
    folder = fetch_folder("org/repo")
    assert contents(folder) == contents(tiny)
    assert facts_from_folder(folder).layers == facts_from_folder(tiny).layers
    asked = len(hub.requests)
    assert find_local_folder("org/repo") == fetch_folder("org/repo") == folder
    assert find_local_folder("org/repo", COMMIT) == folder
    assert survey_folder("org/repo").path == folder
    assert len(hub.requests) == asked


def test_the_folder_is_where_other_programs_look_for_it(hub: FakeHub, tiny: Path, caches: Path) -> None:
    def theirs(program: str, *, offline: bool) -> Path:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(caches / "hub")}
        done = subprocess.run(
            [sys.executable, "-c", f"import huggingface_hub as h; {program}"],
            env={**os.environ, **environment, "HF_HUB_OFFLINE": str(int(offline))},
            stdout=subprocess.PIPE,
            check=True,
        )
        return Path(done.stdout.decode().splitlines()[-1])

    assert fetch_folder("org/repo") == theirs("print(h.snapshot_download('org/repo'))", offline=True)
    shutil.rmtree(caches / "hub")
    names = [path.name for path in tiny.iterdir()]
    downloaded = theirs(f"[print(h.hf_hub_download('org/repo', name)) for name in {names}]", offline=False).parent
    asked = len(hub.requests)
    assert fetch_folder("org/repo") == downloaded
    assert len(hub.requests) == asked


@pytest.mark.parametrize(
    ("path", "belongs"),
    [
        *(
            (name, True)
            for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
        ),
        *((name, True) for name in ("tokenizer.model", "special_tokens_map.json", "chat_template.jinja", "merges.txt")),
        *((name, True) for name in ("vocab.json", "preprocessor_config.json", "processor_config.json", "spiece.model")),
        *((name, True) for name in ("tekken.json", "chat_template.json", "hf_quant_config.json", "quant_config.json")),
        *((name, True) for name in ("model.safetensors.index.json", "added_tokens.json", "qwen.tiktoken")),
        *((name, False) for name in ("README.md", "modeling.py", "tokenizer.py", "pytorch_model.bin", "tokenizer.bin")),
        *((name, False) for name in ("original/tokenizer.model", "x.gguf", "a.pth", "pytorch_model.bin.index.json")),
        *((name, False) for name in ("model.safetensors", "LICENSE", ".gitattributes", "vocab.bin", "config.json.py")),
    ],
)
def test_what_belongs_to_a_model_beside_its_weights(path: str, belongs: bool) -> None:
    assert folder_files([path]) == ((path,) if belongs else ())


@pytest.mark.parametrize("absent", ["config.json", "tokenizer.json", SHARDS[3], "model.safetensors.index.json"])
def test_a_folder_without_one_of_its_files_is_not_there(sharded: FakeHub, absent: str) -> None:
    folder = fetch_folder("org/repo")
    (folder / absent).unlink()
    if absent != "model.safetensors.index.json":  # without an index all weights there are count
        assert find_local_folder("org/repo") is None
    assert fetch_folder("org/repo") == folder
    assert sharded.downloads().count("") == len(SHARDED)


def test_a_survey_says_what_a_fetch_would_do(sharded: FakeHub, caches: Path) -> None:
    found = survey_folder("org/repo")
    assert (found.name, found.path) == ("org/repo", None)
    assert found.total_bytes == found.missing_bytes == TOTAL_BYTES
    with pytest.raises(KeyboardInterrupt):
        fetch_folder("org/repo", on_progress=interrupt)
    left = survey_folder("org/repo")
    assert left.total_bytes == TOTAL_BYTES
    assert left.missing_bytes == TOTAL_BYTES - sum(
        path.stat().st_size for path in (caches / "hub/models--org--repo/blobs").iterdir()
    )


def test_the_hub_is_asked_for_one_file_and_tells_of_all(sharded: FakeHub) -> None:
    survey_folder("org/repo")
    asked = [(method, path) for method, path, _ in sharded.requests if path != "/" and "/store/" not in path]
    assert [method for method, path in asked if "/resolve/" in path] == [
        "HEAD",
        "GET",
        "HEAD",
    ]  # the index, then config


def test_several_files_are_fetched_at_once(sharded: FakeHub) -> None:
    sharded.repositories["org/repo"] = {  # one round of four
        "config.json": b"{}",
        "tokenizer.json": b"{} ",
        **{name: SHARDED[name] for name in SHARDS[:2]},
    }
    sharded.together = threading.Barrier(4)
    fetch_folder("org/repo")
    assert not sharded.together.broken


def test_the_parts_of_a_gguf_are_fetched_at_once_too(hub: FakeHub) -> None:
    names = [f"m-Q8_0-{part:05}-of-00003.gguf" for part in (1, 2, 3)]
    hub.repositories["org/repo"] = {name: name.encode() * 9 for name in names}
    hub.together = threading.Barrier(3)
    assert fetch(HubRepository("org/repo")).name == names[0]
    assert not hub.together.broken


def test_progress_is_that_of_all_files_together(sharded: FakeHub) -> None:
    sharded.seconds_per_chunk = 0.02
    seen: list[tuple[Progress, str]] = []
    fetch_folder("org/repo", on_progress=lambda each: seen.append((each, threading.current_thread().name)))
    done = [progress.done_bytes for progress, _ in seen]
    assert done == sorted(done)
    assert len(set(done)) > 2
    assert done[-1] == TOTAL_BYTES
    assert {(each.stage, each.name, each.total_bytes) for each, _ in seen} == {("downloading", "org/repo", TOTAL_BYTES)}
    assert {thread for _, thread in seen} == {threading.current_thread().name}


def test_ctrl_c_ends_all_connections_promptly_and_keeps_what_came(sharded: FakeHub, caches: Path) -> None:
    sharded.stalls_after_bytes = SHARD_BYTES // 2
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fetch_folder("org/repo", on_progress=lambda each: interrupt(each) if each.done_bytes > 500_000 else None)
    assert time.monotonic() - begun < 4  # four connections of which none answers any more
    assert find_local_folder("org/repo") is None
    kept = {path: path.stat().st_size for path in unfinished(caches)}
    assert len(kept) == 4
    sharded.stalls_after_bytes = None
    sharded.release.set()
    before = len(sharded.downloads())
    assert contents(fetch_folder("org/repo")) == SHARDED
    resumed = [each for each in sharded.downloads()[before:] if each.startswith("bytes=")]
    assert Counter(resumed) >= Counter(f"bytes={size}-" for size in kept.values() if size)
    assert unfinished(caches) == []


def test_one_failure_stops_the_others_and_is_the_one_told(sharded: FakeHub, caches: Path) -> None:
    sharded.corrupts = SHARDS[0]
    sharded.seconds_per_chunk = 0.05
    assert failure().code == "checksum-mismatch"
    assert sharded.served_bytes < TOTAL_BYTES
    kept = {path.name.split(".")[0] for path in unfinished(caches)}
    sharded.corrupts = False
    sharded.seconds_per_chunk = 0
    assert contents(fetch_folder("org/repo")) == SHARDED
    assert kept  # what was right of the others went on


def test_connections_that_break_are_taken_up_where_they_broke(sharded: FakeHub) -> None:
    sharded.breaks_after_bytes = [TOTAL_BYTES, 100_000, 150_000, 200_000, 1_000, 70_000]
    assert contents(fetch_folder("org/repo")) == SHARDED
    assert any(each.startswith("bytes=") for each in sharded.downloads()[1:])


def test_a_slow_link_is_waited_for(sharded: FakeHub) -> None:
    sharded.seconds_per_chunk = 0.1
    seen: list[int] = []
    folder = fetch_folder("org/repo", on_progress=lambda progress: seen.append(progress.done_bytes))
    assert contents(folder) == SHARDED
    assert any(1000 < done < SHARD_BYTES for done in seen)  # it is told before the first file is whole


def test_a_hub_elsewhere_is_asked_through_the_proxy(sharded: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("HTTP_PROXY", sharded.endpoint)
    assert contents(fetch_folder("org/repo")) == SHARDED
    assert sharded.proxied > 0


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_this_machine_is_never_asked_through_a_proxy(
    sharded: FakeHub, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, sharded.endpoint)
    fetch_folder("org/repo")
    assert sharded.proxied == 0


def test_a_disk_that_fills_up_half_way_leaves_what_is_there(sharded: FakeHub, caches: Path) -> None:
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000));"
        "from mgpu.models.folder import fetch_folder; fetch_folder('org/repo')"
    )
    environment = {"HF_ENDPOINT": sharded.endpoint, "HF_HUB_CACHE": str(caches / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert "does not allow so large a file" in done.stderr.splitlines()[-1]
    assert any(path.stat().st_size == 300_000 for path in unfinished(caches))
    assert contents(fetch_folder("org/repo")) == SHARDED


def test_a_full_disk_is_said_to_be_full(sharded: FakeHub) -> None:
    def fill_up(progress: Progress) -> None:
        if progress.done_bytes > 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(Missing) as raised:
        fetch_folder("org/repo", on_progress=fill_up)
    assert raised.value.code == "disk-full"
    assert contents(fetch_folder("org/repo")) == SHARDED


def test_too_little_space_is_found_before_downloading(sharded: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    assert failure().code == "disk-full"
    with pytest.raises(Missing, match=f"{TOTAL_BYTES:,} bytes are needed"):
        require_space_for([survey_folder("org/repo")])
    assert sharded.served_bytes < SHARD_BYTES


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        pytest.param({"gated": True}, "gated", "licence", id="gated"),
        pytest.param({"rejects_token": True}, "token-rejected", "does not accept", id="a bad token"),
        pytest.param({"status": 503}, "bad-server", "answered 503", id="out of order"),
        pytest.param({"status": 429}, "rate-limited", "no more requests", id="too many requests"),
        pytest.param({"is_a_proxy_page": True}, "bad-server", "proxy", id="a page of a proxy"),
        pytest.param({"listing": b"[" * 99_999}, "bad-server", "as Hugging Face", id="no list"),
        pytest.param({"repositories": {}}, "not-found", "no repository org/repo", id="no repository"),
        pytest.param({"repositories": {"org/repo": {"m.gguf": b""}}}, "not-found", "holds m.gguf", id="GGUF only"),
    ],
)
def test_a_refusal_is_told_with_its_reason_and_what_to_do(
    sharded: FakeHub, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], code: str, said: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecrettoken")
    for name, value in changes.items():
        setattr(sharded, name, value)
    error = failure()
    assert (error.code, said in error.message, "hf:org/repo" in error.message) == (code, True, True)
    assert "verysecret" not in f"{error.message} {error.hint}"
    if code == "gated":
        assert f"{sharded.endpoint}/org/repo" in str(error.hint)
        assert "HF_TOKEN" in str(error.hint)


def test_a_folder_that_is_damaged_is_not_a_model(sharded: FakeHub) -> None:
    sharded.repositories["org/repo"]["model.safetensors.index.json"] = b"{"
    with pytest.raises(BadModel, match="is not JSON"):
        fetch_folder("org/repo")


def test_two_at_once_fetch_it_once(sharded: FakeHub) -> None:
    sharded.seconds_per_chunk = 0.01
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(fetch_folder("org/repo"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert contents(paths[0]) == SHARDED
    whole = [each for each in sharded.downloads() if not each]
    assert len(whole) <= len(SHARDED)


def test_a_listing_without_checksums_is_asked_about_file_by_file(sharded: FakeHub) -> None:
    names = ", ".join(f'{{"rfilename": "{name}"}}' for name in SHARDED)
    sharded.listing = f'{{"sha": "{COMMIT}", "siblings": [{names}]}}'.encode()
    assert contents(fetch_folder("org/repo")) == SHARDED
