"""From a plan to an engine that is started, proven and, on the way out, stopped; or to one that already runs."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mgpu.backends import load_backend
from mgpu.backends.backend import unchanged
from mgpu.cli.proof import prove
from mgpu.errors import EngineFailed
from mgpu.models.source import OllamaTag
from mgpu.running.client import Canary, EngineClient, Link, Refused
from mgpu.running.draining import DRAIN_S, answers_in, drain
from mgpu.running.life import Draining, Loading, Ready
from mgpu.running.start import EngineDied, death, wait_for, wait_for_a_strangers, wait_until_ready

if TYPE_CHECKING:
    from mgpu.backends.backend import Backend, Launch
    from mgpu.backends.engine import Engine
    from mgpu.cli.prepared import Prepared
    from mgpu.cli.screens import RunScreen
    from mgpu.models.fetch import Progress as Fetched
    from mgpu.planning.candidates import Candidate
    from mgpu.planning.measurements import Setting
    from mgpu.running.ollama_attach import Attached
    from mgpu.running.ollama_link import OllamaLink
    from mgpu.running.process import EngineProcess
    from mgpu.running.start import Loading as Progress
    from mgpu.running.supervisor import Supervisor

_PORT_ATTEMPTS = 5
_SERVER_ERRORS = 500
_UNREADY_GRACE_S = 3.0
# For an engine to hang up on those whose answers are cut off.
_CUTTING_S = 1.0
# Between a broken connection and the end of a process that first writes a backtrace.
_BREAKING_S = 5.0
# Earlier nobody can say how long loading will take.
_TELLING_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where and how to serve; `port` is None when any free one will do."""

    host: str
    port: int | None
    name: str
    name_chosen: bool
    api_key: str | None
    stall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """An engine that answers. `process` is None for one that somebody else started: mgpu leaves it running. `canary` is
    its first answer, and `complaints` are what is not as planned. `setting` is what its speed is remembered with, None
    where it does not run as it was planned to."""

    backend: Backend
    link: Link
    process: EngineProcess | None
    canary: Canary | None = None
    complaints: tuple[str, ...] = ()
    setting: Setting | None = None

    def cause(self, error: EngineFailed) -> EngineFailed:
        """Return what ended the engine, where a request failed because of that; else the error itself."""
        broken = error.code in ("engine-died", "download-interrupted")
        dying = broken or (isinstance(error, Refused) and error.status >= _SERVER_ERRORS)
        # The connection breaks, or an error is answered, a moment before the process is gone.
        if self.process and dying and self.process.wait(_BREAKING_S) is not None:
            return death(self.process, self.backend)
        return error


@contextlib.contextmanager
def started(
    prepared: Prepared,
    endpoint: Endpoint,
    screen: RunScreen,
    supervisor: Supervisor,
    environment: Mapping[str, str],
) -> Iterator[Session]:
    """The engine, started with what `environment` adds, ready and proven; stopped on the way out. `supervisor` is told
    how that goes on. A port lost to a race is replaced."""
    from mgpu.running.ports import hold_port, keep_port

    engine = prepared.engine
    assert engine  # `run` has refused to go on without one
    for attempt in range(1, _PORT_ATTEMPTS + 1):
        with contextlib.ExitStack() as stack:
            port = stack.enter_context(hold_port(endpoint.host, endpoint.port))
            try:
                session = stack.enter_context(
                    _running(prepared, endpoint, port, engine, screen, supervisor, environment)
                )
            except EngineDied as died:
                if died.code != "port-in-use" or endpoint.port is not None or attempt == _PORT_ATTEMPTS:
                    raise
                continue
            keep_port(port)
            yield session
            return


@contextlib.contextmanager
def attached(
    prepared: Prepared, found: Attached, screen: RunScreen, supervisor: Supervisor, stall_s: float
) -> Iterator[Session]:
    """A model on the Ollama that already runs, proven; neither is stopped on the way out."""
    from mgpu.running.ollama_link import OllamaLink

    begun = time.monotonic()
    backend = load_backend(prepared.backend)
    with OllamaLink(found.url, _ollama_model(prepared), lines=None) as link:
        screen.attached(found)
        _take_in(link, prepared, screen, supervisor)
        loading = Loading(phase="loading")
        supervisor.report(loading)
        with screen.loading(None):
            wait_for_a_strangers(link.load, link, lambda: supervisor.report(loading), stall_s=stall_s)
        session = prove(
            Session(backend=backend, link=link, process=None), prepared, screen, supervisor, patience_s=None
        )
        supervisor.report(Ready(url=found.url, served_as=link.model, warnings=session.complaints))
        screen.ready(prepared.name, found.url, None, prepared.plan.chosen, time.monotonic() - begun, model=link.model)
        yield session


def reach(endpoint: Endpoint) -> str | None:
    """Return who else than this machine can use what is served, in words; None where nobody can."""
    from mgpu.running.ports import client_host, is_loopback

    if is_loopback(endpoint.host):
        return None
    everywhere = client_host(endpoint.host).strip("[]") in ("127.0.0.1", "::1")
    where = "all networks" if everywhere else f"the network of {endpoint.host}"
    return f"open to {where}{'' if endpoint.api_key else ' without a key'}"


