"""`mgpu run -d`: ready or the failure, then it lives on by itself; it recovers, and ends without leftovers."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from mgpu.running.instance import Instance, State
from mgpu.running.registry import Entry, read
from tests.fakes.devices import free_port

from .program import ROOT, Mgpu, request, until

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
    log = log_of(mgpu).splitlines()
    assert not [line for line in log if not re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ ", line)], log
    assert {"ready:", "stop"} <= {line.split()[2] for line in log}


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_before_it_is_ready_stops_it(mgpu: Mgpu, tiny: Path, number: signal.Signals) -> None:
    running = mgpu.start("run", tiny, "-d", FAKE_FAIL="hang-loading")
    running.line("start ")
    ended = running.end(number)
    assert ended.exit_code == 130
    assert "stop     tiny … stopped before it was ready, in " in ended.err
    mgpu.assert_nothing_left()
    assert record(mgpu).state is State.STOPPED


def test_an_interrupt_before_the_supervisor_hears_of_any_leaves_no_corpse(
    mgpu: Mgpu, tiny: Path, tmp_path: Path
) -> None:
    up = tmp_path / "up"
    slow = f"if '--supervise' in sys.orig_argv: pathlib.Path({str(up)!r}).touch(); time.sleep(600)"
    (tmp_path / "sitecustomize.py").write_text(f"import pathlib, sys, time\n{slow}\n")
    running = mgpu.start("run", tiny, "-d", PYTHONPATH=f"{tmp_path}:{ROOT}")
    until(up.exists, "the supervisor is there, and has not begun")
    assert entry(mgpu).instance
    assert running.end(signal.SIGINT).exit_code == 130
    assert mgpu("ps", "--all", "--json").json["data"]["instances"] == []
    mgpu.assert_nothing_left()


def test_a_terminal_that_is_closed_while_it_starts_does_not_end_it(mgpu: Mgpu, tiny: Path) -> None:
    running = mgpu.start("run", tiny, "-d", FAKE_FAIL="slow-load:0.5")
    running.line("start ")
    assert running.end(signal.SIGHUP).exit_code == 130
    until(lambda: record(mgpu).state is State.READY, "it becomes ready all the same")
    stop(mgpu)


@pytest.mark.parametrize("spoilt", ["supervisor.log", "supervisor.log.1"])
def test_a_supervisor_log_that_cannot_be_written_leaves_no_instance(mgpu: Mgpu, tiny: Path, spoilt: str) -> None:
    log = mgpu.state / "tiny" / "supervisor.log"
    log.parent.mkdir(parents=True)
    log.write_text("of the run before")
    if log.name == spoilt:
        log.unlink()
        log.mkdir()
        log.with_name("supervisor.log.1").touch()  # by which the folder cannot be replaced
    else:
        log.with_name(spoilt).mkdir()
    ended = mgpu("run", tiny, "-d", "--json")
    assert (ended.exit_code, ended.json["errors"][0]["code"]) == (3, "state-folder")
    assert mgpu("ps", "--json").json["data"]["instances"] == []


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


def test_its_port_is_its_own_until_it_is_ready_again(mgpu: Mgpu, tiny: Path) -> None:
    port = free_port()
    mgpu("run", tiny, "-d", "--port", port)
    before = record(mgpu)
    assert before.engine
    mgpu.kill(before.engine.pid)
    other = mgpu("run", tiny, "-d", "--name", "other", "--port", port, "--json")
    assert (other.exit_code, other.json["errors"][0]["code"]) == (3, "port-in-use")
    until(lambda: record(mgpu).restarts == 1 and record(mgpu).state is State.READY, "it is ready again")
    assert record(mgpu).url == before.url
    stop(mgpu)


def test_when_it_died_is_known_though_it_had_written_nothing_for_long(mgpu: Mgpu, tiny: Path) -> None:
    mgpu("run", tiny, "-d")
    folder = mgpu.state / "tiny"
    mgpu.kill(record(mgpu).supervisor.pid, signal.SIGSTOP)
    for file in ("instance.json", "engine.log", "supervisor.log"):
        os.utime(folder / file, (0, 0))
    before = time.time()
    mgpu.kill(record(mgpu).supervisor.pid)
    mgpu.assert_nothing_left()
    (found,) = mgpu("ps", "--json").json["data"]["instances"]
    assert found["exit"]["cause"] == "supervisor-died"
    assert datetime.fromisoformat(found["exit"]["at"]).timestamp() >= int(before)


@pytest.mark.parametrize(
    ("key", "reach"),
    [
        pytest.param(None, "open to all networks without a key", id="without a key"),
        pytest.param("secret", "open to all networks", id="with a key"),
    ],
)
def test_what_all_networks_can_use_is_said_to_be_so(mgpu: Mgpu, tiny: Path, key: str | None, reach: str) -> None:
    words = ("--host", "0.0.0.0", *(() if key else ("--insecure",)))
    assert f", {reach})\n" in mgpu("run", tiny, "-d", *words, MGPU_API_KEY=key).out
    assert " *:" in mgpu("ps").out
    stop(mgpu)


def test_that_nobody_can_be_told_that_it_is_ready_does_not_end_it(mgpu: Mgpu, tiny: Path) -> None:
    with Path("/dev/full").open("w") as full:
        told = subprocess.run(
            mgpu.command("run", tiny, "-d"),
            cwd=mgpu.here,
            env=mgpu.with_variables(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert told.returncode == 3
    assert "tiny is ready and goes on" in told.stderr
    assert "mgpu stop tiny" in told.stderr
    assert record(mgpu).state is State.READY
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


@pytest.mark.parametrize("how", ["a file", "a pipe", "a variable"])
def test_a_key_is_in_no_command_line_and_no_file(mgpu: Mgpu, tiny: Path, tmp_path: Path, how: str) -> None:
    file = tmp_path / "key"
    if how == "a pipe":  # which can be read once
        os.mkfifo(file)
        threading.Thread(target=file.write_text, args=[SECRET], daemon=True).start()
    else:
        file.write_text(SECRET)
    if how == "a variable":
        ended = mgpu("run", tiny, "-d", MGPU_API_KEY=SECRET)
    else:
        ended = mgpu("run", tiny, "-d", "--api-key-file", file)
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
    until(lambda: (found := entry(mgpu, "first").instance) and found.gpus, "its claim is written down")
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
