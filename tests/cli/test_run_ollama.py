"""`mgpu run --backend ollama` with an Ollama of mgpu's own: what is planned, started, checked, answered and said.

With the fake one and, where MGPU_TEST_OLLAMA names a program, the main line with the real one on software devices.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from pathlib import Path

import pytest

from tests.fakes.devices import free_port, lavapipe_environment, real_llama_server, require_or_skip
from tests.fakes.ollama_running import REAL_OLLAMA
from tests.fakes.shapes import SHAPES
from tests.fakes.sparse_gguf import make_sparse_gguf

from .contract import LAUNCH, PLAN, checked, checked_stream
from .program import Mgpu, request, until
from .two_cards import (
    UUIDS,
    engine_log,
    installed_with,
    runners,
    settings_of,
    store,
    warnings_of,
    with_two_cards,
)

REAL = os.environ.get(REAL_OLLAMA)
PROGRAMS = [
    pytest.param(None, id="fake"),
    *([pytest.param(Path(REAL), id="real", marks=pytest.mark.real_ollama)] if REAL else []),
]
ANSWER = "I am a fake engine and every word of this answer was made up in advance .\n"
ON_TWO = ("--backend", "ollama", "--gpus", "2")
# What a user's shell may hold that would move a model, and what no engine is to see.
STRAY = {
    "OLLAMA_NUM_PARALLEL": "9",
    "OLLAMA_SCHED_SPREAD": "0",
    "LLAMA_ARG_MAIN_GPU": "1",
    "LLAMA_ARG_THREADS": "1",
}
PRIVATE = {"HF_TOKEN": "hf_not_for_engines", "HIP_VISIBLE_DEVICES": "0"}


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M without its numbers: 30 layers, which the fake runner has."""
    return make_sparse_gguf(tmp_path_factory.mktemp("models") / "small.gguf", SHAPES["smollm2-135m"], "Q4_1")


@pytest.fixture
def on_two(mgpu: Mgpu, nvml: dict[str, Path], tmp_path: Path) -> Mgpu:
    return with_two_cards(mgpu, nvml, tmp_path)


@pytest.fixture(params=PROGRAMS)
def bench(request: pytest.FixtureRequest, mgpu: Mgpu, tmp_path: Path) -> tuple[Mgpu, str]:
    """mgpu with an Ollama and two devices, and a MODEL that is here."""
    program: Path | None = request.param
    if program is None:
        return with_two_cards(mgpu, request.getfixturevalue("nvml"), tmp_path), str(request.getfixturevalue("small"))
    request.getfixturevalue("smollm2")
    environment = lavapipe_environment()
    require_or_skip(environment is not None, "Mesa's software Vulkan is not installed")
    mgpu.environment |= {
        **(environment or {}),
        "MGPU_OLLAMA": str(program),
        "MGPU_LLAMA_SERVER": str(real_llama_server()),
        "OLLAMA_HOST": f"127.0.0.1:{free_port()}",
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"),
    }
    return mgpu, "smollm2-135m"


def test_the_same_line_runs_a_model_over_two_cards(bench: tuple[Mgpu, str]) -> None:
    mgpu, model = bench
    ended = mgpu("run", model, *ON_TWO, "--ask", "Hello", "--max-tokens", "8", "--json")
    assert ended.exit_code == 0, ended
    events = set(checked_stream(ended))
    assert {"planned", "started", "fetched", "loading", "checked", "ready", "answer", "answered", "stopped"} <= events
    assert warnings_of(ended) == []
    for device in ended.event("checked")["devices"]:
        assert device["weights_bytes"] > 0
        assert device["kv_bytes"] > 0
    assert len(ended.event("checked")["devices"]) == 2
    assert ended.event("answered")["generated_tokens"] > 0
    assert ended.event("answered")["generation_tok_s"] > 0
    assert ended.event("ready")["model"].startswith("mgpu/sm")
    mgpu.assert_nothing_left()


