"""The variables that change what engines do with cards, and no others."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from mgpu.machine import sysfs
from mgpu.machine.disks import PATIENCE_S
from mgpu.machine.inspection import Unread
from mgpu.machine.patience import Question

# Whatever else is set stays unread: variables hold tokens and names.
_NAMES = re.compile(
    r"""
    CUDA_ (DEVICE_ORDER | VISIBLE_DEVICES | LAUNCH_BLOCKING | MODULE_LOADING)
    | NVIDIA_ (VISIBLE_DEVICES | DRIVER_CAPABILITIES)
    | LD_ (PRELOAD | LIBRARY_PATH)
    | NCCL_ (ALGO | BUFFSIZE | CUMEM_ENABLE | CUMEM_HOST_ENABLE | DEBUG | IB_DISABLE | IGNORE_DISABLED_P2P |
        MAX_NCHANNELS | MIN_NCHANNELS | NVLS_ENABLE | P2P_DIRECT_DISABLE | P2P_DISABLE | P2P_LEVEL |
        P2P_USE_CUDA_MEMCPY | PROTO | SHM_DISABLE | SHM_USE_CUDA_MEMCPY | SOCKET_IFNAME | TOPO_FILE)
    | VLLM_ (ATTENTION_BACKEND | NCCL_SO_PATH | SKIP_P2P_CHECK | TRACE_FUNCTION | WORKER_MULTIPROC_METHOD |
        WSL2_ENABLE_PIN_MEMORY)
    | GGML_ (CUDA_P2P | CUDA_ENABLE_UNIFIED_MEMORY | VK_VISIBLE_DEVICES)
    | OLLAMA_ (DEBUG | NUM_PARALLEL | SCHED_SPREAD | VULKAN)
    | AMD_LOG_LEVEL
    | HIP_VISIBLE_DEVICES
    | ROCR_VISIBLE_DEVICES
    | GPU_DEVICE_ORDINAL
    | ONEAPI_DEVICE_SELECTOR
    | SYCL_CACHE_PERSISTENT
    | ZES_ENABLE_SYSMAN
    | HSA_OVERRIDE_GFX_VERSION (_\d{1,3})?
    """,
    re.VERBOSE,
)
_LONGEST_VALUE = 500


def chosen_variables(variables: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Return the variables that matter, by name, each with its value (at most 500 characters)."""
    return tuple(sorted((name, value[:_LONGEST_VALUE]) for name, value in variables if _NAMES.fullmatch(name)))


def read_nccl_configuration(root: Path = Path("/")) -> tuple[tuple[tuple[str, str], ...], tuple[Unread, ...]]:
    """Return what NCCL's files set, the user's (~/.nccl.conf) before the machine's (/etc/nccl.conf) as in NCCL, and
    the files that are there and cannot be read. Never raises; a home folder on a network's disk that does not answer is
    waited for half a second."""
    found: dict[str, str] = {}
    unread = []
    home = os.environ.get("HOME")
    named = [("~/.nccl.conf", f"{home}/.nccl.conf")] if home else []
    for shown, path in [*named, ("/etc/nccl.conf", "/etc/nccl.conf")]:
        try:
            settings = Question(partial(_settings, sysfs.below(root, path))).answer(PATIENCE_S)
        except TimeoutError as error:
            unread.append(Unread(what=shown, why=str(error)))
            continue
        if settings is None:
            unread.append(Unread(what=shown, why="it is there and cannot be read", needs_root=os.geteuid() != 0))
            continue
        for name, value in settings.items():
            if not name.startswith("#"):
                found.setdefault(name, value)
    return chosen_variables(found.items()), tuple(unread)


def _settings(file: Path) -> dict[str, str] | None:
    """The lines "name=value" of a file, none where it is not there; None where it cannot be read."""
    if sysfs.read_text(file, 1) is None:
        return None if sysfs.is_there(file) else {}
    return sysfs.read_fields(file, "=")
