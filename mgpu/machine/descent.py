"""Which processes descend from an mgpu: its engines, and what they start in their turn."""

from __future__ import annotations

from pathlib import Path

from mgpu.machine import sysfs

# An engine's workers are its children or their children; a limit keeps a /proc that lies from holding us.
_MOST_GENERATIONS = 8


def is_mgpus(root: Path, pid: int) -> bool:
    """Return whether an ancestor of a process is an mgpu, by the command lines under `root`/proc; False too where they
    cannot be read."""
    for _ in range(_MOST_GENERATIONS):
        parent = sysfs.read_fields(root / "proc" / str(pid) / "status").get("PPid", "")
        if not parent.isdecimal() or len(parent) > 10 or int(parent) < 2:
            return False
        pid = int(parent)
        if _is_mgpu(sysfs.read_text(root / "proc" / str(pid) / "cmdline", 4096) or ""):
            return True
    return False


def _is_mgpu(command_line: str) -> bool:
    """Whether it is the program itself, or Python with its script or its module."""
    program, *words = (word.rsplit("/", 1)[-1] for word in command_line.split("\0"))
    if not program.startswith("python"):
        return program == "mgpu"
    for at, word in enumerate(words):
        if word == "-m":
            return words[at + 1 : at + 2] == ["mgpu"]
        if not word.startswith("-"):
            return word == "mgpu"
    return False
