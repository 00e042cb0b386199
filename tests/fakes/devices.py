"""Devices for tests on a machine without a GPU: real RPC servers, fake ones of any size, Mesa's software Vulkan.

Every context manager waits until its devices answer and takes them away again, whatever happens inside.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import pytest

from mgpu.backends.cpu_library import WHEEL, cpu_library

_ROOT = Path(__file__).parent.parent.parent
_START_LIMIT_S = 120
NO_VULKAN = {"GGML_VK_VISIBLE_DEVICES": ""}


def require_or_skip(condition: bool, reason: str) -> None:
    """Skip the test unless `condition`; fail it where MGPU_TEST_REQUIRE_REAL=1 forbids to skip, as in CI."""
    if condition:
        return
    if os.environ.get("MGPU_TEST_REQUIRE_REAL") == "1":
        pytest.fail(f"{reason}, and MGPU_TEST_REQUIRE_REAL=1 forbids to skip")
    pytest.skip(reason)


def real_llama_server() -> Path:
    """The llama-server of the `llamacpp` extra; skips the test where it is not installed."""
    return _program("binary_path")


def real_rpc_server() -> Path:
    """The ggml-rpc-server of the `llamacpp` extra; skips the test where it is not installed."""
    return _program("rpc_server_path")


@contextmanager
def rpc_devices(count: int) -> Iterator[tuple[str, ...]]:
    """Endpoints of `count` real ggml-rpc-servers, each with the CPU as its device."""
    program = real_rpc_server()
    environment = NO_VULKAN | cpu_library(program)
    with ExitStack() as stack:
        endpoints = []
        for _ in range(count):
            port = free_port()
            command = [str(program), "--host", "127.0.0.1", "--port", str(port), "--threads", "1"]
            # What it says of each request would fill a pipe that nobody reads, and block it.
            process = stack.enter_context(_running(command, environment, stdout=subprocess.DEVNULL))
            _wait_until_it_answers(process, port)
            endpoints.append(f"127.0.0.1:{port}")
        yield tuple(endpoints)


@contextmanager
def fake_rpc_devices(mem_gib: Sequence[float], *options: str, logs: Sequence[Path] = ()) -> Iterator[tuple[str, ...]]:
    """Endpoints of fake RPC servers (`tests.fakes.rpc_server`), one for each size, with `options` for all.

    `logs` are the files where they note their allocations, in the same order.
    """
    with ExitStack() as stack:
        endpoints = []
        for index, size in enumerate(mem_gib):
            log = ["--log", str(logs[index])] if index < len(logs) else []
            command = [sys.executable, "-m", "tests.fakes.rpc_server", "--mem-gib", str(size), *options, *log]
            process = stack.enter_context(_running(command, {"PYTHONPATH": str(_ROOT)}))
            assert process.stdout is not None
            ready = re.fullmatch(r"listening on (127\.0\.0\.1:\d+)\n", process.stdout.readline())
            assert ready, "the fake RPC server did not start"
            endpoints.append(ready[1])
        yield tuple(endpoints)


@cache
def lavapipe_environment() -> dict[str, str] | None:
    """The environment in which llama-server sees Mesa's software renderer as Vulkan0 and Vulkan1; None where
    it is not installed, or where a real Vulkan device takes its place."""
    environment = {"GGML_VK_VISIBLE_DEVICES": "0,0"}
    if importlib.util.find_spec(WHEEL) is None:
        return None
    listed = subprocess.run(
        [real_llama_server(), "--list-devices"],
        capture_output=True,
        text=True,
        timeout=_START_LIMIT_S,
        env={**os.environ, **environment},
    )
    return environment if len(re.findall(r"Vulkan[01]: llvmpipe", listed.stdout)) == 2 else None


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _program(function: str) -> Path:
    reason = f"the package {WHEEL} is not installed"
    require_or_skip(importlib.util.find_spec(WHEEL) is not None, reason)
    path: Path | None = getattr(importlib.import_module(WHEEL), function)()
    require_or_skip(path is not None, f"{WHEEL} lacks {function}")
    assert path is not None
    return path


@contextmanager
def _running(
    command: Sequence[str], environment: dict[str, str], *, stdout: int = subprocess.PIPE
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        with process:
            try:
                yield process
            finally:
                process.kill()
    finally:
        process.wait()


def _wait_until_it_answers(process: subprocess.Popen[str], port: int) -> None:
    deadline = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.01)
        else:
            return
    raise AssertionError("the RPC server did not start")
