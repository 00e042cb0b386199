"""What was learnt of repositories on the hub, kept on disk: a second plan asks next to nothing.

File headers are kept under their checksum, so they never age. What a repository held is kept with the commit at which
it was so. Nothing here is needed: what cannot be read or written is as if it were not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mgpu.models.hub import RemoteFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A repository as it was at `commit`: the paths of its GGUF files, and the files described so far by path.

    `weights` are the sizes of its safetensors (None where the hub did not tell), none if it has no config.json;
    `config` is that file once it was read, and `weights` are then those that engines load.
    """

    commit: str
    paths: tuple[str, ...]
    files: Mapping[str, RemoteFile] = field(default_factory=dict)
    weights: Mapping[str, int | None] = field(default_factory=dict)
    config: Mapping[str, object] | None = None


def recall(endpoint: str, repository: str) -> Known | None:
    """Return what is known of a repository on the hub at `endpoint`, None if nothing is."""
    try:
        data = json.loads(_record(endpoint, repository).read_text())
        return Known(
            commit=_text(data["commit"]),
            paths=tuple(_text(path) for path in data["paths"]),
            files={file.path: file for file in (_file(entry) for entry in data["files"])},
            weights={_text(path): _size(size) for path, size in data["weights"].items()},
            config=_object(data["config"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def remember(endpoint: str, repository: str, known: Known) -> None:
    """Keep what is known of a repository."""
    files = [asdict(file) for file in known.files.values()]
    data = {
        "repository": repository,
        "commit": known.commit,
        "paths": known.paths,
        "files": files,
        "weights": dict(known.weights),
        "config": known.config,
    }
    _write(_record(endpoint, repository), json.dumps(data).encode())


def recall_start(file: RemoteFile) -> bytes | None:
    """Return the first bytes of a file as they were kept, None if none are."""
    if not file.sha256:
        return None
    try:
        path = _start(file.sha256)
        data = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    return data


def remember_start(file: RemoteFile, start: bytes) -> None:
    """Keep the first bytes of a file, if it has a checksum to know it by."""
    if file.sha256:
        _write(_start(file.sha256), start)
        _prune(_start(file.sha256).parent)


def described_files() -> Iterator[RemoteFile]:
    """Yield every file that anything is known of."""
    with contextlib.suppress(OSError):
        for path in sorted((_folder() / "repositories").glob("*.json")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                yield from [_file(entry) for entry in json.loads(path.read_text())["files"]]


# A header takes some 8 MB, most of it vocabulary. The oldest go first.
_MOST_HEADERS = 64


def _folder() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("mgpu") / "hub"


def _record(endpoint: str, repository: str) -> Path:
    name = hashlib.sha256(f"{endpoint}\n{repository}".encode()).hexdigest()[:32]
    return _folder() / "repositories" / f"{name}.json"


def _start(sha256: str) -> Path:
    return _folder() / "headers" / sha256


def _write(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    work = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            work.write_bytes(data)
            work.replace(path)
        finally:
            work.unlink(missing_ok=True)


def _prune(folder: Path) -> None:
    with contextlib.suppress(OSError):
        paths = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
        for path in paths[:-_MOST_HEADERS]:
            path.unlink(missing_ok=True)


def _file(data: Mapping[str, object]) -> RemoteFile:
    size = _size(data["size"])
    if size is None:
        raise ValueError("no size")
    etag = _text(data["etag"])
    if not re.fullmatch("[A-Za-z0-9_-]{1,128}", etag):  # it becomes a file's name
        raise ValueError("no etag")
    return RemoteFile(
        repository=_text(data["repository"]),
        revision=_text(data["revision"]),
        path=_text(data["path"]),
        url=_text(data["url"]),
        size=size,
        etag=etag,
        commit=_text(data["commit"]),
    )


def _size(value: object) -> int | None:
    if value is not None and (not isinstance(value, int) or value < 0):
        raise ValueError("no size")
    return value


def _object(value: object) -> Mapping[str, object] | None:
    if value is not None and not isinstance(value, dict):
        raise TypeError("no object")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value