def build_launch(prepared: Prepared, endpoint: Endpoint, *, port: int, folder: Path) -> Launch:
    """Return the command that would be started."""
    serving = prepared.serving(
        prepared.backend, name=endpoint.name, host=endpoint.host, port=port, folder=folder, api_key=endpoint.api_key
    )
    return load_backend(prepared.backend).launch(prepared.plan.chosen, serving)


@contextlib.contextmanager
def fetching(screen: RunScreen, supervisor: Supervisor) -> Iterator[Callable[[Fetched], None]]:
    """What is to be told how a fetch goes on."""
    with screen.fetching() as show:

        def on_progress(progress: Fetched) -> None:
            total = progress.total_bytes
            percent = f", {100 * progress.done_bytes // total} %" if total else ""
            supervisor.report(Loading(phase=f"{progress.stage}{percent}"))
            show(progress)

        yield on_progress


@contextlib.contextmanager
def _running(
    prepared: Prepared,
    endpoint: Endpoint,
    port: int,
    engine: Engine,
    screen: RunScreen,
    supervisor: Supervisor,
    added: Mapping[str, str],
) -> Iterator[Session]:
    from mgpu.running.guard import private_folder, watch
    from mgpu.running.identity import MARK
    from mgpu.running.leftovers import require_gone
    from mgpu.running.ports import client_host
    from mgpu.running.process import EngineProcess, stop_stages
    from mgpu.running.registry import engine_environment
    from mgpu.running.segments import NOTES
    from mgpu.running.state import rotate

    backend, folder = load_backend(prepared.backend), supervisor.folder
    launch = build_launch(prepared, endpoint, port=port, folder=folder)
    if backend.fitted is not unchanged:
        screen.asking_for_flags(engine)
        launch = backend.fitted(launch, engine)
    require_gone(folder)
    temporary = backend.temporary_folder(folder) if backend.temporary_folder else None
    if temporary:
        private_folder(temporary)
    log_path = folder / "engine.log"
    rotate(log_path)
    begun = time.monotonic()
    url = f"http://{client_host(endpoint.host)}:{port}"
    marked = engine_environment(supervisor.instance.name)
    environment = backend.environment()[0] | dict(launch.env) | dict(added) | marked
    # A parent-death signal reaches the engine alone; what it starts, or what it is a script for, needs the reaper.
    with (
        EngineProcess.start(launch.argv, env=environment, log_path=log_path) as process,
        watch(process.pid, temporary, mark=marked[MARK], notes=folder / NOTES) as guard,
    ):
        # Before it is ready it has no client to wait for, and a vLLM does not hear yet.
        polite_s = None if backend.stops_its_own else min(backend.stop_grace_s, _UNREADY_GRACE_S)
        serves = False
        error: BaseException | None = None
        try:
            supervisor.started(process, argv=launch.argv, url=url)
            screen.started(process, engine)
            with _link(prepared, endpoint, url, process) as link:
                # What a recovery adds to the environment is in no plan.
                setting = None if added else prepared.setting
                session = Session(backend=backend, link=link, process=process, setting=setting)
                with _loading(prepared, screen, supervisor) as on_loading:
                    wait_until_ready(process, link, backend, on_loading, stall_s=endpoint.stall_s)
                model = _bring_in(session, prepared, screen, supervisor, endpoint.stall_s)
                supervisor.report(Loading(phase="proving"))
                session = prove(session, prepared, screen, supervisor, patience_s=_patience(endpoint.stall_s))
                took_s, polite_s, serves = time.monotonic() - begun, backend.stop_grace_s, True
                supervisor.report(Ready(served_as=model, warnings=session.complaints))
                screen.ready(
                    endpoint.name, url, process, prepared.plan.chosen, took_s, model=model, reach=reach(endpoint)
                )
                yield session
        except EngineDied as died:
            _name_card(died, launch, prepared.plan.chosen)
            error = died
            raise
        except BaseException as problem:
            error = problem
            raise
        finally:
            if process.poll() is None:
                # One that is no good is not asked for long.
                grace_s = supervisor.ending(error, DRAIN_S if serves else polite_s or 0.0)
                screen.stopping(endpoint.name)
                begun, cut_off = time.monotonic(), 0
                if serves and grace_s:
                    with _link(prepared, endpoint, url, process) as link:
                        cut_off = _drained(link, process, screen, supervisor, grace_s)
                if polite_s is None:
                    guard.close(at_once=True)  # it sees what they share before it kills them
                # Whose answers are cut off waits for their clients, who have had their time.
                polite_s = min(polite_s or 0.0, grace_s, _CUTTING_S if cut_off else math.inf)
                process.stop(stop_stages(polite_s), leader_first=backend.stops_its_own)
                screen.stopped(endpoint.name, time.monotonic() - begun, cut_off)


