from __future__ import annotations

import json
from pathlib import Path

import pytest

from mgpu.errors import UsageError
from mgpu.machine.simulate import simulate
from mgpu.machine.snapshot import Driver, Gpu, Host, Link, Machine, to_json

RIGS = Path(__file__).parents[1] / "machines/rigs"


@pytest.mark.parametrize(
    ("expression", "names", "devices"),
    [
        ("2x4090", ["NVIDIA GeForce RTX 4090"] * 2, ["CUDA0", "CUDA1"]),
        ("4090+4080", ["NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4080"], ["CUDA0", "CUDA1"]),
        ('3x"RTX 3090"', ["NVIDIA GeForce RTX 3090"] * 3, ["CUDA0", "CUDA1", "CUDA2"]),
        ("1x'RTX 3090'", ["NVIDIA GeForce RTX 3090"], ["CUDA0"]),
        ("4xA100-80", ["NVIDIA A100 SXM4 80 GB"] * 4, ["CUDA0", "CUDA1", "CUDA2", "CUDA3"]),
        ("2x3090+1x4090", ["NVIDIA GeForce RTX 3090"] * 2 + ["NVIDIA GeForce RTX 4090"], ["CUDA0", "CUDA1", "CUDA2"]),
        (" 2 x 5090 + 3060 ", ["NVIDIA GeForce RTX 5090"] * 2 + ["NVIDIA GeForce RTX 3060 12 GB"], None),
        ("7900xtx", ["AMD Radeon RX 7900 XTX"], ["ROCm0"]),
        ("2x7900xt", ["AMD Radeon RX 7900 XT"] * 2, ["ROCm0", "ROCm1"]),
        ("3090+7900xtx+b580+3090", None, ["CUDA0", "ROCm0", "Vulkan0", "CUDA1"]),
        ("none", [], []),
        ("CPU", [], []),
    ],
)
def test_an_expression_is_a_machine(expression: str, names: list[str] | None, devices: list[str] | None) -> None:
    machine = simulate(expression)
    assert machine.source == "simulated"
    assert machine.host == Host()
    assert [gpu.index for gpu in machine.gpus] == list(range(len(machine.gpus)))
    assert names is None or [gpu.name for gpu in machine.gpus] == names
    assert devices is None or [name for gpu in machine.gpus for name in gpu.engine_devices] == devices
    assert all(gpu.uuid is None and gpu.bandwidth_gb_s for gpu in machine.gpus)


@pytest.mark.parametrize(
    ("expression", "rig"),
    [
        ("2x4090", "2x4090-x670e"),
        ("2x3090", "2x3090-riser-x1"),
        ("2x5090", "2x5090-x8"),
        ("8xH100", "8xh100-sxm"),
        ("8xA100-80", "8xa100-sxm"),
        ("2xpro6000", "2xpro6000-p2p-hang"),
        ("6000ada+4090", "6000ada-4090"),
    ],
)
def test_simulated_memory_is_what_real_cards_report(expression: str, rig: str) -> None:
    lines = (RIGS / f"{rig}.txt").read_text().splitlines()
    facts = dict(line.split(" = ") for line in lines if " = " in line)
    for gpu in simulate(expression).gpus:
        total = int(facts[f"gpu{gpu.index}.mem.total"])
        assert gpu.total_bytes == total
        assert gpu.free_bytes == total - int(facts[f"gpu{gpu.index}.mem.reserved"])
        assert gpu.compute_capability == facts[f"gpu{gpu.index}.cc"]


@pytest.mark.parametrize(
    ("expression", "cards", "free_bytes"),
    [
        pytest.param("7900XTX", 1, None, id="a name that begins like a count"),
        pytest.param("2x7900XTX", 2, None, id="the same, counted"),
        pytest.param("2x4090+ram64", 2, 64 << 30, id="host memory"),
        pytest.param("none+ram 32 GiB", 0, 32 << 30, id="nothing but host memory"),
    ],
)
def test_names_counts_and_host_memory_are_told_apart(expression: str, cards: int, free_bytes: int | None) -> None:
    machine = simulate(expression)
    assert (len(machine.gpus), machine.host.ram_available_bytes) == (cards, free_bytes)


@pytest.mark.parametrize(
    ("expression", "meant"),
    [
        pytest.param("4090x2", "2x4090", id="the count behind"),
        pytest.param("2 4090", "2x4090", id="a blank"),
        pytest.param("4090,3060", "4090+3060", id="a comma"),
        pytest.param("RTX 4090 x 2", '"2xRTX 4090"', id="a name with a blank"),
    ],
)
def test_another_way_to_write_a_machine_is_proposed_in_ours(expression: str, meant: str) -> None:
    with pytest.raises(UsageError) as error:
        simulate(expression)
    assert error.value.hint == f"did you mean --machine {meant}?"


def test_only_boards_with_a_switch_are_known_to_be_joined() -> None:
    assert simulate("2xH100").links == (Link(a=0, b=1, kind="NVLink", p2p=True),)
    assert simulate("2x3090").links == ()
    assert simulate("2xV100-32").links == ()


