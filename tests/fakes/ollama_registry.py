"""A server that speaks as much of Ollama's registry as reading and pulling a model needs, with failures on demand.

A real Ollama can pull from it: `pull("127.0.0.1:PORT/library/smol", insecure=True)`. As at the real one the content of
blobs comes from another host, to which a request is redirected, and only HEAD tells a manifest's digest.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

CHUNK_BYTES = 1 << 16
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
MANIFEST_LIST = "application/vnd.ollama.manifest.list.v2+json"
CONFIG = "application/vnd.docker.container.image.v1+json"
LAYER = "application/vnd.ollama.image."
_HASHED_WHOLE = 1 << 28

Content = bytes | Path


@dataclass
class FakeRegistry:
    """Manifests by "namespace/model:tag" and blobs by digest; a blob may be a file on disk, however large."""

    manifests: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, Content] = field(default_factory=dict)
    status: int | None = None
    blob_status: int | None = None
    knows_ranges: bool = True
    breaks_after_bytes: list[int] = field(default_factory=list)
    seconds_per_chunk: float = 0.0
    seconds_per_manifest_byte: float = 0.0
    manifest_headers: dict[str, str] = field(default_factory=dict)
    store: str | None = None
    served_bytes: int = 0
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    port: int = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, name: str, weights: Content, *, projector: Content | None = None) -> str:
        """Enter a model as "namespace/model:tag", and return its weights' digest."""
        layers = [self.layer("model", weights)]
        layers += [self.layer("projector", projector)] if projector is not None else []
        layers += [self.layer("template", b"{{ .Prompt }}"), self.layer("params", b'{"stop":["<|im_end|>"]}')]
        diffs = [layer["digest"] for layer in layers]
        config = {"model_format": "gguf", "architecture": "amd64", "os": "linux"}
        config_layer = self.layer("", json.dumps({**config, "rootfs": {"type": "layers", "diff_ids": diffs}}).encode())
        self.enter(name, manifest_of(*layers, config={**config_layer, "mediaType": CONFIG}))
        return str(layers[0]["digest"])

    def enter(self, name: str, manifest: Mapping[str, Any] | bytes) -> None:
        self.manifests[name] = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()

    def layer(self, kind: str, content: Content) -> dict[str, Any]:
        """A layer whose content is now served."""
        digest = f"sha256:{_checksum(content)}"
        self.blobs[digest] = content
        return {"mediaType": LAYER + kind, "digest": digest, "size": _size(content)}

    def asked(self) -> list[str]:
        """What it was asked since the last time, without the digests."""
        asked = [f"{method} {path.rpartition('/sha256:')[0] or path}" for method, path, _ in self.requests]
        self.requests.clear()
        return asked

    def downloads(self) -> list[tuple[str, str]]:
        """The host and the range of each download ("": all of it)."""
        found = [headers for method, path, headers in self.requests if method == "GET" and path.startswith("/store/")]
        return [(headers["host"].partition(":")[0], headers.get("range", "")) for headers in found]


def manifest_of(*layers: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A manifest with these layers."""
    return {"schemaVersion": 2, "mediaType": MANIFEST, "layers": list(layers), **more}


@contextmanager
def running(registry: FakeRegistry) -> Iterator[FakeRegistry]:
    """Serve `registry` on a free port of this machine while the block runs."""
    handler = type("Handler", (_Handler,), {"registry": registry})
    server = _Server(("127.0.0.1", registry.port), handler)
    registry.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield registry
    finally:
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
    registry: FakeRegistry

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self._note()
        manifest = re.fullmatch(r"/v2/(.+)/manifests/(.+)", self.path)
        blob = re.fullmatch(r"/v2/.+/blobs/(.+)", self.path)
        store = re.fullmatch(r"/store/(.+)", self.path)
        if store and store[1] in self.registry.blobs:
            self._send_blob(self.registry.blobs[store[1]])
        elif manifest:
            self._send_manifest(manifest[1], manifest[2])
        elif blob:
            self._redirect(blob[1])
        else:
            self._answer(404)

    def do_CONNECT(self) -> None:
        """It is no proxy, but notes what it would have been asked for."""
        self._note()
        self._answer(502)

    def _note(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.registry.requests.append((self.command, self.path, headers))

    def _send_manifest(self, repository: str, reference: str) -> None:
        if self.registry.status:
            return self._answer(self.registry.status)
        if reference.startswith("sha256:"):
            content = self.registry.blobs.get(reference)
        else:
            content = self.registry.manifests.get(f"{repository}:{reference}")
        if not isinstance(content, bytes):
            return self._answer(404, {}, b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}')
        headers = {"Content-Type": "text/plain; charset=utf-8", **self.registry.manifest_headers}
        if self.command == "HEAD":
            headers["Ollama-Content-Digest"] = hashlib.sha256(content).hexdigest()
        return self._answer(200, headers, content, self.registry.seconds_per_manifest_byte)

    def _redirect(self, digest: str) -> None:
        content = self.registry.blobs.get(digest)
        if self.registry.blob_status or content is None:
            return self._answer(self.registry.blob_status or 404)
        if self.command == "HEAD":
            self.send_response(200)
            self.send_header("Content-Length", str(_size(content)))
            return self.end_headers()
        store = self.registry.store or f"http://localhost:{self.registry.port}/store/"
        return self._answer(307, {"Location": store + digest})

    def _send_blob(self, content: Content) -> None:
        size = _size(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, end = 0, size
        if asked and self.registry.knows_ranges:
            start, end = int(asked[1]), min(int(asked[2] or size - 1) + 1, size)
        self.send_response(206 if asked and self.registry.knows_ranges else 200)
        self.send_header("Content-Length", str(end - start))
        if asked and self.registry.knows_ranges:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.end_headers()
        if self.registry.breaks_after_bytes:
            end = min(end, start + self.registry.breaks_after_bytes.pop(0))
            self.close_connection = True
        with suppress(ConnectionError), _opened(content) as file:
            file.seek(start)
            while start < end and self.command == "GET":
                piece = file.read(min(CHUNK_BYTES, end - start))
                self.registry.served_bytes += len(piece)  # counted first: who has read it may ask at once
                self.wfile.write(piece)
                start += len(piece)
                time.sleep(self.registry.seconds_per_chunk)

    def _answer(
        self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"", seconds_per_byte: float = 0.0
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with suppress(ConnectionError):
            step = 1 if seconds_per_byte else max(1, len(body))
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                time.sleep(seconds_per_byte)


def _opened(content: Content) -> BinaryIO:
    return io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")


def _size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _checksum(content: Content) -> str:
    """The true one, but for huge files, of which nobody fetches all."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        if _size(content) <= _HASHED_WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(f"{_size(content)}".encode() + file.read(1 << 24)).hexdigest()
