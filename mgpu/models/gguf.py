"""Reading the header of a GGUF file: its metadata and its tensor table, never its data.

The vocabulary and other long arrays are skipped, so a header with 128 000 tokens takes some 15 ms. A file is
never trusted: whatever it holds, the answer is a header or a `BadModel` that says what is wrong, in bounded
time and memory. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import difflib
import io
import os
import re
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mgpu.errors import BadModel, Missing
from mgpu.models.gguf_stream import LENGTH, Broken, Ended, Stream
from mgpu.models.tensors import GGML_TYPES_BY_ID, Tensor


@dataclass(frozen=True, slots=True)
class LongValue:
    """A value that was skipped, an array of strings or of many numbers or a long string: only its length."""

    length: int


Value = int | float | str | tuple[int | float, ...] | LongValue


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What a GGUF file, or a model split over several, says of itself.

    `parts` are its files in order, `file_bytes` their sizes together. `metadata` holds numbers, short strings
    and short arrays of numbers; everything longer is a `LongValue`. A split model's metadata is that of its
    first part.
    """

    path: Path
    parts: tuple[Path, ...]
    version: int
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    file_bytes: int


def read_gguf(path: Path) -> GgufHeader:
    """Read the header of the GGUF file at `path`, and of the parts beside it if the model is split.

    Raises Missing (`model-missing`, `model-unreadable`) if there is no such file or it may not be read, and
    BadModel if it is not a whole GGUF file: of another format, truncated, corrupt, big-endian, or with a part
    missing.
    """
    header = _read_file(path)
    count = header.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return header
    names = _part_names(header, count)
    missing = [name for name in names if not _is_there(path.with_name(name))]
    if missing:
        first = missing[0]
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise BadModel(
            f"part {names.index(first) + 1} of {count} is missing: no {first}{more} beside {path.name}",
            code="model-incomplete",
            hint="download the missing part into the same folder",
        )
    return join_parts([header, *(_read_file(path.with_name(name)) for name in names[1:])])


def read_gguf_start(start: bytes, *, path: Path, size: int) -> GgufHeader | None:
    """Read the header from the first bytes of a file of `size` bytes; None if they do not hold all of it.

    `path` is what messages call the file. A part of a split model is read alone: `join_parts` makes them one. Raises
    BadModel as `read_gguf` does.
    """
    stream = Stream(io.BytesIO(start), size)
    try:
        header = _read_header(path, stream)
    except Ended:
        return None
    except Broken as error:
        raise _bad(path, str(error)) from error
    return header if stream.position <= len(start) else None


def join_parts(headers: Sequence[GgufHeader]) -> GgufHeader:
    """Return the header of a whole model from those of all its parts, in order. Raises BadModel if they are not."""
    first = headers[0]
    count = first.metadata.get("split.count", 1)
    if isinstance(count, int) and count > 1:
        _part_names(first, count)
    tensors = tuple(tensor for part in headers for tensor in part.tensors)
    expected = first.metadata.get("split.tensors.count", len(tensors))
    if max(count if isinstance(count, int) else 1, 1) != len(headers):
        raise _bad(first.path, f"it is one of {count} parts, and {len(headers)} are there")
    if len({tensor.name for tensor in tensors}) != len(tensors) or expected != len(tensors):
        raise _bad(first.path, "its parts do not belong together: their tensors repeat or are not as many as it says")
    return replace(
        first,
        parts=tuple(part.path for part in headers),
        tensors=tensors,
        file_bytes=sum(part.file_bytes for part in headers),
    )


# No real header comes near these; they bound the time and memory that a hostile one can cost.
_MAX_KEYS = 4096
_MAX_TENSORS = 100_000
_MAX_STRINGS = 4_000_000
_MAX_NAME_BYTES = 512
_MAX_KEPT_BYTES = 1024
_MAX_KEPT_ITEMS = 1024
_MAX_DIMENSIONS = 4
_MAX_SPLITS = 10_000

