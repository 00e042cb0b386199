"""`mgpu run`: plan, fetch, start, wait, prove, then answer once or follow until Ctrl-C."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgpu.cli.options import JsonOption, ModelArgument, PlannerOptions, with_planner_options
from mgpu.cli.output import Output
from mgpu.cli.result import Result
from mgpu.errors import EngineFailed, Interrupted, UsageError

if TYPE_CHECKING:
    from mgpu.cli.asked import Asked
    from mgpu.cli.prepare import Prepared
    from mgpu.cli.screens import RunScreen
    from mgpu.cli.serving import Endpoint, Session
    from mgpu.cli.starts import Starts
    from mgpu.running.state import Held
    from mgpu.running.supervisor import Supervisor

# Set by the main program before the command is called: `run` speaks while it works.
output = Output(as_json=False)

_KEY_VARIABLES = ("MGPU_API_KEY", "LLAMA_API_KEY", "VLLM_API_KEY")


class Restart(StrEnum):
    """When an engine that has ended is started again."""

    no = "no"
    on_failure = "on-failure"


@with_planner_options
def run(
    context: typer.Context,
    model: ModelArgument,
    options: PlannerOptions,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Leave it running: return when it is ready, or with the failure.")
    ] = False,
    restart: Annotated[
        Restart | None,
        typer.Option("--restart", help="Start an engine again that ended (default: on-failure with -d, else no)."),
    ] = None,
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
    supervise: Annotated[int | None, typer.Option("--supervise", hidden=True)] = None,
    json: JsonOption = False,
) -> Result | None:
    """Run MODEL: plan, fetch, start, prove that it answers, then follow it until Ctrl-C. Engine arguments follow --."""
    from mgpu.cli.asked import asked
    from mgpu.cli.process_title import hide_argument
    from mgpu.cli.screens import RunScreen
    from mgpu.cli.serving import Endpoint
    from mgpu.running.instance import State
    from mgpu.running.ports import check_host
    from mgpu.running.registry import forget
    from mgpu.running.state import check_name

    if api_key:
        hide_argument(api_key)
    if ask is not None:
        _check_question(ask, detach, restart)
    endpoint = Endpoint(
        host=check_host(host),
        port=port,
        name=check_name(name) if name is not None else "",
        name_chosen=name is not None,
        api_key=_api_key(api_key),
        stall_s=stall_timeout,
    )
    restarts_itself = (restart or (Restart.on_failure if detach else Restart.no)) is Restart.on_failure
    wanted = asked(context, model, options, endpoint, restarts_itself=restarts_itself)
    if supervise is not None:
        from mgpu.cli.detach import supervise_detached

        supervise_detached(wanted, supervise, RunScreen(output, asked=False, interval_s=interval, detached=True))
        return None
    if dry_run:
        prepared = wanted.prepare()
        return _dry_run(prepared, replace(endpoint, name=endpoint.name or _name(prepared)))
    screen = RunScreen(output, asked=ask is not None, interval_s=interval, streams=not detach)
    with contextlib.ExitStack() as stack:
        claim = _Claim(wanted, screen, stack)
        starts, supervisor = claim.made()
        if detach:
            from mgpu.cli.detach import run_detached

            assert claim.held
            return run_detached(wanted, claim.held, screen)
        try:
            supervisor.live(
                starts.plan,
                starts.start,
                lambda session: (
                    _ask(session, ask, max_tokens, screen) if ask is not None else _follow(session, screen, supervisor)
                ),
            )
        except KeyboardInterrupt:
            served = ask is None and supervisor.instance.ready_at
            raise Interrupted("stopped by request" if served else "interrupted") from None
        finally:
            # Whoever stopped it knows; a failure stays to be read.
            if supervisor.instance.state is State.STOPPED:
                forget(supervisor.instance.name)
    return None


class _Claim:
    """A first plan with the name and the memory that it takes, which nobody else has then."""

    def __init__(self, wanted: Asked, screen: RunScreen, stack: contextlib.ExitStack) -> None:
        self._wanted = wanted
        self._screen = screen
        self._stack = stack
        self.held: Held | None = None

    def made(self) -> tuple[Starts, Supervisor]:
        """Plan, say so, and take it. Raises MgpuError."""
        from mgpu.cli.starts import plan_in_company

        return plan_in_company(self._wanted, self._take)

    def _take(self, prepared: Prepared) -> tuple[Starts, Supervisor]:
        from mgpu.cli.starts import Starts, checked, planned
        from mgpu.running.notify import ServiceManager
        from mgpu.running.ports import is_loopback
        from mgpu.running.state import held_folder
        from mgpu.running.supervisor import Supervisor

        wanted, screen = self._wanted, self._screen
        endpoint = replace(wanted.endpoint, name=wanted.endpoint.name or _name(prepared))
        screen.warn(prepared.warnings)
        if not endpoint.api_key and not is_loopback(endpoint.host):
            screen.warn([f"--host {endpoint.host} lets everybody in the network use this server: set MGPU_API_KEY"])
        prepared, _ = checked(prepared, endpoint, screen)
        screen.planned(prepared)
        # Held before gigabytes are fetched: a name in use is said at once.
        self.held = self._stack.enter_context(held_folder(endpoint.name, chosen=endpoint.name_chosen))
        endpoint = replace(endpoint, name=self.held.name)
        supervisor = Supervisor(
            wanted.instance(prepared.name, self.held), on_change=screen.became, service=ServiceManager.of()
        )
        supervisor.report(planned(prepared, endpoint))
        return Starts(wanted, screen, supervisor, prepared), supervisor


def _name(prepared: Prepared) -> str:
    from mgpu.running.state import name_from

    return name_from(prepared.name)


def _check_question(ask: str, detach: bool, restart: Restart | None) -> None:
    if not ask.strip():
        raise UsageError("--ask is empty", hint='for example --ask "Why is the sky blue?"')
    if detach:
        raise UsageError("--ask stops when it is answered, and -d leaves it running", hint="leave one of them out")
    if restart is Restart.on_failure:
        raise UsageError("--ask asks once: there is nothing to restart", hint="leave --restart out")


def _api_key(option: str | None) -> str | None:
    """The key of `--api-key` or of the environment. An empty one is a slip, not the wish for an open server."""
    for name, value in (("--api-key", option), *((variable, os.environ.get(variable)) for variable in _KEY_VARIABLES)):
        if value is not None:
            if not value.strip():
                raise UsageError(f"{name} is empty", hint="give a key, or leave it out (unset the variable)")
            return value
    return None


def _dry_run(prepared: Prepared, endpoint: Endpoint) -> Result:
    """Return the command that would be started, quoted for a shell."""
    from mgpu.backends import load_backend
    from mgpu.cli.serving import build_launch
    from mgpu.cli.startable import require_fit
    from mgpu.running.ollama_attach import Attached
    from mgpu.running.ports import choose_port
    from mgpu.running.state import state_path

    if isinstance(prepared.running, Attached):
        nothing = f"# nothing is started: the Ollama at {prepared.running.url} is used as it is"
        data: dict[str, Any] = {"argv": [], "env": {}, "fetched": prepared.weights.path is not None}
        return Result(command="run", data=data, screen=lambda _: (nothing,), warnings=prepared.warnings)
    require_fit(prepared)
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


def _follow(session: Session, screen: RunScreen, supervisor: Supervisor) -> None:
    """Show the engine's state until Ctrl-C or its end (EngineDied)."""
    from mgpu.cli.starts import cards
    from mgpu.running.following import follow

    assert session.canary
    with screen.following() as show:
        follow(
            supervisor,
            session.backend,
            session.link,
            show,
            every_s=screen.sample_every_s,
            canary=session.canary,
            cards=cards,
        )
