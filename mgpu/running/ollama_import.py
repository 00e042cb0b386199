"""A GGUF file on disk as a model of an Ollama server, without copying it where that can be avoided."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from mgpu.errors import BadModel, Missing, UsageError
from mgpu.models.transfer import OnProgress, Progress, steadily
from mgpu.running.ollama_client import OllamaClient

_CHUNK_BYTES = 1 << 20
_SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)
# Ollama's rules: a name, a tag, and up to a host and a namespace before them.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*){0,3}(?::[A-Za-z0-9_][\w.-]*)?", re.ASCII)


def create_from_gguf(
    client: OllamaClient,
    name: str,
    path: Path,
    *,
    parameters: Mapping[str, object] | None = None,
    models_folder: Path | None = None,
    on_progress: OnProgress = lambda _: None,
) -> str:
    """Make the model `name` of the GGUF at `path` and return the file's digest ("sha256:…").

    The server keeps models by digest: a file it has already is not given to it again. Otherwise it is hard-linked
    into `models_folder` (the server's OLLAMA_MODELS, where it may be written and is on the same disk), so that it
    takes no space twice, or else uploaded. `parameters` are the model's defaults ("num_ctx"). Progress goes through
    the stages "hashing" and "uploading". Raises UsageError for a name Ollama does not take, Missing or BadModel for
    a file that is not there or is no whole GGUF, EngineFailed ("create-failed") for one the server refuses.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name[:80]!r} cannot name a model in Ollama", hint="for example llama-3.1-8b:q4_k_m")
    size = _checked_size(path)
    report = steadily(on_progress)
    digest = _told_digest(path) or _digest(path, size, report)
    if not client.has_blob(digest) and not (_linked(path, models_folder, digest) and client.has_blob(digest)):
        client.upload_blob(digest, _content(path, size, "uploading", report))
    client.create(name, digest, parameters=parameters)
    return digest


def _checked_size(path: Path) -> int:
    split = _SPLIT.search(path.name)
    if split and int(split[1]) > 1:
        raise BadModel(
            f"{path.name} is one of {int(split[1])} parts of a model; Ollama takes only whole files",
            code="split-model",
            hint="join them with llama-gguf-split --merge, or use --backend llama.cpp",
        )
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise Missing(f"the model file {path} does not exist", code="model-missing", hint="check the path") from None
    except OSError as error:
        raise Missing(f"the model file {path} cannot be read: {error.strerror}", code="model-missing") from None
    if magic != b"GGUF":
        raise BadModel(f"{path} is not a GGUF file", code="model-not-gguf", hint="Ollama runs GGUF models")
    return size


def _told_digest(path: Path) -> str | None:
    """The digest of a file that Hugging Face's cache keeps under it, having checked it when it was fetched: hashing
    40 GB anew would take a minute each time."""
    content = path.resolve()
    known = content.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", content.name)
    return f"sha256:{content.name}" if known else None


def _digest(path: Path, size: int, report: OnProgress) -> str:
    digest = hashlib.sha256()
    for chunk in _content(path, size, "hashing", report):
        digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def _content(path: Path, size: int, stage: str, report: OnProgress) -> Iterator[bytes]:
    done = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
                done += len(chunk)
                report(Progress(stage=stage, name=path.name, done_bytes=done, total_bytes=size))
    except OSError as error:
        raise Missing(f"the model file {path} cannot be read: {error.strerror}", code="model-missing") from None


def _linked(path: Path, models_folder: Path | None, digest: str) -> bool:
    """Whether the file now is in the server's folder under its digest; False where links are not possible."""
    if models_folder is None:
        return False
    with contextlib.suppress(OSError):
        blobs = models_folder / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        os.link(path.resolve(), blobs / digest.replace(":", "-"))
        return True
    return False
