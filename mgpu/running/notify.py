"""What mgpu tells the service manager that started it, by sd_notify(3); silent where there is none."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping

# A service manager that is busy answers within this; one that hangs must not hold up an engine's supervision.
_PATIENCE_S = 5.0
# How much longer a start may take after each sign of progress, and how often at most such a sign is passed on.
_MORE_START_S = 600
_PROGRESS_EVERY_S = 10.0
_LONGEST_STATUS = 200
_BEATS = 8  # in the watchdog's time, of which every fourth is said
_MICROSECONDS = 1_000_000


class ServiceManager:
    """The service manager that waits for this process (`Type=notify`), or none: then nothing is sent.

    Each message returns whether it was delivered; none raises. Times are seconds of a monotonic clock.
    """

    def __init__(self, address: str | None, *, watchdog_s: float | None = None) -> None:
        self._address = _address(address)
        self.watchdog_s = watchdog_s if self._address else None
        self._alive_at: float | None = None
        self._progress_at: float | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str] | None = None) -> ServiceManager:
        """Return the one that `environment` (default: this process's) names in NOTIFY_SOCKET. A watchdog that
        WATCHDOG_PID says to be another process's is none."""
        environment = os.environ if environment is None else environment
        return cls(environment.get("NOTIFY_SOCKET"), watchdog_s=_watchdog_s(environment))

    def __bool__(self) -> bool:
        return self._address is not None

    def ready(self, status: str) -> bool:
        """Say that the engine answers. It may be said again."""
        return self._send("READY=1", _status(status))

    def status(self, status: str) -> bool:
        """Say in a line how things are; `systemctl status` shows it."""
        return self._send(_status(status))

    def progress(self, status: str, now: float) -> bool:
        """Say how far the start is, and ask for ten more minutes for it. To be called at every sign of progress: what
        comes within ten seconds of the last one is not sent."""
        if self._progress_at is not None and now - self._progress_at < _PROGRESS_EVERY_S:
            return False
        self._progress_at = now
        return self._send(_status(status), f"EXTEND_TIMEOUT_USEC={_MORE_START_S * _MICROSECONDS}")

    def alive(self, now: float) -> bool:
        """Say that the supervisor's loop goes round, if half of the watchdog's time has passed since it last did; to be
        called at every turn of that loop, at least each quarter of `watchdog_s`."""
        if self.watchdog_s is None:
            return False
        if self._alive_at is not None and now - self._alive_at < self.watchdog_s / 2:
            return False
        delivered = self._send("WATCHDOG=1")
        if delivered:
            self._alive_at = now
        return delivered

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Say that all is well, from a thread of its own, while something is done that may take minutes and has limits
        of its own: a plan that waits for a hub or for memory, a download, an answer."""
        watchdog_s = self.watchdog_s
        if watchdog_s is None:
            yield
            return
        over = threading.Event()

        def say() -> None:
            while not over.wait(watchdog_s / _BEATS):
                self.alive(time.monotonic())

        thread = threading.Thread(target=say, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def stopping(self, status: str, *, within_s: float) -> bool:
        """Say that the end has begun, on purpose, and takes at most `within_s` seconds from now; it may be said
        again."""
        longer = f"EXTEND_TIMEOUT_USEC={round(within_s * _MICROSECONDS)}"
        return self._send("STOPPING=1", _status(status), longer)

    def _send(self, *assignments: str) -> bool:
        if self._address is None:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(_PATIENCE_S)
                sender.sendto("\n".join(assignments).encode(errors="replace"), self._address)
        except OSError:
            return False
        return True


def _address(text: str | None) -> bytes | None:
    """The socket's address: a path, or after `@` an abstract name. Other kinds (vsock) are for virtual machines."""
    if not text or text[0] not in "/@" or len(text) < 2:
        return None
    raw = os.fsencode(text)
    return b"\0" + raw[1:] if text[0] == "@" else raw


def _watchdog_s(environment: Mapping[str, str]) -> float | None:
    for_whom = environment.get("WATCHDOG_PID")
    if for_whom and for_whom != str(os.getpid()):
        return None
    text = environment.get("WATCHDOG_USEC", "")
    if not (text.isascii() and text.isdecimal()) or len(text) > 18 or not int(text):
        return None
    return int(text) / _MICROSECONDS


def _status(text: str) -> str:
    """One line: a line break would begin another assignment."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return f"STATUS={line[:_LONGEST_STATUS]}"
