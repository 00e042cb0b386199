"""Writes GGUF files with a true header and no data: the data area is one hole in the file.

    python -m tests.fakes.sparse_gguf llama-3.3-70b Q4_K_M 70b.gguf [--layers N] [--vocab N]

The file has the size of the real model but takes a few MB on disk, all of it vocabulary. llama-server accepts
it, projects its memory and loads it as zeros. The tensor table is the product's own (`mgpu.models.shape`), so
that what it says of real models is checked by a real engine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mgpu.models import sparse
from mgpu.models.sparse import (
    ARRAY,
    STRING,
    U32,
    Entry,
    f32,
    flag,
    text,
    texts,
    u32,
    u32s,
    vocabulary_entries,
    write_gguf,
)
from mgpu.profile import ModelShape
from tests.fakes.shapes import SHAPES, resized

__all__ = [
    "ARRAY",
    "STRING",
    "U32",
    "Entry",
    "f32",
    "flag",
    "make_sparse_gguf",
    "text",
    "texts",
    "u32",
    "u32s",
    "vocabulary_entries",
    "write_gguf",
]


def make_sparse_gguf(
    path: Path,
    shape: ModelShape,
    quantisation: str,
    *,
    name: str = "sparse",
    layers: int | None = None,
    vocabulary: int | None = None,
) -> Path:
    """Write the sparse GGUF of `shape`, with fewer layers or tokens if so asked, to `path`, and return it."""
    return sparse.make_sparse_gguf(path, resized(shape, layers=layers, vocabulary=vocabulary), quantisation, name=name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a GGUF file with a true header and no data.")
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("quantisation")
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocab", type=int)
    given = parser.parse_args()
    make_sparse_gguf(
        given.path,
        SHAPES[given.model],
        given.quantisation,
        name=given.model,
        layers=given.layers,
        vocabulary=given.vocab,
    )
    status = given.path.stat()
    print(f"{given.path}: {status.st_size:,} bytes, {status.st_blocks * 512:,} of them on disk")


if __name__ == "__main__":
    main()
