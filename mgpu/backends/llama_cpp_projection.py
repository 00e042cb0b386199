"""llama-server's own projection of its memory, which it prints before it loads anything.

With `--fit on` and `-lv 4` it computes what each device and the host will hold, from the file's header alone, and
prints a table (`common_memory_breakdown_print`, recorded from build 10434) in MiB rounded down. Whatever layers,
devices and context are given are kept; only afterwards the weights are loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mgpu.backends.llama_cpp_log import HOST, DeviceBuffers
from mgpu.units import MIB


def projecting(argv: Sequence[str]) -> tuple[str, ...]:
    """Return the command that projects the memory of the launch `argv`; it must be ended before it loads."""
    words = list(argv)
    words[words.index("--fit") + 1] = "on"
    return tuple(words)


def devices_of(argv: Sequence[str]) -> tuple[str, ...]:
    """Return the engine's names of the devices that a launch uses, in order; none for the CPU."""
    names = argv[list(argv).index("-dev") + 1]
    return () if names == "none" else tuple(names.split(","))


def projection(lines: Sequence[str]) -> Mapping[str, DeviceBuffers] | None:
    """Return what each device and `HOST` will hold, as soon as the log's first table is complete; None before."""
    found: dict[str, DeviceBuffers] = {}
    for line in lines:
        row = _ROW.search(line)
        if row:
            device = _DEVICE.match(row["name"])
            name = device[0] if device else HOST
            before = found.get(name, DeviceBuffers())
            found[name] = DeviceBuffers(
                weights_bytes=before.weights_bytes + int(row["model"]) * MIB,
                kv_bytes=before.kv_bytes + int(row["context"]) * MIB,
                compute_bytes=before.compute_bytes + int(row["compute"]) * MIB,
            )
        elif found and _FIT.search(line):
            return found
    return None


def refusal(lines: Sequence[str]) -> str | None:
    """Return why the engine has gone on without having printed a table, None if it has not gone on."""
    begun = False
    for line in lines:
        if match := _FAILED.search(line):
            return match["reason"]
        if "fitting params to free memory took" in line:
            return "it prints no table"
        begun = begun or "fitting params to device memory" in line
        if "loading model tensors" in line and not begun:
            return "it began to load at once"
    return None


_ROW = re.compile(
    r"memory_breakdown_print: \|\s+- (?P<name>[^|]+?)\s*\|"
    r"[^|]*= +(?P<model>\d{1,12}) \+ +(?P<context>\d{1,12}) \+ +(?P<compute>\d{1,12})\)?[^|]*\|"
)
_DEVICE = re.compile(r"[A-Za-z]+\d+(?= |$)")
_FIT = re.compile(r"common_(params_fit|fit_params)")
_FAILED = re.compile(r"to fit params to free device memory: (?P<reason>.+?)(, abort)?$")
