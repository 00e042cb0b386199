"""What is read of engines that are installed, without a start of any."""

from __future__ import annotations

import contextlib
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from mgpu.backends.installed import installed_engines, libraries_of
from mgpu.machine.inspection import InstalledEngine


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment with no engine; programs in the folder are found."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path


def install(folder: Path, name: str) -> Path:
    path = folder / "bin" / name
    path.write_text(f"#!/bin/sh\ntouch {folder}/started\n")
    path.chmod(0o755)
    return path


def engine(backend: str) -> InstalledEngine | None:
    return next((each for each in installed_engines() if each.backend == backend), None)


def test_a_vllm_tells_its_version_and_its_cuda(nothing: Path) -> None:
    install(nothing, "vllm")
    packages = nothing / "lib" / "python3.12" / "site-packages"
    (packages / "vllm-0.32.0.dist-info").mkdir(parents=True)
    (packages / "torch").mkdir()
    (packages / "torch" / "version.py").write_text("from typing import Optional\ncuda: Optional[str] = '12.8'\n")
    (packages / "nvidia" / "nccl" / "lib").mkdir(parents=True)
    (packages / "nvidia" / "nccl" / "lib" / "libnccl.so.2").touch()
    found = engine("vllm")
    assert found is not None
    assert (found.version, found.cuda_runtime, found.cpu_build, found.nccl) == ("0.32.0", 12080, False, True)
    assert not (nothing / "started").exists()


@pytest.mark.parametrize(
    "text", [pytest.param("cuda: Optional[str] = None\n", id="none"), pytest.param("\0\xff garbage", id="garbage")]
)
def test_a_cuda_that_is_not_named_is_unknown(nothing: Path, text: str) -> None:
    install(nothing, "vllm")
    version = nothing / "lib" / "python3.12" / "site-packages" / "torch" / "version.py"
    version.parent.mkdir(parents=True)
    version.write_text(text, encoding="latin-1")
    found = engine("vllm")
    assert found is not None
    assert (found.version, found.cuda_runtime, found.nccl) == (None, None, False)


def test_a_setting_that_names_no_program_is_a_problem(nothing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MGPU_LLAMA_SERVER", str(nothing / "absent"))
    found = engine("llama.cpp")
    assert found is not None
    assert "MGPU_LLAMA_SERVER" in (found.problem or "")


def library(folder: Path, *needed: str) -> Path:
    """A real library that needs others."""
    if shutil.which("gcc", path="/usr/bin") is None:
        pytest.skip("a library needs gcc to be built")
    for name in needed:
        subprocess.run(
            ["/usr/bin/gcc", "-shared", "-o", folder / name, f"-Wl,-soname,{name}", "-x", "c", "/dev/null"],
            check=True,
            env={"PATH": "/usr/bin"},
        )
    path = folder / "libggml-cuda.so"
    others = [str(folder / name) for name in needed]
    subprocess.run(
        ["/usr/bin/gcc", "-shared", "-o", path, "-Wl,--no-as-needed", "-x", "c", "/dev/null", "-x", "none", *others],
        check=True,
        env={"PATH": "/usr/bin"},
    )
    return path


@pytest.mark.parametrize(
    ("needed", "nccl"), [pytest.param(("libnccl.so.2",), True, id="with"), pytest.param((), False, id="without")]
)
def test_a_llama_cpp_tells_whether_it_has_nccl(nothing: Path, needed: tuple[str, ...], nccl: bool) -> None:
    install(nothing, "llama-server")
    found = engine("llama.cpp")
    assert found is not None
    assert found.nccl is None  # all in one program
    (nothing / "bin" / "libggml-base.so").touch()
    library(nothing / "bin", *needed)
    found = engine("llama.cpp")
    assert found is not None
    assert found.nccl is nccl
    assert not (nothing / "started").exists()


def test_the_libraries_of_a_program_are_read() -> None:
    assert any(name.startswith("libc.so") for name in libraries_of(Path(sys.executable)))


def test_broken_programs_are_refused(tmp_path: Path) -> None:
    whole = Path(sys.executable).resolve().read_bytes()[:4096]
    path = tmp_path / "broken"
    far = whole[:32] + b"\xff" * 8 + whole[40:]
    for content in (b"", b"#!/bin/sh\n", far, whole[:6], whole[:60], whole[:100], whole[:32] + b"\xff" * 100, whole):
        path.write_bytes(content)
        with contextlib.suppress(ValueError, struct.error, OSError):
            assert isinstance(libraries_of(path), tuple)
