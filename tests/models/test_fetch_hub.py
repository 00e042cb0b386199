from __future__ import annotations

import errno
import hashlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mgpu.errors import Missing, UsageError
from mgpu.models.fetch import Progress, fetch, find_local, survey
from mgpu.models.source import HubRepository
from mgpu.profile import GgufSource
from tests.fakes.hub_server import COMMIT, FakeHub, running
from tests.ordinary_user import as_ordinary_user

MODEL = random.Random(0).randbytes(3_000_000)
SHA256 = hashlib.sha256(MODEL).hexdigest()
SOURCE = GgufSource(repository="org/repo", files=("model-Q8_0.gguf",), sha256=(SHA256,))


@pytest.fixture(autouse=True)
def _one_model(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["org/repo"] = {"model-Q8_0.gguf": MODEL}
    monkeypatch.setattr("mgpu.models.transfer._CHUNK_BYTES", 1 << 16)


def leftovers(folder: Path) -> list[str]:
    """The names of all files below `folder` that hold anything."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def hf_hub_download(hub: FakeHub, caches: Path, revision: str, *, offline: bool = False) -> Path:
    """What another program gets that uses huggingface_hub with the same cache."""
    program = (
        "import huggingface_hub, sys;"
        "print(huggingface_hub.hf_hub_download('org/repo', 'model-Q8_0.gguf', revision=sys.argv[1]))"
    )
    environment = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_CACHE": str(caches / "hub"),
        "HF_HUB_OFFLINE": str(int(offline)),
    }
    done = subprocess.run(
        [sys.executable, "-c", program, revision], env={**os.environ, **environment}, stdout=subprocess.PIPE, check=True
    )
    return Path(done.stdout.decode().strip())


def interrupt(progress: Progress) -> None:
    if progress.done_bytes > 0:
        raise KeyboardInterrupt


def failure(source: GgufSource | HubRepository = SOURCE, folder: Path | None = None) -> Missing:
    with pytest.raises(Missing) as raised:
        fetch(source, folder=folder)
    assert raised.value.hint
    return raised.value


def test_a_file_is_fetched_into_the_cache_that_all_share(hub: FakeHub, caches: Path) -> None:
    path = fetch(SOURCE)
    assert path.read_bytes() == MODEL
    assert path.name == "model-Q8_0.gguf"
    for revision in ("main", COMMIT):
        assert hf_hub_download(hub, caches, revision, offline=True) == path
    assert leftovers(caches) == sorted(["main", SHA256, "model-Q8_0.gguf"])


def test_a_file_that_is_there_is_used_without_asking_anyone(hub: FakeHub, caches: Path) -> None:
    path = fetch(SOURCE)
    asked = len(hub.requests)
    assert find_local(SOURCE) == fetch(SOURCE) == path
    assert len(hub.requests) == asked


def test_a_damaged_cache_is_fetched_anew(hub: FakeHub, caches: Path) -> None:
    reference = caches / "hub" / "models--org--repo" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_bytes(b"\xff\xfe")
    assert find_local(SOURCE) is None
    assert fetch(SOURCE).read_bytes() == MODEL


def test_nothing_is_found_where_nothing_is(caches: Path) -> None:
    assert find_local(SOURCE) is None
    assert find_local(HubRepository("org/repo", "Q8_0")) is None
    assert find_local(SOURCE, folder=caches / "nowhere") is None


def test_a_file_that_others_fetched_is_used(hub: FakeHub, caches: Path) -> None:
    pinned = GgufSource(repository="org/repo", revision=COMMIT, files=SOURCE.files)
    theirs = hf_hub_download(hub, caches, "main")
    asked = len(hub.requests)
    assert fetch(pinned) == fetch(SOURCE) == theirs
    assert len(hub.requests) == asked


def test_the_parts_of_a_split_model_lie_side_by_side(hub: FakeHub) -> None:
    names = tuple(f"Q6/model-Q6_K-{part:05}-of-00003.gguf" for part in (1, 2, 3))
    hub.repositories["org/repo"] |= {name: name.encode() * 1000 for name in names}
    seen: list[Progress] = []
    path = fetch(GgufSource(repository="org/repo", files=names), on_progress=seen.append)
    assert path.name == "model-Q6_K-00001-of-00003.gguf"
    for name in names:
        assert path.with_name(Path(name).name).read_bytes() == name.encode() * 1000
    total = sum(len(name) * 1000 for name in names)
    assert (seen[-1].done_bytes, seen[-1].total_bytes) == (total, total)


def test_a_split_model_without_all_its_parts_is_not_there(hub: FakeHub) -> None:
    names = [f"model-Q6_K-{part:05}-of-00003.gguf" for part in (1, 2, 3)]
    hub.repositories["org/repo"] = {name: name.encode() for name in names}
    path = fetch(HubRepository("org/repo"))
    assert find_local(HubRepository("org/repo")) == path
    path.with_name(names[1]).unlink()
    assert find_local(HubRepository("org/repo")) is None
    assert fetch(HubRepository("org/repo")) == path
    assert len(hub.downloads()) == 3


def test_a_survey_says_what_a_fetch_would_do(hub: FakeHub, caches: Path) -> None:
    found = survey(SOURCE)
    assert (found.name, found.path) == ("model-Q8_0.gguf", None)
    assert found.total_bytes == found.missing_bytes == len(MODEL)
    assert hub.downloads() == []
    with pytest.raises(KeyboardInterrupt):
        fetch(SOURCE, on_progress=interrupt)
    (partial,) = caches.rglob("*.incomplete")
    assert survey(SOURCE).missing_bytes == len(MODEL) - partial.stat().st_size < len(MODEL)
    path = fetch(SOURCE)
    assert (survey(SOURCE).path, survey(SOURCE).missing_bytes) == (path, 0)


def test_progress_grows_to_the_total(hub: FakeHub) -> None:
    seen: list[Progress] = []
    fetch(SOURCE, on_progress=seen.append)
    done = [progress.done_bytes for progress in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1].total_bytes == len(MODEL)
    assert {(progress.stage, progress.name) for progress in seen} == {("downloading", "model-Q8_0.gguf")}


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: FakeHub) -> None:
    hub.breaks_after_bytes = [1_000_000, 500_000]
    assert fetch(SOURCE).read_bytes() == MODEL
    first, *others = hub.downloads()
    assert first == ""
    assert len(others) == 2
    assert all(int(each.removeprefix("bytes=").removesuffix("-")) > 0 for each in others)


def test_what_was_interrupted_is_continued_by_the_next_call(hub: FakeHub, caches: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fetch(SOURCE, on_progress=interrupt)
    assert find_local(SOURCE) is None
    (partial,) = caches.rglob("*.incomplete")
    kept = partial.stat().st_size
    assert 0 < kept < len(MODEL)
    assert fetch(SOURCE).read_bytes() == MODEL
    assert hub.downloads() == ["", f"bytes={kept}-"]
    assert not list(caches.rglob("*.incomplete"))


def test_a_server_that_cannot_continue_begins_anew(hub: FakeHub) -> None:
    hub.breaks_after_bytes = [1_000_000]
    hub.knows_ranges = False
    assert fetch(SOURCE).read_bytes() == MODEL


def test_a_server_that_always_breaks_off_is_given_up(
    hub: FakeHub, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mgpu.models.transfer._TRIES", 1)
    hub.breaks_after_bytes = [1_000_000, 0, 0, 0, 0]
    error = failure()
    assert error.code == "download-interrupted"
    assert "of 3,000,000 bytes" in error.message
    assert find_local(SOURCE) is None


@pytest.mark.parametrize("folder", [None, "folder"])
def test_a_wrong_checksum_leaves_nothing_behind(hub: FakeHub, caches: Path, folder: str | None) -> None:
    hub.corrupts = True
    error = failure(folder=caches / folder if folder else None)
    assert error.code == "checksum-mismatch"
    assert leftovers(caches) == []


def test_another_file_than_the_profile_means_is_not_even_downloaded(hub: FakeHub) -> None:
    error = failure(GgufSource(repository="org/repo", files=SOURCE.files, sha256=("0" * 64,)))
    assert error.code == "checksum-mismatch"
    assert hub.downloads() == []


def test_too_little_space_is_found_before_downloading(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    error = failure()
    assert error.code == "disk-full"
    assert "3,000,000 bytes are needed, 1,000,000 are free" in error.message
    assert hub.downloads() == []


def test_a_disk_that_fills_up_half_way_leaves_what_is_there(hub: FakeHub) -> None:
    def fill_up(progress: Progress) -> None:
        if progress.done_bytes > 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(Missing) as raised:
        fetch(SOURCE, on_progress=fill_up)
    assert raised.value.code == "disk-full"
    assert fetch(SOURCE).read_bytes() == MODEL
    assert hub.downloads()[1].startswith("bytes=")


def test_a_file_system_for_small_files_only_is_said_to_be_so(hub: FakeHub, caches: Path) -> None:
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000));"
        "from mgpu.models.fetch import fetch; from mgpu.models.source import HubRepository;"
        "fetch(HubRepository('org/repo'))"
    )
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(caches / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert "does not allow so large a file" in done.stderr.splitlines()[-1]


def test_a_folder_that_may_not_be_written_is_said_to_be_so(hub: FakeHub, caches: Path) -> None:
    (caches / "locked").mkdir(mode=0o500)
    with as_ordinary_user():
        error = failure(folder=caches / "locked")
    assert error.code == "folder-unwritable"


def test_a_file_in_the_way_of_a_folder_is_no_bug(hub: FakeHub, caches: Path) -> None:
    (caches / "file").touch()
    assert failure(folder=caches / "file").code == "folder-unwritable"


@pytest.mark.parametrize(
    ("changes", "source", "code", "said"),
    [
        pytest.param({"gated": True}, SOURCE, "gated", "licence", id="gated"),
        pytest.param({"rejects_token": True}, SOURCE, "token-rejected", "does not accept", id="a bad token"),
        pytest.param({"status": 503}, SOURCE, "bad-server", "answered 503", id="out of order"),
        pytest.param({"status": 429}, SOURCE, "rate-limited", "no more requests", id="too many requests"),
        pytest.param({"is_a_proxy_page": True}, SOURCE, "bad-server", "proxy", id="a page of a proxy"),
        pytest.param({}, HubRepository("org/none", "Q8_0"), "not-found", "no repository org/none", id="no repository"),
        pytest.param(
            {},
            GgufSource(repository="org/repo", files=("none.gguf",)),
            "not-found",
            "no file 'none.gguf'",
            id="no file",
        ),
        pytest.param(
            {},
            GgufSource(repository="org/repo", revision="v9", files=SOURCE.files),
            "not-found",
            "no revision 'v9'",
            id="no revision",
        ),
    ],
)
def test_a_refusal_is_told_with_its_reason_and_what_to_do(
    hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    source: GgufSource | HubRepository,
    code: str,
    said: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecrettoken")
    for name, value in changes.items():
        setattr(hub, name, value)
    error = failure(source)
    assert error.code == code
    assert said in error.message
    assert "verysecret" not in f"{error.message} {error.hint}"
    if code == "gated":
        assert f"{hub.endpoint}/org/repo" in str(error.hint)
        assert "HF_TOKEN" in str(error.hint)


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecrettoken")
    fetch(SOURCE)
    for _, path, headers in hub.requests:
        assert ("authorization" in headers) == ("/resolve/" in path)


def test_a_hub_that_is_not_there_is_given_up_at_once(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    began = time.monotonic()
    error = failure()
    assert error.code == "hub-unreachable"
    assert "model-Q8_0.gguf could not be fetched; from Hugging Face: http://127.0.0.1:1 cannot" in error.message
    assert time.monotonic() - began < 2


def test_a_hub_that_does_not_answer_is_given_up_within_seconds(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        assert failure().code == "hub-unreachable"
        assert time.monotonic() - began < 5


def test_a_proxy_that_cannot_be_used_is_no_bug(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "nonsense://127.0.0.1:1")
    error = failure()
    assert error.code == "bad-environment"
    assert "nonsense" in error.message


def test_offline_means_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert failure().code == "offline"
    assert hub.requests == []


def test_two_at_once_fetch_it_once(hub: FakeHub) -> None:
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(SOURCE))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 3
    assert len(set(paths)) == 1
    assert paths[0].read_bytes() == MODEL
    assert len(hub.downloads()) == 1


def test_a_folder_gets_the_file_itself(hub: FakeHub, caches: Path) -> None:
    folder = caches / "models"
    path = fetch(SOURCE, folder=folder)
    assert path == folder / "model-Q8_0.gguf"
    assert leftovers(folder) == ["model-Q8_0.gguf"]
    assert find_local(SOURCE, folder=folder) == path


def test_another_file_in_the_folder_is_not_overwritten(hub: FakeHub, caches: Path) -> None:
    mine = caches / "model-Q8_0.gguf"
    mine.write_text("mine")
    sized = GgufSource(repository="org/repo", files=SOURCE.files, bytes=len(MODEL))
    assert find_local(sized, folder=caches) is None
    error = failure(sized, folder=caches)
    assert error.code == "file-differs"
    assert mine.read_text() == "mine"


REPOSITORY: dict[str, bytes | Path] = {
    "mmproj-model-Q4_K_M.gguf": b"a",
    "model-Q4_K_M.gguf": b"b",
    "model-UD-Q4_K_M.gguf": b"c",
    "model-Q4_K_M.imatrix": b"d",
    "model-IQ4_XS.gguf": b"e",
    "Q8_0/model-Q8_0-00001-of-00002.gguf": b"f",
    "Q8_0/model-Q8_0-00002-of-00002.gguf": b"g",
    "README.md": b"h",
    "../../evil-F16.gguf": b"i",
}


@pytest.mark.parametrize(
    ("quantisation", "content"),
    [
        pytest.param("Q4_K_M", b"b", id="by name, the shortest of several"),
        pytest.param("q4_k_m", b"b", id="in any case"),
        pytest.param("IQ4_XS", b"e", id="another"),
        pytest.param("Q8_0", b"f", id="a split one from its first part"),
        pytest.param(None, b"b", id="Q4_K_M where none is asked for"),
    ],
)
def test_a_repository_is_searched_for_the_quantisation(hub: FakeHub, quantisation: str | None, content: bytes) -> None:
    hub.repositories["org/repo"] = REPOSITORY
    path = fetch(HubRepository("org/repo", quantisation))
    assert path.read_bytes() == content
    asked = len(hub.requests)
    assert find_local(HubRepository("org/repo", quantisation)) == path
    assert fetch(GgufSource(repository="org/repo"), quantisation=quantisation or "Q4_K_M") == path
    assert len(hub.requests) == asked


@pytest.mark.parametrize("quantisation", ["Q5_K_M", "Q4", "K_M", "F16"])
def test_a_quantisation_that_is_not_there_is_answered_with_those_that_are(hub: FakeHub, quantisation: str) -> None:
    hub.repositories["org/repo"] = REPOSITORY
    with pytest.raises(UsageError) as raised:
        fetch(HubRepository("org/repo", quantisation))
    assert raised.value.code == "quantisation-unknown"
    assert raised.value.hint == "it has IQ4_XS, Q4_K_M, Q8_0"


def test_the_only_model_of_a_repository_needs_no_choice(hub: FakeHub) -> None:
    assert fetch(HubRepository("org/repo")).read_bytes() == MODEL


def test_a_repository_without_ggufs_says_so(hub: FakeHub) -> None:
    hub.repositories["org/repo"] = {"model.safetensors": b"x"}
    assert "has no GGUF files" in failure(HubRepository("org/repo")).message


def test_a_server_that_comes_back_finishes_what_it_began(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgpu.models.transfer._TRIES", 1)
    other = FakeHub({"org/repo": {"model-Q8_0.gguf": MODEL}}, breaks_after_bytes=[2_000_000, 0])
    with running(other):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", other.endpoint)
        assert failure().code == "download-interrupted"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    assert fetch(SOURCE).read_bytes() == MODEL
    (asked,) = hub.downloads()
    assert asked.startswith("bytes=")
