"""The variables that systemd gives to engines which run as services: those that change what they do with cards."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mgpu.machine import sysfs
from mgpu.machine.disks import PATIENCE_S
from mgpu.machine.environment import chosen_variables
from mgpu.machine.inspection import UnitVariable, Unread
from mgpu.machine.patience import Question

# The first that has a unit's file decides over it; drop-ins count wherever they are (systemd.unit(5)).
_SYSTEM = ("/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
_USER = (".config/systemd/user", ".local/share/systemd/user")
_ENGINES = r"(ollama|vllm|llama|mgpu)[\w.@:\\-]*\.service"
_MOST_UNITS = 32
_MOST_FILES = 64
_LONGEST_FILE = 64 * 1024


def read_unit_variables(root: Path = Path("/")) -> tuple[tuple[UnitVariable, ...], tuple[Unread, ...]]:
    """Return what the units of Ollama, vLLM, llama.cpp and mgpu set by `Environment=` and `EnvironmentFile=`, drop-ins
    included, with the file that sets it; and the files that are there and cannot be read. Only variables that
    `chosen_variables` lets pass. Never raises; a home folder that does not answer is waited for half a second."""
    found, unread = _of_units(root, _SYSTEM, user=False)
    if home := os.environ.get("HOME"):
        try:
            own = partial(_of_units, root, tuple(f"{home}/{folder}" for folder in _USER), user=True)
            more, unread_too = Question(own).answer(PATIENCE_S)
            found, unread = found + more, unread + unread_too
        except TimeoutError as error:
            unread = (*unread, Unread(what="~/.config/systemd/user/*.service", why=str(error)))
    return found, unread


@dataclass(slots=True)
class _Unit:
    """A unit while its files are read; each variable has the file that sets it."""

    name: str
    variables: dict[str, tuple[str, str]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    unset: set[str] = field(default_factory=set)


def _of_units(
    root: Path, folders: tuple[str, ...], *, user: bool
) -> tuple[tuple[UnitVariable, ...], tuple[Unread, ...]]:
    found: list[UnitVariable] = []
    unread: list[Unread] = []
    names = {
        path.name.removesuffix(".d")
        for folder in folders
        for path in sysfs.children(sysfs.below(root, folder), rf"{_ENGINES}(\.d)?")
    }
    for name in sorted(names)[:_MOST_UNITS]:
        unit = _Unit(name)
        for path in _files(root, folders, name):
            text = sysfs.read_text(sysfs.below(root, path), _LONGEST_FILE)
            if text is None:
                unread.append(_unread(path, name))
            else:
                _apply(unit, text, path)
        for path in unit.files[:_MOST_FILES]:
            place = sysfs.below(root, path)
            text = sysfs.read_text(place, _LONGEST_FILE)
            if text is not None:
                unit.variables |= {key: (value, path) for key, value in _assignments(text)}
            elif sysfs.is_there(place):
                unread.append(_unread(path, name))
        values = ((key, value) for key, (value, _) in unit.variables.items() if key not in unit.unset)
        found += [
            UnitVariable(unit=name, user=user, path=unit.variables[key][1], name=key, value=value)
            for key, value in chosen_variables(values)
        ]
    return tuple(found), tuple(unread)


def _files(root: Path, folders: tuple[str, ...], name: str) -> list[str]:
    """A unit's file and its drop-ins in the order in which they count; none of a unit that is masked."""
    places = (f"{folder}/{name}" for folder in folders)
    own = next((path for path in places if sysfs.is_there(sysfs.below(root, path))), None)
    if own is not None and sysfs.link_name(sysfs.below(root, own)) == "null":
        return []
    drops: dict[str, str] = {}
    for folder in reversed(folders):  # of drop-ins with one name, the one of the first folder counts
        for path in sysfs.children(sysfs.below(root, f"{folder}/{name}.d"), r".+\.conf"):
            drops[path.name] = f"{folder}/{name}.d/{path.name}"
    return [*((own,) if own else ()), *(drops[key] for key in sorted(drops))][:_MOST_FILES]


def _apply(unit: _Unit, text: str, path: str) -> None:
    """Add what a unit's file or a drop-in sets, in its section Service (systemd.exec(5))."""
    section = ""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        line = line.strip()
        if line.startswith("["):
            section = line
        key, _, value = line.partition("=")
        key, value = key.strip(), value.strip()
        if section != "[Service]" or line.startswith(("#", ";")):
            continue
        if key == "Environment":
            if not value:
                unit.variables.clear()
            for word in _words(value):
                name, equals, said = word.partition("=")
                if equals:
                    unit.variables[name] = (said, path)
        elif key == "EnvironmentFile":
            if not value:
                unit.files.clear()
            elif (file := value.removeprefix("-").replace("%h", os.environ.get("HOME", "%h"))).startswith("/"):
                unit.files.append(file)
        elif key == "UnsetEnvironment":
            unit.unset |= {word.partition("=")[0] for word in _words(value)}


def _assignments(text: str) -> Iterator[tuple[str, str]]:
    """The lines of an environment file."""
    for line in text.splitlines():
        name, equals, value = line.strip().partition("=")
        if equals and not name.startswith(("#", ";")):
            yield name.strip(), " ".join(_words(value))


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # a quotation mark that is not closed
        return text.split()


def _unread(path: str, unit: str) -> Unread:
    return Unread(what=f"{path} ({unit})", why="it is there and cannot be read", needs_root=os.geteuid() != 0)
