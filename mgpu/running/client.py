"""Talking to a running engine over HTTP: is it up, does it answer, how busy is it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from mgpu.backends.llama_cpp_metrics import Sample, sample
from mgpu.errors import EngineFailed

if TYPE_CHECKING:
    import httpx

# A question mgpu asks for itself: short, and answerable by any model, with or without a chat template.
_CANARY_PROMPT = "Hello, my name is"
_CANARY_TOKENS = 8
_POLL_TIMEOUT_S = 5.0
# The first token of a large model on slow memory with a long queue before it.
_ANSWER_TIMEOUT_S = 600.0
_LONGEST_MESSAGE = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """An engine's first answer: its text, how long it took, and the engine's own rate (None when not said)."""

    text: str
    seconds: float
    generation_tok_s: float | None

    @property
    def one_token_repeated(self) -> bool:
        """Whether the answer is one character or one word again and again, as broken peer access makes it."""
        words = self.text.split()
        return (len(self.text) > 3 and len(set(self.text)) == 1) or (len(words) > 3 and len(set(words)) == 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The end of a streamed answer: what the engine counted."""

    prompt_tokens: int | None
    generated_tokens: int | None
    prompt_tok_s: float | None
    generation_tok_s: float | None
    finish_reason: str | None


class EngineClient:
    """A connection to one engine; a context manager. Proxies in the environment are ignored: the engine is local.

    `api_key` may be several, separated by commas, as llama-server takes them; the first is used.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        import httpx

        headers = httpx.Headers(
            {"Authorization": f"Bearer {api_key.split(',')[0]}"} if api_key else {}, encoding="utf-8"
        )
        self._http = httpx.Client(base_url=url, headers=headers, timeout=_POLL_TIMEOUT_S, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def is_up(self) -> bool:
        """Whether /health answers 200: the model is loaded (which is no proof that it can compute)."""
        import httpx

        try:
            return self._http.get("/health").status_code == 200
        except httpx.HTTPError:
            return False

    def canary(self) -> Canary:
        """Ask for a few tokens and return the answer.

        Raises EngineFailed (code "wrong-answer" for anything but a completion, "engine-died" when the connection
        breaks, "no-answer" when none comes).
        """
        body = {"prompt": _CANARY_PROMPT, "n_predict": _CANARY_TOKENS, "temperature": 0, "cache_prompt": False}
        begun = time.monotonic()
        reply = self._post("/completion", body)
        text = reply.get("content")
        if not isinstance(text, str):
            raise EngineFailed("the engine answered with something that is not a completion", code="wrong-answer")
        return Canary(
            text=text,
            seconds=time.monotonic() - begun,
            generation_tok_s=_number(_timings(reply).get("predicted_per_second")),
        )

    def sample(self) -> Sample | None:
        """Return a reading of the engine's counters now, None when it does not answer."""
        import httpx

        try:
            metrics = self._http.get("/metrics")
            slots = self._http.get("/slots")
        except httpx.HTTPError:
            return None
        if metrics.status_code != 200:
            return None
        return sample(time.monotonic(), metrics.text, slots.text if slots.status_code == 200 else None)

    def ask(self, text: str) -> Iterator[str | Answer]:
        """Stream one chat answer: its text piece by piece, and at the end an Answer.

        Raises EngineFailed as `canary` does.
        """
        body = {
            "messages": [{"role": "user", "content": text}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        timings: dict[str, Any] = {}
        finish_reason = None
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
                choice = _first(chunk.get("choices"))
                finish_reason = choice.get("finish_reason") or finish_reason
                delta = _object(choice.get("delta"))
                # Models that reason stream their thoughts apart; both are what the user waits for.
                if piece := delta.get("reasoning_content") or delta.get("content"):
                    yield str(piece)
                if line == "data: [DONE]":
                    break
        yield Answer(
            prompt_tokens=_whole(timings.get("prompt_n")),
            generated_tokens=_whole(timings.get("predicted_n")),
            prompt_tok_s=_number(timings.get("prompt_per_second")),
            generation_tok_s=_number(timings.get("predicted_per_second")),
            finish_reason=finish_reason,
        )

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with _engine_errors():
            reply = self._http.post(path, json=body, timeout=_ANSWER_TIMEOUT_S)
            if reply.status_code != 200:
                raise _refused(reply)
        return _parsed(reply.text)


@contextlib.contextmanager
def _engine_errors() -> Iterator[None]:
    """Turn what breaks on the wire into EngineFailed."""
    import httpx

    try:
        yield
    except httpx.TimeoutException:
        raise EngineFailed("the engine took a request and never answered", code="no-answer") from None
    except httpx.HTTPError:
        raise EngineFailed("the engine closed the connection without an answer", code="engine-died") from None


def _refused(reply: httpx.Response) -> EngineFailed:
    message = _error_message(_parsed(reply.text)) or reply.text[:_LONGEST_MESSAGE]
    return EngineFailed(f"the engine refused the request (HTTP {reply.status_code}): {message}", code="wrong-answer")


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


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