def test_the_answer_is_alone_on_stdout(on_two: Mgpu, small: Path) -> None:
    ended = on_two("run", small, *ON_TWO, "--ask", "Hello")
    assert (ended.exit_code, ended.out) == (0, ANSWER)
    for line in (
        r"plan +Ollama · Q4_1 · 8192 tokens · layer split over gpu0, gpu1 ",
        r"start +ollama, pid \d+, log /",
        r"import +small\.gguf +97\.6 MB in ",
        r"check +gpu0 0\.2\d of 0\.2\d, gpu1 0\.2\d of 0\.2\d GiB planned",
        r"ready: small on http://127\.0\.0\.1:\d+/v1  \(ollama, 2 GPUs, pid \d+, ",
        r"model +clients ask for mgpu/small:q4_1$",
        r"answer +17 tokens at \d+\.\d tokens/s",
        r"stop +small … stopped in ",
    ):
        assert re.search(rf"(?m)^{line}", ended.err), (line, ended)
    assert "warning" not in ended.err
    on_two.assert_nothing_left()


def test_the_file_is_linked_into_ollamas_store_once(on_two: Mgpu, tmp_path: Path) -> None:
    odd = make_sparse_gguf(tmp_path / "it's (my) ä model.gguf", SHAPES["smollm2-135m"], "Q4_1")
    for _ in range(2):
        ended = on_two("run", odd, *ON_TWO, "--ask", "Hello", "--json")
        assert (ended.exit_code, ended.event("ready")["model"]) == (0, "mgpu/it-s-my-model:q4_1")
        assert odd.stat().st_nlink == 2
    (blob,) = (store(on_two) / "blobs").iterdir()
    assert blob.samefile(odd)


