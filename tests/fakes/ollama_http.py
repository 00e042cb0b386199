"""A fake Ollama's endpoints, with bodies shaped like the recorded ones in `tests/data/logs/ollama`."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.fakes.ollama_runner import say
from tests.fakes.ollama_scheduler import LoadFailed, Runner, Scheduler, environment
from tests.fakes.ollama_store import DETAILS, NotFound, Store

VERSION = "0.32.15"
Json = dict[str, Any]
_RECORDED = Path(__file__).parent.parent / "data" / "logs" / "ollama"
_KEEP_ALIVE_S = 300
_WHOLE_NUMBERS = ("num_ctx", "num_gpu", "num_batch", "main_gpu", "num_predict")


class Server(ThreadingHTTPServer):
    """Accepts connections as soon as it is made; answers only once `serve_forever` runs."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], scheduler: Scheduler, store: Store) -> None:
        self.scheduler, self.store = scheduler, store
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        # Without the look-up of the host's name that http.server makes here.
        socket.socket.setsockopt(self.socket, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "localhost", int(self.socket.getsockname()[1])

    def handle_error(self, request: object, client_address: object) -> None:
        pass


class _Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name http.server uses
        pass

    def do_HEAD(self) -> None:
        if self.path.startswith("/api/blobs/"):
            found = self.server.store.blob(self.path.removeprefix("/api/blobs/")).is_file()
            self._send(200 if found else 404, None)
        else:
            self._send(200 if self.path in ("/", "/api/version", "/api/tags") else 404, None)

    def do_GET(self) -> None:
        store = self.server.store
        if "not-ollama" in self.server.scheduler.faults:
            self._send(200, "<html><body>It works!</body></html>", "text/html")
        elif self.path == "/":
            self._send(200, "Ollama is running", "text/plain; charset=utf-8")
        elif self.path == "/api/version":
            self._send(200, {"version": VERSION})
        elif self.path == "/api/status":
            self._send(200, {"cloud": {"disabled": bool(environment("OLLAMA_NO_CLOUD")), "source": "env"}})
        elif self.path == "/api/tags":
            self._send(200, {"models": [store.described(name) for name in store.names()]})
        elif self.path == "/api/ps":
            runners = list(self.server.scheduler.runners.values())
            self._send(200, {"models": [runner.described() for runner in runners]})
        elif self.path == "/v1/models":
            entries = [{"id": name, "object": "model", "created": 1, "owned_by": "library"} for name in store.names()]
            self._send(200, {"object": "list", "data": entries})
        else:
            self._send(404, "404 page not found", "text/plain")

    def do_POST(self) -> None:
        begun = time.monotonic()
        content = (
            self.rfile.read(int(self.headers.get("Content-Length") or 0)) if not self._chunked() else self._chunks()
        )
        handlers = {
            "/api/show": self._show,
            "/api/pull": self._pull,
            "/api/create": self._create,
            "/api/generate": self._generate,
            "/api/chat": self._chat,
            "/v1/chat/completions": self._openai,
        }
        openai = self.path.startswith("/v1/")
        status = 200
        try:
            if "not-ollama" in self.server.scheduler.faults:
                raise _Refused(405, "not here")
            if self.path.startswith("/api/blobs/"):
                self._blob(self.path.removeprefix("/api/blobs/"), content)
            elif self.path in handlers:
                handlers[self.path](json.loads(content))
            else:
                self._send(404, "404 page not found", "text/plain")
        except NotFound as error:
            status = 404
            self._fail(404, f"model '{error}' not found", openai=openai)
        except LoadFailed as error:
            status = 500
            self._fail(500, str(error), openai=openai)
        except _Refused as error:
            status = error.status
            self._fail(error.status, error.message, openai=openai)
        except ValueError as error:
            status = 400
            self._fail(400, str(error), openai=openai)
        except OSError:
            self.close_connection = True
            self.connection.close()
        now = datetime.now(UTC).strftime("%Y/%m/%d - %H:%M:%S")
        took = f"{time.monotonic() - begun:.6f}s"
        say(f'[GIN] {now} | {status} | {took:>13} | {self.client_address[0]:>15} | POST     "{self.path}"')

    def do_DELETE(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        self._fail(404, f"model '{body.get('model')}' not found", openai=False)

    def _show(self, request: Json) -> None:
        name = str(request.get("model"))
        path = self.server.store.model_file(name)
        recorded: Json = json.loads((_RECORDED / "show.json").read_text(encoding="utf-8"))
        self._send(200, {**recorded, "modelfile": f"FROM {path}", "details": DETAILS})

    def _pull(self, request: Json) -> None:
        records = self.server.store.pull(str(request.get("model") or request.get("name")), self.server.scheduler.faults)
        self._records(records, stream=request.get("stream", True))

    def _blob(self, digest: str, content: bytes) -> None:
        if self.server.store.blob(digest).is_file():
            self._send(200, None)
        elif self.server.store.receive(digest, content):
            self._send(201, None)
        else:
            raise _Refused(400, "digest mismatch, expected " + digest)

    def _create(self, request: Json) -> None:
        self._records(self._creating(request), stream=request.get("stream", True))

    def _creating(self, request: Json) -> Iterator[Json]:
        store, name = self.server.store, str(request["model"])
        if base := request.get("from"):
            digest = store.manifest(base)["layers"][0]["digest"]
            yield {"status": f"using existing layer {digest}"}
        elif files := request.get("files"):
            digest = str(next(iter(files.values())))
            if not store.blob(digest).is_file():
                yield {"error": f"blob {digest} not found"}
                return
            with store.blob(digest).open("rb") as file:
                if file.read(4) != b"GGUF":
                    yield {"error": "unsupported content type: unknown"}
                    return
            yield {"status": "parsing GGUF"}
            yield {"status": "verifying conversion"}
            yield {"status": f"creating new layer {digest}"}
            yield {"status": "using autodetected template chatml"}
        else:
            raise _Refused(400, "neither 'from' or 'files' was specified")
        yield {"status": "writing manifest"}
        store.write(name, digest, request.get("parameters") or {})
        yield {"status": "success"}

    def _generate(self, request: Json) -> None:
        name = str(request.get("model"))
        if not request.get("prompt"):
            keep_alive = request.get("keep_alive")
            if keep_alive == 0:
                self.server.store.manifest(name)
                self.server.scheduler.unload(name)
                self._send(200, _entry(name, response="", done=True, done_reason="unload"))
            else:
                self._runner(request)
                self._send(200, _entry(name, response="", done=True, done_reason="load"))
            return
        messages = [{"role": "user", "content": request["prompt"]}]
        self._records(self._answer({**request, "messages": messages}, chat=False), stream=request.get("stream", True))

    def _chat(self, request: Json) -> None:
        if not request.get("messages"):
            self._runner(request)
            message = {"role": "assistant", "content": ""}
            self._send(200, _entry(str(request.get("model")), message=message, done=True, done_reason="load"))
            return
        self._records(self._answer(request, chat=True), stream=request.get("stream", True))

    def _runner(self, request: Json) -> Runner:
        options = request.get("options") or {}
        for name in _WHOLE_NUMBERS:
            if name in options and (not isinstance(options[name], int) or isinstance(options[name], bool)):
                raise _Refused(500, f'option "{name}" must be of type integer')
        keep_alive = request.get("keep_alive")
        if keep_alive is None:
            keep_alive = -1 if environment("OLLAMA_KEEP_ALIVE").startswith("-") else _KEEP_ALIVE_S
        seconds = float(keep_alive) if isinstance(keep_alive, (int, float)) and keep_alive >= 0 else 1e9
        return self.server.scheduler.runner(str(request.get("model")), options, seconds)

    def _answer(self, request: Json, *, chat: bool) -> Iterator[Json]:
        """An answer in Ollama's records, generated by the runner."""
        begun = time.monotonic_ns()
        runner, name = self._runner(request), str(request.get("model"))
        load_ns = time.monotonic_ns() - begun
        wanted = (request.get("options") or {}).get("num_predict")
        pieces = _from_runner(runner.port, request["messages"], wanted)
        timings: Json = {}
        for piece, told in pieces:
            timings = told or timings
            if piece is None:
                yield {"error": "llama-server process no longer running: -1"}
                return
            if piece:
                yield _entry(name, **_piece(piece, chat=chat), done=False)
        yield _entry(
            name,
            **_piece("", chat=chat),
            done=True,
            done_reason=timings["finish_reason"],
            total_duration=time.monotonic_ns() - begun,
            load_duration=load_ns,
            prompt_eval_count=timings["prompt_n"],
            prompt_eval_duration=int(timings["prompt_ms"] * 1e6),
            eval_count=timings["predicted_n"],
            eval_duration=int(timings["predicted_ms"] * 1e6),
        )

    def _openai(self, request: Json) -> None:
        options = {"num_predict": request["max_tokens"]} if request.get("max_tokens") else {}
        records = list(self._answer({**request, "options": options}, chat=True))
        if "error" in records[-1]:
            raise _Refused(500, records[-1]["error"])
        last = records[-1]
        usage = {"prompt_tokens": last["prompt_eval_count"], "completion_tokens": last["eval_count"]}
        usage["total_tokens"] = sum(usage.values())
        head = {
            "id": "chatcmpl-235",
            "created": int(time.time()),
            "model": request["model"],
            "system_fingerprint": "fp_ollama",
        }
        if not request.get("stream"):
            text = "".join(record["message"]["content"] for record in records)
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": last["done_reason"]}
            self._send(200, {**head, "object": "chat.completion", "choices": [choice], "usage": usage})
            return
        chunks: list[Json] = [
            {"index": 0, "delta": {"role": "assistant", "content": record["message"]["content"]}, "finish_reason": None}
            for record in records[:-1]
        ]
        chunks.append({"index": 0, "delta": {}, "finish_reason": last["done_reason"]})
        head["object"] = "chat.completion.chunk"
        self._begin("text/event-stream")
        for choice in chunks:
            self._chunk(f"data: {json.dumps({**head, 'choices': [choice]})}\n\n")
        if (request.get("stream_options") or {}).get("include_usage"):
            self._chunk(f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n")
        self._chunk("data: [DONE]\n\n")
        self._chunk("")

    def _records(self, records: Iterator[Json], *, stream: bool) -> None:
        """NDJSON or, without a stream, the last record with everything in it. An error of a stream is a record."""
        if stream:
            first = next(records)
            self._begin("application/x-ndjson")
            self._chunk(json.dumps(first) + "\n")
            for record in records:
                self._chunk(json.dumps(record) + "\n")
            self._chunk("")
            return
        everything = list(records)
        last = everything[-1]
        if "error" in last:
            raise _Refused(500, last["error"])
        if "message" in last:
            last["message"]["content"] = "".join(record["message"]["content"] for record in everything)
        elif "response" in last:
            last["response"] = "".join(record["response"] for record in everything)
        self._send(200, last)

    def _chunked(self) -> bool:
        return self.headers.get("Transfer-Encoding", "").lower() == "chunked"

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _begin(self, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _send(self, status: int, body: object, content_type: str = "application/json; charset=utf-8") -> None:
        text = "" if body is None else body if isinstance(body, str) else json.dumps(body)
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _fail(self, status: int, message: str, *, openai: bool) -> None:
        kind = "not_found_error" if status == 404 else "api_error"
        body = {"message": message, "type": kind, "param": None, "code": None}
        self._send(status, {"error": body if openai else message})


def _entry(name: str, **more: object) -> Json:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return {"model": name, "created_at": now, **more}


def _piece(text: str, *, chat: bool) -> Json:
    return {"message": {"role": "assistant", "content": text}} if chat else {"response": text}


def _from_runner(port: int, messages: object, wanted: int | None) -> Iterator[tuple[str | None, Json]]:
    """The runner's answer piece by piece, with its timings at the end; None when the runner went away."""
    body: Json = {"messages": messages, "stream": True, **({"max_tokens": wanted} if wanted and wanted > 0 else {})}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    finish_reason = "stop"
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        answer = connection.getresponse()
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            choice = chunk["choices"][0]
            finish_reason = choice.get("finish_reason") or finish_reason
            yield choice["delta"].get("content") or "", {}
            if "timings" in chunk:
                yield "", {**chunk["timings"], "finish_reason": finish_reason}
                return
        yield None, {}
    except (OSError, http.client.HTTPException):
        yield None, {}
    finally:
        connection.close()
