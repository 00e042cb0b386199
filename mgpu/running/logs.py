"""Logs of months: kept small while a program writes to them, read and followed whatever happens to them.

The engine itself writes to its log, so nothing between the two can fail. What is too much is taken out of the middle
of the file, by giving its place on the disk back (`FALLOC_FL_PUNCH_HOLE`): no line is lost at a boundary, since there
is none; the beginning, which tells how the engine was loaded, stays; and who reads the file by offsets notices nothing.
The file's size keeps growing, its place on the disk does not. Where the hole is, the file reads as zeros.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

MOST_BYTES = 64 << 20
# What the log of a first failure is called besides.
FIRST = ".first"
# Of the most bytes: the beginning that always stays, and the end that stays when the middle is taken out.
_HEAD_SHARE, _TAIL_SHARE = 8, 2
_PUNCH_HOLE, _KEEP_SIZE = 2, 1  # linux/falloc.h
_MARK_BYTES = 80
_READ_BYTES = 1 << 16
_LONGEST_LINE_BYTES = 1 << 20
_POLL_S = 0.2
# Progress bars end their lines with a carriage return alone.
_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")


def keep_small(path: Path, most_bytes: int = MOST_BYTES) -> bool:
    """Take out the middle of the log at `path` if it has more than `most_bytes` on the disk; returns whether it did.

    The first eighth of `most_bytes` and the last half stay, in whole lines, with a line between them that says what is
    missing. On a file system that cannot do so (NFS before 4.2) the log is copied to `NAME.1`, which is replaced, and
    cut off after its beginning: what is written in the microseconds between the two is lost there. A log that is not
    there, a link or unwritable is left alone; nothing is raised.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    with os.fdopen(file, "r+b", buffering=0) as log:
        try:
            return _take_out(log, path, most_bytes)
        except OSError:  # a full disk, for one
            return False


def keep_first(path: Path) -> None:
    """Keep the log at `path` as `NAME.first` besides, whatever rotation makes of it later: the file is shared, nothing
    is copied. An empty log, and one that cannot be kept so, leaves the one that was kept before; nothing is raised."""
    kept = path.with_name(f"{path.name}{FIRST}")
    new = path.with_name(f"{path.name}{FIRST}.new")
    with contextlib.suppress(OSError):
        if not path.lstat().st_size:
            return
        new.unlink(missing_ok=True)
        os.link(path, new, follow_symlinks=False)
        new.replace(kept)


def follow(path: Path, is_over: Callable[[], bool], *, last_lines: int | None = None) -> Iterator[str]:
    """Yield the lines of the log at `path` as they come, with their ends, until `is_over` and all has been read.

    Begins with the `last_lines` (None: with all there is). A log that is replaced, truncated or not there yet is
    followed on: what was left of the old one comes first. A line without an end is held back until the log is over, or
    it has a megabyte. Blocks between polls. Raises OSError when it is there and cannot be read.
    """
    reading: _Reading | None = None
    try:
        while True:
            over = is_over()  # asked before the last look, so that nothing said before the end is missed
            reading = reading or _Reading.of(path, last_lines)
            if reading:
                yield from reading.new_lines()
                if reading.is_replaced(path):
                    yield from reading.new_lines()  # what came before it was moved away
                    yield from reading.rest()
                    reading.close()
                    reading, last_lines = None, None
                    continue
            if over:
                break
            time.sleep(_POLL_S)
        if reading:
            yield from reading.rest()
    finally:
        if reading:
            reading.close()


class _Reading:
    """How far one file has been read; `_held` is the line whose end has not been written yet."""

    def __init__(self, file: BinaryIO, offset: int) -> None:
        self._file = file
        self._offset = offset
        self._held = b""

    @classmethod
    def of(cls, path: Path, last_lines: int | None) -> _Reading | None:
        """The file, from its beginning or that of its `last_lines` on; None if it is not there."""
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError:
            return None
        return cls(file, 0 if last_lines is None else _start_of_last(file, last_lines))

    def new_lines(self) -> Iterator[str]:
        if os.fstat(self._file.fileno()).st_size < self._offset:  # truncated: it begins anew
            yield from self.rest()
            self._offset = 0
        while piece := self._next_piece():
            self._held += piece
            start = 0
            for end in _LINE_END.finditer(self._held):
                yield _text(self._held[start : end.end()])
                start = end.end()
            self._held = self._held[start:]
            if len(self._held) > _LONGEST_LINE_BYTES:
                yield from self.rest()

    def rest(self) -> Iterator[str]:
        """What is there of a line without an end."""
        if self._held:
            yield _text(self._held)
        self._held = b""

    def is_replaced(self, path: Path) -> bool:
        """Whether another file is at the path by now."""
        try:
            return not os.path.samestat(path.stat(), os.fstat(self._file.fileno()))
        except OSError:  # it was moved away, and the next one is not there yet
            return False

    def close(self) -> None:
        self._file.close()

    def _next_piece(self) -> bytes:
        """What comes next, without the zeros of a hole; empty at the end."""
        while True:
            start = _data_from(self._file, self._offset)
            if start is None:
                return b""
            piece = os.pread(self._file.fileno(), _READ_BYTES, start)
            self._offset = start + len(piece)
            if not piece or (words := piece.replace(b"\0", b"")):
                return words if piece else b""


