"""Real programs and libraries, built with gcc: what they need, and code for cards that no card will ever run."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

_GCC = "/usr/bin/gcc"
_KINDS = {"compute": 1, "sm": 2}


def fatbin(*architectures: tuple[str, int], magic: int = 0xBA55ED50) -> bytes:
    """Return a fat binary as CUDA's compiler writes it, with 24 bytes of code for each of the architectures."""
    entries = b"".join(
        struct.pack("<HHIQIIHHI", _KINDS[kind], 0x101, 64, 24, 0, 0, 8, 7, number).ljust(64 + 24, b"\0")
        for kind, number in architectures
    )
    return struct.pack("<IHHQ", magic, 1, 16, len(entries)) + entries


def bundle(*cards: str) -> bytes:
    """Return the header of a bundle as clang writes it for HIP: for the processor, and for each of the cards."""
    names = ["host-x86_64-unknown-linux-gnu-", *(f"hipv4-amdgcn-amd-amdhsa--{card}" for card in cards)]
    entries = b"".join(struct.pack("<QQQ", 4096, 24, len(name)) + name.encode() for name in names)
    return b"__CLANG_OFFLOAD_BUNDLE__" + struct.pack("<Q", len(names)) + entries


def built(
    path: Path,
    *,
    name: str | None = None,
    needed: tuple[str, ...] = (),
    among: Path | None = None,
    run_path: str | None = None,
    constant: str | None = None,
    sections: Mapping[str, bytes] | None = None,
    program: bool = False,
) -> Path:
    """Build a library, or a program, that needs other libraries: those in the folder `among`, by default the file's
    own, where the ones that are missing are built. Skips the test where there is no gcc."""
    if shutil.which("gcc", path="/usr/bin") is None:
        pytest.skip("a library needs gcc to be built")
    folder = among or path.parent
    for each in needed:
        if not (folder / each).exists():
            built(folder / each)
    lines = []
    for number, (section, content) in enumerate((sections or {}).items()):
        numbers = ",".join(map(str, content))
        place = f'__attribute__((section("{section}"), aligned(8)))'
        lines.append(f"{place} const unsigned char part{number}[] = {{{numbers}}};")
    lines += [f'const char constant[] = "{constant}";'] if constant else []
    lines += ["int main(void) { return 0; }"] if program else []
    words = [] if program else ["-shared", f"-Wl,-soname,{name or path.name}"]
    words += [f"-Wl,-rpath,{run_path}"] if run_path else []
    # What libraries that are needed need in turn, need not be found.
    words += ["-Wl,--no-as-needed", "-Wl,--allow-shlib-undefined", "-Wl,--unresolved-symbols=ignore-in-shared-libs"]
    others = [folder / each for each in needed]
    subprocess.run(
        [_GCC, "-o", path, *words, "-x", "c", "-", "-x", "none", *others],
        input="\n".join(lines),
        text=True,
        check=True,
        env={"PATH": "/usr/bin"},
    )
    return path
