from __future__ import annotations

import pytest


@pytest.fixture
def nothing_on_disk(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans from what the profiles say, the same on every computer."""
    cache = str(tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache)
