"""A driver that never answers: the doctor says so, and ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fakes.sysfs_tree import SysfsTree

# It also hangs at exit, as what waits for a lock of a library that hangs does.
HANGS = """
#include <stdlib.h>
#include <unistd.h>
static void for_ever(void) { for (;;) pause(); }
int nvmlInitWithFlags(unsigned int flags) { atexit(for_ever); for_ever(); return 0; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
"""


@pytest.fixture
def hanging(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine whose driver hangs."""
    if shutil.which("gcc") is None:
        pytest.skip("the library that hangs needs gcc to be built")
    build = ["gcc", "-shared", "-fPIC", "-xc", "-", "-o", str(tmp_path / "libnvidia-ml.so.1")]
    subprocess.run(build, input=HANGS.encode(), check=True)
    root = SysfsTree(tmp_path / "root").host().root
    paths = {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2]), "MGPU_ROOT": str(root)}
    return {**os.environ, **paths, "PYTHONUNBUFFERED": "1"}


def start(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    program = "from mgpu.cli.main import run_main; run_main()"
    arguments = [sys.executable, "-c", program, "doctor", "--json"]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_driver_that_never_answers_is_a_failure_and_all_else_is_judged(hanging: dict[str, str]) -> None:
    with start(hanging) as doctor:
        said, _ = doctor.communicate(timeout=60)
    data = json.loads(said)["data"]
    assert doctor.returncode == 1
    assert "driver-not-loaded" in [each["id"] for each in data["findings"] if each["severity"] == "fail"]
    assert "no answer in 5 s" in said.decode()


def test_it_hears_a_signal_while_it_waits(hanging: dict[str, str]) -> None:
    with start(hanging) as doctor:
        threads = Path(f"/proc/{doctor.pid}/task")
        limit = time.monotonic() + 30
        while len(list(threads.iterdir())) < 2 and time.monotonic() < limit:
            time.sleep(0.01)
        doctor.send_signal(signal.SIGTERM)
        doctor.communicate(timeout=60)
    assert doctor.returncode == 130
