"""`mgpu ps`: those that run, the dead until they are cleared, orphans, strangers and damaged records."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from mgpu.running import census
from mgpu.running.instance import Exit, GpuShare, Rate, State
from mgpu.running.recovery import Change
from mgpu.running.registry import read
from mgpu.running.state import state_folder

from .contract import PS, checked
from .program import Mgpu, until
from .records import NOBODY, engine, is_alive, record, reused, sleeper, supervisor, who
from .test_contract import TWO_CARDS
from .two_cards import UUIDS

RIG = Path(__file__).parents[1] / "machines" / "rigs" / "2x4090-x670e.txt"
GIB = 1 << 30
SHARES = tuple(GpuShare(uuid=uuid, index=index, planned_bytes=3 * GIB) for index, uuid in enumerate(UUIDS))
OUT_OF_MEMORY = Exit(
    code=None,
    signal=9,
    cause="out-of-memory",
    at="2026-01-02T03:07:05Z",
    last_lines=("before", "CUDA error: out of memory"),
    message="it ran out of memory on gpu1",
    hint="mgpu run coder --ctx 4096",
)


def with_rig(mgpu: Mgpu, nvml: Mapping[str, Path], folder: Path, *facts: str) -> Path:
    """Give the machine two cards, of which more may be said later."""
    rig = folder / "rig.txt"
    rig.write_text(RIG.read_text() + "\n".join(facts) + "\n")
    mgpu.environment |= {"LD_LIBRARY_PATH": str(nvml["new"]), "FAKE_NVML": str(rig)}
    return rig


def test_nothing_running_is_one_calm_sentence(mgpu: Mgpu) -> None:
    ended = mgpu("ps")
    assert (ended.exit_code, ended.err) == (0, "")
    assert ended.out == "nothing is running: mgpu run MODEL starts an engine\n"
    data = checked(mgpu("ps", "--json").json, "ps", PS)
    assert data == {"instances": [], "orphaned": [], "foreign": [], "cards": []}


def test_a_run_is_shown_with_what_was_planned_where_no_driver_tells(mgpu: Mgpu, tiny: Path) -> None:
    running = mgpu.start("run", tiny, FAKE_DEVICES=TWO_CARDS)
    url = running.url()
    out = mgpu("ps").out
    assert out.splitlines()[0].split() == [
        "NAME",
        "STATE",
        "ENGINE",
        "ENDPOINT",
        "GPU0",
        "GPU1",
        "TOK/S",
        "USERS",
        "UP",
    ]
    row = out.splitlines()[2].split()
    assert row[:4] == ["tiny", "ready", "llama.cpp", url.removeprefix("http://")]
    assert row[4].startswith("(0.")
    assert "in brackets are planned" in out
    (instance,) = checked(mgpu("ps", "--json").json, "ps", PS)["instances"]
    assert (instance["url"], instance["pid"], instance["exit"]) == (url, running.engine_pid(), None)
    assert instance["supervisor_pid"] == running.process.pid
    assert [share["actual_bytes"] for share in instance["gpus"]] == [None, None]
    assert "tiny ready" in mgpu().out
    running.end(signal.SIGINT)


def test_what_the_driver_says_is_shown_of_instances_and_of_others(
    mgpu: Mgpu, nvml: Mapping[str, Path], tmp_path: Path
) -> None:
    with engine(mgpu, "llama", gpus=SHARES, supervisor=who(os.getpid()), setup=None) as process:
        used = f"gpu0.compute = {process.pid}:{2 * GIB} 4711:{5 * GIB}"
        with_rig(mgpu, nvml, tmp_path, used, f"gpu1.compute = {process.pid}:-", f"gpu1.mem.used = {8 * GIB}")
        out = mgpu("ps").out
        assert out.splitlines()[2].split()[:6] == ["llama", "ready", "llama.cpp", "127.0.0.1:8080", "2.0/3.0!", "(3.0)"]
        assert out.splitlines()[3].split()[:5] == ["(foreign)", "-", "?", "-", "5.0"]
        assert out.splitlines()[4].split() == ["free", "GiB", "23.5", "15.5", "of", "24.0"]
        data = checked(mgpu("ps", "--json").json, "ps", PS)
        assert [share["actual_bytes"] for share in data["instances"][0]["gpus"]] == [2 * GIB, None]
        assert [(each["pid"], each["gpus"][0]["actual_bytes"]) for each in data["foreign"]] == [(4711, 5 * GIB)]
        assert [card["free_bytes"] is not None for card in data["cards"]] == [True, True]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_every_width_shows_all_that_matters(mgpu: Mgpu, nvml: Mapping[str, Path], tmp_path: Path, width: int) -> None:
    rate = Rate(generation_tok_s=19.1, running=1)
    with engine(mgpu, "llama-70b", gpus=SHARES, supervisor=who(os.getpid()), rate=rate, restarts=2) as process:
        with_rig(mgpu, nvml, tmp_path, f"gpu0.compute = {process.pid}:{21 * GIB}", f"gpu1.compute = {process.pid}:-")
        record("coder", state=State.FAILED, exit=OUT_OF_MEMORY, gpus=SHARES)
        out = mgpu("ps", COLUMNS=str(width)).out
        table = out.splitlines()[: [line.split()[:2] == ["free", "GiB"] for line in out.splitlines()].index(True) + 1]
        assert max(map(len, table)) <= width
        assert "…" not in out
        for word in ("llama-70b", "ready", ":8080", "21.0", "(3.0)", "coder", "failed", "SIGKILL", "23.5"):
            assert word in out, (word, out)


def test_the_dead_tell_why_until_they_are_cleared(mgpu: Mgpu) -> None:
    folder = record("coder", state=State.FAILED, exit=OUT_OF_MEMORY)
    (folder / "engine.log").write_text("a log")
    record("other", state=State.STOPPED)
    out = mgpu("ps").out
    for words in ("SIGKILL after 3.0 min", "it ran out of memory on gpu1", OUT_OF_MEMORY.last_lines[-1], "--ctx 4096"):
        assert words in out, (words, out)
    found = {each["name"]: each for each in checked(mgpu("ps", "--json").json, "ps", PS)["instances"]}
    assert (found["coder"]["exit"]["signal"], found["coder"]["exit"]["cause"]) == (9, "out-of-memory")
    cleared = mgpu("ps", "--clear", "coder").out
    assert (cleared.splitlines()[0], cleared.count("coder")) == ("forgot coder", 1)
    assert not folder.exists()
    assert "mgpu ps --clear other" in mgpu("ps", "--clear", "othe").err
    assert mgpu("ps", "--clear-dead", "--json").json["data"]["instances"] == []


def test_clearing_the_dead_takes_what_is_left_of_the_forgotten_and_says_so(mgpu: Mgpu) -> None:
    for name, file in (("k12", "engine.log"), ("k5", "lock"), ("starting", "instance.json")):
        folder = record(name, state=State.FAILED)
        (folder / file).touch()
        if name != "starting":
            (folder / "instance.json").unlink()
    theirs = state_folder() / "notes"
    theirs.mkdir()
    held = os.open(record("busy") / "lock", os.O_RDWR | os.O_CREAT)
    (state_folder() / "busy" / "instance.json").unlink()
    fcntl.flock(held, fcntl.LOCK_EX)
    assert mgpu("ps", "--clear-dead").out.splitlines()[0] == "forgot k12, k5, starting"
    assert mgpu("ps", "--clear-dead").out.splitlines()[0] == "nothing was there to forget"
    assert sorted(each.name for each in state_folder().iterdir()) == ["busy", "notes"]
    os.close(held)
    assert mgpu("ps", "--clear-dead").out == "forgot busy\n"
    assert mgpu("ps", "--clear-dead", "--json").json["data"]["forgotten"] == []


def test_where_one_of_several_is_unknown_none_is_forgotten(mgpu: Mgpu) -> None:
    folder = record("coder", state=State.FAILED)
    ended = mgpu("ps", "--clear", "coder", "--clear", "nobody")
    assert (ended.exit_code, folder.exists()) == (1, True)
    assert "'nobody': nothing was forgotten" in ended.err


def test_the_living_are_not_cleared(mgpu: Mgpu) -> None:
    with engine(mgpu, "orphan") as orphan, supervisor(mgpu, "llama"):
        for name, next_command in (("llama", "mgpu stop llama"), ("orphan", "mgpu reap")):
            ended = mgpu("ps", "--clear", name, "--json")
            assert (ended.exit_code, ended.json["errors"][0]["code"]) == (1, "instance-lives")
            assert next_command in ended.json["errors"][0]["hint"]
        names = [each["name"] for each in mgpu("ps", "--clear-dead", "--json").json["data"]["instances"]]
        assert names == ["llama", "orphan"]
        assert is_alive(orphan.pid)


def test_what_recovery_has_changed_is_shown(mgpu: Mgpu) -> None:
    change = Change(cause="out-of-memory", setting="--ctx", value="4096", before="8192")
    with supervisor(mgpu, "llama", changes=(change,)):
        assert "changed  --ctx 4096 instead of 8192, because of out-of-memory" in mgpu("ps").out


def test_an_engine_that_nobody_looks_after_is_orphaned(mgpu: Mgpu) -> None:
    with engine(mgpu, "llama") as process:
        ended = mgpu("ps")
        assert "orphaned" in ended.out
        assert "mgpu reap" in ended.out
        data = checked(mgpu("ps", "--json").json, "ps", PS)
        (instance,), (orphan,) = data["instances"], data["orphaned"]
        assert (instance["state"], instance["exit"]["cause"]) == ("failed", "supervisor-died")
        assert (orphan["name"], process.pid in orphan["pids"], len(orphan["pids"])) == ("llama", True, 3)


def test_one_whose_supervisor_is_stopped_is_not_called_well_when_its_engine_is_gone(mgpu: Mgpu, tiny: Path) -> None:
    mgpu("run", "-d", tiny)
    (before,) = mgpu("ps", "--json").json["data"]["instances"]
    mgpu.kill(before["supervisor_pid"], signal.SIGSTOP)
    assert (before["problem"], mgpu("ps", "--json").json["data"]["instances"][0]["state"]) == (None, "ready")
    mgpu.kill(before["pid"])
    until(lambda: not is_alive(before["pid"]), "the engine is gone")
    (after,) = checked(mgpu("ps", "--json").json, "ps", PS)["instances"]
    assert (after["state"], after["pid"], after["url"]) == ("degraded", None, None)
    assert "is stopped: mgpu stop tiny --force" in after["problem"]
    assert after["problem"] in mgpu("ps").out
    assert "tiny degraded" in mgpu().out
    assert mgpu("stop", "tiny", "--force").exit_code == 0


@pytest.mark.parametrize("state", [State.READY, State.STARTING])
def test_a_supervisor_that_hangs_is_given_time_to_notice_that_its_engine_is_gone(
    mgpu: Mgpu, monkeypatch: pytest.MonkeyPatch, state: State
) -> None:
    monkeypatch.setattr(census, "_HEARD_S", 0.5)
    with supervisor(mgpu, "llama", state=state, engine=NOBODY):
        (entry,) = census.heeded_instances()
    assert entry.instance
    assert (entry.instance.state, entry.instance.engine) == (State.DEGRADED, None)
    assert "does not notice: mgpu stop llama --force" in (entry.problem or "")


@pytest.mark.parametrize("engine_id", [None, "another"])
def test_one_that_notices_soon_is_what_it_says(
    mgpu: Mgpu, monkeypatch: pytest.MonkeyPatch, engine_id: str | None
) -> None:
    with supervisor(mgpu, "llama", engine=NOBODY) as folder:
        alive = read(folder).supervisor
        assert alive
        another = replace(NOBODY, started_ticks=2) if engine_id else None
        monkeypatch.setattr("time.sleep", lambda _: record("llama", alive, State.RESTARTING, engine=another))
        (entry,) = census.heeded_instances()
    assert entry.instance
    assert (entry.instance.state, entry.problem) == (State.RESTARTING, None)


def test_one_that_was_killed_with_its_engine_has_failed_whatever_its_record_says(mgpu: Mgpu) -> None:
    (record("llama") / "engine.log").write_text("first\nthe last line\n")
    (instance,) = checked(mgpu("ps", "--json").json, "ps", PS)["instances"]
    assert (instance["state"], instance["url"], instance["exit"]["last_lines"][-1]) == ("failed", None, "the last line")
    assert "mgpu killed" in mgpu("ps").out


def test_a_number_that_somebody_else_has_now_is_nobody_of_the_instance(mgpu: Mgpu) -> None:
    with sleeper(mgpu) as other:
        record("llama", reused(other.pid), engine=reused(other.pid), group=other.pid)
        data = checked(mgpu("ps", "--json").json, "ps", PS)
        assert (data["orphaned"], data["instances"][0]["state"]) == ([], "failed")
        assert data["instances"][0]["supervisor_pid"] is None


def test_a_zombie_is_dead(mgpu: Mgpu) -> None:
    with engine(mgpu, "llama", "echo up; exec sleep 600") as process:
        process.kill()
        until(lambda: not is_alive(process.pid), "the engine is a zombie")
        assert Path(f"/proc/{process.pid}").exists()
        assert mgpu("ps", "--json").json["data"]["orphaned"] == []


@pytest.mark.parametrize("text", ["", "{", '{"schema_version": 99}', "\x1b[31m[bold]\x00", "[" * 9999])
def test_a_damaged_record_is_a_row_with_its_problem(mgpu: Mgpu, text: str) -> None:
    (record("llama") / "instance.json").write_text(text)
    ended = mgpu("ps")
    assert (ended.exit_code, ended.err) == (0, "")
    assert ended.out.splitlines()[2].split()[:2] == ["llama", "damaged"]
    assert "llama: the record " in ended.out
    (instance,) = checked(mgpu("ps", "--json").json, "ps", PS)["instances"]
    assert (instance["state"], instance["pid"]) == (None, None)
    assert "record" in instance["problem"]
    assert mgpu("ps", "--clear", "llama", "--json").json["data"]["instances"] == []


def test_nothing_in_a_record_commands_the_terminal(mgpu: Mgpu) -> None:
    evil = "\x1b]0;title\x07\x1b[2J[red]\udcff\n" * 100
    last = Exit(code=1, signal=None, cause=evil, at="2026-01-02T03:07:05Z", last_lines=(evil,), message=evil, hint=evil)
    record("llama", NOBODY, State.FAILED, backend=evil, url="http://[\x1b[2J", exit=last, phase=evil)
    ended = mgpu("ps")
    assert ended.exit_code == 0
    assert not [character for character in ended.out if not (character.isprintable() or character == "\n")]
    assert mgpu("ps", "--json").exit_code == 0


def test_what_has_nothing_but_logs_is_named_when_all_is_asked_for(mgpu: Mgpu) -> None:
    folder = record("llama")
    (folder / "engine.log").touch()
    (folder / "instance.json").unlink()
    assert "llama" not in mgpu("ps").out
    assert "only logs are left of llama" in mgpu("ps", "--all").out
    assert mgpu("ps", "--all", "--json").json["data"]["logs"] == ["llama"]


def test_a_driver_that_cannot_be_used_is_said(mgpu: Mgpu, nvml: Mapping[str, Path], tmp_path: Path) -> None:
    with_rig(mgpu, nvml, tmp_path, "sys.init = !18")
    assert "driver: " in mgpu("ps").out
    assert mgpu("ps", "--json").json["warnings"]
    assert "driver: " in mgpu().out
    assert mgpu("--json").json["data"]["driver_problem"]


@pytest.mark.parametrize(
    "words", [("ps",), ("ps", "--clear-dead"), ("stop", "--all"), ("stop", "llama"), ("logs", "llama"), ("reap",)]
)
@pytest.mark.parametrize(
    ("make", "why"),
    [
        pytest.param(lambda state: (state / "mgpu").write_text("a file"), "no folder", id="a file in its place"),
        pytest.param(lambda state: (state / "mgpu").symlink_to("/"), "it is a link", id="a link"),
        pytest.param(lambda state: state.rmdir() or state.write_text("a file"), "", id="a file above it"),
    ],
)
def test_a_state_folder_that_cannot_be_read_is_an_error_everywhere(
    mgpu: Mgpu, tmp_path: Path, words: tuple[str, ...], make: Callable[[Path], object], why: str
) -> None:
    state = tmp_path / "state of it"
    state.mkdir()
    make(state)
    ended = mgpu(*words, "--json", XDG_STATE_HOME=str(state))
    (error,) = ended.json["errors"]
    assert (ended.exit_code, error["code"]) == (3, "state-folder")
    assert why in error["message"]
    assert "XDG_STATE_HOME" in error["hint"]


def test_where_no_state_folder_is_nothing_runs(mgpu: Mgpu) -> None:
    ended = mgpu("ps", "--json", XDG_STATE_HOME="/proc/none")
    assert (ended.exit_code, ended.json["data"]["instances"]) == (0, [])
