"""Builds the fake `libnvidia-ml.so.1` of fakenvml.c with gcc. Run as a program: build.py DIRECTORY [--old]."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("fakenvml.c")


def build(directory: Path, *, old_driver: bool = False) -> Path:
    """Compile the library into `directory` and return its path.

    Use it with LD_LIBRARY_PATH=directory, set before Python starts, and FAKE_NVML=file. An old driver
    lacks the newer functions; the default answers "not supported" wherever the fake has no answer.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "stubs.h").write_text(_stubs())
    library = directory / "libnvidia-ml.so.1"
    flags = ["-DOLD_DRIVER"] if old_driver else ["-DSTUBS", f"-I{directory}"]
    shared = ["-fPIC", "-shared", "-Wl,-soname,libnvidia-ml.so.1"]
    subprocess.run(["gcc", "-std=gnu11", "-O1", "-Wall", *shared, *flags, "-o", str(library), str(SOURCE)], check=True)
    return library


def _stubs() -> str:
    """Every NVML function that nvidia-ml-py can call and fakenvml.c does not define, as not supported."""
    import pynvml

    callable_names = set(re.findall(r'_nvmlGetFunctionPointer\("(\w+)"', Path(pynvml.__file__).read_text()))
    defined = set(re.findall(r"\b(nvml\w+)[(,]", SOURCE.read_text()))
    return "".join(f"int {name}(void) {{ return 3; }}\n" for name in sorted(callable_names - defined))


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), old_driver="--old" in sys.argv))
