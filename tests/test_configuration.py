"""The user's configuration: what it sets, and every way in which it can be wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mgpu.configuration import configuration_file, engine_setting, expected_gpus, shown_path
from mgpu.errors import UsageError
from tests.ordinary_user import as_ordinary_user

ROOT = Path(__file__).parents[1]


def write(content: str | bytes) -> Path:
    path = configuration_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def error_of(path: Path) -> str:
    """The message of the error, without the file's name, which must be there."""
    with pytest.raises(UsageError) as caught:
        engine_setting("vllm")
    error = caught.value
    assert (error.code, error.exit_code) == ("configuration-invalid", 2)
    assert "mgpu backends" in (error.hint or "")
    assert all(line.startswith(f"{path}:") and line.isprintable() for line in error.message.splitlines())
    return error.message.replace(f"{path}:", "").replace("\n", ";").strip()


def test_it_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert configuration_file() == tmp_path / "mgpu" / "config.yaml"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(None, None, id="no file"),
        pytest.param("", None, id="an empty file"),
        pytest.param("# engines:\n\n  # vllm: x\n", None, id="all commented out"),
        pytest.param("engines:\n#  vllm: x\n", None, id="all engines commented out"),
        pytest.param("engines: {ollama: /o}", None, id="another engine"),
        pytest.param("engines:\n  vllm: /opt/vllm/bin/vllm  # the fast one\n", "/opt/vllm/bin/vllm", id="a path"),
        pytest.param("engines:\n  vllm: '~/venvs/vllm'\n", "{home}/venvs/vllm", id="in the home folder"),
        pytest.param("engines:\n  vllm: venv/bin/vllm\n", "{folder}/venv/bin/vllm", id="beside the configuration"),
        pytest.param("engines:\n  vllm: ~nosuch/vllm\n", "{folder}/~nosuch/vllm", id="the home of nobody"),
        pytest.param('engines:\n  vllm: "/a b/№"\n', "/a b/№", id="spaces and other letters"),
    ],
)
def test_an_engine_is_where_it_says(
    content: str | None, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    if content is not None:
        write(content)
    folder = configuration_file().parent
    setting = engine_setting("vllm")
    assert setting == (Path(expected.format(home=tmp_path, folder=folder)) if expected else None)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param("engine:\n  vllm: /x\n", "1:1: engine: unknown key; did you mean 'engines'?", id="a slip"),
        pytest.param("colour: red\n", "1:1: colour: unknown key; known are engines, expect_gpus", id="an unknown key"),
        pytest.param(
            "engines:\n  llamacpp: /x\n",
            "2:3: engines.llamacpp: unknown key; did you mean 'llama.cpp'?",
            id="a slip in an engine",
        ),
        pytest.param("engines:\n  llama: /x\n", "did you mean 'llama.cpp'?", id="half an engine's name"),
        pytest.param("engines:\n  '': /x\n", "unknown key; known are llama.cpp, vllm, ollama", id="an empty key"),
        pytest.param(
            "engines:\n  exl3: /x\n",
            "2:3: engines.exl3: unknown key; known are llama.cpp, vllm, ollama",
            id="an engine mgpu does not know",
        ),
        pytest.param(
            "- vllm\n", "1:1: is a list: a configuration is a group of keys, such as 'engines: …'", id="a list"
        ),
        pytest.param("vllm\n", "1:1: is 'vllm': a configuration is a group", id="one word"),
        pytest.param(
            "engines: /opt\n", "1:1: engines: expected a group of keys, found '/opt'", id="a path where engines belong"
        ),
        pytest.param(
            "engines:\n  vllm: 5\n",
            "2:3: engines.vllm: expected the path of a program or of its folder, found 5",
            id="a number",
        ),
        pytest.param("engines:\n  vllm:\n", "2:3: engines.vllm: expected the path of", id="nothing"),
        pytest.param("engines:\n  vllm: [a]\n", "found a list", id="a list of paths"),
        pytest.param("engines:\n  vllm: ''\n", "engines.vllm: '' is not the path of anything", id="an empty path"),
        pytest.param('engines:\n  vllm: "a\\0b"\n', "is not the path of anything", id="a NUL byte in a path"),
        pytest.param(
            "engines:\n  vllm: /x\n  vllm: /y\n",
            "3:3: engines.vllm: is set twice, first in line 2",
            id="a key set twice",
        ),
        pytest.param(
            "color: 1\nengines:\n  olama: /x\n  vllm: 1\n",
            "1:1: color: unknown key; known are engines, expect_gpus;"
            "3:3: engines.olama: unknown key; did you mean 'ollama'?;"
            "4:3: engines.vllm: expected",
            id="all that is wrong",
        ),
        pytest.param("expect_gpu: 2\n", "1:1: expect_gpu: unknown key; did you mean 'expect_gpus'?", id="another slip"),
        pytest.param(
            "engines: {}\nexpect_gpus: four\n",
            "2:1: expect_gpus: expected a number of cards, found 'four'",
            id="cards in words",
        ),
        pytest.param(
            "expect_gpus: -1\n", "1:1: expect_gpus: expected a number of cards, found -1", id="fewer than none"
        ),
        pytest.param("expect_gpus: true\n", "expect_gpus: expected a number of cards, found true", id="cards, yes"),
        pytest.param("expect_gpus: 1.5\n", "expect_gpus: expected a number of cards, found '1.5'", id="half a card"),
        pytest.param("engines:\n\tvllm: /x\n", "2:1: is not YAML: a tab", id="tabs"),
        pytest.param(b"engines:\n  vllm: \xff\n", "2:9: byte 0xff is not UTF-8 text", id="not UTF-8"),
        pytest.param("engines: &a {x: *a}\n", "so a configuration has none", id="anchors"),
        pytest.param("a" * 300_000, "is larger than 256 KiB: not a configuration", id="a large file"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(content: str | bytes, expected: str) -> None:
    assert expected in error_of(write(content))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(None, None, id="no file"),
        pytest.param("engines: {vllm: /x}\n", None, id="not said"),
        pytest.param("expect_gpus:\n", None, id="left open"),
        pytest.param("expect_gpus: 4\nengines: {vllm: /x}\n", 4, id="four"),
        pytest.param("expect_gpus: 0\n", 0, id="none"),
    ],
)
def test_the_cards_that_there_should_be(content: str | None, expected: int | None) -> None:
    if content is not None:
        write(content)
    assert expected_gpus() == expected


def test_a_folder_or_a_broken_link_in_its_place_is_said() -> None:
    path = configuration_file()
    path.mkdir(parents=True)
    assert error_of(path) == "is a folder, not a configuration"
    path.rmdir()
    path.symlink_to("nowhere")
    assert error_of(path) == "there is no such file"


def test_a_file_that_may_not_be_read_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # the folder may be entered, the file in it may not be read
        monkeypatch.setenv("XDG_CONFIG_HOME", folder)
        path = write("engines:\n  vllm: /x\n")
        path.chmod(0)
        with as_ordinary_user():
            assert error_of(path) == "cannot be read: Permission denied"


def test_without_one_nothing_is_imported_to_read_it() -> None:
    code = (
        "import sys; from mgpu.configuration import engine_setting as e; e('vllm');"
        "sys.exit(int('yaml' in sys.modules or 'pydantic' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0


def test_paths_are_shown_as_people_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert shown_path(Path("/home/me/x/y")) == "~/x/y"
    assert shown_path(Path("/home/merry/x")) == "/home/merry/x"
