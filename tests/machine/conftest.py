from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mgpu.machine.snapshot import Machine, machine_from_json

REPOSITORY = Path(__file__).parents[2]

# Reads every rig named on the command line with the real nvidia-ml-py and prints the machines as one JSON list.
# The fake library reads its file anew at each nvmlInit, so one process (and one import) serves many rigs.
READER = """
import json, os, sys
from pathlib import Path
from mgpu.machine.nvidia import read_nvidia
from mgpu.machine.snapshot import Machine, to_json

machines = []
for rig in sys.argv[2:]:
    os.environ["FAKE_NVML"] = rig
    driver, gpus, links = read_nvidia(Path(sys.argv[1]))
    machines.append(to_json(Machine(captured_at="", source="probed", driver=driver, gpus=gpus, links=links)))
print(json.dumps(machines))
"""


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    """tree(files, links) writes files (path to content) and links (path to target) under a root like "/"."""

    def write(files: dict[str, str | bytes], links: dict[str, str] | None = None) -> Path:
        root = tmp_path / "root"
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        for name, target in (links or {}).items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(os.path.relpath(root / target, path.parent))
        root.mkdir(exist_ok=True)
        return root

    return write


def python(library: Path, program: str, *arguments: object, **environment: str) -> str:
    """Run a Python program with the driver's libraries looked for in a directory; return what it prints."""
    paths = {"LD_LIBRARY_PATH": str(library), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *map(str, arguments)],
        env={**os.environ, **paths, **environment},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    ).stdout


@pytest.fixture
def run_python(nvml: dict[str, Path]) -> Callable[..., str]:
    """run_python(program, *arguments, FAKE_NVML=rig) runs it where the fake driver library is found."""
    return lambda program, *arguments, **environment: python(nvml["new"], program, *arguments, **environment)


@pytest.fixture
def read_rigs(nvml: dict[str, Path], tmp_path: Path) -> Callable[..., list[Machine]]:
    """read_rigs(paths, root=, driver="new") gives each rig as mgpu sees it through nvidia-ml-py."""

    def read(rigs: list[Path], root: Path = tmp_path / "nothing", driver: str = "new") -> list[Machine]:
        library = nvml.get(driver, Path(driver))
        return [machine_from_json(machine) for machine in json.loads(python(library, READER, root, *rigs))]

    return read


@pytest.fixture
def read_rig(read_rigs: Callable[..., list[Machine]], tmp_path: Path) -> Callable[..., Machine]:
    """read_rig(name, *lines, root=, driver="new") reads a rig with lines added, which override its own."""

    def read(name: str, *lines: str | bytes, **options: object) -> Machine:
        rig = tmp_path / "rig.txt"
        added = [line if isinstance(line, bytes) else line.encode() for line in lines]
        rig.write_bytes(b"\n".join([(REPOSITORY / f"tests/machines/rigs/{name}.txt").read_bytes(), *added]))
        return read_rigs([rig], **options)[0]

    return read
