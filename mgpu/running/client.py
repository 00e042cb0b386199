"""Talking to a running engine over HTTP: is it up, does it answer, how busy is it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from mgpu.backends.backend import Backend
from mgpu.backends.samples import Sample
from mgpu.errors import EngineFailed

if TYPE_CHECKING:
    import httpx

# A question mgpu asks for itself: short, and answerable by any model, with or without a chat template.
CANARY_PROMPT = "Hello, my name is"
SECOND_PROMPT = "The capital of France is"
CANARY_TOKENS = 8
_POLL_TIMEOUT_S = 5.0
# The first token of a large model on slow memory with a long queue before it.
_ANSWER_TIMEOUT_S = 600.0
_LONGEST_MESSAGE = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """An engine's answer to a question of mgpu's: its text, how long it took, and the engine's own rate (None when not
    said). `cut_off` says that the engine had more to say than it was asked for."""

    text: str
    seconds: float
    generation_tok_s: float | None
    cut_off: bool = False

    @property
    def repeated(self) -> str | None:
        """The one character or word that it is again and again, as broken peer access makes it; "" where all of its
        tokens are without text, which is more than an answer that ended at once; None for any other."""
        if not self.text:
            return "" if self.cut_off else None
        words = self.text.split()
        if len(self.text) > 3 and len(set(self.text)) == 1:
            return self.text[0]
        return words[0] if len(words) > 3 and len(set(words)) == 1 else None

    @property
    def one_token_repeated(self) -> bool:
        """Whether a text is one character or one word again and again."""
        return bool(self.repeated)


class Refused(EngineFailed):
    """An answer with an HTTP status that means no."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"the engine refused the request (HTTP {status}): {message}", code="wrong-answer")
        self.status = status


class Thought(str):
    """A piece of what a model thinks before it answers."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The end of a streamed answer: what the engine counted. `timed_by_engine` is False where the rates are by the
    clock of whoever reads the answer."""

    prompt_tokens: int | None
    generated_tokens: int | None
    prompt_tok_s: float | None
    generation_tok_s: float | None
    finish_reason: str | None
    timed_by_engine: bool = True


class Link(Protocol):
    """A connection to a running engine, which listens on `port`, and the one model in it that is meant."""

    @property
    def port(self) -> int:
        """The port."""

    def is_up(self) -> bool:
        """Whether the engine says that it takes requests (which is no proof that it can compute)."""

    def canary(self, prompt: str = CANARY_PROMPT, *, patience_s: float | None = None) -> Canary:
        """Ask for a few tokens and return the answer; wait `patience_s` for it at most. Raises EngineFailed."""

    def sample(self) -> Sample | None:
        """Return a reading of the engine's counters now, None when it does not answer."""

    def ask(self, text: str, *, max_tokens: int | None = None) -> Iterator[str | Answer]:
        """Stream one chat answer: its text piece by piece, and at the end an Answer. Raises EngineFailed."""


def connecting(url: str) -> dict[str, Any]:
    """Return how an httpx client connects to the engine at `url`: past proxies, and anew for each request.

    A connection that is kept may be closed by the engine, which does so after some seconds, in the moment of the next
    request: that looks like an engine that has died over it. And the system's certificates are read for https alone:
    they are some megabytes, of which every reading leaves a part behind, too much where an engine is started again for
    months.
    """
    import ssl

    import httpx

    encrypted = url.startswith("https:")
    certificates = httpx.create_ssl_context(trust_env=False) if encrypted else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return {"trust_env": False, "verify": certificates, "limits": httpx.Limits(max_keepalive_connections=0)}


