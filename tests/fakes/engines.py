"""Engines for tests: the fake llama-server as mgpu starts it, and a server that answers what it is told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from mgpu.backends.llama_cpp import BACKEND
from mgpu.running.client import EngineClient
from mgpu.running.process import EngineProcess
from tests.fakes.devices import free_port
from tests.fakes.llama_server import install

LIMIT_S = 120
_MODEL_BYTES = 100 << 20


def connect(url: str, *, api_key: str | None = None) -> EngineClient:
    """A client of a llama-server."""
    return EngineClient(url, BACKEND, model="model", api_key=api_key)


def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition`, with a limit that no healthy machine reaches."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.01)


@contextmanager
def fake_engine(
    folder: Path, *arguments: str, port: int | None = None, api_key: str | None = None, **environment: str
) -> Iterator[tuple[EngineProcess, EngineClient]]:
    """A fake llama-server just started in `folder`, with its client; both end with the block."""
    model = folder / "model.gguf"
    with model.open("wb") as file:
        file.write(b"GGUF")
        file.truncate(_MODEL_BYTES)
    port = port or free_port()
    where = ("--host", "127.0.0.1", "--port", str(port))
    argv = [str(install(folder)), "-m", str(model), *where, "-lv", "4", *arguments]
    env = environment | ({"LLAMA_API_KEY": api_key} if api_key else {})
    with (
        EngineProcess.start(argv, env=env, log_path=folder / "engine.log") as process,
        connect(f"http://127.0.0.1:{port}", api_key=api_key) as client,
    ):
        yield process, client


@contextmanager
def scripted_engine(answers: Mapping[str, bytes]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """The URL of a server that sends the bytes given for a path, whatever they are, and hangs up; and the headers
    of the requests it got."""
    requests: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append({name.lower(): value for name, value in self.headers.items()})
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.wfile.write(answers[self.path])

        do_POST = do_GET  # noqa: N815 - the name http.server looks for

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name http.server uses
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def http_answer(body: str | bytes, status: int = 200) -> bytes:
    """A whole HTTP answer with `body`."""
    data = body.encode() if isinstance(body, str) else body
    return b"HTTP/1.1 %d Said\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (status, len(data), data)
