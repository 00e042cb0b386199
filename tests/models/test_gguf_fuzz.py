from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mgpu.errors import MgpuError
from mgpu.models.facts import ModelFacts
from mgpu.models.gguf_facts import facts_from_gguf
from mgpu.models.shape import tensor_table
from tests.fakes.shapes import SHAPES, resized
from tests.fakes.sparse_gguf import ARRAY, Entry, make_sparse_gguf, text, u32, write_gguf

PREFIX = "gemma3."
KEYS = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.shared_kv_layers",
    "attention.kv_lora_rank",
    "attention.key_length_mla",
    "rope.dimension_count",
    "expert_count",
    "expert_used_count",
    "full_attention_interval",
    "nextn_predict_layers",
    "vocab_size",
)
NO_DEADLINE = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def readable_or_refused(path: Path) -> ModelFacts | None:
    """Reads the file; the only failure that may come out is one of ours."""
    try:
        return facts_from_gguf(path)
    except MgpuError:
        return None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    make_sparse_gguf(path, SHAPES["gemma-3-27b"], "Q8_0", layers=2, vocabulary=260)
    with path.open("rb") as file:
        return file.read(12_000)


@NO_DEADLINE
@given(
    flips=st.lists(st.tuples(st.integers(0, 11_999), st.integers(1, 255)), max_size=6),
    length=st.one_of(st.integers(0, 12_000), st.just(4_000_000_000)),
)
@example(flips=[], length=4_000_000_000)
def test_no_flipped_bit_and_no_cut_gets_past_the_reader(
    whole: bytes, tmp_path: Path, flips: list[tuple[int, int]], length: int
) -> None:
    content = bytearray(whole)
    for position, bits in flips:
        content[position] ^= bits
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.write(content[:length])
        file.truncate(length)
    facts = readable_or_refused(path)
    if not flips:
        assert (facts is not None) == (length > 12_000)


def number(code: str, kind: int, low: int, high: int) -> st.SearchStrategy[tuple[int, bytes]]:
    return st.integers(low, high).map(lambda value: (kind, struct.pack(code, value)))


VALUES = st.one_of(
    number("<I", 4, 0, 8),
    number("<I", 4, 0, 2**32 - 1),
    number("<Q", 10, 0, 2**64 - 1),
    number("<q", 11, -(2**63), 2**63 - 1),
    st.floats(width=32).map(lambda value: (6, struct.pack("<f", value))),
    st.just((8, struct.pack("<Q", 2) + b"\x1b[")),
    st.lists(st.integers(0, 2**32 - 1), max_size=4).map(
        lambda values: (ARRAY, struct.pack(f"<IQ{len(values)}I", 4, len(values), *values))
    ),
    st.just((ARRAY, struct.pack("<IQ", 0, 2000) + bytes(2000))),
)


@NO_DEADLINE
@given(values=st.dictionaries(st.sampled_from(KEYS), VALUES))
def test_no_metadata_however_absurd_gets_past_the_reader(tmp_path: Path, values: dict[str, tuple[int, bytes]]) -> None:
    entries: list[Entry] = [text("general.architecture", "gemma3"), u32(PREFIX + "block_count", 2)]
    entries += [u32(PREFIX + "attention.head_count", 32), u32(PREFIX + "embedding_length", 5376)]
    entries = [entry for entry in entries if entry[0].removeprefix(PREFIX) not in values]
    entries += [(PREFIX + key, kind, raw) for key, (kind, raw) in values.items()]
    path = tmp_path / "model.gguf"
    write_gguf(path, entries, tensor_table(resized(SHAPES["gemma-3-27b"], layers=2, vocabulary=260), "Q8_0"))
    facts = readable_or_refused(path)
    if facts is not None:
        assert len(facts.layers) in (1, 2)
        assert facts.heads > 0
        assert all(layer.kv_heads >= 0 for layer in facts.layers)
    elif not values:
        pytest.fail("the unchanged metadata was refused")
