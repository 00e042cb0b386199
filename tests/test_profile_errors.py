from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgpu.errors import ProfileError
from mgpu.profile import Profile, read_profile
from tests.ordinary_user import as_ordinary_user

GOOD = """\
name: small
description: A small model
license: mit
model:
  architecture: llama
  layers: 16
  embedding_length: 2048
  feed_forward_length: 8192
  heads: 32
  kv_heads: 8
  vocabulary: 128256
  context_length: 131072
quantisations:
  Q4_K_M:
    repository: someone/small-GGUF
    files: [small-Q4_K_M.gguf]
default_quantisation: Q4_K_M
"""
SPLIT = "[small-00001-of-00002.gguf, small-00002-of-00002.gguf]"


def errors_of(path: Path) -> list[str]:
    """The lines of the error, each without the file's name, which must be there."""
    with pytest.raises(ProfileError) as caught:
        read_profile(path)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    lines = caught.value.message.split("\n")
    assert all(line.startswith(f"{path}:") for line in lines)
    return [line.removeprefix(f"{path}:").strip() for line in lines]


def errors_in(folder: Path, content: str | bytes) -> list[str]:
    path = folder / "small.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return errors_of(path)


def test_the_profile_of_these_tests_is_right(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(GOOD)
    assert read_profile(path).model.head_dim == 64


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        pytest.param(
            "  heads: 32",
            "  heads: 32\n  head: 32",
            ["10:3: model.head: unknown key; did you mean 'heads'?"],
            id="a misspelt key",
        ),
        pytest.param(
            "  layers: 16",
            "  num_hidden_layers: 16",
            ["4:1: model.layers: is missing", "6:3: model.num_hidden_layers: unknown key; did you mean 'layers'?"],
            id="a key as Hugging Face calls it",
        ),
        pytest.param(
            "name: small",
            "name: small\nlayers: 16",
            ["2:1: layers: unknown key; did you mean 'model.layers'?"],
            id="a key one level too high",
        ),
        pytest.param(
            "    repository: someone/small-GGUF",
            "    repository: someone/small-GGUF\n    repo: x",
            ["16:5: quantisations.Q4_K_M.repo: unknown key; did you mean 'repository'?"],
            id="a misspelt key deep inside",
        ),
        pytest.param(
            "license: mit\n",
            "",
            ["1:1: license: is missing"],
            id="a missing key",
        ),
        pytest.param(
            "  Q4_K_M:",
            "  q4_km:",
            ["14:3: quantisations.q4_km: unknown key; did you mean 'Q4_K_M'?"],
            id="a quantisation of no such name",
        ),
        pytest.param(
            "default_quantisation: Q4_K_M",
            "default_quantisation: Q4_KM",
            ["17:1: default_quantisation: unknown value 'Q4_KM'; did you mean 'Q4_K_M'?"],
            id="a misspelt value",
        ),
        pytest.param(
            "default_quantisation: Q4_K_M",
            "default_quantisation: Q8_0",
            ["17:1: default_quantisation: Q8_0 is not among this profile's quantisations (Q4_K_M)"],
            id="a default that has no source",
        ),
        pytest.param(
            "architecture: llama",
            "architecture: mamba",
            [
                "5:3: model.architecture: unknown value 'mamba'; did you mean 'llama'?",
            ],
            id="an architecture that is not known",
        ),
        pytest.param(
            "layers: 16",
            "layers: sixteen",
            ["6:3: model.layers: expected a whole number, found 'sixteen'"],
            id="a word",
        ),
        pytest.param(
            "layers: 16", "layers: yes", ["6:3: model.layers: expected a whole number, found 'yes'"], id="yes"
        ),
        pytest.param(
            "layers: 16", "layers: true", ["6:3: model.layers: expected a whole number, found true"], id="true"
        ),
        pytest.param(
            "layers: 16", "layers: 1e999", ["6:3: model.layers: expected a whole number, found '1e999'"], id="1e999"
        ),
        pytest.param(
            "layers: 16", "layers: .inf", ["6:3: model.layers: expected a whole number, found '.inf'"], id=".inf"
        ),
        pytest.param(
            "layers: 16", "layers: 16.0", ["6:3: model.layers: expected a whole number, found '16.0'"], id="16.0"
        ),
        pytest.param(
            "layers: 16", "layers: 0x10", ["6:3: model.layers: expected a whole number, found '0x10'"], id="0x10"
        ),
        pytest.param(
            "layers: 16", "layers: 1:30", ["6:3: model.layers: expected a whole number, found '1:30'"], id="1:30"
        ),
        pytest.param(
            "layers: 16", "layers:", ["6:3: model.layers: expected a whole number, found nothing"], id="nothing"
        ),
        pytest.param(
            "layers: 16", "layers: [16]", ["6:3: model.layers: expected a whole number, found a list"], id="a list"
        ),
        pytest.param("layers: 16", "layers: 0", ["6:3: model.layers: must be at least 1, is 0"], id="zero layers"),
        pytest.param(
            "layers: 16", "layers: -2", ["6:3: model.layers: must be at least 1, is -2"], id="less than no layers"
        ),
        pytest.param(
            "layers: 16",
            "layers: 999999999",
            ["6:3: model.layers: must be at most 4096, is 999999999"],
            id="too many layers",
        ),
        pytest.param(
            "layers: 16",
            f"layers: {'9' * 5000}",
            [f"6:3: model.layers: expected a whole number, found '{'9' * 57}...'"],
            id="a number of 5000 digits",
        ),
        pytest.param(
            "description: A small model",
            "description: 7",
            ["2:1: description: expected text, found 7; put it in quotes"],
            id="a number where text belongs",
        ),
        pytest.param(
            "name: small", "name: big", ["1:1: name: is 'big' in a file named 'small'"], id="another file's name"
        ),
        pytest.param(
            "name: small",
            "name: ../small",
            [
                "1:1: name: is '../small' in a file named 'small'",
                "1:1: name: '../small' is not of the form 'llama-8b'",
            ],
            id="a name that climbs",
        ),
        pytest.param(
            "[small-Q4_K_M.gguf]",
            "[../../etc/passwd.gguf]",
            [
                (
                    "16:13: quantisations.Q4_K_M.files[0]: '../../etc/passwd.gguf' is not of the form "
                    "'Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf'"
                )
            ],
            id="a file that climbs",
        ),
        pytest.param(
            "[small-Q4_K_M.gguf]",
            "small-Q4_K_M.gguf",
            ["16:5: quantisations.Q4_K_M.files: expected a list, found 'small-Q4_K_M.gguf'"],
            id="a file that is not in a list",
        ),
        pytest.param(
            "[small-Q4_K_M.gguf]",
            "[small-00001-of-00003.gguf, small-00003-of-00003.gguf]",
            ["16:5: quantisations.Q4_K_M.files: must be one file, or all parts of one from -00001-of-… on, in order"],
            id="a split model with a part left out",
        ),
        pytest.param(
            "[small-Q4_K_M.gguf]",
            f"{SPLIT}\n    sha256: [{'0' * 64}]".replace("'", ""),
            ["17:5: quantisations.Q4_K_M.sha256: has 1 checksums for 2 files"],
            id="a checksum too few",
        ),
        pytest.param(
            "someone/small-GGUF",
            "small-GGUF",
            [
                (
                    "15:5: quantisations.Q4_K_M.repository: 'small-GGUF' is not of the form "
                    "'bartowski/Meta-Llama-3.1-8B-Instruct-GGUF'"
                )
            ],
            id="a repository without its owner",
        ),
        pytest.param(
            "files: [small-Q4_K_M.gguf]",
            "gated: true",
            ["1:1: license_page: is missing: a source is gated"],
            id="a gated source without a page",
        ),
        pytest.param(
            "kv_heads: 8", "kv_heads: 5", ["10:3: model.kv_heads: 5 does not divide heads (32)"], id="odd heads"
        ),
        pytest.param(
            "embedding_length: 2048",
            "embedding_length: 2050",
            ["4:1: model.head_dim: is missing: heads (32) do not divide embedding_length (2050)"],
            id="heads that need a length",
        ),
        pytest.param(
            "architecture: llama",
            "architecture: gemma3",
            ["4:1: model.sliding_window: is missing: gemma3 has layers with a sliding window"],
            id="a window left out",
        ),
        pytest.param(
            "architecture: llama",
            "architecture: qwen3\n  experts: 8",
            ["6:3: model.experts: must be 0: qwen3 has no experts"],
            id="experts in a dense architecture",
        ),
        pytest.param(
            "architecture: llama",
            "architecture: qwen3moe\n  experts: 8\n  experts_used: 9",
            [
                "4:1: model.expert_feed_forward_length: is missing: a mixture of experts has it",
                "7:3: model.experts_used: 9 is more than experts (8)",
            ],
            id="more experts used than there are",
        ),
        pytest.param(
            "architecture: llama",
            "architecture: llama\n  kv_lora_rank: 512",
            ["6:3: model.kv_lora_rank: belongs to multi-head latent attention, which llama has not"],
            id="latent attention where there is none",
        ),
        pytest.param(
            "name: small",
            "ctx: 200000\nname: small",
            ["1:1: ctx: 200000 is more than model.context_length (131072)"],
            id="more context than the model has",
        ),
        pytest.param(
            "  heads: 32",
            "  heads: 32\n  heads: 64\n  heads: 64",
            [
                "10:3: model.heads: is set twice, first in line 9; YAML would silently take the last",
                "11:3: model.heads: is set twice, first in line 9; YAML would silently take the last",
            ],
            id="a key set three times",
        ),
        pytest.param(
            "default_quantisation: Q4_K_M",
            "default_quantisation: Q4_K_M\nmodel: {heads: 7}",
            ["18:1: model: is set twice, first in line 4; YAML would silently take the last"],
            id="a whole group set twice",
        ),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_place(tmp_path: Path, old: str, new: str, expected: list[str]) -> None:
    assert old in GOOD
    assert errors_in(tmp_path, GOOD.replace(old, new, 1)) == expected


def test_all_problems_are_listed_in_the_order_of_the_file_ten_at_most(tmp_path: Path) -> None:
    wrong = GOOD + "".join(f"wrong_{number}: 1\n" for number in range(1, 15))
    lines = errors_in(tmp_path, wrong)
    assert [line.split(":")[0] for line in lines[:10]] == [str(number) for number in range(18, 28)]
    assert lines[10:] == ["and 4 more problems"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param("", "1:1: is empty", id="an empty file"),
        pytest.param("# only a comment\n", "1:1: is empty", id="only a comment"),
        pytest.param("- a\n- b\n", "1:1: is a list: a profile is a group of keys", id="a list"),
        pytest.param("llama-8b\n", "1:1: is 'llama-8b': a profile is a group of keys", id="one word"),
        pytest.param(GOOD + "---\n" + GOOD, "18:1: a second document", id="two documents"),
        pytest.param("name: &a small\n", "1:7: &a: a few lines of anchors", id="an anchor"),
        pytest.param("name: *a\n", "1:7: *a: a few lines of anchors", id="an alias"),
        pytest.param(
            "a: &a [x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n", "1:4: &a: a few lines of anchors", id="a billion laughs"
        ),
        pytest.param("name: !!python/object/apply:os.system [ls]\n", "1:7: the tag tag:yaml.org", id="a Python object"),
        pytest.param("name: !mine x\n", "1:7: the tag !mine", id="a tag of one's own"),
        pytest.param("? [a, b]\n: 1\n", "1:3: a list or a group of keys stands where a key should", id="a list as key"),
        pytest.param("name:\tsmall\n", "1:6: is not YAML: a tab where YAML allows only spaces", id="a tab"),
        pytest.param("name: [a\nlicense: mit\n", "2:8: is not YAML: expected ',' or ']'", id="an open bracket"),
        pytest.param("name: 'a\n", "2:1: is not YAML: found unexpected end of stream", id="an open quote"),
        pytest.param("name: a: b\n", "1:8: is not YAML: mapping values are not allowed here", id="two colons"),
        pytest.param('name: "\\U99999999"\n', "is not YAML", id="a character beyond Unicode"),
        pytest.param("%YAML 2.0\n---\nname: a\n", "1:1: is not YAML: found incompatible YAML", id="YAML 2"),
        pytest.param("[" * 100_000, "1:17: nests deeper than 16 levels", id="100,000 brackets"),
        pytest.param("a:\n" + "".join(f"{' ' * n}b:\n" for n in range(1, 500)), "nests deeper", id="500 levels"),
        pytest.param("[" + "1, " * 50_000 + "]", "holds more than 2000 values", id="50,000 values"),
        pytest.param("a" * (256 * 1024 + 1), "is larger than 256 KiB", id="a file of more than 256 KiB"),
        pytest.param(b"name: small\nlicense: m\xfft\n", "2:11: byte 0xff is not UTF-8 text", id="not UTF-8"),
        pytest.param(b"\xef\xbb\xbf" + GOOD.encode(), "1:1: starts with a byte order mark", id="a byte order mark"),
        pytest.param(GOOD.encode("utf-16"), "1:1: starts with a byte order mark", id="UTF-16"),
        pytest.param(b"name: small\nlic\0ense: mit\n", "2:4: holds a NUL byte", id="a NUL byte"),
        pytest.param(b"name: small\n\x07: mit\n", "2:1: character 0x7 is not allowed in YAML", id="a bell"),
    ],
)
def test_what_is_no_profile_at_all_is_refused_in_one_line(tmp_path: Path, content: str | bytes, expected: str) -> None:
    (line,) = errors_in(tmp_path, content)
    assert expected in line
    assert len(line) < 200
    assert line.isprintable()


