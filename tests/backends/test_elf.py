"""What is read of programs and libraries as files, whole ones and broken ones."""

from __future__ import annotations

import contextlib
import struct
import sys
from pathlib import Path

import pytest

from mgpu.backends.elf import architectures_of, find_library, missing_library, needs_of, text_in
from tests.fakes.elf import built, bundle, fatbin


def test_the_libraries_of_a_program_are_read() -> None:
    assert any(name.startswith("libc.so") for name in needs_of(Path(sys.executable)).libraries)
    assert missing_library(Path(sys.executable)) is None


def test_folders_are_named_from_where_the_file_is(tmp_path: Path) -> None:
    far = ":".join(f"$ORIGIN/../nvidia/part{number}/lib" for number in range(40))
    path = built(tmp_path / "libone.so", needed=("libtwo.so.2",), run_path=f"${{ORIGIN}}:{far}")
    needs = needs_of(path)
    assert "libtwo.so.2" in needs.libraries
    assert needs.folders[0] == str(tmp_path)
    assert needs.folders[-1] == f"{tmp_path}/../nvidia/part39/lib"
    assert find_library("libtwo.so.2", needs.folders) == tmp_path / "libtwo.so.2"
    assert find_library("libnowhere.so.9", needs.folders) is None
    assert find_library("libc.so.6", ()) is not None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(fatbin(("compute", 75), ("sm", 75)), ("compute_75", "sm_75"), id="one card, and all later ones"),
        pytest.param(
            fatbin(("sm", 90), ("sm", 50)) + fatbin(("sm", 100)), ("sm_50", "sm_90", "sm_100"), id="in several parts"
        ),
        pytest.param(None, (), id="no code for cards"),
        pytest.param(bundle("gfx1100", "gfx90a:xnack-"), ("gfx1100", "gfx90a:xnack-"), id="AMD's cards"),
        pytest.param(bundle(), (), id="a bundle for the processor alone"),
    ],
)
def test_code_for_cards_tells_which(tmp_path: Path, content: bytes | None, expected: tuple[str, ...]) -> None:
    section = ".hip_fatbin" if content and content.startswith(b"__CLANG") else ".nv_fatbin"
    path = built(tmp_path / "lib.so", sections={section: content} if content else None)
    assert architectures_of(path) == expected


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"CCOB\x02\0\x01\0" + bytes(90), id="compressed"),
        pytest.param(bundle("gfx1100")[:60], id="cut off"),
        pytest.param(bundle("gfx1100")[:24] + b"\xff" * 80, id="a name without end"),
    ],
)
def test_a_bundle_of_hip_in_an_unknown_form_is_unknown(tmp_path: Path, content: bytes) -> None:
    path = built(tmp_path / "lib.so", sections={".hip_fatbin": content})
    with pytest.raises((ValueError, struct.error)):
        architectures_of(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(fatbin(("sm", 80), magic=0xBA55ED51), id="another magic number"),
        pytest.param(fatbin(("sm", 80))[:16] + bytes(88), id="an entry without a header"),
        pytest.param(fatbin()[:8] + b"\xff" * 60, id="one that reaches beyond the file"),
    ],
)
def test_code_in_an_unknown_form_is_unknown(tmp_path: Path, content: bytes) -> None:
    path = built(tmp_path / "lib.so", sections={".nv_fatbin": content})
    with pytest.raises((ValueError, struct.error)):
        architectures_of(path)


def test_constants_are_searched(tmp_path: Path) -> None:
    path = built(tmp_path / "lib.so", constant="NCCL version 2.27.5+cuda12.9")
    found = text_in(path, rb"version ([\d.]+)")
    assert found is not None
    assert found[1] == b"2.27.5"
    assert text_in(path, rb"version 3") is None


def test_a_program_of_another_loader_is_not_judged(tmp_path: Path) -> None:
    own = built(tmp_path / "own", needed=("libgone.so.1",), program=True)
    other = tmp_path / "other"
    other.write_bytes(own.read_bytes().replace(b"/lib", b"/brw", 1))
    (tmp_path / "libgone.so.1").unlink()
    assert missing_library(own) == "libgone.so.1"
    assert missing_library(other) is None


def test_broken_programs_are_refused(tmp_path: Path) -> None:
    whole = Path(sys.executable).resolve().read_bytes()[:4096]
    path = tmp_path / "broken"
    far = whole[:32] + b"\xff" * 8 + whole[40:]
    for content in (b"", b"#!/bin/sh\n", far, whole[:6], whole[:60], whole[:100], whole[:32] + b"\xff" * 100, whole):
        path.write_bytes(content)
        assert missing_library(path) is None
        for read in (needs_of, architectures_of, lambda it: text_in(it, b"x")):
            with contextlib.suppress(ValueError, struct.error, OSError):
                read(path)
