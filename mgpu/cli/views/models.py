"""Models on disk as lines of text; paths are never cut off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mgpu.cli.views.status import home_path
from mgpu.cli.views.words import sizes
from mgpu.units import seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mgpu.models.local import LocalModel

_MINUTE_S = 60
_FORMATS = {"gguf": "GGUF", "safetensors": "safetensors", "ollama": "Ollama"}


def models_screen(models: Sequence[LocalModel], folders: Sequence[Path], now: float) -> Iterator[RenderableType]:
    """Yield the screen of `mgpu ls`: two lines for each model, as the second one is a path."""
    from rich.text import Text

    where = " or ".join(home_path(folder) for folder in folders)
    if not models:
        yield f"no model in {where}"
        yield ""
        yield "  mgpu pull llama-8b          fetches one"
        return
    widths = [max(len(cells[column]) for cells in map(_cells, models)) for column in range(4)]
    for model in models:
        name, kind, quantisation, size = (f"{cell:<{width}}" for cell, width in zip(_cells(model), widths, strict=True))
        words = f"{name}   {kind}   {quantisation}   {size.strip():>{widths[3]}}   {_used(model, now)}"
        yield Text.assemble(words, *([(f"   {model.state}", "bold red")] if model.state != "complete" else []))
        yield Text(f"  {_where(model.path)}", style="dim")
        if model.state != "complete":
            yield f"  {_what_now(model)}"
    yield ""
    count = f"{len(models)} model" + ("s" if len(models) > 1 else "")
    places = where.replace(" or ", " and ") + (" and Ollama" if any(each.format == "ollama" for each in models) else "")
    yield f"{count}, {sizes(sum(model.bytes for model in models))} in {places}"


def pulled_lines(pulled: Sequence[tuple[str, Path | None]]) -> Iterator[str]:
    """Yield one line for each model that is here: what was asked for, and its file, its folder, or Ollama."""
    there = [(argument, _where(path)) for argument, path in pulled]
    width = max((len(argument) for argument, _ in there), default=0)
    for argument, path in there:
        yield f"{argument:<{width}}   {path}"


def _where(path: Path | None) -> str:
    return home_path(path) if path else "in Ollama"


def _cells(model: LocalModel) -> tuple[str, str, str, str]:
    size = (
        sizes(model.bytes) if model.total_bytes in (None, model.bytes) else sizes(model.bytes, model.total_bytes or 0)
    )
    return model.argument, _FORMATS[model.format], model.quantisation or "?", size


def _used(model: LocalModel, now: float) -> str:
    age_s = now - model.last_used
    return "used just now" if age_s < _MINUTE_S else f"used {seconds(age_s)} ago"


def _what_now(model: LocalModel) -> str:
    if model.state == "broken" or not (model.profile or model.repository):
        return model.problem or ""
    return f"{model.problem}: mgpu pull {model.argument} goes on"
