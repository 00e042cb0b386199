"""The cards that `--gpus` asks for."""

from __future__ import annotations

import re

from mgpu.errors import Missing, UsageError
from mgpu.machine.integrated import is_discrete
from mgpu.machine.snapshot import Gpu, Machine

# More cards than any machine has: a larger number is a slip of the finger, not a card that is missing.
_MOST_CARDS = 64


def select_gpus(machine: Machine, selection: str | None) -> tuple[Gpu, ...]:
    """Return the cards that `selection` means, as `--gpus` takes it.

    None and "all" are every usable card, but None leaves out integrated GPUs beside a discrete card: a split gives
    them layers that they run at the speed of the host's memory. "none" is no card. A number is a count: that many
    usable cards, integrated ones last, with the most free memory (unknown counts as none; the lower index first
    among equals), in order of index.
    Otherwise a comma list, kept in its order, of indices ("0,1"), names ("gpu1"), UUIDs or their beginnings
    ("GPU-3f"), or names that an engine gives ("Vulkan1").
    Raises Missing (code "gpu-missing") where the machine lacks a card that is well asked for, and UsageError
    for what is no selection.
    """
    usable = tuple(gpu for gpu in machine.gpus if gpu.problem is None)
    words = (selection if selection is not None else "all").strip()
    if words.lower() == "all":
        if selection is not None and not usable:
            raise Missing(
                "--gpus all: this machine has no usable card", code="gpu-missing", hint="--gpus none runs on the CPU"
            )
        if selection is None and any(map(is_discrete, usable)):
            return tuple(gpu for gpu in usable if not gpu.integrated)
        return usable
    if words.lower() == "none":
        return ()
    if re.fullmatch(r"[0-9]+", words):
        return _most_free(machine, usable, words)
    chosen: list[Gpu] = []
    for item in words.split(","):
        gpu = _find(machine, item.strip(), words)
        if gpu in chosen:
            raise UsageError(f"--gpus {_shown(words)} names gpu{gpu.index} twice", hint=_inventory(machine))
        chosen.append(gpu)
    return tuple(chosen)


def _most_free(machine: Machine, usable: tuple[Gpu, ...], words: str) -> tuple[Gpu, ...]:
    count = _number(words)
    if count == 0:
        raise UsageError(
            "--gpus 0 asks for no card: use --gpus none for the CPU, or gpu0 for the first card",
            hint="--gpus none, or --gpus gpu0",
        )
    if count > len(usable):
        there = f"{len(usable)} usable" if len(usable) < len(machine.gpus) else str(len(usable))
        raise Missing(
            f"--gpus {count} asks for {count} cards; this machine has {there}",
            code="gpu-missing",
            hint=_inventory(machine),
        )
    by_free = sorted(usable, key=lambda gpu: (bool(gpu.integrated), -(gpu.free_bytes or 0), gpu.index))
    return tuple(sorted(by_free[:count], key=lambda gpu: gpu.index))


def _find(machine: Machine, item: str, words: str) -> Gpu:
    """The card that one item of the list means."""
    found, is_name = _matches(machine, item)
    if len(found) == 1:
        gpu = found[0]
        if gpu.problem is not None:
            raise Missing(
                f"gpu{gpu.index} ({gpu.name}) cannot be used: it {gpu.problem}",
                code="gpu-missing",
                hint=_inventory(machine),
            )
        return gpu
    if len(found) > 1:
        names = ", ".join(f"gpu{gpu.index}" for gpu in found[:8])
        raise UsageError(f"--gpus {_shown(item)} fits several cards: {names}", hint="give more of the UUID")
    if is_name:
        raise Missing(
            f"--gpus {_shown(item)}: this machine has no such card",
            code="gpu-missing",
            hint=_inventory(machine),
        )
    raise UsageError(
        f"--gpus {_shown(words)}: {_shown(item)} is not a card's index, name or UUID",
        hint="--gpus takes a count (2), all, none, or a list such as 0,1 or gpu1 or GPU-3f…",
    )


def _matches(machine: Machine, item: str) -> tuple[list[Gpu], bool]:
    """The cards that fit an item, and whether it has the form of a card's name at all."""
    if number := re.fullmatch(r"(?:gpu)?([0-9]+)", item, re.I):
        index = _number(number[1])
        return [gpu for gpu in machine.gpus if gpu.index == index], True
    lower = item.lower()
    if re.fullmatch(r"(gpu|mig)-[0-9a-f-]+", lower):
        exact = [gpu for gpu in machine.gpus if gpu.uuid and gpu.uuid.lower() == lower]
        return exact or [gpu for gpu in machine.gpus if gpu.uuid and gpu.uuid.lower().startswith(lower)], True
    return [gpu for gpu in machine.gpus if lower in map(str.lower, gpu.engine_devices)], False


def _number(digits: str) -> int:
    if len(digits) > 6 or int(digits) > _MOST_CARDS:
        raise UsageError(f"--gpus: no machine has {_shown(digits)} cards", hint="mgpu gpus lists what is there")
    return int(digits)


def _shown(words: str) -> str:
    return repr(words if len(words) <= 40 else words[:40] + "…")


def _inventory(machine: Machine) -> str:
    """What there is, as a hint: "this machine has gpu0 (NVIDIA GeForce RTX 4090)"."""
    if not machine.gpus:
        return "this machine has no card: --gpus none runs on the CPU"
    names = [f"gpu{gpu.index} ({gpu.name}{', unusable' if gpu.problem else ''})" for gpu in machine.gpus[:8]]
    more = f" and {len(machine.gpus) - 8} more" if len(machine.gpus) > 8 else ""
    return f"this machine has {', '.join(names)}{more}"
