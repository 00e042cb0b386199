"""The checks of NVIDIA cards all together: over healthy machines, and over machines of which things are unknown."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgpu.doctor.check import Check, Finding, Purpose, Severity
from mgpu.machine.inspection import CardHealth, Inspection, PciDevice, PeerAccess
from mgpu.machine.snapshot import Gpu
from tests.doctor.inspections import H100, asked, bare, changed, healthy, verdict

MODULES = ("driver", "driver_fit", "cards", "virtual", "pcie", "peers", "nvlink", "topology")
CHECKS: tuple[Check, ...] = tuple(
    check for name in MODULES for check in importlib.import_module(f"mgpu.doctor.checks.{name}").CHECKS
)

HEALTHY = (
    pytest.param(bare(), id="no card"),
    pytest.param(healthy(1), id="one"),
    pytest.param(healthy(2), id="two"),
    pytest.param(healthy(4, lanes=8), id="four in x8 slots"),
    pytest.param(healthy(8), id="eight"),
    pytest.param(healthy(1, "NVIDIA GeForce RTX 3090"), id="unbridged 3090"),
    pytest.param(healthy(2, "NVIDIA GeForce RTX 3090"), id="unbridged pair of 3090"),
    pytest.param(healthy(2, "NVIDIA GeForce RTX 5090", lanes=8), id="5090 in x8 slots"),
    pytest.param(healthy(2, "NVIDIA RTX A6000"), id="A6000"),
    pytest.param(healthy(3, "Tesla P40"), id="P40"),
    pytest.param(healthy(8, H100), id="H100 with NVSwitch"),
    pytest.param(changed(healthy(2), root=False), id="not root"),
)


@pytest.mark.parametrize("inspection", HEALTHY)
@pytest.mark.parametrize("backend", [None, "vllm", "llama.cpp"])
def test_a_healthy_idle_machine_gives_neither_warning_nor_failure(inspection: Inspection, backend: str | None) -> None:
    purpose = Purpose(backend=backend, tensor_parallel=2 if backend == "vllm" else None)
    said = {check.id: asked(check, inspection, purpose) for check in CHECKS}
    for items in said.values():
        assert all(isinstance(item, Finding) and item.severity is Severity.info for item in items), items


def test_a_machine_without_a_card_says_one_thing() -> None:
    said = [(check.id, item) for check in CHECKS for item in asked(check, bare(), Purpose())]
    assert [name for name, _ in said] == ["no-gpu"]


def test_every_check_explains_itself() -> None:
    assert len({check.id for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        assert len(check.title) <= 110, check.id
        assert len(check.explanation.splitlines()) > 3, check.id


@pytest.mark.parametrize("name", [each.name for each in dataclasses.fields(Inspection)[2:]])
def test_nothing_is_raised_and_nothing_found_over_a_machine_of_which_only_the_cards_are_known(name: str) -> None:
    empty = Inspection(machine=healthy(4, H100).machine)
    partly = dataclasses.replace(empty, **{name: getattr(healthy(4, H100), name)})
    for check in CHECKS:
        assert verdict(check, partly, tensor_parallel=4) in ("", "info", "skip"), check.id


def forgetful(kind: type, base: object, **own: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """`base` with any of its fields that may be None unknown."""
    fields = [each.name for each in dataclasses.fields(kind) if "None" in str(each.type)]
    forgotten = st.sets(st.sampled_from(fields))
    return st.builds(
        lambda names, values: dataclasses.replace(base, **{**dict.fromkeys(names), **values}),  # type: ignore[type-var]
        forgotten,
        st.fixed_dictionaries(own),
    )


@st.composite
def inspections(draw: st.DrawFn) -> Inspection:
    """A machine with anything unknown, numbers of any size, lists that belong to other cards."""
    base = draw(st.sampled_from([healthy(2), healthy(3, "NVIDIA GeForce RTX 3090"), healthy(4, H100), bare()]))
    number = st.one_of(st.none(), st.integers(-2, 2**40))
    card = {"nvml_error": st.sampled_from([0, None, 15, 999]), "compute_mode": number, "recovery_action": number}
    device = {"iommu_type": st.sampled_from([None, "DMA", "identity", ""]), "acs": number, "acs_known": st.booleans()}
    peer = {"read": number, "ancestor": number}
    machine = dataclasses.replace(
        draw(forgetful(type(base.machine), base.machine, source=st.just("probed"))),
        gpus=tuple(draw(forgetful(Gpu, gpu)) for gpu in base.machine.gpus),
    )
    return dataclasses.replace(
        base,
        machine=machine,
        driver=draw(forgetful(type(base.driver), base.driver, nvml_error=number)),
        cards=tuple(draw(forgetful(CardHealth, each, **card)) for each in base.cards),
        peers=tuple(draw(forgetful(PeerAccess, each, **peer)) for each in base.peers),
        pci=tuple(draw(forgetful(PciDevice, each, **device)) for each in base.pci),
        pci_known=draw(st.booleans()),
        host=draw(forgetful(type(base.host), base.host, log_known=st.booleans(), boot_age_s=st.floats(-1, 1e12))),
        root=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(inspections(), st.sampled_from([None, "vllm", "ollama"]), st.sampled_from([None, 1, 2, 64]))
def test_no_check_raises_whatever_is_unknown(inspection: Inspection, backend: str | None, cut: int | None) -> None:
    for check in CHECKS:
        verdict(check, inspection, backend=backend, tensor_parallel=cut)
