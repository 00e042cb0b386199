"""The state folder: names that stay inside it, locks that hold between processes, modes."""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.errors import Missing, UsageError
from mgpu.running.process import EngineProcess
from mgpu.running.state import check_name, held_folder, instance_folder, is_at, name_from, rotate, state_folder

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys
from mgpu.running.state import instance_folder
with instance_folder("llama", chosen=True) as (name, folder):
    print(name, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("name", ["a", "llama-70b", "Llama_3.1-8B", "7b", "a" * 63, "a.b"])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a..b",
        "a/b",
        "/",
        "../a",
        ".hidden",
        "-flag",
        "_a",
        "a b",
        "ä",
        "a\n",
        "a\0b",
        "٣",
        "a" * 64,
        "a" * 9999,
    ],
)
def test_what_cannot_be_a_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--name") as refused:
        check_name(name)
    assert len(refused.value.message) < 500


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("llama-70b", "llama-70b"),
        ("SmolLM2-135M-Instruct.Q4_1", "SmolLM2-135M-Instruct.Q4_1"),
        ("my model (final) v2", "my-model-final-v2"),
        ("../../etc/passwd", "etc-passwd"),
        ("..hidden..", "hidden"),
        ("a...b", "a.b"),
        ("模型", "model"),
        ("", "model"),
        ("x" * 100, "x" * 56),
        ("x" * 55 + "-y", "x" * 55),
    ],
)
def test_a_name_is_made_of_any_models_name(text: str, name: str) -> None:
    assert name_from(text) == name


@given(text=st.text() | st.from_regex(r"[./_a-zA-Z0-9 -]*", fullmatch=True))
def test_a_name_that_was_made_is_always_one_with_room_for_a_number(text: str) -> None:
    assert check_name(name_from(text))
    assert check_name(f"{name_from(text)}-99")


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_folders_and_lock_are_the_users_alone(own_home: Path) -> None:
    assert state_folder() == own_home / "state" / "mgpu"
    assert mode(state_folder()) == 0o700
    with instance_folder("llama", chosen=True) as (name, folder):
        assert (name, folder) == ("llama", state_folder() / "llama")
        assert mode(folder) == 0o700
        assert mode(folder / "lock") == 0o600


@pytest.mark.parametrize("given", [0o777, 0o755, 0o770, 0o1777, 0o500])
@pytest.mark.parametrize("name", ["mgpu", "mgpu/llama"])
def test_a_folder_that_others_can_open_is_closed_to_them(own_home: Path, name: str, given: int) -> None:
    folder = own_home / "state" / name
    folder.mkdir(parents=True)
    folder.chmod(given)
    with instance_folder("llama", chosen=True):
        assert mode(folder) == 0o700
        assert not folder.stat().st_mode & stat.S_ISVTX


def link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def dangling(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "nowhere")


def a_file(path: Path, _: Path) -> None:
    path.touch()


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        *itertools.product(["mgpu", "mgpu/llama", "mgpu/llama/lock"], [link, dangling]),
        *itertools.product(["mgpu", "mgpu/llama"], [a_file]),  # which a lock is
    ],
)
def test_nothing_leads_out_of_the_state_folder(
    own_home: Path, tmp_path: Path, name: str, spoil: Callable[[Path, Path], None]
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o755)
    path = own_home / "state" / name
    path.parent.mkdir(parents=True)
    spoil(path, outside)
    with pytest.raises(Missing) as missing, instance_folder("llama", chosen=True):
        pass
    assert missing.value.code == "state-folder"
    assert (list(outside.iterdir()), mode(outside)) == ([], 0o755)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
@pytest.mark.parametrize("name", ["mgpu", "mgpu/llama"])
def test_a_folder_of_another_user_is_left_alone(own_home: Path, name: str) -> None:
    folder = own_home / "state" / name
    folder.mkdir(parents=True, mode=0o777)
    os.chown(folder, 65534, 65534)
    before = folder.stat()
    with pytest.raises(Missing, match="another user's"), instance_folder("llama", chosen=True):
        pass
    assert (list(folder.iterdir()), folder.stat().st_mode) == ([], before.st_mode)


