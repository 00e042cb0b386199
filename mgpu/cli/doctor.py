"""`mgpu doctor`: what breaks or slows multi-GPU inference on this machine, and the command that mends it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgpu.cli.options import JsonOption
from mgpu.cli.output import Output
from mgpu.cli.result import Result
from mgpu.configuration import expected_gpus
from mgpu.errors import UsageError

if TYPE_CHECKING:
    from mgpu.doctor.check import Check, Purpose
    from mgpu.doctor.fixes import Outcome
    from mgpu.doctor.plans import ProfilePlan
    from mgpu.doctor.proof import Proof
    from mgpu.doctor.report import Report
    from mgpu.machine.inspection import Inspection

# Set by the main program before the command is called: the terminal's encoding decides over symbols.
output = Output(as_json=False)


class ForBackend(StrEnum):
    """Engines by the names of --for."""

    llama_cpp = "llama.cpp"
    vllm = "vllm"
    ollama = "ollama"


def doctor(
    profile: Annotated[
        str | None, typer.Argument(metavar="PROFILE", help="Also check what this profile or model needs.")
    ] = None,
    backend: Annotated[ForBackend | None, typer.Option("--for", help="Judge for this engine.")] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option("--tensor-parallel", help="Cards that one model is to be cut over.", min=1, max=64)
    ] = None,
    gpus: Annotated[
        str | None, typer.Option("--gpus", help="Judge these cards only: a count (2), or a list (0,1 or GPU-3f…).")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Make idle cards prove that copies and all-reduces arrive: 20 s at most.")
    ] = False,
    fix: Annotated[bool, typer.Option("--fix", help="Offer to run the fixes that can be undone.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --fix: only print the commands.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --fix: run them without asking.")] = False,
    explain: Annotated[str | None, typer.Option("--explain", metavar="ID", help="Explain a check.")] = None,
    list_checks: Annotated[bool, typer.Option("--list", help="List all checks.")] = False,
    only: Annotated[str | None, typer.Option("--only", metavar="IDS", help="Run only these checks: a,b.")] = None,
    skip: Annotated[str | None, typer.Option("--skip", metavar="IDS", help="Leave these checks out: a,b.")] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            "--save",
            metavar="FILE",
            readable=False,
            help="Also save all that was read, without names; -: print only that.",
        ),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            "--replay",
            metavar="FILE",
            readable=False,
            help="Judge a saved machine instead of this one; -: what is piped in.",
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 for warnings, too.")] = False,
    expect_gpus: Annotated[int | None, typer.Option("--expect-gpus", help="Cards there should be.", min=0)] = None,
    psu: Annotated[
        int | None, typer.Option("--psu", metavar="WATTS", help="What the power supply gives.", min=1)
    ] = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show every check and all evidence.")] = False,
    json: JsonOption = False,
) -> Result:
    """Find what breaks or slows inference on several GPUs, and the command that mends it.

    Exit codes: 0 no failure, 1 a failure (with --strict a warning, too), 2 wrong usage, 3 a file that cannot be read or
    written.
    """
    from mgpu.cli.views.doctor import doctor_screen
    from mgpu.doctor.report import report_data

    if list_checks or explain is not None:
        judging = (
            *(("PROFILE", profile), ("--for", backend), ("--tensor-parallel", tensor_parallel), ("--gpus", gpus)),
            *(("--probe", probe), ("--fix", fix), ("--dry-run", dry_run), ("--yes", yes), ("--strict", strict)),
            *(("--only", only), ("--skip", skip), ("--save", save), ("--replay", replay), ("--psu", psu)),
            *(("--expect-gpus", expect_gpus), ("--verbose", verbose), ("--explain", explain if list_checks else None)),
        )
        _require_alone("--list" if list_checks else "--explain", judging)
        return _list() if explain is None else _explain(explain)
    _require_sense(fix=fix, dry_run=dry_run, yes=yes, probe=probe, replay=replay, save=save)
    if gpus is not None and expect_gpus is not None:
        raise UsageError("--gpus judges some cards, --expect-gpus counts them all", hint="leave one of them out")
    begun = time.monotonic()
    checks = _chosen(only, skip, probe=probe, planned=profile is not None)
    saved = _saved(replay)
    wanted_gpus = expected_gpus() if expect_gpus is None and gpus is None and saved is None else expect_gpus
    purpose, plan = _purpose(profile, backend, tensor_parallel, gpus, saved)
    inspection, proof = _look(gpus, probe=probe) if saved is None else (saved, None)
    if expect_gpus == 0 and inspection.machine.gpus:
        raise UsageError(
            f"--expect-gpus 0, and GPUs are here ({len(inspection.machine.gpus)})",
            hint="--expect-gpus takes how many there should be at least",
        )
    if save is not None:
        _save(inspection, save)
    inspection = _among(inspection, gpus)
    if plan is None:
        from mgpu.doctor.facts import usable_cards

        purpose = purpose.over(len(usable_cards(inspection)))
    purpose = replace(purpose, expected_gpus=wanted_gpus, psu_w=psu)
    report = _report(inspection, checks, purpose, plan, proof)
    report = replace(report, asked=_asked(profile, backend, tensor_parallel, gpus, expect_gpus, psu))
    report = replace(report, whole=only is None, replayed=saved is not None, seconds=time.monotonic() - begun)
    if fix:
        report = _fixed(report, gpus, dry_run=dry_run, yes=yes)
    symbols = output.console().encoding.lower().replace("-", "") == "utf8"
    alone = save is not None and str(save) == "-"
    return Result(
        command="doctor",
        data=report_data(report),
        screen=lambda width: () if alone else doctor_screen(report, width, symbols=symbols, verbose=verbose),
        exit_code=0 if report.healthy(strict=strict) else 1,
        simulated=saved is not None,
    )


def _list() -> Result:
    from mgpu.cli.views.doctor import list_screen
    from mgpu.doctor.catalogue import CHECKS

    return Result(
        command="doctor.list",
        data={"checks": [_check_data(each) for each in CHECKS]},
        screen=lambda width: list_screen(CHECKS, width),
    )


def _explain(ids: str) -> Result:
    from mgpu.cli.views.doctor import explain_screen
    from mgpu.doctor.catalogue import CHECKS, with_ids

    checks = with_ids(CHECKS, ids, option="--explain")
    return Result(
        command="doctor.explain",
        data={"checks": [{**_check_data(each), "explanation": each.explanation} for each in checks]},
        screen=lambda width: explain_screen(checks, width),
    )


def _check_data(check: Check) -> dict[str, object]:
    from mgpu.doctor.fixes import fixable_ids

    return {
        "id": check.id,
        "area": check.area.value,
        "tier": check.tier,
        "needs_root": check.needs_root,
        "fixable": check.id in fixable_ids(),
        "title": check.title,
    }


def _require_alone(option: str, others: Sequence[tuple[str, object]]) -> None:
    """Refuse what would be ignored beside an option that judges nothing. Raises UsageError."""
    other = next((name for name, value in others if value is not None and value is not False), None)
    if other is not None:
        raise UsageError(f"{option} judges nothing, so {other} says nothing beside it", hint="leave one of them out")


def _require_sense(*, fix: bool, dry_run: bool, yes: bool, probe: bool, replay: Path | None, save: Path | None) -> None:
    """Refuse options that contradict each other. Raises UsageError."""
    if (dry_run or yes) and not fix:
        raise UsageError(f"{'--dry-run' if dry_run else '--yes'} belongs to --fix", hint="mgpu doctor --fix --dry-run")
    if dry_run and yes:
        raise UsageError("--dry-run runs nothing, --yes runs everything", hint="leave one of them out")
    if replay is not None and (probe or (fix and not dry_run)):
        raise UsageError(
            f"--replay judges another machine, and {'--probe' if probe else '--fix'} works on this one",
            hint="leave one of them out" if probe else "add --dry-run: the commands are printed only",
        )
    if output.as_json and save is not None and str(save) == "-":
        raise UsageError("--save - and --json both print JSON", hint="name a file: --save machine.json")
    if fix and not (dry_run or yes) and (output.as_json or not os.isatty(0)):
        raise UsageError(
            "--fix asks before each command, and there is no terminal to ask on", hint="add --dry-run, or --yes"
        )


def _chosen(only: str | None, skip: str | None, *, probe: bool, planned: bool) -> tuple[Check, ...]:
    """The checks to run; those of a probe only with one. Raises UsageError where none is left."""
    from mgpu.doctor.catalogue import CHECKS, with_ids, without_ids
    from mgpu.doctor.plans import plan_checks
    from mgpu.doctor.proof import proof_checks

    proofs = {each.id for each in proof_checks(None)}
    checks = with_ids(CHECKS, only, option="--only") if only is not None else CHECKS
    checks = without_ids(checks, skip, option="--skip") if skip is not None else checks
    if only is not None and not probe and (asked := sorted({each.id for each in checks} & proofs)):
        raise UsageError(f"{asked[0]} is proved by a probe", hint=f"mgpu doctor --probe --only {asked[0]}")
    plans = {each.id for each in plan_checks(None)}
    if only is not None and not planned and (asked := sorted({each.id for each in checks} & plans)):
        raise UsageError(f"{asked[0]} judges the plan of a profile", hint=f"mgpu doctor PROFILE --only {asked[0]}")
    if not checks:
        raise UsageError("--skip leaves no check to run", hint="mgpu doctor --list")
    return checks if probe else tuple(each for each in checks if each.id not in proofs)


def _purpose(
    profile: str | None,
    backend: ForBackend | None,
    tensor_parallel: int | None,
    gpus: str | None,
    saved: Inspection | None,
) -> tuple[Purpose, ProfilePlan | None]:
    from mgpu.doctor.check import Purpose

    purpose = Purpose(backend=backend.value if backend else None, tensor_parallel=tensor_parallel)
    if profile is None:
        return purpose, None
    from mgpu.cli.doctor_profile import profile_purpose

    return profile_purpose(profile, purpose, gpus, saved)


def _asked(
    profile: str | None,
    backend: ForBackend | None,
    tensor_parallel: int | None,
    gpus: str | None,
    expect_gpus: int | None,
    psu: int | None,
) -> tuple[str, ...]:
    """The words that say again what to judge for."""
    options = {
        "--for": backend.value if backend else None,
        "--tensor-parallel": tensor_parallel,
        "--gpus": gpus,
        "--expect-gpus": expect_gpus,
        "--psu": psu,
    }
    words = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    return (profile, *words) if profile is not None else tuple(words)


def _saved(replay: Path | None) -> Inspection | None:
    from mgpu.doctor.saved import replay as read_saved

    return None if replay is None else read_saved(replay)


def _save(inspection: Inspection, path: Path) -> None:
    from mgpu.doctor.saved import STANDARD_STREAM, save, saved_text

    if path == STANDARD_STREAM:
        output.write_text(saved_text(inspection))
    else:
        save(inspection, path)
        output.note(f"saved    {path}")


def _look(gpus: str | None, *, probe: bool) -> tuple[Inspection, Proof | None]:
    """All that there is, and what a probe of the chosen cards proved."""
    inspection = _inspected()
    if not probe:
        return inspection, None
    from mgpu.doctor.probe import probe as probe_cards
    from mgpu.doctor.proof import with_links_under_load

    among = _among(inspection, gpus)
    output.note("probing  the cards work for 20 s at most")
    proof = probe_cards(among)
    return with_links_under_load(inspection, proof), proof


def _among(inspection: Inspection, gpus: str | None) -> Inspection:
    """What there is of the chosen cards."""
    from mgpu.doctor.chosen import chosen

    return inspection if gpus is None else chosen(inspection, gpus)


def _inspected() -> Inspection:
    from mgpu.backends.installed import installed_engines
    from mgpu.machine.inspection_reader import inspect_machine

    return inspect_machine(engines=installed_engines)


def _report(
    inspection: Inspection,
    checks: tuple[Check, ...],
    purpose: Purpose,
    plan: ProfilePlan | None,
    proof: Proof | None,
) -> Report:
    from mgpu.doctor.catalogue import replaced
    from mgpu.doctor.checks.peers import proved_checks
    from mgpu.doctor.diagnosis import diagnose
    from mgpu.doctor.plans import plan_checks
    from mgpu.doctor.proof import proof_checks
    from mgpu.doctor.report import Report

    checks = replaced(checks, (*proof_checks(proof), *proved_checks(proof), *plan_checks(plan)))
    if plan is None:
        unplanned = {each.id for each in plan_checks(None)}
        checks = tuple(each for each in checks if each.id not in unplanned)
    return Report(
        inspection=inspection,
        checks=checks,
        diagnosis=diagnose(inspection, checks, purpose),
        purpose=purpose,
        seconds=0.0,
        proof=proof,
        plan=plan,
        root=os.geteuid() == 0,
        program=_program(),
    )


def _program() -> str:
    """What sudo finds mgpu by: its PATH has the system's folders only, not those of a user's environments."""
    import shlex
    import shutil

    path = shutil.which("mgpu")
    return "mgpu" if path is None or path.startswith(("/usr/", "/bin/")) else shlex.quote(path)


def _fixed(report: Report, gpus: str | None, *, dry_run: bool, yes: bool) -> Report:
    """Run what the user agrees to, and diagnose again what then is left."""
    from mgpu.doctor.fixes import Outcome, apply, remedies

    report = replace(report, mending=True)
    outcomes: list[Outcome] = []
    for remedy in remedies(report.inspection, report.diagnosis):
        if remedy.refused:
            outcomes.append(Outcome(remedy=remedy, result="refused", detail=remedy.refused))
        elif dry_run:
            outcomes.append(Outcome(remedy=remedy, result="not run"))
        elif yes or _agrees(remedy.shown(root=report.root), remedy.does):
            outcomes.append(apply(remedy, root=report.root, ask_password=not output.as_json and os.isatty(0)))
            output.note(_told(outcomes[-1]))
        else:
            outcomes.append(Outcome(remedy=remedy, result="declined"))
    if not any(outcome.result == "done" for outcome in outcomes):
        return replace(report, outcomes=tuple(outcomes))
    fresh = _report(_among(_inspected(), gpus), report.checks, report.purpose, report.plan, report.proof)
    return replace(report, inspection=fresh.inspection, diagnosis=fresh.diagnosis, outcomes=tuple(outcomes))


def _told(outcome: Outcome) -> str:
    return f"{outcome.result:<8} " + (outcome.detail or outcome.remedy.does)


def _agrees(command: str, does: str) -> bool:
    """Ask on the terminal; what is no yes is a no."""
    output.note(f"command  {command}\n         {does}")
    return output.agrees("         run it?")
