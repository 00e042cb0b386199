"""Profiles: commented YAML files that name a model, its shape and where to get it.

A profile makes `mgpu run llama-70b` and, because it holds the model's shape, `mgpu plan llama-70b` without
a network. The shipped ones are in `profiles/`; a file of the same name in the user's folder takes their
place. Names follow the metadata of GGUF.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from mgpu.errors import Missing, ProfileError, UsageError
from mgpu.profile_errors import Problem, explain, nearest, profile_error
from mgpu.profile_schema import (
    NAME_PATTERN,
    SCHEMA_FILE,
    GgufSource,
    ModelShape,
    Profile,
    QuantisationName,
    VllmSource,
    WheelSource,
    profile_schema,
)
from mgpu.profile_yaml import read_document, read_text

__all__ = [
    "GgufSource",
    "LoadedProfile",
    "ModelShape",
    "Profile",
    "ProfileEntry",
    "QuantisationName",
    "VllmSource",
    "WheelSource",
    "list_profiles",
    "load_profile",
    "new_profile_text",
    "profile_schema",
    "read_profile",
    "shipped_profile_folder",
    "user_profile_folder",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedProfile:
    """A profile and the file it came from; `shipped` is False for the user's own."""

    profile: Profile
    path: Path
    shipped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileEntry:
    """A profile in a list. `overridden`: the user has one of the same name, which is the one that counts.

    `error` says what is wrong with a file that cannot be used; its `description` is then None.
    """

    name: str
    path: Path
    shipped: bool
    description: str | None
    overridden: bool
    error: str | None


def load_profile(name: str) -> LoadedProfile:
    """Return the profile of that name, the user's own before a shipped one.

    Raises UsageError (code "profile-unknown") where there is none, ProfileError where its file is wrong.
    """
    if re.fullmatch(NAME_PATTERN, name):
        for folder, shipped in ((user_profile_folder(), False), (shipped_profile_folder(), True)):
            path = folder / f"{name}.yaml"
            if os.path.lexists(path):  # a broken link is the user's error, not a reason to take another file
                return LoadedProfile(profile=read_profile(path), path=path, shipped=shipped)
    if "/" not in name and os.path.isfile(name):  # noqa: PTH113 - never raises
        raise UsageError(
            f"{name[:80]} is a file, but neither a profile nor a GGUF model by its name",
            code="profile-unknown",
            hint="a model's file ends in .gguf; mgpu profiles list has the names",
        )
    close = nearest(name, {path.stem for path, _ in _files()}, most=3)
    end = f"; the nearest {'is' if len(close) == 1 else 'are'} {', '.join(close)}" if close else ""
    raise UsageError(f"there is no profile {name[:80]!r}{end}", code="profile-unknown", hint="mgpu profiles list")


def read_profile(path: Path) -> Profile:
    """Return the profile in a file, which must be named after it.

    Raises ProfileError naming file, line, column and key of everything that is wrong with it.
    """
    return _parse(read_text(path), file=str(path), file_name=path.name)


def list_profiles() -> tuple[ProfileEntry, ...]:
    """Return every profile by name, the user's before the shipped one that it overrides.

    A file that is wrong is listed with its error; none makes this fail.
    """
    own = {path.stem for path, shipped in _files() if not shipped and path.suffix == ".yaml"}
    entries = []
    for path, shipped in sorted(_files(), key=lambda file: (file[0].stem, file[1])):
        description = error = None
        try:
            description = read_profile(path).description
        except ProfileError as problem:
            error = problem.message
        overridden = shipped and path.stem in own
        entries.append(
            ProfileEntry(
                name=path.stem,
                path=path,
                shipped=shipped,
                description=description,
                overridden=overridden,
                error=error,
            )
        )
    return tuple(entries)


def new_profile_text(name: str, *, based_on: str = "llama-8b") -> str:
    """Return the text of a new profile: that of `based_on`, comments included, under another name.

    Raises UsageError where `name` cannot name a profile, and what `load_profile` raises of `based_on`.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        allowed = "lower-case letters, digits, '.', '_' and '-', at most 64 of them"
        raise UsageError(f"{name[:80]!r} cannot name a profile: a name is made of {allowed}")
    path = load_profile(based_on).path
    lines = read_text(path).rstrip().split("\n")
    body = [f"name: {name}" if re.match(r"name\s*:", line) else line for line in lines]
    while body and (body[0].startswith("#") or not body[0].strip()):
        body.pop(0)
    head = (
        f"# yaml-language-server: $schema={shipped_profile_folder() / SCHEMA_FILE}",
        "#",
        f"# Made from {based_on}: change what differs, then `mgpu profiles check {name}`.",
        f"# mgpu finds it as {user_profile_folder() / name}.yaml,",
        "# before a shipped profile of that name.",
    )
    text = "\n".join((*head, *body)) + "\n"
    _parse(text, file=str(path), file_name=f"{name}.yaml")
    return text


def user_profile_folder() -> Path:
    """Return the folder of the user's own profiles, which need not exist."""
    import platformdirs

    return platformdirs.user_config_path("mgpu") / "profiles"


def shipped_profile_folder() -> Path:
    """Return the folder of the profiles that ship: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    for folder in (package / "profiles", package.parent / "profiles"):
        if (folder / SCHEMA_FILE).is_file():
            return folder
    raise Missing("the profiles that ship with mgpu are not beside it", hint="reinstall mgpu")


def _parse(text: str, *, file: str, file_name: str) -> Profile:
    document = read_document(text, file=file)
    problems = list(document.problems)
    stem, dot, suffix = file_name.rpartition(".")
    if (dot, suffix) != (".", "yaml"):
        problems.append(Problem(place=None, key="", text="the file's name must end in .yaml"))
    elif isinstance(name := document.data.get("name"), str) and name != stem:
        place = document.place_of(("name",))
        problems.append(Problem(place=place, key="name", text=f"is {name[:80]!r} in a file named {stem[:80]!r}"))
    try:
        profile = Profile.model_validate(document.data)
    except ValidationError as error:
        problems += explain(error, Profile, document.place_of)
        raise profile_error(file, problems) from None
    if problems:
        raise profile_error(file, problems)
    return profile


def _files() -> tuple[tuple[Path, bool], ...]:
    """Every profile file and whether it is a shipped one."""
    files: list[tuple[Path, bool]] = []
    for folder, shipped in ((user_profile_folder(), False), (shipped_profile_folder(), True)):
        try:
            paths = sorted(folder.iterdir())
        except OSError:  # usually: the user has no profiles
            continue
        files += [(path, shipped) for path in paths if path.suffix in (".yaml", ".yml")]
    return tuple(files)
