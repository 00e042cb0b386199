"""`mgpu stop`: the supervisor is asked, waited for, and nobody else is touched."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from mgpu.running.instance import GpuShare, State
from mgpu.running.registry import read

from .contract import STOP, checked
from .program import ROOT, Mgpu, request, until
from .records import engine, go, is_alive, record, reused, sleeper, supervisor, who
from .test_contract import TWO_CARDS
from .test_ps import GIB, with_rig
from .two_cards import UUIDS


def test_a_run_elsewhere_is_stopped(mgpu: Mgpu, tiny: Path) -> None:
    running = mgpu.start("run", tiny, FAKE_DEVICES=TWO_CARDS)
    running.url()
    ended = mgpu("stop", "tiny")
    assert ended.exit_code == 0
    assert ended.out.startswith("tiny stopped in ")
    assert ended.out.endswith(" of RAM given back\n")
    assert running.end().exit_code == 130
    mgpu.assert_nothing_left()


def test_a_detached_instance_is_stopped_and_stays_listed_as_that(mgpu: Mgpu, tiny: Path) -> None:
    assert mgpu("run", "-d", tiny, FAKE_DEVICES=TWO_CARDS).exit_code == 0
    data = checked(mgpu("stop", "--all", "--json").json, "stop", STOP)
    assert [(each["name"], each["result"]) for each in data["instances"]] == [("tiny", "stopped")]
    assert data["freed_ram_bytes"] > 0
    mgpu.assert_nothing_left()
    again = mgpu("stop", "tiny")
    assert (again.exit_code, again.out) == (1, "")
    assert "tiny is not running" in again.err
    assert mgpu("stop", "--all").exit_code == 0


def test_what_the_cards_got_back_is_measured(mgpu: Mgpu, nvml: Mapping[str, Path], tmp_path: Path) -> None:
    rig = with_rig(mgpu, nvml, tmp_path, f"gpu1.mem.used = {9 * GIB}")
    shares = tuple(GpuShare(uuid=uuid, index=index, planned_bytes=GIB) for index, uuid in enumerate(UUIDS))
    with supervisor(mgpu, "llama", gpus=shares) as folder:
        freed = rig.read_text() + f"gpu1.mem.used = {2 * GIB}\n"
        go(
            folder,
            f"Path({str(rig)!r} + '.new').write_text({freed!r}); os.replace({str(rig)!r} + '.new', {str(rig)!r})",
        )
        data = checked(mgpu("stop", "llama", "--json").json, "stop", STOP)
        assert data["freed"] == [{"index": 1, "bytes": 7 * GIB}]


@pytest.mark.parametrize(("words", "heard"), [((), "None"), (("--grace", "2.5"), "2.5"), (("--grace", "0"), "0.0")])
def test_the_grace_reaches_the_supervisor(mgpu: Mgpu, words: tuple[str, ...], heard: str) -> None:
    with supervisor(mgpu, "llama") as folder:
        go(folder)
        assert mgpu("stop", "llama", *words).exit_code == 0
        assert (folder / "heard").read_text() == heard


def test_a_wish_is_for_one_supervisor_alone(mgpu: Mgpu) -> None:
    with supervisor(mgpu, "llama") as folder:
        (folder / "stop").write_text(f"9.0 {os.getpid()} 1\n")  # left from a stop of somebody before
        go(folder)
        assert mgpu("stop", "llama").exit_code == 0
        assert (folder / "heard").read_text() == "None"


def test_ctrl_c_while_waiting_leaves_the_stop_to_go_on(mgpu: Mgpu) -> None:
    with supervisor(mgpu, "llama") as folder:
        running = mgpu.start("stop", "llama")
        until((folder / "heard").exists, "the supervisor was asked")
        ended = running.end(signal.SIGINT)
        assert ended.exit_code == 130
        assert "the stop goes on" in ended.err
        go(folder)
        until(lambda: read(folder).is_over, "it has gone on")


def test_several_are_stopped_at_once(mgpu: Mgpu) -> None:
    with supervisor(mgpu, "one") as one, supervisor(mgpu, "two") as two:
        running = mgpu.start("stop", "one", "two")
        # Each is asked before any is waited for.
        until(lambda: (one / "heard").exists() and (two / "heard").exists(), "both are asked")
        go(one)
        go(two)
        ended = running.end()
        assert (ended.exit_code, [line.split()[0] for line in ended.out.splitlines()]) == (0, ["one", "two"])


def test_an_orphan_is_left_to_reap(mgpu: Mgpu) -> None:
    with engine(mgpu, "llama") as process:
        ended = mgpu("stop", "llama", "--json")
        error = ended.json["errors"][0]
        assert (ended.exit_code, error["code"], error["hint"]) == (1, "orphaned", "mgpu reap")
        assert is_alive(process.pid)


def test_a_number_that_somebody_else_has_now_is_not_signalled(mgpu: Mgpu) -> None:
    with sleeper(mgpu) as other:
        record("llama", reused(other.pid), engine=reused(other.pid), group=other.pid)
        assert mgpu("stop", "llama", "--json").json["errors"][0]["code"] == "not-running"
        assert mgpu("stop", "llama", "--force", "--json").json["errors"][0]["code"] == "not-running"


@pytest.mark.parametrize("words", [("--all",), ("llama",), ("llama", "--force")])
@pytest.mark.parametrize(
    "content", [pytest.param(None, id="none"), pytest.param("damaged", id="damaged"), pytest.param("whole", id="whole")]
)
def test_who_holds_the_lock_of_a_dead_one_for_a_moment_is_not_signalled(
    mgpu: Mgpu, content: str | None, words: tuple[str, ...]
) -> None:
    folder = record("llama")
    (folder / "engine.log").touch()
    if content != "whole":
        (folder / "instance.json").unlink()
        if content:
            (folder / "instance.json").write_text(content)
    with holding(mgpu, folder) as holder:
        mgpu("stop", *words)
        assert holder.poll() is None
        # It cannot be cleared meanwhile, and is nobody's.
        assert mgpu("ps", "--clear", "llama", "--json").json["errors"][0]["code"] == "instance-lives"
        assert mgpu("ps", "--clear-dead", "--json").json["data"]["forgotten"] == []


@contextlib.contextmanager
def holding(mgpu: Mgpu, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has the lock as whoever clears an instance has it."""
    script = (
        f"import time; from pathlib import Path; from mgpu.running.registry import locked\n"
        f"with locked(Path({str(folder)!r})): print(flush=True); time.sleep(600)"
    )
    environment = mgpu.environment | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=-1, env=environment, cwd="/") as holder:
        assert holder.stdout
        holder.stdout.readline()
        try:
            yield holder
        finally:
            holder.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_another_users_process_is_left_alone(mgpu: Mgpu) -> None:
    with sleeper(mgpu, user=65534) as other:
        record("llama", who(other.pid))
        ended = mgpu("stop", "llama", "--json")
        assert (ended.exit_code, ended.json["errors"][0]["code"]) == (1, "not-yours")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_another_users_record_is_unknown(mgpu: Mgpu) -> None:
    with sleeper(mgpu) as other:
        os.chown(record("llama", who(other.pid)), 65534, 65534)
        assert mgpu("stop", "llama").exit_code == 1
        assert mgpu("ps", "--json").json["data"]["instances"] == []


