"""`mgpu pull` and `mgpu ls`: models on this machine's disk."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgpu.cli.options import JsonOption
from mgpu.cli.output import Output
from mgpu.cli.result import Result
from mgpu.errors import BadModel, Interrupted, MgpuError, Missing, UsageError
from mgpu.models.source import HubRepository, OllamaTag, ProfileName, in_quantisation, parse_model

if TYPE_CHECKING:
    from mgpu.models.fetch import Progress, Source, Survey
    from mgpu.models.local import LocalModel
    from mgpu.profile import Profile

# Set by the main program before the command is called: `pull` speaks while it works.
output = Output(as_json=False)


@dataclass(slots=True, kw_only=True)
class Pull:
    """One MODEL to be fetched, and what became of it."""

    argument: str
    source: Source
    quantisation: str | None
    survey: Survey | None = None
    path: Path | None = None
    size_bytes: int | None = None
    seconds: float | None = None
    errors: list[MgpuError] = field(default_factory=list)

    @property
    def fetched(self) -> bool:
        """Whether it was not here before."""
        return self.path is not None and self.survey is not None and self.survey.path is None


def pull(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL…", help="Profiles and hf:ORG/REPO[:QUANT].", show_default=False),
    ],
    quant: Annotated[str | None, typer.Option("--quant", help="Quantisation, such as Q4_K_M.")] = None,
    json: JsonOption = False,
) -> Result:
    """Fetch MODELs to this machine, to be run later: resumed where it broke off, checked, kept in the shared cache."""
    from mgpu.models.fetch import require_space_for, survey

    pulls = [_pull(argument, quant) for argument in dict.fromkeys(models)]
    # Nothing is downloaded before all is known to be there and to fit.
    for each in pulls:
        each.survey = survey(each.source, quantisation=each.quantisation)
    require_space_for([each.survey for each in pulls if each.survey])
    try:
        _fetch_all(pulls)
    except KeyboardInterrupt:
        output.note("stopped: what is here stays, and the same command goes on from there")
        return _pulled(pulls, Interrupted("interrupted", hint="the same command goes on from there"))
    return _pulled(pulls)


def ls(json: JsonOption = False) -> Result:
    """List the GGUF models on this machine: what they are, what they take, and where they are."""
    from mgpu.cli.views.models import models_screen
    from mgpu.models.hub import cache_folder
    from mgpu.models.local import local_models
    from mgpu.models.wheel import wheel_cache_folder

    models = local_models(_profiles())
    folders = (cache_folder(), wheel_cache_folder())
    return Result(
        command="ls",
        data={
            "models": [_local_data(model) for model in models],
            "total_bytes": sum(model.bytes for model in models),
            "folders": [str(folder) for folder in folders],
        },
        screen=lambda _: models_screen(models, folders, time.time()),
    )


def _pull(argument: str, quant: str | None) -> Pull:
    """What MODEL means. Raises UsageError for what cannot be fetched."""
    match parse_model(argument):
        case ProfileName(name):
            from mgpu.cli.prepare import choose_quantisation
            from mgpu.profile import load_profile

            quantisation, source = choose_quantisation(load_profile(name).profile, quant)
            return Pull(argument=argument, source=source, quantisation=quantisation)
        case HubRepository() as repository:
            return Pull(argument=argument, source=in_quantisation(repository, quant), quantisation=None)
        case OllamaTag() as tag:
            return _pull_from_ollama(tag)
        case _:
            raise UsageError(
                f"MODEL {argument!r} is a path on this machine: there is nothing to fetch",
                hint="give a profile (mgpu profiles list) or hf:ORG/REPO[:QUANT]",
            )


def _pull_from_ollama(tag: OllamaTag) -> Pull:
    raise Missing(
        f"{tag} is not supported by this version of mgpu",
        code="source-unsupported",
        hint=f"ollama pull {tag.name}:{tag.tag}",
    )


def _fetch_all(pulls: Sequence[Pull]) -> None:
    """Fetch one after the other under one bar. One that fails does not keep the others from being fetched."""
    from mgpu.cli.live import live
    from mgpu.cli.pace import Pace
    from mgpu.cli.views.status import fetch_line
    from mgpu.models.fetch import fetch

    missing = [each for each in pulls if each.survey and not each.survey.path]
    sizes = [each.survey.total_bytes for each in missing if each.survey]
    total_bytes = None if None in sizes else sum(size for size in sizes if size)
    before = 0
    pace = Pace()
    for each in pulls:
        assert each.survey
        number = f" ({missing.index(each) + 1} of {len(missing)})" if each in missing and len(missing) > 1 else ""
        with live(output, error=True) as draw:

            def on_progress(progress: Progress, before: int = before, number: str = number) -> None:
                done_bytes = before + progress.done_bytes
                rate = pace.look(progress.stage, done_bytes, time.monotonic())
                name = f"{progress.name}{number}"
                shown = replace(progress, name=name, done_bytes=done_bytes, total_bytes=total_bytes)
                draw(lambda width: fetch_line(shown, rate, width))

            begun = time.monotonic()
            try:
                each.path = fetch(each.source, quantisation=each.quantisation, on_progress=on_progress)
                _look_into(each)
            except MgpuError as error:
                each.errors.append(error)
            each.seconds = time.monotonic() - begun
        before += each.survey.total_bytes or 0
        _say(each)


def _look_into(each: Pull) -> None:
    """Read the header of what was fetched. Raises BadModel if it is no usable model."""
    from mgpu.models.gguf import read_gguf
    from mgpu.models.gguf_facts import quantisation_of

    assert each.path
    try:
        header = read_gguf(each.path)
    except BadModel as error:
        error.hint = f"remove it, then pull again: rm {shlex.quote(str(each.path.resolve()))}"
        raise
    each.size_bytes = header.file_bytes
    each.quantisation = each.quantisation or quantisation_of(header)


def _say(each: Pull) -> None:
    from mgpu.cli.views.words import sizes
    from mgpu.units import seconds

    if each.fetched and not each.errors and each.path:
        output.note(f"fetch    {each.path.name}  {sizes(each.size_bytes or 0)} in {seconds(each.seconds or 0)}")


def _pulled(pulls: Sequence[Pull], interrupted: Interrupted | None = None) -> Result:
    from mgpu.cli.views.models import pulled_lines

    errors = [*([interrupted] if interrupted else []), *(error for each in pulls for error in each.errors)]
    return Result(
        command="pull",
        data={
            "models": [_pulled_data(each) for each in pulls],
            "fetched_bytes": sum(each.size_bytes or 0 for each in pulls if each.fetched),
        },
        screen=lambda _: pulled_lines([(each.argument, each.path) for each in pulls if not each.errors]),
        exit_code=errors[0].exit_code if errors else 0,
        errors=tuple(errors),
    )


def _pulled_data(each: Pull) -> dict[str, Any]:
    return {
        "model": each.argument,
        "quantisation": each.quantisation,
        "path": str(each.path) if each.path and not each.errors else None,
        "bytes": each.size_bytes,
        "fetched": each.fetched,
        "seconds": round(each.seconds, 3) if each.seconds is not None else None,
        "error": each.errors[0].code if each.errors else None,
    }


def _local_data(model: LocalModel) -> dict[str, Any]:
    used = datetime.fromtimestamp(model.last_used, UTC)
    return {
        "model": model.argument,
        "name": model.name,
        "profile": model.profile,
        "repository": model.repository,
        "quantisation": model.quantisation,
        "bytes": model.bytes,
        "total_bytes": model.total_bytes,
        "path": str(model.path),
        "last_used_at": used.isoformat(timespec="seconds").replace("+00:00", "Z"),
        "state": model.state,
        "problem": model.problem,
    }


def _profiles() -> list[Profile]:
    """Every profile that can be read, the user's own before those that ship."""
    from mgpu.errors import ProfileError
    from mgpu.profile import list_profiles, read_profile

    profiles = []
    for entry in sorted(list_profiles(), key=lambda entry: entry.shipped):
        try:
            profiles.append(read_profile(entry.path))
        except ProfileError:  # `mgpu profiles check` tells what is wrong with it
            continue
    return profiles
