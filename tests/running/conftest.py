from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "real_ollama: starts the Ollama that MGPU_TEST_OLLAMA names")
