"""Every test runs in a home of its own, and where everything must be testable a skipped test is a failure."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mgpu.errors import Missing
from mgpu.models.fetch import fetch
from mgpu.profile import load_profile

REQUIRE_REAL = "MGPU_TEST_REQUIRE_REAL"

# A script's background job (`make test &`) starts with interrupts ignored and hands that on to each program it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What a user's environment may hold and no test may depend on.
_PERSONAL = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "CUDA_VISIBLE_DEVICES",
    "GGML_VK_VISIBLE_DEVICES",
    "LLAMA_API_KEY",
    "MGPU_API_KEY",
    "MGPU_LLAMA_SERVER",
    "MGPU_OLLAMA",
    "MGPU_OLLAMA_REGISTRY",
    "MGPU_VLLM",
    "MGPU_ROOT",
    "VLLM_API_KEY",
    "NO_COLOR",
    "COLUMNS",
)


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """State, data and configuration of a test's own; the cache is shared, so that models are fetched once."""
    home = tmp_path_factory.mktemp("home")
    for variable, folder in (("XDG_STATE_HOME", "state"), ("XDG_CONFIG_HOME", "config"), ("XDG_DATA_HOME", "data")):
        monkeypatch.setenv(variable, str(home / folder))
    for variable in list(os.environ):
        if variable in _PERSONAL or variable.startswith(("LLAMA_ARG_", "OLLAMA_")):
            monkeypatch.delenv(variable)
    return home


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A small real model, fetched once and kept in the user's cache; a test that needs it is skipped without it."""
    profile = load_profile("smollm2-135m").profile
    try:
        return fetch(profile.quantisations[profile.default_quantisation])
    except Missing as error:
        pytest.skip(f"the model cannot be had here: {error.message}")


@pytest.fixture(scope="session")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of a fake libnvidia-ml.so.1: "new" knows every function, "old" lacks what older drivers lack."""
    if shutil.which("gcc") is None:
        pytest.skip("the fake NVML library needs gcc to be built")
    build = [sys.executable, str(Path(__file__).parent / "fakes" / "nvml" / "build.py")]
    directories = {"new": tmp_path_factory.mktemp("new-nvml"), "old": tmp_path_factory.mktemp("old-nvml")}
    for age, directory in directories.items():
        subprocess.run([*build, str(directory), f"--{age}"], check=True, capture_output=True)
    return directories


_skipped: list[str] = []
# What no installation can change, and so no failure anywhere.
FORBIDDEN = "the kernel does not allow"


def pytest_runtest_logreport(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if FORBIDDEN in reason:
            return
        _skipped.append(f"{report.nodeid}: {reason}")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    pytest_runtest_logreport(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if os.environ.get(REQUIRE_REAL) and _skipped:
        print("\nskipped although everything can be tested here:", *_skipped, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
