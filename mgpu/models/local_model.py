"""What is known of a model on this machine's disk, and what finding models there needs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mgpu.models.choice import quantisation_in
from mgpu.models.wheel import wheel_cache_path

if TYPE_CHECKING:
    from mgpu.profile import Profile

Format = Literal["gguf", "safetensors", "ollama"]
State = Literal["complete", "partial", "broken"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """A model on disk. `path` is its file or folder, of a split model the first part that is there, of an unfinished
    download what is there so far; None where only Ollama knows. `bytes` are on disk, `total_bytes` the whole (None
    where unknown).

    `repository` is the one on Hugging Face it came from, `profile` the one it belongs to. `last_used` is when a file
    was last read or written, in seconds since 1970, as far as the file system keeps it. `problem` says why a model is
    "partial" or "broken".
    """

    format: Format
    path: Path | None
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
        if self.format == "ollama":
            return f"ollama:{self.name}"
        if self.format == "safetensors":  # a profile's name alone means its GGUF
            return f"hf:{self.repository}"
        if self.profile:
            return self.profile
        if not self.repository:
            return str(self.path)
        return f"hf:{self.repository}" + (f":{self.quantisation}" if self.quantisation else "")


@dataclass(frozen=True, slots=True)
class Owner:
    """The profile that a file belongs to, and the quantisation it is there."""

    profile: str
    quantisation: str


class Owners:
    """Which profile a file belongs to: by its checksum, its place in a repository, or its place in mgpu's cache."""

    def __init__(self, profiles: Sequence[Profile]) -> None:
        self._owners: dict[object, Owner] = {}
        for profile in profiles:
            for vllm in profile.vllm:
                self._owners.setdefault((vllm.repository,), Owner(profile.name, vllm.quantisation))
            if profile.ollama:
                tag = profile.ollama if ":" in profile.ollama else f"{profile.ollama}:latest"
                self._owners.setdefault(f"ollama:{tag}", Owner(profile.name, ""))
            for quantisation, source in profile.quantisations.items():
                keys: list[object] = [*source.sha256]
                keys += [(source.repository, name) for name in source.files or (quantisation,)]
                keys += [wheel_cache_path(source.wheel)] if source.wheel else []
                for key in keys:
                    self._owners.setdefault(key, Owner(profile.name, quantisation))

    def of_file(self, repository: str, name: str | None, checksum: str) -> Owner | None:
        """The owner of a file called `name` (None: not known) in a repository."""
        keys = [checksum, (repository, name), (repository, quantisation_in(name) if name else None)]
        return next((self._owners[key] for key in keys if key in self._owners), None)

    def of_repository(self, repository: str) -> Owner | None:
        """The owner of a repository with safetensors."""
        return self._owners.get((repository,))

    def of_tag(self, tag: str) -> Owner | None:
        """The owner of a model of Ollama's ("llama3.1:8b")."""
        return self._owners.get(f"ollama:{tag}")

    def of_path(self, path: Path) -> Owner | None:
        """The owner of a file in mgpu's own cache."""
        return self._owners.get(path)


def snapshots(folder: Path) -> list[Path]:
    """A repository's snapshots: the one that `main` is comes first."""
    current = None
    with contextlib.suppress(OSError, UnicodeDecodeError):
        current = (folder / "refs" / "main").read_text().strip()
    return sorted(listed(folder / "snapshots", "*"), key=lambda path: path.name != current)


def last_used(path: Path) -> float:
    """When a file was last read or written, in seconds since 1970; 0 if it cannot be told."""
    try:
        status = path.stat()
    except OSError:
        return 0.0
    return max(status.st_atime, status.st_mtime)


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    try:
        return sum(size_of(each) for each in path.iterdir()) if path.is_dir() else path.stat().st_size
    except OSError:
        return 0


def listed(folder: Path, pattern: str) -> Sequence[Path]:
    """What of `folder` fits a pattern, in order; nothing if it cannot be read."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return ()
