"""Talking to an Ollama server: what it has, getting models into it, loading them, asking them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Self, TypeVar

from mgpu.backends import llama_cpp
from mgpu.backends.failure import shorten
from mgpu.backends.ollama_failure import explain_load, explain_pull
from mgpu.backends.ollama_placement import LoadedModel
from mgpu.backends.samples import Sample
from mgpu.errors import EngineFailed, MgpuError
from mgpu.models.transfer import OnProgress, Progress, steadily
from mgpu.running.client import CANARY_PROMPT, CANARY_TOKENS, Answer, Canary, Thought, connecting, got, whole

if TYPE_CHECKING:
    import httpx
    import ollama

Record = TypeVar("Record")
FOR_EVER = -1

_POLL_TIMEOUT_S = 5.0
# Ollama gives up a load by itself when its runner is silent for five minutes; a large model from a slow disk is not.
_LOAD_TIMEOUT_S = 6 * 3600.0
# The first token with a long queue before it; between two records of a pull, a large file may be verified.
_ANSWER_TIMEOUT_S = 600.0
_LONGEST_MESSAGE = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """A model that an Ollama says it has: `name` with its tag; `modified` in seconds since 1970."""

    name: str
    size_bytes: int
    quantisation: str | None
    modified: float


class OllamaClient:
    """A connection to one Ollama server; a context manager. Proxies in the environment are ignored.

    Models stay loaded for `keep_alive` seconds after a request, -1 for ever; None leaves that to the server, as is
    right with one that somebody else runs. `lines` reads its log, where it may be read: it knows more of a failed load
    than the answer does. Every method raises EngineFailed when the server breaks off: code
    "engine-died" when there is no connection, "no-answer" when nothing comes in time, "wrong-answer" when what comes
    is no Ollama's.
    """

    def __init__(
        self, url: str, *, keep_alive: int | None = FOR_EVER, lines: Callable[[], Sequence[str]] | None = None
    ) -> None:
        import httpx
        import ollama

        self.url = url.rstrip("/")
        self._keep_alive = keep_alive
        self._lines = lines
        settings: dict[str, Any] = {"follow_redirects": False, **connecting(url)}
        self._settings = settings
        # For answers of which the official client's releases know different fields.
        self._http = httpx.Client(base_url=self.url, timeout=_POLL_TIMEOUT_S, **settings)
        self._patient = ollama.Client(self.url, timeout=_timeout(_ANSWER_TIMEOUT_S), **settings)
        self._loading = ollama.Client(self.url, timeout=_timeout(_LOAD_TIMEOUT_S), **settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()
        for client in (self._patient, self._loading):
            _connections(client).close()

    def is_up(self) -> bool:
        """Whether Ollama answers: it takes requests, and has loaded nothing yet."""
        import httpx

        try:
            return self.version() is not None
        except (MgpuError, httpx.HTTPError):
            return False

    def version(self) -> str | None:
        """Return what the server says of its version ("0.32.15"; builds from source say "0.0.0"), None when what
        answers is no Ollama."""
        with _errors():
            reply = self._http.get("/api/version")
            found = _json(reply).get("version") if reply.status_code == 200 else None
        return found if isinstance(found, str) and found else None

    def models(self) -> tuple[Tag, ...]:
        """Return the models this server has on disk."""
        with _errors():
            return tuple(_tag(entry) for entry in _json(self._http.get("/api/tags"))["models"])

    def loaded(self) -> tuple[LoadedModel, ...]:
        """Return what the server says it holds in memory; its division between cards and RAM is not to be relied on."""
        with _errors():
            reply = self._http.get("/api/ps")
            entries = _json(reply)["models"]
            return tuple(
                LoadedModel(
                    name=str(entry["name"]),
                    size_bytes=whole(entry.get("size")),
                    size_vram_bytes=whole(entry.get("size_vram")),
                    ctx_tokens=whole(entry.get("context_length")),
                )
                for entry in entries
            )

    def pull(self, tag: str, on_progress: OnProgress = lambda _: None) -> None:
        """Fetch a model from Ollama's library, unless the server has it; blocks until it is there.

        The layers of a model add up to one total, which grows while the server finds out about them. Raises Missing
        (codes "not-found", "hub-unreachable", "disk-full", "split-model"), and EngineFailed ("download-interrupted")
        when the server breaks off. What was fetched stays with the server, which resumes there.
        """
        report = steadily(on_progress)
        layers: dict[str, tuple[int, int]] = {}
        status = None
        records = self._patient.pull(tag, stream=True)
        for record in _one_by_one(records, lambda text: explain_pull(tag, text), interrupted=f"fetching {tag}"):
            status = record.status
            if record.digest and record.total:
                layers[record.digest] = (record.completed or 0, record.total)
                done, total = (sum(sizes) for sizes in zip(*layers.values(), strict=True))
                report(Progress(stage="downloading", name=tag, done_bytes=done, total_bytes=total))
        if status != "success":
            raise EngineFailed(
                f"Ollama stopped fetching {tag} before it was whole",
                code="download-interrupted",
                hint="try again; it goes on where it stopped",
            )

    def load(self, model: str, *, options: Mapping[str, object] | None = None) -> None:
        """Load a model and keep it loaded; blocks until it is ready or could not be loaded.

        `options` are Ollama's own (`num_ctx`, `num_gpu`, `main_gpu`, `num_batch`). A later request with other ones
        loads the model anew. Raises Missing ("not-found") and EngineFailed with the cause's code.
        """
        with _errors(self._explain(model)):
            self._loading.generate(model, "", options=dict(options or {}), keep_alive=self._keep_alive)

    def canary(self, model: str, prompt: str = CANARY_PROMPT, *, patience_s: float | None = None) -> Canary:
        """Ask for a few tokens and return the answer, waiting `patience_s` for it at most. Raises as `load` does: the
        model is loaded if need be."""
        import ollama

        begun = time.monotonic()
        options = {"num_predict": CANARY_TOKENS, "temperature": 0}
        timeout = _timeout(patience_s or _ANSWER_TIMEOUT_S)
        client = ollama.Client(self.url, timeout=timeout, **self._settings)
        with _errors(self._explain(model)), contextlib.closing(_connections(client)):
            reply = client.generate(model, prompt, options=options, keep_alive=self._keep_alive)
            return Canary(
                text=reply.response or getattr(reply, "thinking", None) or "",
                seconds=time.monotonic() - begun,
                generation_tok_s=_rate(reply.eval_count, reply.eval_duration),
            )

    def chat(self, model: str, text: str, *, max_tokens: int | None = None) -> Iterator[str | Answer]:
        """Stream one answer, of `max_tokens` at most: its text piece by piece, what a reasoning model thinks as
        Thoughts before it, and at the end an Answer.

        Of a repeated prompt the server counts the tokens it knew already, but not the time for them: the prompt's
        rate is then too high. Raises as `load` does.
        """
        last = None
        messages = [{"role": "user", "content": text}]
        options = {"num_predict": max_tokens} if max_tokens else None
        chunks = self._patient.chat(model, messages, stream=True, options=options, keep_alive=self._keep_alive)
        for chunk in _one_by_one(chunks, self._explain(model)):
            last = chunk
            if thought := getattr(chunk.message, "thinking", None):
                yield Thought(thought)
            if piece := chunk.message.content:
                yield piece
        if last is None or not last.done:
            raise EngineFailed("Ollama broke off its answer", code="engine-died")
        yield Answer(
            prompt_tokens=last.prompt_eval_count,
            generated_tokens=last.eval_count,
            prompt_tok_s=_rate(last.prompt_eval_count, last.prompt_eval_duration),
            generation_tok_s=_rate(last.eval_count, last.eval_duration),
            finish_reason=last.done_reason,
        )

    def sample(self, runner_port: int | None) -> Sample | None:
        """Return a reading of the counters of a model's llama-server, None while there is none that answers.

        Ollama itself counts nothing. `runner_port` is what `runner_port(log lines)` found; the child answers because
        it was started with LLAMA_ARG_ENDPOINT_METRICS.
        """
        if runner_port is None:
            return None
        return llama_cpp.sample(time.monotonic(), lambda path: got(self._http, f"http://127.0.0.1:{runner_port}{path}"))

    def _explain(self, model: str) -> Callable[[str], MgpuError]:
        return lambda text: explain_load(model, text, self._lines() if self._lines else ())

    def has_blob(self, digest: str) -> bool:
        """Whether the server has a file with this digest ("sha256:…")."""
        with _errors():
            return self._http.head(f"/api/blobs/{digest}").status_code == 200

    def upload_blob(self, digest: str, content: Iterator[bytes]) -> None:
        """Give the server a file. Raises EngineFailed (code "create-failed") when it does not take it."""
        with _errors():
            reply = self._http.post(f"/api/blobs/{digest}", content=content, timeout=_timeout(_ANSWER_TIMEOUT_S))
            if reply.status_code not in (200, 201):
                raise EngineFailed(f"Ollama refused the model file: {_said(reply)}", code="create-failed")

    def create(self, model: str, digest: str, *, parameters: Mapping[str, object] | None = None) -> None:
        """Make a model of a blob the server has, in place of one of that name. Raises EngineFailed
        ("create-failed")."""

        def explain(text: str) -> MgpuError:
            message = shorten(f"Ollama could not make a model of the file: {text}", _LONGEST_MESSAGE)
            return EngineFailed(message, code="create-failed")

        with _errors(explain):
            files = {f"{model.replace('/', '-').replace(':', '-')}.gguf": digest}
            made = self._patient.create(model, files=files, parameters=dict(parameters or {}) or None)
        if made.status != "success":
            raise explain(f"it ended with {made.status!r}")


def _connections(client: ollama.Client) -> httpx.Client:
    """What an official client talks through; older releases cannot be closed themselves."""
    connections: httpx.Client = client._client
    return connections


def _one_by_one(
    records: Iterator[Record], explain: Callable[[str], MgpuError], *, interrupted: str | None = None
) -> Iterator[Record]:
    """The records of a stream; only the stream's own errors are turned into mgpu's, not those of who reads it."""
    try:
        while True:
            with _errors(explain, interrupted=interrupted):
                record = next(records, None)
            if record is None:
                return
            yield record
    finally:
        if isinstance(records, Generator):
            records.close()


@contextlib.contextmanager
def _errors(explain: Callable[[str], MgpuError] | None = None, *, interrupted: str | None = None) -> Iterator[None]:
    """Turn what Ollama answers, and what breaks on the wire, into mgpu's errors; `explain` knows what an error
    message means. A builtin ConnectionError comes from requests in one piece, httpx's own from streams."""
    import httpx
    import ollama
    import pydantic

    during = f" while {interrupted}" if interrupted else ""
    try:
        yield
    except ollama.ResponseError as error:
        if explain is None:
            message = shorten(f"Ollama refused the request: {error.error}", _LONGEST_MESSAGE)
            raise EngineFailed(message, code="wrong-answer") from None
        raise explain(error.error) from None
    except (httpx.TimeoutException, TimeoutError):
        raise EngineFailed(f"Ollama took a request and never answered{during}", code="no-answer") from None
    except (httpx.HTTPError, ConnectionError):
        code = "download-interrupted" if interrupted else "engine-died"
        raise EngineFailed(f"Ollama closed the connection, or is not running{during}", code=code) from None
    except (pydantic.ValidationError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        raise EngineFailed("what answers does not answer as Ollama does", code="wrong-answer") from None


def _timeout(read_s: float) -> httpx.Timeout:
    import httpx

    return httpx.Timeout(read_s, connect=_POLL_TIMEOUT_S)


def _json(reply: httpx.Response) -> dict[str, Any]:
    try:
        data = reply.json()
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _said(reply: httpx.Response) -> str:
    return shorten(str(_json(reply).get("error") or reply.text), _LONGEST_MESSAGE)


def _tag(entry: Mapping[str, Any]) -> Tag:
    """One entry of /api/tags."""
    size, details = whole(entry.get("size")), entry.get("details")
    level = details.get("quantization_level") if isinstance(details, dict) else None
    return Tag(
        name="".join(character for character in str(entry["name"])[:256] if character.isprintable()),
        size_bytes=max(0, size or 0),
        quantisation=level if isinstance(level, str) and level.isprintable() and level != "unknown" else None,
        modified=_seconds(entry.get("modified_at")),
    )


def _seconds(moment: object) -> float:
    """A time such as 2026-11-23T04:12:37.345293519Z; 0 if it is none."""
    try:
        return datetime.fromisoformat(f"{str(moment)[:19]}+00:00").timestamp()
    except ValueError:
        return 0.0


def _rate(tokens: int | None, duration_ns: int | None) -> float | None:
    return tokens / duration_ns * 1e9 if tokens is not None and duration_ns else None
