"""What can be read of installed engines without starting any: a start costs seconds, and opens the cards."""

from __future__ import annotations

import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from mgpu.backends.elf import Needs, architectures_of, find_library, missing_library, needs_of, text_in
from mgpu.backends.engine import Engine, find_llama_server
from mgpu.errors import MgpuError
from mgpu.machine.inspection import InstalledEngine

_Fact = TypeVar("_Fact")
_LONGEST_SCRIPT_HEAD = 4096
_NO_NEEDS = Needs(libraries=(), folders=())


def installed_engines() -> tuple[InstalledEngine, ...]:
    """Return the engines that are installed, and as a `problem` what is wrong with the setting of one, or why its
    program cannot run: an interpreter or a library that is not there. Starts no program, and never raises for what it
    finds."""
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
    values |= _known(lambda: facts(engine.path)) or {}
    values["problem"] = _known(lambda: _problem(engine.path))
    return InstalledEngine(**values)  # type: ignore[arg-type]  # `facts` gives each field what it takes


def _known(read: Callable[[], _Fact]) -> _Fact | None:
    """What is read, or None: what cannot be read stays unknown."""
    try:
        return read()
    except (OSError, ValueError, struct.error):
        return None


def _problem(program: Path) -> str | None:
    """Why a program cannot run, as far as its files tell."""
    with program.open("rb") as file:
        head = file.read(_LONGEST_SCRIPT_HEAD)
    if head.startswith(b"\x7fELF"):
        library = missing_library(program)
        return f"it needs {library}, which the loader does not find" if library else None
    interpreter = _interpreter(head.decode("utf-8", "replace"))
    if interpreter is None or shutil.which(interpreter):
        return None
    return f"its interpreter {interpreter} is not there or cannot be run"


def _interpreter(head: str) -> str | None:
    """What runs a script: the program of its first line, or behind "env" or the shell that pip writes around a path
    that is too long or has spaces."""
    first, _, rest = head.partition("\n")
    words = first.removeprefix("#!").split() if first.startswith("#!") else []
    if not words:
        return None
    if os.path.basename(words[0]) == "env":  # noqa: PTH119 - a word
        return next((word for word in words[1:] if not word.startswith("-") and "=" not in word), None)
    wrapped = re.match(r"""'{2,3}exec' +("([^"\n]+)"|([^\s"]+))""", rest)
    return (wrapped[2] or wrapped[3]) if wrapped else words[0]


def _vllm(program: Path) -> dict[str, object]:
    from mgpu.backends.vllm_program import installed_version, is_cpu_build

    library = program.resolve().parent.parent / "lib"
    places = sorted(library.glob("python3*/site-packages"))
    torch = next(iter(_in(places, "torch/lib/libtorch_cuda.so")), None)
    nccl = next(iter(_in(places, "nvidia/nccl/lib/libnccl.so.2")), None)
    return {
        "version": installed_version(program),
        "cpu_build": is_cpu_build(program),
        "cuda_runtime": _torch_cuda(places) or _cuda_of_names(_in(places, "nvidia_cuda_runtime*.dist-info")),
        **_architectures(torch),
        "nccl": nccl is not None,
        "nccl_version": nccl and _nccl_version(nccl, _in(places, "nvidia_nccl_cu*-*.dist-info")),
    }


def _in(places: Iterable[Path], pattern: str) -> list[Path]:
    return sorted(path for place in places for path in place.glob(pattern))


def _torch_cuda(places: Iterable[Path]) -> int | None:
    texts = [path.read_text(errors="replace") for path in _in(places, "torch/version.py")]
    cuda = next((match for text in texts if (match := re.search(r"(?m)^cuda\b[^=]*= *'(\d+)\.(\d+)'", text))), None)
    return int(cuda[1]) * 1000 + int(cuda[2]) * 10 if cuda else None


def _cuda_of_names(paths: Iterable[Path]) -> int | None:
    matches = (re.search(r"-(\d{1,2})\.(\d{1,2})[.\d]*\.dist-info$", path.name) for path in paths)
    return next((int(match[1]) * 1000 + int(match[2]) * 10 for match in matches if match), None)


def _llama_cpp(program: Path) -> dict[str, object]:
    """What its CUDA or HIP backend says, a library beside the program or a part of it. Of a build without one it is
    known that there is no code for certain cards in it, and no NCCL."""
    folder = program.resolve().parent
    for place in (folder, folder.parent / "lib"):
        if any(place.glob("libggml-base.so*")):
            cuda, hip = (next(iter(sorted(place.glob(f"libggml-{name}.so*"))), None) for name in ("cuda", "hip"))
            if cuda is not None:
                return {"nccl": False, **_cuda_backend(cuda)}
            return {"nccl": False, **(_architectures(hip) if hip is not None else {"architectures_known": True})}
    return _cuda_backend(program.resolve())


def _cuda_backend(library: Path) -> dict[str, object]:
    needs = _known(lambda: needs_of(library))
    facts = _architectures(library)
    if needs is None:
        return {**facts, "nccl": None}
    nccl = next((name for name in needs.libraries if name.startswith("libnccl.so")), None)
    if nccl:
        path = find_library(nccl, needs.folders)
        facts |= {"nccl": True, "nccl_version": path and _nccl_version(path, ())}
    return {**facts, "cuda_runtime": _cuda_runtime(needs)}


def _architectures(library: Path | None) -> dict[str, object]:
    found = None if library is None else _known(lambda: architectures_of(library))
    return {"architectures": found or (), "architectures_known": found is not None}


def _cuda_runtime(needs: Needs) -> int | None:
    """As NVML writes it; of the runtime that the loader finds, or by the name alone the first of its major version."""
    name = next((name for name in needs.libraries if re.fullmatch(r"libcudart\.so\.\d{1,2}", name)), None)
    if name is None:
        name = next((name for name in needs.libraries if re.fullmatch(r"libcublas\.so\.\d{1,2}", name)), None)
        return int(name.rpartition(".")[2]) * 1000 if name else None
    path = find_library(name, needs.folders)
    exact = re.fullmatch(r"libcudart\.so\.(\d{1,2})\.(\d{1,2})[.\d]*", path.resolve().name) if path else None
    return int(exact[1]) * 1000 + int(exact[2]) * 10 if exact else int(name.rpartition(".")[2]) * 1000


def _nccl_version(library: Path, packages: Iterable[Path]) -> str | None:
    """By what is written in it; by the file's name, or the package's that brought it, where that cannot be read."""
    if said := _known(lambda: text_in(library, rb"NCCL version (\d{1,2}\.\d{1,3}\.\d{1,3})\b")):
        return said[1].decode()
    names = (library.resolve().name, *(path.name for path in packages))
    matches = (re.search(r"(?:libnccl\.so\.|-)(\d{1,2}\.\d{1,3}\.\d{1,3})", name) for name in names)
    return next((match[1] for match in matches if match), None)
