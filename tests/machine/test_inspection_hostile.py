"""What no machine holds: readers and JSON never fail but as they promise."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgpu.machine import inspection_reader
from mgpu.machine.inspection import Inspection, InstalledEngine, inspection_from_json
from mgpu.machine.inspection_reader import inspect_machine
from mgpu.machine.snapshot import Gpu, GpuProcess, to_json
from tests.fakes.sysfs_tree import SysfsTree, tree_of_rig
from tests.machine.conftest import REPOSITORY
from tests.ordinary_user import as_ordinary_user

RIG = REPOSITORY / "tests/machines/rigs/2x4090-x670e.txt"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A machine with all that is read: cards with an IOMMU, Docker, AMD's driver, an NVSwitch, configuration files."""
    tree = tree_of_rig(tmp_path_factory.mktemp("template") / "root", RIG, group_type="DMA-FQ")
    node = "sys/class/kfd/kfd/topology/nodes/1"
    tree.files(
        {
            "etc/docker/daemon.json": '{"runtimes": {"nvidia": {}}, "exec-opts": ["native.cgroupdriver=systemd"]}',
            "etc/cdi/nvidia.yaml": "kind: nvidia.com/gpu\n# libcuda.so.580.126.20\n",
            "etc/nccl.conf": "NCCL_P2P_DISABLE=1\n",
            "usr/bin/dockerd": "",
            "etc/systemd/system/docker.service.d/gpu.conf": "[Service]\nExecStart=dockerd --add-runtime=nvidia=x\n",
            f"sys/fs/cgroup/system.slice/docker-{'5c3f' * 16}.scope/cgroup.procs": "",
            f"var/log/journal/{'5c3f' * 8}/system.journal": b"LPKSHHRH" + bytes(256),
            "var/log/kern.log": "Nov  1 adas-box kernel: [    1.000000] NVRM: Xid (PCI:0000:01:00): 79, x\n",
            "sys/fs/cgroup/memory.max": "1000000000\n",
            "sys/fs/cgroup/cpu.max": "400000 100000\n",
            "sys/class/drm/renderD128/device/vendor": "0x1002\n",
            "dev/dri/renderD128": "",
            "dev/kfd": "",
            f"{node}/properties": "gfx_target_version 110000\nlocation_id 256\ndomain 0\n",
            f"{node}/io_links/0/properties": "flags 1\n",
            "proc/driver/nvidia-nvswitch/devices/0000:08:00.0/information": "",
            "root/.cache/vllm/gpu_p2p_access_cache_for_0,1.json": "{}",
            "lib/modules/6.8.0-90-generic/updates/dkms/nvidia.ko": "\x7fELF\x02",
        }
    )
    return tree.root


