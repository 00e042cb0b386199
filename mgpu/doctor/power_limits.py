"""The power limits of a card: the one that somebody set, and the one that it is set back to."""

from __future__ import annotations

import math

from mgpu.machine.inspection import CardHealth
from mgpu.machine.layout import is_laptop
from mgpu.machine.snapshot import Gpu


def requested_limit_w(gpu: Gpu, card: CardHealth) -> float | None:
    """Return the limit that was set, W: what holds now stands for it where the driver does not tell, but never in a
    laptop, where that changes with the load, the temperature and the battery."""
    if card.power_requested_w is not None or is_laptop(gpu):
        return card.power_requested_w
    return card.power_enforced_w or gpu.power_limit_w


def default_limit_w(card: CardHealth) -> int | None:
    """Return the card's default limit in whole W, within what the card takes: nvidia-smi refuses anything else."""
    default, lowest, highest = map(_sane, (card.power_default_w, card.power_min_w, card.power_max_w))
    if default is None:
        return None
    watts = math.floor(default if highest is None else min(default, highest))
    return watts if lowest is None else max(watts, math.ceil(lowest))


def _sane(watts: float | None) -> float | None:
    return watts if watts is not None and 1 <= watts < math.inf else None
