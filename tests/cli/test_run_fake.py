"""`mgpu run` on a fake engine that does whatever is asked of it: ready, failing, and every way to end."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import sys
from pathlib import Path

import pytest

from tests.fakes.devices import free_port
from tests.fakes.llama_server import LOSE_DEVICE
from tests.fakes.shapes import SHAPES
from tests.fakes.sparse_gguf import make_sparse_gguf

from .program import Mgpu, request, until

TWO_CARDS = (
    "CUDA0: NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free);"
    "CUDA1: NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free)"
)
UNEQUAL_CARDS = (
    "CUDA0: NVIDIA GeForce RTX 3060 (12288 MiB, 11900 MiB free);"
    "CUDA1: NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free)"
)
# What the planner expects of the tiny model: 4 layers × 8 heads × (64 + 64) × 2 bytes.
EXACT_CACHE = {"FAKE_KV_BYTES_PER_TOKEN": "8192"}
SECRET = "sk-6f1ed002ab5595859014ebf0951522d9"  # made up


def test_the_ready_line_and_the_status_are_on_stdout_and_the_steps_on_stderr(mgpu: Mgpu, tiny: Path) -> None:
    running = mgpu.start("run", tiny, "--interval", "0.2", "--ctx", "64k", FAKE_DEVICES=TWO_CARDS, **EXACT_CACHE)
    url = running.url()
    assert request(url, "/models")[0] == 200
    until(lambda: running.out.count("\nready ") >= 3, "three lines of status")
    ended = running.end(signal.SIGINT)
    first, *status = ended.out.splitlines()
    assert re.fullmatch(
        r"ready: tiny on http://127\.0\.0\.1:\d+/v1  \(llama\.cpp, 2 GPUs, pid \d+, \d+(\.\d)? s\)", first
    )
    pattern = r"ready \d+:\d\d   0 running, 0 waiting   0\.0 tok/s   prompt 0\.0 tok/s   KV 0%(   gpu0 .* GiB)?"
    assert all(re.fullmatch(pattern, line) for line in status), status
    steps = dict.fromkeys(line.split()[0] for line in ended.err.splitlines())  # a port may be lost to another: twice
    assert list(steps) == ["plan", "engine", "start", "check", "stop"]
    assert re.search(r"(?m)^check +gpu0 \d\.\d\d of \d\.\d\d, gpu1 \d\.\d\d of \d\.\d\d GiB planned", ended.err)
    assert re.search(r"(?m)^stop +tiny … stopped in \d.* s, \d\.\d\d GiB given back$", ended.err)
    assert ended.exit_code == 130
    mgpu.assert_nothing_left()


def test_the_status_counts_tokens(mgpu: Mgpu, tiny: Path) -> None:
    running = mgpu.start("run", tiny, "--interval", "0.2", "--json", FAKE_TOKENS_PER_SECOND="500")
    body = {"messages": [{"role": "user", "content": "Go on"}], "max_tokens": 200, "ignore_eos": True}
    assert request(running.url(), "/chat/completions", body)[0] == 200
    until(lambda: re.search(r'"generation_tok_s": [1-9]', running.out.rpartition('"ready"')[2]), "a rate above zero")
    assert running.end(signal.SIGINT).event("status")["rate"]["kv_used"] is not None


def test_an_answer_is_alone_on_stdout(mgpu: Mgpu, tiny: Path) -> None:
    ended = mgpu("run", tiny, "--ask", "Who are you?", FAKE_DEVICES=TWO_CARDS)
    assert ended.exit_code == 0
    assert ended.out == "I am a fake engine and every word of this answer was made up in advance .\n"
    assert re.search(r"(?m)^ready: tiny on ", ended.err)
    assert re.search(r"(?m)^answer +17 tokens at \d+\.\d tokens/s · prompt \d+ tokens at \d+ tokens/s$", ended.err)
    mgpu.assert_nothing_left()


def test_an_answer_comes_word_by_word(mgpu: Mgpu, tiny: Path) -> None:
    running = mgpu.start("run", tiny, "--ask", "Who?", "--ctx", "256", FAKE_FAIL="repeat-token")
    running.line("the the")
    assert not running.out.endswith("\n")
    assert running.end().exit_code == 0


@pytest.mark.parametrize("stream", ["out", "err"])
def test_a_reader_that_leaves_ends_the_run(mgpu: Mgpu, tiny: Path, stream: str) -> None:
    words = ("run", tiny, "--ask", "Go on", "--ctx", "512")
    left, kept = ("stdout", "stderr") if stream == "out" else ("stderr", "stdout")
    process = mgpu.piped(*words, FAKE_FAIL="repeat-token", FAKE_DEVICES=TWO_CARDS)
    with process:
        reader, other = getattr(process, left), getattr(process, kept)
        assert reader.read(10)
        reader.close()
        assert "Traceback" not in other.read().decode()
        assert process.wait() == 0
    mgpu.assert_nothing_left()


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        pytest.param(
            "oom-weights", "out-of-memory", "out of memory on CUDA1: 85 MiB asked for the weights", id="weights"
        ),
        pytest.param("oom-kv", "out-of-memory", "out of memory on CUDA1: 24 MiB asked for the KV cache", id="KV cache"),
        pytest.param("oom-compute", "out-of-memory", "CUDA1: 256 MiB asked for the compute", id="compute buffers"),
        pytest.param("bad-arch", "architecture-unknown", "architecture 'lxama'", id="an unknown architecture"),
        pytest.param("corrupt", "model-corrupt", "cut short or damaged", id="a corrupt file"),
        pytest.param("exit0", "exited", "ended by itself with status 0", id="an end without a reason"),
        pytest.param("empty-log", "exited", "status 1 and left no message", id="an end without a word"),
        pytest.param("segv", "crashed", "SIGSEGV", id="a crash"),
        pytest.param("abort", "crashed", "SIGABRT", id="an abort"),
        pytest.param("die-in-request", "device-lost", "CUDA1 failed while computing", id="a card lost at once"),
    ],
)
def test_an_engine_that_does_not_start_is_explained(
    mgpu: Mgpu, tiny: Path, fault: str, code: str, message: str
) -> None:
    ended = mgpu("run", tiny, "--ctx", "256", FAKE_DEVICES=TWO_CARDS, FAKE_FAIL=fault)
    assert (ended.exit_code, ended.out) == (4, "")
    error, hint, log = ended.err.splitlines()[-3:]
    assert error.startswith("error ")
    assert message in error
    assert re.match(r"next +\S", hint)
    path = re.fullmatch(r"log +(/.*engine\.log)(, line \d+)?", log)
    assert path, ended
    assert Path(path[1]).is_file()
    mgpu.assert_nothing_left()
    error_object = mgpu("run", tiny, "--ctx", "256", "--json", FAKE_DEVICES=TWO_CARDS, FAKE_FAIL=fault).stream[-1]
    assert [found["code"] for found in error_object["errors"]] == [code]


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        pytest.param("hang-loading", "stalled", id="while loading"),
        pytest.param("hang-request", "no-answer", id="in the first request"),
    ],
)
def test_an_engine_that_hangs_is_given_up(mgpu: Mgpu, tiny: Path, fault: str, code: str) -> None:
    ended = mgpu("run", tiny, "--stall-timeout", "1", "--json", FAKE_FAIL=fault)
    assert ended.exit_code == 4
    assert [error["code"] for error in ended.stream[-1]["errors"]] == [code]
    assert ended.events[-1] == "stopped"
    mgpu.assert_nothing_left()


def test_a_slow_load_is_not_a_hang(mgpu: Mgpu, tiny: Path) -> None:
    ended = mgpu("run", tiny, "--ask", "Hello", "--stall-timeout", "60", FAKE_FAIL="slow-load:1.5")
    assert ended.exit_code == 0


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        pytest.param("repeat-token", "repeats one token", id="one token again and again"),
        pytest.param(None, "gpu1 (CUDA1) holds", id="more memory than planned"),
    ],
)
def test_what_is_not_as_planned_is_a_warning(mgpu: Mgpu, tiny: Path, fault: str | None, complaint: str) -> None:
    ended = mgpu("run", tiny, "--ctx", "512", "--ask", "Hello", FAKE_DEVICES=TWO_CARDS, FAKE_FAIL=fault)
    assert ended.exit_code == 0
    assert re.search(rf"(?m)^warning .*{re.escape(complaint)}", ended.err), ended


@pytest.mark.parametrize(
    ("signal_number", "code"),
    [
        pytest.param(LOSE_DEVICE, "device-lost", id="a card is lost"),
        pytest.param(signal.SIGKILL, "killed", id="the engine is killed"),
    ],
)
def test_an_engine_that_dies_while_serving_is_explained(
    mgpu: Mgpu, tiny: Path, signal_number: signal.Signals, code: str
) -> None:
    running = mgpu.start("run", tiny, "--json", FAKE_DEVICES=TWO_CARDS)
    running.url()
    os.kill(running.engine_pid(), signal_number)
    ended = running.end()
    assert ended.exit_code == 4
    assert [error["code"] for error in ended.stream[-1]["errors"]] == [code]
    mgpu.assert_nothing_left()


def test_a_busy_default_port_is_replaced(mgpu: Mgpu, tiny: Path) -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        def held() -> bool:
            """Whether the port is ours now: another test's engine that has it will give it back."""
            try:
                server.bind(("127.0.0.1", 8080))
                server.listen()
            except OSError:
                return False
            return True

        with contextlib.suppress(AssertionError):  # who has it for so long will keep it: as good
            until(held, "port 8080 can be held")
        ended = mgpu("run", tiny, "--ask", "Hello", "--json")
    assert ended.exit_code == 0
    assert not ended.event("ready")["url"].endswith(":8080/v1")


