"""The real program on whole computers, and on what it saved of them: it says what an expert would, and no more."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mgpu.units import GIB
from tests.cli.contract import DOCTOR, DOCTOR_ENVELOPE, checked

from .rigged import COMPUTERS, RIGS, SAVED, doctor, environment


def said(entry: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Failures and warnings as "fail ID", and the ids of notes, of an answer that keeps contract and schema."""
    jsonschema.validate(entry, DOCTOR_ENVELOPE)
    findings = checked(entry, "doctor", DOCTOR)["findings"]
    bad = {f"{each['severity']} {each['id']}" for each in findings if each["severity"] != "info"}
    return bad, {each["id"] for each in findings if each["severity"] == "info"}


@pytest.mark.parametrize("name", COMPUTERS)
def test_a_computer_is_judged_and_saved_as_an_expert_would(nvml: dict[str, Path], tmp_path: Path, name: str) -> None:
    variables = environment(name, tmp_path, nvml["new"])
    # The disk is the one that the tests run on.
    room = () if shutil.disk_usage(tmp_path).free > 20 * GIB else ("--skip", "disk-models")
    computer, saved = COMPUTERS[name], tmp_path / "saved.json"
    first = doctor(variables, "--save", saved, *room)
    finds, notes = said(first)
    assert finds == set(computer.finds)
    assert notes == set(computer.notes)
    assert first["exit_code"] == (1 if any(each.startswith("fail") for each in computer.finds) else 0)
    assert {each["id"] for each in first["data"]["skipped"]} == set(computer.hidden)
    again = doctor({**variables, "FAKE_NVML": "", "MGPU_ROOT": str(tmp_path / "nowhere")}, "--replay", saved, *room)
    for entry in (first, again):
        for gpu in entry["data"]["gpus"]:
            del gpu["uuid"]  # that is numbered in what is saved
    for key in ("findings", "skipped", "checks", "counts", "groups", "host", "driver", "gpus"):
        assert again["data"][key] == first["data"][key], key


def test_every_rig_is_in_a_computer_and_every_computer_is_saved() -> None:
    assert {computer.rig for computer in COMPUTERS.values()} == {rig.stem for rig in RIGS.glob("*.txt")}
    assert set(COMPUTERS) == {path.stem for path in SAVED.glob("*.json")}


@pytest.mark.parametrize("name", COMPUTERS)
def test_a_saved_computer_is_still_judged_the_same(name: str, tmp_path: Path) -> None:
    variables = {"PATH": "", "HOME": str(tmp_path), "MGPU_ROOT": str(tmp_path)}
    entry = doctor(variables, "--replay", SAVED / f"{name}.json")
    assert said(entry) == (set(COMPUTERS[name].finds), set(COMPUTERS[name].notes))


def test_what_is_saved_names_no_place_of_its_making() -> None:
    for path in SAVED.glob("*.json"):
        text = path.read_text()
        assert not re.search(r"/tmp|/home/|pytest", text), path.name
        assert "llama-server" in text
        assert json.loads(text)["schema"] == "mgpu.inspection/1"


@pytest.mark.parametrize(
    ("name", "words", "finding"),
    [
        pytest.param("2x4090-chipset", "--tensor-parallel 2", "warn pcie-chipset", id="a cut over chipset lanes"),
        pytest.param("2x3090-riser-x1", "--tensor-parallel 2", "fail pcie-x1-riser", id="a cut over one lane"),
        pytest.param("2x3090-nvlink", "--for vllm", "warn vram-in-use", id="an engine that needs what is taken"),
        pytest.param("6000ada-4090", "--for vllm --tensor-parallel 2", "warn mixed-gpus", id="a cut of unequal cards"),
    ],
)
def test_a_purpose_makes_a_note_a_finding(name: str, words: str, finding: str, tmp_path: Path) -> None:
    entry = doctor({"HOME": str(tmp_path)}, "--replay", SAVED / f"{name}.json", *words.split())
    assert finding in said(entry)[0]


@pytest.mark.parametrize("name", COMPUTERS)
def test_what_is_found_comes_with_evidence_and_what_to_do(name: str, tmp_path: Path) -> None:
    findings = doctor({"HOME": str(tmp_path)}, "--replay", SAVED / f"{name}.json")["data"]["findings"]
    assert not [each["id"] for each in findings if len(each["summary"]) > 90]
    bad = [each for each in findings if each["severity"] != "info"]
    assert all(each["evidence"] and each["fix"] for each in bad)
    assert not [step for each in findings for step in each["fix"] if re.search(r"…|: (sudo|export|docker) ", step)]
    assert max(Counter(each["id"] for each in bad).values(), default=1) == 1
