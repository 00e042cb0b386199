"""llama-server's endpoints, with bodies shaped like the recorded ones in `tests/data/logs/llama_cpp`."""

from __future__ import annotations

import json
import re
import secrets
import select
import socket
import string
import time
from collections.abc import Callable
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.fakes.llama_server_engine import Answer, Engine

Json = dict[str, Any]
_OPEN_PATHS = ("/health", "/v1/health", "/models", "/v1/models", "/")
_COMPLETION_PATHS = ("/completion", "/v1/completions", "/chat/completions", "/v1/chat/completions")
_RECORDED = Path(__file__).parent.parent / "data" / "logs" / "llama_cpp"


class Server(ThreadingHTTPServer):
    """Listens as soon as it is made; every answer is 503 until `engine.ready`."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 512

    def __init__(self, engine: Engine, on_request: Callable[[], None]) -> None:
        self.engine = engine
        self.on_request = on_request
        super().__init__((engine.settings.host, engine.settings.port), Handler)

    def server_bind(self) -> None:
        # Without the look-up of the host's name that http.server makes here.
        socket.socket.setsockopt(self.socket, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "localhost", self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        pass


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name http.server uses
        pass

    def version_string(self) -> str:
        return "llama.cpp"

    def do_GET(self) -> None:
        engine, path = self.server.engine, self.path.split("?")[0]
        if not self._admitted(path):
            return
        settings = engine.settings
        if path in ("/health", "/v1/health"):
            self._send(200, {"status": "ok"})
        elif path in ("/models", "/v1/models"):
            self._send(200, _models(engine))
        elif path == "/props":
            self._send(200, _props(engine))
        elif path == "/slots" and settings.slots_endpoint:
            if "fail_on_no_slot=1" in self.path and engine.processing == settings.slots:
                self._fail(503, "no slot available", "unavailable_error")
            else:
                self._send(200, [_slot(engine, index) for index in range(settings.slots)])
        elif path == "/metrics" and settings.metrics:
            self._send(200, _metrics(engine), content_type="text/plain; version=0.0.4")
        elif path in ("/metrics", "/slots"):
            feature = path[1:]
            text = f"This server does not support {feature} endpoint. Start it with `--{feature}`"
            self._fail(501, text, "not_supported_error")
        else:
            self._fail(404, "File Not Found", "not_found_error")

    def do_POST(self) -> None:
        path = self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self._admitted(path):
            return
        if path not in (*_COMPLETION_PATHS, "/tokenize"):
            self._fail(404, "File Not Found", "not_found_error")
            return
        try:
            request = json.loads(body)
        except ValueError as error:
            self._fail(500, f"[json.exception.parse_error.101] parse error: {error}", "server_error")
            return
        if path == "/tokenize":
            words = str(request.get("content", "")).split()
            self._send(200, {"tokens": [len(word) for word in words]})
            return
        chat = "chat" in path
        if chat and "messages" not in request:
            self._fail(400, "'messages' is required", "invalid_request_error")
        elif chat and not isinstance(request["messages"], list):
            self._fail(400, "Expected 'messages' to be an array", "invalid_request_error")
        else:
            self._complete(request, chat=chat, native=path == "/completion")

    def _admitted(self, path: str) -> bool:
        engine = self.server.engine
        if not engine.ready:
            self._fail(503, "Loading model", "unavailable_error")
            return False
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        keys = engine.settings.api_keys
        if keys and path not in _OPEN_PATHS and not {given, self.headers.get("x-api-key", "")} & set(keys):
            self._fail(401, "Invalid API Key", "authentication_error")
            return False
        return True

    def _complete(self, request: Json, *, chat: bool, native: bool) -> None:
        engine = self.server.engine
        prompt = json.dumps(request.get("messages" if chat else "prompt", ""))
        prompt_tokens = len(prompt.split())
        if prompt_tokens > engine.ctx_per_slot:
            text = (
                f"request ({prompt_tokens} tokens) exceeds the available context size "
                f"({engine.ctx_per_slot} tokens), try increasing it"
            )
            extra = {"n_prompt_tokens": prompt_tokens, "n_ctx": engine.ctx_per_slot}
            self._fail(400, text, "exceed_context_size_error", **extra)
            return
        self.server.on_request()
        limits = (request.get(name) for name in ("max_tokens", "max_completion_tokens", "n_predict"))
        wanted = next(filter(None, limits), 1 << 30)
        answer = engine.begin(prompt_tokens, int(wanted), endless=bool(request.get("ignore_eos")))
        try:
            if request.get("stream") and not native:
                self._stream(request, answer, chat=chat)
            else:
                self._answer_at_once(answer, chat=chat, native=native)
        except OSError:
            self.close_connection = True
        finally:
            engine.end(answer)

    def _answer_at_once(self, answer: Answer, *, chat: bool, native: bool) -> None:
        engine = self.server.engine
        text = "".join(engine.words(answer))
        if engine.stopping.is_set():
            self._wait_for_the_client_to_leave(None)
            return
        if native:
            self._send(200, _native(engine, answer, text))
            return
        choice = {"finish_reason": answer.finish_reason, "index": 0}
        if chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": answer.finish_reason}
        body = _head(engine, choice, "chat.completion" if chat else "text_completion")
        self._send(200, {**body, "usage": _usage(answer), "id": _id(), "timings": answer.timings()})

    def _stream(self, request: Json, answer: Answer, *, chat: bool) -> None:
        engine, identity = self.server.engine, _id()
        kind = "chat.completion.chunk" if chat else "text_completion"
        self.send_response(200)
        self.send_header("X-Accel-Buffering", "no")
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

        def chunk(choice: Json | None, **more: object) -> None:
            body = {**_head(engine, choice, kind), "id": identity, **more}
            self._event(json.dumps(body, separators=(",", ":")))

        def delta(text: str | None, finish_reason: str | None = None, **role: str) -> Json:
            if not chat:
                return {"text": text or "", "index": 0, "logprobs": None, "finish_reason": finish_reason}
            content = {} if finish_reason else {**role, "content": text}
            return {"finish_reason": finish_reason, "index": 0, "delta": content}

        first = delta(None, role="assistant")
        if request.get("return_progress"):
            total = answer.prompt_tokens
            progress = {"total": total, "cache": 0, "processed": total, "time_ms": int(answer.prompt_ms)}
            chunk(first, prompt_progress=progress)
        if chat:
            chunk(first)
        for word in engine.words(answer):
            timed = request.get("timings_per_token")
            chunk(delta(word), **({"timings": answer.timings()} if timed else {}))
        if engine.stopping.is_set():
            self._wait_for_the_client_to_leave(answer)
            return
        last = delta(None, answer.finish_reason)
        if (request.get("stream_options") or {}).get("include_usage"):
            chunk(last)
            chunk(None, usage=_usage(answer), timings=answer.timings())
        else:
            chunk(last, timings=answer.timings())
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _wait_for_the_client_to_leave(self, stream: Answer | None) -> None:
        """What happens to a request in flight when the server is told to stop: a stream ends at its next
        ping; an answer in one piece never comes, and the server waits until the client hangs up."""
        self.close_connection = True
        ping = self.server.engine.settings.ping_seconds
        deadline = None
        if stream is not None and ping > 0:
            lasted = time.monotonic() - stream.started
            deadline = time.monotonic() + ping - lasted % ping
        while deadline is None or time.monotonic() < deadline:
            readable, _, _ = select.select([self.connection], [], [], 0.02)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                return

    def _event(self, data: str) -> None:
        line = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))

    def _send(self, status: int, body: object, content_type: str = "application/json; charset=utf-8") -> None:
        text = body if isinstance(body, str) else json.dumps(body, separators=(",", ":"))
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        if status != 200:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def _fail(self, status: int, message: str, kind: str, **more: object) -> None:
        self._send(status, {"error": {"message": message, "type": kind, "code": status, **more}})


@cache
def _recorded(name: str) -> str:
    return (_RECORDED / name).read_text(encoding="utf-8")


def _id() -> str:
    letters = string.ascii_letters + string.digits
    return "chatcmpl-" + "".join(secrets.choice(letters) for _ in range(32))


def _head(engine: Engine, choice: Json | None, kind: str) -> Json:
    return {
        "choices": [choice] if choice else [],
        "created": int(time.time()),
        "model": engine.settings.alias,
        "system_fingerprint": "b1-7e4c0a9",
        "object": kind,
    }


def _native(engine: Engine, answer: Answer, text: str) -> Json:
    return {
        "index": 0,
        "content": text,
        "tokens": [],
        "id_slot": answer.slot.id,
        "stop": True,
        "model": engine.settings.alias,
        "tokens_predicted": answer.predicted,
        "tokens_evaluated": answer.prompt_tokens,
        "truncated": False,
        "stop_type": "limit" if answer.finish_reason == "length" else "eos",
        "timings": answer.timings(),
    }


def _usage(answer: Answer) -> Json:
    return {
        "completion_tokens": answer.predicted,
        "prompt_tokens": answer.prompt_tokens,
        "total_tokens": answer.prompt_tokens + answer.predicted,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def _models(engine: Engine) -> Json:
    body: Json = json.loads(_recorded("v1_models.json"))
    alias = engine.settings.alias
    body["models"][0].update(name=alias, model=alias)
    body["data"][0].update(id=alias, aliases=[alias], created=int(time.time()))
    body["data"][0]["meta"]["n_ctx"] = engine.ctx_per_slot
    return body


def _props(engine: Engine) -> Json:
    body: Json = json.loads(_recorded("props.json"))
    settings = engine.settings
    body["default_generation_settings"]["n_ctx"] = engine.ctx_per_slot
    body.update(total_slots=settings.slots, model_alias=settings.alias, model_path=settings.model)
    body["endpoint_metrics"] = settings.metrics
    return body


def _slot(engine: Engine, index: int) -> Json:
    slot, recorded = engine.slots[index], json.loads(_recorded("slots_busy.json"))[1]
    body: Json = {"id": index, "n_ctx": engine.ctx_per_slot, "speculative": False, "is_processing": slot.busy}
    if slot.task is None:
        return body
    left = min(slot.wanted, engine.ctx_per_slot) - slot.decoded
    progress = {"has_next_token": slot.busy, "has_new_line": False, "n_remain": left, "n_decoded": slot.decoded}
    return {
        **body,
        "id_task": slot.task,
        "n_prompt_tokens": slot.prompt_tokens + slot.decoded,
        "n_prompt_tokens_processed": slot.prompt_tokens if slot.busy else 0,
        "n_prompt_tokens_cache": 0,
        "params": recorded["params"],
        "next_token": [progress],
    }


def _metrics(engine: Engine) -> str:
    counters = engine.counters
    values = {
        "prompt_tokens_total": counters.prompt_tokens,
        "prompt_tokens_cached_total": 0,
        "prompt_seconds_total": round(counters.prompt_seconds, 6),
        "tokens_predicted_total": counters.predicted,
        "tokens_predicted_seconds_total": round(counters.predicted_seconds, 6),
        "n_decode_total": counters.decodes,
        "n_tokens_max": counters.largest,
        "prompt_tokens_seconds": round(counters.prompt_tokens / (counters.prompt_seconds or 1), 3),
        "predicted_tokens_seconds": round(counters.predicted / (counters.predicted_seconds or 1), 3),
        "requests_processing": engine.processing,
        "requests_deferred": engine.deferred,
        "n_busy_slots_per_decode": 1,
    }
    return re.sub(
        r"(?m)^llamacpp:(\w+) .*$",
        lambda match: f"llamacpp:{match[1]} {values.get(match[1], 0)}",
        _recorded("metrics.txt"),
    )
