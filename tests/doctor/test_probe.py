"""The probe: what it may touch, what its program finds on two processes of a real PyTorch, and what that proves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mgpu.cli.doctor import _report
from mgpu.doctor.catalogue import CHECKS, with_ids
from mgpu.doctor.check import Finding, Purpose, Skip
from mgpu.doctor.probe import busy, probe, probed_cards, prove, torch_python
from mgpu.doctor.proof import CardCopy, Collective, PairCopy, Proof, proof_checks, with_links_under_load
from mgpu.machine.inspection import Inspection
from mgpu.machine.snapshot import Gpu, GpuProcess

from .inspections import bare, changed_card, changed_gpu, changed_pair, healthy

GPUS = (0, 1)


def run(outcome: str, *, control: bool = False, gpus: tuple[int, ...] = GPUS) -> Collective:
    return Collective(gpus=gpus, control=control, outcome=outcome)


def said(proof: Proof) -> list[str]:
    """What the checks say of a proof: severity (or "skip") and words."""
    words = []
    for check in proof_checks(proof):
        for item in check.run(healthy(), Purpose()):
            if isinstance(item, Finding):
                assert len(item.summary) <= 90, item.summary
                assert item.fix
                assert item.evidence
                assert item.confidence == "probed"
                words.append(f"{item.severity}: {item.summary}")
            else:
                assert isinstance(item, Skip)
                words.append(f"skip: {item.reason}")
    return words


def test_a_bridge_stays_in_use_where_peers_over_pcie_fail() -> None:
    bridged = changed_pair(healthy(4, "NVIDIA GeForce RTX 3090"), 0, 1, kind="NVLink")
    arrives, _ = proof_checks(Proof(pairs=(PairCopy(a=1, b=2, outcome="wrong"),)))
    (finding,) = arrives.run(bridged, Purpose())
    assert isinstance(finding, Finding)
    assert finding.fix[0] == "export NCCL_P2P_LEVEL=NVL"


def test_the_report_of_a_probe_takes_back_what_was_only_claimed() -> None:
    pairs = tuple(PairCopy(a=a, b=b, outcome="right") for a, b in ((0, 1), (1, 0)))
    proof = Proof(pairs=pairs, collectives=(run("right"),))
    granted = changed_pair(healthy(), 0, 1, read=0, write=0)
    (check,) = with_ids(CHECKS, "patched-p2p-risk", option="--only")
    for found, severity in ((None, "warn"), (proof, "info")):
        report = _report(granted, (check,), Purpose(), None, found)
        assert [each.severity for each in report.diagnosis.findings] == [severity]


@pytest.mark.parametrize(
    ("proof", "expected"),
    [
        pytest.param(Proof(collectives=(run("right"), run("right", control=True))), [], id="all arrives"),
        pytest.param(
            Proof(collectives=(run("hang"), run("right", control=True))),
            ["fail: all-reduce over GPUs 0,1 hangs; without peer access it is right"],
            id="peer access hangs",
        ),
        pytest.param(
            Proof(collectives=(run("wrong"), run("right", control=True))),
            ["fail: all-reduce over GPUs 0,1 gives wrong sums; without peer access it is right"],
            id="peer access gives garbage",
        ),
        pytest.param(
            Proof(collectives=(run("hang"), run("hang", control=True))),
            ["fail: all-reduce over GPUs 0,1 hangs, without peer access too"],
            id="it is not peer access",
        ),
        pytest.param(
            Proof(collectives=(run("hang"), run("unfinished", control=True))),
            ["fail: all-reduce over GPUs 0,1 hangs; the control run was not finished"],
            id="no time for the control run",
        ),
        pytest.param(
            Proof(collectives=(run("unfinished"), run("unfinished", control=True))),
            ["skip: the all-reduce over GPUs 0,1 was not finished in time"],
            id="no time at all is no hang",
        ),
        pytest.param(
            Proof(
                collectives=(
                    run("right"),
                    run("hang", gpus=(0, 1, 2, 3)),
                    run("hang", gpus=tuple(range(8))),
                    run("right", control=True),
                    run("right", control=True, gpus=(0, 1, 2, 3)),
                )
            ),
            ["fail: all-reduce over GPUs 0,1,2,3 hangs; without peer access it is right"],
            id="the smallest group that fails",
        ),
        pytest.param(
            Proof(pairs=(PairCopy(a=0, b=1, outcome="right"), PairCopy(a=1, b=0, outcome="wrong"))),
            ["fail: what GPU1 copies to GPU0 arrives wrong"],
            id="a copy in one direction is wrong",
        ),
        pytest.param(
            Proof(pairs=tuple(PairCopy(a=a, b=1 - a, outcome="wrong") for a in GPUS)),
            ["fail: what GPU0 copies to GPU1 arrives wrong (and 1 more)"],
            id="copies in both directions are wrong",
        ),
        pytest.param(
            Proof(pairs=(PairCopy(a=0, b=1, outcome="hang"),)),
            ["fail: what GPU0 copies to GPU1 never arrives"],
            id="a copy hangs",
        ),
        pytest.param(
            Proof(copies=(CardCopy(gpu=1, gb_s=3.1, pcie_gen=4, pcie_width=8),)),
            ["warn: GPU1 copies at 3.1 GB/s; Gen4 x8 carries 12.6"],
            id="a copy far slower than its link",
        ),
        pytest.param(
            Proof(copies=(CardCopy(gpu=1, gb_s=13.1, pcie_gen=4, pcie_width=8),)), [], id="a copy as fast as its link"
        ),
        pytest.param(
            Proof(copies=(CardCopy(gpu=0, gb_s=3.1),)),
            ["skip: GPU0 copies at 3.1 GB/s, but its link could not be read meanwhile"],
            id="a copy over an unknown link",
        ),
        pytest.param(Proof(problem="it is raining"), ["skip: not proved: it is raining"] * 2, id="it could not be"),
    ],
)
def test_what_was_measured_becomes_findings(proof: Proof, expected: list[str]) -> None:
    assert said(proof) == expected


def test_without_a_probe_nothing_is_said() -> None:
    assert [list(check.run(healthy(), Purpose())) for check in proof_checks(None)] == [[], []]


def test_links_under_load_are_judged_as_those_of_a_busy_card() -> None:
    proof = Proof(copies=(CardCopy(gpu=1, gb_s=3.1, pcie_gen=2, pcie_width=8), CardCopy(gpu=0, gb_s=13.0)))
    idle = healthy()
    loaded = with_links_under_load(idle, proof)
    assert loaded.cards[0] == idle.cards[0]  # its link was not read
    last = loaded.cards[1].readings[-1]
    assert (last.pcie_gen, last.pcie_width, last.utilisation_percent) == (2, 8, 100)
    assert last.at_s > max(reading.at_s for reading in idle.cards[1].readings)


def used(inspection: Inspection, size: int | None) -> Inspection:
    return changed_gpu(inspection, 1, used_by=(GpuProcess(pid=4711, name="engine", bytes=size),))


@pytest.mark.parametrize(
    ("inspection", "why"),
    [
        pytest.param(healthy(), None, id="idle"),
        pytest.param(used(healthy(), 300 * 2**20), None, id="a desktop"),
        pytest.param(used(healthy(), 8 * 2**30), "GPU1 is in use by engine (pid 4711)", id="an engine"),
        pytest.param(
            changed_card(healthy(), 0, readings={"utilisation_percent": 60}), "GPU0 is busy (60 %)", id="at work"
        ),
        pytest.param(changed_gpu(healthy(), 1, utilisation_percent=99), "GPU1 is busy (99 %)", id="at work by itself"),
        pytest.param(
            changed_gpu(changed_card(healthy(), 1, readings=()), 1, utilisation_percent=None),
            "whether GPU1 is busy could not be read",
            id="nothing tells whether it works",
        ),
        pytest.param(
            changed_gpu(healthy(), 1, free_bytes=10 * 2**30), "GPU1 is in use: ", id="memory of a process not seen"
        ),
    ],
)
def test_busy_cards_are_left_alone(inspection: Inspection, why: str | None) -> None:
    found = busy(inspection, inspection.machine.gpus)
    assert (found or "").startswith(why or "")
    assert (found is None) == (why is None)
    if why:
        assert (probe(inspection).problem or "").startswith(why)


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_a_program_that_cannot_be_killed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    deaf: list[int] = []
    kill = os.killpg
    monkeypatch.setattr(os, "killpg", lambda group, _: deaf.append(group))  # as one within a driver that hangs
    begun = time.monotonic()
    try:
        proof = prove(python, healthy().machine.gpus, limit_s=0.2)
        assert time.monotonic() - begun < 30
        assert "not finished" in (proof.problem or "")
    finally:
        kill(deaf[0], signal.SIGKILL)
        os.waitpid(deaf[0], 0)


def test_without_cards_or_an_engine_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no NVIDIA or AMD card" in (probe(bare()).problem or "")
    assert "mgpu backends install vllm" in (probe(healthy()).problem or "")


def test_lost_and_integrated_cards_are_not_probed() -> None:
    assert [gpu.index for gpu in probed_cards(changed_gpu(healthy(), 0, problem="fell off the bus"))] == [1]
    assert probed_cards(changed_gpu(healthy(1), 0, vendor="intel")) == ()


def test_the_engines_python_is_found_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program, elsewhere = tmp_path / "env" / "bin" / "vllm", tmp_path / "vllm"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    elsewhere.symlink_to(program)
    (program.parent / "python").symlink_to(sys.executable)
    monkeypatch.setenv("MGPU_VLLM", str(elsewhere))
    assert torch_python() is None
    (tmp_path / "env" / "lib" / "python3.11" / "site-packages" / "torch").mkdir(parents=True)
    (tmp_path / "env" / "lib" / "python3.11" / "site-packages" / "torch" / "__init__.py").touch()
    assert torch_python() == program.parent / "python"


def cards(count: int) -> tuple[Gpu, ...]:
    return tuple(Gpu(index=index + 3, vendor="other", name="a process") for index in range(count))


_MARK = "MGPU_TEST_PROBE"


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """What only the processes of this test have in their environment: others may probe at the same time."""
    monkeypatch.setenv(_MARK, str(tmp_path))
    return f"{_MARK}={tmp_path}"


def left(mark: str) -> list[str]:
    """The command lines of living processes with a mark in the environment that they were started with."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().decode("utf-8", "replace"))
        except OSError:
            continue
    return found


