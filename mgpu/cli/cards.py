"""The cards of a plan: those that the user means, of those that an engine can use."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from mgpu.cli.options import Backend
from mgpu.errors import MgpuError, Missing
from mgpu.machine.probe import select_gpus
from mgpu.machine.snapshot import Gpu, Machine
from mgpu.planning.choice import TITLES


def can_use(backend: str, gpu: Gpu) -> bool:
    """Whether the engine called `backend` can run on the card."""
    match backend:
        case Backend.vllm:
            return gpu.vendor in ("nvidia", "amd") and not gpu.problem and not _too_old_for_vllm(gpu)
        case Backend.ollama:
            from mgpu.planning import ollama_candidates

            return ollama_candidates.can_use(gpu)
        case _:
            return bool(gpu.engine_devices)


def _too_old_for_vllm(gpu: Gpu) -> bool:
    """Its kernels are built for compute capability 7.0 and later (docs.vllm.ai, installation); unknown is no reason."""
    major = (gpu.compute_capability or "").partition(".")[0]
    return gpu.vendor == "nvidia" and major.isdecimal() and int(major) < 7


def choose_cards(
    backend: str, machine: Machine, selection: str | None, usable: Sequence[Gpu]
) -> tuple[tuple[Gpu, ...], list[str]]:
    """Return the cards that `--gpus` (or CUDA's mask) means for one engine, of those it can use, and what to tell the
    user about those left out. vLLM's are of one maker, and by the names that its driver has for them.

    Raises UsageError for what is no selection, Missing for a card that is not there or not for this engine, and for
    cards that it cannot use together.
    """
    option, remarks = "--gpus", []
    if selection is None and (mask := _mask(machine)) is not None:
        option, selection = "CUDA_VISIBLE_DEVICES", _unmasked(mask)
        remarks.append(f"{option}={mask}: planned on {'no card' if selection == 'none' else f'{selection} only'}")
    counted = selection is not None and selection.strip().isdecimal()
    groups = _usable_together(backend, usable)
    enough = [group for group in groups if counted and len(group) >= int((selection or "0").strip()[:6])]
    try:
        among = [select_gpus(replace(machine, gpus=group), selection) for group in enough]  # what it can use
        chosen = max(among, key=_memory) if among else select_gpus(machine, selection)
    except MgpuError as error:
        error.message = error.message.replace("--gpus", option, 1)
        raise
    if selection is None and (left := [gpu for gpu in machine.gpus if gpu.integrated and gpu not in chosen]):
        remarks.append(f"gpu{left[0].index} ({left[0].name}) is integrated and left out; --gpus all includes it")
    unseen = [gpu for gpu in chosen if gpu not in usable]
    if unseen and selection not in (None, "all"):
        raise _unseen(backend, unseen)
    if unseen:
        remarks.append(f"{_unseen(backend, unseen).message.partition(':')[0]}; mgpu backends shows what it sees")
    chosen = tuple(gpu for gpu in chosen if gpu in usable)
    if len(together := _usable_together(backend, chosen)) > 1:
        if selection not in (None, "all"):
            raise _never_together(chosen)
        taken = max(together, key=_memory)
        left = [gpu for gpu in chosen if gpu not in taken]
        numbers = ",".join(f"gpu{gpu.index}" for gpu in left)
        unused = f"vLLM never uses two makers' cards in one model: {named(left)} stays unused"
        remarks.append(f"{unused}; --gpus {numbers} plans on it")
        chosen = taken
    return (_in_its_words(machine, chosen) if backend == Backend.vllm else chosen), remarks


def in_users_order(machine: Machine, selection: str | None) -> bool:
    """Whether the user listed cards one by one with `--gpus` or CUDA's mask, so that their order is meant."""
    listed = selection if selection is not None else _mask(machine)
    return "," in (listed or "")


def _usable_together(backend: str, gpus: Sequence[Gpu]) -> list[tuple[Gpu, ...]]:
    """The cards in groups that one model can be spread over. A vLLM is built for CUDA or for ROCm; Ollama's rule is
    its planner's own."""
    groups: dict[str, list[Gpu]] = {}
    for gpu in gpus:
        groups.setdefault(gpu.vendor if backend == Backend.vllm else "", []).append(gpu)
    return [tuple(group) for group in groups.values()]


def _memory(gpus: Sequence[Gpu]) -> int:
    """The free memory that is the cards' own, in bytes."""
    return sum(gpu.free_bytes or 0 for gpu in gpus if not gpu.integrated)


def _in_its_words(machine: Machine, gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """The cards with the names that CUDA or ROCm has for them: each counts its own alone, those left out as well."""
    from mgpu.planning.vllm_placement import device_name

    def named_by_driver(gpu: Gpu) -> Gpu:
        before = [other for other in machine.gpus if other.vendor == gpu.vendor and other.index < gpu.index]
        place = len([other for other in before if not other.problem])
        return replace(gpu, engine_devices=(device_name(gpu, place),))

    return tuple(map(named_by_driver, gpus))


def _never_together(gpus: Sequence[Gpu]) -> Missing:
    return Missing(
        f"vLLM cannot use {named(gpus)} together: it is built for NVIDIA's cards or for AMD's, never for both",
        code="gpu-unseen",
        hint="choose cards of one maker with --gpus, or leave --backend out",
    )


def _unseen(backend: str, gpus: Sequence[Gpu]) -> Missing:
    if backend == Backend.llama_cpp:
        return Missing(
            f"llama.cpp does not see {named(gpus)}: this build lacks their driver's interface, or it is hidden from it",
            code="gpu-unseen",
            hint="mgpu backends shows what it sees; a build with CUDA or ROCm sees these cards",
        )
    cards = "NVIDIA cards since Volta and on AMD's" if backend == Backend.vllm else "cards with CUDA, ROCm or Vulkan"
    return Missing(
        f"{TITLES[backend]} cannot use {named(gpus)}: it runs on {cards}",
        code="gpu-unseen",
        hint="choose other cards with --gpus, or leave --backend out",
    )


def named(gpus: Sequence[Gpu]) -> str:
    """Return cards as messages name them."""
    return ", ".join(f"gpu{gpu.index} ({gpu.name})" for gpu in gpus)


def _mask(machine: Machine) -> str | None:
    """CUDA_VISIBLE_DEVICES where it says something of the machine's cards."""
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    heeded = machine.source != "simulated" and any(map(_takes_cuda, machine.gpus))
    return mask if heeded else None


def _takes_cuda(gpu: Gpu) -> bool:
    return gpu.vendor == "nvidia" or any(device.startswith("CUDA") for device in gpu.engine_devices)


def _unmasked(mask: str) -> str:
    """CUDA_VISIBLE_DEVICES as --gpus takes it: its numbers are indices, and nothing or -1 hides every card."""
    items = [item.strip() for item in mask.split(",")]
    if items[0] in ("", "-1"):
        return "none"
    return ",".join(f"gpu{item}" if item.isdecimal() else item for item in items)
