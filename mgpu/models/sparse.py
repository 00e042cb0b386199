"""GGUF files with a true header and no data: the data area is one hole in the file.

Such a file has the size of the real model but takes a few MB on disk, all of it vocabulary. llama-server accepts it
and projects its memory as that of the real one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mgpu.models.quantisation import FILE_TYPES, known_quantisation
from mgpu.models.shape import tensor_table
from mgpu.models.tensors import Tensor

if TYPE_CHECKING:  # pydantic is slow to import, and only the attributes are needed here
    from mgpu.models.remote import FileStart
    from mgpu.profile import ModelShape

# A metadata entry: its key, the number of its value's type, and the value's bytes.
Entry = tuple[str, int, bytes]

U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9


def make_sparse_gguf(path: Path, shape: ModelShape, quantisation: str, *, name: str = "sparse") -> Path:
    """Write the sparse GGUF of `shape` in `quantisation` to `path`, and return it.

    Its vocabulary has the right size and means nothing. Raises UsageError for an unknown quantisation, OSError.
    """
    write_gguf(path, tuple(_metadata(name, shape, quantisation)), tensor_table(shape, quantisation))
    return path


def write_starts(folder: Path, starts: Iterable[FileStart]) -> Path:
    """Write files that begin as those of a model do and are holes from there on; return the first. Raises OSError."""
    paths = []
    for each in starts:
        path = folder / each.name
        with path.open("wb") as file:
            file.write(each.start)
            file.truncate(each.size)
        paths.append(path)
    return paths[0]


def write_gguf(path: Path, metadata: Sequence[Entry], tensors: Sequence[Tensor]) -> None:
    """Write a GGUF version 3 with these `metadata` entries and `tensors`, whose data is a hole. Raises OSError."""
    offset = 0
    table = bytearray()
    for tensor in tensors:
        rank = len(tensor.dimensions)
        table += _text(tensor.name) + struct.pack(f"<I{rank}Q", rank, *tensor.dimensions)
        table += struct.pack("<IQ", tensor.type.id, offset)
        offset += -(-tensor.bytes // _ALIGNMENT) * _ALIGNMENT
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, kind, value in metadata:
            file.write(_text(key) + struct.pack("<I", kind) + value)
        file.write(table)
        file.write(b"\0" * (-file.tell() % _ALIGNMENT))
        file.truncate(file.tell() + offset)


def u32(key: str, value: int) -> Entry:
    """Return an entry that is a whole number."""
    return key, U32, struct.pack("<I", value)


def f32(key: str, value: float) -> Entry:
    """Return an entry that is a fraction."""
    return key, F32, struct.pack("<f", value)


def flag(key: str, value: bool) -> Entry:
    """Return an entry that is true or false."""
    return key, BOOL, struct.pack("<?", value)


def text(key: str, value: str) -> Entry:
    """Return an entry that is a text."""
    return key, STRING, _text(value)


def texts(key: str, values: Sequence[str]) -> Entry:
    """Return an entry that is a list of texts."""
    return key, ARRAY, struct.pack("<IQ", STRING, len(values)) + b"".join(map(_text, values))


def u32s(key: str, values: Sequence[int]) -> Entry:
    """Return an entry that is a list of whole numbers."""
    return key, ARRAY, struct.pack(f"<IQ{len(values)}I", U32, len(values), *values)


def vocabulary_entries(count: int) -> Iterator[Entry]:
    """Yield a byte-level BPE vocabulary that llama-server accepts: 256 bytes, two controls, then filling."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = printable + [256 + index for index in range(len(others))]
    tokens = [chr(symbol) for symbol in symbols] + ["<|bos|>", "<|eos|>"]
    tokens += [f"<t{index}>" for index in range(len(tokens), count)]
    kinds = [1] * 256 + [3, 3] + [1] * (count - 258)
    yield text("tokenizer.ggml.model", "gpt2")
    yield text("tokenizer.ggml.pre", "llama-bpe")
    yield texts("tokenizer.ggml.tokens", tokens)
    yield "tokenizer.ggml.token_type", ARRAY, struct.pack(f"<IQ{count}i", I32, count, *kinds)
    yield texts("tokenizer.ggml.merges", ["Ġ t", "Ġ a"])
    yield u32("tokenizer.ggml.bos_token_id", 256)
    yield u32("tokenizer.ggml.eos_token_id", 257)
    yield flag("tokenizer.ggml.add_bos_token", value=False)


_ALIGNMENT = 32


def _metadata(name: str, shape: ModelShape, quantisation: str) -> Iterator[Entry]:
    prefix = shape.architecture + "."
    file_type = {recipe: number for number, recipe in FILE_TYPES.items()}[known_quantisation(quantisation)]
    yield text("general.architecture", shape.architecture)
    yield text("general.type", "model")
    yield text("general.name", name)
    yield u32("general.file_type", file_type)
    yield u32("general.quantization_version", 2)
    yield u32(prefix + "block_count", shape.layers)
    yield u32(prefix + "context_length", shape.context_length)
    yield u32(prefix + "embedding_length", shape.embedding_length)
    yield u32(prefix + "feed_forward_length", shape.feed_forward_length)
    yield u32(prefix + "attention.head_count", shape.heads)
    yield u32(prefix + "attention.head_count_kv", 1 if shape.kv_lora_rank else shape.kv_heads)
    yield f32(prefix + "attention.layer_norm_rms_epsilon", 1e-5)
    yield f32(prefix + "rope.freq_base", 10000.0)
    yield u32(prefix + "vocab_size", shape.vocabulary)
    yield from _latent_entries(prefix, shape) if shape.kv_lora_rank else _head_entries(prefix, shape)
    if shape.experts:
        yield u32(prefix + "expert_count", shape.experts)
        yield u32(prefix + "expert_used_count", shape.experts_used)
        yield u32(
            prefix + "expert_feed_forward_length",
            shape.expert_feed_forward_length or shape.feed_forward_length,
        )
    if shape.sliding_window:
        yield u32(prefix + "attention.sliding_window", shape.sliding_window)
    yield from vocabulary_entries(shape.vocabulary)


def _head_entries(prefix: str, shape: ModelShape) -> Iterator[Entry]:
    yield u32(prefix + "attention.key_length", shape.head_dim)
    yield u32(prefix + "attention.value_length", shape.head_dim)
    yield u32(prefix + "rope.dimension_count", shape.head_dim)


def _latent_entries(prefix: str, shape: ModelShape) -> Iterator[Entry]:
    rank, rope, nope = shape.kv_lora_rank or 0, shape.rope_head_dim or 0, shape.nope_head_dim or 0
    yield u32(prefix + "attention.kv_lora_rank", rank)
    if shape.q_lora_rank:
        yield u32(prefix + "attention.q_lora_rank", shape.q_lora_rank)
    yield u32(prefix + "rope.dimension_count", rope)
    yield u32(prefix + "attention.key_length", rank + rope)
    yield u32(prefix + "attention.value_length", rank)
    yield u32(prefix + "attention.key_length_mla", nope + rope)
    yield u32(prefix + "attention.value_length_mla", shape.value_head_dim or 0)
    yield u32(prefix + "leading_dense_block_count", shape.leading_dense_layers)
    shared = shape.shared_expert_feed_forward_length or 0
    yield u32(prefix + "expert_shared_count", shared // (shape.expert_feed_forward_length or 1))
    yield f32(prefix + "expert_weights_scale", 1.0)
    yield u32(prefix + "expert_gating_func", 1)


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw
