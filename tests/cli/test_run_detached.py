"""`mgpu run -d`: ready or the failure, then it lives on by itself; it recovers, and ends without leftovers."""

from __future__ import annotations

import json
import re
import signal
import stat
from pathlib import Path
from typing import Any

import pytest

from mgpu.running.instance import Instance, State
from mgpu.running.registry import Entry, read
from tests.fakes.devices import free_port

from .program import Mgpu, request, until

TWO_CARDS = (
    "CUDA0: NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free); "
    "CUDA1: NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free)"
)
SECRET = "a-key-that-nobody-else-may-see"


def entry(mgpu: Mgpu, name: str = "tiny") -> Entry:
    return read(mgpu.state / name)


def record(mgpu: Mgpu, name: str = "tiny") -> Instance:
    instance = entry(mgpu, name).instance
    assert instance, (mgpu.state / name, list(mgpu.state.glob("*/*")))
    return instance


def stop(mgpu: Mgpu, name: str = "tiny") -> Instance:
    mgpu.kill(record(mgpu, name).supervisor.pid, signal.SIGTERM)
    mgpu.assert_nothing_left()
    return record(mgpu, name)


def log_of(mgpu: Mgpu) -> str:
    return (mgpu.state / "tiny" / "supervisor.log").read_text()


def error_lines(text: str) -> list[str]:
    """What was said of an error, without what differs from one run to another."""
    lines = [line for line in text.splitlines() if re.match(r"error |next |log ", line)]
    return [re.sub(r"[0-9.]+ s\b", "N s", line) for line in lines]


def test_it_returns_when_it_is_ready_and_goes_on(mgpu: Mgpu, tiny: Path) -> None:
    ended = mgpu("run", tiny, "-d", "--interval", "0.1")
    assert ended.exit_code == 0
    ready = re.fullmatch(r"ready: tiny on (http://\S+)/v1  \(llama\.cpp, CPU, pid (\d+), .* s\)\n", ended.out)
    assert ready, ended
    assert re.findall(r"(?m)^(logs|stop) +(mgpu .*)$", ended.err) == [
        ("logs", "mgpu logs tiny -f"),
        ("stop", "mgpu stop tiny"),
    ]
    found = record(mgpu)
    assert (found.state, found.url, found.engine and found.engine.pid) == (State.READY, ready[1], int(ready[2]))
    assert found.command[:5] == ("mgpu", "run", str(tiny), "--name", "tiny")
    assert request(ready[1], "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})[0] == 200
    until(lambda: record(mgpu).rate is not None, "its rate is written down")
    (supervisor,) = {pid for pid in mgpu.processes() if pid == found.supervisor.pid}
    assert Path(f"/proc/{supervisor}/stat").read_text().rpartition(")")[2].split()[3] == str(supervisor)  # its session
    assert entry(mgpu).supervisor == found.supervisor
    for path in (mgpu.state / "tiny").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) in (0o600, 0o700), path
    after = stop(mgpu)
    assert (after.state, after.exit and after.exit.cause) == (State.STOPPED, "asked")


def test_one_json_object(mgpu: Mgpu, tiny: Path) -> None:
    answer = mgpu("run", tiny, "-d", "--json", FAKE_FAIL="repeat-token").json
    data: dict[str, Any] = answer["data"]
    assert [warning for warning in answer["warnings"] if "repeats one token" in warning]
    found = record(mgpu)
    assert (data["state"], data["url"], data["pid"]) == ("ready", found.url, found.engine and found.engine.pid)
    stop(mgpu)


