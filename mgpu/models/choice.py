"""Which of a repository's files are one model in the wanted quantisation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from mgpu.errors import UsageError

# What is taken where several quantisations are there and none is asked for: the usual balance of size and quality.
USUAL_QUANTISATION = "Q4_K_M"
WHOLE_MODEL = "model.safetensors"


def models_among(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the GGUF models among `paths`: all parts of each in order, by their path without the part's number.

    Vision projectors and importance matrices, which lie beside models, are left out.
    """
    models: dict[str, tuple[str, ...]] = {}
    for path in sorted(paths):
        if path.lower().endswith(".gguf") and not _NO_MODEL.search(path):
            stem = _PART_NUMBER.sub("", path)
            models[stem] = (*models.get(stem, ()), path)
    return models


def part_count(path: str) -> int:
    """Return of how many parts a model is by the name of one of them: 1 if it is not split."""
    match = _PART_NUMBER.search(path)
    return int(match[1]) if match else 1


def choose_model(
    models: Mapping[str, tuple[str, ...]], quantisation: str | None, *, repository: str
) -> tuple[str, ...]:
    """Return the files of the one among `models` (see `models_among`) that is wanted, the shortest name of several.

    Without a `quantisation` it is the only one there is, else Q4_K_M. Raises UsageError (code "quantisation-unknown")
    naming those that are there; `repository` is what the message calls the place.
    """
    wanted = quantisation or USUAL_QUANTISATION
    fitting = list(models) if quantisation is None and len(models) == 1 else _in_quantisation(models, wanted)
    if not fitting:
        raise no_quantisation(models, wanted, repository)
    return models[min(fitting, key=lambda stem: (len(stem), stem))]


def has_quantisation(models: Iterable[str], quantisation: str) -> bool:
    """Return whether one of `models` (see `models_among`) is in `quantisation`."""
    return bool(_in_quantisation(models, quantisation))


def no_quantisation(models: Iterable[str], wanted: str, repository: str, *, also: str | None = None) -> UsageError:
    """Return the error for a repository that has nothing in `wanted`: it names what it has, GGUF `models` and besides
    them safetensors in the quantisation `also`."""
    stems = list(models)
    names = sorted({name for stem in stems if (name := quantisation_in(stem))}) or stems[:5]
    there = ", ".join([*names, *([f"{also} (safetensors)"] if also else [])])
    return UsageError(
        f"{repository} has no file in {wanted}",
        code="quantisation-unknown",
        hint=f"it has {there}" if there else "leave it out",
    )


def folder_files(paths: Iterable[str]) -> tuple[str, ...]:
    """Return of a repository's `paths` those that belong to a model folder beside its weights: configuration, tokenizer
    and chat template. Never a program: mgpu runs no code that comes with a model."""
    return tuple(sorted(path for path in paths if _BESIDE_WEIGHTS.fullmatch(path)))


def weight_files(paths: Iterable[str], indexed: Iterable[str] | None) -> tuple[str, ...]:
    """Return of a repository's `paths` the safetensors that engines load: those that its index names (None: it has no
    index), else model.safetensors, else all. It may hold the same weights in another format beside them."""
    found = sorted(path for path in paths if path.endswith(".safetensors") and "/" not in path)
    if indexed is not None:
        wanted = set(indexed)
        return tuple(path for path in found if path in wanted)
    if WHOLE_MODEL in found:
        return (WHOLE_MODEL,)
    return tuple(path for path in found if not path.startswith("consolidated")) or tuple(found)


def quantisation_in(path: str) -> str | None:
    """Return the quantisation that a file's name tells, or else its folder's, in upper case; None if none tells it."""
    match = _QUANTISATION.search(PurePosixPath(path).name) or _QUANTISATION.search(path)
    return match[0].upper() if match else None


_BESIDE_WEIGHTS = re.compile(
    r"(?:config|generation_config|(?:hf_)?quant\w*_config|(?:\w+_)?(?:pre)?processor_config|special_tokens_map"
    r"|added_tokens|tekken)\.json"
    r"|vocab\.(?:json|txt|bpe)|merges\.txt|[\w.+-]+\.(?:model|tiktoken)"
    r"|(?:tokenizer|chat_template)[\w.+-]*\.(?:json|jinja|txt)"
    r"|model\.safetensors\.index\.json"
)
_NO_MODEL = re.compile(r"(?i)(^|[/._-])(mmproj|imatrix)")
_PART_NUMBER = re.compile(r"-\d{5}-of-(\d{5})(?=\.gguf$)")
_QUANTISATION = re.compile(r"(?i)(?<![A-Z0-9])(I?Q\d(_[A-Z0-9]+)*|T?BF16|F16|F32|MXFP4)(?![A-Z0-9])")


def _in_quantisation(stems: Iterable[str], quantisation: str) -> list[str]:
    exactly = re.compile(rf"(?i)(?<![A-Z0-9_]){re.escape(quantisation)}(?![A-Z0-9_])")
    return [stem for stem in stems if exactly.search(stem)]
