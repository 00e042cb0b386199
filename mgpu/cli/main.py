"""The `mgpu` command: the table of commands, and what becomes of their results and errors."""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Annotated, Any

import typer

from mgpu import __version__
from mgpu.cli import backends, doctor, export, logs, machine, models, plan, profiles, ps, reap, run, stop
from mgpu.cli.output import Output
from mgpu.cli.result import Result, failure
from mgpu.errors import Interrupted, MgpuError, Missing, UsageError
from mgpu.interrupts import interrupts
from mgpu.machine.patience import is_awaited

# A pipe's reader has left, or the terminal was closed.
_NOBODY_READS = (errno.EPIPE, errno.EIO)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_ENGINE_ARGUMENT_COMMANDS = ("run", "plan", "export")
_COMMANDS = (
    *("run", "plan", "export", "ps", "logs", "stop", "reap", "top"),
    *("doctor", "pull", "ls", "gpus", "backends", "profiles"),
)
# What stands after the name of a family of commands.
_FAMILIES = {"profiles": ("list", "show", "check", "new", "schema"), "backends": ("install",)}

app = typer.Typer(
    name="mgpu",
    help="Run local LLM engines on several GPUs: plan memory card by card, start, prove, watch.",
    epilog="Exit codes: 0 yes, 1 no, 2 wrong usage, 3 something is missing, 4 the engine failed, 130 interrupted.",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=True,
    pretty_exceptions_enable=False,
)
app.command("run")(run.run)
app.command("plan")(plan.plan)
app.command("export")(export.export)
app.command("ps")(ps.ps)
app.command("logs")(logs.logs)
app.command("stop")(stop.stop)
app.command("reap")(reap.reap)
app.command("top")(ps.top)
app.command("doctor")(doctor.doctor)
app.command("pull")(models.pull)
app.command("ls")(models.ls)
app.command("gpus")(machine.gpus)
app.add_typer(backends.app, name="backends")
app.add_typer(profiles.app, name="profiles")


@app.callback(invoke_without_command=True)
def overview(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print mgpu's version.")] = False,
    json: Annotated[bool, typer.Option("--json", hidden=True)] = False,
) -> Result | None:
    """Run local LLM engines on several GPUs: plan memory card by card, start, prove, watch."""
    from mgpu.cli.overview import overview_result

    if version:
        return Result(command="version", data={"version": __version__}, screen=lambda _: (f"mgpu {__version__}",))
    return None if context.invoked_subcommand else overview_result()


def run_command(arguments: list[str]) -> int:
    """Run one command line and return its exit code; everything expected has been printed."""
    own, engine = _split_at_dashes(arguments)
    out = Output(as_json="--json" in own)
    name = _command_name(own)
    try:
        result = _call(own, engine, out)
    except typer.Exit as leave:  # after --help
        return leave.exit_code
    except MgpuError as error:
        if isinstance(error, UsageError) and not error.hint:
            error.hint = f"mgpu {'' if name == 'mgpu' else name.replace('.', ' ') + ' '}--help"
        result = failure(name, error, simulated=any(word.partition("=")[0] == "--machine" for word in own))
    except (KeyboardInterrupt, typer.Abort):
        result = failure(name, Interrupted("interrupted"))
    except Exception as bug:
        if isinstance(bug, OSError) and bug.errno in _NOBODY_READS:
            return _unheard()
        if isinstance(bug, OSError) and bug.errno in _DISK_FULL:
            result = failure(name, Missing(f"nothing more can be written: {bug.strerror}", code="disk-full"))
        else:
            from mgpu.cli.bug import report_bug

            result = failure(name, report_bug(bug, arguments))
    if result is None:
        return 0
    try:
        out.show(result)
        sys.stdout.flush()
    except OSError as error:
        _unheard()
        if error.errno not in _NOBODY_READS:
            out.error(Missing(f"the answer cannot be written: {error.strerror}", code="output-unwritable"))
            return Missing.exit_code
    return result.exit_code


def _unheard() -> int:
    """Nobody reads any more (`| head`, a closed terminal): Python must not complain when it flushes at exit."""
    sys.stdout = Output.nowhere()
    return 0


def _split_at_dashes(arguments: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """What is mgpu's, and what follows `--` for the engine."""
    if "--" not in arguments or arguments[0] not in _ENGINE_ARGUMENT_COMMANDS:
        return arguments, ()
    at = arguments.index("--")
    return arguments[:at], tuple(arguments[at + 1 :])


def _command_name(words: list[str]) -> str:
    """The command as its results name it, known before anything is parsed: a wrong option has it too."""
    name = next((word for word in words if word in _COMMANDS), "mgpu")
    return next((f"{name}.{word}" for word in words if word in _FAMILIES.get(name, ())), name)


def _call(arguments: list[str], engine_arguments: tuple[str, ...], out: Output) -> Result | None:
    command = typer.main.get_command(app)
    if "_MGPU_COMPLETE" in os.environ:
        command()  # a shell asks what can be completed
    run.output = models.output = backends.output = doctor.output = logs.output = out
    export.output = ps.output = stop.output = reap.output = out
    try:
        # Not `command.main()`: it would turn interrupts and broken pipes into exits of its own.
        with command.make_context("mgpu", arguments, obj=engine_arguments) as context:
            result = command.invoke(context)
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        # Click's usage errors, which Typer carries a copy of under a name that may change.
        message = getattr(error, "format_message", None)
        if message is None or not hasattr(error, "ctx"):
            raise
        from mgpu.cli.usage import usage_words

        raise _usage(usage_words(error, str(message())), getattr(error, "ctx", None)) from None
    return result if isinstance(result, Result) else None


def _usage(message: str, context: Any) -> UsageError:
    # An option without its value has no context: the command's name is known all the same.
    return UsageError(message, hint=f"{context.command_path} --help" if context else None)


def run_main() -> None:
    """Entry point of the `mgpu` program."""
    # A service manager's SIGTERM and a closed terminal end mgpu the way Ctrl-C does: the engine is stopped.
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    for number, handler in usual.items():
        if signal.getsignal(number) == handler:
            signal.signal(number, interrupts)
    interrupts.recover_lost()
    try:
        exit_code = run_command(sys.argv[1:])
    except KeyboardInterrupt:
        exit_code = Interrupted.exit_code
    interrupts.end()
    for number in (*usual, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)  # all is done: a signal now could only spoil the exit code
    _let_go_of_the_streams()
    if is_awaited():
        os._exit(exit_code)
    sys.exit(exit_code)


def _let_go_of_the_streams() -> None:
    """Python flushes both streams at its end, and would turn a reader that has left into exit status 120."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError:
            setattr(sys, name, Output.nowhere())
