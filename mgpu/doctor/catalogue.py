"""Every check there is, in the order of the screen, and finding them by their ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mgpu.doctor.check import Area, Check
from mgpu.doctor.checks import (
    amd,
    cards,
    configuration,
    container,
    driver,
    driver_fit,
    engines,
    host,
    intel,
    memory,
    nvlink,
    pcie,
    peers,
    power,
    profile,
    topology,
    virtual,
)
from mgpu.doctor.plans import plan_checks
from mgpu.doctor.proof import proof_checks
from mgpu.errors import UsageError

_MODULES = (
    *(driver, driver_fit, cards, pcie, peers, nvlink, topology, memory, power),
    *(host, configuration, virtual, container, amd, intel, engines, profile),
)
_AREAS = tuple(Area)

# In the order of the areas, tier A first. The last ones of P2P, PCIe and Profile say nothing without a probe or a plan.
CHECKS: tuple[Check, ...] = tuple(
    sorted(
        (*(each for module in _MODULES for each in module.CHECKS), *proof_checks(None), *plan_checks(None)),
        key=lambda each: (_AREAS.index(each.area), each.tier),
    )
)


def with_ids(checks: Sequence[Check], ids: str, *, option: str) -> tuple[Check, ...]:
    """Return the checks that a comma list names, in the checks' order. Raises UsageError for an id that is none."""
    wanted = _split(ids, option)
    _require_known(checks, wanted, option)
    return tuple(each for each in checks if each.id in wanted)


def without_ids(checks: Sequence[Check], ids: str, *, option: str) -> tuple[Check, ...]:
    """Return the checks that a comma list does not name. Raises UsageError for an id that is none."""
    unwanted = _split(ids, option)
    _require_known(CHECKS, unwanted, option)
    return tuple(each for each in checks if each.id not in unwanted)


def replaced(checks: Sequence[Check], others: Sequence[Check]) -> tuple[Check, ...]:
    """Return the checks with those of `others` in the places of the ones with the same ids."""
    instead = {each.id: each for each in others}
    return tuple(instead.get(each.id, each) for each in checks)


def _split(ids: str, option: str) -> tuple[str, ...]:
    words = tuple(word.strip().lower() for word in ids.split(",") if word.strip())
    if not words:
        raise UsageError(f"{option} names no check", hint="mgpu doctor --list")
    return words


def _require_known(checks: Sequence[Check], ids: Iterable[str], option: str) -> None:
    known = [each.id for each in checks]
    for word in ids:
        if word not in known:
            raise UsageError(
                f"{option}: there is no check {word[:80]!r}{_instead(word, known)}",
                code="check-unknown",
                hint="mgpu doctor --list",
            )


def _instead(word: str, known: Sequence[str]) -> str:
    """The nearest ids: those that hold the word, else those that are spelled like it."""
    import difflib

    simple = word.lower().replace("_", "-")[:80]
    near = [name for name in known if len(simple) > 2 and simple in name]
    near = near or difflib.get_close_matches(simple, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""
