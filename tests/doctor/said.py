"""What a check said, in words short enough for a table."""

from __future__ import annotations

from collections.abc import Sequence

from mgpu.doctor.check import Check, Finding, Purpose
from mgpu.machine.inspection import Inspection

from .inspections import asked

ANYTHING = Purpose()


def said(checks: Sequence[Check], name: str, inspection: Inspection, purpose: Purpose = ANYTHING) -> list[str]:
    """Return "warn 0,1" for a finding about two cards, "info" for one about the host, "skip"; nothing of a check that
    does not apply."""
    (check,) = (each for each in checks if each.id == name)
    words = []
    for item in asked(check, inspection, purpose):
        if isinstance(item, Finding):
            words.append(" ".join([item.severity.value, *([",".join(map(str, item.gpus))] if item.gpus else [])]))
        else:
            words.append("skip")
    return words
