"""Keys come from files and the environment; one in the command line is refused, since everybody could read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgpu.cli.access import KEY_VARIABLES, api_key, unused_key
from mgpu.errors import UsageError

from .program import Mgpu
from .test_bad_input import assert_explained

SECRET = "a-key-that-nobody-else-may-see"


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEY_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("content", "environment", "key"),
    [
        pytest.param(None, {}, None, id="none"),
        pytest.param(b"secret", {}, "secret", id="a file"),
        pytest.param(b"secret\n", {}, "secret", id="a file with a line end"),
        pytest.param(b"secret\r\n", {}, "secret", id="a file of Windows"),
        pytest.param("schlüssel".encode(), {}, "schlüssel", id="not ASCII"),
        pytest.param(None, {"VLLM_API_KEY": "v", "LLAMA_API_KEY": "l"}, "l", id="an engine's variable"),
        pytest.param(None, {"VLLM_API_KEY": "v", "MGPU_API_KEY": "m"}, "m", id="mgpu's variable"),
        pytest.param(b"secret", {"MGPU_API_KEY": "m"}, "secret", id="a file before the environment"),
    ],
)
def test_where_a_key_comes_from(
    content: bytes | None, environment: dict[str, str], key: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
    assert api_key(file if content is not None else None) == key


@pytest.mark.parametrize(
    ("content", "environment", "told"),
    [
        pytest.param(b"secret", {"MGPU_API_KEY": "m"}, "MGPU_API_KEY has another one", id="another one"),
        pytest.param(b"secret", {"VLLM_API_KEY": "m"}, "VLLM_API_KEY has another one", id="an engine's"),
        pytest.param(b"secret", {"MGPU_API_KEY": "secret"}, None, id="the same"),
        pytest.param(b"secret", {}, None, id="the file alone"),
        pytest.param(None, {"MGPU_API_KEY": "m"}, None, id="the environment alone"),
    ],
)
def test_which_of_two_keys_counts_is_told(
    content: bytes | None,
    environment: dict[str, str],
    told: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "key" if content is not None else None
    if file and content is not None:
        file.write_bytes(content)
    found = unused_key(file, api_key(file))
    assert (told or "None") in str(found)
    assert "secret" not in str(found)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b" \n", "is empty", id="blank"),
        pytest.param(b"one\ntwo\n", "more than one line", id="two lines"),
        pytest.param(b"x" * 100_000, "more than one line", id="too long"),
        pytest.param(b"\xff\xfe", "is no text", id="no text"),
        pytest.param(None, "cannot be read: No such file", id="not there"),
    ],
)
def test_a_file_without_a_key_is_a_slip(content: bytes | None, why: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=why) as refused:
        api_key(file)
    assert not any(part and part in refused.value.message for part in ("one\n", "xxx"))


def test_a_folder_is_no_file_with_a_key(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        api_key(tmp_path)


@pytest.mark.parametrize("variable", KEY_VARIABLES)
def test_an_empty_variable_is_a_slip(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, " ")
    with pytest.raises(UsageError, match=f"{variable} is empty"):
        api_key()


@pytest.mark.parametrize("words", [["--api-key", SECRET], [f"--api-key={SECRET}"], ["--api-key", ""]])
def test_a_key_in_the_command_line_is_refused_and_not_repeated(mgpu: Mgpu, tiny: Path, words: list[str]) -> None:
    ended = mgpu("run", tiny, *words)
    assert_explained(ended, 2, "--api-key would show the key", "--api-key-file FILE, or export MGPU_API_KEY")
    assert SECRET not in ended.out + ended.err
    assert SECRET not in mgpu("run", tiny, *words, "--json").out
    assert "--api-key " not in mgpu("run", "--help").out


def test_a_key_of_a_file_reaches_the_engine_alone(mgpu: Mgpu, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{SECRET}\n")
    shown = mgpu("run", tiny, "--dry-run", "--api-key-file", file)
    assert shown.out.startswith('LLAMA_API_KEY="${LLAMA_API_KEY:?}" ')
    assert SECRET not in shown.out + shown.err
