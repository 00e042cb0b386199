"""Engines: from a plan to a command, and from what an engine writes and answers to facts."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mgpu.backends.backend import Backend

_MODULES = {"llama.cpp": "llama_cpp", "vllm": "vllm", "ollama": "ollama"}


def load_backend(name: str) -> Backend:
    """Return the engine of that name ("llama.cpp", "vllm", "ollama"); only its own modules are imported."""
    backend: Backend = import_module(f"{__name__}.{_MODULES[name]}").BACKEND
    return backend
