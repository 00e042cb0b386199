"""Which bridges are a chipset's."""

from __future__ import annotations

import dataclasses

import pytest

from mgpu.machine.chipset import chipset_bridge, is_of_chipset
from mgpu.machine.inspection import Inspection, PciDevice
from mgpu.machine.snapshot import Machine

AMD, INTEL, ASMEDIA, PLX = 0x1022, 0x8086, 0x1B21, 0x10B5


@pytest.mark.parametrize(
    ("address", "vendor", "device", "expected"),
    [
        pytest.param("0000:03:00.0", AMD, 0x43F4, True, id="AMD 600 series, upstream"),
        pytest.param("0000:04:08.0", AMD, 0x43F5, True, id="AMD 600 series, downstream"),
        pytest.param("0000:02:00.2", AMD, 0x43C6, True, id="AMD 400 series"),
        pytest.param("0000:00:15.0", AMD, 0x43A0, True, id="AMD before Promontory"),
        pytest.param("0000:00:01.1", AMD, 0x14DB, False, id="port of a Ryzen"),
        pytest.param("0000:00:03.1", AMD, 0x1483, False, id="port of a Threadripper"),
        pytest.param("0000:03:00.0", ASMEDIA, 0x2824, True, id="ASMedia"),
        pytest.param("0000:03:00.0", PLX, 0x8747, False, id="PLX switch"),
        pytest.param("0000:00:1c.4", INTEL, 0xA33C, True, id="Intel 300 series, by its place"),
        pytest.param("0000:00:1b.0", INTEL, 0x7AC0, True, id="Intel 600 series, port 17"),
        pytest.param("0000:00:1c.0", INTEL, 0x7AB8, True, id="Intel 600 series, port 1"),
        pytest.param("0000:00:1a.0", INTEL, 0x7A48, True, id="Intel 700 series, port 25"),
        pytest.param("0000:00:1d.0", INTEL, 0x7A30, True, id="Intel 700 series, port 9"),
        pytest.param("0000:80:1c.0", INTEL, 0x7F38, True, id="Intel 800 series, on bus 80"),
        pytest.param("0000:80:1b.4", INTEL, 0x7F44, True, id="Intel 800 series, port 21"),
        pytest.param("0000:00:06.0", INTEL, 0xAE4D, False, id="the card's port of a Core Ultra 200S"),
        pytest.param("0000:00:01.0", INTEL, 0xA70D, False, id="the card's port of a Core 13000"),
        pytest.param("0000:80:1c.0", INTEL, 0x2030, False, id="second Xeon of a board"),
        pytest.param("0000:00:1c.0", None, None, False, id="unread"),
        pytest.param("0000:00:01.1", AMD, None, False, id="device unread"),
    ],
)
def test_a_bridge_of_a_chipset_is_known(address: str, vendor: int | None, device: int | None, expected: bool) -> None:
    assert is_of_chipset(PciDevice(address=address, vendor=vendor, device=device)) is expected


CARD = PciDevice(address="0000:05:00.0", parent="0000:04:08.0")
DOWN = PciDevice(address="0000:04:08.0", vendor=AMD, device=0x43F5, parent="0000:03:00.0")
UP = PciDevice(address="0000:03:00.0", vendor=AMD, device=0x43F4, parent="0000:00:02.1")
PORT = PciDevice(address="0000:00:02.1", vendor=AMD, device=0x14DB)


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        pytest.param((CARD, DOWN, UP, PORT), DOWN, id="the nearest of the chipset's"),
        pytest.param((dataclasses.replace(CARD, parent=PORT.address), PORT), None, id="the processor's lanes"),
        pytest.param((CARD,), None, id="bridges unread"),
        pytest.param((), None, id="bus unread"),
    ],
)
def test_the_bridge_above_a_card_is_found(devices: tuple[PciDevice, ...], expected: PciDevice | None) -> None:
    inspection = Inspection(machine=Machine(captured_at="", source="probed"), pci=devices)
    assert chipset_bridge(inspection, CARD.address) == expected
