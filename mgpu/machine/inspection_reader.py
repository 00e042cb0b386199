"""Reading everything that a diagnosis judges, once."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from mgpu.machine.amd import read_amd
from mgpu.machine.amd_facts import read_amd_facts
from mgpu.machine.container import read_container
from mgpu.machine.descent import is_mgpus
from mgpu.machine.host import read_host
from mgpu.machine.host_facts import read_host_facts
from mgpu.machine.inspection import (
    AmdFacts,
    CardHealth,
    ContainerFacts,
    HostFacts,
    Inspection,
    InstalledEngine,
    IntelFacts,
    NvidiaDriver,
    PciDevice,
    PeerAccess,
    Unread,
)
from mgpu.machine.nvidia import patience_s, read_nvidia
from mgpu.machine.nvidia_driver import read_nvidia_driver
from mgpu.machine.nvidia_health import INTERVAL_S, SAMPLES, NvidiaCards, may_pass
from mgpu.machine.nvml import Nvml
from mgpu.machine.patience import Question
from mgpu.machine.pci import read_pci
from mgpu.machine.probe import Nvidia, machine_of
from mgpu.machine.redaction import redacted
from mgpu.machine.render_nodes import render_nodes
from mgpu.machine.snapshot import Driver, Gpu, Host, Machine
from mgpu.machine.sysfs import ASLEEP, INTEL, is_asleep, pci_device

_Facts = TypeVar("_Facts")
# What every other reader may take: some files of /proc and /sys are answered by the driver, and hang with it.
_PATIENCE_S = 5.0
_NO_ANSWER = -1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Nvidia:
    """What is read while NVML is held."""

    found: Nvidia
    driver: NvidiaDriver
    cards: tuple[CardHealth, ...] = ()
    peers: tuple[PeerAccess, ...] = ()
    unread: tuple[Unread, ...] = ()


def inspect_machine(
    root: Path | None = None, *, engines: Callable[[], tuple[InstalledEngine, ...]] = tuple
) -> Inspection:
    """Return all that is known of this machine, with the engines that `engines` finds.

    `root` is where /sys, /proc, /dev and /etc are looked for, by default $MGPU_ROOT or "/". NVML is always this
    machine's. Reads only, makes no CUDA context and never raises; what only root may read is in `unread`. Blocks while
    the NVIDIA driver answers, and 0.6 s more where a card is not at rest, to tell what lasts; a driver that has not
    answered after `nvidia.patience_s`, and anything else that has not after 5 s, is left alone (`patience.is_awaited`
    then tells so). Nothing that names a person or this computer is kept.
    """
    root = root or Path(os.environ.get("MGPU_ROOT") or "/")
    unread: list[Unread] = []
    asked = Question(lambda: _read_nvidia(root))
    computer = _Asked("the computer", lambda: (read_host(root), ()), Host())
    no_cards: tuple[Gpu, ...] = ()
    radeons = _Asked("AMD's cards", lambda: _read_amd(root), no_cards)
    host = _Asked("the host", lambda: read_host_facts(root), HostFacts())
    no_bus: tuple[tuple[PciDevice, ...], bool] = ((), False)
    bus = _Asked("the PCI bus", lambda: _read_bus(root), no_bus)
    container = _Asked("the container", lambda: read_container(root), ContainerFacts())
    amd = _Asked("AMD's driver", lambda: (read_amd_facts(root), ()), AmdFacts())
    intel = _Asked("Intel's cards", lambda: (_read_intel_facts(root), ()), IntelFacts())
    none: tuple[InstalledEngine, ...] = ()
    installed = _Asked("the installed engines", lambda: (engines(), ()), none)
    try:
        nvidia = asked.answer(patience_s(root))
    except TimeoutError as error:
        nvidia = _without_nvml(root, str(error))
    unread += nvidia.unread
    pci, pci_known = bus.facts(unread)
    machine = machine_of(computer.facts(unread), nvidia.found, radeons.facts(unread))
    nobody: tuple[int, ...] = ()
    ours = _Asked("mgpu's own processes", lambda: (_mgpu_processes(root, machine), ()), nobody)
    return redacted(
        Inspection(
            machine=machine,
            driver=nvidia.driver,
            cards=_with_addresses(nvidia.cards, machine),
            peers=nvidia.peers,
            pci=pci,
            pci_known=pci_known,
            host=host.facts(unread),
            container=container.facts(unread),
            amd=amd.facts(unread),
            intel=intel.facts(unread),
            engines=installed.facts(unread),
            mgpu_processes=ours.facts(unread),
            root=os.geteuid() == 0,
            unread=tuple(unread),
        )
    )


class _Asked(Generic[_Facts]):
    """A reader at work: one that fails, which none should, or hangs must not cost what the others find."""

    def __init__(self, what: str, read: Callable[[], tuple[_Facts, tuple[Unread, ...]]], otherwise: _Facts) -> None:
        self._what, self._otherwise = what, otherwise
        self._question = Question(read)
        self._until_s = time.monotonic() + _PATIENCE_S

    def facts(self, unread: list[Unread]) -> _Facts:
        """Return what was read, or `otherwise`; what could not be read is added to `unread`."""
        try:
            facts, more = self._question.answer(max(self._until_s - time.monotonic(), 0))
        except TimeoutError:
            facts, more = self._otherwise, (Unread(what=self._what, why=f"no answer in {_PATIENCE_S:g} s"),)
        except Exception as bug:
            why = f"the reader itself failed ({type(bug).__name__}: {bug})"[:200]
            facts, more = self._otherwise, (Unread(what=self._what, why=why),)
        unread += more
        return facts


def _read_bus(root: Path) -> tuple[tuple[tuple[PciDevice, ...], bool], tuple[Unread, ...]]:
    devices, known, unread = read_pci(root)
    return (devices, known), unread


def _read_amd(root: Path) -> tuple[tuple[Gpu, ...], tuple[Unread, ...]]:
    gpus = read_amd(root)
    devices = [device for gpu in gpus if gpu.bus_id and (device := pci_device(root, gpu.bus_id))]
    asleep = [device.name for device in devices if is_asleep(device)]
    return gpus, tuple(Unread(what=f"/sys/bus/pci/devices/{name}/hwmon", why=ASLEEP) for name in asleep)


def _read_intel_facts(root: Path) -> IntelFacts:
    nodes, accessible = render_nodes(root, INTEL)
    return IntelFacts(render_nodes=nodes, render_accessible=accessible)


def _read_nvidia(root: Path) -> _Nvidia:
    """All that needs NVML. Blocks while the driver answers, for ever where it hangs."""
    unread: list[Unread] = []
    with _nvml() as (nvml, error, reason):
        if reason:
            unread.append(Unread(what="NVML", why=reason))
        cards = _safely("the NVIDIA cards", lambda: NvidiaCards(nvml), None, unread) if nvml else None
        samples = [cards.sample()] if cards else []
        found = _safely("NVIDIA's cards", lambda: read_nvidia(root), _NO_NVIDIA, unread)
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
    return _Nvidia(found=found, driver=driver, cards=health, peers=peers, unread=tuple(unread))


def _without_nvml(root: Path, why: str) -> _Nvidia:
    unread = [Unread(what="NVML", why=why)]
    silent = NvidiaDriver(nvml_error=_NO_ANSWER)
    files = _Asked("the NVIDIA driver", lambda: read_nvidia_driver(root, nvml_error=_NO_ANSWER), silent)
    driver = files.facts(unread)
    hangs = Driver(version=driver.loaded_version, problem="the NVIDIA driver does not answer: reboot")
    return _Nvidia(found=(hangs, (), ()), driver=driver, unread=tuple(unread))


_NO_NVIDIA: Nvidia = (None, (), ())


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


def _mgpu_processes(root: Path, machine: Machine) -> tuple[int, ...]:
    on_cards = {process.pid for gpu in machine.gpus for process in gpu.used_by}
    return tuple(pid for pid in sorted(on_cards) if is_mgpus(root, pid))


def _with_addresses(health: tuple[CardHealth, ...], machine: Machine) -> tuple[CardHealth, ...]:
    """Cards that cannot be opened have the address that the machine, which asks the kernel too, knows; a card that
    only one of the two saw is left out."""
    addresses = {gpu.index: gpu.bus_id for gpu in machine.gpus if gpu.vendor == "nvidia"}
    return tuple(
        dataclasses.replace(card, bus_id=card.bus_id or addresses[card.gpu]) for card in health if card.gpu in addresses
    )
