"""An inspection in a file: what it leaves out, and what is said of files that are none."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mgpu.doctor.saved import SCHEMA, replay, save, saved_text
from mgpu.errors import Missing
from mgpu.machine.inspection import Inspection, LogEntry

from .inspections import bare, changed, changed_gpu, healthy

UUID = "GPU-3f2b8f5e-1111-2222-3333-444455556666"


@pytest.mark.parametrize(
    "inspection",
    [
        pytest.param(healthy(2, "NVIDIA GeForce RTX 3090", lanes=8), id="two cards"),
        pytest.param(healthy(8, "NVIDIA H100 80GB HBM3"), id="eight cards"),
        pytest.param(bare(), id="no card"),
    ],
)
def test_what_was_saved_comes_back(inspection: Inspection, tmp_path: Path) -> None:
    save(inspection, tmp_path / "a.json")
    once = replay(tmp_path / "a.json")
    save(once, tmp_path / "b.json")
    assert replay(tmp_path / "b.json") == once
    assert [gpu.name for gpu in once.machine.gpus] == [gpu.name for gpu in inspection.machine.gpus]
    assert (once.cards, once.pci, once.peers) == (inspection.cards, inspection.pci, inspection.peers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


@pytest.mark.parametrize(
    ("secret", "kept"),
    [
        pytest.param(UUID.removeprefix("GPU-"), "GPU-00000000-0000-0000-0000-000000000000", id="a card's UUID"),
        pytest.param("hf_secret", "HF_TOKEN", id="a token"),
        pytest.param("/home/alice", "/home/user/models", id="a home folder"),
        pytest.param("192.168.1.7", "connected to (address)", id="an address of the network"),
        pytest.param("aa:bb:cc:dd:ee:ff", "(address)", id="an address of a network card"),
        pytest.param("root=", "iommu=pt", id="the kernel's other options"),
        pytest.param("\x1b", "Xid", id="what a terminal would obey"),
        pytest.param("workstation7", "host kernel", id="the host's name"),
    ],
)
def test_what_names_the_owner_is_left_out(secret: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "workstation7.example.org")
    text = "workstation7 kernel: Xid \x1b connected to 192.168.1.7 aa:bb:cc:dd:ee:ff"
    inspection = changed(
        changed_gpu(healthy(), 0, uuid=UUID),
        host={
            "environment": (
                ("HF_TOKEN", "hf_secret"),
                ("HF_HOME", "/home/alice/models"),
                ("CUDA_VISIBLE_DEVICES", UUID),
            ),
            "kernel_command_line": "root=UUID=3f2b8f5e-1111-2222-3333-444455556666 iommu=pt ip=10.0.0.2 quiet",
            "log": (LogEntry(kind="xid", text=text),),
        },
    )
    saved = saved_text(inspection)
    assert secret not in saved
    assert kept in saved
    json.loads(saved)


def test_the_same_card_has_the_same_number_everywhere(tmp_path: Path) -> None:
    inspection = changed(
        changed_gpu(healthy(), 1, uuid=UUID), host={"environment": (("CUDA_VISIBLE_DEVICES", UUID.upper()),)}
    )
    save(inspection, tmp_path / "a.json")
    read = replay(tmp_path / "a.json")
    assert dict(read.host.environment)["CUDA_VISIBLE_DEVICES"].endswith((read.machine.gpus[1].uuid or "")[-12:])
    assert len({gpu.uuid for gpu in read.machine.gpus}) == 2


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "such.json", tmp_path):
        with pytest.raises(Missing) as error:
            save(healthy(), path)
        assert error.value.code == "file-unwritable"
    assert list(tmp_path.iterdir()) == []


def edited(edit: Callable[[dict[str, Any]], object]) -> bytes:
    data = json.loads(saved_text(healthy()))
    edit(data)
    return json.dumps(data).encode()


def inside(*path: str | int, value: object) -> bytes:
    def edit(data: dict[str, Any]) -> None:
        at: Any = data["inspection"]
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = value

    return edited(edit)


def twins(data: dict[str, Any]) -> None:
    data["inspection"] |= {"cards": [], "peers": []}
    for gpu in data["inspection"]["machine"]["gpus"]:
        gpu["index"] = 0


TWINS = edited(twins)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(b"", "is not JSON", id="empty"),
        pytest.param(b"\xff\xfe\x00", "not text", id="binary"),
        pytest.param(saved_text(healthy()).encode()[:999], "is not JSON", id="cut off"),
        pytest.param(b"[" * 100_000, "nested too deeply", id="nested"),
        pytest.param(b"[]", "no saved inspection", id="a list"),
        pytest.param(b'{"a": 1}', "no saved inspection", id="another object"),
        pytest.param(b'{"schema": "mgpu.gpus/1", "inspection": {}}', "mgpu.gpus/1", id="another of mgpu's files"),
        pytest.param(b'{"schema": "mgpu.inspection/2", "inspection": {}}', "another mgpu", id="a newer file"),
        pytest.param(inside("schema_version", value=9), "another mgpu", id="a newer inspection"),
        pytest.param(edited(lambda data: data.update(inspection=None)), "expected an object", id="nothing inside"),
        pytest.param(inside("machine", value="x"), "inspection.machine", id="a wrong type"),
        pytest.param(inside("machine", "gpus", 0, "index", value=-1), "has no card", id="a card with no index"),
        pytest.param(TWINS, "same index", id="two cards with one index"),
        pytest.param(inside("cards", 0, "gpu", value=7), "no card 7", id="a card that is not there"),
        pytest.param(inside("machine", "gpus", 0, "name", value="\x1b[2J"), "cannot be printed", id="escape sequences"),
        pytest.param(inside("machine", "gpus", 0, "name", value="\ud800"), "cannot be printed", id="half a character"),
        pytest.param(inside("machine", "gpus", 0, "total_bytes", value=10**40), "out of range", id="a huge number"),
        pytest.param(inside("host", "memory_pressure_percent", value=float("nan")), "no", id="no number"),
        pytest.param(inside("host", "environment", value=[["A"]]), "environment", id="half a variable"),
        pytest.param(inside("host", "nodes_without_memory", value=[0] * 5000), "at most", id="an endless list"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}", "", id="endless digits"),
        pytest.param(b" " * (8 * 2**20 + 1), "larger than 8 MiB", id="a huge file"),
    ],
)
def test_a_file_that_is_none_is_refused_in_a_sentence(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "it.json"
    path.write_bytes(content)
    with pytest.raises(Missing) as error:
        replay(path)
    assert (error.value.code, error.value.exit_code) == ("replay-unusable", 3)
    assert said in error.value.message
    assert "\n" not in error.value.message
    assert error.value.message.isprintable()
    assert "--save" in (error.value.hint or "")


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # nobody ever writes to it
    absent, pipe, device = tmp_path / "absent.json", tmp_path / "pipe", Path("/dev/zero")
    for path in (absent, pipe, device, tmp_path, Path("a\0b"), tmp_path / ("x" * 5000)):
        with pytest.raises(Missing) as error:
            replay(path)
        assert len(error.value.message) < 600


def test_what_a_newer_mgpu_added_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "it.json").write_bytes(inside("host", "new_fact", value=3))
    assert replay(tmp_path / "it.json").host.boot_age_s == healthy().host.boot_age_s
    assert SCHEMA.endswith("/1")