def loop(folder: Path) -> Path:
    (folder / "a.yaml").symlink_to(folder / "b.yaml")
    (folder / "b.yaml").symlink_to(folder / "a.yaml")
    return folder / "a.yaml"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.yaml")
    return folder / "pipe.yaml"


def forbidden(folder: Path) -> Path:
    (folder / "secret.yaml").touch(mode=0)
    return folder / "secret.yaml"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        pytest.param(lambda folder: folder, "is a folder", id="a folder"),
        pytest.param(lambda folder: folder / "none.yaml", "there is no such file", id="no file"),
        pytest.param(loop, "cannot be read: Too many levels of symbolic links", id="links in a circle"),
        pytest.param(pipe, "is not a regular file", id="a pipe"),
        pytest.param(forbidden, "cannot be read: Permission denied", id="a file of someone else"),
        pytest.param(
            lambda folder: folder / ("x" * 300), "cannot be read: File name too long", id="a name of 300 letters"
        ),
        pytest.param(lambda folder: folder / "a\0b", "cannot be read: ", id="a NUL byte in the name"),
    ],
)
def test_what_cannot_be_read_is_said_and_not_waited_for(
    tmp_path: Path, make: Callable[[Path], Path], expected: str
) -> None:
    path = make(tmp_path)
    reader = as_ordinary_user() if make is forbidden else contextlib.nullcontext()
    with reader, pytest.raises(ProfileError) as caught:
        read_profile(path)
    assert expected in caught.value.message
    assert caught.value.message.isprintable()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "small.yaml"


def assert_read_or_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        assert isinstance(read_profile(path), Profile)
    except ProfileError as error:
        lines = error.message.split("\n")
        assert 1 <= len(lines) <= 11
        assert all(line.startswith(f"{path}:") and line.isprintable() for line in lines)


@given(content=st.binary(max_size=400) | st.text(max_size=400).map(lambda text: text.encode(errors="replace")))
@settings(max_examples=300, deadline=None)
def test_no_bytes_are_a_bug(scratch: Path, content: bytes) -> None:
    assert_read_or_refused(scratch, content)


@given(
    start=st.integers(0, len(GOOD)),
    length=st.integers(0, 40),
    inserted=st.text(max_size=8)
    | st.sampled_from(["\t", "\n", "- ", "? ", ": ", "{", "[", "&a ", "*a", "!!int ", "<<: ", "|\n"]),
)
@settings(max_examples=500, deadline=None)
def test_no_damage_to_a_profile_is_a_bug(scratch: Path, start: int, length: int, inserted: str) -> None:
    damaged = GOOD[:start] + inserted + GOOD[start + length :]
    assert_read_or_refused(scratch, damaged.encode(errors="replace"))