def test_a_process_with_the_mark_is_seen(mark: str) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        deadline = time.monotonic() + 30
        while (seen := left(mark)) != ["sleep\x0060\x00"] and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    assert seen == ["sleep\x0060\x00"]
    assert left(mark) == []


def stand_in(tmp_path: Path, body: str) -> Path:
    """A Python that runs `body` instead of the probe's program."""
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\nimport os, sys, time, subprocess\n{body}\n")
    path.chmod(0o755)
    return path


MARKED = "def say(text): os.write(1, b'noise\\nmgpu-probe ' + text.encode() + b'\\n')\n"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        pytest.param("sys.exit('ImportError: libcudart.so.13')", "ended early: ImportError: libcudart", id="it ends"),
        pytest.param("print('mgpu-probe {not json'); print('\\x1b[2J', file=sys.stderr)", "ended early", id="it raves"),
        pytest.param(
            MARKED + 'say(\'{"event": "problem", "text": "PyTorch sees no card"}\')',
            "PyTorch sees no card",
            id="it has a problem",
        ),
        pytest.param(
            "subprocess.Popen(['sleep', '987.6']); time.sleep(600)", "was not finished within 1 s", id="it hangs"
        ),
    ],
)
def test_a_program_that_does_not_do_its_work_is_told_of(tmp_path: Path, mark: str, body: str, problem: str) -> None:
    begun = time.monotonic()
    proof = prove(stand_in(tmp_path, body), cards(2), limit_s=1 if "hang" in problem or "600" in body else 20)
    assert problem in (proof.problem or "")
    assert (proof.problem or "").isprintable()
    assert time.monotonic() - begun < 15
    assert left(mark) == []


