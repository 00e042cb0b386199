"""`mgpu pull` and `mgpu ls`: models on this machine's disk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgpu.cli.options import Backend, JsonOption
from mgpu.cli.output import Output
from mgpu.cli.result import Result
from mgpu.errors import Interrupted, MgpuError

if TYPE_CHECKING:
    from mgpu.cli.pulls import Pull
    from mgpu.models.local import LocalModel
    from mgpu.models.transfer import Progress
    from mgpu.profile import Profile

# Set by the main program before the command is called: `pull` speaks while it works.
output = Output(as_json=False)


def pull(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL…", help="Profiles, hf:ORG/REPO[:QUANT], ollama:NAME[:TAG].", show_default=False),
    ],
    quant: Annotated[str | None, typer.Option("--quant", help="Quantisation, such as Q4_K_M or awq.")] = None,
    backend: Annotated[
        Backend, typer.Option("--backend", help="Fetch what this engine loads (of a profile: llama.cpp's GGUF).")
    ] = Backend.auto,
    json: JsonOption = False,
) -> Result:
    """Fetch MODELs to this machine, to be run later: resumed where it broke off, checked, kept in the shared cache."""
    from mgpu.cli.pulls import pull_of
    from mgpu.models.fetch import require_space_for

    pulls = [pull_of(argument, quant, backend) for argument in dict.fromkeys(models)]
    # Nothing is downloaded before all is known to be there and to fit.
    for each in pulls:
        each.look()
    require_space_for([each.survey for each in pulls if each.survey])
    try:
        _fetch_all(pulls)
    except KeyboardInterrupt:
        output.note("stopped: what is here stays, and the same command goes on from there")
        return _pulled(pulls, Interrupted("interrupted", hint="the same command goes on from there"))
    return _pulled(pulls)


def ls(json: JsonOption = False) -> Result:
    """List the models on this machine, Ollama's among them: what they are, what they take, and where they are."""
    from mgpu.cli.ollama_models import models_in_ollama
    from mgpu.cli.views.models import models_screen
    from mgpu.models.hub import cache_folder
    from mgpu.models.local import Owners, local_models
    from mgpu.models.wheel import wheel_cache_folder

    profiles, warnings = _profiles(), list[str]()
    models = [*local_models(profiles), *models_in_ollama(Owners(profiles), warnings)]
    folders = (cache_folder(), wheel_cache_folder())
    return Result(
        command="ls",
        data={
            "models": [_local_data(model) for model in models],
            "total_bytes": sum(model.bytes for model in models),
            "folders": [str(folder) for folder in folders],
        },
        screen=lambda _: models_screen(models, folders, time.time()),
        warnings=tuple(warnings),
    )


def _fetch_all(pulls: Sequence[Pull]) -> None:
    """Fetch one after the other under one bar. One that fails does not keep the others from being fetched."""
    from mgpu.cli.live import live
    from mgpu.cli.pace import Pace
    from mgpu.cli.views.status import fetch_line

    missing = [each for each in pulls if not each.here]
    sizes = [each.total_bytes for each in missing]
    together = None if None in sizes else sum(size for size in sizes if size)
    before = 0
    pace = Pace()
    for each in pulls:
        number = f" ({missing.index(each) + 1} of {len(missing)})" if each in missing and len(missing) > 1 else ""
        with live(output, error=True) as draw:

            def on_progress(progress: Progress, before: int = before, number: str = number) -> None:
                done_bytes = before + progress.done_bytes
                rate = pace.look(progress.stage, done_bytes, time.monotonic())
                name = f"{progress.name}{number}"
                # Ollama tells what it fetches only when it does; of one model alone that is all there is.
                total_bytes = progress.total_bytes if together is None and not number else together
                shown = replace(progress, name=name, done_bytes=done_bytes, total_bytes=total_bytes)
                draw(lambda width: fetch_line(shown, rate, width))

            begun = time.monotonic()
            try:
                each.fetch(on_progress)
            except MgpuError as error:
                each.errors.append(error)
            each.seconds = time.monotonic() - begun
        before += 0 if each.here else each.total_bytes or 0
        _say(each)


def _say(each: Pull) -> None:
    from mgpu.cli.views.words import sizes
    from mgpu.units import seconds

    if each.fetched and not each.errors:
        name = each.path.name if each.path and each.path.is_file() else each.argument.removeprefix("hf:")
        output.note(f"fetch    {name}  {sizes(each.size_bytes or 0)} in {seconds(each.seconds or 0)}")


def _pulled(pulls: Sequence[Pull], interrupted: Interrupted | None = None) -> Result:
    from mgpu.cli.views.models import pulled_lines

    errors = [*([interrupted] if interrupted else []), *(error for each in pulls for error in each.errors)]
    return Result(
        command="pull",
        data={
            "models": [_pulled_data(each) for each in pulls],
            "fetched_bytes": sum(each.size_bytes or 0 for each in pulls if each.fetched),
        },
        screen=lambda _: pulled_lines([(each.argument, each.path) for each in pulls if each.done and not each.errors]),
        exit_code=errors[0].exit_code if errors else 0,
        errors=tuple(errors),
    )


def _pulled_data(each: Pull) -> dict[str, Any]:
    return {
        "model": each.argument,
        "format": each.format,
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
        "format": model.format,
        "profile": model.profile,
        "repository": model.repository,
        "quantisation": model.quantisation,
        "bytes": model.bytes,
        "total_bytes": model.total_bytes,
        "path": str(model.path) if model.path else None,
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
