"""An Ollama for a test: the fake one, or the real one that MGPU_TEST_OLLAMA names, started and taken away again."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.fakes.devices import free_port
from tests.fakes.ollama_server import install

REAL_OLLAMA = "MGPU_TEST_OLLAMA"
MODEL = "smollm2:135m"
LIMIT_S = 180.0
TWO_CARDS = "Vulkan0: llvmpipe (2048 MiB, 2048 MiB free); Vulkan1: llvmpipe (2048 MiB, 2048 MiB free)"
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


@dataclass(frozen=True)
class RunningOllama:
    """A server that answers."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    models: Path

    def lines(self) -> list[str]:
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()

    def wait_for_line(self, text: str) -> str:
        """The first log line with `text`, once it is there."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            for line in self.lines():
                if text in line:
                    return line
            time.sleep(0.02)
        raise AssertionError(f"never logged: {text}")


@contextmanager
def running_ollama(
    folder: Path,
    environment: Mapping[str, str] | None = None,
    *,
    program: Path | None = None,
    port: int | None = None,
) -> Iterator[RunningOllama]:
    """Start an Ollama with its home in `folder` and wait until it answers; at the end its whole group is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    base = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OLLAMA_", "LLAMA_ARG_", "FAKE_")) and name not in _VISIBLE
    }
    models = folder / "models"
    own = {
        "OLLAMA_HOST": f"127.0.0.1:{port}",
        "HOME": str(folder),
        "OLLAMA_MODELS": str(models),
        "OLLAMA_NO_CLOUD": "1",
    }
    log = folder / "ollama.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program or install(folder), "serve"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**base, **own, **(environment or {})},
            start_new_session=True,
        )
    try:
        server = RunningOllama(process=process, url=f"http://127.0.0.1:{port}", log=log, models=models)
        _wait_until_it_answers(server)
        yield server
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(LIMIT_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_it_answers(server: RunningOllama) -> None:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and server.process.poll() is None:
        with suppress(httpx.HTTPError):
            httpx.get(f"{server.url}/api/version", timeout=5, trust_env=False)
            return
        time.sleep(0.02)
    raise AssertionError("Ollama did not start:\n" + "\n".join(server.lines()[-20:]))
