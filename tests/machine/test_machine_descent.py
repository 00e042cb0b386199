"""Processes that an mgpu started are known by their ancestors."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgpu.machine.descent import is_mgpus
from tests.fakes.sysfs_tree import SysfsTree


def family(root: Path, *command_lines: str) -> SysfsTree:
    """Processes 100, 101, ...: each the child of the one before."""
    files: dict[str, str | bytes] = {}
    for pid, words in enumerate(command_lines, 100):
        files[f"proc/{pid}/status"] = f"Name:\tx\nPPid:\t{pid - 1 if pid > 100 else 1}\n"
        files[f"proc/{pid}/cmdline"] = words.replace(" ", "\0") + "\0"
    return SysfsTree(root).files(files)


@pytest.mark.parametrize(
    ("command_lines", "own"),
    [
        pytest.param(("bash", "/usr/bin/python3.12 /usr/bin/mgpu run x", "llama-server"), True, id="an engine"),
        pytest.param(
            ("python -P -m mgpu run x", "vllm serve", "VLLM::EngineCore", "VLLM::Worker"), True, id="a worker"
        ),
        pytest.param(("/opt/bin/mgpu run x", "llama-server"), True, id="a program of that name"),
        pytest.param(("tmux new -s mgpu", "bash", "llama-server"), False, id="a terminal of that name"),
        pytest.param(("python -c pass mgpu", "llama-server"), False, id="another program's argument"),
        pytest.param(("python -m http.server mgpu", "llama-server"), False, id="another module's argument"),
        pytest.param(("bash", "llama-server"), False, id="somebody else's"),
        pytest.param(("python mgpu",), False, id="mgpu itself"),
    ],
)
def test_an_ancestor_tells_whose_a_process_is(tmp_path: Path, command_lines: tuple[str, ...], own: bool) -> None:
    family(tmp_path, *command_lines)
    assert is_mgpus(tmp_path, 99 + len(command_lines)) is own


@pytest.mark.parametrize(
    "status",
    ["", "PPid:\t7\n", "PPid:\t" + "9" * 5000, "PPid:\tx", "\x00\xff", "PPid:\t-1"],
    ids=["empty", "its own parent", "huge", "no number", "binary", "negative"],
)
def test_a_process_that_cannot_be_followed_is_nobodys(tmp_path: Path, status: str) -> None:
    SysfsTree(tmp_path).files({"proc/7/status": status, "proc/7/cmdline": ""})
    assert not is_mgpus(tmp_path, 7)
    assert not is_mgpus(tmp_path, 8)