@pytest.mark.parametrize(
    ("words", "environment", "code"),
    [
        pytest.param((), {"FAKE_FAIL": "bad-arch"}, 4, id="an unknown architecture"),
        pytest.param((), {"FAKE_FAIL": "segv"}, 4, id="a crash at the start"),
        pytest.param(("--stall-timeout", "1"), {"FAKE_FAIL": "hang-loading"}, 4, id="a load that hangs"),
        pytest.param(("--gpus", "3"), {}, 3, id="cards that are not there"),
        pytest.param(("--ctx", "many"), {}, 2, id="a wrong option"),
        pytest.param(("--ctx", "900k"), {"FAKE_DEVICES": "CUDA0: RTX 4090 (24081 MiB, 900 MiB free)"}, 1, id="no room"),
    ],
)
def test_a_failure_is_told_as_the_foreground_tells_it(
    mgpu: Mgpu, tiny: Path, words: tuple[str, ...], environment: dict[str, str], code: int
) -> None:
    foreground = mgpu("run", tiny, *words, **environment)
    detached = mgpu("run", tiny, *words, "-d", **environment)
    assert (foreground.exit_code, detached.exit_code, detached.out) == (code, code, "")
    assert error_lines(detached.err) == error_lines(foreground.err)
    assert error_lines(detached.err)
    mgpu.assert_nothing_left()
    if code == 4:
        assert (record(mgpu).state, record(mgpu).exit_code) == (State.FAILED, 4)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_before_it_is_ready_stops_it(mgpu: Mgpu, tiny: Path, number: signal.Signals) -> None:
    running = mgpu.start("run", tiny, "-d", FAKE_FAIL="hang-loading")
    running.line("start ")
    assert running.end(number).exit_code == 130
    mgpu.assert_nothing_left()
    assert record(mgpu).state is State.STOPPED


def test_who_waits_for_it_may_be_killed(mgpu: Mgpu, tiny: Path) -> None:
    running = mgpu.start("run", tiny, "-d", FAKE_FAIL="slow-load:0.5")
    running.line("start ")
    running.process.kill()
    until(lambda: record(mgpu).state is State.READY, "it becomes ready all the same")
    stop(mgpu)


def test_a_closed_terminal_does_not_end_it(mgpu: Mgpu, tiny: Path) -> None:
    mgpu("run", tiny, "-d")
    before = record(mgpu)
    mgpu.kill(before.supervisor.pid, signal.SIGHUP)
    assert before.engine
    mgpu.kill(before.engine.pid)  # it notices
    until(lambda: record(mgpu).restarts == 1 and record(mgpu).state is State.READY, "it is ready again")
    stop(mgpu)


def test_a_crash_is_recovered_at_the_same_address(mgpu: Mgpu, tiny: Path) -> None:
    mgpu("run", tiny, "-d", "--port", free_port())
    before = record(mgpu)
    assert before.engine
    mgpu.kill(before.engine.pid)
    until(lambda: record(mgpu).restarts == 1 and record(mgpu).state is State.READY, "it is ready again")
    after = record(mgpu)
    assert (after.url, after.changes, after.supervisor) == (before.url, (), before.supervisor)
    assert after.engine != before.engine
    assert after.exit
    assert (after.exit.signal, after.exit.cause) == (9, "killed")
    assert re.search(r"(?m)^\d{4}-\S+ \S+Z restart  in 1.* s, after: .*SIGKILL", log_of(mgpu))
    stop(mgpu)


def test_without_restarts_a_crash_is_the_end(mgpu: Mgpu, tiny: Path) -> None:
    mgpu("run", tiny, "-d", "--restart", "no")
    engine = record(mgpu).engine
    assert engine
    mgpu.kill(engine.pid)
    mgpu.assert_nothing_left()
    after = record(mgpu)
    assert (after.state, after.restarts, after.exit and after.exit.signal) == (State.FAILED, 0, 9)
    assert "error " in log_of(mgpu)


@pytest.mark.parametrize(
    ("words", "setting"), [pytest.param((), "--ctx", id="context"), pytest.param(("--ctx", "4k"), "--kv-type", id="KV")]
)
def test_memory_that_is_refused_at_the_start_is_asked_for_in_smaller_pieces(
    mgpu: Mgpu, tiny: Path, tmp_path: Path, words: tuple[str, ...], setting: str
) -> None:
    once = {"FAKE_FAIL": "oom-kv", "FAKE_FAIL_STARTS": f"1:{tmp_path / 'starts'}", "FAKE_DEVICES": TWO_CARDS}
    ended = mgpu("run", tiny, "-d", *words, **once)
    assert ended.exit_code == 0
    found = record(mgpu)
    (change,) = found.changes
    assert (change.setting, change.cause, found.restarts) == (setting, "out-of-memory", 1)
    assert found.setup
    assert str(found.setup.ctx_tokens if setting == "--ctx" else found.setup.kv_type) == change.value
    for said in (ended.err, log_of(mgpu)):
        assert re.search(rf"(?m)change   {setting} {change.value} instead of {change.before}", said), said
    stop(mgpu)


