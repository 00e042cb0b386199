"""The driver around an instance's life: with a real engine process, a real record, and plans that are made up."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mgpu.backends.failure import Failure
from mgpu.backends.llama_cpp import BACKEND
from mgpu.backends.samples import Sample
from mgpu.errors import EngineFailed, MgpuError, Missing, NoAnswer, UsageError
from mgpu.interrupts import Interrupts
from mgpu.running import registry
from mgpu.running.client import Answer, Canary
from mgpu.running.following import GivenUp, follow
from mgpu.running.identity import identity
from mgpu.running.instance import Instance, State
from mgpu.running.life import Draining, Planned, Ready
from mgpu.running.notify import ServiceManager
from mgpu.running.process import EngineProcess
from mgpu.running.recovery import Settings, Setup
from mgpu.running.start import death
from mgpu.running.state import instance_folder, rotate
from mgpu.running.supervisor import Supervisor, error_of
from mgpu.running.watchdog import Patience

SETUP = Setup(backend="llama.cpp", ctx_tokens=8192, parallel=1, kv_type="f16", split_mode="layer")
WAITS = "import time; time.sleep(600)"
ENDS = "raise SystemExit(3)"
GOOD = Canary(text="a friend of", seconds=0.1, generation_tok_s=9.0)


@pytest.fixture
def folder() -> Iterator[Path]:
    with instance_folder("llama", chosen=True) as (_, folder):
        yield folder


def supervisor(*, restarts: bool = False, service: ServiceManager | None = None) -> Supervisor:
    me = identity(os.getpid())
    assert me
    instance = Instance(
        name="llama",
        state=State.STARTING,
        model="m",
        started_at="2026-01-01T00:00:00Z",
        supervisor=me,
        command=("mgpu", "run", "m"),
        restarts_itself=restarts,
    )
    return Supervisor(instance, service=service)


class Plans:
    """Plans and engines for a supervisor: each start runs the next of `programs`; `changes` are those planned with."""

    def __init__(self, supervisor: Supervisor, *programs: str) -> None:
        self._supervisor = supervisor
        self._programs = iter(programs)
        self.changes: list[Settings] = []

    def plan(self, settings: Settings) -> str:
        self.changes.append(settings)
        self._supervisor.report(Planned(setup=SETUP, gpus=()))
        return next(self._programs)

    @contextlib.contextmanager
    def start(self, program: str) -> Iterator[EngineProcess]:
        supervisor = self._supervisor
        error: BaseException | None = None
        argv = (sys.executable, "-ISc", program)
        rotate(supervisor.folder / "engine.log")
        with EngineProcess.start(argv, env={}, log_path=supervisor.folder / "engine.log") as engine:
            try:
                supervisor.started(engine, argv=argv, url="http://127.0.0.1:1")
                supervisor.report(Ready())
                yield engine
            except BaseException as problem:
                error = problem
                raise
            finally:
                if engine.poll() is None:
                    supervisor.ending(error, 0.0)


def until_its_end(engine: EngineProcess) -> None:
    engine.wait(30)
    raise death(engine, BACKEND)


def record(folder: Path) -> Instance:
    instance = registry.read(folder).instance
    assert instance
    return instance


def test_what_was_used_is_stopped_and_the_record_says_so(folder: Path) -> None:
    own = supervisor()
    plans = Plans(own, WAITS)
    seen: list[Instance] = []
    own.live(plans.plan, plans.start, lambda _: seen.append(record(folder)))
    assert seen[0].state is State.READY
    assert seen[0].engine
    assert (record(folder).state, record(folder).engine) == (State.STOPPED, None)


def test_a_failure_is_raised_and_written_down(folder: Path) -> None:
    own = supervisor()
    plans = Plans(own, ENDS)
    with pytest.raises(EngineFailed) as raised:
        own.live(plans.plan, plans.start, until_its_end)
    found = record(folder)
    assert (found.state, found.exit_code, found.exit and found.exit.code) == (State.FAILED, 4, 3)
    told = error_of(found)
    for name in ("message", "hint", "code", "log_reference", "exit_code"):
        assert getattr(told, name) == getattr(raised.value, name)
    assert told.log_reference


@pytest.mark.parametrize(
    "error",
    [NoAnswer("no room", code="does-not-fit", hint="buy some"), UsageError("wrong"), Missing("gone", hint="find it")],
)
def test_a_plan_that_is_refused_is_the_end(folder: Path, error: MgpuError) -> None:
    own = supervisor(restarts=True)

    def plan(_: Settings) -> str:
        raise error

    with pytest.raises(type(error)) as raised:
        own.live(plan, Plans(own).start, until_its_end)
    assert (raised.value.message, raised.value.hint) == (error.message, error.hint)
    assert record(folder).exit_code == error.exit_code


def test_a_crash_is_followed_by_another_start(folder: Path) -> None:
    own = supervisor(restarts=True)
    plans = Plans(own, ENDS, WAITS)

    def use(engine: EngineProcess) -> None:
        if len(plans.changes) == 1:
            until_its_end(engine)

    own.live(plans.plan, plans.start, use)
    assert (record(folder).restarts, record(folder).state) == (1, State.STOPPED)


def test_the_log_of_the_crash_that_matters_outlives_the_restarts_after_it(folder: Path) -> None:
    own = supervisor(restarts=True)
    plans = Plans(own, "print('the crash that matters'); raise SystemExit(3)", ENDS, WAITS)

    def use(engine: EngineProcess) -> None:
        if len(plans.changes) < 3:
            until_its_end(engine)

    own.live(plans.plan, plans.start, use)
    assert (folder / "engine.log.first").read_text() == "the crash that matters\n"
    first = record(folder).first_exit
    assert first
    assert first.last_lines == ("the crash that matters",)


def test_an_interrupt_while_it_waits_for_a_restart_is_the_end(folder: Path) -> None:
    own = supervisor(restarts=True)
    plans = Plans(own, ENDS)

    def change(_: Instance, after: Instance) -> None:
        if after.state is State.RESTARTING:
            # From a thread, so that it comes while the main one waits.
            threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()

    own._on_change = change
    with pytest.raises(KeyboardInterrupt):
        own.live(plans.plan, plans.start, until_its_end)
    assert record(folder).state is State.STOPPED


def test_a_record_that_cannot_be_written_ends_a_start_but_no_engine_that_serves(folder: Path) -> None:
    blocker = folder / f"{registry.RECORD}.new"
    blocker.mkdir()
    own = supervisor()
    with pytest.raises(Missing, match="cannot be written"):
        own.live(Plans(own, WAITS).plan, Plans(own).start, until_its_end)
    blocker.rmdir()

    own = supervisor()
    plans = Plans(own, WAITS)
    own.live(plans.plan, plans.start, lambda _: blocker.mkdir())
    assert (own.instance.state, record(folder).state) == (State.STOPPED, State.READY)


UNEXPECTED = [
    pytest.param(ValueError("surprise"), State.FAILED, "bug", 70, id="a bug"),
    pytest.param(PermissionError(errno.EACCES, "no"), State.FAILED, "os-error", 70, id="what the system refuses"),
    pytest.param(OSError(errno.EIO, "disk"), State.FAILED, "os-error", 70, id="a broken disk"),
    pytest.param(BrokenPipeError(errno.EPIPE, "gone"), State.STOPPED, "asked", None, id="nobody reads any more"),
    pytest.param(KeyboardInterrupt(), State.STOPPED, "asked", None, id="Ctrl-C"),
    pytest.param(SystemExit(1), State.STOPPED, "asked", None, id="an exit"),
]
SHORT = [
    pytest.param(OSError(errno.ENOMEM, "memory"), "no-resources", id="no memory"),
    pytest.param(BlockingIOError(errno.EAGAIN, "again"), "no-resources", id="no process"),
    pytest.param(RuntimeError("can't start new thread"), "no-resources", id="no thread"),
    pytest.param(OSError(errno.ENOSPC, "room"), "disk-full", id="no room"),
]
PLACES = ("plan", "start", "use")


def live_until(problem: BaseException, where: str, own: Supervisor, plans: Plans) -> None:
    """Live, and meet with the problem at the first time that somebody comes to `where`."""
    met: list[str] = []

    def meet(place: str) -> None:
        if place == where and not met:
            met.append(place)
            raise problem

    def plan(settings: Settings) -> str:
        meet("plan")
        return plans.plan(settings)

    @contextlib.contextmanager
    def start(program: str) -> Iterator[EngineProcess]:
        meet("start")
        with plans.start(program) as engine:
            yield engine

    own.live(plan, start, lambda _: meet("use"))


@pytest.mark.parametrize("restarts", [pytest.param(False, id="left alone"), pytest.param(True, id="restarting")])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(("problem", "state", "cause", "exit_code"), UNEXPECTED)
def test_what_nobody_expected_is_a_failure_and_no_stop(
    folder: Path, problem: BaseException, where: str, restarts: bool, state: State, cause: str, exit_code: int | None
) -> None:
    own = supervisor(restarts=restarts)
    with pytest.raises(type(problem)) as raised:
        live_until(problem, where, own, Plans(own, WAITS, WAITS))
    assert raised.value is problem
    found = record(folder)
    assert (found.state, found.exit and found.exit.cause, found.exit_code) == (state, cause, exit_code)
    assert (found.engine, found.restarts) == (None, 0)
    if state is State.FAILED:
        told = error_of(found)
        assert (type(told), told.code, told.exit_code) == (MgpuError, cause, 70)
        assert str(problem) in told.message


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(("problem", "code"), SHORT)
def test_a_shortage_is_the_end_of_what_never_worked_and_waited_out_by_what_did(
    folder: Path, problem: BaseException, code: str, where: str
) -> None:
    own = supervisor(restarts=True)
    own.instance = replace(own.instance, ready_at="2026-01-01T00:00:00Z")
    live_until(problem, where, own, Plans(own, WAITS, WAITS))
    assert (record(folder).state, record(folder).restarts) == (State.STOPPED, 1)

    own = supervisor(restarts=True)
    if where != "use":  # by then it has worked
        with pytest.raises(Missing) as raised:
            live_until(problem, where, own, Plans(own, WAITS))
        assert (raised.value.code, record(folder).state, record(folder).exit_code) == (code, State.FAILED, 3)


def test_a_full_disk_keeps_no_engine_from_coming_back(folder: Path) -> None:
    own = supervisor(restarts=True)
    plans = Plans(own, ENDS, WAITS)

    def full(*_: Instance) -> None:
        raise OSError(errno.ENOSPC, "no room for a line")

    own._on_change = full

    def use(engine: EngineProcess) -> None:
        if len(plans.changes) == 1:
            for name in (registry.RECORD, registry.ENGINE):
                (folder / f"{name}.new").mkdir()  # nothing can be written from now on
            until_its_end(engine)
        for name in (registry.RECORD, registry.ENGINE):
            (folder / f"{name}.new").rmdir()

    own.live(plans.plan, plans.start, use)
    assert (record(folder).restarts, record(folder).state) == (1, State.STOPPED)


def test_the_service_manager_hears_what_becomes_of_it(folder: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(str(tmp_path / "notify"))
        own = supervisor(service=ServiceManager(str(tmp_path / "notify"), watchdog_s=0.01))
        plans = Plans(own, WAITS)
        own.live(plans.plan, plans.start, lambda _: own.kept_alive(lambda: None))
        heard = []
        ear.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                heard.append(ear.recv(65536).decode().split("\n")[0])
    words = [word for word in heard if word != "WATCHDOG=1"]
    assert words[0] == "READY=1"
    assert words[1] == "STOPPING=1"
    assert "WATCHDOG=1" in heard


def test_the_service_manager_is_asked_for_the_time_that_answers_have(folder: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(str(tmp_path / "notify"))
        own = supervisor(service=ServiceManager(str(tmp_path / "notify")))
        plans = Plans(own, WAITS)

        def use(_: EngineProcess) -> None:
            own.ending(None, 300.0)
            for answers, left_s in ((2, 299.0), (2, 298.0), (1, 200.0), (1, 0.0)):
                own.report(Draining(answers=answers, left_s=left_s))

        own.live(plans.plan, plans.start, use)
        ear.setblocking(False)
        heard = []
        with contextlib.suppress(BlockingIOError):
            while True:
                heard.append(ear.recv(65536).decode().split("\n"))
    asked = [message[1:] for message in heard if message[0] == "STOPPING=1"]
    assert [(status.removeprefix("STATUS=llama"), int(time.removesuffix("000000")[20:])) for status, time in asked] == [
        (" is stopping", 360),
        (": 2 answers are being given", 359),
        (": 1 answer is being given", 260),
        (": 1 answer was cut off", 60),
        (" is stopped", 60),
    ]


class Stuck:
    """A link to an engine whose counters stand still with a request in it; `answer` is what comes of a question."""

    port = 1

    def __init__(self, answer: Callable[[], Canary]) -> None:
        self._answer = answer

    def is_up(self) -> bool:
        return True

    def sample(self) -> Sample:
        return Sample(at=0.0, running=1, waiting=0, generation_tokens_total=7.0)

    def canary(self, prompt: str = "", *, patience_s: float | None = None) -> Canary:
        return self._answer()

    def ask(self, text: str, *, max_tokens: int | None = None) -> Iterator[str | Answer]:
        raise NotImplementedError


def never() -> Canary:
    raise EngineFailed("no answer", code="no-answer")


def garbage() -> Canary:
    return Canary(text="!!!!!!!!", seconds=0.1, generation_tok_s=9.0)


@pytest.mark.parametrize(
    ("answer", "code"), [pytest.param(never, "hung", id="no answer"), pytest.param(garbage, "garbage", id="garbage")]
)
def test_an_engine_that_is_no_good_is_ended(folder: Path, answer: Callable[[], Canary], code: str) -> None:
    own = supervisor()
    plans = Plans(own, WAITS)

    def use(_: EngineProcess) -> None:
        follow(
            own,
            BACKEND,
            Stuck(answer),
            lambda _, __: None,
            every_s=0.02,
            canary=GOOD,
            cards=dict,
            patience=Patience(still_s=0.1, answer_s=0.2, queued_answer_s=0.2),
        )

    with pytest.raises(GivenUp) as raised:
        own.live(plans.plan, plans.start, use)
    found = record(folder)
    assert (raised.value.code, found.state, found.exit and found.exit.cause) == (code, State.FAILED, code)
    assert found.engine is None
    assert isinstance(raised.value.failure, Failure)


def test_an_engine_that_still_answers_is_left_alone_until_it_ends(folder: Path) -> None:
    own = supervisor()
    asked = folder.parent / "asked"
    plans = Plans(own, f"import os, time\nwhile not os.path.exists({str(asked)!r}): time.sleep(0.01)")

    def answer() -> Canary:
        asked.touch()
        return GOOD

    with pytest.raises(EngineFailed) as raised:
        own.live(
            plans.plan,
            plans.start,
            lambda _: follow(
                own,
                BACKEND,
                Stuck(answer),
                lambda _, __: None,
                every_s=0.02,
                canary=GOOD,
                cards=dict,
                patience=Patience(still_s=0.1, answer_s=30),
            ),
        )
    assert raised.value.code == "exited"
    assert asked.exists()


class Idle(Stuck):
    """A link to an engine that nobody wants anything of; each look is counted, and costs the engine a line."""

    def __init__(self) -> None:
        super().__init__(never)
        self.looks = 0

    def sample(self) -> Sample:
        self.looks += 1
        return Sample(at=time.monotonic(), running=0, waiting=0, prompt_tokens_total=7.0, generation_tokens_total=7.0)


@pytest.mark.parametrize(
    ("program", "often"),
    [
        pytest.param("open({enough!r}).read()", False, id="one that waits"),
        pytest.param("import os\nwhile os.path.exists({enough!r}): pass", True, id="one that works"),
    ],
)
def test_an_idle_engine_is_asked_for_its_counters_only_when_it_has_worked(
    folder: Path, program: str, often: bool
) -> None:
    own = supervisor()
    enough = folder.parent / "enough"
    os.mkfifo(enough)
    plans = Plans(own, program.format(enough=str(enough)))
    link, shown = Idle(), list[Sample | None]()

    def show(sample: Sample | None, _: object) -> None:
        shown.append(sample)
        if len(shown) == 40 and not often:
            os.close(os.open(enough, os.O_WRONLY))
        if often and (link.looks >= 20 or len(shown) >= 1000):
            enough.unlink(missing_ok=True)

    def use(_: EngineProcess) -> None:
        follow(own, BACKEND, link, show, every_s=0.02, canary=GOOD, cards=dict)

    with pytest.raises(EngineFailed):
        own.live(plans.plan, plans.start, use)
    assert (link.looks >= 20) == often
    assert link.looks < 10 or often


def test_what_an_engine_says_of_mgpus_own_looks_is_not_its_last_words(folder: Path) -> None:
    lines = ["what matters", *["0.01 I srv  update_slots: all slots are idle"] * 30]
    own = supervisor()
    plans = Plans(own, f"print({chr(10).join(lines)!r}); raise SystemExit(3)")
    with pytest.raises(EngineFailed):
        own.live(plans.plan, plans.start, until_its_end)
    found = record(folder).exit
    assert found
    assert found.last_lines == ("what matters",)


def test_an_interrupt_waits_until_what_is_held_is_done() -> None:
    interrupts = Interrupts()
    done = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012  where it is raised is what is tested
        with interrupts.held():
            interrupts()
            with interrupts.held():
                done.append("inner")
            done.append("outer")
        done.append("never")
    assert done == ["inner", "outer"]


def test_signals_that_come_together_are_one_interrupt() -> None:
    interrupts = Interrupts()
    with pytest.raises(KeyboardInterrupt):
        interrupts()
    interrupts()
