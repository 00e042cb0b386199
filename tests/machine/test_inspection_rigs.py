"""Everything at once: the real nvidia-ml-py on the fake NVML library, joined with a fake root, for every rig."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mgpu.machine.inspection import Inspection, inspection_from_json
from tests.fakes.sysfs_tree import SysfsTree, tree_of_rig
from tests.machine.conftest import REPOSITORY

RIGS = REPOSITORY / "tests/machines/rigs"
REFUSING = {"driver-mismatch": 18, "no-driver": 9, "container-lost-cgroup": 999}
READER = """
import json, sys, time
from mgpu.machine.inspection_reader import inspect_machine
from mgpu.machine.snapshot import to_json

started = time.monotonic()
found = inspect_machine()
print(json.dumps({"took_s": time.monotonic() - started, "inspection": to_json(found)}, allow_nan=False))
"""

Inspect = Callable[..., Inspection]


@pytest.fixture
def inspect(run_python: Callable[..., str], tmp_path: Path) -> Inspect:
    """inspect(rig, *lines, tree=) inspects a rig, with lines added to it, on the root of its own or of the tree."""

    def read(name: str, *lines: str, tree: SysfsTree | None = None, at_most_s: float = 30.0) -> Inspection:
        rig = tmp_path / f"{name}.txt"
        rig.write_text("\n".join([(RIGS / f"{name}.txt").read_text(), *lines]))
        root = (tree or tree_of_rig(tmp_path / "root", rig)).root
        said = json.loads(run_python(READER, FAKE_NVML=str(rig), MGPU_ROOT=str(root)))
        assert said["took_s"] < at_most_s
        return inspection_from_json(said["inspection"])

    return read


@pytest.mark.parametrize("name", sorted(rig.stem for rig in RIGS.glob("*.txt") if rig.stem not in REFUSING))
def test_a_rig_is_read_with_all_its_cards_and_nothing_unread(inspect: Inspect, name: str) -> None:
    found = inspect(name)
    cards = [gpu for gpu in found.machine.gpus if gpu.vendor == "nvidia"]
    usable = [gpu for gpu in cards if gpu.problem is None]
    assert found.unread == ()
    assert found.driver.nvml_error == 0
    assert {found.driver.loaded_version, found.driver.on_disk_version} == {found.driver.library_version}
    assert [(card.gpu, card.bus_id) for card in found.cards] == [(gpu.index, gpu.bus_id) for gpu in cards]
    assert [card.nvml_error for card in found.cards] == [0 if gpu in usable else 15 for gpu in cards]
    assert len(found.peers) == len(usable) * (len(usable) - 1) // 2
    assert {device.address for device in found.pci if device.driver == "nvidia"} == {gpu.bus_id for gpu in cards}
    for gpu in usable:
        card = found.cards[gpu.index]
        assert card.used_by_known
        (reading, *_) = card.readings
        assert (reading.power_w, reading.temperature_c) == (gpu.power_w, gpu.temperature_c)
        assert card.power_min_w is not None
        assert card.power_default_w is not None
        assert card.power_min_w <= card.power_default_w
        assert card.power_requested_w == gpu.power_limit_w
        assert (card.pcie_gen_device or 0) >= (gpu.pcie.gen_max or 0)


@pytest.mark.parametrize("name", REFUSING)
def test_a_driver_that_refuses_gives_its_number_and_the_files_are_read(
    inspect: Inspect, tmp_path: Path, name: str
) -> None:
    tree = SysfsTree(tmp_path / "root").host().nvidia_driver("580.126.20", cards=("0000:01:00.0",))
    tree.device("0000:01:00.0", pci_class=0x030000, driver="nvidia")
    found = inspect(name, tree=tree)
    assert (found.driver.nvml_error, found.cards, found.peers) == (REFUSING[name], (), ())
    assert (found.driver.loaded_version, found.driver.library_version) == ("580.126.20", "580.126.20")
    assert [device.driver for device in found.pci] == ["nvidia"]


# A line of the rig, and the field of the card that it feeds.
HEALTH = [
    ("gpu.persistence = 1", "persistence", True),
    ("gpu.computemode = 3", "compute_mode", 3),
    ("gpu.power.min = 125000", "power_min_w", 125.0),
    ("gpu.temp.slowdown = 92", "temperature_slowdown_c", 92),
    ("gpu.temp.margin = 41", "temperature_margin_c", 41),
    ("gpu.clock.sm = 2520", "sm_clock_max_mhz", 2520),
    ("gpu.ecc = 1", "ecc_enabled", True),
    ("gpu.ecc.volatile = 3", "ecc_uncorrected_volatile", 3),
    ("gpu.ecc.aggregate = 5", "ecc_uncorrected_aggregate", 5),
    ("gpu.remap.corr = 0\ngpu.remap.pending = 1", "remap_pending", True),
    ("gpu.remap.corr = 0\ngpu.remap.failure = 1", "remap_failed", True),
    ("gpu.retired.pending = 1", "retired_pages_pending", True),
    ("gpu.fi.230 = 2", "recovery_action", 2),
    ("gpu.mig = 0\ngpu.mig.pending = 1", "mig_pending", True),
    ("gpu.fabric.state = 3", "fabric_state", 3),
    ("gpu.fabric.state = 2\ngpu.fabric.status = 999", "fabric_status", 999),
    ("gpu.virt = 1", "virtualisation_mode", 1),
]


def test_each_fact_of_a_cards_health_is_asked_of_nvml(inspect: Inspect) -> None:
    absent = [f"gpu{index}.{line.split('.', 1)[1].split(' =')[0]} = !3" for index in (1,) for line, _, _ in HEALTH]
    lines = [line.replace("gpu.", "gpu0.") for line, _, _ in HEALTH]
    first, second = inspect("2x4090-x670e", *lines, *absent).cards
    last = {field: value for _, field, value in HEALTH}
    last |= {"mig_pending": True, "fabric_state": 2}  # what later lines of the same key say
    assert {field: getattr(first, field) for field in last} == last
    assert {field: getattr(second, field) for field in last} == dict.fromkeys(last) | {"power_min_w": None}


def test_degrees_below_the_limit_are_no_temperature(inspect: Inspect) -> None:
    assert inspect("2x4090-x670e", "gpu0.temp.slowdown = 4294967294").cards[0].temperature_slowdown_c is None


def test_the_limits_own_place_is_no_margin_to_it(inspect: Inspect) -> None:
    """Field 194 is -2 on every card that has it, cold or hot: where on the scale of margins the hardware slows down."""
    assert "gpu0.fi.194 = -2" in (RIGS / "2x5090-x8.txt").read_text()
    assert [card.temperature_margin_c for card in inspect("2x5090-x8").cards] == [None, None]


TWO_PORTS = ("gpu.nvlink.count = 2", "gpu.nvlink.state = 1")
OLD_COUNTERS = "gpu.nvlink.errors = 3"


@pytest.mark.parametrize(
    ("lines", "errors"),
    [
        pytest.param([OLD_COUNTERS], 2 * 4 * 3, id="four counters of each port, up to Ampere"),
        pytest.param([OLD_COUNTERS, "gpu.fi.161 = 0", "gpu.fi.163.1 = 7"], 7, id="Hopper's fields of each port"),
        pytest.param(["gpu.fi.161.0 = 1", "gpu.fi.162.1 = 2", "gpu.fi.163.7 = 64"], 3, id="no port that is not there"),
        pytest.param(["gpu.fi.208 = 0", "gpu.fi.211.0 = 2", "gpu.fi.215.1 = 4"], 6, id="Blackwell's fields"),
        pytest.param(["gpu.fi.161 = 1", "gpu.fi.208 = 1", "gpu.fi.215 = 1"], 2, id="what both count, once"),
        pytest.param(["gpu.fi.161 = !999", "gpu.nvlink.errors = !3"], None, id="counted by nobody"),
    ],
)
def test_nvlink_errors_are_counted_as_the_generation_does(
    inspect: Inspect, lines: list[str], errors: int | None
) -> None:
    card = inspect("2x4090-x670e", *TWO_PORTS, *lines).cards[0]
    assert [reading.nvlink_errors for reading in card.readings] == [errors]


@pytest.mark.parametrize(
    ("name", "lines", "looks"),
    [
        pytest.param("2x4090-x670e", [], 1, id="at rest"),
        pytest.param("2x5090-x8", [], 1, id="at rest with the bit of a power cap"),
        pytest.param("2x4090-x670e", ["gpu1.events = 0x40"], 3, id="held down by heat"),
        pytest.param("2x4090-x670e", ["gpu0.util = 3"], 3, id="at work"),
        pytest.param("8xh100-sxm", [], 3, id="idle in a high state, as server cards are"),
    ],
)
def test_cards_are_looked_at_again_where_one_look_proves_nothing(
    inspect: Inspect, name: str, lines: list[str], looks: int
) -> None:
    cards = inspect(name, *lines, at_most_s=2.0).cards
    assert {len(card.readings) for card in cards} == {looks}


def test_busy_cards_are_looked_at_three_times(inspect: Inspect) -> None:
    lines = [
        "gpu0.util = 0; 0; 0; 0",
        "gpu1.util = 97; 98; 99; 99",
        "gpu1.pcie.replay = 10; 12; 17",
        "gpu1.events = 0x4; 0x0; 0x80",
        "gpu1.clock.now.sm = 2505",
        "gpu1.nvlink.count = 2\ngpu1.nvlink.state = 1\ngpu1.nvlink.errors = 3",
    ]
    readings = inspect("2x4090-x670e", *lines, at_most_s=2.0).cards[1].readings
    assert [reading.pcie_replays for reading in readings] == [10, 12, 17]
    assert [reading.events for reading in readings] == [4, 0, 0x80]
    assert {(reading.sm_clock_mhz, reading.nvlink_errors) for reading in readings} == {(2505, 2 * 4 * 3)}
    times = [reading.at_s for reading in readings]
    assert times[0] < 0.3 < 0.59 < times[2] - times[0]


def test_the_engines_of_an_mgpu_are_known_among_the_processes(inspect: Inspect, tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "proc/4711/status": "PPid:\t4710\n",
        "proc/4710/cmdline": "/usr/bin/python3\0/usr/bin/mgpu\0run\0",
        "proc/4712/status": "PPid:\t1\n",
    }
    tree = tree_of_rig(tmp_path / "root", RIGS / "2x4090-x670e.txt").files(files)
    found = inspect("2x4090-x670e", "gpu0.compute = 4711:1024 4712:1024", tree=tree)
    assert [process.pid for process in found.machine.gpus[0].used_by] == [4711, 4712]
    assert found.mgpu_processes == (4711,)


def test_peer_access_is_asked_for_reads_and_writes(inspect: Inspect) -> None:
    (peer,) = inspect("2x4090-x670e", "p2p.read.0.1 = 0", "p2p.write.0.1 = 4", "topo.0.1 = 50").peers
    assert (peer.a, peer.b, peer.read, peer.write, peer.ancestor) == (0, 1, 0, 4, 50)


@pytest.mark.parametrize(
    ("error", "unread"),
    [
        pytest.param(3, [], id="not supported, as on many cards"),
        pytest.param(4, [("nvmlDeviceGetComputeMode", True)], id="no permission"),
        pytest.param(999, [("nvmlDeviceGetComputeMode", False)], id="unknown"),
    ],
)
def test_a_question_that_is_refused_is_unread_unless_the_card_has_no_answer(
    inspect: Inspect, error: int, unread: list[tuple[str, bool]]
) -> None:
    found = inspect("2x4090-x670e", f"gpu1.computemode = !{error}")
    assert [card.compute_mode for card in found.cards] == [0, None]
    assert [(each.what, each.needs_root) for each in found.unread] == unread


def test_a_card_lost_while_it_is_asked_says_so(inspect: Inspect) -> None:
    found = inspect("2x4090-x670e", "gpu1.temp = !15")
    assert [card.nvml_error for card in found.cards] == [0, 15]
    assert found.peers == ()


def test_an_old_driver_lacks_what_is_new_and_no_more(
    nvml: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inspect: Inspect
) -> None:
    monkeypatch.setitem(nvml, "new", nvml["old"])
    card = inspect("3xp40", "gpu.events = 0x4").cards[0]
    assert (card.readings[0].events, card.reserved_bytes, card.power_default_w) == (4, None, 250.0)


def test_nothing_that_names_a_person_or_the_computer_is_kept(
    inspect: Inspect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home/lovelace"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "lovelace")
    monkeypatch.setenv("OLLAMA_MODELS", "/data/lovelace/models")
    monkeypatch.setenv("LD_PRELOAD", f"{home}/libnccl.so.2")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    tree = tree_of_rig(tmp_path / "root", RIGS / "2x4090-x670e.txt")
    host = os.uname().nodename.partition(".")[0]
    log = f"3,1,1,-;NVRM: Xid (PCI:0000:01:00): 79, GPU serial number is 1324321012345. on {host}\n"
    text = repr(inspect("2x4090-x670e", tree=tree.files({"dev/kmsg": log, "etc/group": "lovelace:x:0:\n"})))
    for secret in ("lovelace", "hf_secret", "1324321012345"):
        assert secret not in text
    assert "path='~/.cache/huggingface/hub'" in text
    assert "'/data/user/models'" in text
    assert "('LD_PRELOAD', '~/libnccl.so.2')" in text
    assert len(host) < 4 or f"on {host}" not in text


AUDITOR = """
import json, sys
from mgpu.machine.inspection_reader import inspect_machine

seen = []
sys.addaudithook(lambda event, arguments: seen.append((event, [str(argument) for argument in arguments])))
inspect_machine()
print(json.dumps(seen))
"""


def test_reading_opens_few_files_writes_none_and_starts_nothing(run_python: Callable[..., str], tmp_path: Path) -> None:
    rig = RIGS / "8xh100-sxm.txt"
    root = tree_of_rig(tmp_path / "root", rig).root
    seen = json.loads(run_python(AUDITOR, FAKE_NVML=str(rig), MGPU_ROOT=str(root), PYTHONDONTWRITEBYTECODE="1"))
    opened = [arguments for event, arguments in seen if event == "open"]
    assert 200 < len([path for path, *_ in opened if path.startswith(str(root))]) < 700
    assert [path for path, _, flags in opened if int(flags) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)] == []
    changing = ("os.remove", "os.rename", "os.mkdir", "os.chmod", "os.utime", "subprocess", "os.exec", "os.posix_spawn")
    assert [event for event, _ in seen if event.startswith(changing)] == []
    libraries = {name for event, (name, *_) in seen if event == "ctypes.dlopen"}
    assert libraries <= {"libnvidia-ml.so.1", "None"}  # libcuda alone makes contexts
