"""A machine with NVIDIA cards and a vLLM, both fakes, and what such an engine has of a machine while it runs."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.vllm_server import install

from .program import Mgpu, request, until

UUIDS = ("GPU-00000000-0000-0000-0000-000000000001", "GPU-00000000-0000-0000-0000-000000000002")
_RIGS = Path(__file__).parents[1] / "machines" / "rigs"
_SHARED_MEMORY = Path("/dev/shm")
_LIVING = re.compile(r"\) [^ZX] \d+ (\d+) ")


def with_vllm(mgpu: Mgpu, nvml: Mapping[str, Path], folder: Path) -> Mgpu:
    """`mgpu` with two like cards, a vLLM for cards and no other engine; it keeps its cache in `folder`."""
    mgpu.environment |= {
        "LD_LIBRARY_PATH": str(nvml["new"]),
        "MGPU_VLLM": str(install(folder / "cards")),
        "PATH": os.defpath,
        "XDG_CACHE_HOME": str(folder / "cache"),
        **rig("2x4090-x670e"),
    }
    del mgpu.environment["MGPU_LLAMA_SERVER"]
    return mgpu


def rig(name: str) -> dict[str, str]:
    """The variables that make the driver and vLLM see the cards of a rig."""
    path = _RIGS / f"{name}.txt"
    sizes = re.findall(r"(?m)^gpu\d+\.mem\.total = (\d+)$", path.read_text())
    return {"FAKE_NVML": str(path), "FAKE_CARD_BYTES": ",".join(sizes)}


def settings_of(pid: int) -> dict[str, str]:
    """The environment of a process."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    pairs = (os.fsdecode(entry).partition("=") for entry in entries if entry)
    return {name: value for name, _, value in pairs}


def arguments_of(pid: int) -> list[str]:
    """The words of a process's command line."""
    return [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")]


def members(group: int) -> list[int]:
    """The living processes of a process group, whatever they call themselves."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            match = _LIVING.search(path.read_text(errors="replace"))
        except OSError:  # gone meanwhile
            continue
        if match and int(match[1]) == group:
            found.append(int(path.parent.name))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """What a running engine holds: its processes' group, its temporary folder, its shared memory."""

    group: int
    temporary: Path
    shared: frozenset[Path]

    def assert_given_back(self) -> None:
        """Wait until nothing of it is left. The reaper removes its folder last, and so no later than what it shared."""
        until(lambda: not members(self.group), "every process of the engine is gone")
        until(lambda: not self.temporary.exists(), "its temporary folder is gone")
        assert not [path for path in self.shared if path.exists()]


def holdings(pid: int) -> Holdings:
    """What the engine that `pid` leads holds now; it has workers, and so shared memory."""
    maps = "".join(Path(f"/proc/{member}/maps").read_text() for member in members(pid))
    shared = frozenset(_SHARED_MEMORY / name for name in re.findall(r" /dev/shm/(\S+)", maps))
    temporary = Path(settings_of(pid)["TMPDIR"])
    assert len(members(pid)) >= 4
    assert any(path.is_socket() for path in temporary.iterdir())
    assert shared
    return Holdings(group=pid, temporary=temporary, shared=shared)


def open_request(url: str, *, stream: bool = True) -> socket.socket:
    """A request for two thousand tokens; returns its connection once the engine has it."""
    body = {"prompt": "Go on", "max_tokens": 2000, "ignore_eos": True, "stream": stream}
    text = json.dumps(body).encode()
    before = in_flight(url)
    host, _, port = url.removeprefix("http://").rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    kind = "Content-Type: application/json"  # without it the real one refuses
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{kind}\r\nContent-Length: {len(text)}\r\n\r\n"
    connection.sendall(head.encode() + text)
    until(lambda: in_flight(url) > before, "the engine has a request")
    return connection


def in_flight(url: str) -> float:
    """How many requests run or wait."""
    counts = re.findall(r"(?m)^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)$", request(url, "/metrics")[1])
    return sum(map(float, counts))
