"""Running the checks over an inspection: one that crashes costs itself alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mgpu.doctor.check import Check, Finding, Purpose, Severity, Skip
from mgpu.machine.inspection import Inspection

_ORDER = tuple(Severity)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What all checks said: findings (failures first), what could not be looked at, and the ids of what is well. A
    check whose subject is not here is not asked, and in none of them."""

    findings: tuple[Finding, ...]
    skipped: tuple[Skip, ...]
    well: tuple[str, ...]

    def count(self, severity: Severity) -> int:
        """Return how many findings are of that severity."""
        return sum(finding.severity is severity for finding in self.findings)


def diagnose(inspection: Inspection, checks: Sequence[Check], purpose: Purpose) -> Diagnosis:
    """Return what `checks` say of `inspection`. Never raises: a check that fails is among the skipped."""
    findings: list[Finding] = []
    skipped: list[Skip] = []
    well: list[str] = []
    for each in checks:
        try:
            if not each.applies(inspection, purpose):
                continue
            said = [replace(item, id=each.id) for item in each.run(inspection, purpose)]
        except Exception as bug:  # one broken check must not hide what the others found
            said = [Skip(id=each.id, reason=f"the check itself failed ({type(bug).__name__}: {bug})"[:160])]
        findings += [item for item in said if isinstance(item, Finding)]
        skipped += [item for item in said if isinstance(item, Skip)]
        if not said:
            well.append(each.id)
    findings.sort(key=lambda finding: _ORDER.index(finding.severity))
    return Diagnosis(findings=tuple(findings), skipped=tuple(skipped), well=tuple(well))
