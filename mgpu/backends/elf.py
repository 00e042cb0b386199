"""What a program or a library says of itself as a file: what it needs, where that is, and the code for cards in it."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MOST_ENTRIES = 4096
_LONGEST_TEXT = 4096  # PyTorch's libraries name a dozen folders
_LOAD, _DYNAMIC, _LOADER = 1, 2, 3
_NEEDED, _STRING_TABLE, _RPATH, _RUNPATH = 1, 5, 15, 29
_FATBIN = 0xBA55ED50
_BUNDLE = b"__CLANG_OFFLOAD_BUNDLE__"
_LONGEST_BUNDLE_HEADER = 16 * 1024
_PTX, _MACHINE_CODE = 1, 2
# Of a library that holds thousands, each built for the same cards; a read of each would take seconds from a slow disk.
_MOST_FATBINS = 32
_LARGEST_RODATA = 4 * 2**20
_LARGEST_CACHE = 16 * 2**20
_MOST_LIBRARIES = 200
_FOLDERS = ("/lib64", "/usr/lib64", "/lib", "/usr/lib", "/usr/local/lib")
_CACHE = Path("/etc/ld.so.cache")


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """The names of the libraries that a file asks the loader for, and the folders that it names for them."""

    libraries: tuple[str, ...]
    folders: tuple[str, ...]


def needs_of(path: Path) -> Needs:
    """Return what a 64-bit ELF file needs. Reads a few kilobytes of it.

    Raises ValueError for a file that is none, OSError, or struct.error for one that is cut off.
    """
    with _Elf(path) as elf:
        entries = elf.dynamic()
        strings = elf.string_table(entries)
        if strings is None:
            return Needs(libraries=(), folders=())
        names = [(tag, elf.text(strings + value)) for tag, value in entries if tag in (_NEEDED, _RPATH, _RUNPATH)]
    folders = ":".join(text for tag, text in names if tag != _NEEDED)
    origin = str(path.resolve().parent)
    return Needs(
        libraries=tuple(text for tag, text in names if tag == _NEEDED),
        folders=tuple(re.sub(r"\$(ORIGIN|\{ORIGIN\})", lambda _: origin, each) for each in folders.split(":") if each),
    )


def architectures_of(path: Path) -> tuple[str, ...] | None:
    """Return the cards that the code in an ELF file was compiled for: CUDA's ("sm_86"; "compute_86" is PTX, for all
    later ones, too) and HIP's ("gfx1100"); none where it holds no such code, None where its sections are not listed.
    Reads headers only; of HIP's bundles, one for each source file, the first.

    Sources: the documentation of clang-offload-bundler; the header of a "fat binary" (CUDA's fatbinary_section.h names
    its magic number), whose entries begin with kind, length of the header, length of the code and, at byte 28, the
    architecture; checked against builds of NCCL and llama.cpp. Raises as `needs_of` does.
    """
    with _Elf(path) as elf:
        sections = elf.sections()
        if not sections:
            return None
        cuda, hip = (sections.get(name) for name in (".nv_fatbin", ".hip_fatbin"))
        found = {each for entries in elf.fatbins(*cuda) for each in entries} if cuda else set()
        bundled = elf.bundled(*hip) if hip else set()
    kinds = {_PTX: "compute", _MACHINE_CODE: "sm"}
    numbered = sorted((number, kind) for kind, number in found if kind in kinds)
    return (*(f"{kinds[kind]}_{number}" for number, kind in numbered), *sorted(bundled))


def text_in(path: Path, pattern: bytes) -> re.Match[bytes] | None:
    """Return where `pattern` first is among the constants of an ELF file, the first 4 MiB of them. Raises as
    `needs_of` does."""
    with _Elf(path) as elf:
        start, size = elf.sections().get(".rodata", (0, 0))
        return re.search(pattern, elf.part(start, min(size, _LARGEST_RODATA)))


def find_library(name: str, folders: tuple[str, ...]) -> Path | None:
    """Return the file that the loader takes for a library's name: in `folders`, LD_LIBRARY_PATH, the loader's cache, or
    the system's folders. None where there is none."""
    own = [folder for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    for folder in (*folders, *own, *_FOLDERS, *_multiarch()):
        path = Path(folder, name)
        if os.path.isfile(path):  # noqa: PTH113 - never raises
            return path
    cached = re.search(rb"\0(/[^\0]{1,250}/" + re.escape(name.encode()) + rb")\0", _cache())
    if cached and os.path.isfile(place := os.fsdecode(cached[1])):  # noqa: PTH113 - never raises
        return Path(place)
    return None


def missing_library(program: Path) -> str | None:
    """Return the name of a library without which the loader refuses a program; None where all are there, or where it
    cannot be told, as with a loader that is not the system's."""
    if not _cache() or not _has_system_loader(program):
        return None
    waiting, seen = [program], set[str]()
    folders: tuple[str, ...] = ()
    while waiting and len(seen) < _MOST_LIBRARIES:
        try:
            needs = needs_of(waiting.pop())
        except (OSError, ValueError, struct.error):
            continue
        folders = tuple(dict.fromkeys((*folders, *needs.folders)))  # a RPATH counts for what is loaded below it, too
        for name in needs.libraries:
            if name in seen or "/" in name:
                continue
            seen.add(name)
            path = find_library(name, folders)
            if path is None:
                return name
            waiting.append(path)
    return None


def _has_system_loader(program: Path) -> bool:
    try:
        with _Elf(program) as elf:
            segment = next((each for each in elf.segments() if each[0] == _LOADER), None)
            return segment is not None and elf.text(segment[2]).startswith(("/lib", "/usr/lib"))
    except (OSError, ValueError, struct.error):
        return False


def _multiarch() -> tuple[str, ...]:
    machine = os.uname().machine
    return (f"/lib/{machine}-linux-gnu", f"/usr/lib/{machine}-linux-gnu")


def _cache() -> bytes:
    try:
        with _CACHE.open("rb") as file:
            return file.read(_LARGEST_CACHE)
    except OSError:
        return b""


class _Elf:
    """An open 64-bit ELF file; a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> _Elf:
        self._file = self._path.open("rb")
        try:
            if self.part(0, 6) != b"\x7fELF\x02\x01":
                raise ValueError(f"{self._path} is no 64-bit ELF file")
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def part(self, offset: int, size: int) -> bytes:
        if offset >= 2**63:
            raise ValueError(f"{self._path} names a place outside it")
        self._file.seek(offset)
        return self._file.read(size)

    def text(self, offset: int) -> str:
        return self.part(offset, _LONGEST_TEXT).partition(b"\0")[0].decode("utf-8", "replace")

    def segments(self) -> list[tuple[int, ...]]:
        """Kind, flags, place in the file, place in memory, and lengths of each."""
        (table,) = struct.unpack("<Q", self.part(32, 8))
        entry_bytes, count = struct.unpack("<HH", self.part(54, 4))
        if not 56 <= entry_bytes <= 256 or count > _MOST_ENTRIES:
            raise ValueError(f"{self._path} has no table of segments")
        return [struct.unpack("<IIQQQQ", self.part(table + i * entry_bytes, 40)) for i in range(count)]

    def dynamic(self) -> list[tuple[int, int]]:
        """What the loader is told, as tags and values."""
        segment = next((segment for segment in self.segments() if segment[0] == _DYNAMIC), None)
        if segment is None:
            return []
        content = self.part(segment[2], min(segment[5], 16 * _MOST_ENTRIES))
        return list(struct.iter_unpack("<qQ", content[: len(content) // 16 * 16]))

    def string_table(self, entries: list[tuple[int, int]]) -> int | None:
        address = next((value for tag, value in entries if tag == _STRING_TABLE), 0)
        # An address in memory, to be found in the segment that is loaded there.
        loaded = (s for s in self.segments() if s[0] == _LOAD and s[3] <= address < s[3] + s[5])
        return next((segment[2] + address - segment[3] for segment in loaded), None)

    def sections(self) -> dict[str, tuple[int, int]]:
        """Place and length of each section by its name; none where the table was stripped."""
        (table,) = struct.unpack("<Q", self.part(40, 8))
        entry_bytes, count, names = struct.unpack("<HHH", self.part(58, 6))
        if entry_bytes != 64 or not 0 < count <= _MOST_ENTRIES or names >= count:
            return {}
        headers = [struct.unpack("<IIQQQQ", self.part(table + i * 64, 40)) for i in range(count)]
        strings = headers[names][4]
        return {self.text(strings + name): (offset, size) for name, _, _, _, offset, size in headers}

    def fatbins(self, start: int, size: int) -> Iterator[set[tuple[int, int]]]:
        """Kind and architecture of the entries of each fat binary."""
        place, end, looked_at = start, start + size, 0
        while place < end and looked_at < _MOST_FATBINS:
            magic, _, header_bytes, content_bytes = struct.unpack("<IHHQ", self.part(place, 16))
            looked_at += 1
            if magic != _FATBIN or header_bytes + content_bytes > end - place:
                raise ValueError(f"{self._path} holds code for cards in a form that is unknown here")
            yield set(self._entries(place + header_bytes, place + header_bytes + content_bytes))
            place += -(-(header_bytes + content_bytes) // 8) * 8

    def bundled(self, start: int, size: int) -> set[str]:
        """The cards of the first of HIP's bundles. Raises ValueError for one that is compressed, names and all."""
        header = self.part(start, min(size, _LONGEST_BUNDLE_HEADER))
        if not header.startswith(_BUNDLE):
            raise ValueError(f"{self._path} holds code for cards in a form that is unknown here")
        (count,), place, found = struct.unpack_from("<Q", header, 24), 32, set[str]()
        for _ in range(min(count, _MOST_ENTRIES)):
            _, _, length = struct.unpack_from("<QQQ", header, place)
            (name,) = struct.unpack_from(f"{min(length, len(header))}s", header, place + 24)
            if card := re.fullmatch(rb"hip(?:v4)?-amdgcn-amd-amdhsa-[^-]*-(gfx[\w:+-]{1,60})", name):
                found.add(card[1].decode())
            place += 24 + length
        return found

    def _entries(self, place: int, end: int) -> Iterator[tuple[int, int]]:
        for _ in range(64):
            if place >= end:
                return
            kind, _, header_bytes, code_bytes, number = struct.unpack("<HHIQ12xI", self.part(place, 32))
            if header_bytes < 32:
                raise ValueError(f"{self._path} holds code for cards in a form that is unknown here")
            yield kind, number
            place += header_bytes + code_bytes