def test_what_was_typed_is_not_changed_and_the_fix_is_a_command(mgpu: Mgpu, tiny: Path) -> None:
    words = ("--ctx", "4096", "--kv-type", "f16", "--gpus", "gpu0")
    ended = mgpu("run", tiny, "-d", *words, FAKE_FAIL="oom-kv", FAKE_DEVICES=TWO_CARDS)
    assert ended.exit_code == 4
    assert re.search(rf"(?m)^next +mgpu run {tiny} .*--ctx 2048$", ended.err), ended
    assert record(mgpu).changes == ()
    mgpu.assert_nothing_left()


def test_the_foreground_recovers_when_it_is_asked_to(mgpu: Mgpu, tiny: Path) -> None:
    running = mgpu.start("run", tiny, "--restart", "on-failure", "--json")
    mgpu.kill(running.engine_pid())
    running.event("restarting")
    until(lambda: running.out.count('"event": "ready"') == 2, "it is ready again")
    assert running.end(signal.SIGINT).exit_code == 130
    mgpu.assert_nothing_left()


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("-d", "--ask", "Hello"), id="a question and -d"),
        pytest.param(("--restart", "on-failure", "--ask", "Hello"), id="a question and restarts"),
        pytest.param(("-d", "--restart", "always"), id="a policy that is none"),
    ],
)
def test_what_makes_no_sense_together(mgpu: Mgpu, tiny: Path, words: tuple[str, ...]) -> None:
    assert mgpu("run", tiny, *words).exit_code == 2
    assert not list(mgpu.state.glob("*"))


def test_the_engine_ends_with_a_supervisor_that_is_killed_and_the_record_tells_who_it_was(
    mgpu: Mgpu, tiny: Path
) -> None:
    mgpu("run", tiny, "-d")
    before = record(mgpu)
    mgpu.kill(before.supervisor.pid)
    mgpu.assert_nothing_left()
    after = entry(mgpu)
    assert after.instance
    assert (after.is_over, after.instance.state, after.instance.engine) == (True, State.READY, before.engine)


def test_a_key_is_in_no_command_line_and_no_file(mgpu: Mgpu, tiny: Path) -> None:
    ended = mgpu("run", tiny, "-d", "--api-key", SECRET)
    url = record(mgpu).url
    assert url
    assert request(url, "/v1/models", key=SECRET)[0] == 200
    assert request(url, "/v1/chat/completions", {"messages": []})[0] == 401
    for pid in mgpu.processes():
        assert SECRET.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    stop(mgpu)
    assert SECRET not in ended.out + ended.err
    assert not any(SECRET.encode() in path.read_bytes() for path in mgpu.state.rglob("*") if path.is_file())


def test_two_of_one_model_get_names_and_ports_of_their_own(mgpu: Mgpu, tiny: Path) -> None:
    both = [mgpu.start("run", tiny, "-d") for _ in range(2)]
    assert [running.end().exit_code for running in both] == [0, 0]
    assert record(mgpu, "tiny").url != record(mgpu, "tiny-2").url
    for name in ("tiny", "tiny-2"):
        mgpu.kill(record(mgpu, name).supervisor.pid, signal.SIGTERM)
    mgpu.assert_nothing_left()


def test_cards_that_one_is_about_to_fill_are_not_planned_with_by_another(mgpu: Mgpu, tiny: Path) -> None:
    """Both want one card. The driver would call both cards free: the first engine has not taken anything yet."""
    cards = {"FAKE_DEVICES": TWO_CARDS, "FAKE_FAIL": "slow-load:3"}
    words = ("run", tiny, "--gpus", "1", "--ctx", "100k", "--json", "--name")
    first = mgpu.start(*words, "first", **cards)
    first.event("planned")
    until(lambda: bool(record(mgpu, "first").gpus), "its claim is written down")
    second = mgpu.start(*words, "second", **cards)
    second.event("started")
    assert [share.index for share in record(mgpu, "first").gpus] != [
        share.index for share in record(mgpu, "second").gpus
    ]
    for running in (first, second):
        assert running.end(signal.SIGINT).exit_code == 130
    mgpu.assert_nothing_left()


def test_the_record_is_json_that_others_can_read(mgpu: Mgpu, tiny: Path) -> None:
    mgpu("run", tiny, "-d")
    data = json.loads((mgpu.state / "tiny" / "instance.json").read_text())
    assert {"name", "state", "backend", "url", "pid", "gpus", "rate", "restarts", "exit", "argv"} <= data.keys()
    stop(mgpu)
