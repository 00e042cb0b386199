from __future__ import annotations

import os
import struct
import time
import tracemalloc
from pathlib import Path

import pytest

from mgpu.errors import BadModel, Missing
from mgpu.models.gguf import LongValue, read_gguf
from mgpu.models.tensors import GGML_TYPES, Tensor
from tests.fakes.shapes import SHAPES
from tests.fakes.sparse_gguf import (
    ARRAY,
    STRING,
    U32,
    Entry,
    flag,
    make_sparse_gguf,
    text,
    texts,
    u32,
    u32s,
    write_gguf,
)
from tests.ordinary_user import as_ordinary_user

Q8_0 = GGML_TYPES["Q8_0"]
KEY = text("general.architecture", "llama")
WEIGHT = Tensor("token_embd.weight", (64, 10), Q8_0)
HUGE = 10**18


def start(tensors: int, keys: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def string(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes = b"a", dimensions: tuple[int, ...] = (32,), kind: int = 8, offset: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return string(name) + shape + struct.pack("<IQ", kind, offset)


def value(kind: int, raw: bytes = b"") -> bytes:
    """A header of one key of this kind, with `raw` as its value."""
    return start(0, 1) + string(b"key") + struct.pack("<I", kind) + raw


def array(kind: int, count: int, raw: bytes = b"") -> bytes:
    return value(ARRAY, struct.pack("<IQ", kind, count) + raw)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    entries: list[Entry] = [
        KEY,
        flag("yes", value=True),
        u32s("small", [3, 0, 7]),
        u32s("long", range(2000)),
        texts("words", ["a", "", "ccc"]),
        text("essay", "x" * 5000),
        ("float", 12, struct.pack("<d", 0.5)),
        ("negative", 11, struct.pack("<q", -5)),
    ]
    norm = Tensor("output_norm.weight", (3,), GGML_TYPES["F32"])
    path = tmp_path / "model.gguf"
    write_gguf(path, entries, [WEIGHT, norm])

    header = read_gguf(path)

    assert header.metadata == {
        "general.architecture": "llama",
        "yes": 1,
        "small": (3, 0, 7),
        "long": LongValue(2000),
        "words": LongValue(3),
        "essay": LongValue(5000),
        "float": 0.5,
        "negative": -5,
    }
    assert header.tensors == (WEIGHT, norm)
    assert (WEIGHT.elements, WEIGHT.bytes, norm.bytes) == (640, 680, 12)
    assert header.parts == (path,)
    assert header.file_bytes == path.stat().st_size


@pytest.mark.parametrize("window", [8, 9, 4096, 1 << 20])
def test_strings_are_skipped_across_the_edges_of_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr("mgpu.models.gguf_stream._CHUNK_BYTES", window)
    words = ["x" * (i * 37 % 300) for i in range(1000)]
    path = tmp_path / "model.gguf"
    write_gguf(path, [texts("words", words), u32("after", 42)], [WEIGHT])
    header = read_gguf(path)
    assert header.metadata == {"words": LongValue(1000), "after": 42}
    assert header.tensors == (WEIGHT,)


def test_a_large_vocabulary_is_skipped_quickly_and_in_little_memory(tmp_path: Path) -> None:
    path = make_sparse_gguf(tmp_path / "8b.gguf", SHAPES["llama-3.1-8b"], "Q4_K_M")
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        header = read_gguf(path)
        seconds.append(time.perf_counter() - began)
    tracemalloc.start()
    read_gguf(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert header.metadata["tokenizer.ggml.tokens"] == LongValue(128256)
    assert min(seconds) < 0.1  # some 15 ms on a quiet machine
    assert peak_bytes < 8 << 20


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(b"", "it is empty", id="an empty file"),
        pytest.param(b"hello world", "begins with b'hell'", id="a text file"),
        pytest.param(b"GG", "no GGUF file", id="two bytes"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer", id="a Git LFS pointer"),
        pytest.param(b"<!DOCTYPE html>", "web page", id="a web page saved as a model"),
        pytest.param(b"GGUF\3\0", "ends within its header", id="a header cut in the version"),
        pytest.param(b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian", id="a big-endian file"),
        pytest.param(start(0, 0, version=1), "old format GGUF version 1", id="GGUF version 1"),
        pytest.param(start(0, 0, version=4), "GGUF version 4", id="a version from the future"),
        pytest.param(start(0, 0)[:20], "cut off", id="a header cut in its counts"),
        pytest.param(start(HUGE, 0), f"claims {HUGE:,} tensors", id="10^18 tensors"),
        pytest.param(start(0, HUGE), f"claims {HUGE:,} metadata keys", id="10^18 keys"),
        pytest.param(start(0, 1), "cut off", id="a header cut before its first key"),
        pytest.param(start(0, 1) + string(b""), "empty or too long", id="an empty key"),
        pytest.param(start(0, 1) + struct.pack("<Q", HUGE), "points past", id="a key longer than the file"),
        pytest.param(value(STRING, struct.pack("<Q", HUGE)), "points past", id="a string longer than the file"),
        pytest.param(value(STRING, struct.pack("<Q", 2**64 - 1)), "points past", id="a string of 2^64 bytes"),
        pytest.param(value(99, bytes(8)), "unknown type 99", id="an unknown value type"),
        pytest.param(array(STRING, HUGE), f"array of {HUGE:,} strings", id="an array of 10^18 strings"),
        pytest.param(array(STRING, 3, string(b"a")), "cut off", id="an array of fewer strings than it claims"),
        pytest.param(array(STRING, 1, struct.pack("<Q", HUGE)), "points past", id="a huge string in an array"),
        pytest.param(array(U32, 2**63), "points past", id="an array whose size overflows"),
        pytest.param(array(U32, 1000), "cut off", id="an array cut short"),
        pytest.param(array(ARRAY, 1, struct.pack("<IQ", U32, 0)), "array of the unknown type 9", id="nested arrays"),
        pytest.param(array(77, 1), "array of the unknown type 77", id="an array of an unknown type"),
        pytest.param(start(0, 2) + 2 * (string(b"key") + struct.pack("<II", U32, 1)), "'key' twice", id="a key twice"),
        pytest.param(
            start(0, 1) + string(b"general.alignment") + struct.pack("<II", U32, 0),
            "alignment",
            id="an alignment of zero",
        ),
        pytest.param(start(1, 0), "cut off", id="a missing tensor table"),
        pytest.param(start(1, 0) + tensor(b""), "name is empty", id="a tensor without a name"),
        pytest.param(start(1, 0) + tensor(dimensions=()), "0 dimensions", id="a tensor without dimensions"),
        pytest.param(
            start(1, 0) + string(b"a") + struct.pack("<I", 2**32 - 1), "dimensions", id="4 billion dimensions"
        ),
        pytest.param(start(1, 0) + tensor(dimensions=(0,)), "impossible shape", id="a dimension of zero"),
        pytest.param(start(1, 0) + tensor(dimensions=(2**64 - 32,)), "impossible shape", id="a negative dimension"),
        pytest.param(start(1, 0) + tensor(dimensions=(2**40, 2**40)), "impossible shape", id="an overflowing shape"),
        pytest.param(start(1, 0) + tensor(dimensions=(33,)), "impossible shape", id="a row of a block and a bit"),
        pytest.param(start(1, 0) + tensor(kind=4), "type 4", id="a type that ggml removed"),
        pytest.param(start(1, 0) + tensor(kind=999), "type 999", id="a type from the future"),
        pytest.param(start(1, 0) + tensor(offset=64), "not where it must be", id="a gap in the data"),
        pytest.param(start(2, 0) + tensor() + tensor(offset=64), "'a' twice", id="a tensor twice"),
        pytest.param(start(2, 0) + tensor() + tensor(b"b"), "not where it must be", id="overlapping tensors"),
    ],
)
def test_a_hostile_file_is_refused_with_the_reason_at_once(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    began = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(BadModel) as raised:
        read_gguf(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert said in raised.value.message
    assert str(path) in raised.value.message
    assert raised.value.hint
    assert time.perf_counter() - began < 1
    assert peak_bytes < 4 << 20


def test_a_header_in_a_huge_hole_is_refused_quickly(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.write(array(STRING, 4_000_000))
        file.truncate(1 << 40)
    began = time.perf_counter()
    # The hole reads as 4 million empty strings, no tensors: a valid header that says nothing.
    assert read_gguf(path).tensors == ()
    assert time.perf_counter() - began < 5


def test_data_cut_short_says_how_much_is_missing(tmp_path: Path) -> None:
    path = make_sparse_gguf(tmp_path / "model.gguf", SHAPES["llama-3.2-1b"], "Q8_0", vocabulary=300)
    whole = path.stat().st_size
    assert read_gguf(path).file_bytes == whole
    os.truncate(path, whole - 1_000_000)
    with pytest.raises(BadModel, match="incomplete: 1,000,0") as raised:
        read_gguf(path)
    assert raised.value.code == "model-incomplete"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        pytest.param("llama-8b-Q4_K_S.gguf", "did you mean llama-8b-Q4_K_M.gguf?", id="a misspelt name"),
        pytest.param("nowhere/model.gguf", "there is no folder", id="a folder that is not there"),
        pytest.param("llama-8b-Q4_K_M.gguf/x.gguf", "cannot be read", id="a file taken for a folder"),
        pytest.param("a\0b.gguf", "did you mean", id="a name with a NUL"),
    ],
)
def test_a_missing_file_is_missing_not_bad(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / "llama-8b-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(Missing) as raised:
        read_gguf(tmp_path / name)
    assert raised.value.code == "model-missing"
    assert hint in (raised.value.hint or "")


def test_a_folder_is_refused_and_names_the_file_in_it(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").touch()
    with pytest.raises(BadModel, match="is a folder") as raised:
        read_gguf(tmp_path)
    assert "x.gguf" in (raised.value.hint or "")


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(BadModel, match="not a regular file"):
        read_gguf(tmp_path / "pipe.gguf")


def test_a_file_that_may_not_be_read_is_said_to_be_so(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.touch(mode=0o000)
    with as_ordinary_user(), pytest.raises(Missing, match="Permission denied") as raised:
        read_gguf(path)
    assert raised.value.code == "model-unreadable"


def split_model(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"big-{part:05}-of-{count:05}.gguf" for part in range(1, count + 1)]
    for part, path in enumerate(paths):
        marks = [u32("split.no", part), u32("split.count", count), u32("split.tensors.count", count)]
        weight = Tensor(f"blk.{part}.attn_q.weight", (32, 32), Q8_0)
        write_gguf(path, [KEY, *marks] if part == 0 else marks, [weight])
    return paths


def test_a_split_model_is_read_whole_from_its_first_part(tmp_path: Path) -> None:
    paths = split_model(tmp_path, 3)
    header = read_gguf(paths[0])
    assert header.parts == tuple(paths)
    assert [each.name for each in header.tensors] == [f"blk.{i}.attn_q.weight" for i in range(3)]
    assert header.file_bytes == sum(path.stat().st_size for path in paths)
    assert header.metadata["general.architecture"] == "llama"


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    paths = split_model(tmp_path, 4)
    paths[1].unlink()
    paths[3].unlink()
    with pytest.raises(BadModel, match=r"part 2 of 4 is missing: no big-00002-of-00004\.gguf \(and 1 more\)"):
        read_gguf(paths[0])


def test_another_part_than_the_first_points_to_the_first(tmp_path: Path) -> None:
    paths = split_model(tmp_path, 2)
    with pytest.raises(BadModel, match="not the first part") as raised:
        read_gguf(paths[1])
    assert str(paths[0]) in (raised.value.hint or "")


def test_a_renamed_part_is_refused_because_the_engine_finds_parts_by_name(tmp_path: Path) -> None:
    renamed = split_model(tmp_path, 2)[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(BadModel, match="not named as such"):
        read_gguf(renamed)


def test_parts_of_different_models_are_refused(tmp_path: Path) -> None:
    paths = split_model(tmp_path, 2)
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(BadModel, match="do not belong together"):
        read_gguf(paths[0])
