"""`mgpu plan`: memory card by card, before anything is fetched."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgpu.cli.options import JsonOption, MachineOption, ModelArgument, PlannerOptions, with_planner_options
from mgpu.cli.result import Result

if TYPE_CHECKING:
    from mgpu.backends.backend import Launch
    from mgpu.cli.prepare import Prepared
    from mgpu.planning.candidates import Candidate


@with_planner_options
def plan(
    context: typer.Context,
    model: ModelArgument,
    options: PlannerOptions,
    machine: MachineOption = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the sums.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Ask the engine itself, too; nothing is loaded.")] = False,
    json: JsonOption = False,
) -> Result:
    """Plan MODEL on this machine or another: memory per card, the split, what fits. Engine arguments follow --."""
    from mgpu.cli.exact import ask_engine, exact_data, for_exact
    from mgpu.cli.prepare import prepare
    from mgpu.cli.views.exact import above_exact
    from mgpu.cli.views.plan import plan_screen

    if exact:
        options = for_exact(options, machine)
    prepared = prepare(model, options, machine=machine, engine_arguments=context.obj or ())
    fits = prepared.plan.best is not None
    asked = ask_engine(prepared) if exact else None

    def screen(width: int) -> Any:
        yield from plan_screen(prepared.name, prepared.plan, width, explain=explain)
        hints = [] if explain else ["--explain shows the sums"]
        if fits and prepared.plan.machine.source != "simulated":
            hints = [run_command(model), *hints, "run --dry-run shows the command"]
        if hints:
            line = "  " + " · ".join(hints)
            yield ""
            yield from [line] if len(line) <= width else (f"  {hint}" for hint in hints)

    return Result(
        command="plan",
        data={**plan_data(prepared), "exact": exact_data(asked) if asked else None},
        screen=above_exact(screen, asked) if asked else screen,
        exit_code=0 if fits else 1,
        simulated=prepared.plan.machine.source == "simulated",
        warnings=prepared.warnings,
    )


def run_command(model: str) -> str:
    """Return the `mgpu run` line with the options that were given to `mgpu plan`."""
    import shlex

    words = list(sys.argv[1:])
    kept = [
        w
        for i, w in enumerate(words)
        if w not in ("--explain", "--exact", "--json", "--machine") and words[i - 1] != "--machine"
    ]
    kept = [w for w in kept if not w.startswith("--machine=")]
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
    }


def candidate_data(prepared: Prepared, candidate: Candidate) -> dict[str, Any]:
    """Return one candidate of the contract, with the command that would run it (none for what is illegal)."""
    from mgpu.machine.snapshot import to_json

    data = to_json(candidate)
    assert isinstance(data, dict)
    data.pop("wants")
    for ledger, device in zip(data["devices"], candidate.devices, strict=True):
        ledger |= {"total_bytes": device.total_bytes, "spare_bytes": device.spare_bytes}
    data["host"] |= {"total_bytes": candidate.host.total_bytes, "spare_bytes": candidate.host.spare_bytes}
    launch = None if candidate.verdict == "illegal" else _launch(prepared, candidate)
    return {**data, "argv": list(launch.argv) if launch else [], "env": launch.public_env() if launch else {}}


def _launch(prepared: Prepared, candidate: Candidate) -> Launch:
    from mgpu.backends import load_backend
    from mgpu.running.ports import FIRST_PORT
    from mgpu.running.state import name_from, state_path

    name = name_from(prepared.name)
    backend = load_backend(candidate.backend)
    folder = state_path() / name if backend.temporary_folder else Path()
    serving = prepared.serving(
        candidate.backend, name=name, host="127.0.0.1", port=FIRST_PORT, folder=folder, api_key=None
    )
    if candidate.quant != prepared.weights_by_engine[candidate.backend].facts.quantisation:  # a way out
        other = prepared.model.in_quantisation(candidate.backend, candidate.quant)
        serving = replace(serving, model=other.label)
    return backend.launch(candidate, serving)
