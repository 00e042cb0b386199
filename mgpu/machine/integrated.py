"""Which GPUs are part of a processor and borrow the host's memory."""

from __future__ import annotations

import re

from mgpu.machine.cards import card_for_name
from mgpu.machine.snapshot import Gpu


def is_integrated(name: str, *, gfx: str | None = None) -> bool | None:
    """Return whether a GPU of this name is integrated, None where neither the name nor `gfx` (AMD's architecture) says.

    NVIDIA's own processors (GB10, Tegra) give None: their GPU is what the machine is for.
    """
    if gfx in _AMD_PROCESSORS:
        return True
    plain = " ".join(re.sub(r"\(.*?\)", " ", name.lower()).split())
    # "AMD Radeon Graphics" is every AMD GPU without a name of its own; a known architecture or a code name tells more.
    nameless = re.search(r"radeon graphics$", plain) and (gfx or re.search(r"\bNAVI|\bVEGA[12]0|\bgfx", name))
    if _INTEGRATED.search(plain) and not nameless:
        return True
    return False if card_for_name(name) and "gb10" not in plain else None


def is_discrete(gpu: Gpu) -> bool:
    """Return whether the GPU is a card of this machine with memory of its own, and not what only an engine knows."""
    return not gpu.integrated and (gpu.vendor != "other" or gpu.integrated is False)


# LLVM's AMDGPU processor table: the architectures that are only built into processors.
_AMD_PROCESSORS = frozenset(
    f"gfx{version}" for version in ("902", "909", "90c", 1013, 1033, 1035, 1036, 1103, 1150, 1151, 1152, 1153)
)
_INTEGRATED = re.compile(
    r"""\bintel\ (u?hd\b|iris\b(?!.*\bmax\b)|graphics\b|arc\ (graphics|1\d\d[tv])\b)
    | \bradeon\ (graphics$ | \d{3}m\b | 80[4-6]0s\b | r[3-7]\ graphics | (rx\ )?vega\ ([36-9]|1[01])\b)
    | \bamd\ custom\ gpu\b""",
    re.VERBOSE,
)
