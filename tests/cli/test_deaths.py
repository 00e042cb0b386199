"""Who is killed by what, and when: what becomes of the rest. The whole matrix is `python -m benchmarks faults`."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.fakes.tiny_llama import make_tiny_llama

from .deaths import Moment, Outcome, Rig, Victim, child, death, vllm_worker
from .program import Mgpu
from .test_run_ends import open_request as ask_llama
from .vllm_rig import open_request as ask_vllm
from .vllm_rig import with_vllm

INT, TERM, HUP, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL
LOADING, SERVING, ANSWERING = Moment
SLOW = "slow-load:4"


@pytest.fixture
def llama(mgpu: Mgpu, tiny: Path) -> Rig:
    """A llama-server with a child that ignores SIGTERM."""
    mgpu.environment["FAKE_FAIL"] = "spawn-child"
    slow = {"FAKE_FAIL": f"spawn-child,{SLOW}"}
    return Rig(mgpu=mgpu, words=(tiny, "--interval", "0.1"), ask=ask_llama, worker=child, slow=slow)


@pytest.fixture
def vllm(mgpu: Mgpu, nvml: dict[str, Path], tmp_path: Path) -> Rig:
    """A vLLM over two cards, whose workers ignore SIGTERM."""
    with_vllm(mgpu, nvml, tmp_path)
    mgpu.environment["FAKE_TOKENS_PER_SECOND"] = "50"
    model = make_tiny_llama(tmp_path / "tiny")
    slow = {"FAKE_FAIL": SLOW, "FAKE_FAIL_STARTS": f"1:{tmp_path / 'starts'}"}
    return Rig(
        mgpu=mgpu, words=(model, "--gpus", "2", "--interval", "0.1"), ask=ask_vllm, worker=vllm_worker, slow=slow
    )


def cell(victim: Victim, number: signal.Signals, moment: Moment, became: str) -> object:
    what = f"{victim} gets {number.name} while {moment}" if number != HUP else f"{victim} hangs up while {moment}"
    return pytest.param(partial(death, victim=victim, number=number, moment=moment), became, id=what)


ON_LLAMA = [
    cell(Victim.MGPU, KILL, ANSWERING, "ended"),
    cell(Victim.SUPERVISOR, INT, SERVING, "ended"),
    cell(Victim.SUPERVISOR, TERM, LOADING, "ended"),
    cell(Victim.SUPERVISOR, KILL, LOADING, "ended"),
    cell(Victim.SUPERVISOR, HUP, LOADING, "went on"),
    cell(Victim.SUPERVISOR, KILL, ANSWERING, "ended"),
    cell(Victim.SUPERVISOR, HUP, ANSWERING, "went on"),
    cell(Victim.ENGINE, KILL, LOADING, "failed: killed"),
    cell(Victim.ENGINE, TERM, SERVING, "restarted"),
    cell(Victim.ENGINE, KILL, ANSWERING, "restarted"),
    cell(Victim.WORKER, KILL, SERVING, "went on"),
    cell(Victim.TERMINAL, HUP, SERVING, "ended"),
    cell(Victim.TERMINAL_DETACHED, HUP, SERVING, "went on"),
]
ON_VLLM = [
    cell(Victim.MGPU, HUP, LOADING, "ended"),
    cell(Victim.SUPERVISOR, TERM, ANSWERING, "ended"),
    cell(Victim.SUPERVISOR, KILL, SERVING, "ended"),
    cell(Victim.ENGINE, TERM, LOADING, "went on"),
    cell(Victim.ENGINE, KILL, SERVING, "restarted"),
    cell(Victim.WORKER, HUP, SERVING, "restarted"),
    cell(Victim.WORKER, KILL, ANSWERING, "restarted"),
]


@pytest.mark.parametrize(("die", "became"), ON_LLAMA)
def test_of_llama_server(llama: Rig, die: Callable[[Rig], Outcome], became: str) -> None:
    outcome = die(llama)
    assert (outcome.became, outcome.left, outcome.reaped) == (became, (), False)


@pytest.mark.parametrize(("die", "became"), ON_VLLM)
def test_of_vllm(vllm: Rig, die: Callable[[Rig], Outcome], became: str) -> None:
    outcome = die(vllm)
    assert (outcome.became, outcome.left, outcome.reaped) == (became, (), False)


def test_what_nobody_ends_is_shown_and_cleared_by_reap(vllm: Rig) -> None:
    """With the reaper gone too, vLLM's workers live on, as nobody tells them anything."""
    outcome = death(vllm, Victim.GUARDED, KILL, SERVING)
    assert (outcome.left, outcome.reaped) == ((), True)
