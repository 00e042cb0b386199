"""What is said of a wrong option: only what is near is offered."""

from __future__ import annotations

import pytest

from .program import Mgpu


@pytest.mark.parametrize(
    ("words", "told"),
    [
        pytest.param("plan llama-8b --frobnicate", "No such option: --frobnicate", id="like none"),
        pytest.param("plan llama-8b --jsn", "No such option: --jsn; did you mean --json?", id="a letter left out"),
        pytest.param("plan llama-8b --kv", "No such option: --kv; did you mean --kv-type?", id="the beginning of one"),
        pytest.param("plan llama-8b --no-offload", "No such option: --no-offload; did you mean --offload?", id="no-"),
        pytest.param("plan llama-8b -Z", "No such option: -Z", id="a letter"),
        pytest.param("doctor --strickt", "No such option: --strickt; did you mean --strict?", id="of another command"),
        pytest.param(
            "export llama-8b",
            "Missing option '--as': one of shell, systemd, compose, quadlet, llama-swap",
            id="what has to be chosen",
        ),
        pytest.param("run llama-8b --max-tokens 5", "--max-tokens is for the answer to --ask", id="of no question"),
        pytest.param("run llama-8b --port x", "Invalid value for '--port': it wants a whole number", id="a number"),
    ],
)
def test_a_wrong_option_is_told_with_what_is_near(mgpu: Mgpu, words: str, told: str) -> None:
    ended = mgpu(*words.split(), "--json")
    assert ended.exit_code == 2
    assert [error["message"] for error in ended.json["errors"]] == [told]
