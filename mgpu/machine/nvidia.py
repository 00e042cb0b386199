"""NVIDIA cards, as NVML reports them through nvidia-ml-py.

A question has three outcomes: a value, "this card or driver has none" and "may not be asked"; the last two
are None, and neither loses the rest of the card.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mgpu.machine import sysfs
from mgpu.machine.cards import card_for_name
from mgpu.machine.nvml import Nvml, NvmlCard, pci_address, thousandth
from mgpu.machine.snapshot import Driver, Gpu, GpuProcess, Link, NvLinkPort, PcieLink


def read_nvidia(root: Path = Path("/")) -> tuple[Driver | None, tuple[Gpu, ...], tuple[Link, ...]]:
    """Return the driver, the cards in bus order (NVML's own) and the links between each two usable cards.

    `root` is where /sys and /proc are read for what NVML does not say (slot widths, process names).
    (None, (), ()) means no driver. A driver that is installed but does not answer has a `problem`, and a card
    that cannot be used has one too, with whatever is still known of it. Never raises; blocks while the driver
    answers, which takes about a second per card when no other program keeps the driver loaded.
    `PcieLink.gen_max` is what card and board can do together, `width_max` what NVML claims for the card.
    """
    try:
        import pynvml
    except ImportError:
        return None, (), ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return _broken_driver(error, root), (), ()
    try:
        nvml = Nvml(pynvml)
        cards = [_read_card(nvml, index, root) for index in range(nvml.ask("nvmlDeviceGetCount") or 0)]
        links = tuple(_read_links(nvml, cards))
        gpus = _with_lost_cards_named(tuple(card.gpu for card in cards), root)
        return _read_driver(nvml, root), gpus, links
    finally:
        Nvml(pynvml).ask("nvmlShutdown")


# What the driver may take to answer, and for each of its cards that no program keeps awake.
_PATIENCE_S, _PATIENCE_PER_CARD_S = 5.0, 2.0


def patience_s(root: Path = Path("/")) -> float:
    """Return the seconds after which a driver that has not answered is taken to hang, by how many cards it has."""
    return _PATIENCE_S + _PATIENCE_PER_CARD_S * len(_held_by_driver(root))


def silent_nvidia(root: Path = Path("/")) -> tuple[Driver | None, tuple[Gpu, ...], tuple[Link, ...]]:
    """Return what `read_nvidia` would of a driver that hangs: the cards that it holds, by what the kernel knows without
    asking it (no file of /proc/driver/nvidia: those hang too), each with a problem. Never raises."""
    cards = tuple(
        Gpu(
            index=index,
            vendor="nvidia",
            name=f"NVIDIA GPU [10de:{sysfs.read_int(device / 'device', 16) or 0:04x}]",
            bus_id=device.name,
            problem="does not answer: its driver hangs",
        )
        for index, device in enumerate(_held_by_driver(root))
    )
    version = sysfs.read_text(root / "sys/module/nvidia/version", 100)
    return Driver(version=version, problem=_HANGS), cards, ()


_HANGS = (
    "the NVIDIA driver hangs: NVML did not answer, so its cards cannot be used; mgpu doctor tells what the kernel "
    "logged, and sudo reboot starts it anew"
)


@dataclasses.dataclass(slots=True)
class _Card:
    handle: Any
    gpu: Gpu


# What each NVML error on a card means and what to do (NVML's numbers: nvmlReturn_t).
_CARD_PROBLEMS = {
    4: "may not be opened by this user: check the permissions of /dev/nvidia*",
    8: "its power cables are not attached: plug them in",
    11: "its interrupts do not arrive: check the BIOS and the kernel log",
    15: "fell off the bus (GPU is lost): power the machine off and on, then check its riser and cables",
    16: "needs a reset: sudo nvidia-smi -r, or reboot",
}


def _read_card(nvml: Nvml, index: int, root: Path) -> _Card:
    handle = nvml.ask("nvmlDeviceGetHandleByIndex", index)
    if handle is None:
        problem = _CARD_PROBLEMS.get(nvml.failure or 0, f"does not answer (NVML error {nvml.failure})")
        return _Card(None, Gpu(index=index, vendor="nvidia", name="NVIDIA GPU", problem=problem))
    card = NvmlCard(nvml, handle)
    name = card.text("nvmlDeviceGetName") or "NVIDIA GPU"
    bus_id = pci_address(card.ask("nvmlDeviceGetPciInfo"))
    memory = card.ask("nvmlDeviceGetMemoryInfo", getattr(nvml.pynvml, "nvmlMemory_v2", None))
    memory = memory or card.ask("nvmlDeviceGetMemoryInfo")
    capability = card.ask("nvmlDeviceGetCudaComputeCapability")
    mig = card.ask("nvmlDeviceGetMigMode")
    display = card.ask("nvmlDeviceGetDisplayActive")
    utilisation = card.ask("nvmlDeviceGetUtilizationRates")
    bar1 = card.ask("nvmlDeviceGetBAR1MemoryInfo")
    gpu = Gpu(
        index=index,
        vendor="nvidia",
        name=name,
        uuid=card.text("nvmlDeviceGetUUID"),
        bus_id=bus_id,
        total_bytes=int(memory.total) if memory else None,
        free_bytes=int(memory.free) if memory else None,
        used_by=_processes(card, root),
        compute_capability=f"{capability[0]}.{capability[1]}" if capability else None,
        bandwidth_gb_s=_bandwidth_gb_s(card, name),
        pcie=_pcie(card, bus_id, root),
        bar1_bytes=int(bar1.bar1Total) if bar1 else None,
        power_w=thousandth(card.ask("nvmlDeviceGetPowerUsage")),
        power_limit_w=thousandth(card.ask("nvmlDeviceGetEnforcedPowerLimit")),
        temperature_c=card.ask("nvmlDeviceGetTemperature", 0),
        utilisation_percent=int(utilisation.gpu) if utilisation else None,
        nvlink=tuple(_nvlink_ports(card)),
        mig=bool(mig[0]) if mig else None,
        display=bool(display) if display is not None else None,
    )
    return _Card(handle, dataclasses.replace(gpu, problem=_CARD_PROBLEMS.get(card.fatal or 0)))


def _bandwidth_gb_s(card: NvmlCard, name: str) -> float | None:
    """The catalogue's figure; for a card it does not have, two transfers a clock over the width of the bus.

    The formula is that of NVIDIA's deviceQuery sample: 1008 GB/s for the RTX 4090 (384 bits, 10501 MHz).
    """
    if known := card_for_name(name):
        return known.bandwidth_gb_s
    width_bits = card.ask("nvmlDeviceGetMemoryBusWidth")
    clock_mhz = card.ask("nvmlDeviceGetMaxClockInfo", 2)
    return round(2 * clock_mhz * width_bits / 8 / 1000, 1) if width_bits and clock_mhz else None


def _pcie(card: NvmlCard, bus_id: str | None, root: Path) -> PcieLink:
    device = sysfs.pci_device(root, bus_id) if bus_id else None
    return PcieLink(
        gen=card.ask("nvmlDeviceGetCurrPcieLinkGeneration"),
        gen_max=card.ask("nvmlDeviceGetMaxPcieLinkGeneration"),
        width=card.ask("nvmlDeviceGetCurrPcieLinkWidth"),
        width_max=card.ask("nvmlDeviceGetMaxPcieLinkWidth"),
        slot_width=sysfs.pcie_link(device).slot_width if device else None,
    )


def _processes(card: NvmlCard, root: Path) -> tuple[GpuProcess, ...]:
    """Who holds memory of the card; a process that computes and draws is in both of NVML's lists."""
    used: dict[int, int | None] = {}
    for kind in ("Compute", "Graphics"):
        for version in ("_v3", "_v2"):
            listed = card.ask(f"nvmlDeviceGet{kind}RunningProcesses{version}")
            if listed is not None:
                break
        for process in listed or ():
            sizes = [size for size in (used.get(process.pid), process.usedGpuMemory) if size is not None]
            used[process.pid] = max(sizes, default=None)
    return tuple(
        GpuProcess(pid=pid, name=sysfs.process_name(root, pid), bytes=size) for pid, size in sorted(used.items())
    )


# NVML's codes for NVLink 1.0, 2.0, 2.2, 3.0, 3.1, 4.0, 5.0 and 6.0, to the generation.
_NVLINK_GENERATIONS = {1: 1, 2: 2, 3: 2, 4: 3, 5: 3, 6: 4, 7: 5, 8: 6}
_NVLINK_TO_SWITCH = 2


def _nvlink_ports(card: NvmlCard) -> Iterator[NvLinkPort]:
    for port in range(getattr(card.nvml.pynvml, "NVML_NVLINK_MAX_LINKS", 18)):
        state = card.ask("nvmlDeviceGetNvLinkState", port)
        if state is None:  # the card has no such port
            return
        version = card.ask("nvmlDeviceGetNvLinkVersion", port) if state else None
        to_switch = state and card.ask("nvmlDeviceGetNvLinkRemoteDeviceType", port) == _NVLINK_TO_SWITCH
        remote = card.ask("nvmlDeviceGetNvLinkRemotePciInfo", port) if state and not to_switch else None
        yield NvLinkPort(
            port=port,
            active=bool(state),
            version=_NVLINK_GENERATIONS.get(version or 0),
            remote_bus_id=pci_address(remote),
        )


# nvmlGpuTopologyLevel_t; INTERNAL (two chips of one board) is at least as near as one switch.
_ANCESTORS = {0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}

# Spelled as numbers because pynvml.NVML_P2P_CAPS_INDEX_READ is the tuple (0,), by a stray comma.
_P2P_READ, _P2P_NVLINK, _P2P_OK = 0, 2, 0


def _read_links(nvml: Nvml, cards: Iterable[_Card]) -> Iterator[Link]:
    usable = [card for card in cards if card.gpu.problem is None]
    for one, other in itertools.combinations(usable, 2):
        level = nvml.ask("nvmlDeviceGetTopologyCommonAncestor", one.handle, other.handle)
        read = nvml.ask("nvmlDeviceGetP2PStatus", one.handle, other.handle, _P2P_READ)
        kind = "NVLink" if _joined_by_nvlink(nvml, usable, one, other) else _ANCESTORS.get(level, "unknown")
        p2p = None if read is None else read == _P2P_OK
        yield Link(a=one.gpu.index, b=other.gpu.index, kind=kind, p2p=p2p)


def _joined_by_nvlink(nvml: Nvml, cards: list[_Card], one: _Card, other: _Card) -> bool:
    if other.gpu.bus_id and any(port.active and port.remote_bus_id == other.gpu.bus_id for port in one.gpu.nvlink):
        return True
    addresses = {card.gpu.bus_id for card in cards} - {None}
    switched = all(
        any(port.active and port.remote_bus_id not in addresses for port in card.gpu.nvlink) for card in (one, other)
    )
    return switched and nvml.ask("nvmlDeviceGetP2PStatus", one.handle, other.handle, _P2P_NVLINK) == _P2P_OK


def _read_driver(nvml: Nvml, root: Path) -> Driver:
    cuda = nvml.ask("nvmlSystemGetCudaDriverVersion_v2") or nvml.ask("nvmlSystemGetCudaDriverVersion")
    version = nvml.ask("nvmlSystemGetDriverVersion")
    return Driver(
        version=version.decode() if isinstance(version, bytes) else version,
        cuda=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,
        module_flavour=_module_flavour(root),
    )


def _module_flavour(root: Path) -> str | None:
    text = sysfs.read_text(root / "proc/driver/nvidia/version")
    return ("open" if "Open Kernel Module" in text else "closed") if text else None


# Why nvmlInit failed and what to do, by NVML's number.
_DRIVER_PROBLEMS = {
    4: "this user may not talk to the NVIDIA driver: check the permissions of /dev/nvidia*",
    9: "the NVIDIA library is installed but its kernel module is not loaded: try sudo modprobe nvidia",
    18: "the NVIDIA library and the loaded kernel module differ in version, as after an update: reboot, "
    "or reload the modules (sudo rmmod nvidia_drm nvidia_modeset nvidia_uvm nvidia; sudo modprobe nvidia)",
    999: "NVML answers 'Unknown Error': in a container, recreate it (it lost its cards); elsewhere, reboot",
}


def _broken_driver(error: Any, root: Path) -> Driver | None:
    """What a failed nvmlInit says; None where that only means that no NVIDIA driver is here."""
    code = getattr(error, "value", None)
    loaded = sysfs.read_text(root / "sys/module/nvidia/version", 100)
    if code == 12 or (code == 9 and not _nvidia_cards_on_bus(root)):
        return None
    problem = _DRIVER_PROBLEMS.get(code or 0, f"NVML does not start ({error}): reinstall the driver or reboot")
    return Driver(version=loaded, module_flavour=_module_flavour(root), problem=problem)


def _nvidia_cards_on_bus(root: Path) -> list[Path]:
    devices = sysfs.children(root / "sys/bus/pci/devices", sysfs.PCI_ADDRESS.pattern)
    return [
        device
        for device in devices
        if sysfs.read_int(device / "vendor", 16) == sysfs.NVIDIA
        and (sysfs.read_text(device / "class", 16) or "").startswith("0x03")
    ]


def _held_by_driver(root: Path) -> list[Path]:
    return [device for device in _nvidia_cards_on_bus(root) if sysfs.link_name(device / "driver") == "nvidia"]


def _with_lost_cards_named(gpus: tuple[Gpu, ...], root: Path) -> tuple[Gpu, ...]:
    """Give lost cards the name, UUID and address that the kernel module still lists, if it is plain which."""
    lost = [gpu for gpu in gpus if gpu.bus_id is None]
    known = {gpu.bus_id for gpu in gpus}
    folders = sysfs.children(root / "proc/driver/nvidia/gpus", sysfs.PCI_ADDRESS.pattern)
    unseen = [folder for folder in folders if folder.name not in known]
    if len(unseen) != len(lost):
        return gpus
    named = {}
    for gpu, folder in zip(lost, unseen, strict=True):
        fields = sysfs.read_fields(folder / "information")
        uuid = fields.get("GPU UUID", "")
        named[gpu.index] = dataclasses.replace(
            gpu,
            name=fields.get("Model") or gpu.name,
            uuid=uuid if uuid.startswith("GPU-") and "?" not in uuid else None,
            bus_id=folder.name,
        )
    return tuple(named.get(gpu.index, gpu) for gpu in gpus)
