"""The models that Ollama has on this machine, read from its folders without asking a server.

Manifests lie in `manifests/HOST/NAMESPACE/MODEL/TAG`, since 2026 also in `manifests-v2` as links to blobs, and the
layers in `blobs/sha256-DIGEST`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mgpu.errors import BadModel, Missing
from mgpu.models.ollama_manifest import (
    MOST_BYTES,
    PUBLIC_HOSTS,
    FullName,
    Layers,
    digest_in,
    read_manifest,
    unusable_manifest,
)
from mgpu.models.source import OllamaTag
from mgpu.models.transfer import Unavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTag:
    """A model that Ollama has on this machine: `path` is its GGUF, `bytes` its size with the projector's, `modified`
    when the tag was last pulled or made, in seconds since 1970."""

    name: str
    tag: str
    bytes: int
    path: Path
    modified: float

    @property
    def argument(self) -> str:
        """The MODEL that means it on a command line."""
        return str(OllamaTag(self.name, self.tag))


def local_tags() -> tuple[LocalTag, ...]:
    """Return the models that Ollama has on this machine, by name.

    What has no GGUF here (models of Ollama's cloud, unfinished downloads) is left out, and so is what may not be read.
    """
    found: dict[tuple[str, str], LocalTag] = {}
    for folder in _stores():
        for path, name in _manifests(folder):
            with contextlib.suppress(Unavailable, OSError):
                layers = read_manifest(_read(path) or b"", _child_in(folder))
                blob = _blob(folder, layers.digest)
                model = LocalTag(
                    name=name.short,
                    tag=name.tag,
                    bytes=blob.stat().st_size + layers.projector_bytes,
                    path=blob,
                    modified=path.stat().st_mtime,
                )
                found.setdefault((model.name, model.tag), model)
    return tuple(sorted(found.values(), key=lambda model: (model.name.lower(), model.tag.lower())))


def find_stored(name: FullName) -> tuple[Path, Layers] | None:
    """Return the GGUF of a model that Ollama has on this machine and what its manifest says; None if it has none, or
    none that may be read.

    Raises Missing ("not-supported") for weights that are no GGUF, BadModel for a manifest that cannot be used.
    """
    for folder in _stores():
        for path in _manifest_paths(folder, name):
            if (data := _read(path)) is None:
                continue
            try:
                _check_linked(path, data)
                layers = read_manifest(data, _child_in(folder))
            except Unavailable as error:
                message = f"Ollama's {name.short}:{name.tag} in {folder} cannot be planned: {error.reason}"
                if error.code == "not-supported":
                    raise Missing(message, code=error.code, hint=error.hint) from error
                raise BadModel(message, hint=name.pull) from error
            blob = _blob(folder, layers.digest)
            if _may_be_read(blob):  # else a download that is not finished, or a folder of another user
                return blob, layers
    return None


# Where the service that Ollama's installer sets up keeps its models.
_SERVICE_FOLDER = "/usr/share/ollama/.ollama/models"
_FOLDERS = ("manifests-v2", "manifests")


def _stores() -> Iterator[Path]:
    """The folders of this user's Ollama and of the service."""
    own = os.environ.get("OLLAMA_MODELS", "").strip().strip("\"'")
    with contextlib.suppress(RuntimeError):  # a user without a home
        yield Path(own) if own else Path("~/.ollama/models").expanduser()
    if own != _SERVICE_FOLDER:
        yield Path(_SERVICE_FOLDER)


def _manifest_paths(folder: Path, name: FullName) -> Iterator[Path]:
    hosts = PUBLIC_HOSTS if name.host in PUBLIC_HOSTS else (name.host,)
    for manifests in _FOLDERS:
        for host in hosts:
            yield folder / manifests / host / name.namespace / name.model / name.tag


def _manifests(folder: Path) -> Iterator[tuple[Path, FullName]]:
    for manifests in _FOLDERS:
        with contextlib.suppress(OSError):
            for path in sorted((folder / manifests).glob("*/*/*/*")):
                host, namespace, model, tag = path.parts[-4:]
                if tag.startswith(".") or not str(path).isprintable():  # a file on its way, or no name at all
                    continue
                yield path, FullName(host=host, namespace=namespace, model=model, tag=tag)


def _read(path: Path) -> bytes | None:
    """A manifest, None where there is none that may be read."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return file.read(MOST_BYTES)
    except OSError:
        return None


def _check_linked(path: Path, data: bytes) -> None:
    """A manifest that is a link to a blob is checked against the blob's name."""
    digest = digest_in(Path(os.path.realpath(path)).name)
    if digest and hashlib.sha256(data).hexdigest() != digest:
        raise unusable_manifest("it does not match its checksum")


def _may_be_read(path: Path) -> bool:
    try:
        return path.is_file() and os.access(path, os.R_OK)
    except OSError:
        return False


def _child_in(folder: Path) -> Callable[[str], bytes]:
    return lambda digest: _read(_blob(folder, digest)) or b""


def _blob(folder: Path, digest: str) -> Path:
    return folder / "blobs" / f"sha256-{digest}"
