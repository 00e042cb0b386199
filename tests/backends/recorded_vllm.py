"""Recorded output of a real vLLM (0.32.0, the CPU build). Lists of routes are cut out."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent.parent / "data" / "logs" / "vllm"


def text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8", errors="replace")


def lines(name: str) -> list[str]:
    return text(f"{name}.log").splitlines()
