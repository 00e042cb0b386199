"""The rooms of mgpu, in the order in which data flows: each imports only from those before it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mgpu"
ROOMS = (
    "errors",
    "units",
    "interrupts",
    "programs",
    "machine",
    "profile",
    "configuration",
    "models",
    "planning",
    "backends",
    "running",
    "doctor",
    "cli",
)
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST_MODULE = 400


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def room_of(module: str) -> str:
    first = module.split(".")[0]
    return "profile" if first.startswith("profile") else first


def imports(path: Path) -> Iterator[str]:
    """The mgpu modules a module imports, anywhere in it, and the foreign packages."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative imports hide the room"
            yield node.module


@pytest.mark.parametrize("path", [pytest.param(path, id=name_of(path) or "mgpu") for path in MODULES])
def test_a_room_imports_only_from_those_before_it(path: Path) -> None:
    room = room_of(name_of(path))
    if room in ("", "__main__"):
        return
    for module in imports(path):
        if module.startswith("mgpu."):
            imported = room_of(module.removeprefix("mgpu."))
            assert ROOMS.index(imported) <= ROOMS.index(room), f"{room} imports {module}"


def test_every_module_belongs_to_a_room() -> None:
    assert {room_of(name_of(path)) for path in MODULES} - {"", "__main__"} == set(ROOMS)


@pytest.mark.parametrize("path", [pytest.param(path, id=name_of(path) or "mgpu") for path in MODULES])
def test_typer_is_used_without_click(path: Path) -> None:
    assert "click" not in {module.split(".")[0] for module in imports(path)}


def prints(path: Path) -> Iterator[int]:
    for node in ast.walk(ast.parse(path.read_text())):
        called = node.func if isinstance(node, ast.Call) else node
        if isinstance(called, (ast.Name, ast.Attribute)) and ast.unparse(called) in (
            "print",
            "sys.stdout",
            "sys.stderr",
        ):
            yield called.lineno


def test_only_one_module_prints() -> None:
    talkative = {name_of(path): list(prints(path)) for path in MODULES}
    # main.py takes a broken pipe's stdout away, and narration.py puts streams that never fail in place: neither prints.
    assert {name for name, lines in talkative.items() if lines} <= {"cli.output", "cli.main", "cli.narration"}


@pytest.mark.parametrize("path", [pytest.param(path, id=name_of(path) or "mgpu") for path in MODULES])
def test_modules_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_MODULE
