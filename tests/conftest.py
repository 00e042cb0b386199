"""Every test runs in a home of its own, and where everything must be testable a skipped test is a failure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

REQUIRE_REAL = "MGPU_TEST_REQUIRE_REAL"

# What a user's environment may hold and no test may depend on.
_PERSONAL = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "CUDA_VISIBLE_DEVICES",
    "GGML_VK_VISIBLE_DEVICES",
    "LLAMA_API_KEY",
    "MGPU_API_KEY",
    "MGPU_LLAMA_SERVER",
    "MGPU_ROOT",
    "NO_COLOR",
    "COLUMNS",
)


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """State and configuration of a test's own; the cache is shared, so that models are fetched once."""
    home = tmp_path_factory.mktemp("home")
    for variable, folder in (("XDG_STATE_HOME", "state"), ("XDG_CONFIG_HOME", "config")):
        monkeypatch.setenv(variable, str(home / folder))
    for variable in list(os.environ):
        if variable in _PERSONAL or variable.startswith("LLAMA_ARG_"):
            monkeypatch.delenv(variable)
    yield home


_skipped: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if os.environ.get(REQUIRE_REAL) and _skipped:
        print("\nskipped although everything can be tested here:", *_skipped, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
