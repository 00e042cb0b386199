"""Which cards belong together: the best sets, other sockets, lanes of the chipset."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from mgpu.doctor.check import Check, Finding, Purpose
from mgpu.doctor.checks.topology import best_groups, pcie_chipset, topo_cross_socket, worst_kind
from mgpu.machine.inspection import Inspection
from mgpu.machine.snapshot import Gpu, Link
from tests.doctor.inspections import (
    GIB,
    H100,
    bare,
    changed,
    changed_gpu,
    changed_machine,
    changed_pair,
    changed_pci,
    healthy,
    verdict,
)

TP2 = {"tensor_parallel": 2}
RTX_3090 = "NVIDIA GeForce RTX 3090"


def linked(cards: int, kinds: dict[tuple[int, int], str], rest: str = "SYS") -> Inspection:
    """Cards whose pairs are of these kinds, and all other pairs of another."""
    inspection = healthy(cards)
    for a, b in itertools.combinations(range(cards), 2):
        inspection = changed_pair(inspection, a, b, kind=kinds.get((a, b), rest))
    return inspection


def on_chipset(inspection: Inspection, index: int, **bridge: Any) -> Inspection:
    """The card's root port is a bridge of the chipset: AMD's, unless another is described."""
    return changed_pci(inspection, f"0000:00:01.{index}", **(bridge or {"vendor": 0x1022, "device": 0x43F4}))


# GPU0 on the far socket, {1, 2} and {3, 4} on two host bridges of the near one.
FIVE = linked(5, {(1, 2): "PHB", (3, 4): "PHB", (1, 3): "NODE", (1, 4): "NODE", (2, 3): "NODE", (2, 4): "NODE"})
TWO_BRIDGES = linked(4, {(0, 1): "NVLink", (2, 3): "NVLink"}, "NODE")


@pytest.mark.parametrize(
    ("inspection", "size", "expected"),
    [
        pytest.param(healthy(2), 2, ((0, 1),), id="two cards"),
        pytest.param(FIVE, 2, ((1, 2), (3, 4)), id="pairs of one host bridge"),
        pytest.param(FIVE, 4, ((1, 2, 3, 4),), id="four without the far socket"),
        pytest.param(linked(4, {(0, 2): "NVLink", (1, 3): "NVLink"}, "PHB"), 2, ((0, 2), (1, 3)), id="bridged pairs"),
        pytest.param(healthy(8, H100), 4, ((0, 1, 2, 3), (4, 5, 6, 7)), id="all of an NVSwitch"),
        pytest.param(on_chipset(healthy(3), 1), 2, ((0, 2),), id="without the card on the chipset"),
        pytest.param(changed_gpu(healthy(3), 0, name=RTX_3090), 2, ((1, 2),), id="cards of one model"),
        pytest.param(
            changed_gpu(linked(3, {(0, 1): "PIX"}), 0, name=RTX_3090), 2, ((1, 2),), id="even where a nearer is unequal"
        ),
        pytest.param(changed_gpu(healthy(4), 3, total_bytes=12 * GIB), 2, ((0, 1),), id="one of another size is left"),
        pytest.param(changed_gpu(healthy(2), 1, total_bytes=23 * GIB), 2, ((0, 1),), id="error correction takes 6 %"),
        pytest.param(changed_gpu(healthy(2), 0, name=RTX_3090), 2, (), id="no set of unequal cards"),
        pytest.param(changed_gpu(FIVE, 2, name=RTX_3090), 5, (), id="five that are not all equal"),
        pytest.param(changed_gpu(healthy(3), 0, problem="lost"), 3, (), id="a lost card does not count"),
        pytest.param(healthy(2), 3, (), id="more than there are"),
        pytest.param(healthy(2), 1, (), id="one card is no set"),
        pytest.param(bare(), 2, (), id="no cards"),
    ],
)
def test_the_sets_of_cards_that_reach_each_other_best(
    inspection: Inspection, size: int, expected: tuple[tuple[int, ...], ...]
) -> None:
    assert best_groups(inspection, size) == expected


def test_unequal_cards_are_put_together_for_who_asks_after_the_equal_ones() -> None:
    inspection = changed_gpu(changed_gpu(healthy(5), 0, name=RTX_3090), 3, name="NVIDIA GeForce RTX 5090")
    assert best_groups(inspection, 2, unequal=True) == ((1, 2), (0, 3))
    assert best_groups(inspection, 3, unequal=True) == ((1, 2, 4),)
    assert best_groups(changed_gpu(healthy(2), 0, name=RTX_3090), 2, unequal=True) == ((0, 1),)


def test_sixty_four_cards_are_grouped_quickly_and_each_is_used_once() -> None:
    cards = tuple(Gpu(index=index, vendor="nvidia", name="NVIDIA L4") for index in range(64))
    links = tuple(
        Link(a=a, b=b, kind="PIX" if a // 8 == b // 8 else "SYS") for a, b in itertools.combinations(range(64), 2)
    )
    found = best_groups(changed_machine(bare(), gpus=cards, links=links), 8)
    assert sorted(found) == [tuple(range(start, start + 8)) for start in range(0, 64, 8)]


def test_a_set_is_called_by_its_worst_path() -> None:
    assert worst_kind(FIVE, (1, 2)) == "PHB"
    assert worst_kind(FIVE, (1, 2, 3)) == "NODE"
    assert worst_kind(FIVE, (0, 1)) == "SYS"


@pytest.mark.parametrize(
    ("check", "inspection", "purpose", "expected"),
    [
        pytest.param(topo_cross_socket, linked(2, {}), {}, "warn", id="the only two are on two sockets"),
        pytest.param(topo_cross_socket, FIVE, TP2, "info", id="better sets exist"),
        pytest.param(topo_cross_socket, FIVE, {"tensor_parallel": 5}, "warn", id="five are wanted, and one is far"),
        pytest.param(topo_cross_socket, linked(2, {}, "NODE"), {}, "info", id="two host bridges"),
        pytest.param(topo_cross_socket, healthy(2), TP2, "", id="one host bridge"),
        pytest.param(topo_cross_socket, healthy(8, H100), {"tensor_parallel": 8}, "", id="NVSwitch over two sockets"),
        pytest.param(topo_cross_socket, TWO_BRIDGES, TP2, "info", id="bridged pairs on two host bridges"),
        pytest.param(
            topo_cross_socket,
            changed(linked(2, {}, "unknown"), peers=()),
            TP2,
            "skip",
            id="paths unread",
        ),
        pytest.param(pcie_chipset, on_chipset(healthy(2), 1), TP2, "warn", id="in the set that is wanted"),
        pytest.param(pcie_chipset, on_chipset(healthy(3), 1), TP2, "info", id="the others are enough"),
        pytest.param(pcie_chipset, on_chipset(healthy(2), 1), {}, "info", id="nothing is cut"),
        pytest.param(
            pcie_chipset, changed_gpu(on_chipset(healthy(2), 1), 0, name=RTX_3090), TP2, "warn", id="two unequal cards"
        ),
        pytest.param(pcie_chipset, on_chipset(healthy(2), 1, vendor=0x1B21), TP2, "warn", id="ASMedia"),
        pytest.param(pcie_chipset, on_chipset(healthy(2), 1, vendor=0x10B5), TP2, "", id="a PLX switch"),
        pytest.param(pcie_chipset, on_chipset(healthy(2), 1, vendor=0x8086), TP2, "", id="Intel's processor"),
        pytest.param(pcie_chipset, healthy(4), TP2, "", id="processor lanes"),
        pytest.param(pcie_chipset, healthy(2, pci=(), pci_known=False), TP2, "skip", id="bus unread"),
    ],
)
def test_what_is_said_of_a_topology(
    check: Check, inspection: Inspection, purpose: dict[str, Any], expected: str
) -> None:
    assert verdict(check, inspection, **purpose) == expected


def test_the_cards_that_are_not_on_the_chipset_are_named() -> None:
    (finding,) = pcie_chipset.run(on_chipset(healthy(3), 1), Purpose(tensor_parallel=2))
    assert isinstance(finding, Finding)
    assert finding.fix[-1] == "export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=0,2  # uses the others instead"
    assert finding.evidence[0].path == "/sys/bus/pci/devices/0000:00:01.1"


@pytest.mark.parametrize(
    ("inspection", "words", "gpus"),
    [
        pytest.param(TWO_BRIDGES, "GPU0,1 and GPU2,3 are on one socket", (0, 1, 2, 3), id="two bridges of a processor"),
        pytest.param(linked(2, {}, "NODE"), "GPU0,1 are on one socket", (0, 1), id="a card on each"),
        pytest.param(FIVE, "some cards are on different processors", (0, 1, 2, 3, 4), id="two sockets"),
    ],
)
def test_what_is_crossed_is_said_of_the_cards(inspection: Inspection, words: str, gpus: tuple[int, ...]) -> None:
    (finding,) = topo_cross_socket.run(inspection, Purpose())
    assert isinstance(finding, Finding)
    assert finding.summary.startswith(words)
    assert finding.gpus == gpus


def test_the_better_set_is_exported_as_cuda_would_count_it() -> None:
    (finding,) = topo_cross_socket.run(FIVE, Purpose(tensor_parallel=2))
    assert isinstance(finding, Finding)
    assert finding.fix == ("export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=1,2",)
