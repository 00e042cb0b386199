"""What `mgpu run` was asked for, as it was typed: planned again for each start, and again by another mgpu."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import typer

from mgpu.cli.options import PlannerOptions
from mgpu.cli.serving import Endpoint
from mgpu.running.recovery import P2P_VARIABLE, Settings

if TYPE_CHECKING:
    from mgpu.cli.prepared import Prepared
    from mgpu.running.company import Company
    from mgpu.running.instance import Instance
    from mgpu.running.state import Held

_NOT_REPEATED = ("api_key", "supervise", "json", "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """`words` are the options of the command line, without keys; `pinned` the names of all that was typed."""

    model: str
    options: PlannerOptions
    engine_arguments: tuple[str, ...]
    endpoint: Endpoint
    words: tuple[str, ...]
    pinned: tuple[str, ...]
    restarts_itself: bool

    def prepare(self, settings: Settings | None = None, others: Company | None = None) -> Prepared:
        """Return the plan with the changes in `settings` and without the memory that `others` have claimed. Raises
        MgpuError."""
        from mgpu.cli.prepare import prepare
        from mgpu.cli.setup import with_changes

        return prepare(
            self.model,
            with_changes(self.options, settings.options) if settings else self.options,
            engine_arguments=(*self.engine_arguments, *(settings.engine_arguments if settings else ())),
            must_run=True,
            without=others.without_claimed if others else None,
        )

    def command(self, name: str) -> tuple[str, ...]:
        """Return mgpu's argv that starts it again as the instance called `name`."""
        named = () if "--name" in self.words else ("--name", name)
        engine = ("--", *self.engine_arguments) if self.engine_arguments else ()
        return ("mgpu", "run", self.model, *named, *self.words, *engine)

    def instance(self, prepared_name: str, held: Held) -> Instance:
        """Return the record of a new instance of the model called so, as whose supervisor this process is."""
        from mgpu import __version__
        from mgpu.running.identity import identity
        from mgpu.running.instance import Instance, State
        from mgpu.running.registry import LOG

        supervisor = identity(os.getpid())
        assert supervisor
        return Instance(
            name=held.name,
            state=State.STARTING,
            model=prepared_name,
            started_at=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            log_path=str(held.folder / LOG),
            phase="planning",
            supervisor=supervisor,
            command=self.command(held.name),
            pinned=self.pinned,
            mgpu_version=__version__,
            restarts_itself=self.restarts_itself,
        )


def asked(
    context: typer.Context, model: str, options: PlannerOptions, endpoint: Endpoint, *, restarts_itself: bool
) -> Asked:
    """Return what the command line in `context` asks for."""
    engine_arguments = tuple(context.obj or ())
    words, flags = typed(context, without=_NOT_REPEATED)
    pinned = [*flags, *(word.partition("=")[0] for word in engine_arguments if word.startswith("-"))]
    if P2P_VARIABLE in os.environ:
        pinned.append(P2P_VARIABLE)
    return Asked(
        model=model,
        options=options,
        engine_arguments=engine_arguments,
        endpoint=endpoint,
        words=words,
        pinned=tuple(pinned),
        restarts_itself=restarts_itself,
    )


def with_port(asked: Asked, port: int | None) -> Asked:
    """Return the same at another port."""
    return replace(asked, endpoint=replace(asked.endpoint, port=port))


def typed(context: typer.Context, *, without: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the options as they were given, and their names; those of the parameters in `without` are left out."""
    words: list[str] = []
    flags: list[str] = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name) if parameter.name else None
        if not source or source.name != "COMMANDLINE" or parameter.name in without:
            continue
        flag = next((name for name in parameter.opts if name.startswith("--")), parameter.opts[0])
        value = context.params[parameter.name or ""]
        flags.append(flag)
        words += [flag] if getattr(parameter, "is_flag", False) else [flag, str(value)]
    return tuple(words), tuple(flags)
