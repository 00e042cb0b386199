"""What a supervisor that nobody watches says, to a log that may be full, gone or unwritable: no reason to end."""

from __future__ import annotations

import io
import os
import sys


class UnfailingFile(io.RawIOBase):
    """A file to write to (`number`, an open descriptor) that never raises: what it has no room for is lost."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def writable(self) -> bool:
        """Whether it can be written to, as `io` asks."""
        return True

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._number

    def write(self, data: object) -> int:
        """Write what there is room for, and say that it was all."""
        piece = memoryview(data)  # type: ignore[arg-type]  # io hands over whatever is a buffer
        left = piece
        try:
            while left:
                left = left[os.write(self._number, left) :]
        except OSError:
            pass
        return len(piece)


def keep_talking() -> None:
    """Have this process's stdout and stderr never raise, whatever becomes of the files behind them."""
    sys.stdout, sys.stderr = _unfailing(1), _unfailing(2)


def _unfailing(number: int) -> io.TextIOWrapper:
    raw = io.BufferedWriter(UnfailingFile(number))
    return io.TextIOWrapper(raw, encoding="utf-8", errors="replace", line_buffering=True)