def test_a_port_lost_to_another_is_replaced(mgpu: Mgpu, tiny: Path, tmp_path: Path) -> None:
    once = {"FAKE_FAIL": "port", "FAKE_FAIL_STARTS": f"1:{tmp_path / 'starts'}"}
    ended = mgpu("run", tiny, "--ask", "Hello", "--json", **once)
    assert ended.exit_code == 0
    assert ended.events.count("started") >= 2  # more, where others take ports at the same time
    assert ended.events.count("ready") == 1


@pytest.mark.parametrize(("chosen", "starts"), [(False, 5), (True, 1)])
def test_a_port_that_is_always_lost_is_an_error(mgpu: Mgpu, tiny: Path, chosen: bool, starts: int) -> None:
    port = ("--port", free_port()) if chosen else ()
    ended = mgpu("run", tiny, *port, "--json", FAKE_FAIL="port")
    assert ended.exit_code == 4
    assert ended.events.count("started") == starts
    assert [error["code"] for error in ended.stream[-1]["errors"]] == ["port-in-use"]


def test_another_engine_that_answers_at_our_port_is_not_taken_for_ours(
    mgpu: Mgpu, tiny: Path, tmp_path: Path, fake_engine: Path
) -> None:
    """The first start finds a stranger at its port that answers already, and ends a moment later."""
    engine = tmp_path / "engine"
    engine.write_text(f"""#!{sys.executable}
import os, pathlib, subprocess, sys, time, urllib.request
words, fake, mark = sys.argv[1:], {str(fake_engine)!r}, pathlib.Path({str(tmp_path / "once")!r})
if "-m" in words and not mark.exists():
    mark.touch()
    stranger = ["sh", "-c", '"$@" >/dev/null 2>&1 &', "sh", fake, *words]
    subprocess.run(stranger, start_new_session=True)
    while True:
        try:
            urllib.request.urlopen("http://127.0.0.1:" + words[words.index("--port") + 1] + "/health")
            break
        except OSError:
            time.sleep(0.01)
    time.sleep(0.5)  # mgpu looks a few times
os.execv(fake, [fake, *words])
""")
    engine.chmod(0o755)
    ended = mgpu("run", tiny, "--ask", "Hello", "--json", MGPU_LLAMA_SERVER=str(engine))
    mgpu.end_all()  # the stranger
    assert ended.exit_code == 0
    assert ended.events.count("started") >= 2  # more, where others take ports at the same time
    assert ended.event("ready")["pid"] == ended.event("started")["pid"]


