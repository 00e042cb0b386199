"""vLLM's endpoints. A key guards what begins with /v1; health, metrics and the version are open to everybody."""

from __future__ import annotations

import json
import queue
import secrets
import select
import socket
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.fakes import vllm_answers as answers
from tests.fakes.vllm_answers import Answer, Json
from tests.fakes.vllm_log_lines import Log
from tests.fakes.vllm_requests import Choice, Piece, Requests
from tests.fakes.vllm_worker import Load

_GET_PATHS = ("/health", "/ping", "/version", "/metrics", "/load", "/v1/models")
_COMPLETIONS = ("/v1/completions", "/v1/chat/completions")
_POST_PATHS = (*_COMPLETIONS, "/tokenize", "/ping")
ROUTES = dict.fromkeys(_GET_PATHS, "GET") | dict.fromkeys((*_COMPLETIONS, "/tokenize"), "POST")
_POLL_S = 0.05


class Server(ThreadingHTTPServer):
    """Bound when it is made, before anything is loaded; listens, and so takes connections, after `begin`."""

    daemon_threads = True
    request_queue_size = 512
    requests: Requests
    load: Load

    def __init__(self, host: str | None, port: int, log: Log) -> None:
        self.log = log
        self.mark = secrets.token_hex(4)
        self.address_family = socket.AF_INET6 if ":" in (host or "") else socket.AF_INET
        super().__init__((host or "0.0.0.0", port), Handler, bind_and_activate=False)
        self.server_bind()

    def server_bind(self) -> None:
        # Without the look-up of the host's name that http.server makes here.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "localhost", self.server_address[1]

    def begin(self, load: Load, requests: Requests) -> None:
        self.load, self.requests = load, requests
        self.server_activate()

    def handle_error(self, request: object, client_address: object) -> None:
        pass


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def version_string(self) -> str:
        return "uvicorn"

    def log_request(self, code: object = "-", size: object = "-") -> None:
        status = HTTPStatus(int(str(int(code) if isinstance(code, int) else code)))
        where = f"{self.client_address[0]}:{self.client_address[1]}"
        self.server.log.plain(f'INFO:     {where} - "{self.requestline}" {status.value} {status.phrase}')

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name http.server uses
        pass

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if not self._admitted(path, _GET_PATHS, _POST_PATHS):
            return
        requests, load = self.server.requests, self.server.load
        if path in ("/health", "/ping"):
            self._send(200 if requests.dead_since is None else 503, None)
        elif path == "/version":
            self._send(200, {"version": load.version})
        elif path == "/load":
            self._send(200, {"server_load": 0})
        elif path == "/v1/models":
            self._send(200, answers.models(load.settings))
        else:
            text = answers.metrics(load.settings, load.memory, requests.counters)
            self._send(200, text, content_type="text/plain; version=1.0.0; charset=utf-8")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0]
        if not self._admitted(path, _POST_PATHS, _GET_PATHS):
            return
        if path == "/ping":
            self._send(200, None)
            return
        try:
            request = json.loads(body)
        except ValueError as error:
            why = str(error).partition(":")[0]
            nothing: Json = {}
            told = answers.invalid("body.1", "json_invalid", "JSON decode error", nothing, ctx={"error": why})
            self._send(400, told)
            return
        if not isinstance(request, dict):
            what = "Input should be a valid dictionary or object to extract fields from"
            self._send(400, answers.invalid("body", "model_attributes_type", what, request))
        elif path == "/tokenize":
            tokens = list(str(request.get("prompt", "")).encode())
            longest = self.server.load.settings.max_model_len
            self._send(200, {"count": len(tokens), "max_model_len": longest, "tokens": tokens, "token_strs": None})
        elif refused := self._refusal(request, chat="chat" in path):
            self._send(refused["error"]["code"], refused)
        else:
            self._complete(request, chat="chat" in path)

    def _admitted(self, path: str, right: tuple[str, ...], other: tuple[str, ...]) -> bool:
        keys = self.server.load.settings.api_keys
        given = self.headers.get("Authorization", "")
        if keys and path.startswith("/v1") and given not in {f"Bearer {key}" for key in keys}:
            self._send(401, {"error": "Unauthorized"})
        elif path in right:
            return True
        elif path in other:
            self._send(405, {"detail": "Method Not Allowed"})
        else:
            self._send(404, {"detail": "Not Found"})
        return False

    def _refusal(self, request: Json, *, chat: bool) -> Json | None:
        """The error that a request deserves, None for a good one."""
        settings, longest = self.server.load.settings, self.server.load.settings.max_model_len or 0
        if chat and "messages" not in request:
            return answers.invalid("body.messages", "missing", "Field required", request)
        asked = request.get("model")
        if asked is not None and asked not in settings.names:
            aliases = ", ".join(settings.names)
            what = f"The model `{asked}` does not exist. Valid aliases: {aliases}."
            return answers.error(what, "NotFoundError", "model", 404)
        if chat and not isinstance(request["messages"], list):
            what = f"'{type(request['messages']).__name__}' object is not iterable"
            return answers.error(what, "BadRequestError", None, 400)
        if not chat and not request.get("prompt"):
            what = "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)"
            return answers.error(what, "BadRequestError", "prompt", 400)
        prompt = self._prompt_tokens(request, chat=chat)
        if prompt > longest:
            what = (
                f"This model's maximum context length is {longest} tokens. However, your prompt contains at least "
                f"{longest + 1} input tokens, which exceeds this limit even without any output tokens. Please reduce "
                f"the length of the input prompt. (parameter=input_tokens, value={longest + 1})"
            )
            return answers.error(what, "BadRequestError", "input_tokens", 400)
        wanted = _wanted(request)
        if wanted is not None and wanted < 1:
            what = f"max_tokens must be at least 1, got {wanted}. (parameter=max_tokens, value={wanted})"
            return answers.error(what, "BadRequestError", "max_tokens", 400)
        if wanted is not None and wanted > longest:
            what = f"max_tokens={wanted} cannot be greater than max_model_len={longest}. Please request fewer output"
            return answers.error(
                f"{what} tokens. (parameter=max_tokens, value={wanted})", "BadRequestError", "max_tokens", 400
            )
        return None

    def _prompt_tokens(self, request: Json, *, chat: bool) -> int:
        count = self.server.load.model.count_tokens
        if not chat:
            return count(str(request["prompt"]))
        turns = [f"<{each.get('role')}\n{each.get('content')}>\n" for each in request["messages"]]
        return count("".join(turns) + "<assistant\n")

    def _complete(self, request: Json, *, chat: bool) -> None:
        requests, load = self.server.requests, self.server.load
        if requests.dead_since is not None:
            self._send(500, answers.DEAD)
            return
        prompt = self._prompt_tokens(request, chat=chat)
        wanted = _wanted(request) or ((load.settings.max_model_len or prompt) if chat else 16)
        endless, count = bool(request.get("ignore_eos")), int(request.get("n") or 1)
        mark = answers.fingerprint(load.settings, load.version, self.server.mark)
        answer = Answer(chat=chat, model=str(request.get("model") or load.settings.names[0]), mark=mark,
                        prompt_tokens=prompt)  # fmt: skip
        asks_a_name = not chat and str(request["prompt"]).endswith("my name is")
        choices = requests.submit(prompt, wanted, endless=endless, count=count, asks_a_name=asks_a_name)
        requests.count_open(1)
        try:
            if request.get("stream"):
                self._stream(request, answer, choices)
            else:
                self._answer_at_once(answer, choices)
        except OSError:  # the client has left
            self.close_connection = True
        finally:
            requests.abort(choices)
            requests.count_open(-1)

    def _answer_at_once(self, answer: Answer, choices: list[Choice]) -> None:
        texts: list[tuple[str, str]] = []
        for choice in choices:
            text, reason = "", None
            while reason is None:
                piece = self._next(choice)
                text, reason = text + piece.text, piece.finish_reason
            texts.append((text, reason))
        if any(reason == "error" for _, reason in texts):
            self._send(500, answers.DEAD)
        else:
            self._send(200, answer.whole(texts, sum(choice.made for choice in choices)))

    def _stream(self, request: Json, answer: Answer, choices: list[Choice]) -> None:
        options: dict[str, Any] = request.get("stream_options") or {}
        usage, so_far = bool(options.get("include_usage")), bool(options.get("continuous_usage_stats"))
        first = self._next(choices[0])  # the status is not sent before there is something to send
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Vary", "Origin")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if answer.chat:
            for index in range(len(choices)):
                self._event(answer.opening(index, usage=so_far))
        made = 0
        for index, choice in enumerate(choices):
            piece = first if index == 0 else self._next(choice)
            while piece.finish_reason != "error":
                made += 1
                last = index == len(choices) - 1 and piece.finish_reason is not None
                count = made if so_far else None
                self._event(answer.chunk(index, piece.text, piece.finish_reason, made=count, last=last and not usage))
                if piece.finish_reason:
                    break
                piece = self._next(choice)
            else:
                self._event(answers.DEAD)
                break
        else:
            if usage:
                self._event(answer.closing(made))
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _next(self, choice: Choice) -> Piece:
        """The next token. Raises OSError once the client has left."""
        while True:
            try:
                return choice.pieces.get(timeout=_POLL_S)
            except queue.Empty:
                readable, _, _ = select.select([self.connection], [], [], 0)
                if readable and not self.connection.recv(1, socket.MSG_PEEK):
                    raise ConnectionResetError from None

    def _event(self, data: Json | str) -> None:
        text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"), ensure_ascii=False)
        line = f"data: {text}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))

    def _send(self, status: int, body: Json | str | None, content_type: str = "application/json") -> None:
        text = body if isinstance(body, str) else json.dumps(body, separators=(",", ":"), ensure_ascii=False)
        data = b"" if body is None else text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if data:
            self.send_header("Content-Type", content_type)
        self.end_headers()
        self.wfile.write(data)


def _wanted(request: Json) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        if request.get(name) is not None:
            return int(request[name])
    return None
