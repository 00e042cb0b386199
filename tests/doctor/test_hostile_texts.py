"""A saved inspection may be a stranger's: no text of it gets into a command but as one word of a shell."""

from __future__ import annotations

import dataclasses
import json
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mgpu.doctor.catalogue import CHECKS
from mgpu.doctor.check import Purpose
from mgpu.doctor.diagnosis import diagnose
from mgpu.doctor.fixes import remedies
from mgpu.doctor.saved import replay, saved_text
from mgpu.errors import Missing
from mgpu.machine.inspection import (
    DiskSpace,
    Inspection,
    InstalledEngine,
    LogEntry,
    UnitVariable,
)
from mgpu.machine.snapshot import Gpu, GpuProcess

from .inspections import GIB, H100, changed, changed_card, changed_gpu, changed_machine, changed_pci, healthy
from .rigged import SAVED

PLANT = ";touch x #"
DISKS = tuple(
    DiskSpace(role=role, path="/m/x", free_bytes=GIB, total_bytes=2 * GIB, file_system="nfs4")
    for role in ("Hugging Face cache", "Ollama models", "Docker images")
)
SETTINGS = (("NCCL_P2P_DISABLE", "1"), ("NCCL_DEBUG", "TRACE"), ("CUDA_LAUNCH_BLOCKING", "1"), ("LD_PRELOAD", "x.so"))
FAULTS: dict[str, Any] = {
    "host": {
        "disks": DISKS,
        "environment": (*SETTINGS, ("HSA_OVERRIDE_GFX_VERSION", "10.3.0"), ("CUDA_VISIBLE_DEVICES", "0,7")),
        "nccl_configuration": SETTINGS,
        "unit_variables": tuple(
            UnitVariable(unit="ollama.service", path="/etc/a.conf", name=name, value=value, user=user)
            for (name, value), user in zip(SETTINGS, (True, False) * 2, strict=True)
        ),
        "log": (LogEntry(kind="xid", number=79, text="Xid 79", age_s=9.0, bus_id="0000:10:00.0"),),
    },
    "container": {"docker": True, "cdi_files": ("/etc/cdi/nvidia.yaml",), "cdi_older_than_driver": True},
    "engines": tuple(
        InstalledEngine(
            backend=backend,
            version="0.1",
            path="/opt/e",
            architectures=("sm_50", "gfx90a"),
            architectures_known=True,
            nccl=True,
            nccl_version="2.10.3",
        )
        for backend in ("vllm", "llama.cpp", "ollama")
    ),
    "root": False,
}


def radeons(inspection: Inspection) -> Inspection:
    cards = (
        Gpu(index=index, vendor="amd", name="Radeon", uuid=f"GPU-{index}", gfx=gfx, bus_id=f"0000:9{index}:00.0")
        for index, gfx in ((6, "gfx1100"), (7, "gfx1030"))
    )
    inside = Gpu(index=8, vendor="amd", name="Raphael", integrated=True)
    return changed_machine(inspection, gpus=(*inspection.machine.gpus, *cards, inside))


def inspections() -> Iterator[Inspection]:
    """Machines with as many faults as there may be at once."""
    faulty = changed(healthy(4, **FAULTS), host={"distribution": "debian"})
    faulty = changed_card(
        changed_pci(faulty, acs=0x1D, iommu_type="DMA", aer_fatal=1),
        0,
        persistence=False,
        compute_mode=3,
        power_requested_w=200.0,
        remap_pending=True,
        recovery_action=2,
    )
    used_by = (GpuProcess(pid=3, name="x"),)
    yield changed_gpu(changed_gpu(faulty, 0, display=True, pcie={"width": 1}), 1, free_bytes=0, used_by=used_by)
    yield radeons(faulty)
    switched = changed(healthy(8, H100, **FAULTS), host={"distribution": "debian"})
    switched = changed_pci(switched, acs=0x1D, iommu_type="DMA")
    yield changed(switched, driver={"fabric_manager": "failed", "fabric_manager_version": "575.1.1"})
    for driver in ({"nvml_error": 18, "library_version": "590.1"}, {"nvml_error": 9, "loaded_version": None}):
        yield changed(faulty, driver=driver)


