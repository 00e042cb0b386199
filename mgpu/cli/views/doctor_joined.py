"""Findings that differ only in the card they are about, as one that names all of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from mgpu.doctor.check import Finding
from mgpu.doctor.facts import named

_CARD = "GPU#"
_PLURALS = {"is": "are", "was": "were", "has": "have", "does": "do"}
# Each leaves one of the cards out; together they leave no card.
_LEAVES_OUT = "_VISIBLE_DEVICES="


def joined(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the findings in their order, those of one check and in the same words as one, with the evidence and the
    steps of all."""
    alike: dict[tuple[object, ...], list[Finding]] = {}
    for position, finding in enumerate(findings):
        words = _without_card(finding)
        key = (position,) if words is None else (finding.id, finding.severity, words)
        alike.setdefault(key, []).append(finding)
    return tuple(_one(group) for group in alike.values())


def _without_card(finding: Finding) -> str | None:
    """A summary with a blank for its only card, None where it names none or several."""
    if len(finding.gpus) != 1:
        return None
    words, found = re.subn(rf"\bGPU{finding.gpus[0]}\b(?!,)", _CARD, finding.summary)
    return words if found else None


def _one(group: Sequence[Finding]) -> Finding:
    if len(group) == 1:
        return group[0]
    gpus = tuple(finding.gpus[0] for finding in group)
    steps = tuple(dict.fromkeys(step for finding in group for step in finding.fix))
    if sum(_LEAVES_OUT in step for step in steps) > 1:
        steps = tuple(step for step in steps if _LEAVES_OUT not in step)
    return replace(
        group[0],
        summary=_of_several(_without_card(group[0]) or "").replace(_CARD, named(gpus)),
        evidence=tuple(dict.fromkeys(evidence for finding in group for evidence in finding.evidence)),
        fix=steps,
        gpus=gpus,
    )


def _of_several(words: str) -> str:
    """A sentence about one card in the plural."""
    verb = re.match(rf"{_CARD} (not )?([a-z]+)", words)
    if verb and (verb[2] in _PLURALS or verb[2].endswith("s")):
        words = words[: verb.start(2)] + _PLURALS.get(verb[2], verb[2][:-1]) + words[verb.end(2) :]
    return re.sub(r"\bits\b", "their", words)