def test_two_runs_at_once_have_their_own_port_and_name(mgpu: Mgpu, tiny: Path) -> None:
    both = [mgpu.start("run", tiny, "--json") for _ in range(2)]
    urls = {running.url() for running in both}
    assert len(urls) == 2
    assert {running.event("ready")["name"] for running in both} == {"tiny", "tiny-2"}
    assert [running.end(signal.SIGINT).exit_code for running in both] == [130, 130]
    mgpu.assert_nothing_left()


def test_a_chosen_name_or_port_that_is_taken_is_an_error_that_names_its_owner(mgpu: Mgpu, tiny: Path) -> None:
    first = mgpu.start("run", tiny, "--name", "mine")
    port = first.url().rpartition(":")[2]
    for words, exit_code, told in (
        (("--name", "mine"), 2, "an instance named mine is already running"),
        (("--port", port), 3, f"port {port} is taken by your instance mine"),
    ):
        second = mgpu("run", tiny, *words)
        assert (second.exit_code, second.out) == (exit_code, "")
        assert second.err.startswith(f"error    {told}"), second.err  # before any plan is shown
        assert "mgpu stop mine" in second.err
    first.end(signal.SIGINT)
    assert mgpu("run", tiny, "--name", "mine", "--ask", "Hello").exit_code == 0


