"""The models of safetensors in the cache that all users of Hugging Face share: whole ones, and what was begun."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from mgpu.errors import BadModel
from mgpu.models.folder import CONFIG_NAME, has_tokenizer
from mgpu.models.hf_config import Config, quantisation
from mgpu.models.hub import RemoteFile, cache_folder
from mgpu.models.local_model import LocalModel, Owners, State, last_used, listed, size_of, snapshots
from mgpu.models.remembered import described_files
from mgpu.models.safetensors import INDEX_NAME, indexed_files, weights_in


def folders_in_hub_cache(owners: Owners) -> Iterator[LocalModel]:
    """Yield the model of each repository that has safetensors here: that of `main`, else of any commit.

    Weights are not read, which would count as using them; a repository of which nothing but its configuration is here
    is left out.
    """
    begun: dict[str, list[RemoteFile]] = {}
    for file in described_files():
        begun.setdefault(file.repository, []).append(file)
    for folder in listed(cache_folder(), "models--*"):
        repository = folder.name.removeprefix("models--").replace("--", "/", 1)
        found = [model for snapshot in snapshots(folder) for model in _in_snapshot(snapshot, repository)]
        if all(model.state != "complete" for model in found):
            found = [*_begun(folder / "blobs", repository, begun.get(repository, ())), *found]
        for model in found[:1]:
            owner = owners.of_repository(repository)
            yield replace(
                model,
                profile=owner.profile if owner else None,
                quantisation=model.quantisation or (owner.quantisation if owner else None),
            )


_GOES_ON = "it is being fetched, or that was broken off"


def _in_snapshot(snapshot: Path, repository: str) -> Iterator[LocalModel]:
    weights = [path for path in listed(snapshot, "*.safetensors") if not path.is_dir()]
    config = snapshot / CONFIG_NAME
    if not weights or not (config.exists() or (snapshot / INDEX_NAME).exists()):
        return
    files = [path for path in listed(snapshot, "*") if path.is_file()]
    state: State = "complete"
    problem = None
    try:
        weights_in(snapshot)
        if not config.is_file() or not has_tokenizer(snapshot):
            state, problem = "partial", f"{CONFIG_NAME if not config.is_file() else 'its tokenizer'} is missing"
    except BadModel as error:
        state, problem = ("partial" if error.code == "model-missing" else "broken"), _in_few_words(snapshot, error)
    size = sum(size_of(path) for path in files)
    yield LocalModel(
        format="safetensors",
        path=snapshot,
        name=repository.split("/")[-1],
        quantisation=_quantisation(config),
        bytes=size,
        total_bytes=size if state == "complete" else None,
        repository=repository,
        profile=None,
        last_used=max((last_used(path) for path in weights), default=0.0),
        state=state,
        problem=problem,
    )


def _in_few_words(snapshot: Path, error: BadModel) -> str:
    with contextlib.suppress(BadModel, OSError):
        names = indexed_files(snapshot / INDEX_NAME)
        there = sum((snapshot / name).is_file() for name in names)
        return f"{there} of {len(names)} weight files are there"
    return error.message


def _begun(blobs: Path, repository: str, files: Iterable[RemoteFile]) -> Iterator[LocalModel]:
    """A download of this program's that is going on or was broken off, by what was remembered of its files."""
    files = [file for file in files if not file.path.endswith(".gguf")]
    if not any(file.path.endswith(".safetensors") for file in files):
        return
    there = {file: path for file in files for path in (file.blob, file.partial) if path.is_file()}
    weights = [path for file, path in there.items() if file.path.endswith(".safetensors")]
    if not weights:
        return
    config = next((path for file, path in there.items() if file.path == CONFIG_NAME), None)
    yield LocalModel(
        format="safetensors",
        path=blobs,
        name=repository.split("/")[-1],
        quantisation=_quantisation(config) if config else None,
        bytes=sum(size_of(path) for path in there.values()),
        total_bytes=sum(file.size for file in files),
        repository=repository,
        profile=None,
        last_used=max(last_used(path) for path in weights),
        state="partial",
        problem=_GOES_ON,
    )


def _quantisation(config: Path) -> str | None:
    try:
        return quantisation(Config(json.loads(config.read_bytes()), str(config)))
    except (OSError, ValueError, RecursionError, BadModel):
        return None
