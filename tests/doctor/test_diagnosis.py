"""Running checks: in an order, each by itself; and the catalogue that holds them all."""

from __future__ import annotations

import pytest

from mgpu.doctor import subjects
from mgpu.doctor.catalogue import CHECKS, replaced, with_ids, without_ids
from mgpu.doctor.check import Area, Check, Finding, Purpose, Said, Severity, Skip, check
from mgpu.doctor.diagnosis import diagnose
from mgpu.doctor.fixes import fixable_ids
from mgpu.doctor.plans import ProfilePlan, plan_checks, unknown_flags
from mgpu.doctor.proof import proof_checks
from mgpu.doctor.report import Report, report_data
from mgpu.errors import UsageError
from mgpu.machine.inspection import Inspection

from .inspections import H100, bare, changed_pair, healthy

PURPOSE = Purpose()
PROOFS = {each.id for each in proof_checks(None)}


@check("warns", Area.host, "B")
def warns(_: Inspection, __: Purpose) -> Said:
    """Warns."""
    yield Finding(severity=Severity.info, summary="a note")
    yield Finding(severity=Severity.warn, summary="a warning")


@check("fails", Area.power, "A")
def fails(_: Inspection, __: Purpose) -> Said:
    """Fails."""
    yield Finding(severity=Severity.fail, summary="a failure")


@check("crashes", Area.driver, "A")
def crashes(_: Inspection, __: Purpose) -> Said:
    """Crashes after it has said something."""
    yield Finding(severity=Severity.fail, summary="half a truth")
    raise ZeroDivisionError("by nought")


@check("skips", Area.driver, "A")
def skips(_: Inspection, __: Purpose) -> Said:
    """Skips."""
    yield Skip(reason="it could not be read", needs_root=True)


@check("quiet", Area.driver, "A")
def quiet(_: Inspection, __: Purpose) -> Said:
    """Is content."""
    yield from ()


@check("of-amd", Area.amd, "A", about=(subjects.amd,))
def of_amd(_: Inspection, __: Purpose) -> Said:
    """Is about AMD's cards, and says something of any machine."""
    yield Finding(severity=Severity.fail, summary="a failure of what is not here")


ALL = (crashes, quiet, skips, warns, fails)


def test_failures_come_first_and_a_crash_costs_one_check() -> None:
    said = diagnose(healthy(), ALL, PURPOSE)
    assert [(each.id, each.severity.value) for each in said.findings] == [
        ("fails", "fail"),
        ("warns", "warn"),
        ("warns", "info"),
    ]
    assert [(skip.id, skip.needs_root) for skip in said.skipped] == [("crashes", False), ("skips", True)]
    assert "ZeroDivisionError: by nought" in said.skipped[0].reason
    assert said.well == ("quiet",)


def test_the_report_counts_what_was_said() -> None:
    report = Report(
        inspection=healthy(), checks=ALL, diagnosis=diagnose(healthy(), ALL, PURPOSE), purpose=PURPOSE, seconds=0.1
    )
    data = report_data(report)
    assert data["counts"] == {"fail": 1, "warn": 1, "info": 1, "skipped": 2, "ok": 1}
    assert [(each["id"], each["result"]) for each in data["checks"]] == [
        ("crashes", "skipped"),
        ("quiet", "ok"),
        ("skips", "skipped"),
        ("warns", "warn"),
        ("fails", "fail"),
    ]
    assert [skip["rerun"] for skip in data["skipped"]] == [None, "sudo mgpu doctor --only skips"]


def test_what_root_is_to_run_judges_for_the_same() -> None:
    said = diagnose(healthy(), ALL, PURPOSE)
    asked = ("my model", "--for", "vllm", "--gpus", "0,1")
    report = Report(inspection=healthy(), checks=ALL, diagnosis=said, purpose=PURPOSE, seconds=0.1, asked=asked)
    assert report.rerun("a", "b", "a") == "sudo mgpu doctor 'my model' --for vllm --gpus 0,1 --only a,b"


def test_what_is_not_here_is_not_asked_for_neither_well_nor_counted() -> None:
    said = diagnose(healthy(), (quiet, of_amd), PURPOSE)
    report = Report(inspection=healthy(), checks=(quiet, of_amd), diagnosis=said, purpose=PURPOSE, seconds=0)
    data = report_data(report)
    assert data["counts"] == {"fail": 0, "warn": 0, "info": 0, "skipped": 0, "ok": 1}
    assert [each["result"] for each in data["checks"]] == ["ok", "not-applicable"]


@pytest.mark.parametrize(
    ("inspection", "areas"),
    [
        pytest.param(bare(), {"GPUs", "Memory", "Host", "Engines"}, id="no card"),
        pytest.param(healthy(1), {"Driver", "GPUs", "PCIe", "Memory", "Power", "Host", "Engines"}, id="one card"),
    ],
)
def test_only_what_is_here_is_well(inspection: Inspection, areas: set[str]) -> None:
    checks = tuple(each for each in CHECKS if each.area is not Area.profile and each.id not in PROOFS)
    said = diagnose(inspection, checks, PURPOSE)
    spoken = {*said.well, *(finding.id for finding in said.findings), *(skip.id for skip in said.skipped)}
    assert {each.area.value for each in checks if each.id in spoken} == areas


