"""`mgpu run`: plan, fetch, start, wait, prove, then answer once or follow until Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgpu.cli.options import JsonOption, ModelArgument, PlannerOptions, with_planner_options
from mgpu.cli.output import Output
from mgpu.cli.result import Result
from mgpu.errors import EngineFailed, Interrupted, NoAnswer, UsageError

if TYPE_CHECKING:
    from mgpu.backends.engine import Engine
    from mgpu.backends.llama_cpp import Launch
    from mgpu.cli.prepare import Prepared
    from mgpu.cli.screens import RunScreen
    from mgpu.running.client import EngineClient
    from mgpu.running.process import EngineProcess

# Set by the main program before the command is called: `run` speaks while it works.
output = Output(as_json=False)

_KEY_VARIABLES = ("MGPU_API_KEY", "LLAMA_API_KEY")
_PORT_ATTEMPTS = 5
# Between a broken connection and the end of a process that first writes a backtrace.
_BREAKING_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Where and how to serve; `port` is None when any free one will do."""

    host: str
    port: int | None
    name: str
    name_chosen: bool
    api_key: str | None
    stall_s: float


@with_planner_options
def run(
    context: typer.Context,
    model: ModelArgument,
    options: PlannerOptions,
    ask: Annotated[str | None, typer.Option("--ask", help="Ask this, stream the answer, stop.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Longest answer to --ask, thoughts included.", min=1)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the engine's command and start nothing.")] = False,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option("--port", help="Port (default: a free one from 8080 on).")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the instance (default: the model's).")] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", help="Key clients must send; better in the variable MGPU_API_KEY.")
    ] = None,
    interval: Annotated[float, typer.Option("--interval", help="Seconds between status lines.", min=0.1)] = 10.0,
    stall_timeout: Annotated[
        float,
        typer.Option("--stall-timeout", help="Seconds without any progress after which loading has failed.", min=1),
    ] = 120.0,
    json: JsonOption = False,
) -> Result | None:
    """Run MODEL: plan, fetch, start, prove that it answers, then follow it until Ctrl-C. Engine arguments follow --."""
    from mgpu.cli.prepare import prepare
    from mgpu.cli.process_title import hide_argument
    from mgpu.cli.screens import RunScreen
    from mgpu.running.ports import check_host, choose_port, is_loopback
    from mgpu.running.state import check_name, instance_folder, name_from

    if api_key:
        hide_argument(api_key)
    if ask is not None and not ask.strip():
        raise UsageError("--ask is empty", hint='for example --ask "Why is the sky blue?"')
    prepared = prepare(model, options, engine_arguments=context.obj or (), must_run=True)
    serving = Serving(
        host=check_host(host),
        port=port,
        name=check_name(name) if name is not None else name_from(prepared.name),
        name_chosen=name is not None,
        api_key=_api_key(api_key),
        stall_s=stall_timeout,
    )
    screen = RunScreen(output, asked=ask is not None, interval_s=interval)
    if dry_run:
        return _dry_run(prepared, serving, _engine(prepared, needed=False))
    screen.warn(prepared.warnings)
    if not serving.api_key and not is_loopback(serving.host):
        screen.warn([f"--host {serving.host} lets everybody in the network use this server: set MGPU_API_KEY"])
    engine = _engine(prepared, needed=True)
    assert engine
    _require_fit(prepared)
    # An unusable port is said before gigabytes are fetched for it.
    choose_port(serving.host, serving.port)
    screen.planned(prepared)
    with instance_folder(serving.name, chosen=serving.name_chosen) as (instance, folder):
        # Held before gigabytes are fetched: a name in use is said at once.
        prepared = _with_file(prepared, screen)
        serving = replace(serving, name=instance)
        with _started(prepared, serving, engine, folder, screen) as (process, client):
            if ask is not None:
                _ask(process, client, ask, max_tokens, screen)
            else:
                _follow(process, client, screen)
    return None


def _api_key(option: str | None) -> str | None:
    """The key of `--api-key` or of the environment. An empty one is a slip, not the wish for an open server."""
    for name, value in (("--api-key", option), *((variable, os.environ.get(variable)) for variable in _KEY_VARIABLES)):
        if value is not None:
            if not value.strip():
                raise UsageError(f"{name} is empty", hint="give a key, or leave it out (unset the variable)")
            return value
    return None


def _engine(prepared: Prepared, *, needed: bool) -> Engine | None:
    from mgpu.backends.engine import require_llama_server

    return prepared.engine or (require_llama_server() if needed else None)


def _require_fit(prepared: Prepared) -> None:
    """Raise NoAnswer unless the plan can run, with the cheapest ways out."""
    plan = prepared.plan
    if plan.best is not None:
        return
    reasons = "\n".join(plan.chosen.reasons)
    fixes = "   or   ".join(fix.change for fix in plan.fixes[:3] if fix.change.startswith("--"))
    raise NoAnswer(
        f"{prepared.name} does not fit\n{reasons}",
        code="does-not-fit",
        hint=f"add {fixes}" if fixes else f"mgpu plan {shlex.quote(prepared.argument)} shows the ledger",
    )


def _dry_run(prepared: Prepared, serving: Serving, engine: Engine | None) -> Result:
    """Return the command that would be started, quoted for a shell."""
    from mgpu.running.ports import choose_port

    _require_fit(prepared)
    port = choose_port(serving.host, serving.port)
    model = prepared.path or _file_name(prepared)
    program: Path | str = engine.path if engine else "llama-server"
    launch = _launch(prepared, serving, program=program, model=model, port=port)
    data = {"argv": list(launch.argv), "env": launch.public_env(), "fetched": prepared.path is not None}
    notes = () if prepared.path else (f"the model is not here yet: mgpu run fetches {model}",)
    return Result(
        command="run", data=data, screen=lambda _: (launch.shell_command(),), warnings=(*prepared.warnings, *notes)
    )