def follow_session(session: Session, screen: RunScreen, supervisor: Supervisor, every_s: float) -> None:
    """Show the engine's state every `every_s` seconds until Ctrl-C or its end (EngineDied).

    Nothing of it is remembered as an answer to `--ask` is: of other people's requests nobody tells how deep they are.
    """
    from mgpu.cli.starts import cards
    from mgpu.running.following import follow

    assert session.canary
    with screen.following() as show:
        follow(supervisor, session.backend, session.link, show, every_s=every_s, canary=session.canary, cards=cards)


def _drained(link: Link, process: EngineProcess, screen: RunScreen, supervisor: Supervisor, grace_s: float) -> int:
    """Let the answers end that are being given; returns how many have not."""

    def on_look(answers: int, left_s: float) -> None:
        supervisor.report(Draining(answers=answers, left_s=left_s))
        screen.draining(answers, left_s)

    rate = supervisor.instance.rate
    cut_off = drain(
        lambda: answers_in(link.sample()),
        lambda seconds: process.wait(seconds) is not None,
        on_look,
        grace_s,
        known=(rate.running or 0) + (rate.waiting or 0) if rate else 0,
    )
    if cut_off:
        supervisor.report(Draining(answers=cut_off, left_s=0.0))
    return cut_off


def _name_card(died: EngineDied, launch: Launch, candidate: Candidate) -> None:
    """Give the card that an engine names the name that it has in mgpu: an engine counts only those it is shown."""
    named = re.fullmatch(r"[A-Za-z]+(\d+)", died.failure.device or "")
    shown = [device for device in candidate.devices if not device.idle]
    pinned = "CUDA_VISIBLE_DEVICES" in launch.env or "HIP_VISIBLE_DEVICES" in launch.env
    # Each replica counts its own.
    if named and pinned and candidate.replicas == 1 and int(named[1]) < len(shown):
        died.message = died.message.replace(named[0], f"gpu{shown[int(named[1])].gpu}")
        died.failure = replace(died.failure, message=died.message)


def _link(prepared: Prepared, endpoint: Endpoint, url: str, process: EngineProcess) -> EngineClient | OllamaLink:
    backend = load_backend(prepared.backend)
    if backend.name != "ollama":
        return EngineClient(url, backend, model=endpoint.name, api_key=endpoint.api_key)
    from mgpu.running.ollama_link import OllamaLink

    return OllamaLink(url, _ollama_model(prepared), lines=process.log_lines)


@contextlib.contextmanager
def _loading(prepared: Prepared, screen: RunScreen, supervisor: Supervisor) -> Iterator[Callable[[Progress], None]]:
    """What is to be told how loading goes on."""
    file_bytes = _mapped_bytes(prepared)
    with screen.loading(file_bytes) as show:

        def on_loading(progress: Progress) -> None:
            left = max(file_bytes - progress.mapped_bytes, 0) if file_bytes else 0
            told = left and progress.mapped_bytes and progress.seconds > _TELLING_S
            remaining_s = round(left * progress.seconds / progress.mapped_bytes, 1) if told else None
            supervisor.report(Loading(phase=progress.phase, remaining_s=remaining_s))
            show(progress)

        yield on_loading


def _bring_in(
    session: Session, prepared: Prepared, screen: RunScreen, supervisor: Supervisor, stall_s: float
) -> str | None:
    """Have Ollama take in and load the model, which other engines have by now; returns Ollama's name for it."""
    from mgpu.running.ollama_link import OllamaLink

    link = session.link
    if not isinstance(link, OllamaLink):
        return None
    assert session.process
    link.require_devices(prepared.plan.chosen)
    try:
        _take_in(link, prepared, screen, supervisor)
        with _loading(prepared, screen, supervisor) as on_loading:
            wait_for(link.load, session.process, session.backend, on_loading, stall_s=stall_s)
    except EngineDied:
        raise
    except EngineFailed as error:
        raise session.cause(error) from None
    return link.model


def _take_in(link: OllamaLink, prepared: Prepared, screen: RunScreen, supervisor: Supervisor) -> None:
    source = prepared.weights.source
    with fetching(screen, supervisor) as on_progress:
        weights = source if isinstance(source, OllamaTag) else prepared.weights.path
        assert weights
        link.take_in(weights, prepared.plan.chosen, on_progress)


def _ollama_model(prepared: Prepared) -> str:
    from mgpu.running.ollama_link import model_name

    source = prepared.weights.source
    if isinstance(source, OllamaTag):
        return f"{source.name}:{source.tag}"
    return model_name(prepared.name, prepared.weights.facts.quantisation)


def _mapped_bytes(prepared: Prepared) -> int | None:
    """What will be in memory once the model is loaded, where that can be watched."""
    return prepared.plan.model.file_bytes if load_backend(prepared.backend).maps_weights else None


def _patience(stall_s: float) -> float:
    from mgpu.running.readiness import BUSY_STALL_FACTOR

    return stall_s * BUSY_STALL_FACTOR
