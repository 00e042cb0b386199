"""The instances that a user means by their names."""

from __future__ import annotations

from collections.abc import Sequence

from mgpu.errors import NoAnswer
from mgpu.running.registry import LOG, Entry, folders, instances, read


def named(names: Sequence[str], command: str) -> tuple[Entry, ...]:
    """Return the instances of these names, each once; those too of which only logs are left.

    Raises NoAnswer with the nearest names, to be typed after `command`, before anything is done for any of them.
    """
    import difflib

    known = {entry.name: entry for entry in instances()}
    ended = {folder.name: folder for folder in folders() if folder.name not in known and (folder / LOG).is_file()}
    found = []
    for name in dict.fromkeys(names):
        if name in ended:
            known[name] = read(ended[name])
        if name not in known:
            every = sorted({*known, *ended})
            near = difflib.get_close_matches(name, every, n=3, cutoff=0.5) or every[:3]
            hint = "   or   ".join(f"{command} {other}" for other in near) or "mgpu run MODEL starts one"
            raise NoAnswer(f"no instance is named {name[:80]!r}", code="unknown-instance", hint=hint)
        found.append(known[name])
    return tuple(found)