_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# Value type to struct format: the numbers of GGUF, little-endian.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def _read_file(path: Path) -> GgufHeader:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            found = next(path.glob("*.gguf"), None)
            hint = f"it holds {found.name}: give that file" if found else "give the path of a .gguf file"
            raise BadModel(f"{path} is a folder, not a GGUF file", hint=hint)
        if not stat.S_ISREG(status.st_mode):
            raise BadModel(f"{path} is not a regular file", hint="give the path of a .gguf file")
        with os.fdopen(_open_unnoticed(path), "rb", buffering=0) as file:
            return _read_header(path, Stream(file, status.st_size))
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a path with a NUL
        raise Missing(f"there is no file {str(path)!r}", code="model-missing", hint=_nearest(path)) from error
    except OSError as error:
        message = f"{path} cannot be read: {error.strerror or error}"
        raise Missing(message, code="model-unreadable", hint=f"ls -l {path}") from error
    except Broken as error:
        raise _bad(path, str(error)) from error


def _open_unnoticed(path: Path) -> int:
    """A descriptor that leaves the file's time of access alone: that says when an engine last read the model."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOATIME)
    except OSError:  # only the owner may do that
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _read_header(path: Path, stream: Stream) -> GgufHeader:
    version = _read_version(stream)
    tensor_count, key_count = stream.number("Q"), stream.number("Q")
    if tensor_count > _MAX_TENSORS:
        raise Broken(f"its header claims {tensor_count:,} tensors")
    if key_count > _MAX_KEYS:
        raise Broken(f"its header claims {key_count:,} metadata keys")
    metadata: dict[str, Value] = {}
    for _ in range(key_count):
        key = stream.string(_MAX_NAME_BYTES)
        if not key:
            raise Broken("it has a metadata key that is empty or too long")
        if key in metadata:
            raise Broken(f"it has the metadata key {key[:80]!r} twice")
        metadata[key] = _read_value(stream, stream.number("I"))
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise Broken("its alignment is not a power of two")
    tensors: dict[str, Tensor] = {}
    data_end = 0
    for _ in range(tensor_count):
        tensor, offset = _read_tensor(stream)
        if tensor.name in tensors:
            raise Broken(f"it has the tensor {tensor.name!r} twice")
        # The engine insists on tensors that lie one after the other in the table's order.
        if offset != _aligned(data_end, alignment):
            raise Broken(f"its tensor {tensor.name!r} is not where it must be")
        data_end = offset + tensor.bytes
        tensors[tensor.name] = tensor
    expected = _aligned(stream.position, alignment) + data_end if tensors else stream.position
    if expected > stream.size:
        lost = expected - stream.size
        raise BadModel(
            f"the download is incomplete: {lost:,} of the {expected:,} bytes of {path} are missing",
            code="model-incomplete",
            hint="download it again",
        )
    return GgufHeader(
        path=path,
        parts=(path,),
        version=version,
        metadata=metadata,
        tensors=tuple(tensors.values()),
        file_bytes=stream.size,
    )


def _read_version(stream: Stream) -> int:
    if stream.size == 0:
        raise Broken("it is empty")
    magic = stream.take(min(8, stream.size))
    if magic[:4] != b"GGUF":
        raise Broken(_FORMATS.get(magic[:4], "it is no GGUF file") + f" (it begins with {magic[:4]!r})")
    if len(magic) < 8:
        raise Broken("it ends within its header")
    (version,) = struct.unpack("<I", magic[4:])
    if version in (2, 3):
        return int(version)
    if version & 0xFFFF == 0:
        raise Broken("it was written for big-endian machines")
    if version == 1:
        raise Broken("it has the old format GGUF version 1, which engines no longer load")
    raise Broken(f"it has GGUF version {version}, which this mgpu does not know")


_FORMATS = {
    b"vers": "it is a Git LFS pointer, not the file itself",
    b"<!do": "it is a web page, not a model",
    b"<!DO": "it is a web page, not a model",
    b"<htm": "it is a web page, not a model",
    b"PK\x03\x04": "it is a zip archive or a PyTorch file, no GGUF file",
    b"ggml": "it has the old format GGML, which engines no longer load",
    b"ggjt": "it has the old format GGJT, which engines no longer load",
}


def _read_value(stream: Stream, kind: int) -> Value:
    if kind in _NUMBERS:
        code = _NUMBERS[kind]
        (value,) = struct.unpack("<" + code, stream.take(struct.calcsize(code)))
        return int(value) if code == "?" else value
    if kind == _STRING:
        start = stream.position
        text = stream.string(_MAX_KEPT_BYTES)
        return LongValue(stream.position - start - LENGTH.size) if text is None else text
    if kind != _ARRAY:
        raise Broken(f"it has metadata of the unknown type {kind}")
    kind, count = stream.number("I"), stream.number("Q")
    if kind == _STRING:
        if count > _MAX_STRINGS:
            raise Broken(f"its header claims an array of {count:,} strings")
        stream.skip_strings(count)
        return LongValue(count)
    if kind not in _NUMBERS:
        raise Broken(f"it has an array of the unknown type {kind}")
    code = _NUMBERS[kind]
    size = count * struct.calcsize(code)
    if count > _MAX_KEPT_ITEMS:
        stream.skip(size)
        return LongValue(count)
    return struct.unpack(f"<{count}{code}", stream.take(size))


def _read_tensor(stream: Stream) -> tuple[Tensor, int]:
    name = stream.string(_MAX_NAME_BYTES)
    if not name:
        raise Broken("it has a tensor whose name is empty or too long")
    name = name if name.isprintable() else repr(name)
    count = stream.number("I")
    if not 1 <= count <= _MAX_DIMENSIONS:
        raise Broken(f"its tensor {name!r} has {count:,} dimensions")
    dimensions = struct.unpack(f"<{count}q", stream.take(8 * count))
    kind, offset = stream.number("I"), stream.number("Q")
    if kind not in GGML_TYPES_BY_ID:
        raise Broken(f"its tensor {name!r} has the type {kind}, which this mgpu does not know")
    tensor = Tensor(name, dimensions, GGML_TYPES_BY_ID[kind])
    if min(dimensions) < 1 or dimensions[0] % tensor.type.block_elements or tensor.elements >= 1 << 62:
        raise Broken(f"its tensor {name!r} has the impossible shape {dimensions}")
    return tensor, offset


def _part_names(header: GgufHeader, count: int) -> list[str]:
    """The file names of a split model's parts, which engines derive from the first one's."""
    path = header.path
    match = _SPLIT_NAME.fullmatch(path.name)
    if count > _MAX_SPLITS or not match or int(match[3]) != count:
        raise _bad(path, f"it is one of {count:,} parts, but is not named as such (-00001-of-{count:05}.gguf)")
    names = [f"{match[1]}-{part:05}-of-{count:05}.gguf" for part in range(1, count + 1)]
    if header.metadata.get("split.no", 0) != 0 or path.name != names[0]:
        raise BadModel(
            f"{path} is not the first part of its model",
            hint=f"give the first part: {path.with_name(names[0])}",
        )
    return names


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _nearest(path: Path) -> str:
    """A hint for a path that leads nowhere: the files whose names are nearest, if there are any."""
    try:
        names = [each.name for each in path.parent.iterdir() if each.suffix == ".gguf"]
    except (OSError, ValueError):
        return f"there is no folder {str(path.parent)!r} either, or it cannot be read"
    near = difflib.get_close_matches(path.name, names, n=2) or names[:2]
    return f"did you mean {' or '.join(near)}?" if near else "check the path"


def _aligned(position: int, alignment: int) -> int:
    return (position + alignment - 1) // alignment * alignment


def _bad(path: Path, reason: str) -> BadModel:
    return BadModel(f"{path} is not a usable model: {reason}", hint="download it again, or give another file")
