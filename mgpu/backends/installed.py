"""What can be read of installed engines without starting any: a start costs seconds, and opens the cards."""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Callable
from pathlib import Path

from mgpu.backends.engine import Engine, find_llama_server
from mgpu.errors import MgpuError
from mgpu.machine.inspection import InstalledEngine

_MOST_SECTIONS = 4096
_LOAD, _DYNAMIC = 1, 2
_NEEDED, _STRING_TABLE = 1, 5


def installed_engines() -> tuple[InstalledEngine, ...]:
    """Return the engines that are installed, and as a `problem` what is wrong with the setting of one. Starts no
    program, and never raises for what it finds."""
    from mgpu.backends.ollama import find_ollama
    from mgpu.backends.vllm_program import find_vllm

    found = (
        _installed("llama.cpp", find_llama_server, _llama_cpp),
        _installed("vllm", find_vllm, _vllm),
        _installed("ollama", find_ollama, lambda _: {}),
    )
    return tuple(engine for engine in found if engine is not None)


def _installed(
    backend: str, find: Callable[[], Engine | None], facts: Callable[[Path], dict[str, object]]
) -> InstalledEngine | None:
    try:
        engine = find()
    except MgpuError as error:
        return InstalledEngine(backend=backend, problem=error.message)
    if engine is None:
        return None
    values: dict[str, object] = {"backend": backend, "path": str(engine.path)}
    with contextlib.suppress(OSError, ValueError, struct.error):  # what cannot be read stays unknown
        values |= facts(engine.path)
    return InstalledEngine(**values)  # type: ignore[arg-type]  # `facts` gives each field what it takes


def _vllm(program: Path) -> dict[str, object]:
    from mgpu.backends.vllm_program import installed_version, is_cpu_build

    library = program.resolve().parent.parent / "lib"
    texts = [path.read_text(errors="replace") for path in library.glob("python3*/site-packages/torch/version.py")]
    cuda = next((match for text in texts if (match := re.search(r"(?m)^cuda\b[^=]*= *'(\d+)\.(\d+)'", text))), None)
    return {
        "version": installed_version(program),
        "cpu_build": is_cpu_build(program),
        "cuda_runtime": int(cuda[1]) * 1000 + int(cuda[2]) * 10 if cuda else None,
        "nccl": any(library.glob("python3*/site-packages/nvidia/nccl/lib/libnccl.so.2")),
    }


def _llama_cpp(program: Path) -> dict[str, object]:
    """Whether it has NCCL; known only of builds whose parts are libraries beside the program."""
    folder = program.resolve().parent
    for place in (folder, folder.parent / "lib"):
        if any(place.glob("libggml-base.so*")):
            cuda = next(iter(sorted(place.glob("libggml-cuda.so*"))), None)
            return {"nccl": cuda is not None and any(name.startswith("libnccl.so") for name in libraries_of(cuda))}
    return {}


def libraries_of(path: Path) -> tuple[str, ...]:
    """Return the names of the libraries that a 64-bit ELF file asks the loader for. Reads a few kilobytes of it.

    Raises ValueError for a file that is none, OSError, or struct.error for one that is cut off.
    """
    with path.open("rb") as file:

        def part(offset: int, size: int) -> bytes:
            if offset >= 2**63:
                raise ValueError(f"{path} names a place outside it")
            file.seek(offset)
            return file.read(size)

        if part(0, 6) != b"\x7fELF\x02\x01":
            raise ValueError(f"{path} is no 64-bit ELF file")
        (table,) = struct.unpack("<Q", part(32, 8))
        entry_bytes, count = struct.unpack("<HH", part(54, 4))
        if not 56 <= entry_bytes <= 256 or count > _MOST_SECTIONS:
            raise ValueError(f"{path} has no table of segments")
        segments = [struct.unpack("<IIQQQQ", part(table + i * entry_bytes, 40)) for i in range(count)]
        dynamic = next((segment for segment in segments if segment[0] == _DYNAMIC), None)
        if dynamic is None:
            return ()
        content = part(dynamic[2], min(dynamic[5], 16 * _MOST_SECTIONS))
        entries = list(struct.iter_unpack("<qQ", content[: len(content) // 16 * 16]))
        strings = next((value for tag, value in entries if tag == _STRING_TABLE), 0)
        # An address in memory, to be found in the segment that is loaded there.
        start = next((s[2] + strings - s[3] for s in segments if s[0] == _LOAD and s[3] <= strings < s[3] + s[5]), None)
        if start is None:
            return ()
        names = (part(start + value, 256).partition(b"\0")[0] for tag, value in entries if tag == _NEEDED)
        return tuple(name.decode("utf-8", "replace") for name in names)
