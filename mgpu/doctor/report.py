"""All that one run of the doctor found, and the same as the object that --json prints."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from typing import Any

from mgpu.doctor.check import Check, Finding, Purpose, Severity
from mgpu.doctor.checks.topology import best_groups, worst_kind
from mgpu.doctor.diagnosis import Diagnosis
from mgpu.doctor.fixes import Outcome
from mgpu.doctor.plans import ProfilePlan
from mgpu.doctor.proof import Proof
from mgpu.machine.inspection import Inspection
from mgpu.machine.snapshot import to_json

_GROUP_SIZES = (2, 4, 8, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The best set of `size` cards for tensor parallel, and the kind of the worst path in it."""

    size: int
    gpus: tuple[int, ...]
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run: what was read, which `checks` ran and what they said. `whole` is False where only some were asked for.
    `outcomes` are those of --fix, which `mending` says was asked for; `replayed` says that the inspection is a file's.
    `program` is what sudo finds mgpu by, and `asked` are the words that say what to judge for: a profile, options and
    their values."""

    inspection: Inspection
    checks: tuple[Check, ...]
    diagnosis: Diagnosis
    purpose: Purpose
    seconds: float
    whole: bool = True
    replayed: bool = False
    proof: Proof | None = None
    plan: ProfilePlan | None = None
    mending: bool = False
    outcomes: tuple[Outcome, ...] = ()
    root: bool = False
    program: str = "mgpu"
    asked: tuple[str, ...] = ()

    @property
    def failing(self) -> frozenset[int]:
        """The cards that a failure names."""
        bad = (finding for finding in self.diagnosis.findings if finding.severity is Severity.fail)
        return frozenset(gpu for finding in bad for gpu in finding.gpus)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The best sets of equal cards, for every size that there are enough of; two or more equally good ones of a
        size follow each other. None of cards between which the paths are not known, or that a failure names."""
        machine = self.inspection.machine
        fit = tuple(gpu for gpu in machine.gpus if gpu.index not in self.failing)
        left = replace(self.inspection, machine=replace(machine, gpus=fit))
        found = []
        for size in _GROUP_SIZES:
            sets = best_groups(left, size)
            kinds = [worst_kind(left, cards) for cards in sets]
            found += [
                Group(size=size, gpus=cards, kind=kind)
                for cards, kind in zip(sets, kinds, strict=True)
                if kind == kinds[0] != "unknown"
            ]
        return tuple(found)

    def healthy(self, *, strict: bool) -> bool:
        """Whether nothing fails, and with `strict` nothing warns either."""
        count = self.diagnosis.count
        return not count(Severity.fail) and not (strict and count(Severity.warn))

    def rerun(self, *ids: str) -> str:
        """Return the command that lets root read what this user may not."""
        words = (*self.asked, "--only", ",".join(dict.fromkeys(ids)))
        return f"sudo {self.program} doctor {shlex.join(words)}"


def report_data(report: Report) -> dict[str, Any]:
    """Return the `data` of `mgpu doctor --json`, as doctor.schema.json describes it."""
    inspection, diagnosis = report.inspection, report.diagnosis
    areas = {check.id: check.area.value for check in report.checks}
    return {
        "captured_at": inspection.machine.captured_at,
        "replayed": report.replayed,
        "seconds": round(report.seconds, 2),
        "counts": {
            **{severity.value: diagnosis.count(severity) for severity in Severity},
            "skipped": len({skip.id for skip in diagnosis.skipped}),
            "ok": len(diagnosis.well),
        },
        "purpose": to_json(report.purpose),
        "host": to_json(inspection.machine.host),
        "driver": to_json(inspection.machine.driver),
        "gpus": [
            {key: getattr(gpu, key) for key in ("index", "vendor", "name", "uuid", "bus_id", "total_bytes", "problem")}
            for gpu in inspection.machine.gpus
        ],
        "groups": [to_json(group) for group in report.groups],
        "findings": [_finding(finding, areas) for finding in diagnosis.findings],
        "skipped": [
            {
                "id": skip.id,
                "area": areas[skip.id],
                "reason": skip.reason,
                "needs_root": skip.needs_root,
                "rerun": report.rerun(skip.id) if skip.needs_root else None,
            }
            for skip in diagnosis.skipped
        ],
        "checks": [
            {"id": check.id, "area": check.area.value, "tier": check.tier, "result": _result(check, diagnosis)}
            for check in report.checks
        ],
        "proof": None if report.proof is None else to_json(report.proof),
        "fixes": [
            {
                "id": outcome.remedy.id,
                "command": list(outcome.remedy.command(root=report.root)),
                "does": outcome.remedy.does,
                "undo": outcome.remedy.undo,
                "result": outcome.result,
                "detail": outcome.detail,
            }
            for outcome in report.outcomes
        ],
    }


def _finding(finding: Finding, areas: dict[str, str]) -> dict[str, Any]:
    data = to_json(finding)
    assert isinstance(data, dict)
    return {**data, "area": areas[finding.id], "severity": finding.severity.value}


def _result(check: Check, diagnosis: Diagnosis) -> str:
    """The worst that a check said; "ok" where it found nothing, "not-applicable" where there is nothing to find."""
    severities = [finding.severity for finding in diagnosis.findings if finding.id == check.id]
    if severities:
        return next(severity.value for severity in Severity if severity in severities)
    if any(skip.id == check.id for skip in diagnosis.skipped):
        return "skipped"
    return "ok" if check.id in diagnosis.well else "not-applicable"
