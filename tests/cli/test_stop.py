"""`mgpu stop`: the supervisor is asked, waited for, and nobody else is touched."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

from mgpu.running.instance import GpuShare, State

from .contract import STOP, checked
from .program import Mgpu, until
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
    assert (again.exit_code, again.out, again.err) == (0, "", "tiny is not running\n")
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
        assert mgpu("stop", "llama").exit_code == 0


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
        ended = mgpu("stop", "llama")
        assert (ended.exit_code, ended.err) == (0, "llama is not running\n")


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
        pytest.param(("llama-8b", "--all"), 2, "mgpu ps", id="a name and all"),
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


def test_the_dead_are_said_to_be_dead(mgpu: Mgpu) -> None:
    record("llama", state=State.FAILED)
    ended = mgpu("stop", "llama")
    assert (ended.exit_code, ended.err) == (0, "llama is not running\n")
