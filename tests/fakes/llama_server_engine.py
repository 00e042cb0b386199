"""The fake engine behind the endpoints: slots, made-up tokens, and counters that move like the real ones."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.fakes.llama_server_options import Settings

WORDS = tuple("I am a fake engine and every word of this answer was made up in advance .".split())  # noqa: SIM905 - easier to read


@dataclass(slots=True)
class Slot:
    """One request at a time."""

    id: int
    task: int | None = None
    busy: bool = False
    prompt_tokens: int = 0
    decoded: int = 0
    wanted: int = 0


@dataclass(slots=True)
class Counters:
    """The totals of /metrics. As in the real engine, the tokens of an answer count when it ends."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    predicted: int = 0
    predicted_seconds: float = 0.0
    decodes: int = 0
    largest: int = 0


@dataclass(slots=True)
class Answer:
    """A running answer: iterate over `words`; the rest is filled in as it goes."""

    slot: Slot
    prompt_tokens: int
    wanted: int
    endless: bool
    started: float = field(default_factory=time.monotonic)
    prompt_ms: float = 0.0
    predicted: int = 0
    finish_reason: str = "stop"

    def timings(self) -> dict[str, float]:
        """The `timings` object the server attaches to its answers."""
        predicted_ms = max((time.monotonic() - self.started) * 1000 - self.prompt_ms, 0.001)
        return {
            "cache_n": 0,
            "prompt_n": self.prompt_tokens,
            "prompt_ms": self.prompt_ms,
            "prompt_per_token_ms": self.prompt_ms / self.prompt_tokens,
            "prompt_per_second": 1000 * self.prompt_tokens / self.prompt_ms,
            "predicted_n": self.predicted,
            "predicted_ms": predicted_ms,
            "predicted_per_token_ms": predicted_ms / max(self.predicted, 1),
            "predicted_per_second": 1000 * self.predicted / predicted_ms,
        }


class Engine:
    """The state all connections share."""

    def __init__(self, settings: Settings, faults: frozenset[str], tokens_per_second: float) -> None:
        self.settings = settings
        self.faults = faults
        self.ready = False
        self.stopping = threading.Event()
        self.slots = [Slot(id=index) for index in range(settings.slots)]
        self.counters = Counters()
        self.deferred = 0
        self.in_flight = 0
        self._seconds_per_token = 1 / tokens_per_second
        self._tasks = itertools.count()
        self._changed = threading.Condition()

    @property
    def ctx_per_slot(self) -> int:
        return self.settings.ctx_tokens // self.settings.slots

    @property
    def processing(self) -> int:
        return sum(slot.busy for slot in self.slots)

    def begin(self, prompt_tokens: int, wanted: int, *, endless: bool) -> Answer:
        """Wait for a slot, work on the prompt, and return the answer to be generated."""
        with self._changed:
            self.in_flight += 1
            self.deferred += 1
            self._changed.wait_for(lambda: any(not slot.busy for slot in self.slots))
            self.deferred -= 1
            slot = next(slot for slot in reversed(self.slots) if not slot.busy)
            slot.busy, slot.task, slot.decoded = True, next(self._tasks), 0
            slot.prompt_tokens, slot.wanted = prompt_tokens, wanted
        answer = Answer(slot=slot, prompt_tokens=prompt_tokens, wanted=wanted, endless=endless)
        while "hang-request" in self.faults:
            time.sleep(0.05)
        time.sleep(self._seconds_per_token)
        answer.prompt_ms = (time.monotonic() - answer.started) * 1000
        with self._changed:
            self.counters.prompt_tokens += prompt_tokens
            self.counters.prompt_seconds += answer.prompt_ms / 1000
        return answer

    def words(self, answer: Answer) -> Iterator[str]:
        """The answer word by word, at the engine's speed; ends early when the engine is told to stop."""
        made_up = itertools.cycle(WORDS) if answer.endless or "talkative" in self.faults else iter(WORDS)
        if "repeat-token" in self.faults:
            made_up = itertools.repeat("the")
        if "garbage" in self.faults:
            made_up = itertools.cycle(["�", "@@", "]}", "\x7f"])
        room = self.ctx_per_slot - answer.prompt_tokens
        for word in made_up:
            if answer.predicted >= min(answer.wanted, room):
                answer.finish_reason = "length"
                return
            if self.stopping.is_set():
                return
            time.sleep(self._seconds_per_token)
            answer.predicted += 1
            with self._changed:
                answer.slot.decoded = answer.predicted
                self.counters.decodes += 1
            yield word if answer.predicted == 1 else f" {word}"

    def end(self, answer: Answer) -> None:
        """Give the slot back."""
        slot = answer.slot
        with self._changed:
            self.counters.predicted += answer.predicted
            self.counters.predicted_seconds += time.monotonic() - answer.started - answer.prompt_ms / 1000
            self.counters.largest = max(self.counters.largest, answer.prompt_tokens + answer.predicted)
            slot.busy = False
            slot.prompt_tokens += answer.predicted
            slot.decoded = 0
            self.in_flight -= 1
            self._changed.notify_all()

    def wait_until_idle(self) -> None:
        """Block until no request is in flight any more."""
        with self._changed:
            self._changed.wait_for(lambda: self.in_flight == 0)