def planted(value: Any, field: str | None) -> Any:
    """`value` with the plant behind every text, or behind those of the fields with one name."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    changes = {}
    for each in dataclasses.fields(value):
        inner = getattr(value, each.name)
        changes[each.name] = _planted_in(inner, field, here=field in (None, each.name))
    return dataclasses.replace(value, **changes)


def _planted_in(value: Any, field: str | None, *, here: bool) -> Any:
    if isinstance(value, str):
        return value + PLANT if here else value
    if isinstance(value, tuple):
        return tuple(_planted_in(item, field, here=here) for item in value)
    return planted(value, field)


def names(kind: Any) -> Iterator[str]:
    """The names of all fields of a dataclass that hold texts, at any depth."""
    for name, hint in typing.get_type_hints(kind).items():
        inner = [part for argument in typing.get_args(hint) for part in (argument, *typing.get_args(argument))]
        for each in (hint, *inner):
            if each is str:
                yield name
            elif dataclasses.is_dataclass(each):
                yield from names(each)


FIELDS = sorted(set(names(Inspection)))
PURPOSE = Purpose(backend="vllm", tensor_parallel=2, missing_bytes=99 * GIB, psu_w=300, expected_gpus=99)


def said(inspection: Inspection) -> Iterator[str]:
    diagnosis = diagnose(inspection, CHECKS, PURPOSE)
    for finding in diagnosis.findings:
        yield from finding.fix
    for remedy in remedies(inspection, diagnosis):
        yield remedy.shown(root=False)
        yield remedy.undo


def words(line: str) -> list[str]:
    """What a shell would take for words and operators."""
    parser = shlex.shlex(line, posix=True, punctuation_chars=True)
    parser.commenters = ""
    parser.whitespace_split = True
    try:
        return list(parser)
    except ValueError:  # an apostrophe of prose
        return line.replace(";", " ; ").split()


@pytest.mark.parametrize("field", [*FIELDS, None])
def test_no_text_of_a_stranger_is_more_than_one_word_of_a_command(field: str | None) -> None:
    for inspection in inspections():
        for line in said(planted(inspection, field)):
            assert "touch" not in words(line), line


@pytest.mark.parametrize("field", ["path", "unit", "cdi_files"])
def test_what_a_command_needs_is_one_word_of_it(field: str) -> None:
    lines = [line for inspection in inspections() for line in said(planted(inspection, field))]
    assert any(PLANT in word for line in lines for word in words(line))


def test_a_saved_machine_with_a_plant_is_no_danger() -> None:
    for path in sorted(SAVED.glob("*.json")):
        for line in said(planted(replay(path), None)):
            assert "touch" not in words(line), line


VALUES = {
    ("machine", "gpus", 0, "bus_id"): "machine.gpus[0].bus_id",
    ("machine", "gpus", 0, "uuid"): "machine.gpus[0].uuid",
    ("machine", "driver", "version"): "machine.driver.version",
    ("cards", 0, "bus_id"): "cards[0].bus_id",
    ("pci", 0, "address"): "pci[0].address",
    ("pci", 1, "parent"): "pci[1].parent",
    ("driver", "loaded_version"): "driver.loaded_version",
    ("driver", "fabric_manager_version"): "driver.fabric_manager_version",
    ("host", "environment", 0, 0): "host.environment[0][0]",
    ("host", "nccl_configuration", 1, 0): "host.nccl_configuration[1][0]",
    ("host", "unit_variables", 0, "unit"): "host.unit_variables[0].unit",
    ("host", "unit_variables", 0, "name"): "host.unit_variables[0].name",
    ("host", "log", 0, "bus_id"): "host.log[0].bus_id",
    ("engines", 0, "nccl_version"): "engines[0].nccl_version",
}


@pytest.mark.parametrize("place", VALUES, ids=VALUES.values())
def test_a_value_that_is_none_of_its_kind_is_refused_by_its_place(place: tuple[str | int, ...], tmp_path: Path) -> None:
    inspection = changed(next(inspections()), driver={"fabric_manager_version": "580.1.2"})
    data = json.loads(saved_text(inspection))
    file = tmp_path / "machine.json"
    file.write_text(json.dumps(data))
    replay(file)
    value = data["inspection"]
    for step in place[:-1]:
        value = value[step]
    assert isinstance(value[place[-1]], str)
    value[place[-1]] += PLANT
    file.write_text(json.dumps(data))
    with pytest.raises(Missing) as error:
        replay(file)
    assert f"inspection.{VALUES[place]}:" in error.value.message
    assert (error.value.code, error.value.exit_code) == ("replay-unusable", 3)
