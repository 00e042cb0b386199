"""Signals that ask mgpu to end, as KeyboardInterrupt: none is lost, and none comes in the middle of what must be done
as a whole."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

# Shorter than it takes to think twice, longer than it takes to begin to stop.
_TOGETHER_S = 0.5
_AGAIN_S = 0.05
_MANY = 4096


class Interrupts:
    """A handler that raises KeyboardInterrupt for a signal, but once for those that come together: a second one,
    milliseconds later, could only break off the tidying up after the first."""

    def __init__(self) -> None:
        self._deaf_until = -math.inf
        self._held = 0
        self._waits = False
        self._swallowed = False
        self._noted: int | None = None
        self._at_end: list[Callable[[], None]] = []

    def __call__(self, *_: object) -> None:
        """Take a signal in."""
        self._take_notes()
        if time.monotonic() <= self._deaf_until:
            return
        self._deaf_until = time.monotonic() + _TOGETHER_S
        if self._held:
            self._waits = True
        else:
            raise KeyboardInterrupt

    def at_end(self, task: Callable[[], None]) -> None:
        """Have `task` done when the program ends, however it does."""
        self._at_end.append(task)

    def end(self) -> None:
        """Hear nothing any more, and do what was left for the end."""
        self._deaf_until = math.inf
        for task in self._at_end:
            task()

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

    def recover_lost(self) -> None:
        """From now on raise an interrupt again that Python would lose; SIGALRM is used for that.

        In a callback of a weak reference or in a destructor, where a signal may come as well as anywhere, Python prints
        every exception and forgets it. And a signal that comes just before a system call is only noted: the handler is
        called after that call, which may wait for ever. So what was noted (in a pipe, by Python) and is still there a
        moment later is followed by another signal, which ends the system call.
        """
        sys.unraisablehook = self._unraisable
        self._noted, note = os.pipe()
        for end in (self._noted, note):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(note, warn_on_full_buffer=False)
        signal.signal(signal.SIGALRM, self._again)
        main = threading.get_ident()
        threading.Thread(target=_ring, args=(self._noted, main), name="interrupts", daemon=True).start()

    def _unraisable(self, found: UnraisableHookArgs) -> None:
        if not issubclass(found.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(found)
        elif self._deaf_until < math.inf:
            self._deaf_until = -math.inf
            self._swallowed = True
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)

    def _again(self, *_: object) -> None:
        # Signals of another handler were heard by that: Python calls all that are due, one after the other.
        mine = any(signal.getsignal(number) is self for number in set(self._take_notes()))
        if mine or self._swallowed:
            self._swallowed = False
            self()

    def _take_notes(self) -> bytes:
        if self._noted is not None:
            with contextlib.suppress(BlockingIOError):
                return os.read(self._noted, _MANY)
        return b""


def _ring(noted: int, main: int) -> None:
    """Send SIGALRM to the thread `main` for signals that are noted and were not taken from the pipe soon."""
    while True:
        select.select([noted], [], [])
        time.sleep(_AGAIN_S)
        if select.select([noted], [], [], 0)[0]:
            signal.pthread_kill(main, signal.SIGALRM)


interrupts = Interrupts()
"""This process's: the main program installs it."""
