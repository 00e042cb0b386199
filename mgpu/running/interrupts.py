"""Signals that ask mgpu to end, as KeyboardInterrupt; never in the middle of what must be done as a whole."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

# Shorter than it takes to think twice, longer than it takes to begin to stop.
_TOGETHER_S = 0.5


class Interrupts:
    """A handler that raises KeyboardInterrupt for a signal, but once for those that come together: a second one,
    milliseconds later, could only break off the tidying up after the first."""

    def __init__(self) -> None:
        self._deaf_until = -math.inf
        self._held = 0
        self._waits = False

    def __call__(self, *_: object) -> None:
        """Take a signal in."""
        if time.monotonic() <= self._deaf_until:
            return
        self._deaf_until = time.monotonic() + _TOGETHER_S
        if self._held:
            self._waits = True
        else:
            raise KeyboardInterrupt

    def end(self) -> None:
        """Hear nothing any more."""
        self._deaf_until = math.inf

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What is done here is done as a whole: an interrupt that comes meanwhile is raised afterwards."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self._waits and not self._held:
            self._waits = False
            raise KeyboardInterrupt


interrupts = Interrupts()
"""This process's: the main program installs it."""
