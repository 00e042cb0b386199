"""`mgpu plan`: memory card by card, before anything is fetched."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgpu.cli.options import JsonOption, PlannerOptions, with_planner_options
from mgpu.cli.result import Result
from mgpu.errors import UsageError

if TYPE_CHECKING:
    from mgpu.backends.backend import Launch
    from mgpu.cli.prepared import Prepared
    from mgpu.planning.candidates import Candidate

ModelsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL",
        help="Profiles, .gguf files, model folders, hf:ORG/REPO[:QUANT], ollama:NAME[:TAG].",
        show_default=False,
    ),
]
# What `mgpu run` does not take, with its value.
_ELSEWHERE = ("--machine", "--price")

MachinesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--machine",
        help="Another machine: 2x4090, 4090+4080+ram64 (GiB), or a snapshot file; several are compared.",
    ),
]
PricesOption = Annotated[
    list[str] | None,
    typer.Option("--price", metavar="CARD=PRICE", help='What a card costs, as in "RTX 4090=1800".'),
]


@with_planner_options
def plan(
    context: typer.Context,
    models: ModelsArgument,
    options: PlannerOptions,
    machine: MachinesOption = None,
    price: PricesOption = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the sums.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Ask the engine itself, too; nothing is loaded.")] = False,
    json: JsonOption = False,
) -> Result:
    """Plan MODEL on this machine or another: memory per card, the split, what fits. Engine arguments follow --.

    Several MODELs are placed together: options are for all of them, and commands that start them are in the answer.

    Their --json data: machine, placed, verdict, host,

    models: [{name, argument, verdict, gpus, port, command, why, candidate}],

    cards: [{gpu, uuid, name, total_bytes, free_bytes, planned_bytes, spare_bytes}].

    Several --machine are compared for one MODEL in one quantisation, for one user and for several (8, unless --parallel
    says).

    Their --json data: model, users, prices: [{card, price}], advice: [{kind, machine, as_well, text}],

    machines: [{machine, snapshot, verdict, runs, quant, power_limit_w, price, one_user, users, one_card, largest,
    usual}].
    """
    from mgpu.cli.exact import ask_engine, exact_data, for_exact
    from mgpu.cli.prepare import prepare
    from mgpu.cli.startable import why_not
    from mgpu.cli.views.exact import above_exact
    from mgpu.cli.views.plan import plan_screen

    arguments = context.obj or ()
    machines, prices = machine or (), price or ()
    _refuse(models, machines, prices, explain=explain, exact=exact)
    if len(machines) > 1:
        from mgpu.cli.advice import compare_machines

        return compare_machines(models[0], options, machines, prices=prices, engine_arguments=arguments)
    elsewhere = machines[0] if machines else None
    if len(models) > 1:
        from mgpu.cli.together import plan_together

        return plan_together(
            models, options, machine=elsewhere, engine_arguments=arguments, explain=explain, exact=exact
        )
    (model,) = models
    if exact:
        options = for_exact(options, elsewhere)
    prepared = prepare(model, options, machine=elsewhere, engine_arguments=arguments)
    money, remarks = _money(prepared, prices)
    fits = prepared.plan.best is not None
    asked = ask_engine(prepared) if exact else None

    def screen(width: int) -> Any:
        yield from plan_screen(prepared.name, prepared.plan, width, explain=explain)
        if money:
            yield from ("", f"  {'price':<9} {money['words']}")
        hints = [] if explain else ["--explain shows the sums"]
        if options.users and not options.parallel:
            hints.insert(0, f"{options.users} users are assumed: --parallel N")
        if fits and prepared.plan.machine.source != "simulated":
            hints = [run_command(model), *hints, "run --dry-run shows the command"]
        if fits and (install := prepared.to_install):
            hints.append(install)
        if hints:
            line = "  " + " · ".join(hints)
            yield ""
            yield from [line] if len(line) <= width else _each_hint(hints, width)

    return Result(
        command="plan",
        data={
            **plan_data(prepared),
            "exact": exact_data(asked) if asked else None,
            **({"price": money["data"]} if money else {}),
        },
        screen=above_exact(screen, asked) if asked else screen,
        exit_code=0 if fits else 1,
        simulated=prepared.plan.machine.source == "simulated",
        warnings=(*prepared.warnings, *remarks),
        errors=tuple(filter(None, [why_not(prepared)])),
        told=True,
    )


def _each_hint(hints: Sequence[str], width: int) -> Iterator[str]:
    """Hints below one another, on a narrow terminal each with its command on a line of its own."""
    for hint in hints:
        words, colon, command = hint.partition(": ")
        yield from [f"  {hint}"] if len(hint) + 2 <= width or not colon else (f"  {words}:", f"  {command}")


def _refuse(
    models: Sequence[str], machines: Sequence[str], prices: Sequence[str], *, explain: bool, exact: bool
) -> None:
    """Raise UsageError for what does not go together."""
    import shlex

    first = shlex.quote(models[0])
    if len(models) > 1 and len(machines) > 1:
        raise UsageError(
            f"{len(machines)} machines are compared for one MODEL, and {len(models)} MODELs are placed on one machine",
            hint=f"mgpu plan {first} {' '.join(f'--machine {shlex.quote(each)}' for each in machines)}",
        )
    if len(models) > 1 and prices:
        raise UsageError("--price goes with one MODEL", hint=f"mgpu plan {first} --price {shlex.quote(prices[0])}")
    if len(machines) > 1 and (explain or exact):
        option, what = ("--exact", "asks the engine that is here") if exact else ("--explain", "shows one plan's sums")
        hint = f"mgpu plan {first}{'' if exact else f' --machine {shlex.quote(machines[0])}'} {option}"
        raise UsageError(f"{option} {what}: it does not go with several machines", hint=hint)


def _money(prepared: Prepared, prices: Sequence[str]) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """What `--price` adds to the plan, as data and in words, and what to tell the user of it."""
    from mgpu.cli.prices import parse_prices, price_data, price_words

    if not prices:
        return None, ()
    plan = prepared.plan
    known, remarks = parse_prices(prices, plan.machine.gpus)
    data = price_data(known, plan.machine.gpus, plan.chosen)
    return {"data": data, "words": price_words(data, plan.chosen.parallel)}, remarks


def run_command(model: str) -> str:
    """Return the `mgpu run` line with the options that were given to `mgpu plan`."""
    import shlex

    words = list(sys.argv[1:])
    kept = [
        w
        for i, w in enumerate(words)
        if w not in ("--explain", "--exact", "--json", *_ELSEWHERE) and words[i - 1] not in _ELSEWHERE
    ]
    kept = [w for w in kept if w.partition("=")[0] not in _ELSEWHERE]
    if kept[:1] != ["plan"]:
        kept = ["plan", model]
    return shlex.join(["mgpu", "run", *kept[1:]])


def plan_data(prepared: Prepared) -> dict[str, Any]:
    """Return `plan --json`'s data (docs: the README's section on JSON)."""
    from mgpu.machine.snapshot import to_json

    plan = prepared.plan
    facts = plan.model
    return {
        "model": {
            "name": prepared.name,
            "architecture": facts.architecture,
            "quantisation": facts.quantisation,
            "parameters": facts.parameters,
            "active_parameters": facts.active_parameters,
            "layers": len(facts.layers),
            "heads": facts.heads,
            "kv_heads": facts.kv_heads,
            "head_dim": facts.head_dim,
            "embedding_length": facts.embedding_length,
            "vocabulary": facts.vocabulary,
            "context_length": facts.context_length,
            "experts": facts.experts,
            "experts_used": facts.experts_used,
            "file_bytes": facts.file_bytes,
            "source": facts.source,
        },
        "machine": to_json(plan.machine),
        "best": plan.best,
        "why": plan.why,
        "candidates": [candidate_data(prepared, candidate) for candidate in plan.candidates],
        "fixes": [{"change": fix.change, "candidate": candidate_data(prepared, fix.candidate)} for fix in plan.fixes],
        "not_modelled": list(plan.not_modelled),
        "left_out": [{"backend": engine.backend, "reason": engine.reason} for engine in plan.left_out],
    }


def candidate_data(
    prepared: Prepared, candidate: Candidate, *, name: str | None = None, port: int | None = None
) -> dict[str, Any]:
    """Return one candidate of the contract, with the command that would run it (none for what is illegal) under this
    name and on this port, or the usual ones."""
    from mgpu.machine.snapshot import to_json

    data = to_json(candidate)
    assert isinstance(data, dict)
    data.pop("wants")
    for ledger, device in zip(data["devices"], candidate.devices, strict=True):
        ledger |= {"total_bytes": device.total_bytes, "spare_bytes": device.spare_bytes}
    data["host"] |= {"total_bytes": candidate.host.total_bytes, "spare_bytes": candidate.host.spare_bytes}
    launch = None if candidate.verdict == "illegal" else _launch(prepared, candidate, name, port)
    return {**data, "argv": list(launch.argv) if launch else [], "env": launch.public_env() if launch else {}}


def _launch(prepared: Prepared, candidate: Candidate, name: str | None, port: int | None) -> Launch:
    from mgpu.backends import load_backend
    from mgpu.running.ports import FIRST_PORT
    from mgpu.running.state import name_from, state_path

    name = name or name_from(prepared.name)
    backend = load_backend(candidate.backend)
    folder = state_path() / name if backend.temporary_folder else Path()
    serving = prepared.serving(
        candidate.backend, name=name, host="127.0.0.1", port=port or FIRST_PORT, folder=folder, api_key=None
    )
    if candidate.quant != prepared.weights_by_engine[candidate.backend].facts.quantisation:  # a way out
        other = prepared.model.in_quantisation(candidate.backend, candidate.quant)
        serving = replace(serving, model=other.label)
    return backend.launch(candidate, serving)
