"""Checks of how cards are set up: persistence, order, unequal cards, and switches that someone left on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from mgpu.doctor import subjects
from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, check
from mgpu.doctor.facts import named, nvidia_cards, of_one_size, settings, unread, unread_settings, usable_cards
from mgpu.doctor.visibility import sees_only
from mgpu.machine.inspection import Inspection
from mgpu.machine.layout import in_container
from mgpu.machine.snapshot import Gpu
from mgpu.units import gib


@check("persistence-off", Area.gpus, "B", about=(subjects.nvidia_card,))
def persistence_off(inspection: Inspection, _purpose: Purpose) -> Said:
    """A driver that lets go of idle cards.

    Read: NVML's persistence mode, the state of nvidia-persistenced, and whether a card shows a desktop.
    Rule: info for cards without it that show no desktop. Stock GeForce machines are set so, and nothing breaks.
    Why: every start waits 1 to 3 s for each card, and power limits and locked clocks are forgotten in between.
    Do: sudo systemctl enable --now nvidia-persistenced.
    """
    off: list[int] = []
    unknown: list[int] = []
    desktop = any(gpu.display for gpu, _ in nvidia_cards(inspection))
    for gpu, card in nvidia_cards(inspection):
        if card.persistence is None:
            unknown.append(gpu.index)
        elif not card.persistence and not desktop:
            off.append(gpu.index)
    if off:
        running = inspection.driver.persistence_daemon
        command = "sudo nvidia-smi -pm 1" if running else "sudo systemctl enable --now nvidia-persistenced"
        yield Finding(
            severity=Severity.info,
            summary=f"the driver lets go of {named(off)} when idle; each start takes 1-3 s longer",
            evidence=(
                Evidence(path="nvmlDeviceGetPersistenceMode", value="0"),
                Evidence(
                    path="nvidia-persistenced",
                    value="unknown" if running is None else "active" if running else "not running",
                ),
            ),
            fix=(f"{command}  # on the host" if in_container(inspection) else command,),
            gpus=tuple(off),
            needs_root=True,
        )
    if unknown:
        yield unread(inspection, "persistence mode", "Persistence", of=unknown)


@check("mixed-gpus", Area.gpus, "B", about=(subjects.several_cards,))
def mixed_gpus(inspection: Inspection, purpose: Purpose) -> Said:
    """Cards of unequal size or generation in one machine.

    Read: the cards' memory and compute capability; not of Intel's cards, which tell them only to who computes on them.
    Rule: warn when vLLM is to cut a model over more cards than there are of one size; else info. llama.cpp and Ollama
    fill each card as far as it goes.
    Why: tensor parallel gives every card an equal part, so that 24 and 12 GB hold as much as twice 12.
    Do: cut over the equal cards alone; for llama.cpp the ratio is given as --tensor-split.
    """
    cards = usable_cards(inspection)
    if unknown := [gpu.index for gpu in cards if not gpu.total_bytes]:
        yield unread(inspection, "the memory", "MemoryInfo", "mem_info", of=unknown)
        return
    groups = of_one_size(cards)
    kinds = {gpu.compute_capability or gpu.gfx for gpu in cards}
    if len(groups) == 1 and len(kinds) == 1:
        return
    size = purpose.tensor_parallel or 1
    too_few = purpose.backend == "vllm" and size > max(map(len, groups)) and len(groups) > 1
    smallest = min(gpu.total_bytes or 0 for gpu in cards)
    evidence = tuple(
        Evidence(path=f"GPU{gpu.index}", value=f"{gpu.name}, {gib(gpu.total_bytes or 0)}") for gpu in cards
    )
    ratio = ",".join(f"{(gpu.total_bytes or 0) / 1024**3:.0f}" for gpu in cards)
    yield Finding(
        severity=Severity.warn if too_few else Severity.info,
        summary=f"vLLM over {size} unequal cards uses no more than {gib(smallest)} of each"
        if too_few
        else "cards of different size: vLLM wants equal ones, llama.cpp fills each"
        if len(groups) > 1
        else "cards of different generations, equal in size",
        evidence=evidence,
        fix=_advice(inspection, groups, ratio),
        gpus=tuple(gpu.index for gpu in cards),
    )


def _advice(inspection: Inspection, groups: Sequence[Sequence[Gpu]], ratio: str) -> tuple[str, ...]:
    if len(groups) < 2:
        return ()
    nvidia = any(gpu.vendor == "nvidia" for group in groups for gpu in group)
    order = "CUDA_DEVICE_ORDER=PCI_BUS_ID " if nvidia else ""  # else CUDA may count the second card first
    llama = f"{order}llama-server --tensor-split {ratio}"
    equal = max(groups, key=len)
    only = sees_only(inspection, sorted(equal, key=lambda gpu: gpu.index)) if len(equal) > 1 else None
    return (f"{only}  # for vLLM", llama) if only else (llama,)


@check("device-order", Area.gpus, "B", about=(subjects.nvidia_pair,))
def device_order(inspection: Inspection, _purpose: Purpose) -> Said:
    """CUDA that counts the cards otherwise than nvidia-smi.

    Read: the cards' names, CUDA_DEVICE_ORDER and CUDA_VISIBLE_DEVICES in the environment and in the units of engines.
    Rule: with different NVIDIA cards and no CUDA_DEVICE_ORDER=PCI_BUS_ID: warn when CUDA_VISIBLE_DEVICES names cards
    by number, else info. mgpu sets the order for the engines that it starts.
    Why: CUDA puts the fastest card first, NVML the lowest bus address: number 0 is then not number 0.
    Do: export CUDA_DEVICE_ORDER=PCI_BUS_ID, and name cards by UUID.
    """
    cards = usable_cards(inspection, "nvidia")
    if len({gpu.name for gpu in cards}) < 2:
        return
    indices = tuple(gpu.index for gpu in cards)
    orders = {each.place: each.value for each in settings(inspection) if each.name == "CUDA_DEVICE_ORDER"}
    ordered = {place for place, value in orders.items() if value == "PCI_BUS_ID"}
    chosen = [each for each in settings(inspection) if each.name == "CUDA_VISIBLE_DEVICES"]
    numbered = [
        each
        for each in chosen
        if each.place not in ordered and any(part.strip().isdigit() for part in each.value.split(","))
    ]
    for each in numbered:
        yield Finding(
            severity=Severity.warn,
            summary=f"CUDA_VISIBLE_DEVICES in {each.place[:24]} may mean other cards than in nvidia-smi",
            evidence=(
                Evidence(path=each.path, value=f"CUDA_VISIBLE_DEVICES={each.value[:60]}"),
                Evidence(path="CUDA_DEVICE_ORDER", value=orders.get(each.place, "not set")[:60]),
            ),
            fix=("export CUDA_DEVICE_ORDER=PCI_BUS_ID",)
            if each.path == "environment"
            else (f"add Environment=CUDA_DEVICE_ORDER=PCI_BUS_ID to {shlex.quote(each.path)}", each.removal[-1]),
            gpus=indices,
        )
    if not numbered and "the environment" not in ordered:
        yield Finding(
            severity=Severity.info,
            summary="outside mgpu, CUDA may number these cards otherwise than nvidia-smi",
            evidence=(Evidence(path="CUDA_DEVICE_ORDER", value=orders.get("the environment", "not set")[:60]),),
            fix=("export CUDA_DEVICE_ORDER=PCI_BUS_ID",),
            gpus=indices,
        )


@check("debug-env", Area.host, "B")
def debug_env(inspection: Inspection, _purpose: Purpose) -> Said:
    """Switches for finding bugs that were left on.

    Read: the environment, /etc/nccl.conf and ~/.nccl.conf, and the units of systemd that run Ollama, vLLM or llama.cpp
    with their drop-ins and environment files. What a compose file gives to a container is not read: nobody knows which
    of them is in use.
    Rule: warn for NCCL_DEBUG=TRACE, CUDA_LAUNCH_BLOCKING, VLLM_TRACE_FUNCTION, NCCL_SHM_DISABLE, AMD_LOG_LEVEL and
    OLLAMA_DEBUG when they are on. NCCL_DEBUG=INFO and WARN are harmless.
    Why: they make every kernel wait or every call write a line; NCCL_SHM_DISABLE takes away the way that cards without
    peer access have.
    Do: unset them, or take them out of the file.
    """
    for each in settings(inspection):
        on = each.value.strip().lower() not in ("", "0", "false", "off", "no")
        traced = each.name == "NCCL_DEBUG" and each.value.strip().upper() == "TRACE"
        if traced or (each.name in _SLOW_WHEN_ON and on):
            yield Finding(
                severity=Severity.warn,
                summary=f"{each.name}={each.value[:10]} in {each.place[:24]} slows engines down",
                evidence=(Evidence(path=each.path, value=f"{each.name}={each.value[:60]}"),),
                fix=each.removal,
            )
    yield from unread_settings(inspection)


_SLOW_WHEN_ON = ("CUDA_LAUNCH_BLOCKING", "VLLM_TRACE_FUNCTION", "NCCL_SHM_DISABLE", "AMD_LOG_LEVEL", "OLLAMA_DEBUG")

CHECKS: tuple[Check, ...] = (persistence_off, mixed_gpus, device_order, debug_env)
