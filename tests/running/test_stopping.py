"""Asking for a stop: exactly one process hears, and the wish is read by whom it is for."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mgpu.running.identity import identity, send
from mgpu.running.stopping import asked_grace_s


def test_a_signal_goes_to_exactly_the_process_that_is_meant() -> None:
    with subprocess.Popen(["/bin/sleep", "600"]) as process:
        now = identity(process.pid)
        assert now
        for other in (
            replace(now, started_ticks=now.started_ticks - 1),
            replace(now, boot_id="another boot"),
            replace(now, pid=2**22),
        ):
            assert not send(other, signal.SIGKILL)
        assert process.poll() is None
        assert send(now, signal.SIGKILL)
        while identity(process.pid):  # until it is a zombie
            pass
        assert not send(now, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_a_process_of_another_user_is_not_signalled_even_by_root() -> None:
    with subprocess.Popen(["/bin/sleep", "600"], user=65534) as process:
        now = identity(process.pid)
        assert now
        with pytest.raises(PermissionError, match="another user's"):
            send(now, signal.SIGKILL)
        assert process.poll() is None
        process.kill()


ME = "{0.pid} {0.started_ticks}"


@pytest.mark.parametrize(
    ("text", "grace_s"),
    [
        pytest.param(f"2.5 {ME}\n", 2.5, id="for this process"),
        pytest.param(f"0 {ME}", 0.0, id="at once"),
        pytest.param("2.5 1 1\n", None, id="for another one"),
        pytest.param(f"-1 {ME}\n", None, id="less than no time"),
        pytest.param(f"nan {ME}\n", None, id="no number"),
        pytest.param(f"inf {ME}\n", None, id="without end"),
        pytest.param("2.5", None, id="cut off"),
        pytest.param("", None, id="empty"),
        pytest.param("9" * 100_000, None, id="huge"),
        pytest.param(None, None, id="not there"),
    ],
)
def test_a_wish_that_makes_no_sense_is_none(text: str | None, grace_s: float | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "stop").write_text(text.format(identity(os.getpid())))
    assert asked_grace_s(tmp_path) == grace_s


def test_a_pipe_or_a_link_in_its_place_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "stop")
    assert asked_grace_s(tmp_path) is None
    (tmp_path / "stop").unlink()
    (tmp_path / "wish").write_text(f"2.5 {ME}".format(identity(os.getpid())))
    (tmp_path / "stop").symlink_to(tmp_path / "wish")
    assert asked_grace_s(tmp_path) is None
