"""`mgpu run`: plan, fetch, start, wait, prove, then answer once or follow until Ctrl-C."""

from __future__ import annotations

import os
import re
import shlex
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgpu.cli.options import Backend, JsonOption, ModelArgument, PlannerOptions, with_planner_options
from mgpu.cli.output import Output
from mgpu.cli.result import Result
from mgpu.errors import BadModel, EngineFailed, Interrupted, Missing, NoAnswer, UsageError

if TYPE_CHECKING:
    from mgpu.cli.prepare import Prepared
    from mgpu.cli.screens import RunScreen
    from mgpu.cli.serving import Endpoint, Session
    from mgpu.running.ollama_attach import Attached

# Set by the main program before the command is called: `run` speaks while it works.
output = Output(as_json=False)

_KEY_VARIABLES = ("MGPU_API_KEY", "LLAMA_API_KEY", "VLLM_API_KEY")


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
    from mgpu.cli.attach import as_it_is, running_ollama
    from mgpu.cli.prepare import prepare
    from mgpu.cli.process_title import hide_argument
    from mgpu.cli.screens import RunScreen
    from mgpu.cli.serving import Endpoint, attached, started
    from mgpu.running.ports import check_host, is_loopback
    from mgpu.running.state import check_name, instance_folder, name_from

    if api_key:
        hide_argument(api_key)
    if ask is not None and not ask.strip():
        raise UsageError("--ask is empty", hint='for example --ask "Why is the sky blue?"')
    prepared = prepare(model, options, engine_arguments=context.obj or (), must_run=True)
    endpoint = Endpoint(
        host=check_host(host),
        port=port,
        name=check_name(name) if name is not None else name_from(prepared.name),
        name_chosen=name is not None,
        api_key=_api_key(api_key),
        stall_s=stall_timeout,
    )
    screen = RunScreen(output, asked=ask is not None, interval_s=interval)
    if dry_run:
        return _dry_run(prepared, endpoint)
    screen.warn(prepared.warnings)
    if not endpoint.api_key and not is_loopback(endpoint.host):
        screen.warn([f"--host {endpoint.host} lets everybody in the network use this server: set MGPU_API_KEY"])
    running = running_ollama(prepared, endpoint, screen)
    if running:
        prepared = as_it_is(prepared, screen)
    else:
        _require_startable(prepared, endpoint)
    screen.planned(prepared)
    with instance_folder(endpoint.name, chosen=endpoint.name_chosen) as (instance, folder):
        # Held before gigabytes are fetched: a name in use is said at once.
        prepared = _with_weights(prepared, screen, running)
        screen.planned_again(prepared)
        endpoint = replace(endpoint, name=instance)
        with (
            attached(prepared, running, screen, endpoint.stall_s)
            if running
            else started(prepared, endpoint, folder, screen)
        ) as session:
            if ask is not None:
                _ask(session, ask, max_tokens, screen)
            else:
                _follow(session, screen)
    return None


def _api_key(option: str | None) -> str | None:
    """The key of `--api-key` or of the environment. An empty one is a slip, not the wish for an open server."""
    for name, value in (("--api-key", option), *((variable, os.environ.get(variable)) for variable in _KEY_VARIABLES)):
        if value is not None:
            if not value.strip():
                raise UsageError(f"{name} is empty", hint="give a key, or leave it out (unset the variable)")
            return value
    return None


def _require_startable(prepared: Prepared, endpoint: Endpoint) -> None:
    """Raise what would keep the engine from starting, before gigabytes are fetched for it: that it is not installed,
    that the model does not fit, that the port cannot be used, that the engine cannot be told what was asked for."""
    from mgpu.cli.serving import build_launch
    from mgpu.planning.choice import TITLES
    from mgpu.running.ports import choose_port
    from mgpu.running.state import state_path

    if prepared.engine is None:
        missing = f"{TITLES[prepared.backend]} is not installed"
        raise Missing(missing, code="engine-missing", hint=prepared.ways[prepared.backend].install)
    _require_fit(prepared)
    choose_port(endpoint.host, endpoint.port)
    build_launch(prepared, endpoint, port=endpoint.port or 1, folder=state_path() / endpoint.name)
    _require_tokenizer(prepared)


def _require_fit(prepared: Prepared) -> None:
    """Raise NoAnswer unless the plan can run, with the cheapest ways out."""
    plan = prepared.plan
    if plan.best is not None:
        return
    verdict, reasons = plan.chosen.verdict, "\n".join(plan.chosen.reasons)
    what = {"illegal": "cannot be run so", "unavailable": "fits no engine that is installed"}
    changes = [fix.change for fix in plan.fixes[:3]]
    fixes = [change for change in changes if not change.startswith("--")]
    if options := "   or   ".join(change for change in changes if change.startswith("--")):
        fixes.append(f"add {options}")
    raise NoAnswer(
        f"{prepared.name} {what.get(verdict, 'does not fit')}\n{reasons}",
        code="illegal" if verdict == "illegal" else "does-not-fit",
        hint="   or   ".join(fixes)
        or _lawful(prepared, reasons)
        or f"mgpu plan {shlex.quote(prepared.argument)} shows the ledger",
    )


