"""The instances that a user means by their names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from mgpu.errors import NoAnswer
from mgpu.running.registry import LOCK, LOG, Entry, folders, instances, read


def named(names: Sequence[str], command: str, *, living: bool = False, undone: str = "") -> tuple[Entry, ...]:
    """Return the instances of these names, each once; those too of which only logs are left.

    Raises NoAnswer with the nearest names, to be typed after `command`, before anything is done for any of them:
    `living` offers only those that are not over, and `undone` says, of several, that it was done for none.
    """
    known = {entry.name: entry for entry in instances()}
    left = {each: folder for each, folder in remains(known).items() if (folder / LOG).is_file()}
    found = []
    for name in dict.fromkeys(names):
        if name in left:
            known[name] = read(left[name])
        if name not in known:
            told = f": {undone}" if undone and len(set(names)) > 1 else ""
            offered = [each for each, entry in known.items() if not (living and entry.is_over)]
            offered += [] if living else [*left]
            none = ", and nothing is running" if living and not offered else ""
            raise NoAnswer(
                f"no instance is named {name[:80]!r}{none}{told}",
                code="unknown-instance",
                hint=_near(name, sorted({*offered}), command) or "mgpu run MODEL starts one",
            )
        found.append(known[name])
    return tuple(found)


def remains(known: Collection[str]) -> dict[str, Path]:
    """Return the folders of instances without a record, by name: those that ended as they were asked to and left their
    logs, if anything. Those in `known` are left out. Raises Missing, as `folders`."""
    return {
        folder.name: folder
        for folder in folders()
        if folder.name not in known and any((folder / file).is_file() for file in (LOG, LOCK))
    }


def _near(name: str, offered: Sequence[str], command: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, offered, n=3, cutoff=0.5) or offered[:3]
    return "   or   ".join(f"{command} {other}" for other in near)
