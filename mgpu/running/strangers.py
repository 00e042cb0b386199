"""Engines on this machine that mgpu did not start: found by what the cards' driver lists, and by the ports that
engines have by default. They are looked at and never touched."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mgpu.machine.snapshot import Machine
from mgpu.running.instance import GpuShare

T = TypeVar("T")

PORTS = {11434: "ollama", 8080: "llama.cpp", 8000: "vllm"}
"""Where engines listen unless they are told otherwise."""

_ENGINES = (
    (re.compile(r"^ollama(?![:/])", re.IGNORECASE), "ollama"),
    (re.compile(r"llama[-_.]?(server|cpp|cli|swap|runner)", re.IGNORECASE), "llama.cpp"),
    (re.compile(r"^vllm", re.IGNORECASE), "vllm"),
    (re.compile(r"sglang", re.IGNORECASE), "sglang"),
    (re.compile(r"koboldcpp", re.IGNORECASE), "koboldcpp"),
    (re.compile(r"lm[- ]?studio|^lms$", re.IGNORECASE), "lm-studio"),
    (re.compile(r"^text-generation|^tgi$", re.IGNORECASE), "tgi"),
)
# A desktop's programs hold less of a card; what holds more is worth a line, whatever it is.
_MUCH_BYTES = 512 << 20
# What of a command tells an engine: an interpreter, and the script and module that it runs.
_WORDS = 4
_LISTENS = "0A"  # include/net/tcp_states.h: TCP_LISTEN
_TIMEOUT_S = 0.5
_DEEPEST = 32
_LONGEST_ANSWER_BYTES = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Stranger:
    """An engine, or another program that holds much of a card: its first process (None: hidden from this user), what
    it is, where it listens, and what it holds of the cards with all that it has started."""

    pid: int | None
    name: str
    url: str | None
    gpus: tuple[GpuShare, ...] = ()


def strangers(
    machine: Machine, own: Collection[int], own_ports: Collection[int | None], root: Path
) -> tuple[Stranger, ...]:
    """Return the engines that are none of mgpu's: their processes are not among `own`, their ports not `own_ports`.

    `root` is where /proc is looked for. What listens on an engine's port and belongs to another user is asked what it
    is, which blocks half a second at most for each.
    """
    listening = {inode: address for inode, address in _listening(root) if address[1] not in own_ports}
    held: dict[int, dict[int, int | None]] = {}
    for gpu in machine.gpus:
        for process in gpu.used_by:
            if process.pid in own or not _is_worth_a_line(process.pid, process.bytes, root):
                continue
            cards = held.setdefault(_first_of(process.pid, root), {})
            sizes = [size for size in (cards.get(gpu.index), process.bytes) if size is not None]
            cards[gpu.index] = sum(sizes) if sizes else None
    found, taken = [], set()
    names = {process.pid: process.name for gpu in machine.gpus for process in gpu.used_by}
    sockets = _owners(listening, root) if listening else {}
    for pid in list(held) + sorted({_first_of(pid, root) for pid in sockets.values() if pid not in own} - set(held)):
        inodes = [inode for inode, owner in sockets.items() if pid in (owner, _first_of(owner, root))]
        name = engine_name(pid, root)
        if pid not in held and (name is None or pid in own):
            continue
        taken |= set(inodes)
        address = min(
            (listening[inode] for inode in inodes), key=lambda each: (each[1] not in PORTS, each[1]), default=None
        )
        found.append(_stranger(pid, name or names.get(pid) or "?", address, held.get(pid, {}), machine))
    for inode, address in listening.items():
        if inode not in sockets and inode not in taken and (asked := _asked(address)):
            found.append(_stranger(None, asked, address, {}, machine))
    return tuple(found)


def engine_name(pid: int, root: Path) -> str | None:
    """Return which engine a process is by its command, None for what is none that mgpu knows."""
    try:
        command = (root / "proc" / str(pid) / "cmdline").read_bytes()[:4096]
    except OSError:
        return None
    # A process that names itself has blanks for zeros: `VLLM::Worker_TP0`.
    words = command.decode(errors="replace").split("\0")[:_WORDS]
    bases = [word.rsplit("/", 1)[-1] for word in words if not word.startswith("-")]
    return next((name for base in bases for pattern, name in _ENGINES if pattern.search(base)), None)


def ancestors(pid: int, root: Path) -> Iterator[int]:
    """Yield the parent of a process, its parent and so on, as long as they are there."""
    for _ in range(_DEEPEST):
        try:
            fields = (root / "proc" / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
            pid = int(fields[1])
        except (OSError, ValueError, IndexError):
            return
        if pid <= 1:
            return
        yield pid


def owner_of(pid: int, owners: Mapping[int, T], root: Path) -> T | None:
    """Return whose a process is: that of itself, or else of whoever has started it; None for nobody's. What an engine
    has started belongs to it, whichever process group that has made for itself."""
    return next((owners[each] for each in (pid, *ancestors(pid, root)) if each in owners), None)


def _is_worth_a_line(pid: int, size: int | None, root: Path) -> bool:
    return (size or 0) >= _MUCH_BYTES or engine_name(pid, root) is not None


def _first_of(pid: int, root: Path) -> int:
    """The engine that a process belongs to: Ollama's runners, vLLM's workers are one with what has started them."""
    first = pid
    for parent in ancestors(pid, root):
        if engine_name(parent, root) is None:
            break
        first = parent
    return first


def _stranger(
    pid: int | None, name: str, address: tuple[str, int] | None, cards: dict[int, int | None], machine: Machine
) -> Stranger:
    uuids = {gpu.index: gpu.uuid for gpu in machine.gpus}
    shares = tuple(
        GpuShare(uuid=uuids.get(index), index=index, actual_bytes=size) for index, size in sorted(cards.items())
    )
    host = f"[{address[0]}]" if address and ":" in address[0] else address[0] if address else ""
    return Stranger(pid=pid, name=name, url=f"http://{host}:{address[1]}" if address else None, gpus=shares)


def _listening(root: Path) -> Iterator[tuple[int, tuple[str, int]]]:
    """The sockets that listen (proc(5), /proc/net/tcp), by inode, with where a client here would reach them."""
    for name, length in (("tcp", 4), ("tcp6", 16)):
        try:
            lines = (root / "proc" / "net" / name).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            with contextlib.suppress(ValueError, IndexError):
                fields = line.split()
                address, _, port = fields[1].partition(":")
                if fields[3] == _LISTENS:
                    yield int(fields[9]), (_host(bytes.fromhex(address), length), int(port, 16))


def _host(raw: bytes, length: int) -> str:
    """An address as the kernel prints it: words of four bytes, each turned round. Everywhere is here, too."""
    import ipaddress

    if len(raw) != length:
        raise ValueError
    address = ipaddress.ip_address(b"".join(raw[at : at + 4][::-1] for at in range(0, length, 4)))
    if address.is_unspecified or (isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped):
        return "127.0.0.1"
    return str(address)


def _owners(inodes: Collection[int], root: Path) -> dict[int, int]:
    """Which process has each of these sockets, as far as this user may look."""
    found: dict[int, int] = {}
    for pid in _engines(root):
        try:
            links = list(os.scandir(root / "proc" / str(pid) / "fd"))
        except OSError:
            continue
        for link in links:
            with contextlib.suppress(OSError, ValueError):
                target = str(Path(link.path).readlink())
                if target.startswith("socket:[") and (inode := int(target[8:-1])) in inodes:
                    found.setdefault(inode, pid)
    return found


def _engines(root: Path) -> Iterator[int]:
    try:
        names = sorted(os.listdir(root / "proc"), key=len)  # noqa: PTH208  names, not paths
    except OSError:
        return
    yield from (int(name) for name in names if name.isdecimal() and engine_name(int(name), root))


def _asked(address: tuple[str, int]) -> str | None:
    """Which engine answers on an engine's port, by what only that one says; None where nothing says so."""
    if address[1] not in PORTS:
        return None
    import http.client

    def says(path: str) -> bytes:
        connection = http.client.HTTPConnection(*address, timeout=_TIMEOUT_S)
        try:
            connection.request("GET", path)
            return connection.getresponse().read(_LONGEST_ANSWER_BYTES)
        except (OSError, http.client.HTTPException):
            return b""
        finally:
            connection.close()

    if address[1] == 11434:
        return "ollama" if b"Ollama is running" in says("/") else None
    models = says("/v1/models")
    words = {b'"llamacpp"': "llama.cpp", b'"vllm"': "vllm", b'"library"': "ollama"}
    return next((name for word, name in words.items() if word in models), None)
