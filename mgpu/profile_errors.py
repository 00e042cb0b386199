"""What is wrong with a profile, in words: file, line, column, key and the nearest right spelling."""

from __future__ import annotations

import difflib
import re
import shlex
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError

from mgpu.errors import ProfileError

MOST_PROBLEMS = 10

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Place:
    """A place in a file; lines and columns count from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong. `key` is the path of the key ("model.heads"), "" for the file as a whole."""

    place: Place | None
    key: str
    text: str


def profile_error(file: str, problems: list[Problem]) -> ProfileError:
    """Return the error that lists `problems` in the order of the file, one a line, the first ten of them."""
    start = Place(line=0, column=0)
    ordered = sorted(problems, key=lambda problem: problem.place or start)
    lines = [_sentence(file, problem) for problem in ordered[:MOST_PROBLEMS]]
    if len(ordered) > MOST_PROBLEMS:
        lines.append(f"{file}: and {len(ordered) - MOST_PROBLEMS} more problems")
    readable = any(problem.place for problem in problems)
    hint = f"mend the file, then: mgpu profiles check {shlex.quote(file)}" if readable else "mgpu profiles list"
    return ProfileError("\n".join(lines), hint=hint)


def refusal(file: str, place: Place | None, text: str) -> ProfileError:
    """Return the error for a file of which nothing more can be said than `text`."""
    return profile_error(file, [Problem(place=place, key="", text=text)])


def explain(error: ValidationError, model: type[BaseModel], place_of: Callable[[KeyPath], Place]) -> list[Problem]:
    """Return in words what pydantic found wrong with an input of `model`; `place_of` finds a path's place."""
    problems = []
    for details in error.errors(include_url=False):
        path = tuple(part for part in details["loc"] if part != "[key]")
        words = _words(details["type"], details, path, model)
        problems.append(Problem(place=place_of(path), key=dotted(path), text=words))
    return problems


def nearest(word: str, choices: Iterable[str], *, most: int = 1) -> tuple[str, ...]:
    """Return up to `most` choices spelt like `word` or begun by it, whatever its case, the likest first."""
    by_folded = {choice.lower(): choice for choice in choices}
    folded = word[:64].lower()
    found = difflib.get_close_matches(folded, by_folded, n=most, cutoff=0.6)
    if not found and len(folded) > 2:
        found = [choice for choice in by_folded if choice.startswith(folded)]
    return tuple(by_folded[choice] for choice in found[:most])


def dotted(path: KeyPath) -> str:
    """Return a path as it is written in messages: `quantisations.Q4_K_M.files[0]`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{shortened(part)}" for part in path]
    return "".join(parts).removeprefix(".")


def in_words(value: object) -> str:
    """Return a value as messages quote it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a group of keys"
    if isinstance(value, (list, tuple)):
        return "a list"
    return repr(shortened(value)) if isinstance(value, str) else str(value)


def shortened(text: str) -> str:
    """Return `text`, cut where it is too long for a message."""
    return text if len(text) <= 60 else f"{text[:57]}..."


# What people copy from a config.json of Hugging Face or the metadata of a GGUF, and what it is called here.
_ELSEWHERE_CALLED = {
    "block_count": "layers",
    "head_count": "heads",
    "head_count_kv": "kv_heads",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_attention_heads": "heads",
    "num_experts": "experts",
    "num_experts_per_tok": "experts_used",
    "num_hidden_layers": "layers",
    "num_key_value_heads": "kv_heads",
    "num_local_experts": "experts",
    "tie_word_embeddings": "tied_embeddings",
    "vocab_size": "vocabulary",
}

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "mapping_type": "a group of keys",
    "dict_type": "a group of keys",
    "model_type": "a group of keys",
    "model_attributes_type": "a group of keys",
}


def _words(kind: str, details: typing.Any, path: KeyPath, root: type[BaseModel]) -> str:
    value, context = details["input"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(path, root)
    if kind == "missing":
        return "is missing"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        what = "key" if details["loc"][-1] == "[key]" else f"value {in_words(value)}"
        return f"unknown {what}; {_did_you_mean(nearest(str(value), choices), choices)}"
    if kind in _EXPECTED:
        quotes = "; put it in quotes" if kind == "string_type" and isinstance(value, int) else ""
        return f"expected {_EXPECTED[kind]}, found {in_words(value)}{quotes}"
    if kind == "greater_than_equal":
        return f"must be at least {context['ge']}, is {in_words(value)}"
    if kind == "less_than_equal":
        return f"must be at most {context['le']}, is {in_words(value)}"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    if kind == "string_too_long":
        return f"must be at most {context['max_length']} characters long"
    if kind == "string_pattern_mismatch":
        return f"{in_words(value)} is not of the form '{_example(path, root)}'"
    return str(details["msg"])


def _unknown_key(path: KeyPath, root: type[BaseModel]) -> str:
    key = str(path[-1])
    choices = _model_at(path[:-1], root).model_fields
    translated = _ELSEWHERE_CALLED.get(key, key)
    guesses = (translated,) if translated in choices else nearest(key, choices)
    for parent, field in root.model_fields.items():
        inner = _model_in(field.annotation)
        if not guesses and inner is not None and parent not in path and translated in inner.model_fields:
            return f"unknown key; did you mean '{parent}.{translated}'?"
    return f"unknown key; {_did_you_mean(guesses, choices)}"


def _did_you_mean(guesses: tuple[str, ...], choices: Iterable[str]) -> str:
    return f"did you mean '{guesses[0]}'?" if guesses else f"known are {', '.join(choices)}"


def _example(path: KeyPath, root: type[BaseModel]) -> object:
    key = next(part for part in reversed(path) if isinstance(part, str))
    examples = _model_at(path, root).model_fields[key].examples
    assert examples, f"{key} has a pattern and no example"
    return examples[0][0] if isinstance(examples[0], list) else examples[0]


def _model_at(path: KeyPath, root: type[BaseModel]) -> type[BaseModel]:
    model = root
    for part in path:
        if part in model.model_fields:
            model = _model_in(model.model_fields[str(part)].annotation) or model
    return model


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for arg in typing.get_args(annotation) if (model := _model_in(arg))), None)


def _sentence(file: str, problem: Problem) -> str:
    where = file if problem.place is None else f"{file}:{problem.place.line}:{problem.place.column}"
    text = f"{where}: {problem.key}: {problem.text}" if problem.key else f"{where}: {problem.text}"
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