def _take_out(log: BinaryIO, path: Path, most_bytes: int) -> bool:
    size = os.fstat(log.fileno()).st_size
    head = most_bytes // _HEAD_SHARE
    if size <= most_bytes:
        return False
    start = _after_line_end(log, head)
    # Beyond the beginning there may be a hole already.
    kept_from = _data_from(log, start + _MARK_BYTES)
    if kept_from is None or head + size - kept_from <= most_bytes:
        return False
    end = _after_line_end(log, size - most_bytes // _TAIL_SHARE)
    if _punch(log, start, end - start):
        mark = f"--- mgpu has taken {end - start} bytes out of this log here ---".ljust(_MARK_BYTES - 1) + "\n"
        os.pwrite(log.fileno(), mark.encode(), start)
        os.pwrite(log.fileno(), b"\n", end - 1)  # the zeros are a line of their own
        return True
    _copy_and_cut(log, path, start)
    return True


def _punch(log: BinaryIO, start: int, size: int) -> bool:
    """Give a part of the file back to the disk; False where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    punch = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if punch is None:
        return False
    if punch(log.fileno(), _PUNCH_HOLE | _KEEP_SIZE, ctypes.c_int64(start), ctypes.c_int64(size)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EOPNOTSUPP, errno.ENOSYS):
        return False
    raise OSError(number, os.strerror(number))


def _copy_and_cut(log: BinaryIO, path: Path, start: int) -> None:
    kept = path.with_name(f"{path.name}.1")
    temporary = path.with_name(f"{path.name}.1.new")
    temporary.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(temporary, flags, 0o600), "wb") as copy:
            log.seek(start)
            shutil.copyfileobj(log, copy)
        temporary.replace(kept)
        with kept.open("ab", buffering=0) as copy:
            shutil.copyfileobj(log, copy)  # what came meanwhile
        log.truncate(start)
    finally:
        temporary.unlink(missing_ok=True)


def _after_line_end(file: BinaryIO, offset: int) -> int:
    """Where a line begins next after `offset`; `offset` itself where none does for long."""
    return offset + os.pread(file.fileno(), _READ_BYTES, offset).find(b"\n") + 1


def _data_from(file: BinaryIO, offset: int) -> int | None:
    """Where there is something to read next from `offset` on; None at the end."""
    try:
        return os.lseek(file.fileno(), offset, os.SEEK_DATA)
    except OSError as error:
        return None if error.errno == errno.ENXIO else offset


def _start_of_last(file: BinaryIO, lines: int) -> int:
    """Where the last so many lines begin; what holes are between them takes no time."""
    size = os.fstat(file.fileno()).st_size
    wanted = lines + (os.pread(file.fileno(), 1, size - 1) == b"\n" if size else 0)
    if not lines:
        return size
    for start, end in reversed(_data(file)):
        while end > start:
            begin = max(start, end - _READ_BYTES)
            piece = os.pread(file.fileno(), end - begin, begin)
            at = len(piece)
            while (at := piece.rfind(b"\n", 0, at)) >= 0:
                wanted -= 1
                if wanted == 0:
                    return begin + at + 1
            end = begin
    return 0


def _data(file: BinaryIO) -> list[tuple[int, int]]:
    """The parts of a file that are no holes."""
    parts: list[tuple[int, int]] = []
    start = _data_from(file, 0)
    while start is not None:
        try:
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
        except OSError:
            end = os.fstat(file.fileno()).st_size
        if end <= start:
            break
        parts.append((start, end))
        start = _data_from(file, end)
    return parts


def _text(line: bytes) -> str:
    return line.decode(errors="replace")