def test_a_driver_is_there_but_unknown_with_nvidia_cards() -> None:
    assert simulate("4090").driver == Driver()
    assert simulate("7900xtx").driver is None


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("", "name is missing"),
        ("+", "name is missing"),
        ("4090+", "name is missing"),
        ("2x", "name is missing"),
        ('2x""', "name is missing"),
        ("0x4090", "at least 1"),
        ("-1x4090", "at least 1"),
        ("65x4090", "at most 64"),
        ("40x4090+40x3090", "at most 64"),
        ("9" * 5000 + "x4090", "at most 64"),
        ("2x4090+ram", "no size of host memory"),
        ("2x4090+ram64TB", "no size of host memory"),
        ("2xA100", "ambiguous"),
        ("2x4099", "nearest names"),
        ("6600xt", "not in the catalogue"),
        ("x", "not in the catalogue"),
        ("2x2x4090", "not in the catalogue"),
        ("４x4090" * 30, "not in the catalogue"),
    ],
)
def test_what_is_no_machine_is_a_usage_error(expression: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        simulate(expression)
    assert words in caught.value.message
    assert caught.value.hint
    assert len(caught.value.message) < 500


MACHINE = Machine(
    captured_at="2025-01-02T03:04:05Z",
    source="probed",
    host=Host(kernel="6.8", ram_bytes=64),
    gpus=(
        Gpu(index=0, vendor="nvidia", name="Card A", total_bytes=100, free_bytes=90),
        Gpu(index=1, vendor="nvidia", name="Card B", problem="fell off the bus"),
        Gpu(index=2, vendor="nvidia", name="Card C", bandwidth_gb_s=1.5),
    ),
    links=(Link(a=0, b=2, kind="PHB"),),
)
BARE = json.dumps(to_json(MACHINE))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(BARE, id="a machine"),
        pytest.param("\ufeff" + BARE, id="with a byte order mark"),
        pytest.param('{"schema": "mgpu.gpus/1", "data": ' + BARE + "}", id="what mgpu gpus prints"),
        pytest.param('{"schema": "mgpu.plan/1", "data": {"machine": ' + BARE + "}}", id="what mgpu plan prints"),
        pytest.param(BARE[:-1] + ', "from_the_future": 1}', id="with keys not known yet"),
    ],
)
def test_a_snapshot_file_is_read_whole(tmp_path: Path, content: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(content)
    machine = simulate(str(path))
    assert machine.source == "simulated"
    assert (machine.captured_at, machine.host, machine.links) == (MACHINE.captured_at, MACHINE.host, MACHINE.links)
    assert [gpu.name for gpu in machine.gpus] == ["Card A", "Card B", "Card C"]
    assert [gpu.engine_devices for gpu in machine.gpus] == [("CUDA0",), (), ("CUDA1",)]


def test_recorded_engine_names_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(BARE.replace('"engine_devices": []', '"engine_devices": ["Vulkan5"]', 1))
    assert [gpu.engine_devices for gpu in simulate(str(path)).gpus] == [("Vulkan5",), (), ()]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", "not JSON", id="empty"),
        pytest.param(b"{", "line 1", id="cut off"),
        pytest.param(b"\xff\xfe\x00", "UTF-8", id="binary"),
        pytest.param(b"[]", "expected an object", id="a list"),
        pytest.param(b"{}", "snapshot.captured_at: missing", id="no machine"),
        pytest.param(b'{"schema": "mgpu.error/1", "data": null}', "expected an object", id="an envelope of an error"),
        pytest.param(b"[" * 100_000, "nested", id="nested without end"),
        pytest.param(b"1" * 5000, "digits", id="a number without end"),
        pytest.param(BARE.replace('"Card A"', "7").encode(), "gpus[0].name: expected str", id="wrong type"),
        pytest.param(BARE.replace('"Card A"', r'"\u001b[2J"').encode(), "cannot be printed", id="escape sequence"),
        pytest.param(BARE.replace('"Card A"', r'"\ud800"').encode(), "cannot be printed", id="half a character"),
        pytest.param(BARE.replace("1.5", "NaN").encode(), "NaN", id="not a number"),
        pytest.param(BARE.replace("1.5", "1e999").encode(), "out of range", id="infinite"),
        pytest.param(BARE.replace("1.5", "1" + "0" * 400).encode(), "bandwidth_gb_s: too large", id="past floats"),
        pytest.param(BARE.replace("1.5", "-1").encode(), "bandwidth_gb_s: out of range", id="negative"),
        pytest.param(BARE.replace('"free_bytes": 90', '"free_bytes": 101').encode(), "more than", id="free > total"),
        pytest.param(BARE.replace('"index": 1', '"index": 0').encode(), "gpus[1].index", id="index twice"),
        pytest.param(BARE.replace('"b": 2', '"b": 9').encode(), "links[0]", id="link to nowhere"),
        pytest.param(BARE.replace('"schema_version": 1', '"schema_version": 2').encode(), "version 2", id="newer"),
        pytest.param(
            json.dumps(to_json(Machine(captured_at="", source="", gpus=(MACHINE.gpus[0],) * 65))).encode(),
            "65 cards",
            id="too many cards",
        ),
        pytest.param(b" " * (8 * 1024**2 + 1), "larger than 8 MiB", id="huge"),
    ],
)
def test_a_bad_snapshot_is_refused_by_name_and_place(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "machine.json"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        simulate(str(path))
    assert str(path) in caught.value.message
    assert words in caught.value.message
    assert caught.value.code == "snapshot-invalid"


@pytest.mark.parametrize("path", ["/no/such/file", "missing.json", "/", "/dev/zero", "~nobody-at-all/x", "\0/x"])
def test_a_file_that_cannot_be_read_is_a_usage_error(path: str) -> None:
    with pytest.raises(UsageError, match="the snapshot"):
        simulate(path)
