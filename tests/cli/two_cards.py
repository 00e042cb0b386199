"""A machine with two NVIDIA cards, an Ollama and a llama-server, all of them fakes that know of each other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from tests.fakes.devices import free_port
from tests.fakes.ollama_server import install

from .program import Ended, Mgpu

UUIDS = ("GPU-00000000-0000-0000-0000-000000000001", "GPU-00000000-0000-0000-0000-000000000002")
CARDS = {
    "FAKE_DEVICES": "CUDA0: NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free);"
    "CUDA1: NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free)",
    "FAKE_UUIDS": ",".join(UUIDS),
}
_RIG = Path(__file__).parents[1] / "machines" / "rigs" / "2x4090-x670e.txt"
_RUNNER = b"tests.fakes.ollama_runner"


def with_two_cards(mgpu: Mgpu, nvml: Mapping[str, Path], folder: Path) -> Mgpu:
    """`mgpu` on that machine, where no Ollama runs yet; its home and Ollama's store are in `folder`."""
    home = folder / "home"
    home.mkdir()
    mgpu.environment |= {
        **CARDS,
        "LD_LIBRARY_PATH": str(nvml["new"]),
        "FAKE_NVML": str(_RIG),
        "HOME": str(home),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "MGPU_OLLAMA": str(install(folder)),
        "OLLAMA_HOST": f"127.0.0.1:{free_port()}",
    }
    return mgpu


def installed_with(folder: Path, **variables: str) -> Path:
    """An Ollama that is different in some `variables` from what it is told."""
    program = folder / "different-ollama"
    settings = "".join(f"export {name}={value!r}\n" for name, value in variables.items())
    program.write_text(f'#!/bin/sh\n{settings}exec {install(folder)} "$@"\n')
    program.chmod(0o755)
    return program


def store(mgpu: Mgpu) -> Path:
    """The folder where an Ollama of mgpu's keeps its models."""
    return Path(mgpu.environment["HOME"]) / ".ollama" / "models"


def warnings_of(ended: Ended) -> list[str]:
    """The warnings in a stream."""
    entries = [entry["data"] or {} for entry in ended.stream]
    return [entry["message"] for entry in entries if entry.get("event") == "warning"]


def engine_log(mgpu: Mgpu) -> str:
    """What the engine wrote, of the only instance there was."""
    (path,) = mgpu.state.glob("*/engine.log")
    return path.read_text(errors="replace")


def runners(mgpu: Mgpu) -> list[int]:
    """The llama-servers that Ollama started for models."""
    return [pid for pid in mgpu.processes() if _RUNNER in _read(pid, "cmdline")]


def settings_of(pid: int) -> dict[str, str]:
    """The environment of a process."""
    entries = (entry.partition(b"=") for entry in _read(pid, "environ").split(b"\0") if entry)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in entries}


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # gone meanwhile
        return b""
