"""Following an engine that is ready: its counters, what it holds of the cards, and whether it still computes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from mgpu.backends.backend import Backend
from mgpu.backends.failure import Failure
from mgpu.backends.samples import Rates, Sample, rates
from mgpu.errors import EngineFailed
from mgpu.machine.snapshot import Gpu
from mgpu.running import watchdog
from mgpu.running.client import Canary, Link
from mgpu.running.instance import GpuShare, Rate
from mgpu.running.life import Sampled
from mgpu.running.process import EngineProcess
from mgpu.running.registry import read
from mgpu.running.start import death
from mgpu.running.strangers import owner_of
from mgpu.running.supervisor import Supervisor

# Asking a driver costs a tenth of a second or more.
_LOOK_EVERY_S = 30.0
# How often one that only waits is asked for its counters, unless it has used so many hundredths of a second.
_IDLE_EVERY_S = 10.0
_BUSY_TICKS = 2
_LONGEST_READ_BYTES = 1 << 20
# What llama-server says of a long prompt between the movements of its counters.
_PROMPT_PROGRESS = b"prompt processing progress"

Show = Callable[[Sample | None, Rates | None], None]


class GivenUp(EngineFailed):
    """An engine that is there and no good; `failure` says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message, code=failure.code, hint=failure.hint)
        self.failure = failure


def follow(
    supervisor: Supervisor,
    backend: Backend,
    link: Link,
    show: Show,
    *,
    every_s: float,
    canary: Canary,
    cards: Callable[[], Mapping[int, Gpu]],
    patience: watchdog.Patience = watchdog.DEFAULT_PATIENCE,
) -> None:
    """Report the state of an engine every `every_s` seconds, and `show` it; never returns.

    `canary` is its first answer; `cards` asks the driver for the machine's cards by index. Raises EngineDied when the
    engine ends, GivenUp when it hangs or answers with garbage, EngineFailed (code "engine-died") when one that
    somebody else runs is gone.
    """
    process = supervisor.process
    setup = supervisor.instance.setup
    watch = watchdog.begin(
        canary,
        time.monotonic(),
        slots=setup.parallel if setup else None,
        exchanges_data=bool(setup and setup.exchanges_data),
    )
    question = _Question(link)
    glance = _Glance(process.pid) if process else None
    signs = _ProgressLines(process.log_path if process else None)
    looks = _Looks(supervisor, process, cards)
    current = previous = link.sample()
    speed: Rates | None = None
    while True:
        if process is None:
            _pause(supervisor, every_s)
        elif process.wait(every_s) is not None:
            raise death(process, backend)
        if glance and watch.asked_at is None and _is_idle(current, speed) and not glance.is_worth_it(time.monotonic()):
            supervisor.tick()
            show(current, speed)
            continue
        current = link.sample()
        if glance:
            glance.taken(time.monotonic())
        if process is None and not (current or link.is_up()):
            raise EngineFailed(
                "the engine that somebody else ran is gone", code="engine-died", hint="mgpu backends shows what runs"
            )
        speed = rates(previous, current) if previous and current else None
        now = time.monotonic()
        shares = looks.look(now)
        supervisor.report(Sampled(rate=_rate(current, speed) if current else None, gpus=shares))
        show(current, speed)
        previous = current or previous
        if process is None:  # mgpu does not end what it did not start
            continue
        watch = watchdog.observe(
            watch, current, now, utilisation_percent=looks.utilisation_percent, other_signs=(signs.count(),)
        )
        if answer := question.answer():
            watch = watchdog.answered(watch, answer, now)
        match watchdog.judge(watch, now, patience):
            case watchdog.Ask(answer_s=answer_s):
                question.ask(answer_s)
                watch = watchdog.asked(watch, now, answer_s)
            case Failure() as failure:
                raise GivenUp(failure)


def _rate(sample: Sample, speed: Rates | None) -> Rate:
    return Rate(
        generation_tok_s=speed.generation_tok_s if speed else None,
        prompt_tok_s=speed.prompt_tok_s if speed else None,
        running=sample.running,
        waiting=sample.waiting,
        kv_used=sample.kv_used,
    )


