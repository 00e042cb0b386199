"""Fake vLLMs for a test: installed, started with a folder each, and taken away again without a trace."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from mgpu.backends.vllm import BACKEND
from tests.fakes.devices import free_port
from tests.fakes.tiny_llama import make_tiny_llama
from tests.fakes.vllm_server import install

LIMIT_S = 120
SHARED_MEMORY = Path("/dev/shm")
ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@dataclass
class RunningVllm:
    """A vLLM that was just started, with a TMPDIR of its own."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int
    folder: Path

    def lines(self) -> list[str]:
        return self.log.read_text(encoding="utf-8").splitlines()

    def logged(self, text: str) -> bool:
        return any(text in line for line in self.lines())

    def ended(self) -> int:
        return self.process.wait(LIMIT_S)

    def request(self, method: str, path: str, body: object = None, **headers: str) -> httpx.Response:
        url = f"http://127.0.0.1:{self.port}{path}"
        return httpx.request(method, url, json=body, headers=headers, timeout=LIMIT_S, trust_env=False, verify=False)

    def get(self, path: str) -> str | None:
        with suppress(httpx.HTTPError):
            reply = self.request("GET", path)
            return reply.text if reply.status_code == 200 else None
        return None

    def ready(self) -> bool:
        return self.get(BACKEND.ready_path) is not None

    def counter(self, name: str) -> float:
        found = BACKEND.sample(0.0, self.get)
        return float(getattr(found, name) or 0) if found else 0.0

    def members(self) -> dict[str, int]:
        """The living processes of its group, by what they call themselves."""
        listed = subprocess.run(
            ["ps", "-ww", "-eo", "pid=,pgid=,stat=,args="], capture_output=True, text=True, check=True
        )
        rows = (line.split(None, 3) for line in listed.stdout.splitlines())
        return {row[3]: int(row[0]) for row in rows if row[1] == str(self.process.pid) and row[2][0] not in "ZX"}

    def worker(self, name: str) -> int:
        return self.members()[f"VLLM::{name}"]

    def shared(self) -> set[str]:
        """The files of /dev/shm in its processes' memory."""
        maps = (Path(f"/proc/{pid}/maps").read_text(encoding="utf-8") for pid in self.members().values())
        return {name for text in maps for name in re.findall(r" /dev/shm/(\S+)", text)}

    def open(self, body: object) -> socket.socket:
        """A request whose answer is on its way and not read."""
        text = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT_S)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n\r\n"
        connection.sendall(head.encode() + text)
        until(lambda: self.counter("running") > 0)
        return connection


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


@dataclass(frozen=True)
class Installed:
    """The two builds of the fake, and a model."""

    cards: Path
    cpu: Path
    model: Path


Start = Callable[..., RunningVllm]


def install_both(folder: Path) -> Installed:
    model = make_tiny_llama(folder / "tiny")
    return Installed(cards=install(folder / "cards"), cpu=install(folder / "cpu", cpu=True), model=model)


@contextmanager
def starting(installed: Installed) -> Iterator[Start]:
    """A function that starts one: with these arguments, on cards or a `cpu`, of the tiny model or another, in this
    environment; it returns once that is ready or has ended, or at once unless it is to `wait`."""
    started: list[RunningVllm] = []
    with tempfile.TemporaryDirectory(prefix="v", dir="/tmp") as short:  # a unix socket's path has little room

        def begin(*arguments: str, wait: bool = True, cpu: bool = False, model: Path | None = None,
                  **environment: str) -> RunningVllm:  # fmt: skip
            folder = Path(short) / str(len(started))
            folder.mkdir()
            port, log = free_port(), Path(short) / f"{len(started)}.log"
            where = ("--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port))
            program = installed.cpu if cpu else installed.cards
            environment = {"TMPDIR": str(folder), **(ON_CPU if cpu else {}), **environment}
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [program, "serve", model or installed.model, *where, *arguments],
                    stdout=output,
                    stderr=output,
                    env={**os.environ, **environment},
                    start_new_session=True,
                )
            running = RunningVllm(process=process, log=log, port=port, folder=folder)
            started.append(running)
            if wait:
                until(lambda: running.ready() or process.poll() is not None)
            return running

        try:
            yield begin
        finally:
            for running in started:
                _end(running)


def _end(running: RunningVllm) -> None:
    """End all but the resource tracker, which then removes what is in /dev/shm, but for the group's own memory."""
    while rest := [pid for name, pid in running.members().items() if "resource_tracker" not in name]:
        for pid in rest:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    running.process.wait()
    until(lambda: not running.members())
    for group in running.folder.glob("vllm_dist_*"):
        for path in SHARED_MEMORY.glob(f"{group.name}*"):
            path.unlink()
