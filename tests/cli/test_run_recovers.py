"""What a start learns from its failure: a step of the right ladder, and an engine that works with it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.tiny_llama import make_tiny_llama

from .program import Mgpu, Running, until
from .vllm_rig import with_vllm


@pytest.fixture
def vmstat(mgpu: Mgpu, tmp_path: Path) -> Path:
    """What the kernel counts, on a computer of this test's alone."""
    root = tmp_path / "root"
    shutil.copytree(mgpu.environment["MGPU_ROOT"], root)
    mgpu.environment["MGPU_ROOT"] = str(root)
    (root / "proc/vmstat").write_text("oom_kill 3\n")
    return root / "proc/vmstat"


def killed_by_the_kernel(mgpu: Mgpu, running: Running, vmstat: Path) -> None:
    """The kernel counts, then it kills."""
    victim = running.engine_pid()
    vmstat.write_text("oom_kill 4\n")
    mgpu.kill(victim)


def test_an_engine_that_the_kernel_killed_for_its_memory_says_so(mgpu: Mgpu, tiny: Path, vmstat: Path) -> None:
    running = mgpu.start("run", tiny, "--json")
    killed_by_the_kernel(mgpu, running, vmstat)
    ended = running.end()
    (error,) = ended.stream[-1]["errors"]
    assert (ended.exit_code, error["code"]) == (4, "host-out-of-memory")
    assert "probably for want of RAM: the kernel killed a process" in error["message"]


def test_it_is_started_again_with_less_to_hold(mgpu: Mgpu, tiny: Path, vmstat: Path) -> None:
    running = mgpu.start("run", tiny, "--restart", "on-failure", "--name", "small", "--json")
    killed_by_the_kernel(mgpu, running, vmstat)

    until(lambda: shown(mgpu)["state"] == "ready" and shown(mgpu)["restarts"] == 1, "it is there again")
    (change,) = shown(mgpu)["changes"]
    assert (change["cause"], change["setting"]) == ("host-out-of-memory", "--ctx")


@pytest.fixture
def on_two(mgpu: Mgpu, nvml: dict[str, Path], tmp_path: Path) -> Mgpu:
    return with_vllm(mgpu, nvml, tmp_path)


@pytest.mark.parametrize(
    ("fault", "exit_code", "tried"),
    [
        pytest.param("broken-p2p", 0, ["NCCL_P2P_DISABLE"], id="without peer access all is well"),
        pytest.param("garbage", 4, ["NCCL_P2P_DISABLE", "--disable-custom-all-reduce"], id="nothing helps"),
    ],
)
def test_cards_that_spoil_every_answer_are_kept_from_their_peers(
    on_two: Mgpu, tmp_path: Path, fault: str, exit_code: int, tried: list[str]
) -> None:
    model = make_tiny_llama(tmp_path / "models" / "tiny")
    started = on_two("run", model, "--gpus", "2", "-d", FAKE_FAIL=fault)
    assert started.exit_code == exit_code, started
    assert [(change["cause"], change["setting"]) for change in shown(on_two)["changes"]] == [
        ("garbage", setting) for setting in tried
    ]
    if exit_code:
        assert "every answer is one token ('!')" in started.err
        assert "mgpu doctor --probe" in started.err
        on_two.assert_nothing_left()


def shown(mgpu: Mgpu) -> dict[str, Any]:
    """The one instance, as it is told of."""
    (instance,) = mgpu("ps", "--json").json["data"]["instances"]
    return dict(instance)
