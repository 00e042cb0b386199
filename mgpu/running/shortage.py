"""What the system has run out of for the moment: processes, memory, open files, room on the disk.

None of that is a fault of a plan, of an engine or of mgpu, and all of it may be there again in a minute.
"""

from __future__ import annotations

import errno
import os

from mgpu.errors import Missing

_NO_RESOURCES = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# What threading says where the system said EAGAIN.
_NO_THREAD = "can't start new thread"


def shortage(problem: BaseException, what: str) -> Missing | None:
    """Return `problem` as the error that `what` (such as "the engine could not be started") is because of a shortage;
    None where it is none. The code is "no-resources", or "disk-full"."""
    if isinstance(problem, OSError) and problem.errno in _DISK_FULL:
        why = f"{what}: {os.strerror(problem.errno)}"
        return Missing(why, code="disk-full", hint="df -h shows which disk is full")
    if isinstance(problem, MemoryError):
        number = errno.ENOMEM
    elif isinstance(problem, RuntimeError) and str(problem) == _NO_THREAD:
        number = errno.EAGAIN
    elif isinstance(problem, OSError) and problem.errno in _NO_RESOURCES:
        number = problem.errno
    else:
        return None
    return Missing(
        f"{what}: the system has no more to give ({os.strerror(number)})",
        code="no-resources",
        hint="ulimit -a shows this user's limits, free -h the memory that is left",
    )