def test_a_key_reaches_the_engine_and_nobody_else(mgpu: Mgpu, tiny: Path) -> None:
    running = mgpu.start("run", tiny, "--json", "--interval", "0.1", MGPU_API_KEY=SECRET, HF_TOKEN="hf_not_for_engines")
    url = running.url()
    running.event("status")
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    assert request(url, "/chat/completions", body)[0] == 401
    assert request(url, "/chat/completions", body, key=SECRET)[0] == 200
    for pid in mgpu.processes():
        assert SECRET.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    environment = Path(f"/proc/{running.engine_pid()}/environ").read_bytes()
    assert SECRET.encode() in environment
    assert b"hf_not_for_engines" not in environment
    ended = running.end(signal.SIGINT)
    assert SECRET not in ended.out + ended.err
    written = [path for path in mgpu.state.rglob("*") if path.is_file()]
    assert len(written) >= 2
    assert not any(SECRET.encode() in path.read_bytes() for path in written)


@pytest.mark.parametrize("variable", ["MGPU_API_KEY", "LLAMA_API_KEY"])
def test_a_key_of_the_environment_is_not_shown(mgpu: Mgpu, tiny: Path, variable: str) -> None:
    environment = {variable: SECRET}
    human = mgpu("run", tiny, "--dry-run", **environment)
    assert human.out.startswith('LLAMA_API_KEY="${LLAMA_API_KEY:?}" ')
    machine = mgpu("run", tiny, "--dry-run", "--json", **environment)
    assert machine.json["data"]["env"]["LLAMA_API_KEY"] == "***"
    assert SECRET not in human.out + human.err + machine.out + machine.err


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        pytest.param(("--insecure",), {}, id="said so"),
        pytest.param((), {"MGPU_API_KEY": SECRET}, id="a key asked for"),
    ],
)
def test_a_network_is_served_where_that_is_wanted(
    mgpu: Mgpu, tiny: Path, words: tuple[str, ...], environment: dict[str, str]
) -> None:
    ended = mgpu("run", tiny, "--dry-run", "--host", "0.0.0.0", *words, **environment)
    assert (ended.exit_code, "--host 0.0.0.0" in ended.out) == (0, True)


