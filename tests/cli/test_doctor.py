"""`mgpu doctor` as it is typed: screens, exit codes, JSON, files, fixes; on saved machines and on this one."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mgpu.doctor.saved import save
from mgpu.machine.inspection import Inspection, InstalledEngine, Unread
from tests.doctor.inspections import (
    H100,
    MIB,
    bare,
    changed,
    changed_card,
    changed_machine,
    changed_pair,
    changed_pci,
    healthy,
)

from .contract import DOCTOR, DOCTOR_ENVELOPE, DOCTOR_EXPLAIN, DOCTOR_LIST, NOTHING, checked
from .program import LIMIT_S, Mgpu

ENGINES = (InstalledEngine(backend="llama.cpp", path="/usr/bin/llama-server"),)
FINE = changed(healthy(lanes=8), engines=ENGINES)
HANGING = changed_pci(
    changed_pci(changed_pair(FINE, 0, 1, read=0, write=0), acs=0x1D),
    "0000:10:00.0",
    "0000:20:00.0",
    iommu_type="DMA-FQ",
)
CROWDED = changed_machine(changed(FINE, host={"shm_bytes": 64 * MIB}), host={"container": "docker"})
WARNED = changed_card(FINE, 0, compute_mode=3)

Saved = Callable[[Inspection], Path]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """A file with an inspection."""

    def write(inspection: Inspection) -> Path:
        path = tmp_path / "machine.json"
        save(inspection, path)
        return path

    return write


def diagnosis(entry: dict[str, Any]) -> dict[str, Any]:
    """The data of an envelope that keeps the contract and the published schema."""
    jsonschema.validate(entry, DOCTOR_ENVELOPE)
    return checked(entry, "doctor", DOCTOR)


def ids(data: dict[str, Any], severity: str) -> list[str]:
    return [finding["id"] for finding in data["findings"] if finding["severity"] == severity]


@pytest.mark.parametrize(
    "inspection",
    [
        pytest.param(FINE, id="two cards in slots of eight lanes"),
        pytest.param(changed(healthy(8, H100), engines=ENGINES), id="eight cards behind NVSwitch"),
        pytest.param(changed(healthy(1), engines=ENGINES), id="one card"),
        pytest.param(changed(bare(), engines=ENGINES), id="no card"),
    ],
)
def test_a_healthy_machine_has_a_line_an_area(mgpu: Mgpu, saved: Saved, inspection: Inspection) -> None:
    ended = mgpu("doctor", "--replay", saved(inspection), "--strict")
    assert (ended.exit_code, ended.err) == (0, "")
    assert not re.search(r"(?m)\[[!✗]\]|^ {6}(fix|seen)", ended.out)
    areas = re.findall(r"(?m)^\[[✓i-]\] (\w+)", ended.out)
    assert len(areas) == len(set(areas)), ended.out
    assert areas[0] == "Driver"
    assert {"Driver", "GPUs", "Host", "Engines"} <= set(areas)
    data = diagnosis(mgpu("doctor", "--replay", saved(inspection), "--json").json)
    assert (data["counts"]["fail"], data["counts"]["warn"]) == (0, 0)
    assert len(data["gpus"]) == len(inspection.machine.gpus)


@pytest.mark.parametrize(
    ("inspection", "words", "severity", "check", "exit_code"),
    [
        pytest.param(HANGING, "", "fail", "p2p-grant-unsafe", 1, id="peer access that cannot work"),
        pytest.param(WARNED, "", "warn", "compute-mode", 0, id="a warning"),
        pytest.param(WARNED, "--strict", "warn", "compute-mode", 1, id="a warning when strict"),
        pytest.param(CROWDED, "--for vllm --tensor-parallel 2", "fail", "shm-small", 1, id="a container for vLLM"),
        pytest.param(FINE, "--expect-gpus 4", "warn", "gpu-missing", 0, id="fewer cards than there should be"),
        pytest.param(WARNED, "--gpus gpu0 --strict", "warn", "compute-mode", 1, id="a card that is chosen"),
        pytest.param(WARNED, "--gpus gpu1 --strict", None, "compute-mode", 0, id="a card that is not chosen"),
        pytest.param(FINE, "--psu 600", "fail", "psu-budget", 1, id="a power supply that is too small"),
        pytest.param(WARNED, "--skip compute-mode --strict", None, "compute-mode", 0, id="a check that is left out"),
    ],
)
def test_what_is_wrong_is_found_and_decides_the_exit_code(
    mgpu: Mgpu, saved: Saved, inspection: Inspection, words: str, severity: str | None, check: str, exit_code: int
) -> None:
    ended = mgpu("doctor", "--replay", saved(inspection), *words.split(), "--json")
    data = diagnosis(ended.json)
    assert (ended.exit_code, ended.json["exit_code"]) == (exit_code, exit_code)
    found = [finding for finding in data["findings"] if finding["id"] == check]
    assert [finding["severity"] for finding in found] == ([severity] if severity else [])
    assert ended.json["simulated"] is True
    order = [("fail", "warn", "info").index(finding["severity"]) for finding in data["findings"]]
    assert order == sorted(order)
    if severity:
        assert found[0]["evidence"]
        assert found[0]["fix"]
    assert mgpu("doctor", "--replay", saved(inspection), *words.split()).exit_code == exit_code


def test_a_finding_has_evidence_a_fix_and_the_way_to_the_reason(mgpu: Mgpu, saved: Saved) -> None:
    out = mgpu("doctor", "--replay", saved(HANGING)).out
    assert re.search(r"(?m)^\[✗\] P2P +p2p-grant-unsafe: ", out)
    assert re.search(r"(?m)^      seen      /sys/bus/pci/devices/0000:10:00\.0/iommu_group/type = DMA-FQ$", out)
    assert re.search(r"(?m)^      fix       export NCCL_P2P_DISABLE=1$", out)
    assert re.search(r"(?m)^      why       mgpu doctor --explain p2p-grant-unsafe$", out)
    summary = out.splitlines()[-1] if out.splitlines()[-1].startswith("1 fail") else out[out.rindex("1 fail") :]
    assert summary.startswith("1 fail (p2p-grant-unsafe), ")
    assert "Best sets" not in out


@pytest.mark.parametrize("verbose", [pytest.param((), id="short"), pytest.param(("-v",), id="verbose")])
@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_the_screen_keeps_its_width(mgpu: Mgpu, saved: Saved, width: int, verbose: tuple[str, ...]) -> None:
    out = mgpu("doctor", "--replay", saved(HANGING), *verbose, COLUMNS=str(width)).out
    assert max(map(len, out.splitlines())) <= min(width, 100)
    for command in re.findall(r"(?m)^ {16}(sudo (?:.*\\\n)*.*)$", out):
        shell = subprocess.run(["sh", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert shell.returncode == 0, (command, shell.stderr)


def test_where_symbols_cannot_be_shown_there_are_words(mgpu: Mgpu, saved: Saved) -> None:
    ended = mgpu("doctor", "--replay", saved(HANGING), PYTHONIOENCODING="ascii")
    assert ended.out.isascii()
    assert re.search(r"(?m)^FAIL P2P +p2p-grant-unsafe", ended.out)
    assert re.search(r"(?m)^ok   Driver ", ended.out)
    assert "[" not in ended.out


def test_every_check_is_shown_on_demand(mgpu: Mgpu, saved: Saved) -> None:
    path = saved(FINE)
    data = diagnosis(mgpu("doctor", "--replay", path, "--json").json)
    out = mgpu("doctor", "--replay", path, "-v").out
    well = [each["id"] for each in data["checks"] if each["result"] == "ok"]
    assert len(well) > 40
    shown = re.findall(r"(?m)^      ok        ((?:.*,\n {16})*.*)$", out)
    assert sorted(re.split(r",\s+", ", ".join(shown))) == sorted(well)


def test_a_machine_without_a_card_needs_no_driver_and_is_not_praised_for_it(mgpu: Mgpu, saved: Saved) -> None:
    path = saved(changed(bare(), engines=ENGINES))
    out = mgpu("doctor", "--replay", path).out
    assert re.search(r"(?m)^\[i\] Driver +none needed: no NVIDIA card$", out)
    data = diagnosis(mgpu("doctor", "--replay", path, "--json").json)
    well = [each["area"] for each in data["checks"] if each["result"] == "ok"]
    assert f" {len(well)} ok." in out.splitlines()[-1]
    assert data["counts"]["ok"] == len(well)
    assert {"Host", "Engines"} <= set(well) <= {"GPUs", "Memory", "Host", "Engines"}


def test_only_what_was_asked_for_is_looked_at(mgpu: Mgpu, saved: Saved) -> None:
    ended = mgpu("doctor", "--replay", saved(HANGING), "--only", "shm-small,iommu-translated", "--json")
    data = diagnosis(ended.json)
    assert {each["id"] for each in data["checks"]} == {"shm-small", "iommu-translated"}
    screen = mgpu("doctor", "--replay", saved(HANGING), "--only", "shm-small").out
    assert "P2P" not in screen
    assert "Best sets" not in screen


def test_what_root_is_to_run_keeps_what_was_asked_for(mgpu: Mgpu, saved: Saved) -> None:
    closed = Unread(what="/dev/kmsg", why="it may not be read", needs_root=True)
    machine = saved(changed(healthy(), host={"log_known": False}, unread=(closed,), root=False))
    data = diagnosis(mgpu("doctor", "--replay", machine, "--for", "vllm", "--tensor-parallel", "2", "--json").json)
    reruns = {each["id"]: each["rerun"] for each in data["skipped"]}
    assert reruns["xid-recent"].endswith(" doctor --for vllm --tensor-parallel 2 --only xid-recent")


@pytest.mark.parametrize("words", [("--list",), ("--explain", "iommu-translated,p2p-proof,profile-plan")])
def test_lists_and_explanations_look_at_nothing(mgpu: Mgpu, tmp_path: Path, words: tuple[str, ...]) -> None:
    # A machine whose first file that is read would never end.
    (tmp_path / "proc").mkdir()
    os.mkfifo(tmp_path / "proc" / "cpuinfo")
    ended = mgpu("doctor", *words, MGPU_ROOT=str(tmp_path), COLUMNS="60")
    assert ended.exit_code == 0
    assert "iommu-translated" in ended.out
    assert max(map(len, ended.out.splitlines())) <= 100
    command, schema = ("doctor.list", DOCTOR_LIST) if words[0] == "--list" else ("doctor.explain", DOCTOR_EXPLAIN)
    data = checked(mgpu("doctor", *words, "--json", MGPU_ROOT=str(tmp_path)).json, command, schema)
    assert len(data["checks"]) == 3 if command == "doctor.explain" else len(data["checks"]) > 70


@pytest.mark.parametrize(
    ("words", "exit_code", "code"),
    [
        pytest.param("--explain nonsense", 2, "check-unknown", id="an unknown check to explain"),
        pytest.param("--only iommu", 2, "check-unknown", id="an unknown check to run"),
        pytest.param("--skip x,y", 2, "check-unknown", id="unknown checks to leave out"),
        pytest.param("--only p2p-proof", 2, "usage", id="a proof without a probe"),
        pytest.param("--dry-run", 2, "usage", id="a dry run of nothing"),
        pytest.param("--yes", 2, "usage", id="yes to nothing"),
        pytest.param("--fix --yes --dry-run", 2, "usage", id="both ways"),
        pytest.param("--fix", 2, "usage", id="questions without a terminal"),
        pytest.param("--fix --yes --replay {machine}", 2, "usage", id="a fix of another machine"),
        pytest.param("--probe --replay {machine}", 2, "usage", id="a probe of another machine"),
        pytest.param("--for tgi", 2, "usage", id="an engine that is none"),
        pytest.param("--tensor-parallel 0", 2, "usage", id="no card at all"),
        pytest.param("--gpus 0,9 --replay {machine}", 3, "gpu-missing", id="a card that is not there"),
        pytest.param("--gpus none --replay {machine}", 2, "usage", id="no card to judge"),
        pytest.param("--gpus gpu0 --expect-gpus 2", 2, "usage", id="some cards and all of them"),
        pytest.param("--nonsense", 2, "usage", id="an option that is none"),
        pytest.param("--gpus 2", 3, "gpu-missing", id="cards where there are none"),
        pytest.param("--expect-gpus 0 --replay {machine}", 2, "usage", id="no card expected where some are"),
        pytest.param("--only tp-size --skip tp-size", 2, "usage", id="no check is left"),
        pytest.param("--only profile-plan", 2, "usage", id="a plan's check without a profile"),
        pytest.param("/etc/passwd", 3, "model-missing", id="a file that is no model"),
        pytest.param("nosuch", 2, "profile-unknown", id="a profile that is none"),
        pytest.param("--replay {here}/no.json", 3, "replay-unusable", id="a file that is not there"),
        pytest.param("--replay {garbage}", 3, "replay-unusable", id="a file that is none"),
        pytest.param(
            "--replay {machine} --save {here}/no/x.json", 3, "file-unwritable", id="a folder that is not there"
        ),
    ],
)
def test_what_is_typed_wrong_is_said_in_a_sentence(
    mgpu: Mgpu, saved: Saved, tmp_path: Path, words: str, exit_code: int, code: str
) -> None:
    (tmp_path / "garbage").write_bytes(b"\x00\xff{")
    typed = words.format(machine=saved(FINE), here=mgpu.here, garbage=tmp_path / "garbage").split()
    ended = mgpu("doctor", *typed, "--json")
    assert (ended.exit_code, ended.json["errors"][0]["code"]) == (exit_code, code)
    jsonschema.validate(ended.json, DOCTOR_ENVELOPE)
    checked(ended.json, "doctor", NOTHING)
    assert mgpu("doctor", *typed).err.startswith("error ")
    mgpu.assert_nothing_left()


def test_this_machine_is_diagnosed_saved_and_judged_again(mgpu: Mgpu, tmp_path: Path) -> None:
    path = tmp_path / "this.json"
    here = mgpu("doctor", "--save", path, "--json")
    first = diagnosis(here.json)
    again = diagnosis(mgpu("doctor", "--replay", path, "--json").json)
    assert (first["replayed"], again["replayed"]) == (False, True)
    assert json.loads(path.read_text())["schema"] == "mgpu.inspection/1"
    for key in ("counts", "findings", "skipped", "checks", "gpus", "host"):
        assert first[key] == again[key], key
    assert "no GPU" in mgpu("doctor").out


def test_the_configuration_says_how_many_cards_there_should_be(mgpu: Mgpu, tmp_path: Path) -> None:
    file = tmp_path / "configuration" / "mgpu" / "config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("expect_gpus: 2\n")
    mgpu.environment["XDG_CONFIG_HOME"] = str(tmp_path / "configuration")
    assert "gpu-missing" in ids(diagnosis(mgpu("doctor", "--json").json), "fail")
    assert "gpu-missing" not in ids(diagnosis(mgpu("doctor", "--expect-gpus", "0", "--json").json), "fail")
    file.write_text("expect_gpus: two\n")
    ended = mgpu("doctor", "--json")
    assert (ended.exit_code, ended.json["errors"][0]["code"]) == (2, "configuration-invalid")
    assert "1:1: expect_gpus: expected a number of cards" in ended.json["errors"][0]["message"]


def test_the_plan_takes_the_cards_that_are_chosen(mgpu: Mgpu, saved: Saved) -> None:
    path = saved(changed(healthy(4), engines=ENGINES))
    both = mgpu("doctor", "llama-70b", "--gpus", "0,1", "--replay", path, "--json")
    one = mgpu("doctor", "llama-70b", "--gpus", "gpu2", "--replay", path, "--json")
    results = [{each["id"]: each["result"] for each in diagnosis(it.json)["checks"]} for it in (both, one)]
    assert [each["profile-plan"] for each in results] == ["ok", "fail"]


def test_a_profile_is_planned_on_a_saved_machine(mgpu: Mgpu, saved: Saved) -> None:
    path = saved(FINE)
    data = diagnosis(mgpu("doctor", "llama-8b", "--replay", path, "--json").json)
    assert data["purpose"]["attention_heads"] == 32
    assert data["purpose"]["kv_heads"] == 8
    assert data["purpose"]["weights_bytes"] > 4e9
    assert data["purpose"]["port"] == 8080
    assert {each["id"]: each["result"] for each in data["checks"]}["profile-plan"] == "ok"
    assert re.search(r"(?m)^\[✓\] Profile +llama-8b fits with ", mgpu("doctor", "llama-8b", "--replay", path).out)
    small = saved(changed(healthy(1, "NVIDIA GeForce RTX 3060"), engines=ENGINES))
    large = mgpu("doctor", "llama-70b", "--replay", small, "--json")
    assert "profile-plan" in ids(diagnosis(large.json), "fail")
    assert large.exit_code == 1


def test_only_what_is_not_here_needs_room_on_the_disk(mgpu: Mgpu, saved: Saved, tiny: Path, tmp_path: Path) -> None:
    def missing(*words: object, **variables: str) -> tuple[int, int]:
        needs = diagnosis(mgpu("doctor", *words, "--json", **variables).json)["purpose"]
        return needs["weights_bytes"], needs["missing_bytes"]

    whole, left = missing(tiny, "--for", "llama.cpp")
    assert (whole, left) == (tiny.stat().st_size, 0)
    assert missing(tiny, "--replay", saved(FINE)) == (whole, whole)  # another machine has no file of this one
    whole, left = missing("llama-8b", HF_HOME=str(tmp_path / "hub"))
    assert left == whole > 4e9
    profile = (Path(__file__).parents[2] / "profiles" / "llama-8b.yaml").read_text()
    repository = re.search(r"repository: (\S+GGUF)", profile)
    checksum = re.search(r"\b[0-9a-f]{64}\b", profile)
    assert repository
    assert checksum
    blobs = tmp_path / "hub" / "hub" / f"models--{repository[1].replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    with (blobs / f"{checksum[0]}.mgpu.incomplete").open("wb") as begun:
        begun.truncate(3 << 30)
    assert missing("llama-8b", HF_HOME=str(tmp_path / "hub")) == (whole, whole - (3 << 30))


def test_a_plan_with_flags_that_the_engine_does_not_know_fails(mgpu: Mgpu, tiny: Path, tmp_path: Path) -> None:
    fine = diagnosis(mgpu("doctor", tiny, "--for", "llama.cpp", "--json").json)
    results = {each["id"]: each["result"] for each in fine["checks"]}
    assert results["profile-plan"] == "ok"
    engine = tmp_path / "old" / "llama-server"
    engine.parent.mkdir()
    engine.write_text("#!/bin/sh\ncase $1 in --help) echo '  --model FILE  -m';; *) echo 'Available devices:';; esac\n")
    engine.chmod(0o755)
    old = mgpu("doctor", tiny, "--for", "llama.cpp", "--json", MGPU_LLAMA_SERVER=str(engine))
    assert "profile-flags" in ids(diagnosis(old.json), "fail")
    assert old.exit_code == 1


def test_fixes_of_a_machine_that_needs_none_are_none(mgpu: Mgpu) -> None:
    for choice in ("--dry-run", "--yes"):
        assert diagnosis(mgpu("doctor", "--fix", choice, "--json").json)["fixes"] == []


def test_a_probe_without_cards_is_skipped_with_the_reason(mgpu: Mgpu) -> None:
    data = diagnosis(mgpu("doctor", "--probe", "--only", "p2p-proof,pcie-measured", "--json").json)
    assert data["proof"]["problem"] == "there is no NVIDIA or AMD card that can be used"
    assert {each["result"] for each in data["checks"]} == {"skipped"}
    assert "not proved: there is no" in mgpu("doctor", "--probe").out


def test_many_things_that_cannot_be_read_are_one_line(mgpu: Mgpu, saved: Saved) -> None:
    nothing = Inspection(machine=FINE.machine)
    short, long = (mgpu("doctor", "--replay", saved(nothing), *words).out for words in ((), ("-v",)))
    assert len(re.findall(r"(?m)^\[-\] Skipped", short)) == 1
    assert "-v says why" in short
    assert long.count("could not be") > 10


@pytest.fixture
def exclusive(mgpu: Mgpu, nvml: dict[str, Path], tmp_path: Path) -> Mgpu:
    """mgpu on two cards that only one process may use, with an nvidia-smi that changes that."""
    rig = tmp_path / "rig.txt"
    cards = (Path(__file__).parents[1] / "machines" / "rigs" / "2x4090-x670e.txt").read_text()
    rig.write_text(cards + "gpu0.computemode = 3\n")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {
        "nvidia-smi": f'echo "$@" >> {tmp_path}/calls; sed -i "s/computemode = 3/computemode = 0/" {rig}\n',
        "sudo": 'while [ "$1" = -n ]; do shift; done; exec "$@"\n',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}")
        (programs / name).chmod(0o755)
    mgpu.environment |= {
        "LD_LIBRARY_PATH": str(nvml["new"]),
        "FAKE_NVML": str(rig),
        "MGPU_ROOT": "/",  # under another root nothing is mended
        "PATH": f"{programs}:{os.defpath}",
    }
    return mgpu


@pytest.mark.parametrize(
    ("answer", "result", "called"),
    [
        pytest.param(b"y\n", "done", True, id="yes"),
        pytest.param(b"\n", "declined", False, id="nothing"),
        pytest.param(b"\x04", "declined", False, id="the end of the input"),
    ],
)
def test_a_fix_is_asked_for_on_a_terminal(
    exclusive: Mgpu, tmp_path: Path, answer: bytes, result: str, called: bool
) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        exclusive.command("doctor", "--only", "compute-mode", "--fix"),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=exclusive.here,
        env=exclusive.with_variables(),
        text=True,
    )
    os.write(ours, answer)
    out, err = process.communicate(timeout=LIMIT_S)
    os.close(ours)
    os.close(theirs)
    assert "nvidia-smi -i 0000:01:00.0 -c 0" in err
    assert "[y/N]" in err
    assert "Traceback" not in err
    assert re.search(rf"(?m)^\[.\] Fixes +{result}", out), out
    assert (tmp_path / "calls").exists() == called
    assert process.returncode == 0


def test_a_fix_is_shown_run_and_judged_again(exclusive: Mgpu, tmp_path: Path) -> None:
    dry = diagnosis(exclusive("doctor", "--only", "compute-mode", "--fix", "--dry-run", "--json").json)
    assert [fix["result"] for fix in dry["fixes"]] == ["not run"]
    assert dry["fixes"][0]["command"][-4:-2] == ["-i", "0000:01:00.0"]
    assert not (tmp_path / "calls").exists()
    assert ids(dry, "warn") == ["compute-mode"]
    done = diagnosis(exclusive("doctor", "--only", "compute-mode", "--fix", "--yes", "--json").json)
    assert [fix["result"] for fix in done["fixes"]] == ["done"]
    assert (tmp_path / "calls").read_text() == "-i 0000:01:00.0 -c 0\n"
    assert done["findings"] == []
