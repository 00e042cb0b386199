"""Whether anybody can still read what mgpu says: a terminal that was closed and a pipe without a reader are ways to
ask for the end, and no reason to fail on the way there."""

from __future__ import annotations

import errno
import os
import select
import stat

TERMINAL_CLOSED = "its terminal was closed"
NOBODY_READS = "nobody read any more what it said"

_STREAMS = (1, 2)
# A reader that takes nothing for so long is a pager that somebody has left open, or a terminal halted by Ctrl-S.
_UNREAD_S = 1.0


def has_left(problem: BaseException) -> bool:
    """Return whether a `problem` is that nobody reads any more. A terminal that is gone gives the error of a broken
    disk, so that the streams are looked at."""
    if isinstance(problem, BrokenPipeError):
        return True
    return isinstance(problem, OSError) and problem.errno == errno.EIO and any(map(_is_gone, _STREAMS))


def fall_silent() -> str | None:
    """Have what is written to a stream that nobody reads any more go nowhere, and to one that takes no more now: on the
    way to the end nothing waits for a reader. Returns why one is gone, None where all are there; blocks for a second
    where one takes nothing."""
    gone = [stream for stream in _STREAMS if _is_gone(stream)]
    stuck = [stream for stream in _STREAMS if stream not in gone and not _takes_more(stream)]
    pipes = [stream for stream in gone if _is_pipe(stream)]
    if gone or stuck:
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for stream in (*gone, *stuck):
                os.dup2(nowhere, stream)
        finally:
            os.close(nowhere)
    if not gone:
        return None
    return NOBODY_READS if pipes else TERMINAL_CLOSED


def _is_gone(stream: int) -> bool:
    poll = select.poll()
    poll.register(stream, 0)
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))


def _takes_more(stream: int) -> bool:
    poll = select.poll()
    poll.register(stream, select.POLLOUT)
    return bool(poll.poll(_UNREAD_S * 1000))


def _is_pipe(stream: int) -> bool:
    mode = os.fstat(stream).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
