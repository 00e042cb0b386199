"""What many checks ask of an inspection: the cards that can be judged, what lasts, and why a fact is unknown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from mgpu.doctor.check import Skip
from mgpu.machine.inspection import CardHealth, Inspection, Readings
from mgpu.machine.layout import cards, health
from mgpu.machine.snapshot import Gpu
from mgpu.units import MIB

BUSY_PERCENT = 50
# Of its power limit, what no card draws at rest.
BUSY_SHARE = 0.4
_LONGEST_REASON = 160
_MOST_NAMED = 4
# What NVIDIA's driver keeps for itself: 450 to 640 MiB where it was read.
_MOST_RESERVED_BYTES = 640 * MIB


def usable_cards(inspection: Inspection, *vendors: str) -> tuple[Gpu, ...]:
    """Return the cards of these vendors (none: of NVIDIA, AMD and Intel) that answer, without integrated graphics."""
    wanted = vendors or ("nvidia", "amd", "intel")
    answering = (gpu for gpu in inspection.machine.gpus if gpu.vendor in wanted and not gpu.problem)
    return tuple(gpu for gpu in answering if gpu.integrated is not True)


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


def unread(inspection: Inspection, what: str, *paths: str, of: Iterable[int] = ()) -> Skip:
    """Return the Skip for `what` (in words), with the reason of the first thing unread whose name has one of `paths`
    in it, and the cards it is unread of."""
    indices = tuple(of)
    subject = f"{what} of {named(indices)}" if indices else what
    reasons = (each for each in inspection.unread if any(path in each.what for path in paths))
    known = next(reasons, None)
    reason = f"{subject} could not be read" + (f": {known.why}" if known else "")
    return Skip(reason=reason[:_LONGEST_REASON], needs_root=known is not None and known.needs_root)
