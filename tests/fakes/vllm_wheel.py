"""A package of a few hundred bytes that pip installs where vLLM takes gigabytes."""

from __future__ import annotations

import zipfile
from pathlib import Path

WORKS = "print('9.9.9')"


def wheel(
    folder: Path, *, name: str = "vllm", version: str = "9.9.9", main: str = WORKS, program: str = "vllm"
) -> None:
    """Put a wheel into `folder` whose program runs `main`."""
    folder.mkdir(exist_ok=True)
    information = f"{name}-{version}.dist-info"
    files = {
        "fake_vllm.py": f"def main():\n    {main}\n",
        f"{information}/METADATA": f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n",
        f"{information}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{information}/entry_points.txt": f"[console_scripts]\n{program} = fake_vllm:main\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{information}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in {**files, f"{information}/RECORD": record}.items():
            archive.writestr(path, text)
