"""The GGUF models on this machine: in the cache that all users of Hugging Face share, and in mgpu's own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mgpu.errors import BadModel, Missing
from mgpu.models.choice import models_among, part_count, quantisation_in
from mgpu.models.gguf import GgufHeader, read_gguf
from mgpu.models.gguf_facts import quantisation_of
from mgpu.models.hub import RemoteFile, cache_folder
from mgpu.models.remembered import described_files
from mgpu.models.wheel import wheel_cache_folder, wheel_cache_path

if TYPE_CHECKING:
    from mgpu.profile import Profile

State = Literal["complete", "partial", "broken"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """A model on disk. `path` is its file, of a split model the first part that is there, of an unfinished download
    what is there so far; `bytes` are on disk, `total_bytes` the whole (None where unknown).

    `repository` is the one on Hugging Face it came from, `profile` the one it belongs to. `last_used` is when a file
    was last read or written, in seconds since 1970, as far as the file system keeps it. `problem` says why a model is
    "partial" or "broken".
    """

    path: Path
    name: str
    quantisation: str | None
    bytes: int
    total_bytes: int | None
    repository: str | None
    profile: str | None
    last_used: float
    state: State
    problem: str | None

    @property
    def argument(self) -> str:
        """The MODEL that means it on a command line."""
        if self.profile:
            return self.profile
        if not self.repository:
            return str(self.path)
        return f"hf:{self.repository}" + (f":{self.quantisation}" if self.quantisation else "")


def local_models(profiles: Sequence[Profile] = ()) -> tuple[LocalModel, ...]:
    """Return every GGUF model in the caches, by name; `profiles` are those that one of them may belong to.

    Vision projectors and importance matrices are left out, and so is what cannot be read.
    """
    owners = _Owners(profiles)
    found = [*_in_hub_cache(owners), *_in_own_cache(owners)]
    return tuple(sorted(found, key=lambda model: (model.argument.lower(), model.quantisation or "", str(model.path))))


@dataclass(frozen=True, slots=True)
class _Owner:
    """The profile that a file belongs to, and the quantisation it is there."""

    profile: str
    quantisation: str


class _Owners:
    """Which profile a file belongs to: by its checksum, its place in a repository, or its place in mgpu's cache."""

    def __init__(self, profiles: Sequence[Profile]) -> None:
        self._owners: dict[object, _Owner] = {}
        for profile in profiles:
            for quantisation, source in profile.quantisations.items():
                keys: list[object] = [*source.sha256]
                keys += [(source.repository, name) for name in source.files or (quantisation,)]
                keys += [wheel_cache_path(source.wheel)] if source.wheel else []
                for key in keys:
                    self._owners.setdefault(key, _Owner(profile.name, quantisation))

    def of_file(self, repository: str, name: str | None, checksum: str) -> _Owner | None:
        """The owner of a file called `name` (None: not known) in a repository."""
        keys = [checksum, (repository, name), (repository, quantisation_in(name) if name else None)]
        return next((self._owners[key] for key in keys if key in self._owners), None)

    def of_path(self, path: Path) -> _Owner | None:
        """The owner of a file in mgpu's own cache."""
        return self._owners.get(path)


def _in_hub_cache(owners: _Owners) -> Iterator[LocalModel]:
    described = {file.etag: file for file in described_files()}
    for folder in _listed(cache_folder(), "models--*"):
        repository = folder.name.removeprefix("models--").replace("--", "/", 1)
        seen: set[Path] = set()
        for snapshot in _snapshots(folder):
            files = (path for path in _listed(snapshot, "**/*.gguf") if not path.is_dir())
            models = models_among(str(path.relative_to(snapshot)) for path in files)
            for stem, names in models.items():
                content = Path(os.path.realpath(snapshot / names[0]))
                if content not in seen:
                    seen.add(content)
                    owner = owners.of_file(repository, names[0], content.name)
                    yield from _model(Path(stem).stem, [snapshot / name for name in names], repository, owner)
        for path in _listed(folder / "blobs", "*.incomplete"):
            checksum = path.name.split(".")[0]
            known = described.get(checksum)
            owner = owners.of_file(repository, known.path if known else None, checksum)
            yield from _unfinished(path, repository, owner, known)


def _snapshots(folder: Path) -> list[Path]:
    """A repository's snapshots: the one that `main` is comes first."""
    current = None
    with contextlib.suppress(OSError, UnicodeDecodeError):
        current = (folder / "refs" / "main").read_text().strip()
    return sorted(_listed(folder / "snapshots", "*"), key=lambda path: path.name != current)


def _in_own_cache(owners: _Owners) -> Iterator[LocalModel]:
    for path in _listed(wheel_cache_folder(), "*/*.gguf"):
        yield from _model(path.stem, [path], None, owners.of_path(path))
    for folder in _listed(wheel_cache_folder(), "*/.*.unpacking"):
        target = folder.with_name(folder.name.removeprefix(".").removesuffix(".unpacking"))
        yield from _partial(folder, _size(folder), target.stem, None, owners.of_path(target), None)


def _model(name: str, files: Sequence[Path], repository: str | None, owner: _Owner | None) -> Iterator[LocalModel]:
    """The model in `files`, its parts in order; nothing if they are no language model or cannot be read."""
    there = [path for path in files if path.is_file()]
    last_used = max((_last_used(path) for path in there), default=0.0)
    parts = part_count(files[0].name)
    header: GgufHeader | None = None
    state: State = "complete"
    problem = None
    if len(there) < parts:
        state = "partial"
        problem = f"{len(there)} of {parts} parts are there" if parts > 1 else "its content is missing"
    else:
        try:
            header = read_gguf(there[0])
        except BadModel as error:
            state = "partial" if error.code == "model-incomplete" else "broken"
            problem = error.message
        except Missing:
            return
    if header and header.metadata.get("general.type", "model") != "model":
        return
    size = sum(_size(path) for path in there)
    read = quantisation_of(header) if header else None
    yield LocalModel(
        path=(there or files)[0],
        name=name,
        quantisation=owner.quantisation if owner else read or quantisation_in(files[0].name),
        bytes=size,
        total_bytes=size if state == "complete" else None,
        repository=repository,
        profile=owner.profile if owner else None,
        last_used=last_used,
        state=state,
        problem=problem,
    )


def _unfinished(path: Path, repository: str, owner: _Owner | None, known: RemoteFile | None) -> Iterator[LocalModel]:
    """A download that was broken off or is going on; nothing if it is none of a GGUF."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(4) == b"GGUF":
            name = Path(known.path).stem if known else path.name.split(".")[0][:12]
            yield from _partial(path, _size(path), name, repository, owner, known)


def _partial(
    path: Path, size: int, name: str, repository: str | None, owner: _Owner | None, known: RemoteFile | None
) -> Iterator[LocalModel]:
    yield LocalModel(
        path=path,
        name=name,
        quantisation=owner.quantisation if owner else quantisation_in(known.path if known else name),
        bytes=size,
        total_bytes=known.size if known else None,
        repository=repository,
        profile=owner.profile if owner else None,
        last_used=_last_used(path),
        state="partial",
        problem="it is being fetched, or that was broken off",
    )


def _last_used(path: Path) -> float:
    try:
        status = path.stat()
    except OSError:
        return 0.0
    return max(status.st_atime, status.st_mtime)


def _size(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    try:
        return sum(_size(each) for each in path.iterdir()) if path.is_dir() else path.stat().st_size
    except OSError:
        return 0


def _listed(folder: Path, pattern: str) -> Sequence[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return ()
