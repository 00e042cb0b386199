"""What many checks ask of an inspection: the cards that can be judged, what lasts, and why a fact is unknown."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from mgpu.doctor.check import Evidence, Skip
from mgpu.machine.families import family
from mgpu.machine.inspection import CardHealth, Inspection, Readings
from mgpu.machine.layout import cards, device, health, in_container, is_wsl, pairs
from mgpu.machine.snapshot import Gpu
from mgpu.units import MIB

BUSY_PERCENT = 50
# Of its power limit, what no card draws at rest.
BUSY_SHARE = 0.4
_LONGEST_REASON = 160
# One sentence for all that is so, as the screen shows a reason once.
HOST_ONLY = "a container is not shown it: run mgpu doctor on the host"
_WINDOWS_ONLY = "WSL2 does not show it: the driver, the board and the log are those of Windows"
_MOST_NAMED = 4
# Cards of one model differ by a few MiB, and by a sixteenth where one of them corrects errors (ECC) in GDDR memory.
_SAME_SIZE = 0.93
# What NVIDIA's driver keeps for itself: 450 to 640 MiB where it was read.
_MOST_RESERVED_BYTES = 640 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A variable that engines obey: its `place` in a few words, the `path` that sets it, and the `removal` of it."""

    name: str
    value: str
    place: str
    path: str
    removal: tuple[str, ...]


def settings(inspection: Inspection) -> Iterator[Setting]:
    """Yield the variables of the environment, of NCCL's files and of the engines' services."""
    host = inspection.host
    for name, value in host.environment:
        removal = (f"unset {shlex.quote(name)}",)
        yield Setting(name=name, value=value, place="the environment", path="environment", removal=removal)
    for name, value in host.nccl_configuration:
        removal = (f"take {shlex.quote(name)} out of nccl.conf",)
        yield Setting(name=name, value=value, place="nccl.conf", path="nccl.conf", removal=removal)
    for each in host.unit_variables:
        control = "systemctl --user" if each.user else "sudo systemctl"
        yield Setting(
            name=each.name,
            value=each.value,
            place=each.unit,
            path=each.path,
            removal=(
                f"take {shlex.quote(each.name)} out of {shlex.quote(each.path)}",
                f"{control} daemon-reload && {control} restart {shlex.quote(each.unit)}",
            ),
        )


def unread_settings(inspection: Inspection) -> Iterator[Skip]:
    """Yield the Skip for files of variables that are there and could not be read; nothing where all could."""
    if missed := [each for each in inspection.unread if "nccl.conf" in each.what or ".service" in each.what]:
        yield unread(inspection, missed[0].what, "nccl.conf", ".service")


def without_peers(inspection: Inspection) -> str:
    """Return the setting that keeps NCCL from peer access over PCIe, and leaves NVLink bridges in use."""
    return (
        "export NCCL_P2P_LEVEL=NVL" if any(pair.nvlink for pair in pairs(inspection)) else "export NCCL_P2P_DISABLE=1"
    )


def seen(path: str, value: str | None) -> tuple[Evidence, ...]:
    """Return the evidence of a value, none where it is unknown."""
    return () if value is None else (Evidence(path=path, value=value),)


def on_pci(address: str | None) -> str:
    """Return the folder of a device on the PCI bus."""
    return f"/sys/bus/pci/devices/{address or 'unknown'}"


def is_promised(inspection: Inspection) -> bool:
    """Return whether this is a container that was to have NVIDIA cards."""
    return in_container(inspection) and inspection.container.visible_devices not in (None, "", "void", "none")


def usable_cards(inspection: Inspection, *vendors: str) -> tuple[Gpu, ...]:
    """Return the cards of these vendors (none: of NVIDIA, AMD and Intel) that answer, without integrated graphics."""
    wanted = vendors or ("nvidia", "amd", "intel")
    answering = (gpu for gpu in inspection.machine.gpus if gpu.vendor in wanted and not gpu.problem)
    return tuple(gpu for gpu in answering if gpu.integrated is not True)


def rocm_cards(inspection: Inspection) -> tuple[Gpu, ...]:
    """Return AMD's usable cards without those that another driver than amdgpu has: the old one, radeon, shows pictures
    and computes nothing."""
    return tuple(
        gpu
        for gpu in usable_cards(inspection, "amd")
        if not (found := device(inspection, gpu.bus_id)) or found.driver in (None, "amdgpu")
    )


def nvidia_cards(inspection: Inspection) -> tuple[tuple[Gpu, CardHealth], ...]:
    """Return NVIDIA's usable cards, each with its health: one of unknowns where it was not asked. Lost cards are left
    out, because another check speaks of them."""
    return tuple((gpu, health(inspection, gpu)) for gpu in cards(inspection))


