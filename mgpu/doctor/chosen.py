"""An inspection of some of the cards: what belongs to the others is left out of it."""

from __future__ import annotations

from dataclasses import replace

from mgpu.errors import Missing, UsageError
from mgpu.machine.inspection import Inspection, PciDevice
from mgpu.machine.selection import select_gpus

_DISPLAY = 3


def chosen(inspection: Inspection, selection: str) -> Inspection:
    """Return the inspection without the cards that `selection` (as `--gpus` takes it) leaves out, and without what was
    read of them: their links, their places on the bus, their lines in the kernel's log. A card that is lost may be
    chosen.

    Raises UsageError and Missing as `select_gpus` does, and UsageError where no card would be left.
    """
    machine = inspection.machine
    answering = replace(machine, gpus=tuple(replace(gpu, problem=None) for gpu in machine.gpus))
    try:
        indices = {gpu.index for gpu in select_gpus(answering, selection)}
    except Missing as error:
        if not machine.gpus:
            error.hint = "mgpu doctor says why no card answers"
        raise
    if not indices:
        raise UsageError(f"--gpus {selection} leaves no card to judge", hint="mgpu doctor")
    left = {gpu.bus_id for gpu in machine.gpus if gpu.index in indices}
    facts = inspection.container
    seen = facts.device_nodes
    return replace(
        inspection,
        machine=replace(
            machine,
            gpus=tuple(gpu for gpu in machine.gpus if gpu.index in indices),
            links=tuple(link for link in machine.links if {link.a, link.b} <= indices),
        ),
        cards=tuple(card for card in inspection.cards if card.gpu in indices),
        peers=tuple(peer for peer in inspection.peers if {peer.a, peer.b} <= indices),
        pci=tuple(device for device in inspection.pci if device.address in left or not _is_card(device)),
        host=replace(
            inspection.host,
            log=tuple(entry for entry in inspection.host.log if entry.bus_id is None or entry.bus_id in left),
        ),
        # What a container was not given cannot have been chosen in it.
        container=replace(facts, host_gpus=None if facts.host_gpus is None or seen is None else seen),
    )


def _is_card(device: PciDevice) -> bool:
    return device.pci_class is not None and device.pci_class >> 16 == _DISPLAY
