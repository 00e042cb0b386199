"""Proving that an engine that has started is the one that was planned: what its cards hold, and a real answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from mgpu.errors import EngineFailed
from mgpu.running.client import SECOND_PROMPT, Canary, Link
from mgpu.running.following import GivenUp
from mgpu.running.watchdog import garbage_at_first

if TYPE_CHECKING:
    from mgpu.backends.backend import Backend, DeviceMemory
    from mgpu.cli.prepared import Prepared
    from mgpu.cli.screens import RunScreen
    from mgpu.cli.serving import Session
    from mgpu.planning.candidates import Candidate
    from mgpu.running.supervisor import Supervisor

# By so much of a card's weights measurements of one setting differ anyway.
_OTHER_WEIGHTS = 0.03


def prove(
    session: Session, prepared: Prepared, screen: RunScreen, supervisor: Supervisor, *, patience_s: float | None
) -> Session:
    """See that every planned card holds its part, and get one real answer; returns the session with that.

    Raises EngineFailed where none comes, GivenUp where the cards exchange data and all that comes is garbage.
    """
    from mgpu.cli.views.status import complaints
    from mgpu.running.ollama_link import OllamaLink

    candidate, link = prepared.plan.chosen, session.link
    try:
        # A device that hangs in its first computation looks busy and says nothing.
        canary = supervisor.kept_alive(lambda: link.canary(patience_s=patience_s))
        sanest = _sanest(canary, link, supervisor, patience_s)
        if isinstance(link, OllamaLink):
            memory, misplaced = link.memory(candidate), list(link.complaints(candidate))
        else:
            assert session.process
            memory, misplaced = session.backend.memory(session.process.log_lines(), candidate), []
    except GivenUp:
        raise
    except EngineFailed as error:
        raise session.cause(error) from None
    as_planned = not misplaced and _lies_as_planned(candidate, memory, session.backend)
    misplaced += complaints(candidate, memory, sanest, tells_every_card=session.backend.tells_every_card)
    screen.checked(candidate, memory, canary, misplaced)
    sound = as_planned and bool(sanest.text.strip()) and not sanest.one_token_repeated
    setting = session.setting if sound else None
    return replace(session, canary=canary, complaints=tuple(misplaced), setting=setting)


def _sanest(first: Canary, link: Link, supervisor: Supervisor, patience_s: float | None) -> Canary:
    """The first answer, or the second one where the first is none and cards that do not reach each other would give
    such. Raises GivenUp when the second is as bad."""
    setup = supervisor.instance.setup
    if first.repeated is None or not (setup and setup.exchanges_data):
        return first
    second = supervisor.kept_alive(lambda: link.canary(SECOND_PROMPT, patience_s=patience_s))
    if failure := garbage_at_first(first, second):
        raise GivenUp(failure)
    return second if second.repeated is None and second.text.strip() else first


def _lies_as_planned(candidate: Candidate, memory: Mapping[int, DeviceMemory], backend: Backend) -> bool:
    """Whether every card that the engine tells of holds the weights that it was to hold; more of other things does not
    change the speed."""
    for place, device in enumerate(candidate.devices):
        actual = memory.get(place)
        held = actual.weights_bytes if actual else None
        if device.idle or (held is None and not backend.tells_every_card):
            continue
        if held is None or abs(held - device.weights_bytes) > _OTHER_WEIGHTS * device.weights_bytes:
            return False
    return True
