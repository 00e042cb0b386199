"""`mgpu` alone: where you stand and what to type next."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mgpu import __version__
from mgpu.cli.result import Result
from mgpu.errors import MgpuError, Missing

if TYPE_CHECKING:
    from mgpu.backends.engine import Engine
    from mgpu.machine.snapshot import Machine
    from mgpu.running.ollama_attach import Attached
    from mgpu.running.registry import Entry

# Where Ollama listens unless it is told otherwise.
_OLLAMA = ("127.0.0.1", 11434)
_LISTENS_TIMEOUT_S = 0.2


def overview_result() -> Result:
    """Return the overview: cards, engines, and the commands that come next."""
    from mgpu.backends.engine import LLAMA_SERVER, OLLAMA_PROGRAM, VLLM_PROGRAM, Program, find
    from mgpu.machine.probe import probe

    machine = probe()
    warnings: list[str] = []

    def found(program: Program) -> Engine | None:
        try:
            return find(program)
        except Missing:  # `mgpu backends` says what is wrong
            return None
        except MgpuError as error:
            warnings.append(error.message)
            return None

    entries, running = _instances(machine)
    problem = machine.driver.problem if machine.driver else None
    llama_cpp, vllm, ollama = map(found, (LLAMA_SERVER, VLLM_PROGRAM, OLLAMA_PROGRAM))
    server = _ollama_server()
    engines = _engines(llama_cpp, vllm, ollama, server)
    standing = " · ".join(part for part in (f"mgpu {__version__}", _cards(machine), _driver(machine), engines) if part)

    def screen(_: int) -> Iterator[str]:
        yield standing
        if problem:
            yield f"driver: {problem}"
        yield ""
        yield '  mgpu run smollm2-135m --ask "Hello"     start a small model, ask it, stop'
        yield "  mgpu plan llama-70b --machine 2x4090    what fits on two cards you may buy"
        yield "  mgpu gpus                               the cards of this machine"
        yield "  mgpu backends                           the engines, and how to get one"
        yield "  mgpu profiles list                      the models mgpu knows by name"
        yield f"  mgpu ps                                 {running}"
        yield ""
        yield "  mgpu --help"

    return Result(
        command="mgpu",
        data={
            "version": __version__,
            "gpus": len(machine.gpus),
            "llama_cpp": str(llama_cpp.path) if llama_cpp else None,
            "vllm": str(vllm.path) if vllm else None,
            "ollama": str(ollama.path) if ollama else None,
            "ollama_url": server.url if server else None,
            "driver_problem": problem,
            "instances": [
                {"name": entry.name, "state": entry.instance.state if entry.instance else None} for entry in entries
            ],
        },
        screen=screen,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _instances(machine: Machine) -> tuple[tuple[Entry, ...], str]:
    """This user's instances as they are now, and the same in a few words."""
    from mgpu.cli.views.instances import running_words
    from mgpu.running.census import as_found, heeded_instances

    try:
        entries = tuple(as_found(entry, machine, {}) for entry in heeded_instances())
    except Missing:  # without a home there is no state
        entries = ()
    return entries, running_words(entries)


def _cards(machine: Machine) -> str:
    from mgpu.cli.views.words import card_name
    from mgpu.units import GIB

    counts: dict[str, int] = {}
    for gpu in machine.gpus:
        size = f" {gpu.total_bytes / GIB:.0f} GiB" if gpu.total_bytes else ""
        name = f"{card_name(gpu.name)}{size}"
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count}× {name}" for name, count in counts.items()) or "no GPU found by a driver"


def _driver(machine: Machine) -> str | None:
    return f"driver {machine.driver.version}" if machine.driver and machine.driver.version else None


def _engines(llama_cpp: Engine | None, vllm: Engine | None, ollama: Engine | None, server: Attached | None) -> str:
    """The engines in a few words; `-` for one that is not there. Only versions that are known without asking."""
    said = None
    if vllm:
        from mgpu.backends.vllm_program import installed_version

        said = installed_version(vllm.path)
    running = f"Ollama {server.version} running" if server else None
    return ", ".join(
        (
            "llama.cpp" if llama_cpp else "llama.cpp -",
            " ".join(word for word in ("vLLM", said) if word) if vllm else "vLLM -",
            running or ("Ollama" if ollama else "Ollama -"),
        )
    )


def _ollama_server() -> Attached | None:
    """The Ollama that runs, if any. Asking imports an HTTP client, so that it is only done where something listens."""
    if not os.environ.get("OLLAMA_HOST"):
        try:
            socket.create_connection(_OLLAMA, timeout=_LISTENS_TIMEOUT_S).close()
        except OSError:
            return None
    from mgpu.running.ollama_attach import Attached, attach

    try:
        server = attach()
    except MgpuError:
        return None
    return server if isinstance(server, Attached) else None
