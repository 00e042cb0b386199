"""Recorded output of a real llama-server (build 10434)."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent.parent / "data" / "logs" / "llama_cpp"


def text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8", errors="replace")


def lines(name: str) -> list[str]:
    return text(f"{name}.log").splitlines()
