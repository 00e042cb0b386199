"""How `mgpu run` plans, fetches and starts, as its supervisor wants to have it done: once, or again with changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from mgpu.cli.asked import Asked, with_port
from mgpu.cli.attach import as_it_is, running_ollama
from mgpu.cli.options import Backend
from mgpu.cli.serving import Endpoint, Session, attached, build_launch, fetching, started
from mgpu.cli.setup import setup_of, shares_of
from mgpu.cli.startable import require_fit, require_startable
from mgpu.machine.probe import probe
from mgpu.models.forms import HubFolder
from mgpu.models.source import OllamaTag
from mgpu.running.company import company, planning, wait_for_memory
from mgpu.running.life import Loading, Planned
from mgpu.running.ollama_attach import Attached
from mgpu.running.recovery import Settings
from mgpu.running.supervisor import Supervisor

if TYPE_CHECKING:
    from mgpu.cli.prepared import Prepared
    from mgpu.cli.screens import RunScreen
    from mgpu.machine.snapshot import Gpu

R = TypeVar("R")
_NOT_ALONE = "another mgpu has been planning for two minutes: both may count on the same memory"


class Starts:
    """Plans and starts what was `asked` for. `first` is a plan that was made already, for the first start."""

    def __init__(self, asked: Asked, screen: RunScreen, supervisor: Supervisor, first: Prepared | None) -> None:
        self._asked = asked
        self._screen = screen
        self._supervisor = supervisor
        self._first = first
        self._environment: Mapping[str, str] = {}

    def plan(self, settings: Settings) -> Prepared:
        """Return a plan with the changes in `settings` that can run. Raises MgpuError."""
        instance = self._supervisor.instance
        self._environment = settings.environment
        if self._first is not None:
            prepared, self._first = self._first, None
            return prepared
        if instance.ready_at and instance.url and instance.argv:  # clients know the address; an Ollama has its own
            self._asked = with_port(self._asked, urlsplit(instance.url).port)
        if "--port" in settings.options:
            self._asked = with_port(self._asked, int(settings.options["--port"]))
        if instance.setup and self._asked.options.backend == Backend.auto:
            # Chosen once: memory that is free by chance just now is no reason for another engine.
            options = replace(self._asked.options, backend=Backend(instance.setup.backend))
            self._asked = replace(self._asked, options=options)
        self._supervisor.report(Loading(phase="planning"))
        if instance.recent_restarts:
            wait_for_memory(free_bytes, lambda: company(without=instance.name).gives_back)

        def claim(prepared: Prepared) -> Prepared:
            prepared = checked(prepared, self._asked.endpoint, self._screen)
            self._supervisor.report(planned(prepared, self._endpoint))
            return prepared

        prepared = plan_in_company(self._asked, claim, settings, name=instance.name)
        self._screen.planned_again(prepared)
        return prepared

    @contextlib.contextmanager
    def start(self, prepared: Prepared) -> Iterator[Session]:
        """The engine of the plan, its model fetched, ready and proven; stopped on the way out."""
        running = prepared.running if isinstance(prepared.running, Attached) else None
        given = prepared
        prepared = self._supervisor.kept_alive(
            lambda: _with_weights(given, self._screen, self._supervisor, attached=running is not None)
        )
        self._screen.planned_again(prepared)
        with (
            attached(prepared, running, self._screen, self._supervisor, self._endpoint.stall_s)
            if running
            else started(prepared, self._endpoint, self._screen, self._supervisor, self._environment)
        ) as session:
            yield session

    @property
    def _endpoint(self) -> Endpoint:
        return replace(self._asked.endpoint, name=self._supervisor.instance.name)


def plan_in_company(
    asked: Asked, claim: Callable[[Prepared], R], settings: Settings | None = None, *, name: str | None = None
) -> R:
    """Plan and `claim` what was planned, as one: no other mgpu plans with the same memory. What does not fit waits for
    memory that is still being given back.

    `name` is the instance that plans, whose own claim does not count. Raises what `claim` does.
    """
    while True:
        with planning() as alone:
            others = company(without=name)
            prepared = asked.prepare(settings, others)
            if not alone and company(without=name).claims != others.claims:
                continue  # somebody else has planned meanwhile
            doubts = (*others.warnings, *(() if alone else (_NOT_ALONE,)))
            prepared = replace(prepared, warnings=(*prepared.warnings, *doubts))
            waits = prepared.plan.best is None and prepared.plan.chosen.verdict == "does-not-fit"
            if not waits:
                return claim(prepared)
        if not wait_for_memory(free_bytes, lambda: company(without=name).gives_back):
            return claim(prepared)


def checked(prepared: Prepared, endpoint: Endpoint, screen: RunScreen) -> Prepared:
    """Return the plan as it will be carried out, on the Ollama that runs already if that is the engine. Raises what
    keeps it from being started."""
    if running_ollama(prepared, endpoint, screen):
        return as_it_is(prepared, screen)
    require_startable(prepared, endpoint)
    return prepared


def planned(prepared: Prepared, endpoint: Endpoint) -> Planned:
    """Return the event that there is this plan."""
    from mgpu.running.state import state_path

    launch = None
    if not isinstance(prepared.running, Attached):
        launch = build_launch(prepared, endpoint, port=endpoint.port or 1, folder=state_path() / endpoint.name)
    return Planned(setup=setup_of(prepared, launch, port=endpoint.port), gpus=shares_of(prepared))


def free_bytes() -> int | None:
    """Return what is free on all cards now, None where no driver tells."""
    known = [gpu.free_bytes for gpu in probe().gpus if gpu.free_bytes is not None]
    return sum(known) if known else None


def cards() -> dict[int, Gpu]:
    """Return the machine's cards now, by index."""
    return {gpu.index: gpu for gpu in probe().gpus}


def _with_weights(prepared: Prepared, screen: RunScreen, supervisor: Supervisor, *, attached: bool) -> Prepared:
    """Fetch the model where it is not here yet, and plan again from what it really is. Ollama fetches its tags."""
    weights = prepared.weights
    if weights.path or isinstance(weights.source, OllamaTag):
        return prepared
    assert weights.source
    with fetching(screen, supervisor) as on_progress:
        if isinstance(weights.source, HubFolder):
            from mgpu.models.folder import fetch_folder

            path = fetch_folder(weights.source.repository, weights.source.revision, on_progress=on_progress)
        else:
            from mgpu.models.fetch import fetch

            path = fetch(weights.source, quantisation=weights.facts.quantisation, on_progress=on_progress)
    fetched = prepared.fetched(path)
    if attached:
        return fetched.left_to_itself()
    require_fit(fetched)
    setup = supervisor.instance.setup
    if setup:  # what else there is was known before it was fetched
        candidate = fetched.plan.chosen
        setup = replace(setup, ctx_tokens=candidate.ctx_tokens, parallel=candidate.parallel)
        supervisor.report(Planned(setup=setup, gpus=shares_of(fetched)))
    return fetched
