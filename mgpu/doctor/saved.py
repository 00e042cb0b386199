"""An inspection in a file: saved without what names its owner, and read back from files of unknown origin."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mgpu.errors import Missing
from mgpu.machine.inspection import SCHEMA_VERSION, Inspection, inspection_from_json
from mgpu.machine.redaction import anonymous, kernel_options
from mgpu.machine.snapshot import to_json

SCHEMA = "mgpu.inspection/1"
# As a file's name: what is piped in, or standard output.
STANDARD_STREAM = Path("-")
# Hundreds of times what eight cards and a full kernel log need.
_LARGEST_FILE_BYTES = 8 * 2**20
_LONGEST_LIST = 4096
_OUT_OF_RANGE = 2**63
_HINT = "make one on the machine in question: mgpu doctor --save FILE"

# What values of fields with these names look like: some of them get into commands. Of pairs the first is a name.
_VERSION = re.compile(r"\w[\w.+-]{0,63}")
_ADDRESS = re.compile(r"[0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}(\.[0-7])?")
_NAME = re.compile(r"[A-Za-z_]\w{0,99}", re.ASCII)
_KINDS = {
    **dict.fromkeys(("address", "parent", "bus_id", "remote_bus_id"), _ADDRESS),
    **dict.fromkeys(("loaded_version", "library_version", "on_disk_version", "fabric_manager_version"), _VERSION),
    **dict.fromkeys(("nccl_version", "module_version", "gfx_override", "gfx"), _VERSION),
    **dict.fromkeys(("environment", "nccl_configuration"), _NAME),
    "uuid": re.compile(r"[\w/-]{1,100}", re.ASCII),
    "unit": re.compile(r"[\w.@:\\-]{1,255}", re.ASCII),
}
# The same names mean other things elsewhere.
_PLACES = {"inspection.machine.driver.version": _VERSION, "inspection.machine.driver.cuda": _VERSION}
_UNIT_NAME = re.compile(r"inspection\.host\.unit_variables\[\d+\]\.name")


def saved_text(inspection: Inspection) -> str:
    """Return the inspection as the text of a file: a bug report and a test's machine in one.

    Cards' UUIDs become numbered ones, and names of computers, people and their programs, home folders, addresses,
    secrets in variables and the kernel's options that are no concern of a diagnosis are left out.
    """
    data = to_json(anonymous(inspection))
    assert isinstance(data, dict)
    host: Any = data["host"]
    if host["kernel_command_line"] is not None:
        host["kernel_command_line"] = kernel_options(host["kernel_command_line"])
    return json.dumps({"schema": SCHEMA, "inspection": data}, indent=1) + "\n"


def save(inspection: Inspection, path: Path) -> None:
    """Write `saved_text(inspection)` to a file, whole or not at all. Raises Missing where that cannot be done."""
    try:
        if path.exists() and not path.is_file():  # a device or a pipe is written to, never replaced
            path.write_text(saved_text(inspection), encoding="utf-8")
            return
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            fresh.write_text(saved_text(inspection), encoding="utf-8")
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Missing(
            f"--save {str(path)[:200]!r} cannot be written: {reason}",
            code="file-unwritable",
            hint="name a file in a folder of your own: mgpu doctor --save machine.json",
        ) from None


def replay(path: Path) -> Inspection:
    """Return the inspection that `save` wrote to a file, or what is piped in for `STANDARD_STREAM`. Raises Missing
    (code "replay-unusable") for a file that cannot be read, is no such file, or comes from a newer mgpu."""
    try:
        content = _piped(path) if path == STANDARD_STREAM else _content(path)
    except (OSError, ValueError) as error:
        raise _unusable(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > _LARGEST_FILE_BYTES:
        raise _unusable(path, f"is larger than {_LARGEST_FILE_BYTES // 2**20} MiB, so it is no saved inspection")
    try:
        return _inspection(json.loads(content.decode("utf-8-sig"), parse_constant=_refuse))
    except UnicodeDecodeError:
        raise _unusable(path, "is not text in UTF-8") from None
    except json.JSONDecodeError as error:
        raise _unusable(path, f"is not JSON: line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise _unusable(path, "is nested too deeply to be a saved inspection") from None
    except ValueError as error:
        raise _unusable(path, str(error)[:300]) from None


def _content(path: Path) -> bytes:
    # A pipe that nobody writes to must not block.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise _unusable(path, "is no regular file")
        return file.read(_LARGEST_FILE_BYTES + 1)


def _piped(path: Path) -> bytes:
    if sys.stdin is None or sys.stdin.isatty():
        raise _unusable(path, "reads what is piped in, and nothing is")
    return sys.stdin.buffer.read(_LARGEST_FILE_BYTES + 1)


def _inspection(data: object) -> Inspection:
    """The inspection of a parsed file. Raises ValueError in words that follow the file's name."""
    if not isinstance(data, dict) or not isinstance(data.get("schema"), str) or "inspection" not in data:
        raise ValueError("is no saved inspection")
    schema, inspection = data["schema"], data["inspection"]
    name, _, version = schema.partition("/")
    if name != SCHEMA.partition("/")[0]:
        raise ValueError(f"is no saved inspection: its schema is {schema[:60]!r}")
    saved_version = inspection.get("schema_version", SCHEMA_VERSION) if isinstance(inspection, dict) else None
    if schema != SCHEMA or (isinstance(saved_version, int) and saved_version > SCHEMA_VERSION):
        raise ValueError(f"was saved by another mgpu (version {version[:20] or '?'}); this one reads version 1")
    _require_sane(inspection, "inspection")
    found = inspection_from_json(inspection)
    _require_joined(found)
    return found