def holder() -> subprocess.Popen[str]:
    """Another process that holds the name "llama"."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=-1, stdout=-1, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "llama\n"
    return process


def test_a_name_held_by_another_process_gets_a_number_unless_it_was_chosen() -> None:
    with holder() as other:
        with (
            instance_folder("llama", chosen=False) as (second, _),
            instance_folder("llama", chosen=False) as (third, _),
        ):
            assert (second, third) == ("llama-2", "llama-3")
        with pytest.raises(UsageError, match="llama is already running"), instance_folder("llama", chosen=True):
            pass
        with instance_folder("other", chosen=True) as (name, _):
            assert name == "other"
        other.send_signal(signal.SIGKILL)
    with instance_folder("llama", chosen=True) as (name, _):
        assert name == "llama", "a dead process holds nothing"


def test_a_name_is_free_again_afterwards_whatever_happened() -> None:
    with pytest.raises(ZeroDivisionError), instance_folder("llama", chosen=True):
        raise ZeroDivisionError
    with instance_folder("llama", chosen=True) as (name, folder):
        assert (name, folder.is_dir()) == ("llama", True)


def test_an_engine_does_not_hold_the_name_on() -> None:
    with instance_folder("llama", chosen=True) as (_, folder):
        engine = EngineProcess.start(["/bin/sleep", "60"], env={}, log_path=folder / "engine.log")
    with engine, instance_folder("llama", chosen=True) as (name, _):
        assert (name, engine.poll()) == ("llama", None)


@pytest.mark.parametrize("where", ["/proc/self", "/proc/version", "a file"])
def test_a_state_folder_that_cannot_be_made_is_said_so(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / where))
    with pytest.raises(Missing) as missing, instance_folder("llama", chosen=False):
        pass
    assert missing.value.code == "state-folder"
    assert "XDG_STATE_HOME" in (missing.value.hint or "")


@pytest.mark.parametrize(("spoilt", "is_folder"), [("llama", False), ("llama/lock", True)])
def test_an_instance_folder_that_cannot_be_used_is_said_so(spoilt: str, is_folder: bool) -> None:
    path = state_folder() / spoilt
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if is_folder else path.touch()
    with pytest.raises(Missing) as missing, instance_folder("llama", chosen=False):
        pass
    assert missing.value.code == "state-folder"
    assert re.search(r"mgpu/llama .*cannot be written", missing.value.message)


def test_the_log_before_is_kept_and_the_one_before_that_is_not(tmp_path: Path) -> None:
    log, kept = tmp_path / "engine.log", tmp_path / "engine.log.1"
    rotate(log)
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        log.write_text(text)
        rotate(log)
        assert (log.exists(), kept.read_text()) == (False, text)
    log.touch()
    rotate(log)
    assert kept.read_text() == "second", "an empty log tells less"


def test_a_log_that_cannot_be_kept_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "engine.log").write_text("words")
    (tmp_path / "engine.log.1").mkdir()
    with pytest.raises(Missing) as missing:
        rotate(tmp_path / "engine.log")
    assert missing.value.code == "state-folder"


@pytest.mark.parametrize("removed", ["lock", "folder"])
def test_a_lock_that_is_removed_while_it_is_taken_is_taken_anew(removed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = state_folder() / "llama"
    flock, times = fcntl.flock, iter([True, False])

    def late(file: int, how: int) -> None:
        if next(times):  # whoever clears the instance is faster
            (folder / "lock").unlink()
            if removed == "folder":
                folder.rmdir()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with held_folder("llama", chosen=True) as held:
        assert is_at(held.lock, folder / "lock")
    assert not list(times)
