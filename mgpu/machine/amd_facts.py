"""Who may use AMD's cards, and which driver has them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mgpu.machine import sysfs
from mgpu.machine.inspection import AmdFacts
from mgpu.machine.render_nodes import may_use, render_nodes

# Other groups may carry a person's name.
_GROUPS_OF_CARDS = ("render", "video")


def read_amd_facts(root: Path = Path("/")) -> AmdFacts:
    """Return what /dev, /sys and /etc under `root` say of AMD's driver and of this user's rights. Never raises.

    `render_nodes` are those of AMD cards; `user_groups` only those of "render" and "video" that this process is in.
    The module's version is known for AMD's own package, not for the one that comes with the kernel.
    """
    known = sysfs.is_there(root / "dev")
    kfd = root / "dev/kfd"
    nodes, accessible = render_nodes(root, sysfs.AMD)
    version = sysfs.read_text(root / "sys/module/amdgpu/version", 64)
    return AmdFacts(
        kfd_device=sysfs.is_there(kfd) if known else None,
        kfd_accessible=may_use(kfd) if sysfs.is_there(kfd) else None,
        render_nodes=nodes,
        render_accessible=accessible,
        user_groups=_groups(root),
        module_version=version if version and re.fullmatch(r"[\w.+-]{1,40}", version) else None,
    )


def _groups(root: Path) -> tuple[str, ...]:
    ours = {*os.getgroups(), os.getegid()}
    found = set()
    for line in (sysfs.read_text(root / "etc/group", 1024**2) or "").splitlines():
        group = re.fullmatch(r"(\w+):[^:]*:(\d{1,10}):.*", line)
        if group and group[1] in _GROUPS_OF_CARDS and int(group[2]) in ours:
            found.add(group[1])
    return tuple(sorted(found))