def _require_tokenizer(prepared: Prepared) -> None:
    """Raise BadModel for a folder in which vLLM would miss the tokenizer, after a quarter of a minute."""
    from mgpu.models.folder import has_tokenizer

    folder, arguments = prepared.weights.path, prepared.ways[prepared.backend].arguments
    own = any(word.partition("=")[0] in ("--tokenizer", "--skip-tokenizer-init") for word in arguments)
    if prepared.backend == Backend.vllm and folder and not own and not has_tokenizer(folder):
        raise BadModel(
            f"{folder} holds no tokenizer: vLLM cannot serve a model without one",
            code="model-missing",
            hint="copy tokenizer.json and tokenizer_config.json of the model there, or name one: -- --tokenizer PATH",
        )


def _lawful(prepared: Prepared, reasons: str) -> str | None:
    """What to ask for instead of a shape or a context that is not possible, where the reasons tell."""
    if sizes := re.search(r"tensor parallel sizes that work: (.*)", reasons):
        cards = len(prepared.ways[prepared.backend].gpus) or 1
        size = max(size for size in map(int, sizes[1].split(", ")) if size <= cards)
        fewer = f"--gpus {size} " if size < cards else ""
        return f"{fewer}--tensor-parallel {size}, or leave it out and mgpu chooses"
    if shape := re.search(r"a shape of .* takes (\d+) cards?, and there (?:are|is) (\d+)", reasons):
        return f"--gpus {shape[1]}" if int(shape[1]) < int(shape[2]) else "a smaller shape, or leave it to mgpu"
    most = re.search(r"more than the (\d+) vLLM allows|gives a user (\d+) tokens at most", reasons)
    return f"--ctx {most[1] or most[2]}" if most else None


def _dry_run(prepared: Prepared, endpoint: Endpoint) -> Result:
    """Return the command that would be started, quoted for a shell."""
    from mgpu.backends import load_backend
    from mgpu.cli.serving import build_launch
    from mgpu.running.ollama_attach import Attached
    from mgpu.running.ports import choose_port
    from mgpu.running.state import state_path

    if isinstance(prepared.running, Attached):
        nothing = f"# nothing is started: the Ollama at {prepared.running.url} is used as it is"
        data: dict[str, Any] = {"argv": [], "env": {}, "fetched": prepared.weights.path is not None}
        return Result(command="run", data=data, screen=lambda _: (nothing,), warnings=prepared.warnings)
    _require_fit(prepared)
    port = choose_port(endpoint.host, endpoint.port)
    launch = build_launch(prepared, endpoint, port=port, folder=state_path() / endpoint.name)
    if prepared.engine:
        launch = load_backend(prepared.backend).fitted(launch, prepared.engine)
    here = prepared.weights.path is not None
    data = {"argv": list(launch.argv), "env": launch.public_env(), "fetched": here}
    notes = () if here else (f"the model is not here yet: mgpu run fetches {prepared.weights.label}",)
    return Result(
        command="run", data=data, screen=lambda _: (launch.shell_command(),), warnings=(*prepared.warnings, *notes)
    )


def _with_weights(prepared: Prepared, screen: RunScreen, running: Attached | None) -> Prepared:
    """Fetch the model where it is not here yet, and plan again from what it really is. Ollama fetches its tags."""
    from mgpu.models.forms import HubFolder
    from mgpu.models.source import OllamaTag

    weights = prepared.weights
    if weights.path or isinstance(weights.source, OllamaTag):
        return prepared
    assert weights.source
    with screen.fetching() as on_progress:
        if isinstance(weights.source, HubFolder):
            from mgpu.models.folder import fetch_folder

            path = fetch_folder(weights.source.repository, weights.source.revision, on_progress=on_progress)
        else:
            from mgpu.models.fetch import fetch

            path = fetch(weights.source, quantisation=weights.facts.quantisation, on_progress=on_progress)
    prepared = prepared.fetched(path)
    if running:
        return prepared.left_to_itself()
    _require_fit(prepared)
    return prepared


def _ask(session: Session, text: str, max_tokens: int | None, screen: RunScreen) -> None:
    from mgpu.running.client import Answer, Thought

    try:
        for piece in session.link.ask(text, max_tokens=max_tokens):
            if isinstance(piece, Answer):
                screen.answered(piece)
            elif isinstance(piece, Thought):
                screen.thought(piece)
            else:
                screen.answer_text(piece)
    except EngineFailed as error:
        screen.answer_broke_off()
        raise session.cause(error) from None
    except KeyboardInterrupt:
        screen.answer_broke_off()
        raise


def _follow(session: Session, screen: RunScreen) -> None:
    """Show the engine's state until Ctrl-C (Interrupted) or its end (EngineDied)."""
    from mgpu.backends.samples import rates
    from mgpu.running.start import death

    previous = session.link.sample()
    try:
        with screen.following() as show:
            while True:
                if session.process is None:
                    time.sleep(screen.sample_every_s)
                elif session.process.wait(screen.sample_every_s) is not None:
                    raise death(session.process, session.backend)
                current = session.link.sample()
                if session.process is None and not (current or session.link.is_up()):
                    raise EngineFailed(
                        "the engine that somebody else ran is gone",
                        code="engine-died",
                        hint="mgpu backends shows what runs",
                    )
                show(current, rates(previous, current) if previous and current else None)
                previous = current or previous
    except KeyboardInterrupt:
        raise Interrupted("stopped by request") from None
