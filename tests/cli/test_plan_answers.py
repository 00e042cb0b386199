"""What `mgpu plan` answers where it is not simply yes: errors for scripts, conditions, ways out, and interrupts."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .contract import PLAN, checked
from .program import Mgpu


@pytest.fixture
def quiet(mgpu: Mgpu, tmp_path: Path) -> Mgpu:
    """mgpu that asks no hub and finds no model on disk."""
    mgpu.environment |= {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    return mgpu


def screen(mgpu: Mgpu, words: str, columns: int = 100) -> str:
    return mgpu("plan", *shlex.split(words), COLUMNS=str(columns)).out


@pytest.mark.parametrize(
    ("words", "code", "message", "hint"),
    [
        pytest.param(
            "llama-70b --machine 2x4090 --quant Q8_0",
            "does-not-fit",
            "short on gpu0 by 13.6 GiB, gpu1 by 13.0 GiB (0.25 GiB headroom on each included)",
            "add --quant Q4_K_M",
            id="a model",
        ),
        pytest.param(
            "llama-70b --machine 3x4090 --tensor-parallel 3",
            "illegal",
            "64 attention heads ÷ 3 cards",
            "--tensor-parallel",
            id="a shape",
        ),
        pytest.param(
            "llama-70b llama-70b --machine 2x4090",
            "does-not-fit",
            "llama-70b-2 finds no room",
            "mgpu run llama-70b --offload allow",
            id="several models",
        ),
    ],
)
def test_no_has_a_code_and_a_way_out_for_scripts_and_people_read_it_once(
    quiet: Mgpu, words: str, code: str, message: str, hint: str
) -> None:
    ended = quiet("plan", *words.split(), "--json")
    (error,) = ended.json["errors"]
    assert (ended.exit_code, ended.json["ok"], error["code"]) == (1, False, code)
    assert message in error["message"]
    assert hint in error["hint"]
    told = quiet("plan", *words.split())
    assert (told.exit_code, told.err) == (1, "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param("llama-70b --machine none", "FITS if the host has 42.3 GiB of RAM", id="host memory is unknown"),
        pytest.param(
            "llama-70b --machine 1x4090 --offload allow --backend llama.cpp",
            "FITS WITH OFFLOAD if the host has ",
            id="the same with offload",
        ),
        pytest.param(
            "llama-70b --machine 2x4090 --backend vllm --parallel 8",
            "FITS, 1 of 8 users at a time",
            id="users that wait",
        ),
        pytest.param(
            "llama-70b --machine 2x4090 --backend llama.cpp --parallel 8",
            "of 8192 tokens each",
            id="a context that was lowered",
        ),
    ],
)
def test_a_yes_says_what_it_depends_on(quiet: Mgpu, words: str, expected: str) -> None:
    first, second, *_ = screen(quiet, words).splitlines()
    assert expected in f"{first} {second}"


@pytest.mark.parametrize(
    ("words", "row", "expected"),
    [
        pytest.param(
            "llama-70b --machine 4090+3060", "--quant Q3_K_M", r"fits with \d+ of 8192 tokens", id="less context"
        ),
        pytest.param(
            "llama-405b --machine 2x5090", "--offload allow", r"in \d+\.\d GiB of RAM \(not checked\)", id="host memory"
        ),
        pytest.param(
            "llama-70b --machine 2x4090 --ctx 32k --backend llama.cpp",
            "--ctx 18944",
            "tensor split$",
            id="another split",
        ),
    ],
)
def test_a_way_out_says_what_it_costs(quiet: Mgpu, words: str, row: str, expected: str) -> None:
    (line,) = [line.rstrip() for line in screen(quiet, words, 160).splitlines() if line.startswith(f"{row} ")]
    assert re.search(expected, line), line


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        pytest.param("llama-8b --machine 2xB580", "vLLM cannot use", id="cards"),
        pytest.param("llama-8b --machine 2x4090 --tensor-split 1,1", "vLLM knows no --tensor-split", id="an option"),
    ],
)
def test_an_engine_without_a_way_is_left_out_with_its_reason(quiet: Mgpu, words: str, reason: str) -> None:
    assert reason in " ".join(screen(quiet, words).split())
    data = checked(quiet("plan", *words.split(), "--json").json, "plan", PLAN)
    assert reason in data["left_out"][0]["reason"]
    assert data["left_out"][0]["backend"] not in {candidate["backend"] for candidate in data["candidates"]}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param("--ctx 32k", "up to 17664 tokens with this layer split, 18944 with a tensor split", id="splits"),
        pytest.param("--ctx 1M", "--ctx 131072 --offload allow", id="more context than the model was trained for"),
        pytest.param("--tensor-split 1,1", "with --split-mode tensor it cuts each layer so", id="proportions"),
        pytest.param("--backend vllm --parallel 8 --ctx 2k", "shared by those who run at once", id="users of vLLM"),
        pytest.param("--headroom 2GiB --ctx 18944", "(2.00 GiB headroom on each included)", id="headroom decides"),
    ],
)
def test_what_decides_is_said(quiet: Mgpu, words: str, expected: str) -> None:
    engine = "" if "vllm" in words else " --backend llama.cpp"
    assert expected in " ".join(screen(quiet, f"llama-70b --machine 2x4090{engine} {words}").split())


WIDTHS = [pytest.param(width, id=f"{width} columns") for width in (40, 60, 80, 100, 140)]


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize(
    "words",
    [
        pytest.param("llama-70b --machine 2x4090", id="what fits"),
        pytest.param("llama-70b --machine 2x4090 --quant Q8_0", id="what does not"),
        pytest.param("llama-70b --machine 2x4090 --parallel 8", id="several users"),
    ],
)
def test_a_narrow_terminal_loses_no_reason_and_no_command(quiet: Mgpu, words: str, columns: int) -> None:
    out = screen(quiet, words, columns)
    assert [line for line in out.splitlines() if len(line) > columns or line.endswith(" ")] == []
    together = " ".join(out.split())
    data = checked(quiet("plan", *words.split(), "--json").json, "plan", PLAN)
    chosen, *others = data["candidates"]
    for candidate in others:
        if candidate["verdict"] == "does-not-fit":
            assert f"{candidate['short_bytes'] / 2**30:.3g} GiB short" in together
        elif candidate["backend"] != chosen["backend"]:
            assert f"--backend {candidate['backend']}" in together
    assert "tokens/s" in together


@pytest.mark.parametrize(
    "module",
    [
        pytest.param("mgpu.errors", id="early"),
        pytest.param("mgpu.cli.options", id="in the middle"),
        pytest.param("mgpu.cli.run", id="late"),
    ],
)
def test_an_interrupt_while_mgpu_is_imported_is_silent(module: str) -> None:
    words = [sys.executable, "-X", "importtime", "-m", "mgpu", "plan", "llama-70b", "--machine", "2x4090"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr
        assert any(line.split("|")[-1].strip() == module for line in process.stderr)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert (process.wait(), [line for line in rest.splitlines() if "|" not in line]) == (130, [])
