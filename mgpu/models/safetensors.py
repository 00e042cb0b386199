"""The headers of .safetensors files: which tensors a model folder holds, and how large each is.

A file begins with eight bytes, the length of its header as a little-endian number, then the header as JSON:
`{"NAME": {"dtype": "BF16", "shape": [..], "data_offsets": [begin, end]}, .., "__metadata__": {..}}`.
"""

from __future__ import annotations

import json
from pathlib import Path

from mgpu.errors import BadModel

INDEX_NAME = "model.safetensors.index.json"
# The limit of the safetensors library itself (MAX_HEADER_SIZE).
LARGEST_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8
_WIDE_TYPES = ("F32", "F64")
_LARGEST_INDEX_BYTES = 100_000_000
_MOST_FILES = 2000


def folder_tensors(folder: Path) -> dict[str, int]:
    """Return the bytes of each tensor in the model folder `folder` as an engine loads it, from its files' headers.

    Where most tensors are 16 bits wide or less, wider ones count as 16 bits: engines convert them. Raises BadModel
    when there are no weights, a file is missing, or one is no safetensors file or cut short.
    """
    sizes: dict[str, int] = {}
    wide: set[str] = set()
    for path in weights_in(folder):
        for name, (kind, size) in read_header(path).items():
            sizes[name] = size
            if kind in _WIDE_TYPES:
                wide.add(name)
    if sum(sizes[name] for name in wide) * 2 < sum(sizes.values()):
        for name in wide:
            sizes[name] //= 2
    return sizes


def read_header(path: Path) -> dict[str, tuple[str, int]]:
    """Return type and bytes of each tensor in the safetensors file `path`. Raises BadModel."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            whole = path.stat().st_size
            if whole <= LENGTH_BYTES or not 2 <= length <= min(LARGEST_HEADER_BYTES, whole - LENGTH_BYTES):
                raise _bad(path, "it is not a safetensors file, or is cut short")
            header = file.read(length)
    except OSError as error:
        raise BadModel(
            f"{path} cannot be read: {error.strerror}", code="model-missing", hint="check its owner and permissions"
        ) from None
    return parse_header(path, header, whole - LENGTH_BYTES - length)


def weights_in(folder: Path) -> list[Path]:
    """Return the weight files of the model in `folder`: those its index names, or else every one of that kind.

    Raises BadModel when there are none, or one is missing (code "model-missing").
    """
    index = folder / INDEX_NAME
    if not index.exists():
        found = sorted(folder.glob("*.safetensors"))
        # Mistral's repositories hold the same weights a second time.
        found = [path for path in found if not path.name.startswith("consolidated")] or found
    else:
        found = [folder / name for name in indexed_files(index)]
    if not found:
        raise BadModel(
            f"{folder} holds no weights: there is no .safetensors file in it",
            code="model-missing",
            hint="fetch the model again, or give a .gguf file to llama.cpp",
        )
    if len(found) > _MOST_FILES:
        raise _bad(folder, f"it has more than {_MOST_FILES} weight files")
    for path in found:
        if not path.is_file():
            raise BadModel(f"{path} is missing", code="model-missing", hint="fetch the model again")
    return found


def parse_header(path: Path, header: bytes, data_bytes: int) -> dict[str, tuple[str, int]]:
    """Return type and bytes of each tensor from a header already read; `data_bytes` is what follows it in the file.

    Raises BadModel, naming `path`.
    """
    try:
        tensors = json.loads(header)
    except (ValueError, RecursionError):
        raise _bad(path, "its header is damaged") from None
    if not isinstance(tensors, dict):
        raise _bad(path, "its header is damaged")
    found = {}
    for name, tensor in tensors.items():
        if name == "__metadata__":
            continue
        kind, offsets = (tensor.get("dtype"), tensor.get("data_offsets")) if isinstance(tensor, dict) else (None, None)
        if not (
            isinstance(kind, str)
            and isinstance(offsets, list)
            and len(offsets) == 2
            and all(type(offset) is int for offset in offsets)
            and 0 <= offsets[0] <= offsets[1]
        ):
            raise _bad(path, f"its header is damaged at the tensor {name[:80]!r}")
        if offsets[1] > data_bytes:
            raise _bad(path, f"the tensor {name[:80]!r} ends behind the file's end")
        found[name] = (kind, offsets[1] - offsets[0])
    return found


def indexed_files(index: Path) -> list[str]:
    """Return the names of the weight files in an index on disk. Raises BadModel."""
    try:
        if index.stat().st_size > _LARGEST_INDEX_BYTES:
            raise ValueError
        return files_named_by(json.loads(index.read_bytes()))
    except OSError as error:
        raise BadModel(f"{index} cannot be read: {error.strerror}", code="model-missing") from None
    except (ValueError, RecursionError):
        raise _bad(index, "it is not an index of weight files") from None


def files_named_by(index: object) -> list[str]:
    """Return the names of the weight files in a parsed index. Raises ValueError if it is none, or names others."""
    parts = index.get("weight_map") if isinstance(index, dict) else None
    names = list(parts.values()) if isinstance(parts, dict) else []
    if not names or not all(isinstance(name, str) and name and name == Path(name).name for name in names):
        raise ValueError("not an index of weight files")
    return sorted(set(names))


def _bad(path: Path, why: str) -> BadModel:
    return BadModel(f"{path} is unusable: {why}", code="model-corrupt", hint="delete it and fetch it again")
