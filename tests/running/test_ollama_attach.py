"""An Ollama that runs already is found and described; what else may sit on its port is named."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mgpu.errors import UsageError
from mgpu.running.ollama_attach import Attached, Foreign, attach, server_url
from mgpu.running.ollama_client import OllamaClient
from tests.fakes.devices import free_port
from tests.fakes.ollama_running import MODEL, running_ollama


@contextmanager
def saying(answer: bytes | None) -> Iterator[str]:
    """A server that answers every connection with these bytes, or not at all."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    if answer is None:
                        continue
                    connection.recv(65536)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        if answer is not None:
            thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def http(body: bytes, kind: str = "application/json", status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def test_an_ollama_is_found_with_what_it_holds_and_left_as_it_was(tmp_path: Path) -> None:
    with running_ollama(tmp_path) as running:
        empty = attach(running.url)
        assert empty == Attached(url=running.url, version="0.32.15", loaded=())
        with OllamaClient(running.url, keep_alive=None) as client:
            client.pull(MODEL)
            client.load(MODEL)
        found = attach(running.url)
        assert isinstance(found, Attached)
        assert found.loaded is not None
        assert [model.name for model in found.loaded] == [MODEL]
        assert running.process.poll() is None


def test_the_variable_says_where_the_users_ollama_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_ollama(tmp_path) as running:
        monkeypatch.setenv("OLLAMA_HOST", running.url.removeprefix("http://"))
        found = attach()
        assert isinstance(found, Attached)
        assert found.url == running.url


def test_nothing_is_found_where_nothing_listens() -> None:
    assert attach(f"127.0.0.1:{free_port()}") is None


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        pytest.param(http(b"<html>hello</html>", "text/html"), "text/html", id="a web page"),
        pytest.param(http(b'{"version": 3}'), "something else", id="JSON with another kind of version"),
        pytest.param(http(b'["version"]'), "something else", id="JSON that is no object"),
        pytest.param(http(b'{"version": "1"}', status="401 No"), "HTTP 401", id="a refusal"),
        pytest.param(http(b"[" * 60000), "something else", id="JSON without end"),
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\n" + b"la " * 100_000, "something else", id="an answer without end"),
        pytest.param(http(b"", status="302 Found"), "HTTP 302", id="a redirect"),
        pytest.param(http(b"\xff\xfe\x00", "text/plain"), "something else", id="bytes that are no text"),
        pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", "does not speak HTTP", id="another protocol"),
        pytest.param(b"", "does not speak HTTP", id="a connection closed at once"),
    ],
)
def test_what_is_no_ollama_is_foreign(answer: bytes, why: str) -> None:
    with saying(answer) as host:
        found = attach(host)
    assert isinstance(found, Foreign)
    assert why in found.why
    assert found.why.isprintable()


def test_what_accepts_and_never_answers_is_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgpu.running.ollama_attach._TIMEOUT_S", 0.2)
    with saying(None) as host:
        found = attach(host)
    assert isinstance(found, Foreign)
    assert "does not answer" in found.why


def test_an_ollama_that_hides_what_it_holds_is_still_one() -> None:
    with saying(http(b'{"version": "0.0.0"}')) as host:
        found = attach(host)
    assert isinstance(found, Attached)
    assert (found.version, found.loaded) == ("0.0.0", None)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        pytest.param("", "http://127.0.0.1:11434", id="nothing"),
        pytest.param("10.0.0.7", "http://10.0.0.7:11434", id="a host"),
        pytest.param(":8000", "http://127.0.0.1:8000", id="a port"),
        pytest.param("box:8000/", "http://box:8000", id="host and port"),
        pytest.param("0.0.0.0:11434", "http://127.0.0.1:11434", id="all networks"),
        pytest.param("[::]:1", "http://[::1]:1", id="all networks, version 6"),
        pytest.param("http://box", "http://box:80", id="a URL"),
        pytest.param("https://box", "https://box:443", id="a secure URL"),
        pytest.param("http://box/ollama/", "http://box:80/ollama", id="a URL with a path"),
        pytest.param(' "box" ', "http://box:11434", id="quotes and blanks"),
    ],
)
def test_addresses_are_read_as_ollama_reads_them(host: str, url: str) -> None:
    assert server_url(host) == url


@pytest.mark.parametrize("host", ["ftp://box", "box:99999", "http://[box", "a b", "box:port", "bo\nx"])
def test_an_address_that_makes_no_sense_is_a_wrong_use(host: str) -> None:
    with pytest.raises(UsageError, match="OLLAMA_HOST"):
        server_url(host)
