"""What planning needs to know of a model on the hub, before any of its weights is fetched.

Of a GGUF only the header is read, by HTTP range requests for the first megabytes. Of a repository with safetensors it
is config.json and the sizes of its files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mgpu.errors import BadModel, Missing, UsageError
from mgpu.models.choice import choose_model, models_among
from mgpu.models.facts import ModelFacts
from mgpu.models.gguf import GgufHeader, join_parts, read_gguf_start
from mgpu.models.gguf_facts import facts_from_header
from mgpu.models.hub import Hub, HubFiles, RemoteFile, endpoint
from mgpu.models.remembered import Known, recall, recall_start, remember, remember_start
from mgpu.models.source import HubRepository
from mgpu.models.transfer import Unavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStart:
    """The first bytes of a file of `size` bytes, its whole header among them."""

    name: str
    size: int
    start: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteGguf:
    """A GGUF model on the hub: its facts, its files (for `fetch`), and how each of them begins.

    `unconfirmed` says why the hub could not be asked whether this is still so; None if it was.
    """

    facts: ModelFacts
    files: HubFiles
    starts: tuple[FileStart, ...]
    unconfirmed: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteConfig:
    """A repository with safetensors: its config.json, the index of its tensors (None if one file holds them all), and
    the files that an engine loads with their sizes (None where the hub does not tell).

    `facts_from_config` makes facts of it, with `weights_bytes`, or with each tensor's from the headers of the files.
    """

    repository: str
    commit: str
    config: Mapping[str, object]
    index: Mapping[str, object] | None
    file_bytes: Mapping[str, int | None]

    @property
    def weights_bytes(self) -> int | None:
        """The size of all files together, None if one is not known."""
        sizes = self.file_bytes.values()
        return None if None in sizes else sum(size for size in sizes if size)


def header_from_hub(source: HubRepository) -> ModelFacts:
    """Return the facts of the model that `gguf_on_hub` finds."""
    return gguf_on_hub(source).facts


def gguf_on_hub(source: HubRepository) -> RemoteGguf:
    """Read the header of the GGUF model that `fetch` would take of `source`: some megabytes, once.

    What was read is remembered: the next call asks the hub only whether the repository has changed, and where the hub
    cannot be reached it does without (`unconfirmed`). Raises Missing with the codes of `fetch`, UsageError if the
    repository has no such quantisation, BadModel if it holds no usable model.
    """
    known = recall(endpoint(), source.repository)
    try:
        with Hub() as hub:
            files = _described(hub, source, known)
            return _gguf(files, [_start(hub, file, first=i == 0) for i, file in enumerate(files)])
    except Unavailable as error:
        if known and error.code in _OUT_OF_REACH and (found := _remembered(source, known, error.reason)):
            return found
        raise _missing(source, error) from error


def config_from_hub(source: HubRepository) -> RemoteConfig:
    """Read config.json and the index of a repository with safetensors.

    Raises Missing with the codes of `fetch`; `not-found` also where the repository holds no such model.
    """
    try:
        with Hub() as hub:
            listing = hub.listing(source.repository, "main")
            found = {path: size for path, size in listing.sizes.items() if path.endswith(".safetensors")}
            if not found or "config.json" not in listing.sizes:
                raise Unavailable(f"{source.repository} has no safetensors with a config.json", code="not-found")
            index = _json(hub, source, _INDEX) if _INDEX in listing.sizes else None
            return RemoteConfig(
                repository=source.repository,
                commit=listing.commit,
                config=_json(hub, source, "config.json"),
                index=index,
                file_bytes=_loaded(found, index),
            )
    except Unavailable as error:
        raise _missing(source, error) from error


_FIRST_BYTES = 4 << 20
# Only a split model's first part holds the vocabulary.
_FIRST_BYTES_OF_OTHER_PARTS = 256 << 10
_MOST_BYTES = 64 << 20
_MOST_JSON_BYTES = 32 << 20
_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_OUT_OF_REACH = ("offline", "hub-unreachable", "rate-limited", "bad-server")


def _described(hub: Hub, source: HubRepository, known: Known | None) -> Sequence[RemoteFile]:
    """The model's files as the hub has them now. One question is enough while the repository has not changed."""
    if known and (files := _files(source, known)):
        try:
            if hub.describe(source.repository, "main", files[0].path).commit == known.commit:
                return files
        except Unavailable as error:
            if error.code != "not-found":
                raise
    listing = hub.listing(source.repository, "main")
    models = models_among(listing.sizes)
    if not models:
        raise Unavailable(
            f"{source.repository} has no GGUF files",
            code="not-found",
            hint="give a repository with GGUF files; their names often end in -GGUF",
        )
    paths = choose_model(models, source.quantisation, repository=source.repository)
    files = [hub.describe(source.repository, "main", path) for path in paths]
    if all(file.commit == listing.commit for file in files):
        before = known.files if known and known.commit == listing.commit else {}
        gguf_paths = tuple(path for model in models.values() for path in model)
        described = {**before, **{file.path: file for file in files}}
        remember(hub.endpoint, source.repository, Known(commit=listing.commit, paths=gguf_paths, files=described))
    return files