def _file_name(prepared: Prepared) -> str:
    files = prepared.source.files if prepared.source else ()
    return files[0] if files else f"{prepared.name}.gguf"


def _launch(prepared: Prepared, serving: Serving, *, program: Path | str, model: Path | str, port: int) -> Launch:
    from mgpu.backends.llama_cpp import build_launch

    return build_launch(
        prepared.plan.chosen,
        program=program,
        model=model,
        name=serving.name,
        host=serving.host,
        port=port,
        arguments=prepared.arguments,
        api_key=serving.api_key,
    )


def _with_file(prepared: Prepared, screen: RunScreen) -> Prepared:
    """Fetch the model where it is not here yet, and plan again from the file's own header."""
    if prepared.path:
        return prepared
    from mgpu.models.fetch import fetch

    assert prepared.source
    with screen.fetching() as on_progress:
        path = fetch(prepared.source, quantisation=prepared.plan.model.quantisation, on_progress=on_progress)
    prepared = prepared.planned_again(path)
    _require_fit(prepared)
    return prepared


@contextlib.contextmanager
def _started(
    prepared: Prepared, serving: Serving, engine: Engine, folder: Path, screen: RunScreen
) -> Iterator[tuple[EngineProcess, EngineClient]]:
    """The engine, started, ready and proven; stopped on the way out. A port lost to a race is replaced."""
    from mgpu.backends.engine import engine_environment
    from mgpu.running.client import EngineClient
    from mgpu.running.ports import choose_port, client_host
    from mgpu.running.process import EngineProcess
    from mgpu.running.reaper import watch
    from mgpu.running.start import EngineDied
    from mgpu.running.state import rotate

    assert prepared.path
    log_path = folder / "engine.log"
    for attempt in range(1, _PORT_ATTEMPTS + 1):
        port = choose_port(serving.host, serving.port)
        launch = _launch(prepared, serving, program=engine.path, model=prepared.path, port=port)
        rotate(log_path)
        begun = time.monotonic()
        url = f"http://{client_host(serving.host)}:{port}"
        process = EngineProcess.start(launch.argv, env=engine_environment() | dict(launch.env), log_path=log_path)
        # A parent-death signal reaches the engine alone; what it starts, or what it is a script for, needs the reaper.
        with process, watch(process.pid), EngineClient(url, api_key=serving.api_key) as client:
            try:
                screen.started(process, engine)
                _prove(process, client, prepared, screen, serving.stall_s)
                screen.ready(serving.name, url, process, prepared.plan.chosen, time.monotonic() - begun)
                yield process, client
                return
            except EngineDied as died:
                if died.code != "port-in-use" or serving.port is not None or attempt == _PORT_ATTEMPTS:
                    raise
            finally:
                _stop(process, serving.name, screen)


def _stop(process: EngineProcess, name: str, screen: RunScreen) -> None:
    if process.poll() is None:
        screen.stopping(name)
        begun = time.monotonic()
        process.stop()
        screen.stopped(name, time.monotonic() - begun)


def _prove(process: EngineProcess, client: EngineClient, prepared: Prepared, screen: RunScreen, stall_s: float) -> None:
    """Wait until the model is loaded, see that every planned card holds its part, and get one real answer."""
    from mgpu.backends.llama_cpp_log import buffers_by_device
    from mgpu.running.readiness import BUSY_STALL_FACTOR
    from mgpu.running.start import wait_until_ready

    with screen.loading(prepared.plan.model.file_bytes) as on_loading:
        wait_until_ready(process, client, on_loading, stall_s=stall_s)
    try:
        # A device that hangs in its first computation looks busy and says nothing.
        canary = client.canary(patience_s=stall_s * BUSY_STALL_FACTOR)
    except EngineFailed as error:
        raise _cause(process, error) from None
    screen.checked(prepared.plan.chosen, buffers_by_device(process.log_lines()), canary)


def _ask(process: EngineProcess, client: EngineClient, text: str, max_tokens: int | None, screen: RunScreen) -> None:
    from mgpu.running.client import Answer, Thought

    try:
        for piece in client.ask(text, max_tokens=max_tokens):
            if isinstance(piece, Answer):
                screen.answered(piece)
            elif isinstance(piece, Thought):
                screen.thought(piece)
            else:
                screen.answer_text(piece)
    except EngineFailed as error:
        screen.answer_broke_off()
        raise _cause(process, error) from None
    except KeyboardInterrupt:
        screen.answer_broke_off()
        raise


def _cause(process: EngineProcess, error: EngineFailed) -> EngineFailed:
    """What ended the engine, where a request failed because of that."""
    from mgpu.running.start import death

    # The connection breaks a moment before the process is gone.
    gone = error.code == "engine-died" and process.wait(_BREAKING_S) is not None
    return death(process) if gone else error


def _follow(process: EngineProcess, client: EngineClient, screen: RunScreen) -> None:
    """Show the engine's state until Ctrl-C (Interrupted) or its end (EngineDied)."""
    from mgpu.backends.llama_cpp_metrics import rates
    from mgpu.running.start import death

    previous = client.sample()
    try:
        with screen.following() as show:
            while True:
                if process.wait(screen.sample_every_s) is not None:
                    raise death(process)
                current = client.sample()
                show(current, rates(previous, current) if previous and current else None)
                previous = current or previous
    except KeyboardInterrupt:
        raise Interrupted("stopped by request") from None