def test_a_dry_run_prints_the_command_and_starts_nothing(mgpu: Mgpu, tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "it's a model; $HOME.gguf"
    model.symlink_to(tiny)
    words = ("run", model, "--dry-run", "--port", free_port(), "--", "--chat-template", "a b")
    human, machine = (mgpu(*words[:3], *more, *words[3:], FAKE_DEVICES=TWO_CARDS) for more in ([], ["--json"]))
    data = machine.json["data"]
    settings = [f"{name}={value}" for name, value in data["env"].items()]
    assert shlex.split(human.out) == [*settings, *data["argv"]]
    assert "--chat-template" in data["argv"]
    assert str(model) in data["argv"]
    assert not list(mgpu.state.glob("*/engine.log"))
    mgpu.assert_nothing_left()


def test_unequal_cards_get_unequal_layers(mgpu: Mgpu, tmp_path: Path) -> None:
    model = make_sparse_gguf(tmp_path / "m.gguf", SHAPES["qwen3-32b"], "Q4_K_M", vocabulary=1000)
    ended = mgpu("run", model, "--ask", "Hello", "--json", FAKE_DEVICES=UNEQUAL_CARDS)
    assert ended.exit_code == 0
    small, large = ended.event("checked")["devices"]
    assert 1.8 < large["weights_bytes"] / small["weights_bytes"] < 2.5
    assert small["planned_bytes"] < 11900 << 20


def before_the_tensor_split(folder: Path, engine: Path) -> str:
    """A llama-server of the time before it had that split: its --help does not name it, and it refuses it."""
    program = folder / "older-llama-server"
    program.write_text(f"""#!/bin/sh
case " $* " in
*" -sm tensor "*) echo 'error while handling argument "-sm": invalid value' >&2; exit 1 ;;
*" --help "*) {engine} "$@" | sed 's/,row,tensor}}/,row}}/; /- tensor:/,/EXPERIMENTAL/d' ;;
*) exec {engine} "$@" ;;
esac
""")
    program.chmod(0o755)
    return str(program)


def test_the_tensor_split_is_for_engines_that_know_it(
    mgpu: Mgpu, tiny: Path, tmp_path: Path, fake_engine: Path, nvml: dict[str, Path]
) -> None:
    rig = Path(__file__).parents[1] / "machines" / "rigs" / "2x4090-x670e.txt"
    uuids = ",".join("GPU-00000000-0000-0000-0000-00000000000" + digit for digit in "12")
    mgpu.environment |= {"LD_LIBRARY_PATH": str(nvml["new"]), "FAKE_NVML": str(rig), "FAKE_UUIDS": uuids}
    older = before_the_tensor_split(tmp_path, fake_engine)

    def modes(engine: str) -> list[tuple[str, str, bool]]:
        words = ("plan", "llama-70b", "--quant", "Q4_K_M", "--backend", "llama.cpp", "--json")
        ways = mgpu(*words, FAKE_DEVICES=TWO_CARDS, MGPU_LLAMA_SERVER=engine).json["data"]["candidates"]
        return [(way["split_mode"], way["verdict"], "too old" in "".join(way["reasons"])) for way in ways]

    assert modes(str(fake_engine)) == [("tensor", "fits", False), ("layer", "fits", False)]
    assert modes(older) == [("layer", "fits", False), ("tensor", "illegal", True)]
    words = ("run", tiny, "--ask", "Hello", "--gpus", "2")
    assert mgpu(*words, FAKE_DEVICES=TWO_CARDS, MGPU_LLAMA_SERVER=older).exit_code == 0
    refused = mgpu(*words, "--split-mode", "tensor", FAKE_DEVICES=TWO_CARDS, MGPU_LLAMA_SERVER=older)
    assert (refused.exit_code, "too old for --split-mode tensor" in refused.err) == (1, True)


def test_cards_are_pinned_by_uuid(mgpu: Mgpu, tiny: Path, nvml: dict[str, Path]) -> None:
    rig = Path(__file__).parents[1] / "machines" / "rigs" / "2x4090-x670e.txt"
    uuids = ["GPU-00000000-0000-0000-0000-00000000000" + digit for digit in "12"]
    environment = {
        "LD_LIBRARY_PATH": str(nvml["new"]),
        "FAKE_NVML": str(rig),
        "FAKE_DEVICES": TWO_CARDS,
        "FAKE_UUIDS": ",".join(uuids),
    }
    running = mgpu.start("run", tiny, "--gpus", "gpu1", "--json", **environment)
    running.url()
    engine = Path(f"/proc/{running.engine_pid()}/environ").read_bytes().split(b"\0")
    assert f"CUDA_VISIBLE_DEVICES={uuids[1]}".encode() in engine
    assert b"CUDA_DEVICE_ORDER=PCI_BUS_ID" in engine
    (device,) = running.end(signal.SIGINT).event("checked")["devices"]
    assert (device["gpu"], device["uuid"], device["weights_bytes"] > 0) == (1, uuids[1], True)


def test_a_card_that_the_split_leaves_out_is_said(mgpu: Mgpu, tiny: Path) -> None:
    ended = mgpu("run", tiny, "--tensor-split", "1,0", "--ask", "Hello", FAKE_DEVICES=TWO_CARDS)
    assert ended.exit_code == 0
    assert "gpu1 would hold nothing" in ended.err


def test_a_card_that_holds_nothing_although_planned_is_said_loudly(
    mgpu: Mgpu, tiny: Path, tmp_path: Path, fake_engine: Path
) -> None:
    engine = tmp_path / "engine"
    engine.write_text(f"""#!{sys.executable}
import os, sys
words = sys.argv[1:]
if "-ts" in words:
    words[words.index("-dev") + 1] = "CUDA0"
    del words[words.index("-ts"):words.index("-ts") + 2]
os.execv({str(fake_engine)!r}, [{str(fake_engine)!r}, *words])
""")
    engine.chmod(0o755)
    ended = mgpu("run", tiny, "--ask", "Hello", FAKE_DEVICES=TWO_CARDS, MGPU_LLAMA_SERVER=str(engine))
    assert re.search(r"(?m)^warning +gpu1 \(CUDA1\) was planned to hold layers and holds none", ended.err), ended


def test_a_second_run_keeps_the_log_of_the_first(mgpu: Mgpu, tiny: Path) -> None:
    for _ in range(2):
        mgpu("run", tiny, "--ask", "Hello")
    names = sorted(path.name for path in (mgpu.state / "tiny").iterdir())
    assert names == ["engine.log", "engine.log.1", "lock", "mark"]
