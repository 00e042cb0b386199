"""Reading everything that a diagnosis judges, once."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from mgpu.machine.amd_facts import read_amd_facts
from mgpu.machine.container import read_container
from mgpu.machine.host_facts import read_host_facts
from mgpu.machine.inspection import (
    AmdFacts,
    CardHealth,
    ContainerFacts,
    HostFacts,
    Inspection,
    InstalledEngine,
    NvidiaDriver,
    PciDevice,
    PeerAccess,
    Unread,
)
from mgpu.machine.nvidia_driver import read_nvidia_driver
from mgpu.machine.nvidia_health import INTERVAL_S, SAMPLES, NvidiaCards, may_pass
from mgpu.machine.nvml import Nvml
from mgpu.machine.patience import Question
from mgpu.machine.pci import read_pci
from mgpu.machine.probe import probe
from mgpu.machine.redaction import redacted
from mgpu.machine.snapshot import Driver, Machine

_Facts = TypeVar("_Facts")
# What the NVIDIA driver may take to answer, and for each card that no program keeps awake.
PATIENCE_S: Final = 5.0
_PATIENCE_PER_CARD_S = 3.0
_NO_ANSWER = -1
_NVIDIA = 0x10DE


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Nvidia:
    """What is read while NVML is held."""

    machine: Machine
    driver: NvidiaDriver
    cards: tuple[CardHealth, ...] = ()
    peers: tuple[PeerAccess, ...] = ()
    unread: tuple[Unread, ...] = ()


def inspect_machine(root: Path | None = None, *, engines: tuple[InstalledEngine, ...] = ()) -> Inspection:
    """Return all that is known of this machine, with the `engines` that somebody else found.

    `root` is where /sys, /proc, /dev and /etc are looked for, by default $MGPU_ROOT or "/". NVML is always this
    machine's. Reads only, makes no CUDA context and never raises; what only root may read is in `unread`. Blocks while
    the NVIDIA driver answers, and 0.6 s more where a card is not at rest, to tell what lasts; a driver that has not
    answered after 5 s, and 3 s more for each of its cards, is left alone (`patience.is_awaited` then tells so).
    Nothing that names a person or this computer is kept.
    """
    root = root or Path(os.environ.get("MGPU_ROOT") or "/")
    unread: list[Unread] = []
    asked = Question(lambda: _read_nvidia(root))
    host = _joined("the host", lambda: read_host_facts(root), HostFacts(), unread)
    no_bus: tuple[tuple[PciDevice, ...], bool, tuple[Unread, ...]] = ((), False, ())
    pci, pci_known, pci_unread = _safely("the PCI bus", lambda: read_pci(root), no_bus, unread)
    unread += pci_unread
    container = _joined("the container", lambda: read_container(root), ContainerFacts(), unread)
    amd = _safely("AMD's driver", lambda: read_amd_facts(root), AmdFacts(), unread)
    on_bus = sum(device.vendor == _NVIDIA and device.driver is not None for device in pci)
    try:
        nvidia = asked.answer(PATIENCE_S + on_bus * _PATIENCE_PER_CARD_S)
    except TimeoutError as error:
        nvidia = _without_nvml(root, str(error))
    return redacted(
        Inspection(
            machine=nvidia.machine,
            driver=nvidia.driver,
            cards=_with_addresses(nvidia.cards, nvidia.machine),
            peers=nvidia.peers,
            pci=pci,
            pci_known=pci_known,
            host=host,
            container=container,
            amd=amd,
            engines=engines,
            root=os.geteuid() == 0,
            unread=(*nvidia.unread, *unread),
        )
    )


def _read_nvidia(root: Path) -> _Nvidia:
    """All that needs NVML. Blocks while the driver answers, for ever where it hangs."""
    unread: list[Unread] = []
    with _nvml() as (nvml, error, reason):
        if reason:
            unread.append(Unread(what="NVML", why=reason))
        cards = _safely("the NVIDIA cards", lambda: NvidiaCards(nvml), None, unread) if nvml else None
        samples = [cards.sample()] if cards else []
        machine = _safely("the machine", lambda: probe(root), _NO_MACHINE, unread)
        driver = _joined(
            "the NVIDIA driver", lambda: read_nvidia_driver(root, nvml=nvml, nvml_error=error), NvidiaDriver(), unread
        )
        if cards and may_pass(samples[0]):
            for _ in range(SAMPLES - 1):
                time.sleep(INTERVAL_S)
                samples.append(cards.sample())
        health = cards.health(tuple(samples)) if cards else ()
        peers = cards.peers() if cards else ()
        unread += cards.refused() if cards else ()
    return _Nvidia(machine=machine, driver=driver, cards=health, peers=peers, unread=tuple(unread))


def _without_nvml(root: Path, why: str) -> _Nvidia:
    unread = [Unread(what="NVML", why=why)]
    machine = _safely("the machine", lambda: probe(root, nvidia=False), _NO_MACHINE, unread)
    driver = _joined(
        "the NVIDIA driver", lambda: read_nvidia_driver(root, nvml_error=_NO_ANSWER), NvidiaDriver(), unread
    )
    hangs = Driver(version=driver.loaded_version, problem="the NVIDIA driver does not answer: reboot")
    return _Nvidia(machine=dataclasses.replace(machine, driver=hangs), driver=driver, unread=tuple(unread))


_NO_MACHINE = Machine(captured_at="", source="probed")


@contextlib.contextmanager
def _nvml() -> Iterator[tuple[Nvml | None, int | None, str | None]]:
    """NVML while it is used, the number with which it refuses (0 if it does not), or why it was not asked.

    It is held while `probe` starts and ends it again, which then costs nothing: loading the driver takes a second per
    card.
    """
    try:
        import pynvml
    except ImportError:
        yield None, None, "nvidia-ml-py is not installed"
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield None, getattr(error, "value", None), None
        return
    except Exception as error:  # a library that is not NVIDIA's fails in ways of its own
        yield None, None, f"its library fails ({type(error).__name__})"
        return
    nvml = Nvml(pynvml)
    try:
        yield nvml, 0, None
    finally:
        nvml.ask("nvmlShutdown")


def _safely(what: str, read: Callable[[], _Facts], otherwise: _Facts, unread: list[Unread]) -> _Facts:
    """One reader that fails, which none should, must not cost what the others found."""
    try:
        return read()
    except Exception as bug:
        unread.append(Unread(what=what, why=f"the reader itself failed ({type(bug).__name__}: {bug})"[:200]))
        return otherwise


def _joined(
    what: str, read: Callable[[], tuple[_Facts, tuple[Unread, ...]]], otherwise: _Facts, unread: list[Unread]
) -> _Facts:
    nothing: tuple[_Facts, tuple[Unread, ...]] = (otherwise, ())
    facts, more = _safely(what, read, nothing, unread)
    unread += more
    return facts


def _with_addresses(health: tuple[CardHealth, ...], machine: Machine) -> tuple[CardHealth, ...]:
    """Cards that cannot be opened have the address that the machine, which asks the kernel too, knows; a card that
    only one of the two saw is left out."""
    addresses = {gpu.index: gpu.bus_id for gpu in machine.gpus if gpu.vendor == "nvidia"}
    return tuple(
        dataclasses.replace(card, bus_id=card.bus_id or addresses[card.gpu]) for card in health if card.gpu in addresses
    )
