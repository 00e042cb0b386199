"""Reports of bugs: some are kept, nothing secret is in them, and none is written through a link."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgpu.cli.bug import report_bug
from mgpu.running.state import state_folder


def reports() -> list[str]:
    return sorted(path.name for path in state_folder().glob("bug-*.log"))


def test_the_newest_ten_are_kept() -> None:
    old = [f"bug-2020010{day}T000000Z-{pid}.log" for day in range(1, 7) for pid in (1, 2)]
    for name in old:
        (state_folder() / name).touch()
    (state_folder() / "other.log").touch()
    told = report_bug(ValueError("surprise"), ["run"])
    (newest,) = set(reports()) - set(old)
    assert reports() == [*old[-9:], newest]
    assert told.hint
    assert newest in told.hint
    assert "surprise" in (state_folder() / newest).read_text()
    assert (state_folder() / "other.log").exists()


@pytest.mark.parametrize("words", [["--api-key", "secret"], ["--api-key=secret"], ["-hft", "secret"]])
def test_what_is_secret_is_not_in_it(words: list[str]) -> None:
    report_bug(ValueError("surprise"), ["run", *words])
    (name,) = reports()
    assert "secret" not in (state_folder() / name).read_text()


def test_no_report_goes_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    monkeypatch.setattr("mgpu.cli.bug._name", lambda: "bug-now.log")
    (state_folder() / "bug-now.log").symlink_to(target)
    told = report_bug(ValueError("surprise"), ["run"])
    assert target.read_text() == "mine"
    assert told.hint
    assert "cannot be written" in told.hint
