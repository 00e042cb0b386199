"""The requests of a vLLM: they wait, run together in steps of one token each, and are counted as they do."""

from __future__ import annotations

import itertools
import os
import queue
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tests.fakes.vllm_model import Memory
from tests.fakes.vllm_options import Settings
from tests.fakes.vllm_worker import STEP

WORDS = ("I", "am", "a", "made", "up", "answer", "of", "something", "that", "has", "never", "seen", "any", "model")
_GARBAGE = ("�", "@@", "]}", "\x7f")


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step adds to an answer; `finish_reason` with its last one, "error" when the engine died."""

    text: str
    finish_reason: str | None


@dataclass(eq=False)
class Choice:
    """One answer that is being made."""

    prompt_tokens: int
    room: int
    words: Iterator[str]
    prompt_counts: bool
    pieces: queue.SimpleQueue[Piece] = field(default_factory=queue.SimpleQueue)
    made: int = 0
    submitted: float = field(default_factory=time.monotonic)
    started: float = 0.0
    first: float = 0.0

    @property
    def held(self) -> int:
        return self.prompt_tokens + self.made


@dataclass
class Counters:
    """What /metrics tells of one engine core."""

    running: int = 0
    waiting: int = 0
    kv_used: float = 0.0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    ended: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "abort": 0, "error": 0})
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("queue", "prefill", "decode", "first", "whole"), 0.0)
    )
    ended_prompt_tokens: int = 0
    ended_generation_tokens: int = 0


class Requests:
    """All requests of a server over its engine cores, each of which is asked for steps by a thread of its own."""

    def __init__(
        self,
        engines: list[socket.socket],
        settings: Settings,
        memory: Memory,
        faults: Mapping[str, float],
        tokens_per_second: float,
    ) -> None:
        self.settings, self.memory, self.faults = settings, memory, faults
        self.counters = [Counters() for _ in engines]
        self.stopping = False
        self.dead_since: float | None = None
        self.died_busy = False
        self.open = 0
        self._seconds_per_step = 1 / tokens_per_second
        self._changed = threading.Condition()
        self._waiting: list[list[Choice]] = [[] for _ in engines]
        self._running: list[list[Choice]] = [[] for _ in engines]
        for index, engine in enumerate(engines):
            threading.Thread(target=self._work, args=(index, engine), daemon=True).start()

    def submit(
        self, prompt_tokens: int, wanted: int, *, endless: bool, count: int = 1, asks_a_name: bool = False
    ) -> list[Choice]:
        """Begin `count` answers to one prompt, on the engine core that has least to do."""
        words = [self._words(endless, asks_a_name=asks_a_name) for _ in range(count)]
        room = min(wanted, self.settings.max_model_len - prompt_tokens) if self.settings.max_model_len else wanted
        choices = [
            Choice(prompt_tokens=prompt_tokens, room=room, words=words[number], prompt_counts=number == 0)
            for number in range(count)
        ]
        with self._changed:
            index = min(range(len(self._running)), key=lambda i: len(self._running[i]) + len(self._waiting[i]))
            self._waiting[index] += choices
            self._gauge(index)
            self._changed.notify_all()
        return choices

    def abort(self, choices: list[Choice]) -> None:
        """Forget answers that nobody waits for any more."""
        with self._changed:
            for index, counters in enumerate(self.counters):
                for places in (self._waiting[index], self._running[index]):
                    for choice in [each for each in choices if each in places]:
                        places.remove(choice)
                        counters.ended["abort"] += 1
                self._gauge(index)

    def count_open(self, change: int) -> None:
        """One connection more or less waits for an answer."""
        with self._changed:
            self.open += change

    def _words(self, endless: bool, *, asks_a_name: bool) -> Iterator[str]:
        peers_fail = "broken-p2p" in self.faults and os.environ.get("NCCL_P2P_DISABLE") != "1"
        if "garbage" in self.faults or peers_fail:
            return itertools.repeat("!")
        if "blank-name" in self.faults and asks_a_name:
            return itertools.repeat("_")
        if "silent" in self.faults:
            return iter(())
        if "textless" in self.faults:
            return itertools.repeat("")
        if "nonsense" in self.faults:
            return itertools.cycle(_GARBAGE)
        made_up = itertools.chain(WORDS, itertools.cycle(WORDS)) if endless else iter(WORDS)
        return (f" {word}" for word in made_up)

    def _work(self, index: int, engine: socket.socket) -> None:
        waiting, running, counters = self._waiting[index], self._running[index], self.counters[index]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: waiting or running)
                self._admit(index)
            begun = time.monotonic()
            if not self._step(engine):
                if not self.stopping:
                    self._die(busy=True)
                return
            time.sleep(max(0.0, self._seconds_per_step - (time.monotonic() - begun)))
            with self._changed:
                counters.steps += 1
                for choice in list(running):
                    self._advance(choice, index)
                self._gauge(index)

    def _step(self, engine: socket.socket) -> bool:
        try:
            engine.sendall(STEP)
            return bool(engine.recv(1))
        except OSError:
            return False

    def _die(self, *, busy: bool) -> None:
        with self._changed:
            if self.dead_since is None:
                self.dead_since, self.died_busy = time.monotonic(), busy
            for places in (*self._waiting, *self._running):
                for choice in places:
                    choice.pieces.put(Piece("", "error"))
                places.clear()

    def notice_death(self) -> None:
        """An engine core ended while nobody asked it for anything."""
        if not any(self._running) and not any(self._waiting):
            self._die(busy=False)

    def _admit(self, index: int) -> None:
        waiting, running = self._waiting[index], self._running[index]
        while waiting and len(running) < self.settings.max_num_seqs:
            held = sum(choice.held for choice in running)
            if running and held + waiting[0].prompt_tokens > self.memory.kv_tokens:
                return
            choice = waiting.pop(0)
            choice.started = time.monotonic()
            running.append(choice)

    def _advance(self, choice: Choice, index: int) -> None:
        counters, now = self.counters[index], time.monotonic()
        if not choice.made:
            choice.first = now
            counters.prompt_tokens += choice.prompt_tokens if choice.prompt_counts else 0
            counters.seconds["first"] += now - choice.submitted
        text = next(choice.words, None)
        choice.made += 1
        counters.generation_tokens += 1
        reason = "stop" if text is None else "length" if choice.made >= choice.room else None
        choice.pieces.put(Piece(text or "", reason))
        if reason:
            self._running[index].remove(choice)
            counters.ended[reason] += 1
            counters.ended_prompt_tokens += choice.prompt_tokens
            counters.ended_generation_tokens += choice.made
            counters.seconds["queue"] += choice.started - choice.submitted
            counters.seconds["prefill"] += choice.first - choice.started
            counters.seconds["decode"] += now - choice.first
            counters.seconds["whole"] += now - choice.submitted

    def _gauge(self, index: int) -> None:
        """Of what runs it is told only after its first step, so that a worker that hangs leaves no trace."""
        running = [choice for choice in self._running[index] if choice.made]
        counters = self.counters[index]
        counters.running, counters.waiting = len(running), len(self._waiting[index])
        block = self.memory.block_tokens
        held = sum(-(-choice.held // block) * block for choice in running)
        counters.kv_used = min(1.0, held / max(1, self.memory.kv_tokens))
