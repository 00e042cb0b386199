"""What --explain prints: the same four parts for every check, ending with what to do."""

from __future__ import annotations

import re

import pytest

from mgpu.doctor.catalogue import CHECKS
from mgpu.doctor.check import Check

PARTS = ["Read", "Rule", "Why", "Do"]


@pytest.mark.parametrize("check", [pytest.param(each, id=each.id) for each in CHECKS])
def test_an_explanation_has_its_four_parts_in_order(check: Check) -> None:
    title, blank, *lines = check.explanation.splitlines()
    assert title.endswith(".")
    assert blank == ""
    text = "\n".join(lines)
    assert re.findall(r"(?m)^([A-Z][a-z]+): ", text) == PARTS
    assert text.startswith("Read: ")
    assert "\n\n" not in text
