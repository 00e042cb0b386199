"""Programs that mgpu starts: an interrupt at any moment leaves none of them behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from mgpu.programs import kill_group, start_program

BEGIN = """
import os, signal, time
from mgpu.interrupts import interrupts
from mgpu.programs import kill_group, start_group, start_program
signal.signal(signal.SIGINT, interrupts)
def signalled():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""
END = """
except KeyboardInterrupt:
    print("heard")
interrupts.end()
try:
    os.waitpid(-1, os.WNOHANG)
    print("left")
except ChildProcessError:
    print("none left")
"""


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(
            "start_group(['sleep', '600'], process_group=0, preexec_fn=lambda: os.kill(os.getppid(), signal.SIGINT))",
            id="while it starts",
        ),
        pytest.param("start_program(['sleep', '600'], {}); signalled()", id="while it runs"),
        pytest.param("kill_group(start_program(['sleep', '600'], {})); signalled()", id="once it has ended"),
    ],
)
def test_an_interrupted_mgpu_leaves_none(moment: str) -> None:
    told = subprocess.run(
        [sys.executable, "-c", f"{BEGIN}try:\n    {moment}{END}"],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert (told.stdout, told.stderr) == ("heard\nnone left\n", "")


def test_what_a_program_has_started_ends_with_it() -> None:
    process = start_program(["sh", "-c", "sleep 600 & echo $!; wait"], os.environ, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    child = psutil.Process(int(process.stdout.readline()))
    kill_group(process)
    assert process.returncode == -signal.SIGKILL
    assert psutil.wait_procs([child], timeout=180)[1] == []
