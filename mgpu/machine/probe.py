"""This machine as a snapshot, and the names that engines give its cards."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from mgpu.machine.amd import read_amd
from mgpu.machine.cards import card_for_name
from mgpu.machine.host import read_host
from mgpu.machine.integrated import is_integrated
from mgpu.machine.nvidia import patience_s, read_nvidia, silent_nvidia
from mgpu.machine.patience import Question
from mgpu.machine.selection import select_gpus
from mgpu.machine.snapshot import Driver, EngineDevice, Gpu, Host, Link, Machine

__all__ = ["machine_of", "probe", "select_gpus", "with_engine_devices"]


Nvidia = tuple[Driver | None, tuple[Gpu, ...], tuple[Link, ...]]


def probe(root: Path | None = None) -> Machine:
    """Return this machine: NVIDIA cards in bus order, then AMD cards, then nothing that only an engine knows.

    `root` is where /sys, /proc and /dev are looked for, by default $MGPU_ROOT or "/". Blocks while the
    NVIDIA driver answers. One that has not answered after 5 s, and 2 s more for each of its cards, is left alone:
    `driver.problem` says so, and the cards are as `silent_nvidia` gives them. Never raises.
    """
    root = root or Path(os.environ.get("MGPU_ROOT") or "/")
    asked = Question(lambda: read_nvidia(root))
    host, amd = read_host(root), read_amd(root)
    try:
        nvidia = asked.answer(patience_s(root))
    except TimeoutError:
        nvidia = silent_nvidia(root)
    return machine_of(host, nvidia, amd)


def machine_of(host: Host, nvidia: Nvidia, amd: tuple[Gpu, ...]) -> Machine:
    """Return the machine of what `read_host`, `read_nvidia` and `read_amd` returned just now, all cards numbered."""
    driver, cards, links = nvidia
    gpus = (
        dataclasses.replace(gpu, index=index, integrated=is_integrated(gpu.name, gfx=gpu.gfx))
        for index, gpu in enumerate((*cards, *amd))
    )
    return Machine(
        captured_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        source="probed",
        host=host,
        driver=driver,
        gpus=tuple(gpus),
        links=links,
    )


def with_engine_devices(machine: Machine, devices: Sequence[EngineDevice], *, backend: str) -> Machine:
    """Return the machine with each card's name in an engine's device list added to its `engine_devices`.

    An engine numbers the devices of each kind. CUDA devices are the usable NVIDIA cards in bus order and ROCm
    devices the AMD ones, unless the descriptions say that cards are hidden from the engine; other kinds
    (Vulkan, SYCL) are joined by description, equal cards in order unless their free memory clearly tells them apart.
    A card has one name of each kind.
    What is no known card (RPC devices, software renderers, cards without a reader here) is added after the
    others with the memory that the engine reports and vendor "other", "intel" for Intel's. A card that was
    probed keeps the driver's reading of its memory, unless it is an AMD GPU that shares the host's: its driver
    tells the part that was set aside, its engine all that it can use. Joining the same list again changes nothing.
    """
    gpus = list(machine.gpus)
    taken: set[tuple[str, int]] = set()
    for device in (_with_printable_name(device, backend) for device in devices):
        kind = re.sub(r"\d+$", "", device.id)
        free = [gpu for gpu in gpus if gpu.problem is None and (kind, gpu.index) not in taken]
        found = _card_of(device, kind, free)
        if found is None:
            found = _new_card(device, 1 + max((gpu.index for gpu in gpus), default=-1))
            gpus.append(found)
        taken.add((kind, found.index))
        gpus = [_joined(gpu, device) if gpu.index == found.index else gpu for gpu in gpus]
    return dataclasses.replace(machine, gpus=tuple(gpus))


_VENDOR_OF_KIND = {"CUDA": "nvidia", "ROCm": "amd", "HIP": "amd"}
_VENDOR_OF_WORD = {"nvidia": "nvidia", "geforce": "nvidia", "tesla": "nvidia", "amd": "amd", "radeon": "amd"}


def with_assumed_devices(machine: Machine) -> Machine:
    """Return `machine` with device names where no engine can be asked: CUDA for NVIDIA, ROCm for AMD, Vulkan for the
    others, in order."""
    kinds = {"nvidia": "CUDA", "amd": "ROCm"}
    counts: dict[str, int] = {}
    gpus = []
    for gpu in machine.gpus:
        if not gpu.engine_devices and not gpu.problem:
            kind = kinds.get(gpu.vendor, "Vulkan")
            gpu = dataclasses.replace(gpu, engine_devices=(f"{kind}{counts.setdefault(kind, 0)}",))
            counts[kind] += 1
        gpus.append(gpu)
    return dataclasses.replace(machine, gpus=tuple(gpus))


def _card_of(device: EngineDevice, kind: str, free: list[Gpu]) -> Gpu | None:
    """The card among those still free that the device is, or None."""
    known = [gpu for gpu in free if gpu.uuid == device.id or _was_added_for(gpu, device)]
    if known or kind.startswith("RPC"):  # the far end's cards are not ours, even when they look so
        return next(iter(known), None)
    same = [gpu for gpu in free if _same_model(gpu, device)]
    if vendor := _VENDOR_OF_KIND.get(kind):
        in_order = [gpu for gpu in free if gpu.vendor == vendor]
        in_order.sort(key=lambda gpu: (gpu.bus_id or "", gpu.index))
        same = [gpu for gpu in in_order if gpu in same] or in_order or same
    elif same:
        return _nearest_in_free_memory(device, same)
    return next(iter(same or _nearest_unidentified(device, free)), None)


# Readings of the same card, taken a moment apart, differ by less than this.
_FREE_TOLERANCE_BYTES = 512 * 1024**2


def _nearest_in_free_memory(device: EngineDevice, same: list[Gpu]) -> Gpu:
    """The first of equal cards, or another whose free memory is clearly nearer to what the engine sees."""
    if device.free_bytes == device.total_bytes:  # what an engine says that cannot tell
        return same[0]
    distances = [abs(gpu.free_bytes - device.free_bytes) for gpu in same if gpu.free_bytes is not None]
    if len(distances) < len(same) or distances[0] - min(distances) <= _FREE_TOLERANCE_BYTES:
        return same[0]
    return same[distances.index(min(distances))]


def _was_added_for(gpu: Gpu, device: EngineDevice) -> bool:
    probed = gpu.vendor in {"nvidia", "amd"}
    return not probed and device.id in gpu.engine_devices and gpu.name == device.description


def _same_model(gpu: Gpu, device: EngineDevice) -> bool:
    if gpu.vendor == "other":  # another kind of device of the same engine, for the same card
        return gpu.name == device.description and gpu.total_bytes == device.total_bytes
    ours = card_for_name(gpu.name, gpu.total_bytes)
    theirs = card_for_name(device.description, device.total_bytes)
    return (ours is not None and ours is theirs) or _plain(gpu.name) == _plain(device.description)


def _nearest_unidentified(device: EngineDevice, free: list[Gpu]) -> list[Gpu]:
    """Cards of the described maker whose own name says no model, the nearest in size first.

    Drivers name integrated and very new cards differently; counting one twice would invent memory.
    """
    words = _plain(device.description).split()
    vendors = {_VENDOR_OF_WORD[word] for word in words if word in _VENDOR_OF_WORD}
    unidentified = [gpu for gpu in free if gpu.vendor in vendors and card_for_name(gpu.name) is None]
    return sorted(unidentified, key=lambda gpu: abs((gpu.total_bytes or 0) - device.total_bytes))


def _plain(name: str) -> str:
    """A name without what drivers differ in: "AMD Radeon 780M (RADV PHOENIX)" is "amd radeon 780m"."""
    return " ".join(re.sub(r"\(.*?\)", " ", name.lower()).split())


def _with_printable_name(device: EngineDevice, backend: str) -> EngineDevice:
    name = "".join(filter(str.isprintable, device.description)).strip()
    return dataclasses.replace(device, description=name or f"{backend} device {device.id}")


def _new_card(device: EngineDevice, index: int) -> Gpu:
    card = card_for_name(device.description, device.total_bytes)
    intel = card is not None and card.vendor == "intel"
    return Gpu(
        index=index,
        vendor="intel" if intel else "other",
        name=device.description,
        total_bytes=device.total_bytes,
        free_bytes=device.free_bytes,
        bandwidth_gb_s=card.bandwidth_gb_s if card and intel else None,
        integrated=None if device.id.startswith("RPC") else is_integrated(device.description),
    )


def _joined(gpu: Gpu, device: EngineDevice) -> Gpu:
    names = gpu.engine_devices if device.id in gpu.engine_devices else (*gpu.engine_devices, device.id)
    gpu = dataclasses.replace(gpu, engine_devices=names)
    integrated = gpu.integrated
    if gpu.vendor == "amd" and integrated is None:
        told = (is_integrated(name, gfx=gpu.gfx) for name in (gpu.name, device.description))
        integrated = next((known for known in told if known is not None), None)
        gpu = dataclasses.replace(gpu, integrated=integrated or None)
    # The driver tells what the BIOS set aside for a GPU that shares the host's memory, often 512 MiB.
    if gpu.vendor == "amd" and integrated is not False and 2 * device.total_bytes > 3 * (gpu.total_bytes or 0):
        return dataclasses.replace(gpu, total_bytes=device.total_bytes, free_bytes=device.free_bytes)
    if gpu.vendor in {"nvidia", "amd"} and gpu.free_bytes is not None:
        return gpu
    return dataclasses.replace(gpu, total_bytes=device.total_bytes, free_bytes=device.free_bytes)