@pytest.mark.parametrize(
    ("checks", "strict", "expected"),
    [
        pytest.param((quiet, skips, crashes), True, True, id="what could not be read is no failure"),
        pytest.param((warns,), False, True, id="warnings are allowed"),
        pytest.param((warns,), True, False, id="warnings are not allowed when strict"),
        pytest.param((fails,), False, False, id="failures never are"),
    ],
)
def test_what_makes_a_machine_unhealthy(checks: tuple[Check, ...], strict: bool, expected: bool) -> None:
    said = diagnose(healthy(), checks, PURPOSE)
    report = Report(inspection=healthy(), checks=checks, diagnosis=said, purpose=PURPOSE, seconds=0)
    assert report.healthy(strict=strict) == expected


def test_the_best_sets_of_cards_are_those_nearest_to_each_other() -> None:
    def groups(inspection: Inspection) -> list[tuple[int, tuple[int, ...], str]]:
        said = diagnose(inspection, (), PURPOSE)
        report = Report(inspection=inspection, checks=(), diagnosis=said, purpose=PURPOSE, seconds=0)
        return [(group.size, group.gpus, group.kind) for group in report.groups]

    assert groups(bare()) == groups(healthy(1)) == []
    assert groups(changed_pair(healthy(3), 1, 2, kind="PIX")) == [(2, (1, 2), "PIX")]
    assert groups(healthy(8, H100))[-1] == (8, tuple(range(8)), "NVLink")


def test_the_catalogue_is_whole() -> None:
    ids = [each.id for each in CHECKS]
    assert len(set(ids)) == len(ids) >= 70
    areas = [list(Area).index(each.area) for each in CHECKS]
    assert areas == sorted(areas)
    assert set(fixable_ids()) <= set(ids)
    assert {"p2p-proof", "p2p-grant-unsafe", "iommu-translated", "profile-plan", "tp-size"} <= set(ids)


@pytest.mark.parametrize("each", [pytest.param(each, id=each.id) for each in CHECKS])
def test_every_check_explains_itself(each: Check) -> None:
    title, *rest = each.explanation.splitlines()
    assert 10 < len(title) <= 120
    assert len("\n".join(rest)) > 150
    assert each.tier in ("A", "B")


def test_checks_are_chosen_by_their_ids() -> None:
    assert [each.id for each in with_ids(CHECKS, "shm-small, p2p-none", option="--only")] == ["p2p-none", "shm-small"]
    left = without_ids(CHECKS, "shm-small,p2p-none", option="--skip")
    assert len(left) == len(CHECKS) - 2
    assert replaced(ALL, (warns,)) == ALL


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        pytest.param("iommu", "did you mean iommu-translated?", id="a part of one"),
        pytest.param("shm_smal", "did you mean shm-small?", id="a slip"),
        pytest.param("acs-redirect,NVLINK", "nvlink-", id="several with a wrong one"),
        pytest.param("zzzzqqqq", "there is no check 'zzzzqqqq'", id="nothing like it"),
        pytest.param(" , ", "names no check", id="none"),
        pytest.param("\x1b[2J" * 1000, "no check", id="hostile"),
    ],
)
def test_an_id_that_is_none_is_answered_with_the_nearest(ids: str, said: str) -> None:
    for choose in (with_ids, without_ids):
        with pytest.raises(UsageError) as error:
            choose(CHECKS, ids, option="--only")
        assert said in error.value.message
        assert error.value.message.isprintable()
        assert len(error.value.message) < 400


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, [], id="it fits and its flags are known"),
        pytest.param({"verdict": "fits-with-offload"}, ["warn: m fits only with layers in host memory, which is slow"]),
        pytest.param({"verdict": "does-not-fit", "short_bytes": 3 << 30}, ["fail: m does not fit: 3.00 GiB short"]),
        pytest.param({"verdict": "illegal"}, ["fail: m cannot run as planned: illegal"]),
        pytest.param({"missing_flags": ("--x",)}, ["fail: the installed vllm does not know 1 planned flag(s)"]),
        pytest.param({"missing_flags": None, "unasked": "too slow"}, ["skip: too slow"]),
        pytest.param({"missing_flags": None}, [], id="no engine to ask"),
    ],
)
def test_a_plan_becomes_findings(changes: dict[str, object], expected: list[str]) -> None:
    plan = ProfilePlan(**{"name": "m", "backend": "vllm", "verdict": "fits", "missing_flags": (), **changes})  # type: ignore[arg-type]
    words = []
    for each in plan_checks(plan):
        for item in each.run(healthy(), PURPOSE):
            said = f"{item.severity}: {item.summary}" if isinstance(item, Finding) else f"skip: {item.reason}"
            words.append(said)
    assert words == expected
    assert all(not list(each.run(healthy(), PURPOSE)) for each in plan_checks(None))


HELP = "usage: it [--model MODEL] [-c N, --ctx-size N]\n  --tensor-parallel-size, -tp  how many\n  --no-mmap"


@pytest.mark.parametrize(
    ("argv", "help_text", "expected"),
    [
        pytest.param(["it", "--model", "m", "-c", "5", "--no-mmap"], HELP, (), id="all known"),
        pytest.param(["it", "--tensor-parallel=2"], HELP, (), id="an abbreviation"),
        pytest.param(["it", "--model", "m", "--fancy", "1", "-zz"], HELP, ("--fancy", "-zz"), id="two unknown"),
        pytest.param(["it", "--ctx_size", "1", "-1"], HELP, (), id="underscores, and a number that is no flag"),
        pytest.param(["it", "--model"], "an error", None, id="a help that is none"),
    ],
)
def test_flags_are_looked_up_in_the_help(argv: list[str], help_text: str, expected: tuple[str, ...] | None) -> None:
    assert unknown_flags(argv, help_text) == expected