@pytest.mark.parametrize(
    ("words", "exit_code", "hint"),
    [
        pytest.param(("lama-8b",), 1, "mgpu stop llama-8b", id="a slip"),
        pytest.param(("llama-8b", "nobody"), 1, "mgpu stop llama-8b", id="one of two"),
        pytest.param(("../llama-8b",), 1, "mgpu stop llama-8b", id="a path"),
        pytest.param((), 2, "mgpu ps", id="nobody at all"),
        pytest.param(("llama-8b", "--all"), 2, "mgpu stop --all   or   mgpu stop llama-8b", id="a name and all"),
        pytest.param(("llama-8b", "--grace", "-1"), 2, "--help", id="less than no time"),
    ],
)
def test_who_is_not_known_is_said_before_anything_is_done(
    mgpu: Mgpu, words: tuple[str, ...], exit_code: int, hint: str
) -> None:
    with supervisor(mgpu, "llama-8b") as folder:
        ended = mgpu("stop", *words, "--json")
        assert ended.exit_code == exit_code
        assert hint in ended.json["errors"][0]["hint"]
        assert not (folder / "heard").exists()


def test_only_those_are_offered_that_run(mgpu: Mgpu) -> None:
    record("nope-1", state=State.FAILED)
    alone = mgpu("stop", "nope", "--json").json["errors"][0]
    assert (alone["message"], "nope-1" in alone["hint"]) == (
        "no instance is named 'nope', and nothing is running",
        False,
    )
    with supervisor(mgpu, "llama"):
        error = mgpu("stop", "llama", "nope", "--json").json["errors"][0]
    assert (error["message"], error["hint"]) == (
        "no instance is named 'nope': nothing was stopped",
        "mgpu stop llama",
    )


