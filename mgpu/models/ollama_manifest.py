"""Ollama's names of models, and the manifests they stand for.

A manifest is a container image's: layers, each with a media type, a digest and a size. The layer of the weights is a
GGUF. Since 2026 it may be a list instead, with a manifest for each of Ollama's engines.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mgpu.errors import UsageError
from mgpu.models.source import OllamaTag
from mgpu.models.transfer import Unavailable

MEDIA_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
# Models in safetensors have a layer for each of some thousand tensors; no other manifest comes near.
MOST_BYTES = 4 << 20
HOST = "registry.ollama.ai"
PUBLIC_HOSTS = (HOST, "ollama.com")


@dataclass(frozen=True, slots=True, kw_only=True)
class FullName:
    """A tag in full: HOST/NAMESPACE/MODEL:TAG."""

    host: str
    namespace: str
    model: str
    tag: str

    @property
    def repository(self) -> str:
        """The name within its host."""
        return f"{self.namespace}/{self.model}"

    @property
    def short(self) -> str:
        """The name without its tag, as users write it and `ollama list` shows it."""
        if self.host not in PUBLIC_HOSTS:
            return f"{self.host}/{self.repository}"
        return self.model if self.namespace == _NAMESPACE else self.repository

    @property
    def page(self) -> str:
        """Where people see which tags there are."""
        public = self.host in PUBLIC_HOSTS
        return f"https://ollama.com/{self.repository}/tags" if public else f"https://{self.host}/{self.repository}"

    @property
    def pull(self) -> str:
        """A hint for a copy on disk that is of no use."""
        return f"fetch it anew: ollama pull {self.short}:{self.tag}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """What a manifest says of the weights; digests are in hexadecimal. Of several projectors the first is named, and
    the bytes are those of all."""

    digest: str
    size: int
    projector: str | None = None
    projector_bytes: int = 0


def full_name(tag: OllamaTag) -> FullName:
    """Return the name in full, as Ollama completes it. Raises UsageError if it has no place for it."""
    parts = tag.name.split("/")
    if len(parts) > 3 or ".." in f"{tag.name}/{tag.tag}" or not all(map(_PART.fullmatch, [*parts, tag.tag])):
        raise UsageError(
            f"{str(tag)[:80]!r} is no name that Ollama has a place for", hint="ollama:[HOST/][NAMESPACE/]MODEL[:TAG]"
        )
    host, namespace, model = [*(HOST, _NAMESPACE)[: 3 - len(parts)], *parts]
    return FullName(host=HOST if host in PUBLIC_HOSTS else host, namespace=namespace, model=model, tag=tag.tag)


def read_manifest(data: bytes, child: Callable[[str], bytes]) -> Layers:
    """Return the layers that matter; `child` gets another manifest by its digest, in hexadecimal.

    Raises Unavailable: "not-supported" for weights that are no single GGUF or do not run here, "bad-server" for what
    is no manifest.
    """
    manifest = _object(data)
    if manifest.get("mediaType") == _LIST:
        manifest = _for_gguf(manifest, child)
    if "layers" not in manifest:
        raise unusable_manifest("it lists no layers")
    found: dict[str, list[Mapping[str, object]]] = {}
    for layer in _objects(manifest["layers"], "layers"):
        kind = layer.get("mediaType")
        if not isinstance(kind, str):
            raise unusable_manifest("a layer has no media type")
        found.setdefault(kind.partition(";")[0].strip(), []).append(layer)
    if _TENSOR in found:
        raise _unsupported(_SAFETENSORS)
    if _WEIGHTS not in found:
        raise _unsupported("it has no weights that run on this machine; models of Ollama's cloud have none")
    if len(found[_WEIGHTS]) > 1:
        raise _unsupported(f"its weights are {len(found[_WEIGHTS])} layers, not one GGUF")
    (weights,) = found[_WEIGHTS]
    projectors = found.get(_PROJECTOR, [])
    return Layers(
        digest=_digest(weights),
        size=_size(weights),
        projector=_digest(projectors[0]) if projectors else None,
        projector_bytes=sum(_size(layer) for layer in projectors),
    )


def digest_in(text: str) -> str | None:
    """The SHA-256 in "sha256:…", "sha256-…" or alone, in hexadecimal; None if `text` is none of them."""
    match = _DIGEST.fullmatch(text)
    return match[1].lower() if match else None


def unusable_manifest(why: str) -> Unavailable:
    """What to raise for a manifest that is none."""
    return Unavailable(f"its manifest cannot be used: {why}", code="bad-server")


_NAMESPACE = "library"
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"(?:sha256[:-])?([0-9a-fA-F]{64})")
_LIST = "application/vnd.ollama.manifest.list.v2+json"
_WEIGHTS = "application/vnd.ollama.image.model"
_PROJECTOR = "application/vnd.ollama.image.projector"
_TENSOR = "application/vnd.ollama.image.tensor"
_SAFETENSORS = "its weights are safetensors for another engine of Ollama's, no GGUF"
_LARGEST_LAYER = 1 << 50


def _for_gguf(manifest: Mapping[str, object], child: Callable[[str], bytes]) -> Mapping[str, object]:
    """Of a list with a manifest for each engine, the one for an engine that runs GGUFs."""
    for entry in _objects(manifest.get("manifests"), "manifests"):
        if entry.get("format") == "safetensors" or entry.get("runner") == "mlx":
            continue
        if "layers" in entry:
            return entry
        digest = _digest(entry)
        data = child(digest)
        if hashlib.sha256(data).hexdigest() != digest:
            raise unusable_manifest("the part of it that is needed is not there, or does not match its checksum")
        return _object(data)
    raise _unsupported(_SAFETENSORS)


def _object(data: bytes) -> Mapping[str, object]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise unusable_manifest("it is not JSON") from error
    if not isinstance(value, dict):
        raise unusable_manifest("it is no JSON object")
    return value


def _objects(value: object, what: str) -> list[Mapping[str, object]]:
    entries = [] if value is None else value
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise unusable_manifest(f"its {what} are no list of objects")
    return entries


def _digest(layer: Mapping[str, object]) -> str:
    value = layer.get("digest")
    digest = digest_in(value) if isinstance(value, str) else None
    if not digest:
        raise unusable_manifest("a layer has no SHA-256 digest")
    return digest


def _size(layer: Mapping[str, object]) -> int:
    value = layer.get("size")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LARGEST_LAYER:
        raise unusable_manifest("a layer has no possible size")
    return value


def _unsupported(why: str) -> Unavailable:
    return Unavailable(why, code="not-supported", hint="choose a tag with a GGUF, or a profile: mgpu profiles list")
