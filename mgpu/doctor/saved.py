"""An inspection in a file: saved without what names its owner, and read back from files of unknown origin."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mgpu.errors import Missing
from mgpu.machine.inspection import SCHEMA_VERSION, Inspection, inspection_from_json
from mgpu.machine.redaction import redacted
from mgpu.machine.snapshot import to_json

SCHEMA = "mgpu.inspection/1"
# Hundreds of times what eight cards and a full kernel log need.
_LARGEST_FILE_BYTES = 8 * 2**20
_LONGEST_LIST = 4096
_OUT_OF_RANGE = 2**63
_HINT = "make one on the machine in question: mgpu doctor --save FILE"

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASS|CREDENTIAL|(^|_)KEY", re.IGNORECASE)
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)
_MAC = re.compile(r"\b[0-9a-f]{2}(:[0-9a-f]{2}){5}\b", re.IGNORECASE)
_IPV4 = re.compile(r"(?<![\d.])(?!127\.0\.0\.1|0\.0\.0\.0)\d{1,3}(\.\d{1,3}){3}(?![\d.])")
_HOME = re.compile(r"(?<=/home/)[^/\s:'\"]+")
# All else of a kernel's command line names disks, addresses and people.
_KERNEL_OPTION = re.compile(
    r"(iommu|amd_iommu|intel_iommu|pci|pcie_\w+|pcie_aspm|nokaslr|kaslr|nomodeset|isolcpus|numa_balancing|hugepages?"
    r"|(rd\.driver\.|module_|modprobe\.)blacklist|(nvidia|nouveau|amdgpu|i915|xe|vfio)[\w.-]*)(=.*)?"
)


def saved_text(inspection: Inspection) -> str:
    """Return the inspection as the text of a file: a bug report and a test's machine in one.

    Cards' UUIDs become numbered ones, and host name, home folders, addresses, secrets in variables and the kernel's
    options that are no concern of a diagnosis are left out.
    """
    data = to_json(redacted(inspection))
    assert isinstance(data, dict)
    host: Any = data["host"]
    for key in ("environment", "nccl_configuration"):
        host[key] = [[name, "(hidden)" if _SECRET_NAME.search(name) else value] for name, value in host[key]]
    if host["kernel_command_line"] is not None:
        words = host["kernel_command_line"].split()
        host["kernel_command_line"] = " ".join(word for word in words if _KERNEL_OPTION.fullmatch(word))
    return json.dumps({"schema": SCHEMA, "inspection": _each_text(data, _Redaction())}, indent=1) + "\n"


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
    """Return the inspection that `save` wrote to a file. Raises Missing (code "replay-unusable") for a file that
    cannot be read, is no such file, or comes from a newer mgpu."""
    try:
        # A pipe that nobody writes to must not block.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _unusable(path, "is no regular file")
            content = file.read(_LARGEST_FILE_BYTES + 1)
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


class _Redaction:
    """Takes identities and addresses out of texts; the same UUID becomes the same number everywhere."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __call__(self, text: str) -> str:
        text = _UUID.sub(self._numbered, text)
        return _HOME.sub("user", _IPV4.sub("(address)", _MAC.sub("(address)", text)))

    def _numbered(self, match: re.Match[str]) -> str:
        number = self._numbers.setdefault(match[0].lower(), len(self._numbers))
        return f"00000000-0000-0000-0000-{number:012d}"


def _each_text(value: object, change: Callable[[str], str]) -> object:
    if isinstance(value, dict):
        return {key: _each_text(entry, change) for key, entry in value.items()}
    if isinstance(value, list):
        return [_each_text(entry, change) for entry in value]
    return change(value) if isinstance(value, str) else value


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
        if isinstance(entry, int | float) and not -_OUT_OF_RANGE < entry < _OUT_OF_RANGE:
            raise ValueError(f"{at}: out of range")


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
