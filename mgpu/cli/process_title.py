"""What other users see of mgpu in `ps`."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path


def hide_argument(secret: str) -> None:
    """Overwrite `secret` in this process's own command line as `ps` shows it, on Linux; elsewhere nothing happens.

    The kernel reads a process's command line from the process's own memory, between two addresses that
    /proc/self/stat gives (fields 48 and 49, proc(5)). A moment before this call the secret could be seen.
    """
    try:
        stat = Path("/proc/self/stat").read_text()
        start, end = (int(field) for field in stat.rpartition(")")[2].split()[45:47])
        shown = Path("/proc/self/cmdline").read_bytes()
    except (OSError, ValueError):
        return
    raw = os.fsencode(secret)
    if not start or end - start < len(shown):
        return
    at = shown.find(raw)
    while at >= 0:
        ctypes.memset(start + at, ord("*"), len(raw))
        at = shown.find(raw, at + len(raw))
