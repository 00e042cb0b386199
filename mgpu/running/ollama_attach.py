"""An Ollama that somebody else runs, most often the system's service: found and described, never touched."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mgpu.backends.failure import shorten
from mgpu.backends.ollama_placement import LoadedModel
from mgpu.errors import EngineFailed, UsageError
from mgpu.running.ports import client_host

if TYPE_CHECKING:
    import httpx

HOST_VARIABLE = "OLLAMA_HOST"
_DEFAULT_PORT = 11434
_TIMEOUT_S = 2.0
_LONGEST_ANSWER = 65536
_SCHEME_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """An Ollama that runs at `url`. `loaded` are the models it holds in memory, None when it does not say; they
    take memory of the cards that a plan may count on."""

    url: str
    version: str
    loaded: tuple[LoadedModel, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """Something at `url` that is no Ollama, or one that does not answer; `why` is a clause for the user."""

    url: str
    why: str


def attach(host: str | None = None) -> Attached | Foreign | None:
    """Say what answers at `host`, at $OLLAMA_HOST or at 127.0.0.1:11434; None when nothing listens there.

    Only asks; blocks a few seconds at most. Raises UsageError when the address makes no sense.
    """
    url = server_url(host if host is not None else os.environ.get(HOST_VARIABLE, ""))
    if not _listens(url):
        return None
    import httpx

    try:
        with httpx.stream("GET", f"{url}/api/version", timeout=_TIMEOUT_S, trust_env=False) as reply:
            body = _beginning(reply)
    except (httpx.ConnectError, httpx.ConnectTimeout):
        return None
    except httpx.TimeoutException:
        return Foreign(url=url, why=f"something listens there and does not answer within {_TIMEOUT_S:.0f} s")
    except (httpx.HTTPError, httpx.InvalidURL):
        return Foreign(url=url, why="something listens there that does not speak HTTP")
    version = _version(reply.status_code, body)
    if version is None:
        kind = reply.headers.get("content-type", "").partition(";")[0] or "no content type"
        said = "" if "html" in kind else f": {body[:200].decode(errors='replace')}"
        described = shorten(f"HTTP {reply.status_code}, {kind}{said}")
        return Foreign(url=url, why=f"something else answers there: {described}")
    from mgpu.running.ollama_client import OllamaClient

    try:
        with OllamaClient(url, keep_alive=None) as client:
            return Attached(url=url, version=version, loaded=client.loaded())
    except EngineFailed:
        return Attached(url=url, version=version, loaded=None)


def server_url(host: str) -> str:
    """Return the URL of a server address as OLLAMA_HOST is written: "", "host", ":port", "host:port" or a URL.

    An address that means all networks is reached at this machine's own. Raises UsageError for anything else.
    """
    from urllib.parse import urlsplit

    text = host.strip().strip("\"'")
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "http", text
    default_port = _SCHEME_PORTS.get(scheme, _DEFAULT_PORT) if separator else _DEFAULT_PORT
    try:
        parts = urlsplit(f"{scheme}://{rest}")
        port = parts.port or default_port
        name = parts.hostname or "127.0.0.1"
    except ValueError:
        port, name = 0, ""
    if scheme not in _SCHEME_PORTS or not text.isprintable() or " " in text or not port:
        raise UsageError(
            f"{HOST_VARIABLE} {shorten(host, 80)!r} is no address of a server",
            hint="for example 127.0.0.1:11434",
        )
    return f"{scheme}://{client_host(name)}:{port}{parts.path.rstrip('/')}"


def _listens(url: str) -> bool:
    """Whether anything takes a connection there: found out in no time, without the libraries for the rest."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 0), timeout=_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _beginning(reply: httpx.Response) -> bytes:
    """The first bytes of an answer: what is no Ollama may never stop talking."""
    body = b""
    deadline = time.monotonic() + _TIMEOUT_S
    for chunk in reply.iter_bytes():
        body += chunk
        if len(body) > _LONGEST_ANSWER or time.monotonic() > deadline:
            break
    return body


def _version(status: int, body: bytes) -> str | None:
    """The version in an answer that only Ollama gives."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return None
    version = data.get("version") if isinstance(data, dict) and status == 200 else None
    return shorten(version, 40) if isinstance(version, str) and version.strip() else None
