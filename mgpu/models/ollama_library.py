"""What planning needs to know of a model in Ollama's library, before any of its weights is fetched.

Where Ollama has the model on this machine, its own copy is read. Otherwise it is the manifest and the first megabytes
of the GGUF at the registry, which speaks Docker's protocol (https://distribution.github.io/distribution/spec/api/).
"""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import mgpu
from mgpu.errors import BadModel, Missing
from mgpu.models.facts import ModelFacts
from mgpu.models.gguf import GgufHeader, join_parts, read_gguf_start
from mgpu.models.gguf_facts import facts_from_gguf, facts_from_header
from mgpu.models.hub import RemoteFile
from mgpu.models.ollama_manifest import (
    HOST,
    MEDIA_TYPE,
    MOST_BYTES,
    FullName,
    Layers,
    digest_in,
    full_name,
    read_manifest,
    unusable_manifest,
)
from mgpu.models.ollama_store import find_stored
from mgpu.models.remembered import Known, recall, recall_start, remember, remember_start
from mgpu.models.source import OllamaTag
from mgpu.models.transfer import Unavailable, client, read_range

if TYPE_CHECKING:
    import httpx

REGISTRY_VARIABLE = "MGPU_OLLAMA_REGISTRY"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaggedModel:
    """A model of Ollama's library.

    `path` is the GGUF where Ollama has it on this machine, None where only its first bytes were read. `digest` is that
    of the GGUF ("sha256:…"), `file_bytes` its size, `projector_bytes` that of the vision projector beside it (0: none).
    `unconfirmed` says why the registry could not be asked whether the tag still means this model; None if it was, or
    need not be because Ollama has the model here.
    """

    tag: OllamaTag
    facts: ModelFacts
    path: Path | None
    file_bytes: int
    digest: str
    projector_bytes: int = 0
    unconfirmed: str | None = None


def find_tag(tag: OllamaTag) -> TaggedModel:
    """Return what `tag` means: in the folders of Ollama on this machine, else at the registry.

    At the registry the manifest and some megabytes of the weights are read and remembered: the next call asks only
    for the manifest, and where there is no network it does without (`unconfirmed`). MGPU_OLLAMA_REGISTRY names another
    registry than Ollama's own. Blocks some seconds at most while the registry does not answer.

    Raises UsageError for a name that Ollama has no place for, BadModel for weights, or a manifest on disk, that cannot
    be used, and Missing: "not-found", "not-supported" (weights that are no single GGUF, or run elsewhere),
    "hub-unreachable", "rate-limited", "bad-server", "download-interrupted", "checksum-mismatch", "bad-environment".
    """
    name = full_name(tag)
    if stored := find_stored(name):
        path, layers = stored
        try:
            return _model(tag, facts_from_gguf(path), path.stem, layers, path=path)
        except BadModel as error:
            raise BadModel(f"{tag} cannot be planned: {error.message}", code=error.code, hint=name.pull) from error
    return _from_registry(tag, name)


_FIRST_BYTES = 4 << 20
_MOST_BYTES = 64 << 20
# For a manifest of a kilobyte, names looked up included, which no timeout of a client covers.
_PATIENCE_SECONDS = 10.0
_OUT_OF_REACH = ("hub-unreachable", "rate-limited", "bad-server")
_DIGEST_HEADERS = ("Ollama-Content-Digest", "Docker-Content-Digest")
_THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


def _from_registry(tag: OllamaTag, name: FullName) -> TaggedModel:
    server = _server(name)
    key = f"{name.repository}:{name.tag}"
    known = recall(server, key)
    try:
        with client() as http:
            http.event_hooks = {"request": [lambda request: _require_encryption(server, request)]}
            url = _address(server, name)
            data = _answer(http, f"{url}/manifests/{name.tag}", name)
            layers = read_manifest(data, lambda digest: _answer(http, f"{url}/manifests/sha256:{digest}", name))
            files = _files(server, name, layers)
            commit = hashlib.sha256(data).hexdigest()
            paths = tuple(file.path for file in files)
            remember(server, key, Known(commit=commit, paths=paths, files={file.path: file for file in files}))
            return _planned(tag, _kept(tag, files[0]) or _fetched(http, tag, files[0]), layers)
    except Unavailable as error:
        if known and error.code in _OUT_OF_REACH and (found := _remembered(tag, known)):
            return replace(found, unconfirmed=error.reason)
        raise Missing(
            f"{tag} cannot be read at {server}: {error.reason}",
            code=error.code,
            hint=error.hint or "check the network, or give the path of a .gguf file",
        ) from error
    except BadModel as error:
        raise BadModel(error.message, code=error.code, hint=f"choose another tag: {name.page}") from error


def _server(name: FullName) -> str:
    """The address of the registry that has a model. Raises Missing ("bad-environment")."""
    from urllib.parse import urlsplit

    text = os.environ.get(REGISTRY_VARIABLE, "").strip().rstrip("/") if name.host == HOST else ""
    if not text:
        return f"https://{name.host}"
    try:
        parts = urlsplit(text)
        encrypted = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _THIS_MACHINE)
        usable = encrypted and parts.hostname and parts.port != 0 and "@" not in text
    except ValueError:
        usable = False
    if usable and text == f"{parts.scheme}://{parts.netloc}" and text.isprintable() and " " not in text:
        return text
    raise Missing(
        f"{REGISTRY_VARIABLE} is {text[:80]!r}, which is no https://HOST[:PORT] (or http:// on this machine)",
        code="bad-environment",
        hint=f"unset {REGISTRY_VARIABLE}",
    )