def _require_sane(value: object, path: str) -> None:
    """Refuse what no machine has: it could only be meant to harm a terminal or a sum."""
    for at, entry in _leaves(value, path):
        if isinstance(entry, str) and not entry.isprintable():
            raise ValueError(f"{at}: holds characters that cannot be printed")
        if isinstance(entry, str) and (kind := _kind(at)) and not kind.fullmatch(entry):
            raise ValueError(f"{at}: {entry[:60]!r} is not what belongs there")
        if isinstance(entry, int | float) and not -_OUT_OF_RANGE < entry < _OUT_OF_RANGE:
            raise ValueError(f"{at}: out of range")


def _kind(place: str) -> re.Pattern[str] | None:
    """What a text at a place must look like, None where it may be any."""
    if _UNIT_NAME.fullmatch(place):
        return _NAME
    *_, field = place.rsplit(".", 1)
    pair = re.fullmatch(r"(\w+)\[\d+\]\[0\]", field)
    return _PLACES.get(place) or _KINDS.get(pair[1] if pair else field)


def _leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _leaves(entry, f"{path}.{key}"[:200])
    elif isinstance(value, list):
        if len(value) > _LONGEST_LIST:
            raise ValueError(f"{path}: {len(value)} entries, at most {_LONGEST_LIST} are read")
        for position, entry in enumerate(value):
            yield from _leaves(entry, f"{path}[{position}]")
    else:
        yield path, value


def _require_joined(found: Inspection) -> None:
    """Refuse links between cards that are not there, and two cards with one index. Raises ValueError."""
    indices = [gpu.index for gpu in found.machine.gpus]
    if len(set(indices)) != len(indices) or min(indices, default=0) < 0:
        raise ValueError("inspection.machine.gpus: two cards have the same index, or one is negative")
    if any(gpu not in indices for link in found.machine.links for gpu in (link.a, link.b)):
        raise ValueError("inspection.machine.links: names a card that is not in machine.gpus")


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not a number of JSON")


def _unusable(path: Path, reason: str) -> Missing:
    shown = str(path)
    shown = ascii(shown[:200] + ("..." if len(shown) > 200 else ""))
    return Missing(f"--replay {shown} {reason}", code="replay-unusable", hint=_HINT)
