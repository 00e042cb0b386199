"""A server that speaks as much of Hugging Face as downloading a model needs, with failures on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Repositories as `{"org/name": {"path": content}}`; large files come from another host, as on the real one."""

    repositories: dict[str, dict[str, bytes]]
    gated: bool = False
    rejects_token: bool = False
    is_a_proxy_page: bool = False
    status: int | None = None
    knows_ranges: bool = True
    breaks_after_bytes: list[int] = field(default_factory=list)
    corrupts: bool = False
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
    server = ThreadingHTTPServer(("127.0.0.1", hub.port), handler)
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


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
        if revision not in ("main", COMMIT):
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        if path not in files:
            return self._answer(404, {"X-Error-Code": "EntryNotFound"})
        tag = hashlib.sha256(files[path]).hexdigest()
        return self._answer(
            302,
            {
                "Location": f"http://localhost:{self.hub.port}/store/{tag}",
                "X-Linked-Etag": f'"{tag}"',
                "X-Linked-Size": str(len(files[path])),
                "X-Repo-Commit": COMMIT,
            },
        )

    def _list(self) -> None:
        if self._refused():
            return None
        repository = self.path.removeprefix("/api/models/").partition("/revision/")[0]
        if repository not in self.hub.repositories:
            return self._answer(401, {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": path} for path in self.hub.repositories[repository]]
        return self._answer(200, {}, json.dumps({"siblings": siblings}).encode())

    def _refused(self) -> bool:
        if self.hub.status:
            self._answer(self.hub.status)
        elif self.hub.rejects_token and "authorization" in self.hub.requests[-1][2]:
            self._answer(401)
        elif self.hub.gated:
            self._answer(403, {"X-Error-Code": "GatedRepo"})
        else:
            return False
        return True

    def _store(self) -> None:
        contents = (content for files in self.hub.repositories.values() for content in files.values())
        wanted = self.path.removeprefix("/store/")
        content = next(each for each in contents if hashlib.sha256(each).hexdigest() == wanted)
        start = 0
        if self.hub.knows_ranges and "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        body = b"\0" * len(content) if self.hub.corrupts else content
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        rest = body[start:]
        if self.hub.breaks_after_bytes:
            rest = rest[: self.hub.breaks_after_bytes.pop(0)]
            self.close_connection = True
        self.wfile.write(rest)

    def _answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
