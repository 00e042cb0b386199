"""`mgpu run`: plan, fetch, start, wait, prove, then answer once or follow until Ctrl-C."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgpu.cli.options import JsonOption, ModelArgument, PlannerOptions, with_planner_options
from mgpu.cli.output import Output
from mgpu.cli.result import Result
from mgpu.errors import EngineFailed, Interrupted, UsageError

if TYPE_CHECKING:
    from mgpu.cli.asked import Asked
    from mgpu.cli.prepared import Prepared
    from mgpu.cli.screens import RunScreen
    from mgpu.cli.serving import Endpoint, Session
    from mgpu.cli.starts import Starts
    from mgpu.running.client import Answer
    from mgpu.running.instance import Instance
    from mgpu.running.state import Held
    from mgpu.running.supervisor import Supervisor

# Set by the main program before the command is called: `run` speaks while it works.
output = Output(as_json=False)


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
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", help="File with the key that clients must send (or set MGPU_API_KEY)."),
    ] = None,
    api_key: Annotated[str | None, typer.Option("--api-key", hidden=True)] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve a network without a key: everybody in it may use the engine.")
    ] = False,
    interval: Annotated[float, typer.Option("--interval", help="Seconds between status lines.", min=0.1)] = 10.0,
    stall_timeout: Annotated[
        float,
        typer.Option("--stall-timeout", help="Seconds without any progress after which loading has failed.", min=1),
    ] = 120.0,
    supervise: Annotated[int | None, typer.Option("--supervise", hidden=True)] = None,
    json: JsonOption = False,
) -> Result | None:
    """Run MODEL: plan, fetch, start, prove that it answers, then follow it until Ctrl-C. Engine arguments follow --."""
    from mgpu.cli.access import api_key as key_of
    from mgpu.cli.access import refuse_typed_key, require_key, unused_key
    from mgpu.cli.asked import asked
    from mgpu.cli.screens import RunScreen
    from mgpu.cli.serving import Endpoint
    from mgpu.running.audience import TERMINAL_CLOSED
    from mgpu.running.instance import State
    from mgpu.running.ports import check_host
    from mgpu.running.registry import forget
    from mgpu.running.state import check_name

    if api_key is not None:
        raise refuse_typed_key()
    if ask is not None:
        _check_question(ask, detach, restart)
    elif max_tokens is not None:
        raise UsageError("--max-tokens is for the answer to --ask", hint='add --ask "…", or leave it out')
    endpoint = Endpoint(
        host=check_host(host),
        port=port,
        name=check_name(name) if name is not None else "",
        name_chosen=name is not None,
        # A supervisor has its key from the mgpu that started it: a pipe can be read once.
        api_key=key_of(api_key_file if supervise is None else None),
        stall_s=stall_timeout,
    )
    require_key(endpoint.host, endpoint.api_key, insecure=insecure)
    if supervise is None and (unused := unused_key(api_key_file, endpoint.api_key)):
        output.warn(unused)
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
        from mgpu.cli.serving import follow_session

        def use(session: Session) -> None:
            if ask is not None:
                _ask(session, ask, max_tokens, screen)
            else:
                follow_session(session, screen, supervisor, screen.sample_every_s)

        try:
            supervisor.live(starts.plan, starts.start, use)
        except KeyboardInterrupt:
            served = ask is None and supervisor.instance.ready_at
            raise Interrupted("stopped by request" if served else "interrupted") from None
        finally:
            # Whoever stopped it knows; a failure stays to be read, and what became of it without its terminal.
            last = supervisor.instance.exit
            unseen = ask is None and last and (last.message or "").startswith(TERMINAL_CLOSED)
            if supervisor.instance.state is State.STOPPED and not unseen:
                forget(supervisor.instance.name)
    return None


class _Claim:
    """A first plan with the name and the memory that it takes, which nobody else has then."""

    def __init__(self, wanted: Asked, screen: RunScreen, stack: contextlib.ExitStack) -> None:
        self._wanted = wanted
        self._screen = screen
        self._stack = stack
        self._begun: Instance | None = None
        self.held: Held | None = None
        stack.push(self._forget_if_interrupted)

    def made(self) -> tuple[Starts, Supervisor]:
        """Plan, say so, and take it. Raises MgpuError."""
        from mgpu.cli.starts import plan_in_company

        return plan_in_company(self._wanted, self._take)

    def _take(self, prepared: Prepared) -> tuple[Starts, Supervisor]:
        from mgpu.cli.starts import Starts, checked, planned
        from mgpu.running.leftovers import require_gone
        from mgpu.running.notify import ServiceManager
        from mgpu.running.state import held_folder
        from mgpu.running.supervisor import Supervisor

        wanted, screen = self._wanted, self._screen
        endpoint = replace(wanted.endpoint, name=wanted.endpoint.name or _name(prepared))
        screen.warn(prepared.warnings)
        prepared = checked(prepared, endpoint, screen)
        # Held before gigabytes are fetched: a name in use is said at once.
        self.held = self._stack.enter_context(held_folder(endpoint.name, chosen=endpoint.name_chosen))
        require_gone(self.held.folder)  # before its record is replaced
        screen.planned(prepared)
        endpoint = replace(endpoint, name=self.held.name)
        supervisor = Supervisor(
            wanted.instance(prepared.name, self.held), on_change=screen.became, service=ServiceManager.of()
        )
        self._begun = supervisor.instance
        supervisor.report(planned(prepared, endpoint))
        return Starts(wanted, screen, supervisor, prepared), supervisor

    def _forget_if_interrupted(self, _: object, error: BaseException | None, __: object) -> None:
        """Forget what was begun when an interrupt came before anybody could look after it: nothing was started, and
        nothing is to be told. Called when the name is not held any more, except by a supervisor that goes on."""
        if self._begun is None or not isinstance(error, (KeyboardInterrupt, Interrupted)):
            return
        from mgpu.running import registry
        from mgpu.running.state import state_path

        folder = state_path() / self._begun.name
        with contextlib.suppress(OSError), registry.locked(folder):
            left = registry.record(folder)
            own = left and left.started_at == self._begun.started_at
            if left and own and not left.state.is_over and left.engine is None:
                registry.forget(left.name)


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
                _remember(session, piece)
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


def _remember(session: Session, answer: Answer) -> None:
    """Keep how fast the answer came, for the plans that come."""
    from mgpu.running.measured import measured, remember

    measurement = measured(session.setting, answer) if session.setting else None
    if measurement:
        remember(measurement)
