"""`mgpu profiles`: the models mgpu knows by name."""

from __future__ import annotations

import json as json_module
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgpu.cli.options import JsonOption
from mgpu.cli.result import Result
from mgpu.errors import Missing, ProfileError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mgpu.profile import ProfileEntry

app = typer.Typer(help="The models mgpu knows by name.")

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A profile's name.", show_default=False)]


@app.callback(invoke_without_command=True)
def profiles(context: typer.Context, json: JsonOption = False) -> Result | None:
    """The models mgpu knows by name; alone, lists them."""
    return None if context.invoked_subcommand else list_()


@app.command("list")
def list_(json: JsonOption = False) -> Result:
    """List all profiles: those that ship with mgpu and your own."""
    from mgpu.profile import list_profiles, user_profile_folder

    entries = list_profiles()
    data = [
        {
            "name": entry.name,
            "path": str(entry.path),
            "shipped": entry.shipped,
            "overridden": entry.overridden,
            "description": entry.description,
            "error": entry.error,
        }
        for entry in entries
    ]
    folder = str(user_profile_folder())
    return Result(
        command="profiles.list",
        data={"profiles": data, "user_folder": folder},
        screen=lambda _: _list_screen(entries, folder),
    )


@app.command()
def show(name: NameArgument, json: JsonOption = False) -> Result:
    """Show a profile as it is written, with its comments."""
    from mgpu.profile import load_profile

    loaded = load_profile(name)
    text = loaded.path.read_text()
    return Result(
        command="profiles.show",
        data={"path": str(loaded.path), "shipped": loaded.shipped, "profile": loaded.profile.model_dump(mode="json")},
        screen=lambda _: (f"# {loaded.path}", text.rstrip("\n")),
    )


@app.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME|FILE]…", help="Default: all profiles.")] = None,
    json: JsonOption = False,
) -> Result:
    """Check profiles, by name or as files: every problem with its line and the nearest right spelling."""
    checked = [(text, _problem(text)) for text in names] if names else _all_problems()
    errors = [error for _, error in checked if error]
    return Result(
        command="profiles.check",
        data={"checked": [{"profile": text, "ok": error is None} for text, error in checked]},
        screen=lambda _: (f"ok       {text}" for text, error in checked if error is None),
        exit_code=2 if errors else 0,
        errors=tuple(errors),
    )


@app.command()
def new(
    name: NameArgument,
    based_on: Annotated[str, typer.Option("--from", help="The profile to begin with.")] = "llama-8b",
    force: Annotated[bool, typer.Option("--force", help="Replace a profile of yours with that name.")] = False,
    json: JsonOption = False,
) -> Result:
    """Write a new profile of yours to edit; it overrides a shipped one of the same name."""
    from mgpu.profile import new_profile_text, user_profile_folder

    text = new_profile_text(name, based_on=based_on)
    path = user_profile_folder() / f"{name}.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if force else os.O_EXCL)
        with os.fdopen(os.open(path, flags, 0o644), "w") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{path} is already there", hint="--force replaces it") from None
    except OSError as error:
        raise Missing(f"{path} cannot be written: {error.strerror}", code="profile-unwritable") from None
    return Result(
        command="profiles.new",
        data={"path": str(path)},
        screen=lambda _: (f"written {path}", f"edit it, then: mgpu profiles check {name}"),
    )


@app.command()
def schema(json: JsonOption = False) -> Result:
    """Print the JSON Schema of profiles, for editors."""
    from mgpu.profile import profile_schema

    data = profile_schema()
    return Result(
        command="profiles.schema", data=data, screen=lambda _: (json_module.dumps(data, indent=2, ensure_ascii=False),)
    )


def _problem(text: str) -> UsageError | None:
    """The problem of a profile by name, or of a file when `text` looks like a path."""
    from mgpu.profile import load_profile, read_profile

    try:
        if "/" in text or text.endswith((".yaml", ".yml")):
            read_profile(Path(text).expanduser())
        else:
            load_profile(text)
    except UsageError as error:
        return error
    return None


def _all_problems() -> list[tuple[str, UsageError | None]]:
    from mgpu.profile import list_profiles

    return [
        (str(entry.path), ProfileError(entry.error) if entry.error else None)
        for entry in list_profiles()
        if not entry.overridden
    ]


def _list_screen(entries: tuple[ProfileEntry, ...], folder: str) -> Iterator[RenderableType]:
    from mgpu.cli.views.words import plain_table

    table = plain_table([("profile", "left"), ("", "left"), ("description", "left")])
    for entry in entries:
        origin = "" if entry.shipped else "yours"
        broken = entry.error.splitlines()[0] if entry.error else None
        table.add_row(
            entry.name,
            "overridden" if entry.overridden else "broken" if broken else origin,
            broken or entry.description or "",
        )
    yield table
    yield ""
    yield f"yours: {folder}"