class EngineClient:
    """A connection to one engine, which serves `model`; a context manager.

    Proxies in the environment are ignored: the engine is local. `api_key` may be several, separated by commas, as
    llama-server takes them; the first is used.
    """

    def __init__(self, url: str, backend: Backend, *, model: str, api_key: str | None = None) -> None:
        import httpx

        headers = httpx.Headers(
            {"Authorization": f"Bearer {api_key.split(',')[0]}"} if api_key else {}, encoding="utf-8"
        )
        self._http = httpx.Client(base_url=url, headers=headers, timeout=_POLL_TIMEOUT_S, **connecting(url))
        self._backend = backend
        self._model = model

    @property
    def port(self) -> int:
        """The port the engine is to listen on."""
        return self._http.base_url.port or 80

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def is_up(self) -> bool:
        """Whether the engine says that its model is loaded (which is no proof that it can compute)."""
        return self._get(self._backend.ready_path) is not None

    def canary(self, prompt: str = CANARY_PROMPT, *, patience_s: float | None = None) -> Canary:
        """Ask for a few tokens and return the answer; wait `patience_s` for it at most.

        Raises EngineFailed (code "wrong-answer" for anything but a completion, "engine-died" when the connection
        breaks, "no-answer" when none comes).
        """
        body = {"model": self._model, "prompt": prompt, "max_tokens": CANARY_TOKENS, "temperature": 0}
        begun = time.monotonic()
        reply = self._post("/v1/completions", body, patience_s or _ANSWER_TIMEOUT_S)
        seconds = time.monotonic() - begun
        choice = _first(reply.get("choices"))
        text = choice.get("text")
        if not isinstance(text, str):
            raise EngineFailed("the engine answered with something that is not a completion", code="wrong-answer")
        return Canary(
            text=text,
            seconds=seconds,
            generation_tok_s=_number(_timings(reply).get("predicted_per_second")),
            cut_off=choice.get("finish_reason") == "length",
        )

    def sample(self) -> Sample | None:
        """Return a reading of the engine's counters now, None when it does not answer."""
        return self._backend.sample(time.monotonic(), self._get)

    def ask(self, text: str, *, max_tokens: int | None = None) -> Iterator[str | Answer]:
        """Stream one chat answer, of `max_tokens` at most: its text piece by piece, what a reasoning model thinks
        as Thoughts before it, and at the end an Answer.

        Raises EngineFailed as `canary` does.
        """
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": text}],
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"max_tokens": max_tokens} if max_tokens else {}),
        }
        timings: dict[str, Any] = {}
        usage: dict[str, Any] = {}
        finish_reason = None
        begun = time.monotonic()
        first_at = None
        with (
            _engine_errors(),
            self._http.stream("POST", "/v1/chat/completions", json=body, timeout=_ANSWER_TIMEOUT_S) as reply,
        ):
            if reply.status_code != 200:
                reply.read()
                raise _refused(reply)
            for line in reply.iter_lines():
                chunk = _chunk(line)
                timings = _timings(chunk) or timings
                usage = _object(chunk.get("usage")) or usage
                choice = _first(chunk.get("choices"))
                finish_reason = choice.get("finish_reason") or finish_reason
                delta = _object(choice.get("delta"))
                thought, piece = delta.get("reasoning_content") or delta.get("reasoning"), delta.get("content")
                if (thought or piece) and first_at is None:
                    first_at = time.monotonic()
                if thought:
                    yield Thought(thought)
                if piece:
                    yield str(piece)
                if line == "data: [DONE]":
                    break
        yield _answer(timings, usage, finish_reason, _Clock(begun, first_at, time.monotonic()))

    def _get(self, path: str) -> str | None:
        return got(self._http, path)

    def _post(self, path: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        with _engine_errors():
            reply = self._http.post(path, json=body, timeout=timeout_s)
            if reply.status_code != 200:
                raise _refused(reply)
        return _parsed(reply.text)


def got(http: httpx.Client, path: str) -> str | None:
    """Return the body of a 200 answer, None for anything else."""
    import httpx

    try:
        reply = http.get(path)
    except httpx.HTTPError:
        return None
    return reply.text if reply.status_code == 200 else None


def whole(value: object) -> int | None:
    """Return a number of JSON's if it is a whole one, None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


@dataclass(frozen=True, slots=True)
class _Clock:
    """When a question was asked, and when the first and the last piece of its answer came (monotonic seconds)."""

    asked_at: float
    first_at: float | None
    last_at: float

    def prompt_rate(self, tokens: int | None) -> float | None:
        """Tokens of the prompt per second until the first piece."""
        return _per_second(tokens, self.first_at - self.asked_at) if self.first_at else None

    def generation_rate(self, tokens: int | None) -> float | None:
        """Tokens per second after the first one, which the prompt's time brought forth."""
        return _per_second(tokens - 1, self.last_at - self.first_at) if tokens and self.first_at else None


def _answer(timings: dict[str, Any], usage: dict[str, Any], finish_reason: Any, clock: _Clock) -> Answer:
    """The end of an answer by the engine's own clock where it tells (llama-server does), else by ours."""
    prompt = whole(timings.get("prompt_n", usage.get("prompt_tokens")))
    generated = whole(timings.get("predicted_n", usage.get("completion_tokens")))
    if timings:
        prompt_rate = _number(timings.get("prompt_per_second"))
        generation_rate = _number(timings.get("predicted_per_second"))
    else:
        prompt_rate, generation_rate = clock.prompt_rate(prompt), clock.generation_rate(generated)
    return Answer(
        prompt_tokens=prompt,
        generated_tokens=generated,
        prompt_tok_s=prompt_rate,
        generation_tok_s=generation_rate,
        finish_reason=finish_reason,
        timed_by_engine=bool(timings),
    )


def _per_second(tokens: int | None, seconds: float) -> float | None:
    return tokens / seconds if tokens and seconds > 0 else None


@contextlib.contextmanager
def _engine_errors() -> Iterator[None]:
    """Turn what breaks on the wire into EngineFailed."""
    import httpx

    try:
        yield
    except httpx.TimeoutException:
        raise EngineFailed(
            "the engine took a request and never answered",
            code="no-answer",
            hint="a card or RPC server that hangs looks like this; mgpu backends shows whether each still answers",
        ) from None
    except httpx.HTTPError:
        raise EngineFailed("the engine closed the connection without an answer", code="engine-died") from None


def _refused(reply: httpx.Response) -> Refused:
    message = _error_message(_parsed(reply.text)) or reply.text[:_LONGEST_MESSAGE]
    return Refused(reply.status_code, message)


def _chunk(line: str) -> dict[str, Any]:
    """The object of one line of a stream; an error is raised, in the middle of an answer or not."""
    field, _, value = line.partition(":")
    chunk = _parsed(value)
    if message := _error_message({"error": chunk} if field == "error" else chunk):
        raise EngineFailed(f"the engine broke off: {message}", code="wrong-answer")
    return chunk if field == "data" else {}


def _error_message(reply: dict[str, Any]) -> str | None:
    error = reply.get("error")
    if not error:
        return None
    return str(_object(error).get("message") or error)[:_LONGEST_MESSAGE]


def _timings(reply: dict[str, Any]) -> dict[str, Any]:
    return _object(reply.get("timings"))


def _parsed(text: str) -> dict[str, Any]:
    try:
        return _object(json.loads(text))
    except (ValueError, RecursionError):
        return {}


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _first(values: object) -> dict[str, Any]:
    return _object(values[0]) if isinstance(values, list) and values else {}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