def spoilt(path: Path, how: str, content: bytes) -> None:
    """Put something else where a file (or a folder) is."""
    old = path.read_bytes() if path.is_file() else b""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    match how:
        case "gone":
            pass
        case "truncated":
            path.write_bytes(old[: len(old) // 2])
        case "binary":
            path.write_bytes(content)
        case "appended":
            path.write_bytes(old + content)
        case "huge":
            path.write_bytes(b"9" * 3_000_000)
        case "many lines":
            path.write_bytes((old[:200] or b"0: x\n") * 20_000)  # a link may lead to what is huge by now
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path.name)


HOW = ["gone", "truncated", "binary", "appended", "huge", "many lines", "folder", "pipe", "device", "loop"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_files_hold_the_inspection_is_made_and_is_json(template: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        shutil.copytree(template, root, symlinks=True)
        places = sorted(path for path in root.rglob("*") if not path.is_relative_to(root / "root"))
        chosen = data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=12, unique=True))
        for path in sorted(chosen, reverse=True):  # what is in a folder before the folder
            spoilt(path, data.draw(st.sampled_from(HOW)), data.draw(st.binary(max_size=200)))
        started = time.monotonic()
        found = inspect_machine(root)
        assert time.monotonic() - started < 10
    assert [each for each in found.unread if "reader itself" in each.why] == []
    text = json.dumps(to_json(found), allow_nan=False)
    assert inspection_from_json(json.loads(text)) == found
    assert all(value.isprintable() for value in texts(json.loads(text)))


def texts(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for entry in value.values() for text in texts(entry)]
    if isinstance(value, list):
        return [text for entry in value for text in texts(entry)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("how", HOW)
def test_every_file_spoilt_alike_is_survived(template: Path, tmp_path: Path, how: str) -> None:
    root = tmp_path / "root"
    shutil.copytree(template, root, symlinks=True)
    for path in [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]:
        if how != "huge" or path.suffix not in {".yaml", ".json"}:
            spoilt(path, how, bytes(range(256)))
    found = inspect_machine(root)
    assert [each for each in found.unread if "reader itself" in each.why] == []
    assert inspection_from_json(json.loads(json.dumps(to_json(found), allow_nan=False))) == found


def test_an_ordinary_user_is_told_what_root_could_read() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        Path(folder).chmod(0o755)
        tree = SysfsTree(Path(folder) / "root").host().device("0000:01:00.0", pci_class=0x030000, driver=None)
        tree.files({"usr/bin/dockerd": "", "etc/docker/daemon.json": "{}"})
        for name in ("dev/kmsg", "sys/bus/pci/devices/0000:01:00.0/config", "etc/docker/daemon.json"):
            (tree.root / name).chmod(0)
        with as_ordinary_user():
            found = inspect_machine(tree.root)
    assert (found.root, found.host.log_known, found.pci[0].acs_known) == (False, False, False)
    closed = {each.what for each in found.unread if each.needs_root}
    assert closed == {"/dev/kmsg", "/sys/bus/pci/devices/0000:01:00.0/config", "/etc/docker/daemon.json"}
    assert (found.container.docker, found.container.docker_nvidia_runtime) == (True, None)


@pytest.mark.parametrize(
    ("reader", "what"),
    [
        pytest.param("read_host", "the computer", id="the computer"),
        pytest.param("read_amd", "AMD's cards", id="AMD's cards, whose files ask their driver"),
        pytest.param("read_host_facts", "the host", id="the host"),
        pytest.param("read_pci", "the PCI bus", id="the bus, whose files wake a card"),
        pytest.param("read_container", "the container", id="the container, with the driver's folder"),
        pytest.param("read_amd_facts", "AMD's driver", id="AMD's driver"),
        pytest.param("engines", "the installed engines", id="engines on a network's disk"),
    ],
)
def test_a_reader_that_hangs_costs_its_own_facts(
    template: Path, monkeypatch: pytest.MonkeyPatch, reader: str, what: str
) -> None:
    answer = threading.Event()

    def hung(*_: object) -> tuple[InstalledEngine, ...]:
        answer.wait(60)
        raise OSError

    monkeypatch.setattr(inspection_reader, "_PATIENCE_S", 1.5)
    if reader != "engines":
        monkeypatch.setattr(inspection_reader, reader, hung)
    started = time.monotonic()
    try:
        found = inspect_machine(template, engines=hung if reader == "engines" else lambda: ())
    finally:
        answer.set()
    assert time.monotonic() - started < 15
    assert [each.why for each in found.unread if each.what == what] == ["no answer in 1.5 s"]
    assert (found.pci_known, found.host.boot_age_s is not None) == (reader != "read_pci", reader != "read_host_facts")
    assert (found.machine.host.kernel is not None) == (reader != "read_host")
    assert found.driver.nvml_error != -1
    assert "does not answer" not in str(found.machine.driver)


def test_a_process_whose_command_line_hangs_costs_no_answer(template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()

    def hung(*_: object) -> bool:
        answer.wait(60)
        return True

    used_by = (GpuProcess(pid=42, name="python3"),)
    monkeypatch.setattr(inspection_reader, "_PATIENCE_S", 1.5)
    monkeypatch.setattr(inspection_reader, "is_mgpus", hung)
    monkeypatch.setattr(
        inspection_reader, "read_amd", lambda _: (Gpu(index=0, vendor="amd", name="x", used_by=used_by),)
    )
    started = time.monotonic()
    try:
        found = inspect_machine(template)
    finally:
        answer.set()
    assert time.monotonic() - started < 15
    assert (found.mgpu_processes, found.machine.gpus[0].used_by) == ((), used_by)
    assert "mgpu's own processes" in {each.what for each in found.unread}


def test_a_driver_whose_files_hang_with_nvml_is_known_to_be_silent(
    template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()

    def hung(*_: object, **__: object) -> None:
        answer.wait(60)
        raise OSError

    for reader in ("_read_nvidia", "read_nvidia_driver"):
        monkeypatch.setattr(inspection_reader, reader, hung)
    monkeypatch.setattr(inspection_reader, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(inspection_reader, "patience_s", lambda _: 1.5)
    try:
        found = inspect_machine(template)
    finally:
        answer.set()
    assert (found.driver.nvml_error, found.machine.host.kernel is not None) == (-1, True)
    assert {"NVML", "the NVIDIA driver"} <= {each.what for each in found.unread}


@pytest.fixture(scope="module")
def whole(template: Path) -> Inspection:
    engine = InstalledEngine(backend="vllm", version="0.11.0", architectures=("8.9", "12.0"), architectures_known=True)
    return inspect_machine(template, engines=lambda: (engine,))


def test_an_inspection_goes_to_json_and_back(whole: Inspection) -> None:
    data: Any = json.loads(json.dumps(to_json(whole), allow_nan=False))
    assert inspection_from_json(data) == whole
    data["later"] = {"unknown": 1}
    data["host"]["later"] = None
    assert inspection_from_json(data) == whole


HEALTH = {"gpu": 0, "readings": []}
PEER = {"a": 0, "b": 1}


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        pytest.param([], None, "inspection: expected an object", id="nothing"),
        pytest.param(["schema_version"], 2, "schema version 2, newest known is 1", id="a later schema"),
        pytest.param(["machine"], [], "inspection.machine: expected an object", id="no machine"),
        pytest.param(["root"], "yes", "inspection.root: expected bool", id="a word for yes"),
        pytest.param(
            ["host", "swap_free_bytes"], 1.5, "inspection.host.swap_free_bytes: expected int", id="half a byte"
        ),
        pytest.param(["host", "boot_age_s"], float("nan"), "inspection.host.boot_age_s: nan is out", id="not a number"),
        pytest.param(["host", "environment"], [["A"]], r"host.environment\[0\]: expected 2 values", id="half a pair"),
        pytest.param(["host", "disks", 0, "path"], 7, r"host.disks\[0\].path: expected str", id="a number for a path"),
        pytest.param(["pci", 1, "acs"], "0x1d", r"inspection.pci\[1\].acs: expected int", id="text for a number"),
        pytest.param(["cards"], [HEALTH], r"inspection.cards\[0\].gpu: the machine has no card 0", id="no such card"),
        pytest.param(["peers"], [PEER], r"inspection.peers\[0\]: 0 and 1 are not two cards", id="no such pair"),
        pytest.param(["unread"], {}, "inspection.unread: expected a list", id="an object for a list"),
    ],
)
def test_json_that_is_no_inspection_is_refused_by_its_place(
    whole: Inspection, path: list[str | int], value: object, complaint: str
) -> None:
    data: Any = {"inspection": to_json(dataclasses.replace(whole, cards=(), peers=()))}
    place: Any = data
    for step in ["inspection", *path][:-1]:
        place = place[step]
    place[["inspection", *path][-1]] = value
    with pytest.raises(ValueError, match=complaint):
        inspection_from_json(data["inspection"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_json_in_any_place_is_an_inspection_or_a_value_error(whole: Inspection, data: st.DataObject) -> None:
    changed: Any = to_json(whole)
    place: Any = changed
    while True:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
            break
        place = inner
    place[key] = data.draw(JSON)
    complaint = "inspection"
    try:
        inspection_from_json(changed)
    except ValueError as error:
        complaint = str(error)
    assert complaint.startswith("inspection")
