"""Checks of what a model needs against what the machine has."""

from __future__ import annotations

from mgpu.doctor import subjects
from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, check
from mgpu.doctor.facts import unread, usable_cards
from mgpu.machine.inspection import Inspection
from mgpu.machine.layout import on_bus
from mgpu.machine.sysfs import AMD, INTEL, NVIDIA

_LARGEST_SIZE = 64


@check("tp-size", Area.profile, "A", about=(subjects.cut,))
def tp_size(inspection: Inspection, purpose: Purpose) -> Said:
    """A number of cards that the model cannot be cut over.

    Read: the model's attention heads and key-value heads, the cards, and the number that is wanted.
    Rule: fail when there are fewer cards than that; with vLLM, too, when the attention heads do not divide by the
    number, or when the key-value heads can neither be dealt out nor repeated evenly (warn where no engine is named).
    llama.cpp and Ollama give cards whole layers; only on Intel cards llama.cpp has no tensor split (info).
    Why: every rank gets an equal part of each matrix; 24 heads over 5 cards end with an error at start.
    Do: the next size that works; spare cards can run a second copy, which gave 3.4 times the throughput on four.
    """
    size = purpose.tensor_parallel or 1
    cards, arcs = usable_cards(inspection), on_bus(inspection, INTEL)
    if purpose.backend == "llama.cpp" and arcs and not cards:
        yield Finding(
            severity=Severity.info,
            summary="llama.cpp gives Intel cards whole layers: it has no tensor split for them",
            evidence=tuple(Evidence(path=f"/sys/bus/pci/devices/{each.address}", value="Intel") for each in arcs[:4]),
            fix=("--split-mode layer",),
        )
    # A card that only the bus shows lacks a driver, of which another check speaks; engines alone list Intel's.
    there = len(cards) or sum(len(on_bus(inspection, vendor)) for vendor in (NVIDIA, AMD, INTEL))
    if size > there:
        yield Finding(
            severity=Severity.fail,
            summary=f"tensor parallel over {size} cards, and {there or 'none'} can be used",
            evidence=(Evidence(path="cards that can be used", value=str(there)),),
            fix=(f"--tensor-parallel {there} at most" if there > 1 else "leave --tensor-parallel out",),
        )
    if purpose.backend not in (None, "vllm"):
        return
    severity = Severity.warn if purpose.backend is None else Severity.fail
    heads, kv_heads = purpose.attention_heads, purpose.kv_heads
    if heads is None:
        if purpose.weights_bytes is not None:
            yield unread(inspection, "the model's attention heads", "attention heads", "model")
        return
    if not _divides(size, heads, kv_heads):
        below = [other for other in range(1, min(size, _LARGEST_SIZE)) if _divides(other, heads, kv_heads)]
        yield Finding(
            severity=severity,
            summary=f"the model's {heads} attention heads cannot be cut over {size} cards",
            evidence=(
                Evidence(path="attention heads", value=str(heads)),
                Evidence(path="key-value heads", value="unknown" if kv_heads is None else str(kv_heads)),
            ),
            fix=(f"--tensor-parallel {below[-1] if below else 1}, and a second copy on the other cards",),
        )


def _divides(size: int, heads: int, kv_heads: int | None) -> bool:
    if heads % size:
        return False
    return not kv_heads or kv_heads % size == 0 or size % kv_heads == 0


CHECKS: tuple[Check, ...] = (tp_size,)
