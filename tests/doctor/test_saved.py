"""An inspection in a file: what it leaves out, and what is said of files that are none."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import time
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mgpu.doctor.saved import SCHEMA, replay, save, saved_text
from mgpu.errors import Missing
from mgpu.machine.inspection import DiskSpace, Inspection, InstalledEngine, LogEntry
from mgpu.machine.snapshot import GpuProcess

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


SECRETS = {
    "the serial number": "GPU serial number is 1324321012345.",
    "another serial number": "Serial: PHA7-0042, S/N=0324518",
    "this computer": "on workstation7, WORKSTATION7.lab.example.org",
    "another computer": "//nas3.corp.example.com/models via gateway.fritz.box.lan",
    "this user": "by lovelace in /data/lovelace/x (~lovelace)",
    "the user who is root now": "for hopper in /opt/hopper",
    "another user": "/home/turing/m and /Users/Noether Turing/m, /mnt/c/Users/turing m, C:\\Users\\turing",
    "an address": "192.168.178.42:8000 is [2001:db8:0:1::42]:8000, fe80::1c2b:3dff:fe4e:5f60%eno1 or ::ffff:10.0.0.7",
    "hardware": "de:ad:be:ef:00:42 de-ad-be-ef-00-42 enxdeadbeef0042 80:00:00:48:fe:80:de:ad:be:ef:00:42",
    "a program": "NVRM: Xid (PCI:0000:01:00): 31, pid=42, name=acme-trainer, Ch 00000008",
    "a program at the end": "name=acme trainer",
    "a card": UUID.upper(),
    "a service": "vllm-zenith.service and /etc/systemd/system/llama@zenith.service.d/zenith.conf",
    "a folder": "/data/zenith-secret/models /opt/zeno.smith/bin:/mnt/zenith ~/zenith/x",
}
TELLING = (
    r"1324321012345|PHA7|0324518|workstation7|example\.|nas3|corp|gateway|lovelace|hopper|turing|noether"
    r"|zenith|zeno|192\.168|2001|fe80|10\.0\.0|dead|de.ad|acme|trainer|3f2b8f5e"
)


def filled(kind: Any, text: str) -> Any:
    """A value of a type in which every text, however deep, is `text`, and every list has one entry."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return filled(typing.get_args(kind)[0], text)
    if typing.get_origin(kind) is tuple:
        entries = typing.get_args(kind)
        return (filled(entries[0], text),) if entries[1:] == (...,) else tuple(filled(entry, text) for entry in entries)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{field.name: filled(hints[field.name], text) for field in dataclasses.fields(kind)})  # type: ignore[operator]
    return text if kind is str else kind(1)


def count_of_texts(value: Any) -> int:
    if isinstance(value, dict | list):
        return sum(map(count_of_texts, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str)


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_no_text_of_any_fact_names_a_person_or_a_computer(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "workstation7.lab.example.org")
    for variable, value in {"USER": "lovelace", "HOME": "/home/lovelace", "SUDO_USER": "hopper"}.items():
        monkeypatch.setenv(variable, value)
    inspection: Inspection = filled(Inspection, f"seen {secret} here")
    saved = saved_text(inspection)
    assert count_of_texts(json.loads(saved)) > 60
    assert re.findall(TELLING, saved, re.IGNORECASE) == []
    assert saved.count("seen ") > 60 - 2  # what is left is what was there


@pytest.mark.parametrize(
    "part", ["a.", ":", "a:", "1.", "serial ", "=", "/home/", "/home/a b ", "name=", "a-", "aa:", "name=a", "x"]
)
def test_a_text_without_end_is_freed_of_names_in_time(part: str) -> None:
    entry = LogEntry(kind="xid", text=f"serial {part * 100_000}")
    started = time.monotonic()
    saved_text(changed(healthy(), host={"log": (entry,)}))
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("path", "saved"),
    [
        pytest.param("/data/acme secret/models", "/data/folder/models", id="a folder with blanks"),
        pytest.param("/opt/bob.smith/llama.cpp/build/bin/llama-server", "/opt/folder/llama.cpp/build/bin/llama-server"),
        pytest.param("~/.cache/huggingface/hub", "~/.cache/huggingface/hub", id="the usual one"),
        pytest.param("/usr/share/ollama/.ollama/models", "/usr/share/ollama/.ollama/models", id="the system's"),
        pytest.param("/var/lib/docker", "/var/lib/docker", id="Docker's"),
    ],
)
def test_of_folders_the_usual_words_are_left(path: str, saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/lovelace")
    engine = InstalledEngine(backend="llama.cpp", path=path, problem=f"it is at {path.replace(' ', '-')}")
    inspection = changed(healthy(), host={"disks": (DiskSpace(role="models", path=path),)}, engines=(engine,))
    found = json.loads(saved_text(inspection))["inspection"]
    assert found["host"]["disks"][0]["path"] == saved
    assert (found["engines"][0]["path"], found["engines"][0]["problem"]) == (saved, f"it is at {saved}")


def test_a_process_is_named_only_where_it_is_a_known_program() -> None:
    used_by = tuple(GpuProcess(pid=at, name=name) for at, name in enumerate(("acme-trainer", "python3.12", "ollama")))
    saved = json.loads(saved_text(changed_gpu(healthy(), 0, used_by=used_by)))
    processes = saved["inspection"]["machine"]["gpus"][0]["used_by"]
    assert [process["name"] for process in processes] == ["program", "python3.12", "ollama"]


@pytest.mark.parametrize(
    "text",
    [
        "NVRM: Xid (PCI:0000:01:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
        "NVRM: Xid (PCI:0000:c1:00.0): 31, pid=4711, name=llama-server, Ch 00000008",
        "NVRM: GPU 0000:01:00.0: RmInitAdapter failed! (0x24:0x72:1568)",
        "nvidia-uvm: uvm_pmm_gpu.c:3187 devmem_alloc_pagemap failed: err -34 at 12:34:56",
        "pcieport 0000:00:01.1: AER: Correctable error message received from 00000000:01:00.0",
        "580.126.20 13.580.126.20 6.8.0-90-generic 5.15.167.4-microsoft-standard-WSL2 libnvidia-ml.so.580.126.20",
        "/usr/lib/x86_64-linux-gnu/libnccl.so.2 /etc/cdi/nvidia.yaml nvidia.com/gpu=all /etc/docker/daemon.json",
        "NVIDIA GeForce RTX 4090 AMD Ryzen 9 7950X 16-Core Processor NVIDIA RTX 6000 Ada Generation",
        "127.0.0.1:11434 0.0.0.0:8000 [::1]:8080 0-7,16-23 std::bad_alloc",
        "nvidia-drm.modeset=1 rd.driver.blacklist=nouveau native.cgroupdriver=systemd",
    ],
)
def test_what_names_nobody_stays_as_it_is(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "workstation7")
    monkeypatch.setenv("USER", "nvidia")
    entry = LogEntry(kind="xid", text=text)
    saved = json.loads(saved_text(changed(healthy(), host={"log": (entry,)})))
    assert saved["inspection"]["host"]["log"][0]["text"] == text


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