def _files(source: HubRepository, known: Known) -> list[RemoteFile] | None:
    """The model's files as they were, None if they were not all described."""
    models = models_among(known.paths)
    try:
        paths = choose_model(models, source.quantisation, repository=source.repository)
        return [known.files[path] for path in paths]
    except (UsageError, KeyError):
        return None


def _start(hub: Hub, file: RemoteFile, *, first: bool) -> tuple[FileStart, GgufHeader]:
    """The first bytes of a file, as many as hold its header."""
    if kept := _kept(file):
        return kept
    data = b""
    count = _FIRST_BYTES if first else _FIRST_BYTES_OF_OTHER_PARTS
    while True:
        data += hub.read(file, len(data), min(count, file.size))
        if header := _header(file, data):
            remember_start(file, data)
            return FileStart(name=Path(file.path).name, size=file.size, start=data), header
        if len(data) >= min(file.size, _MOST_BYTES):
            raise BadModel(
                f"{_address(file)} is not a usable model: its header does not end within {len(data):,} bytes",
                hint="give another repository",
            )
        count *= 2


def _kept(file: RemoteFile) -> tuple[FileStart, GgufHeader] | None:
    data = recall_start(file)
    if not data:
        return None
    try:
        header = _header(file, data)
    except BadModel:  # the disk has damaged what was good
        return None
    return (FileStart(name=Path(file.path).name, size=file.size, start=data), header) if header else None


def _header(file: RemoteFile, start: bytes) -> GgufHeader | None:
    return read_gguf_start(start, path=_address(file), size=file.size)


def _address(file: RemoteFile) -> Path:
    """What messages call a file on the hub."""
    return Path(f"hf:{file.repository}") / file.path


def _gguf(files: Sequence[RemoteFile], parts: Iterable[tuple[FileStart, GgufHeader]]) -> RemoteGguf:
    starts, headers = zip(*parts, strict=True)
    return RemoteGguf(
        facts=facts_from_header(join_parts(headers)),
        files=HubFiles(
            repository=files[0].repository,
            files=tuple(file.path for file in files),
            sha256=tuple(file.sha256 for file in files),
            bytes=sum(file.size for file in files),
        ),
        starts=starts,
    )


def _remembered(source: HubRepository, known: Known, why: str) -> RemoteGguf | None:
    files = _files(source, known)
    parts = [_kept(file) for file in files or ()]
    if not files or None in parts:
        return None
    return replace(_gguf(files, [part for part in parts if part]), unconfirmed=why)


def _loaded(found: Mapping[str, int | None], index: Mapping[str, object] | None) -> Mapping[str, int | None]:
    """Of a repository's safetensors those that engines load: it may hold the weights in another format beside them."""
    parts = index.get("weight_map") if index else None
    wanted = {str(name) for name in parts.values()} if isinstance(parts, dict) else {_WHOLE}
    return {path: size for path, size in found.items() if path in wanted} or found


def _json(hub: Hub, source: HubRepository, path: str) -> Mapping[str, object]:
    file = hub.describe(source.repository, "main", path)
    if file.size > _MOST_JSON_BYTES:
        raise BadModel(f"{_address(file)} is not a usable model: it has {file.size:,} bytes")
    try:
        data = json.loads(hub.read(file, 0, file.size))
    except (ValueError, RecursionError) as error:
        raise BadModel(f"{_address(file)} is not JSON", hint=f"see {hub.endpoint}/{source.repository}") from error
    if not isinstance(data, dict):
        raise BadModel(f"{_address(file)} is no JSON object", hint=f"see {hub.endpoint}/{source.repository}")
    return data


def _missing(source: HubRepository, error: Unavailable) -> Missing:
    return Missing(
        f"{source} cannot be read on Hugging Face: {error.reason}",
        code=error.code,
        hint=error.hint or "check the network, or give the path of a .gguf file",
    )
