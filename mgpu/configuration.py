"""What the user sets once for every command: `config.yaml` in mgpu's configuration folder. There need not be one.

engines:
  llama.cpp: /opt/llama.cpp/build/bin/llama-server
  vllm: ~/venvs/vllm          # a virtual environment, or the program in it
  ollama: /usr/local/bin/ollama
expect_gpus: 4                # fewer cards are a warning of mgpu doctor
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mgpu.errors import ProfileError, UsageError

if TYPE_CHECKING:
    from mgpu.profile_errors import KeyPath, Problem
    from mgpu.profile_yaml import Document

ENGINES = ("llama.cpp", "vllm", "ollama")
_KEYS = ("engines", "expect_gpus")
_MOST_GPUS = 1024  # more than any machine has
_KIND = "a configuration"


def configuration_file() -> Path:
    """Return the path of the user's configuration, whether it is there or not."""
    import platformdirs

    return platformdirs.user_config_path("mgpu").absolute() / "config.yaml"


def engine_setting(backend: str) -> Path | None:
    """Return where the configuration says that an engine is: the path of its program, or of the folder that has it in
    `bin`; absolute, but not looked at. None where nothing is set.

    Raises UsageError (code "configuration-invalid") naming file, line, column and key of what is wrong.
    """
    file = configuration_file()
    engines = _settings(file).get("engines")
    setting = engines.get(backend) if isinstance(engines, dict) else None
    return file.parent / os.path.expanduser(str(setting)) if setting else None  # noqa: PTH111 - never raises


def expected_gpus() -> int | None:
    """Return how many cards the configuration says this machine has. None where nothing is set.

    Raises UsageError (code "configuration-invalid") naming file, line, column and key of what is wrong.
    """
    count = _settings(configuration_file()).get("expect_gpus")
    return count if isinstance(count, int) else None


def nearest_engine(word: str) -> str | None:
    """Return the engine that is meant by a word that is none of `ENGINES`; None where nobody can tell."""
    from mgpu.profile_errors import nearest

    begun = [name for name in ENGINES if word and name.startswith(word.lower())]
    return next(iter(begun or nearest(word, ENGINES)), None)


def shown_path(path: Path) -> str:
    """Return a path as people write it: the home folder as `~`."""
    home = os.path.expanduser("~")  # noqa: PTH111 - never raises
    return f"~/{path.relative_to(home)}" if home != "~" and path.is_relative_to(home) else str(path)


def _settings(file: Path) -> dict[str, object]:
    """All settings, sound ones only."""
    if not os.path.lexists(file):  # a broken link is the user's error, not a reason to go without
        return {}
    # Most people have no configuration: only those who do wait for these.
    from mgpu.profile_errors import profile_error
    from mgpu.profile_yaml import read_document, read_text

    try:
        text = read_text(file, kind=_KIND)
        if all(line.lstrip().startswith("#") for line in text.splitlines() if line.strip()):
            return {}  # empty, or all of it commented out
        document = read_document(text, file=str(file), kind=_KIND, example="engines: …")
        problems = [*document.problems, *_problems(document)]
        if problems:
            raise profile_error(str(file), problems)
    except ProfileError as error:
        hint = f"mend {shown_path(file)}, then: mgpu backends"
        raise UsageError(error.message, code="configuration-invalid", hint=hint) from None
    return dict(document.data)


def _problems(document: Document) -> Iterator[Problem]:
    from mgpu.profile_errors import Problem, dotted, in_words, nearest

    def problem(path: KeyPath, text: str) -> Problem:
        return Problem(place=document.place_of(path), key=dotted(path), text=text)

    for key in document.data.keys() - set(_KEYS):
        yield problem((key,), _unknown(_KEYS, next(iter(nearest(key, _KEYS)), None)))
    count = document.data.get("expect_gpus")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= _MOST_GPUS):
        yield problem(("expect_gpus",), f"expected a number of cards, found {in_words(count)}")
    engines = document.data.get("engines")
    if engines is None:  # what is below it is commented out
        return
    if not isinstance(engines, dict):
        yield problem(("engines",), f"expected a group of keys, found {in_words(engines)}")
        return
    for name, value in engines.items():
        path = ("engines", name)
        if name not in ENGINES:
            yield problem(path, _unknown(ENGINES, nearest_engine(name)))
        elif not isinstance(value, str):
            yield problem(path, f"expected the path of a program or of its folder, found {in_words(value)}")
        elif not value.strip() or not value.isprintable():
            yield problem(path, f"{in_words(value)} is not the path of anything")


def _unknown(known: tuple[str, ...], close: str | None) -> str:
    return f"unknown key; did you mean '{close}'?" if close else f"unknown key; known are {', '.join(known)}"
