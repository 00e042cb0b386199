"""Taking names of people and computers out of what was read."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from typing import TypeVar

_Value = TypeVar("_Value")


def redacted(value: _Value) -> _Value:
    """Return a dataclass with every text in it made printable and freed of names: the home folder is "~", a folder
    that has the user's name "user", the computer's own name "host", and serial numbers are gone."""
    changed = _each_text(value, _Names())
    assert isinstance(changed, type(value))
    return changed


class _Names:
    def __init__(self) -> None:
        import platform

        home = os.environ.get("HOME", "").rstrip("/")
        user = os.environ.get("USER") or os.environ.get("LOGNAME") or home.rpartition("/")[2]
        host = platform.node().partition(".")[0]
        self._patterns: list[tuple[re.Pattern[str], str]] = [(re.compile(r"(?i)(serial number(?: is)?:? )\S+"), r"\1…")]
        if home.count("/") >= 1 and len(home) > 2:
            self._patterns.append((re.compile(rf"(?<![\w.-]){re.escape(home)}(?=[/:;,\s\"']|$)"), "~"))
        if len(user) > 1 and user != "root":
            self._patterns.append((re.compile(rf"(?<=/){re.escape(user)}(?=[/:;,\s\"']|$)"), "user"))
        # A short or common name tells nobody's secret, and would spoil half of all texts.
        if len(host) >= 4 and host.lower() not in {"localhost", "linux", "nvidia", "ubuntu", "debian", "fedora"}:
            self._patterns.append((re.compile(rf"(?<![\w-]){re.escape(host)}(?![\w-])", re.IGNORECASE), "host"))

    def __call__(self, text: str) -> str:
        text = "".join(character if character.isprintable() else " " for character in text)
        for pattern, instead in self._patterns:
            text = pattern.sub(instead, text)
        return text


def _each_text(value: object, change: Callable[[str], str]) -> object:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_each_text(item, change) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _each_text(getattr(value, field.name), change) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value
