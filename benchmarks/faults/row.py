"""One fault of the report: how often it was injected, what survived it, and what was lost or left behind."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

HEADINGS = ("fault", "times", "survived", "lost", "left behind", "seconds", "verdict")
_WIDTHS = (62, 5, 8, 4, 11, 7, 8)


@dataclass(slots=True, kw_only=True)
class Row:
    """What became of one fault. Trials may be made by several threads; the counts are those that have ended.

    A trial is survived when what is served and what is written down became what it should; what was lost instead is
    told in words, as is what was left behind. `skipped` is why it could not be injected here.
    """

    fault: str
    times: int = 0
    survived: int = 0
    lost: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: str | None = None
    seconds: float = 0.0
    _begun: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def trial(self, what: str) -> Iterator[None]:
        """Count what happens inside; whatever is raised there is a loss, and the report goes on."""
        problem = None
        try:
            yield
        except Exception as error:
            problem = f"{what}: {str(error)[-2000:] or type(error).__name__}"
        with self._lock:
            self.times += 1
            self.survived += problem is None
            self.seconds = time.monotonic() - self._begun
            if problem:
                self.lost.append(problem)

    def leaves(self, what: str, things: tuple[str, ...]) -> None:
        """Take down what was left behind by a trial."""
        with self._lock:
            self.left += [f"{what}: {thing}" for thing in things]

    def note(self, text: str) -> None:
        """Take down what a reader should know of a trial that went well."""
        with self._lock:
            self.notes.append(text)

    @property
    def is_clean(self) -> bool:
        """Whether every trial was survived with nothing lost and nothing left."""
        return self.times > 0 and self.survived == self.times and not self.lost + self.left

    def lines(self) -> Iterator[str]:
        """The row of the table, and what is to be said of it."""
        if self.skipped:
            yield f"{self.fault:<{_WIDTHS[0]}}  skipped: {self.skipped}"
            return
        counts = (str(self.times), str(self.survived), str(len(self.lost)), str(len(self.left)), f"{self.seconds:.0f}")
        yield _columns((self.fault, *counts, "clean" if self.is_clean else "NOT CLEAN"))
        for mark, texts in (("lost", self.lost), ("left", self.left), ("note", self.notes)):
            for text in texts:
                yield f"    {mark}  {text}"


def headings() -> str:
    """The first line of the table."""
    return _columns(HEADINGS)


def _columns(cells: tuple[str, ...]) -> str:
    first, *others, last = cells
    middle = "  ".join(f"{cell:>{width}}" for cell, width in zip(others, _WIDTHS[1:-1], strict=True))
    return f"{first:<{_WIDTHS[0]}}  {middle}  {last}"
