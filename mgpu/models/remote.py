"""What planning needs to know of a model on the hub, before any of its weights is fetched.

Of a GGUF only the header is read, by HTTP range requests for the first megabytes. Of a repository with safetensors it
is config.json and the sizes of its files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from mgpu.errors import BadModel, Missing, UsageError
from mgpu.models.choice import choose_model, has_quantisation, models_among, no_quantisation, weight_files
from mgpu.models.facts import ModelFacts
from mgpu.models.folder import CONFIG_NAME, loaded_files
from mgpu.models.gguf import GgufHeader, join_parts, read_gguf_start
from mgpu.models.gguf_facts import facts_from_header
from mgpu.models.hf import facts_from_config
from mgpu.models.hf_config import Config, is_called, quantisation
from mgpu.models.hub import Hub, HubFiles, Listing, RemoteFile, endpoint, gguf_paths
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
    """A repository with safetensors: its config.json, and the files that an engine loads with their sizes (None where
    the hub does not tell).

    `unconfirmed` says why the hub could not be asked whether this is still so; None if it was.
    """

    repository: str
    commit: str
    config: Mapping[str, object]
    file_bytes: Mapping[str, int | None]
    unconfirmed: str | None = None

    @property
    def weights_bytes(self) -> int | None:
        """The size of all files together, None if one is not known."""
        sizes = self.file_bytes.values()
        return None if None in sizes else sum(size for size in sizes if size)


def model_on_hub(source: HubRepository) -> RemoteGguf | RemoteConfig:
    """Return what planning needs of the model that `source` means: its GGUF if the repository has any in the wanted
    quantisation, else its safetensors.

    What was read is remembered: the next call asks the hub only whether the repository has changed, and where the hub
    cannot be reached it does without (`unconfirmed`). Raises Missing with the codes of `fetch`, UsageError if the
    repository has no such quantisation, BadModel if it holds no usable model.
    """
    return _read(source, _any_model, _any_remembered)


def folder_on_hub(source: HubRepository) -> RemoteConfig:
    """As `model_on_hub`, for repositories with safetensors only: others raise Missing (`not-found`)."""
    return _read(source, _config_model, _remembered_config)


def is_folder_on_hub(source: HubRepository) -> bool:
    """Whether `model_on_hub` would find safetensors and not a GGUF; no header is read. Raises as it does."""
    return _read(source, _is_folder, lambda source, known, _: _means_folder(source, known) and known.config is not None)


def facts_from_remote(remote: RemoteConfig, name: str) -> ModelFacts:
    """Return the facts of a repository with safetensors, named `name`.

    Raises BadModel if its config.json describes no model that can be used, Missing (code "size-unknown") if the hub
    does not tell how large its weights are.
    """
    weights_bytes = remote.weights_bytes
    if weights_bytes is None:
        raise Missing(
            f"the hub does not tell how large the weights of hf:{remote.repository} are",
            code="size-unknown",
            hint=f"fetch them first: mgpu pull hf:{remote.repository}",
        )
    return facts_from_config(remote.config, weights_bytes, name=name, source=f"hf:{remote.repository}")


_FIRST_BYTES = 4 << 20
# Only a split model's first part holds the vocabulary.
_FIRST_BYTES_OF_OTHER_PARTS = 256 << 10
_MOST_BYTES = 64 << 20
_OUT_OF_REACH = ("offline", "hub-unreachable", "rate-limited", "bad-server")


@dataclass(frozen=True, slots=True)
class _Repository:
    """A repository as the hub has it now, or had it at the commit of `known`; `listing` if it was asked for."""

    known: Known
    listing: Listing | None = None


_Found = TypeVar("_Found")


def _read(
    source: HubRepository,
    read: Callable[[Hub, HubRepository, _Repository], _Found],
    remembered: Callable[[HubRepository, Known, str], _Found | None],
) -> _Found:
    known = recall(endpoint(), source.repository)
    try:
        with Hub() as hub:
            return read(hub, source, _current(hub, source, known))
    except Unavailable as error:
        if known and error.code in _OUT_OF_REACH and (found := remembered(source, known, error.reason)):
            return found
        raise Missing(
            f"{source} cannot be read on Hugging Face: {error.reason}",
            code=error.code,
            hint=error.hint or "check the network, or give the path of a .gguf file",
        ) from error


def _current(hub: Hub, source: HubRepository, known: Known | None) -> _Repository:
    """One question is enough while the repository has not changed."""
    if known and known.files:
        try:
            if hub.describe(source.repository, "main", next(iter(known.files))).commit == known.commit:
                return _Repository(known)
        except Unavailable as error:
            if error.code != "not-found":
                raise
    listing = hub.listing(source.repository, "main")
    if known and known.commit == listing.commit:
        return _Repository(known, listing)
    sizes = {path: listing.sizes[path] for path in weight_files(listing.sizes, None)}
    weights = sizes if CONFIG_NAME in listing.sizes else {}
    return _Repository(Known(commit=listing.commit, paths=gguf_paths(listing), weights=weights), listing)


def _any_model(hub: Hub, source: HubRepository, repository: _Repository) -> RemoteGguf | RemoteConfig:
    read = _config_model if _means_folder(source, repository.known) else _gguf_model
    return read(hub, source, repository)


def _is_folder(hub: Hub, source: HubRepository, repository: _Repository) -> bool:
    if folder := _means_folder(source, repository.known):
        _config_model(hub, source, repository)  # whether it can be used, and in that quantisation
    return folder


def _means_folder(source: HubRepository, known: Known) -> bool:
    """Whether the model is the repository's safetensors, since it has no GGUF in the wanted quantisation."""
    models = models_among(known.paths)
    if not models or not known.weights:
        return not models
    return bool(source.quantisation) and not has_quantisation(models, source.quantisation or "")


