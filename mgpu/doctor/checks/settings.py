"""Checks of how cards are set up: persistence, order, unequal cards, and switches that someone left on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, check
from mgpu.doctor.facts import named, nvidia_cards, unread, usable_cards
from mgpu.machine.inspection import Inspection
from mgpu.machine.snapshot import Gpu
from mgpu.units import gib

# Cards of one model differ by a few MiB (ECC aside, the driver's reserve).
_SAME_SIZE = 0.95


@check("persistence-off", Area.gpus, "B")
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
            fix=("sudo nvidia-smi -pm 1",) if running else ("sudo systemctl enable --now nvidia-persistenced",),
            gpus=tuple(off),
            needs_root=True,
        )
    if unknown:
        yield unread(inspection, "persistence mode", "Persistence", of=unknown)


@check("mixed-gpus", Area.gpus, "B")
def mixed_gpus(inspection: Inspection, purpose: Purpose) -> Said:
    """Cards of unequal size or generation in one machine.

    Read: the cards' memory and compute capability.
    Rule: warn when vLLM is to cut a model over more cards than there are of one size; else info. llama.cpp and Ollama
    fill each card as far as it goes.
    Why: tensor parallel gives every card an equal part, so that 24 and 12 GB hold as much as twice 12.
    Do: cut over the equal cards alone; for llama.cpp the ratio is given as --tensor-split.
    """
    cards = usable_cards(inspection)
    if len(cards) < 2:
        return
    if unknown := [gpu.index for gpu in cards if not gpu.total_bytes]:
        yield unread(inspection, "the memory", "MemoryInfo", "mem_info", of=unknown)
        return
    groups = _alike(cards)
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
        fix=_advice(groups, ratio),
        gpus=tuple(gpu.index for gpu in cards),
    )


def _alike(cards: Sequence[Gpu]) -> list[list[Gpu]]:
    """The cards in groups of about one size, largest cards first."""
    groups: list[list[Gpu]] = []
    for gpu in sorted(cards, key=lambda gpu: gpu.total_bytes or 0, reverse=True):
        if groups and (gpu.total_bytes or 0) >= _SAME_SIZE * (groups[-1][0].total_bytes or 0):
            groups[-1].append(gpu)
        else:
            groups.append([gpu])
    return groups


def _advice(groups: Sequence[Sequence[Gpu]], ratio: str) -> tuple[str, ...]:
    if len(groups) < 2:
        return ()
    equal = max(groups, key=len)
    llama = f"llama.cpp: --tensor-split {ratio}"
    if len(equal) < 2:
        return (llama,)
    return (f"export CUDA_VISIBLE_DEVICES={','.join(str(gpu.index) for gpu in equal)}  # for vLLM", llama)


@check("device-order", Area.gpus, "B")
def device_order(inspection: Inspection, _purpose: Purpose) -> Said:
    """CUDA that counts the cards otherwise than nvidia-smi.

    Read: the cards' names, CUDA_DEVICE_ORDER and CUDA_VISIBLE_DEVICES.
    Rule: with different NVIDIA cards and no CUDA_DEVICE_ORDER=PCI_BUS_ID: warn when CUDA_VISIBLE_DEVICES names cards
    by number, else info. mgpu sets the order for the engines that it starts.
    Why: CUDA puts the fastest card first, NVML the lowest bus address: number 0 is then not number 0.
    Do: export CUDA_DEVICE_ORDER=PCI_BUS_ID, and name cards by UUID.
    """
    cards = usable_cards(inspection, "nvidia")
    environment = dict(inspection.host.environment)
    if len({gpu.name for gpu in cards}) < 2 or environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return
    chosen = environment.get("CUDA_VISIBLE_DEVICES", "")
    numbered = any(part.strip().isdigit() for part in chosen.split(","))
    yield Finding(
        severity=Severity.warn if numbered else Severity.info,
        summary="CUDA_VISIBLE_DEVICES may mean other cards than nvidia-smi's numbers"
        if numbered
        else "outside mgpu, CUDA may number these cards otherwise than nvidia-smi",
        evidence=(
            Evidence(path="CUDA_DEVICE_ORDER", value=environment.get("CUDA_DEVICE_ORDER", "not set")),
            Evidence(path="CUDA_VISIBLE_DEVICES", value=chosen or "not set"),
        ),
        fix=("export CUDA_DEVICE_ORDER=PCI_BUS_ID",),
        gpus=tuple(gpu.index for gpu in cards),
    )


@check("debug-env", Area.host, "B")
def debug_env(inspection: Inspection, _purpose: Purpose) -> Said:
    """Switches for finding bugs that were left on.

    Read: the environment, /etc/nccl.conf and ~/.nccl.conf.
    Rule: warn for NCCL_DEBUG=TRACE, CUDA_LAUNCH_BLOCKING, VLLM_TRACE_FUNCTION, NCCL_SHM_DISABLE, AMD_LOG_LEVEL and
    OLLAMA_DEBUG when they are on. NCCL_DEBUG=INFO and WARN are harmless.
    Why: they make every kernel wait or every call write a line; NCCL_SHM_DISABLE takes away the way that cards without
    peer access have.
    Do: unset them, or take them out of the file.
    """
    for source, name, value in _switches(inspection):
        yield Finding(
            severity=Severity.warn,
            summary=f"{name}={value[:20]} is left on, and slows engines down",
            evidence=(Evidence(path=source, value=f"{name}={value[:60]}"),),
            fix=(f"unset {name}",) if source == "environment" else (f"take {name} out of {source}",),
        )
    if missed := [each for each in inspection.unread if "nccl.conf" in each.what]:
        yield unread(inspection, missed[0].what, "nccl.conf")


def _switches(inspection: Inspection) -> Iterator[tuple[str, str, str]]:
    named_here = [("environment", *pair) for pair in inspection.host.environment]
    for source, name, value in named_here + [("nccl.conf", *pair) for pair in inspection.host.nccl_configuration]:
        on = value.strip().lower() not in ("", "0", "false", "off", "no")
        if (name in _SLOW_WHEN_ON and on) or (name == "NCCL_DEBUG" and value.strip().upper() == "TRACE"):
            yield source, name, value


_SLOW_WHEN_ON = ("CUDA_LAUNCH_BLOCKING", "VLLM_TRACE_FUNCTION", "NCCL_SHM_DISABLE", "AMD_LOG_LEVEL", "OLLAMA_DEBUG")

CHECKS: tuple[Check, ...] = (persistence_off, mixed_gpus, device_order, debug_env)
