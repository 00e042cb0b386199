"""`mgpu gpus` and `mgpu` alone, on the rigs of the fake driver library."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.fakes.ollama_running import running_ollama

from .contract import MACHINE, OVERVIEW, PLAN, checked
from .program import Mgpu

RIGS = sorted((Path(__file__).parents[1] / "machines" / "rigs").glob("*.txt"))
WITHOUT_CARDS = {"driver-mismatch", "no-driver", "container-lost-cgroup"}
TWO_4090 = (
    "CUDA0: NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free);"
    "CUDA1: NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free)"
)


@pytest.fixture
def on_rig(mgpu: Mgpu, nvml: dict[str, Path]) -> Mgpu:
    """mgpu where the fake driver library is found; FAKE_NVML names the rig."""
    mgpu.environment["LD_LIBRARY_PATH"] = str(nvml["new"])
    mgpu.environment["FAKE_NVML"] = str(rig("2x4090-x670e"))
    return mgpu


def rig(name: str) -> Path:
    return next(path for path in RIGS if path.stem == name)


def value(rig_text: str, key: str) -> str:
    found = re.search(rf"(?m)^{re.escape(key)} = (.*)$", rig_text)
    assert found, key
    return found[1]


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in RIGS])
def test_every_rig_is_shown(on_rig: Mgpu, path: Path) -> None:
    machine = checked(on_rig("gpus", "--json", FAKE_NVML=str(path)).json, "gpus", MACHINE)
    table = on_rig("gpus", FAKE_NVML=str(path))
    assert table.exit_code == 0
    assert (machine["gpus"] == []) == (path.stem in WITHOUT_CARDS)
    if not machine["gpus"]:
        assert "no GPU found" in table.out
        return
    text = path.read_text()
    assert len(machine["gpus"]) == int(value(text, "sys.count"))
    assert f"driver {value(text, 'sys.driver')}" in table.out
    for gpu in machine["gpus"]:
        (row,) = re.findall(rf"(?m)^gpu{gpu['index']} .*$", table.out)
        if gpu["problem"]:
            assert f"gpu{gpu['index']} cannot be used: it {gpu['problem']}" in table.out
        else:
            assert gpu["uuid"] == value(text, f"gpu{gpu['index']}.uuid")
            sizes = [f"{gpu[key] / 2**30:.1f}" for key in ("total_bytes", "free_bytes")]
            assert all(size in row.split() for size in sizes), row


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param(
            "driver-mismatch", "driver: the NVIDIA library and the loaded kernel module differ", id="mismatch"
        ),
        pytest.param("container-lost-cgroup", "driver: NVML answers 'Unknown Error'", id="lost cgroup"),
        pytest.param("no-driver", "no GPU found: no NVIDIA driver, no AMD card", id="no driver"),
    ],
)
def test_a_driver_that_does_not_work_is_explained(on_rig: Mgpu, name: str, message: str) -> None:
    ended = on_rig("gpus", FAKE_NVML=str(rig(name)))
    assert ended.exit_code == 0
    assert ended.out.startswith(message)
    assert "On the CPU: 8 cores, 64 GiB RAM" in ended.out


def test_a_machine_without_a_gpu_is_normal(mgpu: Mgpu) -> None:
    ended = mgpu("gpus")
    assert (ended.exit_code, ended.err) == (0, "")
    assert ended.out == (
        "no GPU found: no NVIDIA driver, no AMD card, and llama.cpp lists no device. On the CPU: 8 cores, 64 GiB RAM\n"
    )


def test_cards_are_joined_with_what_the_engine_calls_them(on_rig: Mgpu) -> None:
    machine = on_rig("gpus", "--json", FAKE_DEVICES=TWO_4090).json["data"]
    assert [gpu["engine_devices"] for gpu in machine["gpus"]] == [["CUDA0"], ["CUDA1"]]
    assert re.search(r"(?m)^gpu1 .* CUDA1 *$", on_rig("gpus", FAKE_DEVICES=TWO_4090).out)


def test_who_holds_a_cards_memory_is_named(on_rig: Mgpu, tmp_path: Path) -> None:
    path = tmp_path / "rig.txt"
    path.write_text(rig("2x4090-x670e").read_text() + "gpu1.compute = 4711:1073741824 4712:-\n")
    out = on_rig("gpus", FAKE_NVML=str(path)).out
    assert "gpu1: a process (pid 4711) holds 1.00 GiB" in out
    assert "gpu1: a process (pid 4712) holds an unknown amount" in out


def test_a_snapshot_makes_the_same_machine_elsewhere(on_rig: Mgpu, mgpu: Mgpu, tmp_path: Path) -> None:
    there = on_rig("gpus", "--json", FAKE_DEVICES=TWO_4090)
    snapshot = tmp_path / "there.json"
    snapshot.write_text(there.out)
    # Another machine: no driver, no engine that could be asked.
    elsewhere = {"LD_LIBRARY_PATH": "/nonexistent", "MGPU_LLAMA_SERVER": "/nonexistent"}
    here = mgpu("gpus", "--machine", snapshot, "--json", **elsewhere)
    assert here.json["simulated"] is True
    assert here.json["data"] == {**there.json["data"], "source": "simulated"}
    table = mgpu("gpus", "--machine", snapshot, **elsewhere).out
    assert (
        table.replace(" · SIMULATED", "").splitlines()[1:] == on_rig("gpus", FAKE_DEVICES=TWO_4090).out.splitlines()[1:]
    )
    planned_there, planned_here = (
        checked(entry.json, "plan", PLAN)
        for entry in (
            on_rig("plan", "llama-8b", "--backend", "llama.cpp", "--json", FAKE_DEVICES=TWO_4090),
            mgpu("plan", "llama-8b", "--backend", "llama.cpp", "--machine", snapshot, "--json", **elsewhere),
        )
    )
    for plan in (planned_there, planned_here):
        for candidate in plan["candidates"]:
            candidate["argv"] = candidate["argv"][1:]  # without the program
    assert planned_here["candidates"] == planned_there["candidates"]


def test_a_broken_engine_does_not_hide_the_cards(on_rig: Mgpu) -> None:
    ended = on_rig("gpus", "--json", MGPU_LLAMA_SERVER="/bin/false")
    assert ended.exit_code == 0
    assert len(ended.json["data"]["gpus"]) == 2
    assert "cannot run here" in ended.json["warnings"][0]
    assert re.search(r"(?m)^warning .*cannot run here", on_rig("gpus", MGPU_LLAMA_SERVER="/bin/false").err)


def test_mgpu_alone_says_what_there_is_and_what_to_type(on_rig: Mgpu) -> None:
    ended = on_rig(FAKE_DEVICES=TWO_4090)
    assert ended.exit_code == 0
    assert re.match(r"mgpu \d\S* · 2× RTX 4090 24 GiB · driver 580\.126\.20 · llama\.cpp", ended.out)
    assert json.loads(on_rig("--json").out)["data"]["gpus"] == 2
    typed = re.findall(r"(?m)^  (mgpu .+?)(?:  |$)", ended.out)
    assert len(typed) >= 4


@pytest.mark.parametrize(
    ("programs", "expected"),
    [
        pytest.param((), "llama.cpp -, vLLM -, Ollama -", id="none"),
        pytest.param(("llama-server", "vllm", "ollama"), "llama.cpp, vLLM 0.32.0, Ollama", id="all"),
        pytest.param(("vllm",), "llama.cpp -, vLLM 0.32.0, Ollama -", id="one"),
    ],
)
def test_mgpu_alone_names_the_engines(mgpu: Mgpu, tmp_path: Path, programs: tuple[str, ...], expected: str) -> None:
    for name in ("llama-server", "vllm", "ollama"):
        path = tmp_path / "engines" / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\nexit 9\n")  # none is started for this
        path.chmod(0o755 if name in programs else 0o644)
    (tmp_path / "engines" / "lib" / "python3.11" / "site-packages" / "vllm-0.32.0.dist-info").mkdir(parents=True)
    where = {
        "MGPU_LLAMA_SERVER": str(tmp_path / "engines" / "bin" / "llama-server"),
        "PATH": f"{tmp_path}/engines/bin",
        "OLLAMA_HOST": "127.0.0.1:1",
    }
    ended = mgpu(**where)
    assert ended.out.splitlines()[0].endswith(f" · {expected}"), ended
    data = checked(mgpu("--json", **where).json, "mgpu", OVERVIEW)
    found = {key: data[key] is not None for key in ("llama_cpp", "vllm", "ollama")}
    assert found == {key: name in programs for key, name in zip(found, ("llama-server", "vllm", "ollama"), strict=True)}
    assert data["ollama_url"] is None


def test_mgpu_alone_says_that_an_ollama_runs(mgpu: Mgpu, tmp_path: Path) -> None:
    with running_ollama(tmp_path / "ollama") as server:
        assert "Ollama 0.32.15 running\n" in mgpu(OLLAMA_HOST=server.url).out
        assert mgpu("--json", OLLAMA_HOST=server.url).json["data"]["ollama_url"] == server.url


def test_mgpu_alone_warns_of_a_wrong_configuration_once(mgpu: Mgpu, own_home: Path) -> None:
    file = own_home / "config" / "mgpu" / "config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("engines: [vllm]\n")
    ended = mgpu()
    assert ended.exit_code == 0
    assert ended.err.count("expected a group of keys, found a list") == 1
