"""What the MODEL argument of a command names: a profile, a file, a folder, or a model on a hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mgpu.errors import UsageError


@dataclass(frozen=True, slots=True)
class ProfileName:
    """The model of the profile called `name`."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file on disk; of a split model, its first part."""

    path: Path

    def __str__(self) -> str:
        return _argument(self.path)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder that holds a model as Hugging Face lays it out (config.json and safetensors)."""

    path: Path

    def __str__(self) -> str:
        return _argument(self.path)


@dataclass(frozen=True, slots=True)
class HubRepository:
    """A repository on Hugging Face; `quantisation` is None if the user left the choice open."""

    repository: str
    quantisation: str | None = None

    def __str__(self) -> str:
        return f"hf:{self.repository}" + (f":{self.quantisation}" if self.quantisation else "")


@dataclass(frozen=True, slots=True)
class OllamaTag:
    """A model in Ollama's library, with its tag."""

    name: str
    tag: str = "latest"

    def __str__(self) -> str:
        return f"ollama:{self.name}:{self.tag}"


ModelSource = ProfileName | GgufFile | ModelFolder | HubRepository | OllamaTag


def parse_model(text: str) -> ModelSource:
    """Say what `text` names, without looking whether it exists.

    `hf:ORG/REPO[:QUANT]` and `ollama:NAME[:TAG]` are on hubs; what contains a slash, begins with `.` or `~` or
    ends in `.gguf` is a path; all else is a profile. `str()` of the answer is an argument that means the same.
    Raises UsageError for what can name nothing.
    """
    if not text.strip():
        raise _unusable("MODEL is empty")
    if len(text) > _MAX_LENGTH:
        raise _unusable(f"MODEL is {len(text)} characters long; at most {_MAX_LENGTH} can name a model")
    if not text.isprintable():
        raise _unusable(f"MODEL {text[:80]!r} contains characters that cannot be printed")
    scheme, colon, rest = text.partition(":")
    if colon and scheme in ("hf", "ollama"):
        return _hub_repository(text, rest) if scheme == "hf" else _ollama_tag(text, rest)
    if scheme in ("http", "https"):
        repository = _REPOSITORY_PAGE.match(text)
        hint = f"hf:{repository[1]}" if repository else "download it and give its path, or write hf:ORG/REPO"
        raise UsageError(f"MODEL {text!r} is a web address", hint=hint)
    if "/" in text or text.startswith((".", "~")) or text.lower().endswith(".gguf"):
        return _path(text)
    if ":" in text and _OLLAMA.fullmatch(text):
        raise UsageError(f"MODEL {text!r} can be neither a profile's name nor a path", hint=f"ollama:{text}")
    if not _NAME.fullmatch(text) or ".." in text:
        raise _unusable(f"MODEL {text!r} can be neither a profile's name nor a path")
    return ProfileName(text)


def in_quantisation(repository: HubRepository, quantisation: str | None) -> HubRepository:
    """Return `repository` in the quantisation of `--quant`, if there is one. Raises UsageError if that cannot be."""
    if quantisation is None:
        return repository
    if not _NAME.fullmatch(quantisation):
        raise UsageError(f"--quant {quantisation[:80]!r} cannot name a quantisation", hint="for example --quant Q4_K_M")
    if repository.quantisation not in (None, quantisation.upper()):
        raise UsageError(f"--quant {quantisation} contradicts {repository}", hint="leave one of them out")
    return HubRepository(repository.repository, quantisation.upper())


_MAX_LENGTH = 512
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REPOSITORY = re.compile(rf"({_NAME.pattern}/{_NAME.pattern})(?::({_NAME.pattern}))?")
_OLLAMA = re.compile(rf"({_NAME.pattern}(?:/{_NAME.pattern}){{0,3}})(?::({_NAME.pattern}))?")
_REPOSITORY_PAGE = re.compile(rf"https?://(?:huggingface\.co|hf\.co)/({_NAME.pattern}/{_NAME.pattern})")


def _argument(path: Path) -> str:
    """`path` so that it is taken for a path again, and for this one."""
    text = str(path)
    plain = path.is_absolute() or text.startswith(".") or "/" in text or path.suffix.lower() == ".gguf"
    return text if plain and not text.startswith("~") and ":" not in text.split("/")[0] else f"./{text}"


def _path(text: str) -> GgufFile | ModelFolder:
    try:
        path = Path(text).expanduser() if text.startswith("~") else Path(text)
    except RuntimeError as error:
        raise _unusable(f"MODEL {text!r} begins with the home of a user that is not there") from error
    return GgufFile(path) if path.suffix.lower() == ".gguf" else ModelFolder(path)


def _hub_repository(text: str, rest: str) -> HubRepository:
    match = _REPOSITORY.fullmatch(rest)
    if not match or ".." in rest:
        raise UsageError(
            f"MODEL {text!r} is not hf:ORG/REPO or hf:ORG/REPO:QUANT",
            hint="for example hf:bartowski/Llama-3.3-70B-Instruct-GGUF:Q4_K_M",
        )
    return HubRepository(match[1], match[2].upper() if match[2] else None)


def _ollama_tag(text: str, rest: str) -> OllamaTag:
    match = _OLLAMA.fullmatch(rest)
    if not match or ".." in rest:
        raise UsageError(f"MODEL {text!r} is not ollama:NAME or ollama:NAME:TAG", hint="for example ollama:llama3.1:8b")
    return OllamaTag(match[1], match[2] or "latest")


def _unusable(message: str) -> UsageError:
    return UsageError(
        message, hint="a profile (`mgpu profiles list`), a .gguf file, a folder, hf:ORG/REPO or ollama:NAME"
    )
