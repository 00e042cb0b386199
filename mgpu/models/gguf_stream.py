"""Reading the bytes of a GGUF header forward, with every length checked before it is believed."""

from __future__ import annotations

import struct
from typing import BinaryIO

LENGTH = struct.Struct("<Q")


class Broken(Exception):
    """The header is not as it must be; the message completes "FILE is not a usable model: "."""


class Ended(Broken):
    """The bytes ended before the header did."""


class Stream:
    """A file read forward through a window of bounded size, with every length checked against the file's.

    Methods raise Broken for a length that cannot be, Ended where the file holds less than its `size`.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.size = size
        self.position = 0
        self._file = file
        self._window = b""
        self._start = 0

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        begin = self.position - self._start
        if begin + count > len(self._window):
            self._slide(count)
            begin = 0
        self.position += count
        return self._window[begin : begin + count]

    def skip(self, count: int) -> None:
        """Go on behind the next `count` bytes."""
        if self.position + count > self.size:
            raise Broken(f"its header is cut off or corrupt: it points past the file's {self.size:,} bytes")
        if self.position + count > _MAX_HEADER_BYTES:
            raise Broken("its header claims to be longer than 1 GiB")
        self.position += count

    def number(self, code: str) -> int:
        """Return the next number, of the `struct` format `code`."""
        layout = struct.Struct("<" + code)
        return int(layout.unpack(self.take(layout.size))[0])

    def string(self, limit: int) -> str | None:
        """Return the next string, None if it is longer than `limit` bytes: it is then skipped."""
        length = self.number("Q")
        if length > limit:
            self.skip(length)
            return None
        return self.take(length).decode("utf-8", "replace")

    def skip_strings(self, count: int) -> None:
        """Skip `count` strings: the inner loop over a vocabulary, so it does without a call for each."""
        unpack = LENGTH.unpack_from
        while count:
            self._slide(LENGTH.size)
            window, index = self._window, 0
            last = len(window) - LENGTH.size
            for done in range(count):
                if index > last:
                    count -= done
                    break
                index += 8 + unpack(window, index)[0]
            else:
                count = 0
            self.skip(index)

    def _slide(self, count: int) -> None:
        """Move the window to the position; it then holds at least `count` bytes."""
        self.skip(count)
        self.position -= count
        self._file.seek(self.position)
        self._window = self._file.read(max(count, _CHUNK_BYTES))
        self._start = self.position
        if len(self._window) < count:
            raise Ended("it ended while it was read")


# No real header comes near the limit; it bounds the time that a hostile one can cost.
_MAX_HEADER_BYTES = 1 << 30
_CHUNK_BYTES = 1 << 20
