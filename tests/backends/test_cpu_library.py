"""The CPU code that the loader is told to take for the llama-server of the extra `llamacpp`."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mgpu.backends import cpu_library as module
from mgpu.backends.cpu_library import WHEEL, cpu_library
from mgpu.backends.engine import INSTALL_LLAMA_CPP
from tests.fakes.devices import real_llama_server

ROOT = Path(__file__).parents[2]
ITS_OWN = "fpu avx2 avx512_vnni avx512_bf16 avx512_fp16 avx_vnni amx_tile amx_int8"
CONSUMERS = "fpu avx2 fma f16c"


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LD_PRELOAD", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def portable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    library = tmp_path / "libggml" / "lib64" / "libggml-cpu.so.0"
    monkeypatch.setattr(module, "_portable", lambda: library)
    return library


@pytest.fixture
def server(tmp_path: Path) -> Path:
    return tmp_path / WHEEL / "bin" / "llama-server"


def has(monkeypatch: pytest.MonkeyPatch, root: Path, flags: str | None) -> None:
    if flags is not None:
        (root / "proc").mkdir()
        (root / "proc" / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t:\n\nprocessor\t: 1\n")
    monkeypatch.setenv("MGPU_ROOT", str(root))


@pytest.mark.parametrize(
    ("flags", "replaced"),
    [
        pytest.param(ITS_OWN, False, id="the CPU it was compiled for"),
        pytest.param(ITS_OWN.replace(" avx_vnni", ""), True, id="one instruction less"),
        pytest.param(CONSUMERS, True, id="a consumer's"),
        pytest.param("", True, id="no flags"),
        pytest.param(None, True, id="nothing to read"),
    ],
)
def test_it_is_replaced_where_the_cpu_is_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, portable: Path, server: Path, flags: str | None, replaced: bool
) -> None:
    has(monkeypatch, tmp_path, flags)
    loader = {"LD_PRELOAD": str(portable), "LD_LIBRARY_PATH": str(server.parent)}
    assert cpu_library(server) == (loader if replaced else {})


def test_other_builds_are_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, portable: Path) -> None:
    has(monkeypatch, tmp_path, CONSUMERS)
    assert cpu_library(tmp_path / "bin" / "llama-server") == {}


@pytest.mark.parametrize("folder", [None, "my models", "a:b"])
def test_what_the_loader_cannot_be_told_is_not_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: Path, folder: str | None
) -> None:
    has(monkeypatch, tmp_path, CONSUMERS)
    library = tmp_path / folder / "libggml-cpu.so.0" if folder else None
    monkeypatch.setattr(module, "_portable", lambda: library)
    assert cpu_library(server) == {}


def test_what_the_user_set_for_the_loader_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, portable: Path, server: Path
) -> None:
    has(monkeypatch, tmp_path, CONSUMERS)
    monkeypatch.setenv("LD_PRELOAD", "libjemalloc.so.2")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/lib")
    found = cpu_library(server)
    assert found == {
        "LD_PRELOAD": f"{portable}:libjemalloc.so.2",
        "LD_LIBRARY_PATH": f"{server.parent}:/opt/lib",
    }


def test_what_a_hint_installs_is_what_the_extra_installs() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["llamacpp"]
    words = INSTALL_LLAMA_CPP.removeprefix("pip install ").split()
    assert sorted(words) == sorted(each.partition(";")[0] for each in extra)


# What one side calls by number must be the same on the other.
NAMES = """
import ctypes, sys
base = ctypes.CDLL(sys.argv[1])
for function, count in (("ggml_op_name", 101), ("ggml_type_name", 42), ("ggml_unary_op_name", 21)):
    name = getattr(base, function)
    name.restype = ctypes.c_char_p
    print(function, [name(number) for number in range(count)])
"""


def test_both_speak_of_the_same_operations_and_types() -> None:
    theirs = real_llama_server().parent / "libggml-base.so.0"
    library = module._portable()
    assert library is not None, "libggml-python is not installed"
    told = [
        subprocess.run(
            [sys.executable, "-c", NAMES, str(path)], capture_output=True, text=True, check=True, timeout=120
        ).stdout
        for path in (theirs, library.parent / "libggml-base.so.0")
    ]
    assert told[0] == told[1]
    assert "'MUL_MAT'" in told[0].replace("b'", "'")


def test_it_is_what_the_loader_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    has(monkeypatch, tmp_path, CONSUMERS)
    server = real_llama_server()
    # The loader lists what it loads instead of starting the program.
    environment = {**os.environ, **cpu_library(server), "LD_TRACE_LOADED_OBJECTS": "1"}
    listed = subprocess.run([server], capture_output=True, text=True, check=True, timeout=120, env=environment).stdout
    found = {line.split()[0]: line for line in listed.splitlines() if "libggml" in line}
    ours = [line for line in found if line.endswith("libggml-cpu.so.0")]
    assert ours == [str(module._portable())], listed
    others = [line for name, line in found.items() if name not in ours]
    assert len(others) >= 3, listed
    assert all(str(server.parent) in line for line in others), listed
