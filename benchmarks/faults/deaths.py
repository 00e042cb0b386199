"""Deaths of everybody, by every signal, at every moment."""

from __future__ import annotations

import contextlib
import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from benchmarks.faults.ground import Ground
from benchmarks.faults.row import Row
from tests.cli.deaths import SIGNALS, Moment, Rig, Victim, death

_AT_ONCE = 2
_KILL = (signal.SIGKILL,)
_CLOSED = (signal.SIGHUP,)

Cell = tuple[signal.Signals, Moment]


def rows(ground: Ground) -> Iterator[Row]:
    """A row for each engine and each victim: all its signals, at all moments."""
    rigs: tuple[tuple[str, Callable[[], contextlib.AbstractContextManager[Rig]], str | None], ...] = (
        ("llama-server (fake)", ground.llama, None),
        ("vLLM, 2 cards (fake)", ground.vllm, ground.lacks_for_vllm()),
        ("llama-server on 2 RPC devices", ground.real, ground.lacks_for_real()),
        ("vLLM, 2 workers on the CPU", ground.real_vllm, ground.lacks_for_real_vllm()),
    )
    for name, rig, missing in rigs:
        if missing:
            yield Row(fault=f"{name}: every death", skipped=missing)
            continue
        for victim in Victim:
            signals = {
                Victim.GUARDED: _KILL,
                Victim.TERMINAL: _CLOSED,
                Victim.TERMINAL_DETACHED: _CLOSED,
            }.get(victim, SIGNALS)
            row = Row(fault=f"{name}: {_what(signals, victim)}")
            _fill(row, rig, victim, signals)
            yield row


def _fill(
    row: Row,
    rig: Callable[[], contextlib.AbstractContextManager[Rig]],
    victim: Victim,
    signals: Sequence[signal.Signals],
) -> None:
    became: list[str] = []
    memory: list[int] = []

    def die(cell: Cell) -> None:
        number, moment = cell
        what = f"{number.name} {moment}"
        with row.trial(what), rig() as machine:
            outcome = death(machine, victim, number, moment)
            row.leaves(what, outcome.left)
            memory.append(outcome.memory_bytes)
            became.append(f"{outcome.became}{' and was reaped' if outcome.reaped else ''}")

    with ThreadPoolExecutor(_AT_ONCE) as threads:
        list(threads.map(die, itertools.product(signals, Moment)))
    counted = ", ".join(f"{became.count(each)} {each}" for each in sorted(set(became)))
    held = f"; {max(memory) >> 20} MiB held at most, none after" if memory and not row.left else ""
    row.note(counted + held)


def _what(signals: Sequence[signal.Signals], victim: Victim) -> str:
    if signals is _CLOSED:
        return f"{victim} closed"
    names = " ".join(number.name.removeprefix("SIG") for number in signals)
    return f"{names} of {victim}"
