"""What more cards would do: those that lie idle here or, on a machine that is only imagined, more like these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from mgpu.machine.snapshot import Gpu, Machine

# Nobody buys more at once.
_MOST_MORE = 8
_MOST_CARDS = 64


def more_cards(
    machine: Machine, gpus: Sequence[Gpu], usable: Callable[[Gpu], bool], *, least_bytes: int
) -> Iterator[tuple[str, Machine, tuple[Gpu, ...]]]:
    """Yield (change, machine, cards) with one card more each time: the option that adds cards which are `usable` and
    not among `gpus`, or for a simulated machine, where there are none, how many more to buy. Nothing without cards, and
    no cards with less memory than `least_bytes` in all."""
    chosen = {gpu.index for gpu in gpus}
    unused = [gpu for gpu in machine.gpus if gpu.index not in chosen and not gpu.problem and usable(gpu)]
    cards = tuple(gpus)
    if not cards:
        return
    for gpu in unused:
        cards = (*cards, gpu)
        if _free_bytes(cards) >= least_bytes:
            yield f"--gpus {','.join(f'gpu{each.index}' for each in cards)}", machine, cards
    if unused or machine.source != "simulated":
        return
    model = max(gpus, key=lambda gpu: gpu.total_bytes or 0)
    name = model.name.removeprefix("NVIDIA ").removeprefix("AMD ").removeprefix("GeForce ")
    for count in range(1, _MOST_MORE + 1):
        if len(cards) == _MOST_CARDS:
            return
        cards = (*cards, _another(model, len(machine.gpus) + count - 1))
        added = cards[len(gpus) :]
        if _free_bytes(cards) >= least_bytes:
            yield f"{count} more {name}", replace(machine, gpus=(*machine.gpus, *added)), cards


def _free_bytes(gpus: Sequence[Gpu]) -> int:
    return sum(gpu.free_bytes or 0 for gpu in gpus)


def _another(gpu: Gpu, index: int) -> Gpu:
    """A card like this one, idle and in a slot of its own."""
    names = tuple(f"{name.rstrip('0123456789')}{index}" for name in gpu.engine_devices)
    free = gpu.free_bytes if not gpu.used_by else gpu.total_bytes
    return replace(
        gpu, index=index, uuid=None, bus_id=None, free_bytes=free, used_by=(), display=None, engine_devices=names
    )
