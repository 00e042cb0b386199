"""What the system has run out of is told apart from what is wrong."""

from __future__ import annotations

import errno

import pytest

from mgpu.running.causes import KINDS, Kind
from mgpu.running.shortage import shortage


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        pytest.param(BlockingIOError(errno.EAGAIN, "again"), "no-resources", id="no process"),
        pytest.param(OSError(errno.ENOMEM, "memory"), "no-resources", id="no memory for a process"),
        pytest.param(OSError(errno.EMFILE, "files"), "no-resources", id="too many files of this process"),
        pytest.param(OSError(errno.ENFILE, "files"), "no-resources", id="too many files of all"),
        pytest.param(MemoryError(), "no-resources", id="no memory for Python"),
        pytest.param(RuntimeError("can't start new thread"), "no-resources", id="no thread"),
        pytest.param(OSError(errno.ENOSPC, "space"), "disk-full", id="no room on the disk"),
        pytest.param(OSError(errno.EDQUOT, "quota"), "disk-full", id="no room for this user"),
        pytest.param(PermissionError(errno.EACCES, "no"), None, id="what is forbidden"),
        pytest.param(FileNotFoundError(errno.ENOENT, "where"), None, id="what is not there"),
        pytest.param(RuntimeError("other"), None, id="another RuntimeError"),
        pytest.param(OSError("without a number"), None, id="an error without a number"),
        pytest.param(KeyError("x"), None, id="a bug"),
    ],
)
def test_shortages(problem: BaseException, code: str | None) -> None:
    found = shortage(problem, "the engine could not be started")
    assert (found and found.code) == code
    if found:
        assert found.message.startswith("the engine could not be started: ")
        assert found.hint
        assert KINDS[found.code] is Kind.ENVIRONMENT
