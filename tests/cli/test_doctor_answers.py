"""What a new user of `mgpu doctor` asks, and what it answers: purposes, sets of cards, files, wrong words."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from mgpu.cli.doctor import doctor
from mgpu.cli.views.doctor_joined import joined
from mgpu.doctor.check import Evidence, Finding, Severity
from mgpu.doctor.saved import save
from mgpu.machine.inspection import Inspection, InstalledEngine
from tests.doctor.inspections import H100, bare, changed, changed_card, changed_pair, changed_pci, healthy

from .program import LIMIT_S, Mgpu

SAVED = Path(__file__).parents[1] / "machines" / "saved"
VLLM = (InstalledEngine(backend="vllm", path="/usr/bin/vllm", architectures_known=True, architectures=("sm_89",)),)

Answers = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def answers(mgpu: Mgpu, tmp_path: Path) -> Answers:
    """The exit code, data and screen of a diagnosis of a machine, or of one of the saved ones."""

    def ask(machine: Inspection | str, words: str = "") -> tuple[int, dict[str, Any], str]:
        path = SAVED / f"{machine}.json" if isinstance(machine, str) else tmp_path / "machine.json"
        if isinstance(machine, Inspection):
            save(machine, path)
        entry = mgpu("doctor", "--replay", path, *words.split(), "--json").json
        ended = mgpu("doctor", "--replay", path, *words.split())
        assert ended.exit_code == entry["exit_code"]
        return ended.exit_code, entry["data"], ended.out

    return ask


def severity(data: dict[str, Any], check: str) -> list[str]:
    return [finding["severity"] for finding in data["findings"] if finding["id"] == check]


@pytest.mark.parametrize(
    ("machine", "words", "check", "said", "exit_code"),
    [
        pytest.param("2xb580", "--expect-gpus 2", "gpu-missing", [], 0, id="cards that only the bus shows are here"),
        pytest.param("2xb580", "--expect-gpus 3", "gpu-missing", ["warn"], 0, id="one of three is missing"),
        pytest.param("no-card", "--expect-gpus 2", "gpu-missing", ["fail"], 1, id="none of two is here"),
        pytest.param("no-driver", "--expect-gpus 1", "gpu-missing", ["fail"], 1, id="a card without a driver"),
        pytest.param("2x4090-x670e", "--tensor-parallel 2", "tp-size", [], 0, id="a cut over both cards"),
        pytest.param("2x4090-x670e", "--tensor-parallel 3", "tp-size", ["fail"], 1, id="a cut over three of two cards"),
        pytest.param("no-card", "--tensor-parallel 2", "tp-size", ["fail"], 1, id="a cut over no card"),
        pytest.param("2xb580", "--tensor-parallel 2", "tp-size", [], 0, id="a cut over cards that only the bus shows"),
        pytest.param("2x3090-riser-x1", "", "pcie-x1-riser", ["warn"], 0, id="one lane, for nobody"),
        pytest.param("2x3090-riser-x1", "--for vllm", "pcie-x1-riser", ["fail"], 1, id="one lane for vLLM"),
        pytest.param("2x4090-chipset", "--for vllm", "pcie-chipset", ["warn"], 1, id="chipset lanes for vLLM"),
        pytest.param("2x4090-wsl", "--for vllm", "wsl2", ["warn"], 1, id="WSL2 for vLLM"),
        pytest.param("6000ada-4090", "--for vllm", "mixed-gpus", ["warn"], 1, id="unequal cards for vLLM"),
        pytest.param("2x4090-wsl", "--for vllm --tensor-parallel 1", "wsl2", ["info"], 1, id="one card for vLLM"),
    ],
)
def test_the_purpose_decides_what_is_a_fault(
    answers: Answers, machine: str, words: str, check: str, said: list[str], exit_code: int
) -> None:
    code, data, _ = answers(machine, words)
    assert (severity(data, check), code) == (said, exit_code)


@pytest.mark.parametrize(
    ("machine", "words", "line"),
    [
        pytest.param("2x4090-x670e", "--for vllm", "judged for vLLM, tensor parallel 2", id="vLLM takes all cards"),
        pytest.param("2x4090-x670e", "--for vllm --gpus gpu0", "judged for vLLM", id="one card is not cut over"),
        pytest.param("2x4090-x670e", "--for vllm --tensor-parallel 1", "judged for vLLM, tensor parallel 1", id="said"),
        pytest.param("2x4090-x670e", "--for ollama", "judged for Ollama", id="Ollama"),
        pytest.param("2x4090-x670e", "", None, id="nobody said"),
    ],
)
def test_for_what_the_machine_is_judged_is_said(answers: Answers, machine: str, words: str, line: str | None) -> None:
    _, data, out = answers(machine, words)
    assert next((each for each in out.splitlines() if each.startswith("judged")), None) == line
    assert (data["purpose"]["tensor_parallel"] or 0) == int(line.split()[-1] if line and line[-1].isdigit() else 0)


def test_a_peer_grant_is_judged_by_the_same_purpose(answers: Answers) -> None:
    machine = changed_pair(healthy(2, lanes=8, engines=VLLM), 0, 1, read=0, write=0)
    translated = changed_pci(machine, "0000:10:00.0", "0000:20:00.0", iommu_type="DMA-FQ")
    assert severity(answers(translated, "--for vllm")[1], "p2p-grant-unsafe") == ["fail"]
    assert severity(answers(translated, "--for vllm --tensor-parallel 1")[1], "p2p-grant-unsafe") == ["warn"]


@pytest.mark.parametrize(
    ("machine", "words", "sets", "ends"),
    [
        pytest.param("2x3090-riser-x1", "", [[0, 1]], "(same host bridge).", id="a warning keeps a card in"),
        pytest.param("2x3090-riser-x1", "--tensor-parallel 2", [], None, id="a riser that is too slow"),
        pytest.param("2xpro6000-p2p-hang", "", [], None, id="a pair that hangs"),
        pytest.param(changed_card(healthy(), 1, compute_mode=2), "", [], None, id="a card that is closed"),
        pytest.param(
            changed_card(healthy(3), 1, compute_mode=2), "", [[0, 2]], "; without GPU1, which fails.", id="one of three"
        ),
        pytest.param(
            changed(healthy(2, H100), engines=VLLM), "", [[0, 1]], "GPU0,1 (NVLink).", id="cards behind a switch"
        ),
    ],
)
def test_the_best_sets_are_of_cards_that_can_be_used(
    answers: Answers, machine: Inspection | str, words: str, sets: list[list[int]], ends: str | None
) -> None:
    _, data, out = answers(machine, words)
    assert [group["gpus"] for group in data["groups"]] == sets
    line = re.search(r"(?m)^Best sets: (.*)$", out)
    assert (line is None) == (ends is None)
    assert line is None or line[1].endswith(ends or "")


def test_a_profile_says_where_it_would_run(answers: Answers) -> None:
    assert "llama-70b fits with llama.cpp on the processor, without a card" in answers("2xb580", "llama-70b")[2]
    assert "llama-8b fits with llama.cpp on GPU" in answers("2x4090-x670e", "llama-8b --for llama.cpp")[2]


@pytest.mark.parametrize(
    ("words", "told"), [pytest.param("", True, id="short"), pytest.param("-v", False, id="verbose")]
)
def test_notes_hide_their_fixes_and_say_so(answers: Answers, words: str, told: bool) -> None:
    out = answers("2x4090-x670e", words)[2]
    assert ("-v shows them" in out) == told
    assert ("systemctl enable --now nvidia-persistenced" in out) == (not told)


def test_what_is_skipped_says_why_in_few_lines(answers: Answers) -> None:
    out = answers("2x4090-x670e")[2]
    lines = re.findall(r"(?m)^\[-\].*$", out)
    assert len(lines) == 2, lines
    assert re.search(r"recovery-action, display-on-gpu: driver and kernel do not tell", lines[0])
    assert re.search(r"arch-unsupported: no CUDA code is found in llama\.cpp", lines[1])


def _about(gpu: int, words: str, *steps: str, severity: Severity = Severity.warn) -> Finding:
    evidence = (Evidence(path=f"GPU{gpu}", value="1"),)
    return Finding(id="x", severity=severity, summary=words, evidence=evidence, fix=steps, gpus=(gpu,))


@pytest.mark.parametrize(
    ("findings", "summaries"),
    [
        pytest.param(
            [_about(0, "GPU0 can do PCIe gen 5, its slot gen 4"), _about(1, "GPU1 can do PCIe gen 5, its slot gen 4")],
            ["GPU0,1 can do PCIe gen 5, their slot gen 4"],
            id="the same of two cards",
        ),
        pytest.param(
            [_about(index, f"GPU{index} takes only one program at a time") for index in (0, 1, 10)],
            ["GPU0,1,10 take only one program at a time"],
            id="a verb in the plural",
        ),
        pytest.param(
            [_about(0, "GPU0 is at 91 °C"), _about(1, "GPU1 is at 90 °C")],
            ["GPU0 is at 91 °C", "GPU1 is at 90 °C"],
            id="words that differ",
        ),
        pytest.param(
            [_about(0, "GPU0 is hot"), _about(1, "GPU1 is hot", severity=Severity.fail)],
            ["GPU0 is hot", "GPU1 is hot"],
            id="severities that differ",
        ),
        pytest.param(
            [_about(0, "a card is hot"), _about(1, "a card is hot")], ["a card is hot"] * 2, id="words without a card"
        ),
        pytest.param([_about(1, "GPU1 does not answer")], ["GPU1 does not answer"], id="one alone"),
    ],
)
def test_the_same_of_several_cards_is_said_once(findings: list[Finding], summaries: list[str]) -> None:
    assert [finding.summary for finding in joined(findings)] == summaries


def test_what_is_said_once_has_the_evidence_and_the_steps_of_all() -> None:
    steps = [
        ("reset 0", "export CUDA_VISIBLE_DEVICES=1", "reboot"),
        ("reset 1", "export CUDA_VISIBLE_DEVICES=0", "reboot"),
    ]
    (one,) = joined([_about(gpu, f"GPU{gpu} is slow", *steps[gpu]) for gpu in (0, 1)])
    assert [each.path for each in one.evidence] == ["GPU0", "GPU1"]
    assert one.fix == ("reset 0", "reboot", "reset 1")
    assert one.gpus == (0, 1)


def test_cards_are_one_block_on_the_screen_and_apart_in_json(answers: Answers) -> None:
    machine = changed_card(changed_card(healthy(), 0, compute_mode=3), 1, compute_mode=3)
    _, data, out = answers(machine)
    assert severity(data, "compute-mode") == ["warn", "warn"]
    assert out.count("compute-mode: GPU0,1 take only one program") == 1


def test_a_replay_shows_no_time_and_a_long_header_keeps_its_own(mgpu: Mgpu, answers: Answers) -> None:
    assert not re.search(r"\d s\b", answers("no-card")[2].splitlines()[0])
    assert re.search(r" \d+\.\d s$", mgpu("doctor").out.splitlines()[0])
    narrow = mgpu("doctor", COLUMNS="40").out.split("\n[")[0]
    assert re.search(r"· \d+\.\d s$", narrow), narrow


def test_fixes_of_a_saved_machine_are_only_printed(mgpu: Mgpu, answers: Answers) -> None:
    code, data, out = answers("2x4090-x670e", "--fix --dry-run")
    assert code == 0
    assert {fix["result"] for fix in data["fixes"]} == {"not run"}
    assert "nvidia-smi -i 0000:01:00.0 -pm 1" in out
    assert re.search(r"(?m)^\[i\] Fixes +nothing to fix", answers(bare(), "--fix --dry-run")[2])
    assert "Fixes" not in answers(bare())[2]


def test_an_inspection_goes_through_a_pipe(mgpu: Mgpu) -> None:
    first = mgpu("doctor", "--save", "-")
    assert json.loads(first.out)["schema"] == "mgpu.inspection/1"
    mgpu.assert_nothing_left()
    assert not (mgpu.here / "-").exists()

    def piped(text: bytes) -> subprocess.CompletedProcess[bytes]:
        command = mgpu.command("doctor", "--replay", "-", "--json")
        return subprocess.run(
            command, input=text, capture_output=True, env=mgpu.with_variables(), cwd=mgpu.here, check=False
        )

    again = piped(first.out.encode())
    assert json.loads(again.stdout)["data"]["replayed"] is True
    assert again.returncode == first.exit_code
    assert json.loads(piped(b"").stdout)["errors"][0]["code"] == "replay-unusable"
    assert mgpu("doctor", "--save", "-", "--json").json["errors"][0]["code"] == "usage"


def test_a_terminal_is_no_saved_machine(mgpu: Mgpu) -> None:
    ours, theirs = pty.openpty()
    ended = subprocess.run(
        mgpu.command("doctor", "--replay", "-"),
        stdin=theirs,
        capture_output=True,
        text=True,
        env=mgpu.with_variables(),
        cwd=mgpu.here,
        timeout=LIMIT_S,
        check=False,
    )
    os.close(ours)
    os.close(theirs)
    assert ended.returncode == 3
    assert "what is piped in" in ended.stderr


@pytest.mark.parametrize("option", ["--list", "--explain tp-size"])
@pytest.mark.parametrize("other", ["--only tp-size", "--for vllm", "--fix", "--psu 800", "nosuch", "-v", "--probe"])
def test_what_judges_nothing_stands_alone(mgpu: Mgpu, option: str, other: str) -> None:
    ended = mgpu("doctor", *option.split(), *other.split())
    assert ended.exit_code == 2
    assert option.split()[0] in ended.err


def test_a_list_and_an_explanation_are_two_things(mgpu: Mgpu) -> None:
    assert mgpu("doctor", "--list", "--explain", "tp-size").exit_code == 2
    assert mgpu("doctor", "--list", "--json").exit_code == 0


def test_checks_are_named_in_any_case(mgpu: Mgpu) -> None:
    assert mgpu("doctor", "--explain", "P2P-None").out == mgpu("doctor", "--explain", "p2p-none").out


@pytest.mark.parametrize("words", ["--explain", "--replay", "--for tgi", "--nonsense"])
def test_wrong_words_lead_to_the_help_of_the_command(mgpu: Mgpu, words: str) -> None:
    ended = mgpu("doctor", *words.split())
    assert ended.exit_code == 2
    assert "mgpu doctor --help" in ended.err
    assert "mgpu --help" in mgpu("--nonsense").err
    assert "mgpu mgpu" not in mgpu("--nonsense").err


def test_files_are_judged_by_the_reader_and_not_by_the_parser() -> None:
    # A parser that asks for permissions ends with a usage error; what cannot be read is something missing.
    hints = get_type_hints(doctor, include_extras=True)
    options = [hints[name].__metadata__[0] for name in ("save", "replay")]
    assert not any(option.readable or option.writable for option in options)
