"""One model on an Ollama server, with all that mgpu needs of a running engine."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from mgpu.backends.backend import DeviceMemory
from mgpu.backends.ollama_log import memory, models_folder, runner_port
from mgpu.backends.ollama_placement import LoadedModel, missing_devices, verify_placement
from mgpu.backends.samples import Sample
from mgpu.errors import EngineFailed
from mgpu.models.ollama_manifest import full_name
from mgpu.models.source import OllamaTag
from mgpu.models.transfer import OnProgress
from mgpu.planning.candidates import Candidate
from mgpu.running.client import CANARY_PROMPT, Answer, Canary
from mgpu.running.ollama_client import FOR_EVER, OllamaClient
from mgpu.running.ollama_import import create_from_gguf

# What Ollama allows in a part of a name, and how much of it.
_UNUSABLE = re.compile(r"[^A-Za-z0-9._-]+")
_LONGEST_PART = 80


class OllamaLink:
    """A connection to an Ollama server and one `model` on it; a context manager.

    `lines` reads the log of a server of mgpu's own; None is a server of somebody else's, which keeps its models
    loaded as long as it likes to, and whose log cannot be read.
    """

    def __init__(self, url: str, model: str, *, lines: Callable[[], Sequence[str]] | None) -> None:
        self.model = model
        self._lines = lines
        self._runner_port: int | None = None
        self._client = OllamaClient(url, keep_alive=FOR_EVER if lines else None, lines=lines)

    @property
    def port(self) -> int:
        """The port the server is to listen on."""
        return urlsplit(self._client.url).port or 80

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.__exit__()

    def is_up(self) -> bool:
        """Whether the server answers; it may have loaded nothing yet."""
        return self._client.is_up()

    def require_devices(self, candidate: Candidate) -> None:
        """Raise EngineFailed (code "bad-device") when a server of mgpu's own did not find every planned card."""
        if problem := missing_devices(candidate, self._lines() if self._lines else ()):
            raise EngineFailed(problem, code="bad-device", hint="mgpu backends shows what each engine sees")

    def take_in(self, weights: Path | OllamaTag, candidate: Candidate, on_progress: OnProgress) -> None:
        """Give the server the model: a GGUF file as a model of its own, or a tag that it fetches itself unless it has
        it already, which takes no network.

        Raises what `OllamaClient.pull` and `create_from_gguf` raise.
        """
        if isinstance(weights, OllamaTag):
            name = full_name(weights)
            if f"{name.short}:{name.tag}" not in {each.name for each in self._client.models()}:
                self._client.pull(self.model, on_progress)
            return
        # Somebody else's server has a context length of its own, which a model can overrule.
        parameters = {} if self._lines else {"num_ctx": candidate.ctx_tokens}
        folder = models_folder(self._lines()) if self._lines else None
        create_from_gguf(
            self._client, self.model, weights, parameters=parameters, models_folder=folder, on_progress=on_progress
        )

    def load(self) -> None:
        """Have the model loaded; blocks until it is. Raises Missing ("not-found") or EngineFailed."""
        self._client.load(self.model)

    def complaints(self, candidate: Candidate) -> tuple[str, ...]:
        """Return what is not as planned of where the model lies and of its context, each in a sentence."""
        if self._lines:
            return verify_placement(candidate, self._lines(), self._loaded())
        loaded = self._loaded()
        found = []
        if candidate.devices:
            found.append(
                "on which cards the model is cannot be seen: the log of an Ollama that somebody else runs is not "
                "mgpu's to read (journalctl -u ollama tells; once that service is stopped, mgpu starts one of its own)"
            )
        if loaded and loaded.ctx_tokens and loaded.ctx_tokens != candidate.ctx_tokens:
            found.append(
                f"each user gets {loaded.ctx_tokens} tokens of context instead of the {candidate.ctx_tokens} planned: "
                "this Ollama is used as it is"
            )
        return tuple(found)

    def memory(self, candidate: Candidate) -> Mapping[int, DeviceMemory]:
        """Return what the model holds of each planned card, by its place in the plan; nothing where it is unknown."""
        return memory(self._lines(), candidate) if self._lines else {}

    def canary(self, prompt: str = CANARY_PROMPT, *, patience_s: float | None = None) -> Canary:
        """Ask for a few tokens and return the answer. Raises EngineFailed."""
        return self._client.canary(self.model, prompt, patience_s=patience_s)

    def sample(self) -> Sample | None:
        """Return a reading of the counters of the model's llama-server. Where they cannot be read, and the server is
        up, nothing in it is known."""
        counted = self._client.sample(self._runner_port)
        if counted is None and self._lines:  # it was not known yet, or the runner was started anew
            self._runner_port = runner_port(self._lines())
            counted = self._client.sample(self._runner_port)
        return counted or (Sample(at=time.monotonic()) if self.is_up() else None)

    def ask(self, text: str, *, max_tokens: int | None = None) -> Iterator[str | Answer]:
        """Stream one chat answer. Raises EngineFailed."""
        return self._client.chat(self.model, text, max_tokens=max_tokens)

    def _loaded(self) -> LoadedModel | None:
        names = (self.model, f"{self.model}:latest")
        return next((loaded for loaded in self._client.loaded() if loaded.name in names), None)


def model_name(name: str, quantisation: str | None) -> str:
    """Return what mgpu calls a GGUF in Ollama's store: in a namespace of its own, so that no model of the user's is
    replaced."""
    return f"mgpu/{_part(name)}:{_part((quantisation or 'latest').lower())}"


def _part(text: str) -> str:
    """`text` as a part of a name: Ollama takes few characters, and a letter or a figure first."""
    return _UNUSABLE.sub("-", text).lstrip("._-")[:_LONGEST_PART] or "model"
