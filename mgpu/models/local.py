"""The models on this machine: in the cache that all users of Hugging Face share, and in mgpu's own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mgpu.errors import BadModel, Missing
from mgpu.models.choice import models_among, part_count, quantisation_in
from mgpu.models.gguf import GgufHeader, read_gguf
from mgpu.models.gguf_facts import quantisation_of
from mgpu.models.hub import RemoteFile, cache_folder
from mgpu.models.local_folders import folders_in_hub_cache
from mgpu.models.local_model import LocalModel, Owner, Owners, State, last_used, listed, size_of, snapshots
from mgpu.models.remembered import described_files
from mgpu.models.wheel import wheel_cache_folder

if TYPE_CHECKING:
    from mgpu.profile import Profile

__all__ = ["LocalModel", "Owners", "local_models"]


def local_models(profiles: Sequence[Profile] = ()) -> tuple[LocalModel, ...]:
    """Return every model in the caches, by name; `profiles` are those that one of them may belong to.

    Vision projectors and importance matrices are left out, and so is what cannot be read.
    """
    owners = Owners(profiles)
    found = [*_in_hub_cache(owners), *folders_in_hub_cache(owners), *_in_own_cache(owners)]
    return tuple(sorted(found, key=lambda model: (model.argument.lower(), model.quantisation or "", str(model.path))))


def _in_hub_cache(owners: Owners) -> Iterator[LocalModel]:
    described = {file.etag: file for file in described_files()}
    for folder in listed(cache_folder(), "models--*"):
        repository = folder.name.removeprefix("models--").replace("--", "/", 1)
        seen: set[Path] = set()
        for snapshot in snapshots(folder):
            files = (path for path in listed(snapshot, "**/*.gguf") if not path.is_dir())
            models = models_among(str(path.relative_to(snapshot)) for path in files)
            for stem, names in models.items():
                content = Path(os.path.realpath(snapshot / names[0]))
                if content not in seen:
                    seen.add(content)
                    owner = owners.of_file(repository, names[0], content.name)
                    yield from _model(Path(stem).stem, [snapshot / name for name in names], repository, owner)
        begun: list[LocalModel] = []
        for path in listed(folder / "blobs", "*.incomplete"):
            checksum = path.name.split(".")[0]
            known = described.get(checksum)
            owner = owners.of_file(repository, known.path if known else None, checksum)
            begun += _unfinished(path, repository, owner, known)
        yield from _joined(begun)


def _in_own_cache(owners: Owners) -> Iterator[LocalModel]:
    for path in listed(wheel_cache_folder(), "*/*.gguf"):
        yield from _model(path.stem, [path], None, owners.of_path(path))
    for folder in listed(wheel_cache_folder(), "*/.*.unpacking"):
        target = folder.with_name(folder.name.removeprefix(".").removesuffix(".unpacking"))
        yield from _partial(folder, size_of(folder), target.stem, None, owners.of_path(target), None)


def _model(name: str, files: Sequence[Path], repository: str | None, owner: Owner | None) -> Iterator[LocalModel]:
    """The model in `files`, its parts in order; nothing if they are no language model or cannot be read."""
    there = [path for path in files if path.is_file()]
    used = max((last_used(path) for path in there), default=0.0)
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
    size = sum(size_of(path) for path in there)
    read = quantisation_of(header) if header else None
    yield LocalModel(
        format="gguf",
        path=(there or files)[0],
        name=name,
        quantisation=owner.quantisation if owner else read or quantisation_in(files[0].name),
        bytes=size,
        total_bytes=size if state == "complete" else None,
        repository=repository,
        profile=owner.profile if owner else None,
        last_used=used,
        state=state,
        problem=problem,
    )


def _joined(begun: Iterable[LocalModel]) -> Iterator[LocalModel]:
    """The parts of a split model, which come side by side, as one."""
    models: dict[str, LocalModel] = {}
    for part in begun:
        if first := models.get(part.argument):
            part = replace(
                first,
                bytes=first.bytes + part.bytes,
                total_bytes=first.total_bytes and part.total_bytes and first.total_bytes + part.total_bytes,
                last_used=max(first.last_used, part.last_used),
            )
        models[part.argument] = part
    yield from models.values()


def _unfinished(path: Path, repository: str, owner: Owner | None, known: RemoteFile | None) -> Iterator[LocalModel]:
    """A download that was broken off or is going on; nothing if it is none of a GGUF."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(4) == b"GGUF":
            name = Path(known.path).stem if known else path.name.split(".")[0][:12]
            yield from _partial(path, size_of(path), name, repository, owner, known)


def _partial(
    path: Path, size: int, name: str, repository: str | None, owner: Owner | None, known: RemoteFile | None
) -> Iterator[LocalModel]:
    yield LocalModel(
        format="gguf",
        path=path,
        name=name,
        quantisation=owner.quantisation if owner else quantisation_in(known.path if known else name),
        bytes=size,
        total_bytes=known.size if known else None,
        repository=repository,
        profile=owner.profile if owner else None,
        last_used=last_used(path),
        state="partial",
        problem="it is being fetched, or that was broken off",
    )