def _require_encryption(server: str, request: httpx.Request) -> None:
    """Let no redirection lead to where others can read along or change what comes."""
    local = server.startswith("http://") and request.url.scheme == "http" and request.url.host in _THIS_MACHINE
    if request.url.scheme != "https" and not local:
        raise Unavailable(f"it redirects to {request.url.host} without encryption", code="bad-server")


def _answer(http: httpx.Client, url: str, name: FullName) -> bytes:
    """The manifest behind `url`, within a time that nothing prolongs."""
    outcome: list[bytes | Exception] = [Unavailable("it does not answer", code="hub-unreachable")]

    def ask() -> None:
        try:
            outcome[0] = _manifest(http, url, name)
        except Exception as error:  # whatever it is, it is raised where the answer is waited for
            outcome[0] = error

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE_SECONDS)
    answer = outcome[0]
    if isinstance(answer, Exception):
        raise answer
    return answer


def _manifest(http: httpx.Client, url: str, name: FullName) -> bytes:
    import httpx

    headers = {**_headers(), "Accept": MEDIA_TYPE, "Accept-Encoding": "identity"}
    data = b""
    try:
        with http.stream("GET", url, headers=headers, follow_redirects=True) as answer:
            _require(answer.status_code, name)
            for chunk in answer.iter_raw():
                data += chunk
                if len(data) > MOST_BYTES:
                    raise unusable_manifest(f"it has more than {MOST_BYTES:,} bytes")
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise Unavailable(f"it cannot be reached ({reason})", code="hub-unreachable") from error
    found = hashlib.sha256(data).hexdigest()
    if any(digest_in(answer.headers.get(header, "")) not in (None, found) for header in _DIGEST_HEADERS):
        raise Unavailable("its manifest does not match its checksum", code="checksum-mismatch", hint="try again")
    return data


def _require(status: int, name: FullName) -> None:
    if status in (401, 404):
        private = ", or it is private" if status == 401 else ""
        reason = f"there is no {name.short}:{name.tag}{private}"
        raise Unavailable(reason, code="not-found", hint=f"see which tags there are: {name.page}")
    if status == 429:
        raise Unavailable("it takes no more requests for now", code="rate-limited", hint="wait some minutes")
    if status != 200:
        raise Unavailable(f"it answered {status}", code="bad-server", hint="try again later")


def _headers() -> dict[str, str]:
    return {"User-Agent": f"mgpu/{mgpu.__version__}"}


def _address(server: str, name: FullName) -> str:
    return f"{server}/v2/{name.repository}"


def _files(server: str, name: FullName, layers: Layers) -> list[RemoteFile]:
    """The weights, and after them the projector if there is one; `commit` is a layer's digest.

    A start is not checked against the digest of the whole, so it is remembered (by `etag`) as what this server says.
    """

    def file(prefix: str, digest: str, size: int) -> RemoteFile:
        return RemoteFile(
            repository=name.short,
            revision=name.tag,
            path=f"{prefix}{name.model}-{name.tag}.gguf",
            url=f"{_address(server, name)}/blobs/sha256:{digest}",
            size=size,
            etag=hashlib.sha256(f"{server}\n{digest}".encode()).hexdigest(),
            commit=digest,
        )

    weights = file("", layers.digest, layers.size)
    return [weights, file("mmproj-", layers.projector, layers.projector_bytes)] if layers.projector else [weights]


def _fetched(http: httpx.Client, tag: OllamaTag, file: RemoteFile) -> GgufHeader:
    """The header of the weights, of which as many bytes are read as hold it."""
    data = b""
    count = _FIRST_BYTES
    while True:
        try:
            data += read_range(http, file.url, len(data), min(count, file.size), headers=_headers())
        except (OSError, ValueError) as error:  # an address that it redirects to
            raise Unavailable(f"it redirects to where nothing can be ({error})", code="bad-server") from error
        if header := read_gguf_start(data, path=Path(str(tag)), size=file.size):
            remember_start(file, data)
            return header
        if len(data) >= min(file.size, _MOST_BYTES):
            raise BadModel(f"{tag} is not a usable model: its header does not end within {len(data):,} bytes")
        count *= 2


def _kept(tag: OllamaTag, file: RemoteFile) -> GgufHeader | None:
    """The header of the weights as it was remembered; None if it was not, or was damaged since."""
    data = recall_start(file)
    try:
        return read_gguf_start(data, path=Path(str(tag)), size=file.size) if data else None
    except BadModel:
        return None


def _remembered(tag: OllamaTag, known: Known) -> TaggedModel | None:
    files = [known.files[path] for path in known.paths if path in known.files]
    header = _kept(tag, files[0]) if files else None
    if not header:
        return None
    layers = Layers(digest=files[0].commit, size=files[0].size, projector_bytes=sum(file.size for file in files[1:]))
    return _planned(tag, header, layers)


def _planned(tag: OllamaTag, header: GgufHeader, layers: Layers) -> TaggedModel:
    return _model(tag, facts_from_header(join_parts([header])), header.path.stem, layers)


def _model(tag: OllamaTag, facts: ModelFacts, stem: str, layers: Layers, *, path: Path | None = None) -> TaggedModel:
    """The model with these facts; `stem` is the name they have of a file that names no model."""
    name = f"{tag.name}:{tag.tag}" if facts.name == stem else facts.name
    return TaggedModel(
        tag=tag,
        facts=replace(facts, name=name),
        path=path,
        file_bytes=facts.file_bytes,
        digest=f"sha256:{layers.digest}",
        projector_bytes=layers.projector_bytes,
    )