def test_a_python_that_cannot_run_is_told_of(tmp_path: Path) -> None:
    assert "cannot be run" in (prove(tmp_path / "absent", cards(2)).problem or "")


def test_links_are_read_while_the_card_copies(tmp_path: Path) -> None:
    events = [
        '{"event": "loaded", "torch": "2.9"}',
        '{"event": "copying", "card": 1}',
        '{"event": "copied", "card": 1, "gb_s": 12.34567}',
        '{"event": "pairing", "a": 0, "b": 1}',
        '{"event": "pair", "a": 0, "b": 1, "right": true, "gb_s": 1.0}',
        '{"event": "pairing", "a": 1, "b": 0}',
        '{"event": "hang", "stage": "copies"}',
        '{"event": "done"}',
    ]
    links = iter([(1, 8), (1, 8), (4, 8)])
    body = MARKED + "".join(f"say({event!r})\n" for event in events)
    proof = prove(stand_in(tmp_path, body), cards(2), link=lambda _: next(links, (4, 8)))
    assert replace(proof, seconds=0.0) == Proof(
        copies=(CardCopy(gpu=4, gb_s=12.35, pcie_gen=4, pcie_width=8),),
        pairs=(PairCopy(a=3, b=4, outcome="right", gb_s=1.0), PairCopy(a=4, b=3, outcome="hang")),
        torch="2.9",
    )


