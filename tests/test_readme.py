"""What the README shows is what the commands print."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
CONSOLE = re.findall(r"```console\n\$ (mgpu (?:plan|doctor) [^\n]+)\n(.+?)```", README, re.DOTALL)


@pytest.mark.parametrize(("command", "shown"), [pytest.param(*block, id=block[0]) for block in CONSOLE])
def test_a_command_prints_what_the_readme_shows(command: str, shown: str) -> None:
    printed = subprocess.run(
        [sys.executable, "-m", *command.split()],
        env={**os.environ, "COLUMNS": "100"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    assert [line.rstrip() for line in printed.splitlines()] == shown.splitlines()


def test_the_readme_shows_plans_that_fit_and_that_do_not_and_a_diagnosis() -> None:
    verdicts = [shown.split("   ")[0] for command, shown in CONSOLE if "plan" in command]
    assert verdicts == ["FITS", "DOES NOT FIT", "llama-70b with 8192 tokens runs on both machines", "FITS"]
    assert [shown.rstrip().splitlines()[-1][:6] for command, shown in CONSOLE if "doctor" in command] == ["1 fail"]


@pytest.mark.parametrize("option", sorted(set(re.findall(r"`(--[a-z-]+)", README)) - {"--help"}))
def test_every_option_of_the_readme_exists(option: str) -> None:
    assert any(option in help_of(command) for command in ("run", "plan", "doctor", "ps", "logs", "stop", "export"))


@functools.cache
def help_of(command: str) -> str:
    words = [sys.executable, "-m", "mgpu", command, "--help"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"make ([a-z]+)", README)) - {"it"}
    defined = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert targets <= defined
