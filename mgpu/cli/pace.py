"""How fast something grows, as it is shown beside a bar."""

from __future__ import annotations

from collections import deque

# Long enough to be calm, short enough to notice that a connection has become slow.
_WINDOW_S = 5.0
_SHORTEST_S = 0.5


class Pace:
    """Bytes per second over the last seconds. What was there before the first look does not count."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, int]] = deque()
        self._stage = ""

    def look(self, stage: str, done_bytes: int, now: float) -> float | None:
        """Take note of `done_bytes` at the time `now` and return the rate; None while it is too early to tell.

        A new `stage` begins anew, and so does what has shrunk.
        """
        if stage != self._stage or (self._looks and done_bytes < self._looks[-1][1]):
            self._looks.clear()
            self._stage = stage
        self._looks.append((now, done_bytes))
        while len(self._looks) > 2 and now - self._looks[1][0] > _WINDOW_S:
            self._looks.popleft()
        begun, before = self._looks[0]
        return (done_bytes - before) / (now - begun) if now - begun >= _SHORTEST_S else None
