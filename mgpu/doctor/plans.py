"""What the plan for a profile says to a diagnosis: whether it fits, and whether the engine knows its flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, Skip, check
from mgpu.machine.inspection import Inspection
from mgpu.units import gib


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilePlan:
    """The plan as far as a diagnosis needs it. `verdict` is the best candidate's, `gpus` the cards that it uses (none:
    it runs on the processor); `command` plans it again in full.

    `missing_flags` are flags of the planned command that the engine's own --help does not list: none found is (), and
    None means that it was not asked, for the reason in `unasked` (None: no engine to ask).
    """

    name: str
    backend: str
    verdict: str
    gpus: tuple[int, ...] = ()
    reasons: tuple[str, ...] = ()
    short_bytes: int = 0
    install: str = ""
    missing_flags: tuple[str, ...] | None = None
    unasked: str | None = None

    @property
    def command(self) -> str:
        """The command that shows the plan in full."""
        return f"mgpu plan {self.name}"


def plan_checks(plan: ProfilePlan | None) -> tuple[Check, ...]:
    """Return the checks of a profile's plan; without a plan they say nothing."""

    def fits(_: Inspection, __: Purpose) -> Said:
        if plan:
            yield from _fits(plan)

    def knows(_: Inspection, __: Purpose) -> Said:
        if plan:
            yield from _knows(plan)

    return replace(_PLAN, run=fits), replace(_FLAGS, run=knows)


def unknown_flags(argv: Sequence[str], help_text: str) -> tuple[str, ...] | None:
    """Return the flags of a command that its program's --help does not list, in order; None where that text lists
    no flag at all and so says nothing. Abbreviations of known flags are known."""
    import re

    known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", help_text))
    if not any(name.startswith("--") for name in known):
        return None
    flags = (word.partition("=")[0] for word in argv[1:] if re.match(r"--?[a-zA-Z]", word))
    names = dict.fromkeys(flag.partition(".")[0].replace("_", "-") for flag in flags)
    return tuple(flag for flag in names if not any(name.replace("_", "-").startswith(flag) for name in known))


def _fits(plan: ProfilePlan) -> Said:
    if plan.verdict == "fits":
        return
    if plan.verdict == "fits-with-offload":
        severity, summary = Severity.warn, f"{plan.name} fits only with layers in host memory, which is slow"
    elif plan.short_bytes:
        severity, summary = Severity.fail, f"{plan.name} does not fit: {gib(plan.short_bytes)} short"
    else:
        severity, summary = Severity.fail, f"{plan.name} cannot run as planned: {plan.verdict.replace('-', ' ')}"
    reasons = tuple(Evidence(path=plan.command, value=reason) for reason in plan.reasons[:3])
    yield Finding(severity=severity, summary=summary, evidence=reasons, fix=(plan.command,), confidence="inferred")


def _knows(plan: ProfilePlan) -> Said:
    if plan.missing_flags:
        flags = ", ".join(plan.missing_flags)
        yield Finding(
            severity=Severity.fail,
            summary=f"the installed {plan.backend} does not know {len(plan.missing_flags)} planned flag(s)",
            evidence=(Evidence(path=f"{plan.backend} --help", value=f"lists no {flags}"),),
            fix=(f"mgpu run {plan.name} --dry-run", *((plan.install,) if plan.install else ())),
        )
    elif plan.missing_flags is None and plan.unasked:
        yield Skip(reason=plan.unasked)


@check("profile-plan", Area.profile, "A")
def _plan(_: Inspection, __: Purpose) -> Said:
    """The named profile does not fit on these cards.

    Read: the profile is planned on this machine exactly as `mgpu plan PROFILE` does it, with the memory
    that    is free on each card now. With --for and --tensor-parallel that engine and that cut are planned.
    Rule: a plan that does not fit, or that the engine cannot start, is a failure; one that fits only with layers in
    host memory is a warning.
    Why: an engine that runs out of memory says so after minutes of loading. Layers in host memory are read over the
    memory bus at a tenth of a card's bandwidth or less, for every token.
    Do: `mgpu plan PROFILE` shows the ledger card by card and the cheapest changes that make it fit.
    """
    yield from ()


@check("profile-flags", Area.profile, "A")
def _flags(_: Inspection, __: Purpose) -> Said:
    """The installed engine does not know a flag of the command that would start the profile.

    Read: every flag of the planned command is looked up in the engine's own --help. vLLM's takes ten
    seconds the first time, and so is only used where `mgpu run` has asked for it before.
    Rule: a flag that the help does not list is a failure; abbreviations of listed ones are known.
    Why: engines rename and drop flags between releases, and end at once with a page of usage.
    Do: install the engine's newer release, or leave the option out that the flag is made of.
    """
    yield from ()


_PLAN, _FLAGS = _plan, _flags