def lasting(readings: Sequence[Readings], holds: Callable[[Readings], bool | None]) -> bool | None:
    """Return whether `holds` is true of at least two readings and of two thirds of them; None where that cannot be
    told. One moment in which it is true proves nothing: clocks and events flicker when a card changes its state."""
    answers = [answer for reading in readings if (answer := holds(reading)) is not None]
    if answers and not any(answers):
        return False
    if len(answers) < 2:
        return None
    return sum(answers) >= 2 and sum(answers) * 3 >= len(answers) * 2


def event(mask: int) -> Callable[[Readings], bool | None]:
    """Return the question whether a reading has any bit of NVML's event `mask`."""
    return lambda reading: None if reading.events is None else bool(reading.events & mask)


def is_busy(reading: Readings, limit_w: float | None) -> bool | None:
    """Return whether the card worked: half its time used, or 40 % of its power, in a high performance state. A desktop
    keeps a card that rests at low clocks half busy."""
    if reading.utilisation_percent is not None and reading.utilisation_percent >= BUSY_PERCENT:
        return reading.pstate is None or reading.pstate <= 2
    if reading.pstate is not None and reading.power_w is not None and limit_w:
        return reading.pstate <= 2 and reading.power_w > BUSY_SHARE * limit_w
    return None if reading.utilisation_percent is None else False


def at_work(gpu: Gpu, card: CardHealth) -> bool | None:
    """Return whether the card worked at one reading at least; None where that cannot be told."""
    answers = [is_busy(reading, gpu.power_limit_w) for reading in card.readings]
    if any(answers):
        return True
    return None if None in answers or not answers else False


def keeps_link_speed(gpu: Gpu) -> bool:
    """Return whether the card is one whose PCIe link stays fast while it rests."""
    return family(gpu.name).keeps_link_speed


def of_one_size(cards: Iterable[Gpu]) -> list[list[Gpu]]:
    """Return cards in groups of about one size of memory, largest first."""
    groups: list[list[Gpu]] = []
    for gpu in sorted(cards, key=lambda gpu: (-(gpu.total_bytes or 0), gpu.index)):
        if groups and (gpu.total_bytes or 0) >= _SAME_SIZE * (groups[-1][0].total_bytes or 0):
            groups[-1].append(gpu)
        else:
            groups.append([gpu])
    return groups


def in_use_bytes(gpu: Gpu, card: CardHealth) -> int | None:
    """Return the memory that is taken, without what the driver keeps for itself; None where it cannot be told."""
    if gpu.total_bytes is None or gpu.free_bytes is None:
        return None
    reserved = card.reserved_bytes
    if reserved is None:
        reserved = _MOST_RESERVED_BYTES if gpu.vendor == "nvidia" else 0
    return max(gpu.total_bytes - gpu.free_bytes - reserved, 0)


def named(indices: Iterable[int]) -> str:
    """Return cards as a summary names them: "GPU0", "GPU0,2", "5 cards"."""
    cards = sorted(set(indices))
    return f"GPU{','.join(map(str, cards))}" if len(cards) <= _MOST_NAMED else f"{len(cards)} cards"


def is_hosts(path: str) -> bool:
    """Return whether something that is unread is a host's own, which hardly any container is shown: the kernel's log,
    and all but the beginning of the PCI configuration."""
    return "kmsg" in path or (path.startswith("/sys/bus/pci/") and path.endswith("/config"))


def unread(inspection: Inspection, what: str, *paths: str, of: Iterable[int] = ()) -> Skip:
    """Return the Skip for `what` (in words), with the reason of the first thing unread whose name has one of `paths`
    in it, and the cards it is unread of. Where nobody can change that, in WSL2 and in containers, the reason is one for
    all."""
    indices, of_host = tuple(of), any(is_hosts(path) for path in paths)
    if is_wsl(inspection) and (indices or of_host):
        return Skip(reason=_WINDOWS_ONLY)
    if in_container(inspection) and of_host:
        return Skip(reason=HOST_ONLY)
    subject = f"{what} of {named(indices)}" if indices else what
    reasons = (each for each in inspection.unread if any(path in each.what for path in paths))
    known = next(reasons, None)
    if known is None and indices:  # so it was asked for, and nothing refused the question
        return Skip(reason=f"driver and kernel do not tell it of {named(indices)}")
    reason = f"{subject} could not be read" + (f": {known.why}" if known else "")
    return Skip(reason=reason[:_LONGEST_REASON], needs_root=known is not None and known.needs_root)
