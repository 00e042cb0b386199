"""The table of instances, of values: what is held beside what was planned, and what the failures began with."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mgpu.cli.views.instances import instances_screen
from mgpu.machine.snapshot import Gpu, Machine
from mgpu.running.census import Census
from mgpu.running.instance import Exit, GpuShare, Instance, State
from mgpu.running.registry import Entry

from .records import NOBODY

GIB = 1 << 30
AT = "2026-01-02T03:04:05Z"
LATER = "2026-01-02T03:07:05Z"
CARD = Gpu(index=0, vendor="nvidia", name="RTX 4090", uuid="GPU-0", total_bytes=24 * GIB, free_bytes=2 * GIB)


def lines_of(*, width: int = 100, alive: bool = True, name: str = "llama", **more: Any) -> list[str]:
    """What is shown of an instance at a width."""
    facts = {"state": State.READY, "backend": "llama.cpp", "url": "http://127.0.0.1:8080", **more}
    instance = Instance(name=name, model="a model", started_at=AT, supervisor=NOBODY, **facts)
    entry = Entry(
        name=name,
        folder=Path(),
        instance=instance,
        problem=None,
        supervisor=NOBODY if alive else None,
        engine=(NOBODY,) if alive else (),
    )
    machine = Machine(captured_at=AT, source="simulated", gpus=(CARD,))
    shown = io.StringIO()
    console = Console(width=width, file=shown, markup=False, emoji=False)
    for part in instances_screen(
        Census(entries=(entry,), machine=machine, strangers=()), datetime.now(UTC), width, logs=()
    ):
        console.print(part, soft_wrap=isinstance(part, str))
    return shown.getvalue().splitlines()


def gib(number: float | None) -> int | None:
    return None if number is None else round(number * GIB)


@pytest.mark.parametrize(
    ("actual", "planned", "wide", "narrow", "note"),
    [
        pytest.param(21.9, 21.7, "21.9/21.7", "21.9", "(GiB held/planned)", id="as planned"),
        pytest.param(23.4, 21.7, "23.4/21.7!", "23.4!", "(GiB held/planned; ! is more than 5 % off)", id="more"),
        pytest.param(20.0, 21.7, "20.0/21.7!", "20.0!", "(GiB held/planned; ! is more than 5 % off)", id="less"),
        pytest.param(0.0, 0.0, "0.0/0.0", "0.0", "(GiB held/planned)", id="nothing of nothing"),
        pytest.param(0.4, None, "0.4", "0.4", "", id="never planned"),
        pytest.param(None, 21.7, "(21.7)", "(21.7)", "(GiB in brackets are planned", id="not known"),
        pytest.param(None, None, "?", "?", "", id="nothing known"),
    ],
)
def test_what_is_held_stands_beside_what_was_planned(
    actual: float | None, planned: float | None, wide: str, narrow: str, note: str
) -> None:
    share = GpuShare(uuid="GPU-0", index=0, planned_bytes=gib(planned), actual_bytes=gib(actual))
    lines = lines_of(gpus=(share,))
    assert wide in lines[2].split()
    assert note in "".join(lines)
    assert ("held/planned" in "".join(lines)) == ("held/planned" in note)
    assert narrow in lines_of(gpus=(share,), width=60)[2].split()


def ended(cause: str, at: str = AT) -> Exit:
    return Exit(code=1, signal=None, cause=cause, at=at, last_lines=("bye",), message=f"it was {cause}", hint="a hint")


@pytest.mark.parametrize(
    ("first", "last", "told"),
    [
        pytest.param(ended("crashed"), ended("port-in-use", LATER), True, id="another one first"),
        pytest.param(ended("crashed"), ended("crashed", LATER), False, id="the same again"),
        pytest.param(ended("crashed"), ended("crashed"), False, id="the only one"),
        pytest.param(None, ended("crashed"), False, id="none known"),
    ],
)
def test_what_the_failures_began_with_is_told(first: Exit | None, last: Exit, told: bool) -> None:
    text = "\n".join(lines_of(state=State.FAILED, alive=False, exit=last, first_exit=first))
    assert last.message
    assert last.message in text
    assert ("first    it was crashed; mgpu logs llama --first shows its log" in text) == told


def stopped(
    code: int | None = None, number: int | None = None, cause: str = "asked", message: str | None = None
) -> Exit:
    return Exit(code=code, signal=number, cause=cause, at="2026-01-02T03:06:17Z", message=message)


@pytest.mark.parametrize(
    ("last", "told"),
    [
        pytest.param(stopped(), "stopped by you after 2.2 min", id="nothing known of the engine"),
        pytest.param(stopped(code=0), "stopped by you after 2.2 min", id="it ended at once"),
        pytest.param(stopped(code=1), "stopped by you after 2.2 min", id="it says that it was told to"),
        pytest.param(stopped(number=15), "stopped by you after 2.2 min", id="by the signal itself"),
        pytest.param(stopped(number=9), "stopped by you after 2.2 min (killed after the grace)", id="killed"),
        pytest.param(
            stopped(number=9, message="1 answer was cut off"),
            "stopped by you after 2.2 min (1 answer was cut off)",
            id="in the middle of an answer",
        ),
        pytest.param(
            stopped(cause="terminal-closed", message="its terminal was closed"),
            "stopped after 2.2 min (its terminal was closed)",
            id="not by a wish",
        ),
    ],
)
def test_a_stop_is_shown_in_one_way(last: Exit, told: str) -> None:
    row = lines_of(width=200, state=State.STOPPED, alive=False, exit=last)[2]
    assert row.split()[1] == "stopped"
    assert row.rstrip().endswith(told)


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("width", [30, 40, 60, 80])
def test_no_width_cuts_off_states_or_parts_numbers_from_units(state: State, width: int) -> None:
    share = GpuShare(uuid="GPU-0", index=0, planned_bytes=gib(21), actual_bytes=gib(22))
    last = ended("crashed", "2026-01-02T03:06:17Z") if state.is_over else None
    lines = lines_of(
        width=width,
        name="a-name-that-is-long-" + "x" * 12,
        state=state,
        alive=not state.is_over,
        exit=last,
        gpus=(share,),
        restarts=2,
        phase="weights, 12 s left",
    )
    assert str(state) in lines[2].split()
    end = next(
        place
        for place, line in enumerate(lines)
        if place > 1 and line.startswith(("free", "(GiB", "mgpu logs", "a-name-that-is-long-xxxxxxxxxxxx:"))
    )
    assert max(map(len, lines[:end])) <= width
    last_column = lines[0].index("UP")
    pieces = [line[last_column:].strip() for line in lines[2:end]]
    assert not [piece for piece in pieces if piece.split()[-1].isdigit()], lines
    assert lines[2].startswith("a-name-that-is-long-xxxxxxxxxxxx" if width == 80 else "a-")
