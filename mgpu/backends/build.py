"""Which build of an engine is installed, told without starting it, and what else changes how fast it computes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from mgpu.backends.engine import VLLM, Engine

# The libraries in which llama.cpp computes; a distribution may renew them without the program.
_LIBRARIES = ("libggml", "libllama", "libmtmd")
# Variables by which these libraries compute or exchange results in another way.
_SPEED = re.compile(r"(GGML|NCCL|RCCL|OMP|KMP|HSA|VLLM)_[A-Z0-9_]+|CUDA_LAUNCH_BLOCKING")


def build_of(engine: Engine) -> str | None:
    """Return what tells this build of an engine from others: vLLM's version, else the program's path, and a digest of
    the size and the time of its program and of the llama.cpp libraries beside it. None where it is not there.

    Reads no more than folders; a script that starts another program is all that is known of that.
    """
    try:
        program = engine.path.resolve(strict=True)
        found = [(path.name, path.stat()) for path in (program, *_libraries(program))]
    except (OSError, RuntimeError):  # gone, or a circle of links
        return None
    stamps = ",".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in found)
    return f"{_version(engine) or program} {hashlib.sha256(stamps.encode(errors='replace')).hexdigest()[:16]}"


def speed_variables(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the variables of an engine's `environment` that change how fast it computes, as NAME=VALUE, by name."""
    return tuple(f"{name}={value}" for name, value in sorted(environment.items()) if _SPEED.fullmatch(name))


def _libraries(program: Path) -> Iterator[Path]:
    for folder in (program.parent, program.parent.parent / "lib"):
        libraries = (path for path in folder.glob("lib*.so*") if path.name.startswith(_LIBRARIES))
        yield from sorted(path for path in libraries if path.exists())


def _version(engine: Engine) -> str | None:
    if engine.backend != VLLM:
        return None
    from mgpu.backends.vllm_program import installed_version

    version = installed_version(engine.path)
    return f"vllm {version}" if version else None
