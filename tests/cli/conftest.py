from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.llama_server import install
from tests.fakes.shapes import SHAPES
from tests.fakes.sparse_gguf import make_sparse_gguf

from .program import Mgpu

MEMORY = "MemTotal:       67108864 kB\nMemAvailable:   62914560 kB\n"
PROCESSORS = "".join(f"processor\t: {index}\nmodel name\t: A CPU\nflags\t: fpu\n\n" for index in range(8))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "real_ollama: starts the Ollama that MGPU_TEST_OLLAMA names")


@pytest.fixture(scope="session")
def fake_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four layers: 141 MiB of zeros that take no room."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    return make_sparse_gguf(path, SHAPES["llama-3.2-1b"], "Q4_K_M", layers=4, vocabulary=1000)


@pytest.fixture(scope="session")
def bare_machine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a computer with 8 processors, 64 GiB of RAM and no GPU, whatever this one has."""
    root, driver = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("driver")
    (root / "proc").mkdir()
    (root / "proc" / "meminfo").write_text(MEMORY)
    (root / "proc" / "cpuinfo").write_text(PROCESSORS)
    (driver / "libnvidia-ml.so.1").touch()  # found before a real one, and cannot be loaded
    return {"MGPU_ROOT": str(root), "LD_LIBRARY_PATH": str(driver), "GGML_VK_VISIBLE_DEVICES": ""}


@pytest.fixture
def mgpu(tmp_path: Path, fake_engine: Path, bare_machine: dict[str, str]) -> Iterator[Mgpu]:
    """mgpu on a machine without a GPU, with the fake engine."""
    program = Mgpu(tmp_path, {**bare_machine, "MGPU_LLAMA_SERVER": str(fake_engine)})
    yield program
    program.end_all()
