"""Getting a repository with safetensors onto this machine: the folder that vLLM loads, in the cache that all share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mgpu.errors import BadModel, Missing
from mgpu.models.choice import folder_files, weight_files
from mgpu.models.fetch import Survey
from mgpu.models.hub import Hub, Listing, RemoteFile, cache_folder, cached_snapshot, gguf_paths, link
from mgpu.models.pieces import Piece, cached_piece, fetch_pieces, missing_bytes, refuse_others
from mgpu.models.remembered import Known, recall, remember
from mgpu.models.safetensors import INDEX_NAME, files_named_by, weights_in
from mgpu.models.transfer import OnProgress, Unavailable, as_missing, require_space, steadily

CONFIG_NAME = "config.json"


def find_local_folder(repository: str, revision: str = "main") -> Path | None:
    """The model's folder in the cache of Hugging Face if it is complete, else None: config.json, a tokenizer, and every
    weight file. Asks no network."""
    try:
        folder = cached_snapshot(repository, revision)
        complete = (folder / CONFIG_NAME).is_file() and has_tokenizer(folder) and weights_in(folder)
    except (OSError, UnicodeDecodeError, BadModel):  # a cache that cannot be read holds nothing for us
        return None
    return folder if complete else None


def survey_folder(repository: str, revision: str = "main") -> Survey:
    """Say what `fetch_folder` would do, without doing it. Raises what it raises before it downloads."""
    if found := find_local_folder(repository, revision):
        return Survey(name=repository, path=found, total_bytes=None, missing_bytes=0, folder=found.parent)
    try:
        with Hub() as hub:
            pieces = _pieces(hub, repository, revision)
    except Unavailable as error:
        raise _failed(repository, error) from error
    return Survey(
        name=repository,
        path=None,
        total_bytes=sum(piece.remote.size for piece in pieces),
        missing_bytes=missing_bytes(pieces),
        folder=pieces[0].target.parent,
    )


def fetch_folder(repository: str, revision: str = "main", *, on_progress: OnProgress = lambda _: None) -> Path:
    """Return the folder of the model in `repository` on this machine, fetching what is not there of it.

    That is config.json, tokenizer, chat template and safetensors: no programs, and no weights in other formats. A
    download that was broken off is continued by the next call; others that use the cache see the model when it is
    whole. `on_progress` is called from this thread, some ten times a second. Raises Missing with the codes of `fetch`.
    """
    try:
        if found := find_local_folder(repository, revision):
            return found
        with Hub() as hub:
            pieces = _pieces(hub, repository, revision)
            require_space(pieces[0].target.parent, missing_bytes(pieces))
            fetch_pieces(hub, pieces, repository, steadily(on_progress))
        # The configuration comes last: without it there is no model.
        for piece in sorted(pieces, key=lambda piece: piece.remote.path == CONFIG_NAME):
            pointer = link(piece.remote)
        return pointer.parent
    except Unavailable as error:
        raise _failed(repository, error) from error
    except OSError as error:
        raise as_missing(error, cache_folder()) from error


def loaded_files(hub: Hub, repository: str, revision: str, listing: Listing) -> tuple[str, ...]:
    """The weight files in a repository that engines load.

    Raises Unavailable (`not-found`) if there are none, or one that the index names is not there; BadModel if the index
    is none.
    """
    indexed = None
    if INDEX_NAME in listing.sizes:
        (index,) = hub.describe_listed(repository, revision, listing, [INDEX_NAME])
        try:
            indexed = files_named_by(hub.json(index))
        except ValueError as error:
            raise BadModel(f"hf:{repository}/{INDEX_NAME} is not an index of weight files") from error
    found = weight_files(listing.sizes, indexed)
    if indexed and len(found) < len(indexed):
        absent = sorted({*indexed} - {*found})
        raise Unavailable(f"{repository} has no file {absent[0]!r}, which its index names", code="not-found")
    if not found or CONFIG_NAME not in listing.sizes:
        raise Unavailable(no_model(repository, listing), code="not-found", hint=_OTHERS)
    return found


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder holds a tokenizer of any kind."""
    return any(path.is_file() for pattern in _TOKENIZERS for path in folder.glob(pattern))


def no_model(repository: str, listing: Listing) -> str:
    """Say that a repository holds no model that can be used, and what it holds instead."""
    paths = list(listing.sizes)
    wanted = f"{repository} has neither GGUF files nor safetensors with a config.json"
    pickled = [path for path in paths if path.endswith((".bin", ".pth", ".pt", ".ckpt"))]
    if pickled:
        return f"{wanted}, but {pickled[0]}, a format that can carry programs"
    shown = ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
    return f"{wanted}; it holds {shown or 'nothing'}"


_OTHERS = "give a repository with GGUF files (for llama.cpp) or with safetensors (for vLLM)"
# One of these is what makes text of tokens: fast, SentencePiece, byte pairs, Mistral's own, OpenAI's.
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "tekken.json", "*.tiktoken")


def _pieces(hub: Hub, repository: str, revision: str) -> list[Piece]:
    listing = hub.listing(repository, revision)
    weights = loaded_files(hub, repository, revision, listing)
    paths = [CONFIG_NAME, *(path for path in folder_files(listing.sizes) if path != CONFIG_NAME), *weights]
    remotes = hub.describe_listed(repository, revision, listing, paths)
    if revision == "main":
        _note(hub.endpoint, repository, listing, remotes, weights)
    pieces = [cached_piece(remote) for remote in remotes]
    refuse_others(pieces)
    return pieces


def _note(
    endpoint: str, repository: str, listing: Listing, remotes: Sequence[RemoteFile], weights: Sequence[str]
) -> None:
    """Keep the files' names and sizes by their checksums: of a download that was broken off there is no other trace."""
    known = recall(endpoint, repository)
    if known is None or known.commit != remotes[0].commit:
        known = Known(commit=remotes[0].commit, paths=gguf_paths(listing))
    described = {remote.path: remote for remote in remotes}
    sizes = {path: described[path].size for path in weights}
    remember(endpoint, repository, replace(known, files={**known.files, **described}, weights=sizes))


def _failed(repository: str, error: Unavailable) -> Missing:
    return Missing(
        f"hf:{repository} could not be fetched: {error.reason}",
        code=error.code,
        hint=error.hint or "check the network, or give the path of a model's folder",
    )