@pytest.fixture(scope="session")
def real_python() -> Path:
    """The Python of an environment with PyTorch, which tests of vLLM keep."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for python in sorted(home.glob("mgpu/test-vllm-*/bin/python")):
        if subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode == 0:
            return python
    pytest.skip("no environment with PyTorch is here")


@pytest.mark.real_vllm
@pytest.mark.parametrize("count", [2, 3])
def test_processes_prove_an_all_reduce_for_real(real_python: Path, mark: str, count: int) -> None:
    proof = prove(real_python, cards(count), device="cpu")
    assert (proof.problem, proof.copies, proof.pairs) == (None, (), ())
    sizes = [2] if count == 2 else [2, 3]
    assert [(len(each.gpus), each.control) for each in proof.collectives] == [
        (size, control) for control in (False, True) for size in sizes
    ]
    assert {each.outcome for each in proof.collectives} == {"right"}
    assert all((each.gb_s or 0) > 0 for each in proof.collectives)
    assert proof.seconds < 20
    assert proof.torch
    assert left(mark) == []


@pytest.mark.real_vllm
def test_a_pytorch_that_sees_no_card_is_told_of(real_python: Path) -> None:
    assert "does not see the 2 cards" in (prove(real_python, cards(2)).problem or "")


@pytest.mark.real_vllm
@pytest.mark.parametrize(
    ("sabotage", "outcome"),
    [
        pytest.param("lambda *a, **k: None", "wrong", id="nothing arrives"),
        pytest.param("lambda *a, **k: __import__('time').sleep(600)", "hang", id="it never ends"),
        pytest.param("lambda *a, **k: 1 / 0", "error", id="it fails"),
    ],
)
def test_a_broken_all_reduce_is_found_out(
    real_python: Path, mark: str, tmp_path: Path, sabotage: str, outcome: str
) -> None:
    """The real program with an all-reduce that is broken unless peer access is off."""
    python = tmp_path / "python"
    code = (
        "import os, runpy, sys, torch.distributed as d; whole = d.all_reduce; broken = " + sabotage + "; "
        "d.all_reduce = lambda *a, **k: (whole if os.environ.get('NCCL_P2P_DISABLE') else broken)(*a, **k); "
        "sys.argv = sys.argv[4:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    python.write_text(f'#!/bin/sh\nexec {real_python} -c "{code}" "$@"\n')
    python.chmod(0o755)
    proof = prove(python, cards(2), device="cpu", limit_s=16)
    assert [(each.outcome, each.control) for each in proof.collectives] == [(outcome, False), ("right", True)]
    (finding,) = said(proof)
    assert finding.startswith("fail: ")
    assert finding.endswith("without peer access it is right")
    assert left(mark) == []
