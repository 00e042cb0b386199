"""The page of popular claims is what the planner says, and its verdicts follow from its rows."""

from __future__ import annotations

import re

import pytest
import yaml

from benchmarks.claims import DATA, PAGE, page

CLAIMS = [claim["claim"] for claim in yaml.safe_load(DATA.read_text())]
SECTIONS = dict(re.findall(r"^## “(.+?)”\n\n(.+?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL))


def test_the_page_is_what_the_planner_says_now() -> None:
    assert PAGE.read_text() == page(), "write it again with: make claims"


def test_every_claim_has_its_section_with_plans_and_sums() -> None:
    assert list(SECTIONS) == CLAIMS
    for section in SECTIONS.values():
        rows = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| plan")]
        sums = re.findall(r"^- .+: (\d.+) = (\d+\.\d\d) GiB", section, re.MULTILINE)
        assert len(rows) == len(sums) > 0
        for parts, total in sums:
            assert sum(float(part.split()[0]) for part in parts.split(" + ")) == pytest.approx(float(total), abs=0.03)


@pytest.mark.parametrize("claim", [pytest.param(claim, id=claim) for claim in CLAIMS if "tokens/s" in claim])
def test_what_does_not_fit_or_is_impossible_is_not_called_true(claim: str) -> None:
    verdict, _, rest = SECTIONS[claim].partition("\n")
    own = [line for line in rest.splitlines() if line.startswith("| ") and "(instead)" not in line][1:]
    if all("does not fit" in line for line in own):
        assert verdict.startswith("**No: it does not fit")
    claimed = int(re.findall(r"(\d+)(?: to \d+)? tokens/s", claim)[0])
    bounds = [float(cells[4]) for line in own if (cells := line.split("|"))[4].strip()]
    if bounds and claimed > max(bounds):
        assert verdict.startswith("**No")
        assert "physically possible" in verdict
