"""Commands that leave cards out: CUDA and ROCm count cards otherwise than this machine's list does."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from mgpu.machine.inspection import Inspection
from mgpu.machine.layout import device
from mgpu.machine.snapshot import Gpu


def cuda_sees_only(indices: Iterable[int]) -> str:
    """Return the command after which CUDA sees only these NVIDIA cards, by the numbers that NVML gives them: by itself
    CUDA would count the fastest card first."""
    return f"export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES={','.join(map(str, indices))}"


def rocm_sees_only(inspection: Inspection, cards: Sequence[Gpu]) -> str | None:
    """Return the command after which ROCm sees only these AMD cards, by UUID where all have one; None where ROCm's own
    numbers of them are unknown too. Those count what AMD's compute driver lists, integrated graphics too, and no card
    of another maker."""
    names = [gpu.uuid for gpu in cards if gpu.uuid]
    everything = [gpu.index for gpu in inspection.machine.gpus]
    if len(names) < len(cards) and everything == list(range(len(everything))):  # else some are left out by --gpus
        listed = sorted(each.kfd_node for each in inspection.pci if each.kfd_node is not None)
        numbers = [listed.index(node) for gpu in cards if (node := kfd_node(inspection, gpu)) is not None]
        names = [str(number) for number in numbers]
    if not cards or len(names) < len(cards):
        return None
    return f"export ROCR_VISIBLE_DEVICES={shlex.quote(','.join(names))}"


def sees_only(inspection: Inspection, cards: Sequence[Gpu]) -> str | None:
    """Return the command after which programs see only these cards; None for cards of several makers, which no program
    uses together, and where they cannot be named."""
    makers = {gpu.vendor for gpu in cards}
    if makers == {"nvidia"}:
        return cuda_sees_only(gpu.index for gpu in cards)
    return rocm_sees_only(inspection, cards) if makers == {"amd"} else None


def kfd_node(inspection: Inspection, gpu: Gpu) -> int | None:
    """Return an AMD card's number in the compute driver's list, which counts processors too. It is the one that
    HSA_OVERRIDE_GFX_VERSION_N takes (libhsakmt's topology.c)."""
    found = device(inspection, gpu.bus_id)
    return found.kfd_node if found else None
