"""Whether the kernel has killed for want of RAM: a process that it ends so looks like one that somebody killed."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from mgpu.backends.failure import Failure, shorten
from mgpu.machine import sysfs
from mgpu.machine.host import control_groups

_COUNT = re.compile(r"(?m)^oom_kill (\d{1,18})$")
_HINT = "journalctl -k -g 'Out of memory' tells whom; a smaller --ctx or --quant needs less RAM"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelKills:
    """How many processes the kernel has killed for want of RAM so far, and the file that says so."""

    count: int
    file: Path


def kernel_kills() -> KernelKills | None:
    """Return the count of our control group (version 2; its processes alone, whoever's memory ran out), of the next
    around it that counts, else the machine's, under $MGPU_ROOT or "/"; None where nothing tells.

    The kernel counts before it kills (__oom_kill_process in mm/oom_kill.c).
    """
    root = Path(os.environ.get("MGPU_ROOT") or "/")
    for file in (*(group / "memory.events" for group in control_groups(root)), root / "proc/vmstat"):
        if found := _COUNT.search(sysfs.read_text(file) or ""):
            return KernelKills(count=int(found[1]), file=file)
    return None


def explained(
    failure: Failure, exit_status: int | None, before: KernelKills | None, after: KernelKills | None
) -> Failure:
    """Return `failure`, the end of an engine with `exit_status`; one by SIGKILL, where the kernel killed for want of
    RAM between its start (`before`) and its end (`after`), with the code "host-out-of-memory". Whom the kernel killed
    is not told.

    A vLLM that ends with status 0 since its engine core died does not tell by what that was.
    """
    by_a_signal = failure.code == "killed" or (failure.code == "crashed" and exit_status == 0)
    if not by_a_signal or not before or not after or before.file != after.file:
        return failure
    killed = after.count - before.count
    if killed <= 0:
        return failure
    whom = "a process" if killed == 1 else f"{killed} processes"
    message = f"the engine was killed, probably for want of RAM: the kernel killed {whom} meanwhile"
    return replace(failure, code="host-out-of-memory", message=shorten(message), hint=_HINT, device="host")
