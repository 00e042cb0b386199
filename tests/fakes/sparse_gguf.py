"""Writes GGUF files with a true header and no data: the data area is one hole in the file.

    python -m tests.fakes.sparse_gguf llama-3.3-70b Q4_K_M 70b.gguf [--layers N] [--vocab N]

The file has the size of the real model but takes a few MB on disk, all of it vocabulary. llama-server accepts
it, projects its memory and loads it as zeros. The tensor table is the product's own (`mgpu.models.shape`), so
that what it says of real models is checked by a real engine.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from mgpu.models.quantisation import FILE_TYPES, known_quantisation
from mgpu.models.shape import tensor_table
from mgpu.models.tensors import Tensor
from mgpu.profile import ModelShape
from tests.fakes.shapes import SHAPES, resized

ALIGNMENT = 32
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9

Entry = tuple[str, int, bytes]


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
    shape = resized(shape, layers=layers, vocabulary=vocabulary)
    tensors = tensor_table(shape, quantisation)
    write_gguf(path, tuple(_metadata(name, shape, quantisation)), tensors)
    return path


def write_gguf(path: Path, metadata: Sequence[Entry], tensors: Sequence[Tensor]) -> None:
    """Write a GGUF version 3 with these `metadata` entries and `tensors`, whose data is a hole."""
    offset = 0
    table = bytearray()
    for tensor in tensors:
        rank = len(tensor.dimensions)
        table += _text(tensor.name) + struct.pack(f"<I{rank}Q", rank, *tensor.dimensions)
        table += struct.pack("<IQ", tensor.type.id, offset)
        offset += -(-tensor.bytes // ALIGNMENT) * ALIGNMENT
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, kind, value in metadata:
            file.write(_text(key) + struct.pack("<I", kind) + value)
        file.write(table)
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
        file.truncate(file.tell() + offset)


def u32(key: str, value: int) -> Entry:
    return key, U32, struct.pack("<I", value)


def f32(key: str, value: float) -> Entry:
    return key, F32, struct.pack("<f", value)


def flag(key: str, value: bool) -> Entry:
    return key, BOOL, struct.pack("<?", value)


def text(key: str, value: str) -> Entry:
    return key, STRING, _text(value)


def texts(key: str, values: Sequence[str]) -> Entry:
    return key, ARRAY, struct.pack("<IQ", STRING, len(values)) + b"".join(map(_text, values))


def u32s(key: str, values: Sequence[int]) -> Entry:
    return key, ARRAY, struct.pack(f"<IQ{len(values)}I", U32, len(values), *values)


def vocabulary_entries(count: int) -> Iterator[Entry]:
    """A byte-level BPE vocabulary that llama-server accepts: 256 bytes, two controls, then filling."""
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
