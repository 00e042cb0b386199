"""When is waiting for an engine hopeless? When it makes no progress, not when a fixed time is over.

A 405B model from a slow disk may take an hour to load and be fine all along; an engine that hangs on its first
card does nothing from the second on. Both are told apart by the signs of life a process gives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Nothing moved at all: no log line, no byte read, no page mapped, no CPU time.
DEFAULT_STALL_S = 120.0
# Only CPU time moved: compiling kernels looks like this, and so does spinning on a dead card.
BUSY_STALL_FACTOR = 5
# Less is no model that is being mapped, but a server that keeps a thread for each question it leaves unanswered.
_MAPPED_BYTES = 4 << 20
# CPU time that idle threads with timers use up; less than this is no work.
_IDLE_CPU_SHARE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Signs:
    """Signs of life of a loading engine: bytes in its log, read from disk, resident, and CPU seconds; all only grow
    while it works."""

    log_bytes: int = 0
    read_bytes: int = 0
    resident_bytes: int = 0
    cpu_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What was last seen and when (monotonic seconds): `moved_at` for data or log, `worked_at` for CPU time too."""

    signs: Signs
    moved_at: float
    worked_at: float


def begin(signs: Signs, now: float) -> Watch:
    """Return a watch that starts now."""
    return Watch(signs=signs, moved_at=now, worked_at=now)


def observe(watch: Watch, signs: Signs, now: float) -> Watch:
    """Return the watch after looking again."""
    seen = watch.signs
    moved = (signs.log_bytes, signs.read_bytes) != (seen.log_bytes, seen.read_bytes)
    moved |= signs.resident_bytes >= seen.resident_bytes + _MAPPED_BYTES
    if moved:
        # Pages that the kernel takes away and that come back are nothing new.
        signs = replace(signs, resident_bytes=max(signs.resident_bytes, seen.resident_bytes))
        return Watch(signs=signs, moved_at=now, worked_at=now)
    signs = replace(signs, resident_bytes=seen.resident_bytes)
    if signs.cpu_s - seen.cpu_s > _IDLE_CPU_SHARE * max(now - watch.worked_at, 0.0) + 0.01:
        return replace(watch, signs=signs, worked_at=now)
    return watch


def stalled(watch: Watch, now: float, limit_s: float = DEFAULT_STALL_S) -> str | None:
    """Return why waiting is hopeless, None while there is hope."""
    if now - watch.worked_at >= limit_s:
        return f"no sign of work for {now - watch.worked_at:.0f} s"
    if now - watch.moved_at >= limit_s * BUSY_STALL_FACTOR:
        return f"busy, but nothing read or logged for {now - watch.moved_at:.0f} s"
    return None
