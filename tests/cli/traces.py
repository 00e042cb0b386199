"""What mgpu and its engines hold of a machine while they run, and what of it is left when they are gone."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from mgpu.running.reaper import mapped, shared_files

from .program import Mgpu

_LIMIT_S = 180.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Ports that are listened at, files in /dev/shm, and memory, each shared page counted in shares (PSS)."""

    ports: frozenset[int] = frozenset()
    segments: frozenset[Path] = frozenset()
    memory_bytes: int = 0


def held(mgpu: Mgpu) -> Held:
    """What everything that `mgpu` has started holds now."""
    pids = mgpu.processes()
    files = shared_files()
    return Held(
        ports=frozenset(port for pid in pids for port in _ports(pid)),
        segments=frozenset(Path(files[key]) for pid in pids for key in mapped(pid) if key in files),
        memory_bytes=sum(map(_memory_bytes, pids)),
    )


def left(mgpu: Mgpu, before: Held, *, limit_s: float = _LIMIT_S) -> tuple[str, ...]:
    """Wait until nothing is left of what was held `before`, and of all else; returns, in words, what is after that."""
    deadline = time.monotonic() + limit_s
    while (found := _left(mgpu, before)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return found


def _left(mgpu: Mgpu, before: Held) -> tuple[str, ...]:
    now = held(mgpu)
    own = Path(mgpu.environment["TMPDIR"]).iterdir() if "TMPDIR" in mgpu.environment else ()
    return (
        *(f"process {pid}: {_command(pid)}" for pid in mgpu.processes()),
        *(f"port {port}" for port in before.ports if not _is_free(port)),
        *(f"lock {path}" for path in mgpu.locks_held()),
        *(f"folder {path}" for path in mgpu.state.glob("*/tmp")),
        *_files(own),
        *_files(mgpu.here.iterdir()),
        *(f"segment {path}" for path in before.segments | now.segments if path.exists()),
        *([f"memory {now.memory_bytes} bytes"] if now.memory_bytes else ()),
    )


def _files(paths: Iterable[Path]) -> list[str]:
    return [f"file {path}" for path in paths]


def _ports(pid: int) -> list[int]:
    try:
        sockets = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:  # gone
        return []
    return [each.laddr.port for each in sockets if each.status == psutil.CONN_LISTEN]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _memory_bytes(pid: int) -> int:
    try:
        found = re.search(r"(?m)^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text())
    except OSError:  # gone
        return 0
    return int(found[1]) << 10 if found else 0


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "gone"
    return os.fsdecode(b" ".join(words[:4]))
