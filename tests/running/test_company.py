"""What a new instance must know of the others: what they have claimed, and whose memory comes back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mgpu.machine.snapshot import Gpu, GpuProcess, Host, Machine
from mgpu.running import company as company_module
from mgpu.running.company import Company, company_of, planning, wait_for_memory
from mgpu.running.instance import GpuShare, Instance, ProcessId, State
from mgpu.running.registry import Entry

ROOT = Path(__file__).parents[2]
ENGINE = ProcessId(pid=4711, started_ticks=5, boot_id="b")
SUPERVISOR = ProcessId(pid=4000, started_ticks=4, boot_id="b")
ON_BOTH = (GpuShare(uuid="GPU-a", index=0, planned_bytes=20), GpuShare(uuid=None, index=1, planned_bytes=10))
CARDS = (
    Gpu(index=0, vendor="nvidia", name="A", uuid="GPU-a", free_bytes=24),
    Gpu(index=1, vendor="other", name="B", free_bytes=24),
)


def entry(state: State, *, lives: bool = True, engine: bool = False, reaper: bool = False) -> Entry:
    instance = Instance(
        name="other",
        state=state,
        model="m",
        started_at="2026-01-01T00:00:00Z",
        supervisor=SUPERVISOR,
        gpus=ON_BOTH,
    )
    return Entry(
        name="other",
        folder=Path("other"),
        instance=instance,
        problem=None,
        supervisor=SUPERVISOR if lives else None,
        engine=(ENGINE,) if engine else (),
        reaper=SUPERVISOR if reaper else None,
    )


def free(company: Company, *cards: Gpu) -> list[int | None]:
    machine = Machine(captured_at="", source="probed", host=Host(), gpus=cards)
    return [gpu.free_bytes for gpu in company.without_claimed(machine).gpus]


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        pytest.param([], [24, 24], id="nobody"),
        pytest.param([entry(State.STARTING)], [4, 14], id="one that starts has a claim"),
        pytest.param([entry(State.RESTARTING), entry(State.STARTING)], [0, 4], id="claims add up, to nothing at least"),
        pytest.param([entry(State.READY)], [24, 24], id="what one holds that is ready is not free anyway"),
        pytest.param([entry(State.STARTING, lives=False)], [24, 24], id="the dead claim nothing"),
        pytest.param([entry(State.STARTING, lives=False, engine=True)], [24, 24], id="nor do orphans"),
        pytest.param([replace(entry(State.READY), instance=None)], [24, 24], id="of a damaged record nothing is known"),
    ],
)
def test_what_others_have_claimed_is_not_free(others: list[Entry], expected: list[int]) -> None:
    assert free(company_of(others), *CARDS) == expected


@pytest.mark.parametrize(
    ("other", "unknown"),
    [
        pytest.param(
            replace(entry(State.STARTING), instance=None), ("other",), id="a damaged record of one that lives"
        ),
        pytest.param(replace(entry(State.STARTING, lives=False), instance=None), (), id="of a dead one"),
        pytest.param(entry(State.STARTING), (), id="a sound one"),
    ],
)
def test_claims_that_nobody_knows_are_warned_of(other: Entry, unknown: tuple[str, ...]) -> None:
    found = company_of([other])
    assert found.unknown == unknown
    assert [name in warning for name, warning in zip(unknown, found.warnings, strict=True)] == [True] * len(unknown)


def test_who_waits_in_vain_for_others_to_plan_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with planning() as alone:
        assert alone
        monkeypatch.setattr(company_module, "_PATIENCE_S", 0.1)
        with planning() as also_alone:
            assert not also_alone


def test_what_an_engine_holds_already_is_not_counted_twice() -> None:
    holding = replace(
        CARDS[0], free_bytes=9, used_by=(GpuProcess(pid=ENGINE.pid, bytes=15), GpuProcess(pid=1, bytes=9))
    )
    assert free(company_of([entry(State.STARTING, engine=True)]), holding, CARDS[1]) == [4, 14]


def test_a_card_is_known_by_its_uuid_wherever_it_is_counted() -> None:
    moved = (replace(CARDS[0], index=1), replace(CARDS[1], index=0))
    assert free(company_of([entry(State.STARTING)]), *moved) == [4, 24]


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        pytest.param(entry(State.STOPPING), True, id="one that stops"),
        pytest.param(entry(State.FAILED), True, id="a supervisor that is about to end"),
        pytest.param(entry(State.READY), False, id="one that serves"),
        pytest.param(
            entry(State.READY, lives=False, engine=True, reaper=True), True, id="one whose supervisor was killed"
        ),
        pytest.param(entry(State.READY, lives=False, engine=True), False, id="an orphan that nobody ends"),
        pytest.param(entry(State.STOPPED, lives=False), False, id="the dead"),
    ],
)
def test_who_gives_memory_back(other: Entry, expected: bool) -> None:
    assert company_of([other]).gives_back is expected


def readings(*values: int | None) -> Callable[[], int | None]:
    """One after the other, then the last one for ever."""
    left: Iterator[int | None] = iter(values)
    return lambda: next(left, values[-1])


@pytest.mark.parametrize(
    ("free_bytes", "gives_back", "expected"),
    [
        pytest.param(readings(5), lambda: False, False, id="nothing comes"),
        pytest.param(readings(5, 5, 6, 9), lambda: False, True, id="it rises"),
        pytest.param(readings(5, 4, 3), lambda: False, False, id="it falls"),
        pytest.param(readings(None), lambda: False, False, id="no driver tells"),
        pytest.param(readings(None), iter([True, True, False]).__next__, True, id="somebody was ending"),
    ],
)
def test_memory_that_comes_back_is_waited_for(
    free_bytes: Callable[[], int | None], gives_back: Callable[[], bool], expected: bool
) -> None:
    assert wait_for_memory(free_bytes, gives_back) is expected


def test_one_plans_at_a_time() -> None:
    program = "from mgpu.running.company import planning\nwith planning(): print('mine', flush=True)"
    environment = {"PYTHONPATH": str(ROOT)}
    with planning():
        other = subprocess.Popen(
            [sys.executable, "-c", program], env={**os.environ, **environment}, stdout=subprocess.PIPE
        )
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(1.0)
    out, _ = other.communicate(timeout=30)
    assert out == b"mine\n"
