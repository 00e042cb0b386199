"""A profile's YAML, or another file's that people write, as values, with the place of every key.

Less is read than YAML allows: one document, every key once, no anchors, no aliases, no tags. Plain words
are read by the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema), as editors do:
`yes` is text and `1:30` is not ninety.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from mgpu.profile_errors import KeyPath, Place, Problem, dotted, in_words, refusal, shortened

MOST_BYTES = 256 * 1024
MOST_VALUES = 2000
MOST_LEVELS = 16

_START = Place(line=1, column=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A file's values as dicts, lists and scalars, with the place of each key (of each entry, in a list)."""

    data: dict[str, object]
    places: Mapping[KeyPath, Place]
    problems: tuple[Problem, ...]

    def place_of(self, path: KeyPath) -> Place:
        """Return the place of `path`, or of the nearest key around it where it is missing."""
        while path not in self.places:
            path = path[:-1]
        return self.places[path]


def read_text(path: Path, *, kind: str = "a profile") -> str:
    """Return the text of a file, which messages call `kind`. Raises ProfileError when there is no readable UTF-8 text
    there."""
    file = str(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise refusal(file, None, f"is a folder, not {kind}")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
            raise refusal(file, None, "is not a regular file")
        with path.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise refusal(file, None, "there is no such file") from None
    except (OSError, ValueError) as error:
        raise refusal(file, None, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MOST_BYTES:
        raise refusal(file, None, f"is larger than {MOST_BYTES // 1024} KiB: not {kind}")
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise refusal(file, _START, "starts with a byte order mark: save it as UTF-8 without one")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        place = _place_at(data[: error.start].decode(), error.start)
        raise refusal(file, place, f"byte 0x{data[error.start]:02x} is not UTF-8 text") from None
    if "\0" in text:
        raise refusal(file, _place_at(text, text.index("\0")), "holds a NUL byte: not a text file")
    return text


def read_document(text: str, *, file: str, kind: str = "a profile", example: str = "name: …") -> Document:
    """Read YAML `text` into a Document; a key that is set twice is among its problems, the first one kept.

    Messages call the file `kind`, and show `example` to say what belongs there.
    Raises ProfileError for anything that is not one plain YAML mapping.
    """
    reader = _Reader(file=file, kind=kind)
    for event in _events(text, file):
        reader.take(event)
    root = reader.roots[0] if reader.roots else None
    if root is None:
        raise refusal(file, _START, f"is empty: {kind} is a group of keys, such as '{example}'")
    if not isinstance(root, dict):
        raise refusal(file, _START, f"is {in_words(root)}: {kind} is a group of keys, such as '{example}'")
    return Document(data=root, places=reader.places, problems=tuple(reader.problems))


@dataclass(slots=True, kw_only=True)
class _Open:
    """A list or mapping that is being filled. `keep` is False while the value of a repeated key passes."""

    container: dict[str, object] | list[object]
    path: KeyPath
    key: str | None = None
    keep: bool = True


@dataclass(slots=True, kw_only=True)
class _Reader:
    """Builds values and places from YAML events; not recursive, so that no depth of nesting can break it."""

    file: str
    kind: str
    places: dict[KeyPath, Place] = field(default_factory=lambda: {(): _START})
    problems: list[Problem] = field(default_factory=list)
    roots: list[object] = field(default_factory=list)
    inside: list[_Open] = field(default_factory=list)
    values: int = 0

    def take(self, event: yaml.Event) -> None:
        place = _place_of(event.start_mark) or _START
        if isinstance(event, yaml.DocumentStartEvent) and self.roots:
            raise refusal(self.file, place, f"a second document: {self.kind} is one, without '---' amid its keys")
        if isinstance(event, yaml.CollectionEndEvent):
            self.inside.pop()
        if not isinstance(event, yaml.NodeEvent):
            return
        self.values += 1
        if self.values > MOST_VALUES:
            raise refusal(self.file, place, f"holds more than {MOST_VALUES} values: not {self.kind}")
        self._refuse_indirection(event, place)
        at_key = bool(self.inside) and isinstance(self.inside[-1].container, dict) and self.inside[-1].key is None
        if isinstance(event, yaml.ScalarEvent):
            if at_key:
                self._take_key(event.value, place)
            else:
                self._take_value(_scalar(event), place)
            return
        if at_key:
            raise refusal(self.file, place, "a list or a group of keys stands where a key should")
        if len(self.inside) >= MOST_LEVELS:
            raise refusal(self.file, place, f"nests deeper than {MOST_LEVELS} levels: not {self.kind}")
        container: dict[str, object] | list[object] = {} if isinstance(event, yaml.MappingStartEvent) else []
        self.inside.append(_Open(container=container, path=self._take_value(container, place)))

    def _take_key(self, key: str, place: Place) -> None:
        around = self.inside[-1]
        path = (*around.path, key)
        around.key, around.keep = key, key not in around.container
        first = self.places.setdefault(path, place)
        if not around.keep:
            text = f"is set twice, first in line {first.line}; YAML would silently take the last"
            self.problems.append(Problem(place=place, key=dotted(path), text=text))

    def _take_value(self, value: object, place: Place) -> KeyPath:
        """Put `value` where it belongs and return its path."""
        if not self.inside:
            self.roots.append(value)
            return ()
        around = self.inside[-1]
        if isinstance(around.container, list):
            path: KeyPath = (*around.path, len(around.container))
            around.container.append(value)
            self.places.setdefault(path, place)
            return path
        assert around.key is not None
        path = (*around.path, around.key)
        if around.keep:
            around.container[around.key] = value
        around.key = None
        return path

    def _refuse_indirection(self, event: yaml.NodeEvent, place: Place) -> None:
        if event.anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            why = f"a few lines of anchors and aliases can unfold to gigabytes, so {self.kind} has none"
            raise refusal(self.file, place, f"{shortened(sign + event.anchor)}: {why}; write the value out")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise refusal(self.file, place, f"the tag {shortened(str(tag))}: {self.kind} holds plain values only")


def _events(text: str, file: str) -> Iterator[yaml.Event]:
    try:
        yield from yaml.parse(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        problem = shortened(error.problem or str(error))
        if "'\\t'" in problem:
            problem = "a tab where YAML allows only spaces"
        place = _place_of(error.problem_mark or error.context_mark)
        raise refusal(file, place, f"is not YAML: {problem}") from None
    except yaml.reader.ReaderError as error:
        place = _place_at(text, error.position)
        raise refusal(file, place, f"character {error.character:#x} is not allowed in YAML") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # PyYAML lets "\U99999999" out as ValueError
        raise refusal(file, None, f"is not YAML: {shortened(str(error))}") from None


# A number of more than 18 digits is the size of nothing here: it stays text, as fractions do, and is refused
# where a whole number is wanted.
_NUMBER = re.compile(r"[-+]?[0-9]{1,18}")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def _scalar(event: yaml.ScalarEvent) -> str | int | None:
    text: str = event.value
    if event.style is not None:  # quoted, or a block
        return text
    if text in _WORDS:
        return _WORDS[text]
    return int(text) if _NUMBER.fullmatch(text) else text


def _place_of(mark: object) -> Place | None:
    line, column = getattr(mark, "line", None), getattr(mark, "column", None)
    return None if line is None or column is None else Place(line=line + 1, column=column + 1)


def _place_at(text: str, index: int) -> Place:
    before = text[:index]
    return Place(line=before.count("\n") + 1, column=len(before) - before.rfind("\n"))