def _gguf_model(hub: Hub, source: HubRepository, repository: _Repository) -> RemoteGguf:
    files = _described(hub, source, repository)
    return _gguf(files, [_start(hub, file, first=i == 0) for i, file in enumerate(files)])


def _described(hub: Hub, source: HubRepository, repository: _Repository) -> Sequence[RemoteFile]:
    """The model's files as the hub has them now."""
    known = repository.known
    paths = choose_model(models_among(known.paths), source.quantisation, repository=source.repository)
    if all(path in known.files for path in paths):
        return [known.files[path] for path in paths]
    files = [hub.describe(source.repository, "main", path) for path in paths]
    if all(file.commit == known.commit for file in files):
        described = {**known.files, **{file.path: file for file in files}}
        remember(hub.endpoint, source.repository, replace(known, files=described))
    return files


def _config_model(hub: Hub, source: HubRepository, repository: _Repository) -> RemoteConfig:
    known = repository.known
    if known.config is None:
        listing = repository.listing or hub.listing(source.repository, "main")
        weights = loaded_files(hub, source.repository, "main", listing)
        (file,) = hub.describe_listed(source.repository, "main", listing, [CONFIG_NAME])
        known = replace(
            known,
            config=hub.json(file),
            weights={path: listing.sizes[path] for path in weights},
            files={**known.files, file.path: file},
        )
        if file.commit == known.commit == listing.commit:
            remember(hub.endpoint, source.repository, known)
    return _config(source, known)


def _config(source: HubRepository, known: Known, unconfirmed: str | None = None) -> RemoteConfig:
    """Raises UsageError if the safetensors are not in the wanted quantisation."""
    config = known.config or {}
    stored = quantisation(Config(config, str(source)))
    if source.quantisation and not is_called(stored, source.quantisation):
        raise no_quantisation(models_among(known.paths), source.quantisation, source.repository, also=stored)
    return RemoteConfig(
        repository=source.repository,
        commit=known.commit,
        config=config,
        file_bytes=known.weights,
        unconfirmed=unconfirmed,
    )


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


def _any_remembered(source: HubRepository, known: Known, why: str) -> RemoteGguf | RemoteConfig | None:
    read = _remembered_config if _means_folder(source, known) else _remembered_gguf
    return read(source, known, why)


def _remembered_config(source: HubRepository, known: Known, why: str) -> RemoteConfig | None:
    return _config(source, known, why) if known.config is not None else None


def _remembered_gguf(source: HubRepository, known: Known, why: str) -> RemoteGguf | None:
    try:
        paths = choose_model(models_among(known.paths), source.quantisation, repository=source.repository)
        files = [known.files[path] for path in paths]
    except (UsageError, KeyError):
        return None
    parts = [_kept(file) for file in files]
    if None in parts:
        return None
    return replace(_gguf(files, [part for part in parts if part]), unconfirmed=why)