def _is_idle(sample: Sample | None, speed: Rates | None) -> bool:
    """Whether nobody wants anything of the engine, nor did between the last two looks at it."""
    if sample is None or speed is None or sample.running != 0 or sample.waiting:
        return False
    return not speed.generation_tok_s and not speed.prompt_tok_s


class _Glance:
    """Whether an idle engine may have done something since it was last asked for its counters: each asking leaves
    lines in its log, so that what only waits is asked seldom. The time on processors that its first process has used
    is told by the system without asking the engine."""

    def __init__(self, pid: int) -> None:
        self._stat = Path(f"/proc/{pid}/stat")
        self._ticks: int | None = None
        self._taken_at = 0.0

    def taken(self, now: float) -> None:
        """Remember that it has just been asked."""
        self._taken_at, self._ticks = now, self._used()

    def is_worth_it(self, now: float) -> bool:
        """Whether to ask it again."""
        used = self._used()
        if self._ticks is None or used is None or now - self._taken_at >= _IDLE_EVERY_S:
            return True
        return used - self._ticks >= _BUSY_TICKS

    def _used(self) -> int | None:
        """In clock ticks (proc(5), fields 14 and 15), None where nothing tells."""
        try:
            fields = self._stat.read_bytes().rpartition(b")")[2].split()
            return int(fields[11]) + int(fields[12])
        except (OSError, ValueError, IndexError):
            return None


def _pause(supervisor: Supervisor, seconds: float) -> None:
    time.sleep(seconds)
    supervisor.tick()


class _Question:
    """A token that was asked for, in a thread of its own: an engine that hangs never answers."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._answers: list[Canary] = []

    def ask(self, answer_s: float) -> None:
        answers = self._answers = []  # what comes to an earlier question is too late

        def do() -> None:
            try:
                answers.append(self._link.canary(patience_s=answer_s))
            except EngineFailed:
                return  # no answer is judged by the time

        threading.Thread(target=do, daemon=True).start()

    def answer(self) -> Canary | None:
        return self._answers.pop() if self._answers else None


class _ProgressLines:
    """How often a log has told that a prompt is being worked on."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._offset = path.stat().st_size if path and path.exists() else 0
        self._count = 0

    def count(self) -> float:
        if self._path is None:
            return 0.0
        try:
            with self._path.open("rb") as log:
                log.seek(self._offset)
                new = log.read(_LONGEST_READ_BYTES)
        except OSError:
            return float(self._count)
        whole, newline, _ = new.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        self._count += whole.count(_PROMPT_PROGRESS)
        return float(self._count)


class _Looks:
    """What the engine holds of its cards, as their driver says, asked for now and then."""

    def __init__(
        self, supervisor: Supervisor, process: EngineProcess | None, cards: Callable[[], Mapping[int, Gpu]]
    ) -> None:
        # Of a card without a UUID no driver tells.
        shares = supervisor.instance.gpus
        self._shares = shares if process and any(share.uuid for share in shares) else ()
        self._folder = supervisor.folder
        self._cards = cards
        self._due_at = 0.0
        self.utilisation_percent: tuple[int | None, ...] = ()

    def look(self, now: float) -> tuple[GpuShare, ...] | None:
        """The shares with what they really are; None where that was not asked now."""
        if not self._shares or now < self._due_at:
            return None
        self._due_at = now + _LOOK_EVERY_S
        cards = self._cards()
        pids = {process.pid: True for process in read(self._folder).engine}
        used = [cards.get(share.index) for share in self._shares]
        self.utilisation_percent = tuple(card.utilisation_percent if card else None for card in used)
        return tuple(
            replace(share, actual_bytes=_held(card, pids)) for share, card in zip(self._shares, used, strict=True)
        )


def _held(card: Gpu | None, pids: Mapping[int, bool]) -> int | None:
    root = Path(os.environ.get("MGPU_ROOT") or "/")
    sizes = [process.bytes for process in card.used_by if owner_of(process.pid, pids, root)] if card else []
    known = [size for size in sizes if size is not None]
    return sum(known) if known else None