def test_of_one_that_was_forgotten_it_is_said_what_is_left(mgpu: Mgpu) -> None:
    folder = record("k5")
    (folder / "engine.log").touch()
    (folder / "instance.json").unlink()
    ended = mgpu("stop", "k5")
    assert (ended.exit_code, ended.out) == (1, "")
    for words in ("only its logs are left", "mgpu logs k5", "mgpu ps --clear k5"):
        assert words in ended.err


def test_the_dead_are_said_to_be_dead(mgpu: Mgpu) -> None:
    record("llama", state=State.FAILED)
    with supervisor(mgpu, "other") as other:
        go(other)
        ended = mgpu("stop", "llama", "other", "--json")
        data = checked(ended.json, "stop", STOP)
    error = ended.json["errors"][0]
    assert (ended.exit_code, error["code"]) == (1, "not-running")
    assert "mgpu ps --clear llama" in error["hint"]
    assert {each["name"]: each["result"] for each in data["instances"]} == {"llama": "over", "other": "stopped"}


def test_all_does_not_overlook_an_orphan(mgpu: Mgpu) -> None:
    with engine(mgpu, "llama") as process:
        ended = mgpu("stop", "--all", "--json")
        assert (ended.exit_code, ended.json["errors"][0]["code"]) == (1, "orphaned")
        assert is_alive(process.pid)


@pytest.mark.parametrize("with_reaper", [True, False])
def test_one_that_hangs_can_be_killed_and_its_engine_goes_with_it(mgpu: Mgpu, tiny: Path, with_reaper: bool) -> None:
    mgpu("run", "-d", tiny, FAKE_DEVICES=TWO_CARDS)
    (instance,) = mgpu("ps", "--json").json["data"]["instances"]
    mgpu.kill(instance["supervisor_pid"], signal.SIGSTOP)
    if not with_reaper:
        for pid in mgpu.processes():
            if b"reaper.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                mgpu.kill(pid)
    ended = mgpu("stop", "tiny", "--force", "--json")
    assert (ended.exit_code, checked(ended.json, "stop", STOP)["instances"][0]["result"]) == (0, "stopped")
    assert mgpu("ps", "--json").json["data"]["instances"][0]["state"] == "stopped"
    assert mgpu("reap").out.startswith("nothing to reap")
    mgpu.assert_nothing_left()


def test_an_engine_that_outlives_its_supervisor_is_said_at_once(mgpu: Mgpu) -> None:
    with (
        engine(mgpu, "llama") as process,
        supervisor(mgpu, "llama", engine=who(process.pid), group=process.pid) as folder,
    ):
        go(folder)
        ended = mgpu("stop", "llama", "--json")
        error = ended.json["errors"][0]
        assert (ended.exit_code, error["code"], error["hint"]) == (1, "orphaned", "mgpu reap")
        assert is_alive(process.pid)


@contextlib.contextmanager
def asking(url: str, tokens: int, *, stream: bool) -> Iterator[Callable[[], str]]:
    """Ask for so many tokens; yields what waits for the whole answer, which ends early where it is cut off."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    body = json.dumps({"messages": [{"role": "user", "content": "Go on"}], "max_tokens": tokens, "stream": stream})
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        until(lambda: '"is_processing":true' in request(url, "/slots")[1], "the engine works on it")
        yield lambda: b"".join(iter(lambda: connection.recv(65536), b"")).decode()


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize(
    ("stream", "grace", "whole"),
    [
        pytest.param(False, (), True, id="in one piece"),
        pytest.param(True, ("--grace", "60"), True, id="streamed"),
        pytest.param(True, ("--grace", "0.3"), False, id="longer than the grace"),
    ],
)
def test_answers_end_before_their_engine_is_told_to(
    mgpu: Mgpu, tiny: Path, detached: bool, stream: bool, grace: tuple[str, ...], whole: bool
) -> None:
    slow = {"FAKE_DEVICES": TWO_CARDS, "FAKE_FAIL": "talkative", "FAKE_TOKENS_PER_SECOND": "20"}
    running = mgpu.start("run", *(["-d"] if detached else []), tiny, **slow)
    with asking(running.url(), 40, stream=stream) as answer:
        ended = mgpu("stop", "tiny", *grace)
        assert ('"finish_reason":"length"' in answer().replace(" ", "")) is whole
    assert ended.exit_code == 0
    assert ("1 answer was cut off" in ended.out) is not whole
    if not detached:
        assert "1 answer is being given" in running.end().err
    mgpu.assert_nothing_left()
