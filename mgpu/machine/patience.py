"""Waiting for what may never answer: a driver that hangs, the disk of a network."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_Answer = TypeVar("_Answer")
_NAME = "mgpu-question"


class Question(Generic[_Answer]):
    """Something that is read in a thread of its own from now on; the thread does not keep the program from ending."""

    def __init__(self, read: Callable[[], _Answer]) -> None:
        self._read = read
        self._answers: list[_Answer] = []
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._ask, name=_NAME, daemon=True)
        self._thread.start()

    def answer(self, patience_s: float) -> _Answer:
        """Return what was read, or raise what the reader raised. Blocks for `patience_s` at most, hears signals
        meanwhile, and raises TimeoutError where there is no answer then."""
        self._thread.join(patience_s)
        if self._failure is not None:
            raise self._failure
        if not self._answers:
            raise TimeoutError(f"no answer in {patience_s:g} s")
        return self._answers[0]

    def _ask(self) -> None:
        try:
            self._answers.append(self._read())
        except BaseException as failure:  # it is raised where it is asked for
            self._failure = failure


def is_awaited() -> bool:
    """Return whether a question has no answer yet. A program then must end by os._exit: the usual way waits for locks
    that a library which hangs may hold."""
    return any(thread.name == _NAME for thread in threading.enumerate())
