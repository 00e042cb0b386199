"""Who reads what mgpu says: pipes and terminals whose other end is gone."""

from __future__ import annotations

import contextlib
import errno
import os
import pty
from collections.abc import Callable, Iterator

import pytest

from mgpu.running import audience

BROKEN, EIO = BrokenPipeError(errno.EPIPE, "gone"), OSError(errno.EIO, "input/output error")


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[int]:
    """A stream to write to, as one of mgpu's own."""
    ours, theirs = request.param()
    monkeypatch.setattr(audience, "_STREAMS", (theirs,))
    if request.node.callspec.params["gone"]:
        os.close(ours)
    yield theirs
    os.close(theirs)
    if not request.node.callspec.params["gone"]:
        os.close(ours)


@pytest.mark.parametrize(
    ("stream", "gone", "left_by_eio", "why"),
    [
        pytest.param(os.pipe, True, True, audience.NOBODY_READS, id="a pipe without a reader"),
        pytest.param(os.pipe, False, False, None, id="a pipe"),
        pytest.param(pty.openpty, True, True, audience.TERMINAL_CLOSED, id="a closed terminal"),
        pytest.param(pty.openpty, False, False, None, id="a terminal"),
    ],
    indirect=["stream"],
)
def test_who_has_left(stream: int, gone: bool, left_by_eio: bool, why: str | None) -> None:
    assert audience.has_left(BROKEN)
    assert not audience.has_left(OSError(errno.ENOSPC, "full"))
    assert audience.has_left(EIO) is left_by_eio
    assert audience.fall_silent() == why
    assert os.write(stream, b"words") == 5
    assert audience.fall_silent() is None


@pytest.mark.parametrize("opened", [pytest.param(os.pipe, id="a pipe"), pytest.param(pty.openpty, id="a terminal")])
def test_what_nobody_takes_goes_nowhere(opened: Callable[[], tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    reader, stream = opened()
    monkeypatch.setattr(audience, "_STREAMS", (stream,))
    monkeypatch.setattr(audience, "_UNREAD_S", 0.1)
    os.set_blocking(stream, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(stream, b"words" * 1000)
    os.set_blocking(stream, True)
    assert audience.fall_silent() is None  # it is there, and has not asked for anything
    assert os.write(stream, b"words") == 5
    os.close(reader)
    os.close(stream)