def test_the_store_that_ollama_is_given_is_the_one_that_is_linked_into(
    on_two: Mgpu, small: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "another store"
    ended = on_two("run", small, *ON_TWO, "--ask", "Hello", "--", f"OLLAMA_MODELS={folder}")
    assert ended.exit_code == 0
    assert [blob.samefile(small) for blob in (folder / "blobs").iterdir()] == [True]
    assert not store(on_two).exists()


def test_the_server_gets_what_was_planned_and_nothing_else(on_two: Mgpu, small: Path) -> None:
    port = free_port()
    words = (small, *ON_TWO, "--ctx", "4k", "--headroom", "512MiB", "--tensor-split", "3,1", "--kv-type", "q8_0")
    handed_on = ("--", "OLLAMA_MAX_QUEUE=64", "LLAMA_ARG_CACHE_REUSE=1")
    running = on_two.start("run", *words, "--port", port, "--json", *handed_on, **STRAY, **PRIVATE)
    running.url()
    found = settings_of(running.engine_pid())
    ended = running.end(signal.SIGINT)
    expected = {
        "OLLAMA_HOST": f"127.0.0.1:{port}",
        "OLLAMA_NO_CLOUD": "1",
        "OLLAMA_NOPRUNE": "1",
        "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMA_CONTEXT_LENGTH": "4096",
        "OLLAMA_NUM_PARALLEL": "1",
        "OLLAMA_SCHED_SPREAD": "1",
        "OLLAMA_KV_CACHE_TYPE": "q8_0",
        "OLLAMA_GPU_OVERHEAD": str(512 << 20),
        "OLLAMA_MAX_QUEUE": "64",
        "LLAMA_ARG_FIT_TARGET": "512",
        "LLAMA_ARG_TENSOR_SPLIT": "24,7",
        "LLAMA_ARG_ENDPOINT_METRICS": "1",
        "LLAMA_ARG_CACHE_REUSE": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": ",".join(UUIDS),
        "ROCR_VISIBLE_DEVICES": "-1",
        "GGML_VK_VISIBLE_DEVICES": "-1",
    }
    relevant = re.compile(r"OLLAMA_|LLAMA_ARG_|.*VISIBLE_DEVICES|CUDA_|HF_|.*_PROXY", re.IGNORECASE)
    assert {name: value for name, value in found.items() if relevant.match(name)} == expected
    (warning,) = warnings_of(ended)
    assert all(name in warning for name in STRAY)
    assert "OLLAMA_HOST" not in warning
    large, small_part = ended.event("checked")["devices"]
    assert large["kv_bytes"] > 3 * small_part["kv_bytes"]

    dry = on_two("run", *words, "--port", port, "--dry-run", *handed_on)
    launch = checked(on_two("run", *words, "--port", port, "--dry-run", "--json", *handed_on).json, "run", LAUNCH)
    assert launch["env"] == expected
    assert launch["argv"][1:] == ["serve"]
    assert shlex.split(dry.out) == [*(f"{name}={value}" for name, value in launch["env"].items()), *launch["argv"]]
    plan = checked(on_two("plan", *words, "--json", *handed_on).json, "plan", PLAN)
    planned = plan["candidates"][plan["best"]]
    assert {**planned["env"], "OLLAMA_HOST": None} == {**expected, "OLLAMA_HOST": None}
    on_two.assert_nothing_left()


def test_the_token_rate_is_the_runners_and_comes_back_with_it(on_two: Mgpu, small: Path) -> None:
    running = on_two.start("run", small, *ON_TWO, "--interval", "0.1", "--json")
    url, model = running.url(), running.event("ready")["model"]
    body = {"model": model, "messages": [{"role": "user", "content": "Go on"}]}

    def seen(pattern: str, since: int) -> bool:
        return re.search(pattern, running.out[since:]) is not None

    for _ in range(2):
        before = len(running.out)
        assert request(url, "/v1/chat/completions", body)[0] == 200
        until(lambda: seen(r'"generation_tok_s": [1-9]', before), "a rate above zero")  # noqa: B023
        (runner,) = runners(on_two)
        before = len(running.out)
        on_two.kill(runner)
        until(lambda: seen(r'"state": "ready".*"generation_tok_s": null', before), "no rate")  # noqa: B023
    ended = running.end(signal.SIGINT)
    assert ended.exit_code == 130
    checked_stream(ended)
    on_two.assert_nothing_left()


def test_a_server_that_dies_is_the_end_and_is_explained(on_two: Mgpu, small: Path) -> None:
    running = on_two.start("run", small, *ON_TWO, "--json")
    running.url()
    on_two.kill(running.engine_pid())
    ended = running.end()
    assert ended.exit_code == 4
    assert [error["code"] for error in ended.stream[-1]["errors"]] == ["killed"]
    checked_stream(ended)
    on_two.assert_nothing_left()  # no runner either


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        pytest.param("silent-cpu", "bad-device", "Ollama found no card and will run on the CPU", id="no card is found"),
        pytest.param("load-oom", "out-of-memory", "out of memory on CUDA1", id="a card is too small"),
        pytest.param("bad-arch", "architecture-unknown", "lxama", id="an architecture it does not know"),
        pytest.param(
            "runner-dies",
            "exited",
            "the model's llama-server ended while it answered",
            id="the runner dies in its first answer",
        ),
    ],
)
def test_a_model_that_cannot_be_loaded_is_explained(
    on_two: Mgpu, small: Path, fault: str, code: str, message: str
) -> None:
    ended = on_two("run", small, *ON_TWO, "--json", FAKE_FAIL=fault, FAKE_TOKENS_PER_SECOND="20")
    (error,) = ended.stream[-1]["errors"]
    assert (ended.exit_code, error["code"]) == (4, code), ended
    assert message in error["message"]
    checked_stream(ended)
    assert ("starting llama-server" in engine_log(on_two)) == (fault != "silent-cpu")
    assert ("fetching" in ended.events) == (fault != "silent-cpu")
    on_two.assert_nothing_left()


def test_a_load_that_hangs_is_given_up(on_two: Mgpu, small: Path) -> None:
    ended = on_two("run", small, *ON_TWO, "--stall-timeout", "1", "--json", FAKE_FAIL="slow-load:600")
    assert (ended.exit_code, [error["code"] for error in ended.stream[-1]["errors"]]) == (4, ["stalled"])
    on_two.assert_nothing_left()


