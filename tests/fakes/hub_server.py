"""A server that speaks as much of Hugging Face as downloading a model needs, with failures on demand."""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

CHUNK_BYTES = 1 << 16
BARRIER_SECONDS = 10
_LARGE = (".gguf", ".safetensors")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Repositories as `{"org/name": {"path": content}}`; large files come from another host, as on the real one.

    A content may be a file on disk, which can be a huge sparse one: its checksum is then made up.
    """

    repositories: dict[str, dict[str, bytes | Path]]
    gated: bool = False
    rejects_token: bool = False
    is_a_proxy_page: bool = False
    status: int | None = None
    knows_ranges: bool = True
    breaks_after_bytes: list[int] = field(default_factory=list)
    corrupts: bool | str = False  # all files, or the one of that name
    stalls_after_bytes: int | None = None  # each download, until `release` is set
    release: threading.Event = field(default_factory=threading.Event)
    together: threading.Barrier | None = None  # a download begins when so many do
    listing: bytes | None = None
    seconds_per_chunk: float = 0.0
    commit: str = COMMIT
    served_bytes: int = 0
    proxied: int = 0  # requests that came as to a proxy
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    port: int = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def downloads(self) -> list[str]:
        """The Range header of each download, "" for the whole file."""
        return [headers.get("range", "") for method, path, headers in self.requests if path.startswith("/store/")]


@contextmanager
def running(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve `hub` on a free port of this machine while the block runs."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", hub.port), handler)
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has heard enough is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._note()
        self._describe()

    def do_GET(self) -> None:
        self._note()
        if self.path.startswith("/store/"):
            self._store()
        elif self.path.startswith("/api/models/"):
            self._list()
        else:
            self._describe()

    def _note(self) -> None:
        if self.path.startswith("http://"):
            self.hub.proxied += 1
            self.path = re.sub("^http://[^/]*", "", self.path) or "/"
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append((self.command, self.path, headers))

    def _describe(self) -> None:
        if self.path == "/":
            return self._answer(200)
        if self.hub.is_a_proxy_page:
            return self._answer(200, {"Content-Type": "text/html"}, b"<html>Please log in</html>")
        if self._refused():
            return None
        repository, _, rest = unquote(self.path[1:]).partition("/resolve/")
        revision, _, path = rest.partition("/")
        files = self.hub.repositories.get(repository)
        if files is None:
            return self._answer(401, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", self.hub.commit):
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        if path not in files:
            return self._answer(404, {"X-Error-Code": "EntryNotFound"})
        tag = _checksum(files[path])
        return self._answer(
            302,
            {
                "Location": f"http://localhost:{self.hub.port}/store/{tag}",
                "X-Linked-Etag": f'"{tag}"',
                "X-Linked-Size": str(_size(files[path])),
                "X-Repo-Commit": self.hub.commit,
            },
        )

    def _list(self) -> None:
        """A gated repository may be listed, but its files are not to be had."""
        if self._refused(gated=False):
            return None
        repository = self.path.removeprefix("/api/models/").partition("/revision/")[0]
        if repository not in self.hub.repositories:
            return self._answer(401, {"X-Error-Code": "RepoNotFound"})
        files = self.hub.repositories[repository].items()
        siblings = [
            {"rfilename": path, "size": _size(content), "blobId": _checksum(content)} | _large(path, content)
            for path, content in files
        ]
        described = {"id": repository, "sha": self.hub.commit, "siblings": siblings}
        listing = self.hub.listing or json.dumps(described).encode()
        return self._answer(200, {}, listing)

    def _refused(self, *, gated: bool = True) -> bool:
        if self.hub.status:
            self._answer(self.hub.status)
        elif self.hub.rejects_token and "authorization" in self.hub.requests[-1][2]:
            self._answer(401)
        elif self.hub.gated and gated:
            self._answer(403, {"X-Error-Code": "GatedRepo"})
        else:
            return False
        return True

    def _store(self) -> None:
        named = (item for files in self.hub.repositories.values() for item in files.items())
        wanted = self.path.removeprefix("/store/")
        name, content = next(item for item in named if _checksum(item[1]) == wanted)
        size = _size(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, end = 0, size
        if asked and self.hub.knows_ranges:
            start, end = int(asked[1]), min(int(asked[2] or size - 1) + 1, size)
        self.send_response(206 if asked and self.hub.knows_ranges else 200)
        self.send_header("Content-Length", str(end - start))
        if asked and self.hub.knows_ranges:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.end_headers()
        if self.hub.breaks_after_bytes:
            end = min(end, start + self.hub.breaks_after_bytes.pop(0))
            self.close_connection = True
        if self.hub.together:
            with suppress(threading.BrokenBarrierError):
                self.hub.together.wait(BARRIER_SECONDS)
        stall = None if self.hub.stalls_after_bytes is None else start + self.hub.stalls_after_bytes
        with suppress(ConnectionError), _opened(content) as file:
            file.seek(start)
            while start < end:
                if stall is not None and start >= stall:
                    self.hub.release.wait()
                piece = file.read(min(CHUNK_BYTES, end - start))
                self.hub.served_bytes += len(piece)  # counted first: who has read it may ask at once
                self.wfile.write(b"\0" * len(piece) if self.hub.corrupts in (True, name) else piece)
                start += len(piece)
                time.sleep(self.hub.seconds_per_chunk)

    def _answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _opened(content: bytes | Path) -> BinaryIO:
    return io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _large(path: str, content: bytes | Path) -> dict[str, object]:
    """What the hub tells of a large file besides."""
    large = {"sha256": _checksum(content), "size": _size(content), "pointerSize": 134}
    return {"lfs": large} if path.endswith(_LARGE) else {}


def _checksum(content: bytes | Path) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.sha256(f"{content.stat().st_size}".encode() + file.read(1 << 24)).hexdigest()