def test_a_server_that_dies_while_it_loads_is_explained(on_two: Mgpu, small: Path) -> None:
    running = on_two.start("run", small, *ON_TWO, "--json", FAKE_FAIL="slow-load:600")
    until(lambda: runners(on_two), "Ollama starts a runner")
    on_two.kill(running.event("started")["pid"])
    ended = running.end()
    assert (ended.exit_code, [error["code"] for error in ended.stream[-1]["errors"]]) == (4, ["killed"])
    on_two.assert_nothing_left()


def test_a_port_lost_to_another_is_replaced(on_two: Mgpu, small: Path, tmp_path: Path) -> None:
    program = tmp_path / "late"
    ollama = on_two.environment["MGPU_OLLAMA"]
    program.write_text(f"""#!/bin/sh
[ -e {tmp_path}/once ] || {{
    touch {tmp_path}/once
    echo "Error: listen tcp $OLLAMA_HOST: bind: address already in use" >&2
    exit 1
}}
exec {ollama} "$@"
""")
    program.chmod(0o755)
    ended = on_two("run", small, *ON_TWO, "--ask", "Hello", "--json", MGPU_OLLAMA=str(program))
    assert ended.exit_code == 0
    assert ended.events.count("started") >= 2  # more, where others take ports at the same time
    assert ended.events.count("ready") == 1


CROWDED = (
    "CUDA0: NVIDIA GeForce RTX 4090 (24081 MiB, 330 MiB free);CUDA1: NVIDIA GeForce RTX 4090 (24081 MiB, 330 MiB free)"
)


@pytest.mark.parametrize(
    ("words", "different", "complaint"),
    [
        pytest.param("", {"FAKE_FAIL": "one-card"}, "the whole model is on gpu0; gpu1 holds nothing", id="one card"),
        pytest.param(
            "",
            {"FAKE_FAIL": "cpu-runner"},
            "the whole model is in RAM and runs on the CPU; asked for: gpu0 and gpu1",
            id="the CPU",
        ),
        pytest.param(
            "",
            {"FAKE_FAIL": "cpu-runner,amx-lie"},
            "the whole model is in RAM and runs on the CPU",
            id="the CPU, whose matrix unit poses as a card",
        ),
        pytest.param("", {"FAKE_DEVICES": CROWDED}, "of 31 layers are on cards, 31 were planned", id="layers in RAM"),
        pytest.param(
            "--ctx 16k",
            {},
            "each user gets 8192 tokens of context instead of the 16384 planned",
            id="a smaller context",
        ),
    ],
)
def test_what_ollama_does_otherwise_without_a_word_is_said_loudly(
    on_two: Mgpu, small: Path, tiny: Path, tmp_path: Path, words: str, different: dict[str, str], complaint: str
) -> None:
    model = tiny if words else small
    program = str(installed_with(tmp_path, **different))
    line = ("run", model, *ON_TWO, *words.split(), "--ask", "Hello")
    human = on_two(*line, MGPU_OLLAMA=program)
    assert human.exit_code == 0
    assert re.search(rf"(?m)^warning +.*{complaint}", human.err), human
    machine = on_two(*line, "--json", MGPU_OLLAMA=program)
    checked_stream(machine)
    assert any(complaint in warning for warning in warnings_of(machine))


def test_a_plan_names_what_ollama_would_do_by_itself(on_two: Mgpu, small: Path) -> None:
    plan = on_two("plan", small, *ON_TWO, "--json").json["data"]
    both, alone = plan["candidates"]
    assert [device["gpu"] for device in both["devices"]] == [0, 1]
    assert [device["gpu"] for device in alone["devices"]] == [0]
    assert "by itself Ollama would put it on gpu0 alone" in both["reasons"][0]
    assert json.loads(json.dumps(both["env"]))["OLLAMA_SCHED_SPREAD"] == "1"
