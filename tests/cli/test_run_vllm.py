"""`mgpu run` with vLLM over two cards and in other shapes: what is planned is started, checked, answers and is watched.

The engine and the driver are fakes; `tests/running/test_real_vllm.py` types the same line with a real engine.
"""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from mgpu.backends.vllm import temporary_folder
from tests.fakes.devices import free_port
from tests.fakes.tiny_llama import CONFIG, make_tiny_llama

from .contract import LAUNCH, PLAN, checked, checked_stream
from .program import Mgpu, request, until
from .vllm_rig import UUIDS, arguments_of, open_request, rig, settings_of, with_vllm

ANSWER = " I am a made up answer of something that has never seen any model\n"
ANSWER_TOKENS = len(ANSWER.split()) + 1
SECRET = "sk-6f1ed002ab5595859014ebf0951522d9"  # made up
# What a user's shell may hold, and the engine is not to see.
PRIVATE = {"HF_TOKEN": "hf_not_for_engines", "HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}
TWO = ("--gpus", "2")
# A request takes a good part of it.
SMALL_CACHE = {"FAKE_OVERHEAD_BYTES": str(22_740_000_000), "FAKE_TOKENS_PER_SECOND": "50"}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def on_two(mgpu: Mgpu, nvml: dict[str, Path], tmp_path: Path) -> Mgpu:
    return with_vllm(mgpu, nvml, tmp_path)


def test_what_is_planned_is_what_is_started(on_two: Mgpu, model: Path) -> None:
    words = (model, *TWO, "--ctx", "1024")
    port = free_port()
    shown = on_two("run", *words, "--port", port, "--dry-run")
    launch = checked(on_two("run", *words, "--port", port, "--dry-run", "--json").json, "run", LAUNCH)
    argv, env = launch["argv"], launch["env"]
    assert shlex.split(shown.out) == [*(f"{name}={value}" for name, value in env.items()), *argv]
    assert argv[:3] == [on_two.environment["MGPU_VLLM"], "serve", str(model)]
    assert " ".join(argv[3:]) == (
        f"--served-model-name tiny --host 127.0.0.1 --port {port} --tensor-parallel-size 2 --max-model-len 1024 "
        "--max-num-seqs 1 --gpu-memory-utilization 0.9 --shutdown-timeout 3"
    )
    assert env == {
        "TMPDIR": str(temporary_folder(on_two.state / "tiny")),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": ",".join(UUIDS),
    }

    plan = checked(on_two("plan", *words, "--json").json, "plan", PLAN)
    best = plan["candidates"][plan["best"]]
    at = argv.index("--port") + 1
    assert [*best["argv"][:at], str(port), *best["argv"][at + 1 :]] == argv
    assert best["env"] == env

    running = on_two.start("run", *words, "--port", port, **PRIVATE)
    pid = running.engine_pid()
    assert arguments_of(pid)[-len(argv) + 1 :] == argv[1:]
    seen = settings_of(pid)
    assert env.items() <= seen.items()
    assert "HF_TOKEN" not in seen
    assert "HIP_VISIBLE_DEVICES" not in seen
    assert running.end(signal.SIGINT).exit_code == 130


def test_an_answer_is_alone_on_stdout(on_two: Mgpu, model: Path) -> None:
    ended = on_two("run", model, *TWO, "--ask", "Hello", FAKE_TOKENS_PER_SECOND="50")
    assert (ended.exit_code, ended.out) == (0, ANSWER), ended
    words = [line.split()[0] for line in ended.err.splitlines()]
    assert list(dict.fromkeys(words)) == ["plan", "engine", "flags", "start", "check", "ready:", "answer", "stop"]
    assert re.search(
        r"(?m)^plan +vLLM · bf16 · 2048 tokens · tensor parallel 2 over gpu0, gpu1 · 21\.\d+ \+ ", ended.err
    )
    assert re.search(r"(?m)^check +gpu0 20\.\d+ of 20\.\d+, gpu1 20\.\d+ of 20\.\d+ GiB planned · answered", ended.err)
    assert re.search(r"(?m)^ready: tiny on http://127\.0\.0\.1:\d+/v1  \(vllm, 2 GPUs, pid \d+, ", ended.err)
    rate = re.search(rf"(?m)^answer +{ANSWER_TOKENS} tokens at (\d+\.\d) tokens/s · prompt \d+ tokens at", ended.err)
    assert rate, ended
    assert 1 < float(rate[1]) < 75, "the engine makes 50 in a second"
    on_two.assert_nothing_left()


def test_a_run_as_json_keeps_the_contract(on_two: Mgpu, model: Path) -> None:
    ended = on_two("run", model, *TWO, "--ask", "Hello", "--max-tokens", "5", "--json", FAKE_DELAY="1")
    assert ended.exit_code == 0, ended
    events = checked_stream(ended)
    steps = ["planned", "started", "loading", "checked", "ready", "answer", "answered", "stopping", "stopped"]
    assert list(dict.fromkeys(events)) == steps  # a port may be lost to another: started twice
    assert ended.event("planned")["backend"] == "vllm"
    cards = ended.event("checked")["devices"]
    assert [card["uuid"] for card in cards] == list(UUIDS)
    assert all(0.9 < card["actual_bytes"] / card["planned_bytes"] < 1.1 for card in cards)
    answered = ended.event("answered")
    assert (answered["generated_tokens"], answered["finish_reason"]) == (5, "length")
    assert answered["generation_tok_s"] > 0
    assert answered["prompt_tok_s"] > 0


def test_the_status_tells_of_other_clients(on_two: Mgpu, model: Path) -> None:
    running = on_two.start("run", model, *TWO, "--interval", "0.1", **SMALL_CACHE)
    url = running.url()
    idle, busy = "0 running, 0 waiting   0.0 tok/s ", r"1 running, 1 waiting   [1-9]\d*\.\d tok/s "
    running.line(f"ready .* {idle}")
    with open_request(url), open_request(url):
        running.line(rf"ready .* {busy} .* KV [1-9]\d*%   gpu0 RTX 4090 .* gpu1 RTX 4090 ")
    seen = running.out.count(idle)
    until(lambda: running.out.count(idle) > seen, "nobody asks any more")
    assert running.end(signal.SIGINT).exit_code == 130


def test_the_status_as_json_keeps_the_contract(on_two: Mgpu, model: Path) -> None:
    running = on_two.start("run", model, *TWO, "--interval", "0.1", "--json", **SMALL_CACHE)
    with open_request(running.url()):
        running.line(r'.*"generation_tok_s": [1-9].*"running": 1, "waiting": 0, "kv_used": 0\.[1-9]')
    ended = running.end(signal.SIGINT)
    assert ended.exit_code == 130
    assert set(checked_stream(ended)) >= {"status", "stopped"}


@pytest.mark.parametrize(
    ("words", "cards", "flags", "variables"),
    [
        pytest.param(
            "--gpus 2 --pipeline-parallel 2",
            "6000ada-4090",
            "--tensor-parallel-size 1 --pipeline-parallel-size 2",
            {"VLLM_PP_LAYER_PARTITION": "3,1", "CUDA_VISIBLE_DEVICES": ",".join(UUIDS)},
            id="a pipeline over unlike cards",
        ),
        pytest.param(
            "--gpus 2",
            "6000ada-4090",
            "--tensor-parallel-size 1 --pipeline-parallel-size 2",
            {"VLLM_PP_LAYER_PARTITION": "3,1"},
            id="unlike cards by themselves",
        ),
        pytest.param(
            "--replicas 2",
            "2x4090-x670e",
            "--tensor-parallel-size 1 --data-parallel-size 2",
            {"CUDA_VISIBLE_DEVICES": ",".join(UUIDS)},
            id="a replica on each card",
        ),
        pytest.param("--parallel 4 --tensor-parallel 2", "2x4090-x670e", "--max-num-seqs 4", {}, id="four users"),
        pytest.param("--parallel 4 --replicas 2", "2x4090-x670e", "--max-num-seqs 2", {}, id="two for each replica"),
        pytest.param("--kv-type fp8", "2x4090-x670e", "--kv-cache-dtype fp8", {}, id="a KV cache in fp8"),
        pytest.param(
            "--gpus gpu1,gpu0",
            "2x4090-x670e",
            "--tensor-parallel-size 2",
            {"CUDA_VISIBLE_DEVICES": ",".join(reversed(UUIDS))},
            id="cards in another order",
        ),
        pytest.param(
            "--gpus gpu1", "2x4090-x670e", "--tensor-parallel-size 1", {"CUDA_VISIBLE_DEVICES": UUIDS[1]}, id="one card"
        ),
        pytest.param(
            "--tensor-parallel 2 -- --enforce-eager --gpu-memory-utilization=0.5 --dtype half",
            "2x4090-x670e",
            "--gpu-memory-utilization 0.5 --shutdown-timeout 3 --enforce-eager --dtype half",
            {},
            id="flags of its own",
        ),
    ],
)
def test_every_shape_is_started_and_answers(
    on_two: Mgpu, model: Path, words: str, cards: str, flags: str, variables: dict[str, str]
) -> None:
    chosen, *own = words.split(" -- ")
    asked = (*chosen.split(), "--ask", "Hello", "--json", *(("--", *own[0].split()) if own else ()))
    on_two.environment |= rig(cards)
    ended = on_two("run", model, *asked)
    assert ended.exit_code == 0, ended
    assert "warning" not in ended.events
    launch = checked(on_two("run", model, "--dry-run", *asked).json, "run", LAUNCH)
    assert f" {flags} " in f"{shlex.join(launch['argv'])} "
    assert variables.items() <= launch["env"].items()
    log = Path(ended.event("started")["log_path"]).read_text()
    for flag in re.findall(r"--(\S+) \S+", flags.partition(" --enforce")[0]):
        name, value = flag.replace("-", "_"), launch["argv"][launch["argv"].index(f"--{flag}") + 1]
        assert value == "1" or re.search(rf"'{name}': '?{value}", log), "the engine understood it so"
    on_two.assert_nothing_left()


def test_a_profile_runs_from_the_shared_cache(on_two: Mgpu, model: Path, tmp_path: Path) -> None:
    """A repository that another program has fetched: nothing is, and the engine gets the folder."""
    folder = tmp_path / "hub" / "models--mgpu--tiny"
    revision = "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    make_tiny_llama(folder / "snapshots" / revision)
    assert CONFIG["num_hidden_layers"] == 4
    ended = on_two(
        "run", "hf:mgpu/tiny", *TWO, "--ask", "Hello", HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1"
    )
    assert (ended.exit_code, ended.out) == (0, ANSWER), ended


@pytest.mark.parametrize("variable", ["MGPU_API_KEY", "VLLM_API_KEY", "--api-key-file"])
def test_a_key_reaches_the_engine_and_nobody_else(on_two: Mgpu, model: Path, tmp_path: Path, variable: str) -> None:
    (tmp_path / "key").write_text(SECRET)
    option = () if variable.isupper() else (variable, tmp_path / "key")
    environment = {variable: SECRET} if variable.isupper() else {}
    running = on_two.start("run", model, *TWO, *option, "--json", "--interval", "0.1", **environment)
    url = running.url()
    running.event("status")
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    assert request(url, "/v1/chat/completions", body)[0] == 401
    assert request(url, "/v1/chat/completions", body, key=SECRET)[0] == 200
    listed = subprocess.run(["ps", "-ww", "-eo", "args="], capture_output=True, text=True, check=True).stdout
    assert SECRET not in listed
    assert settings_of(running.engine_pid())["VLLM_API_KEY"] == SECRET
    ended = running.end(signal.SIGINT)
    assert SECRET not in ended.out + ended.err
    written = [path for path in on_two.state.rglob("*") if path.is_file()]
    assert len(written) >= 2
    assert not any(SECRET.encode() in path.read_bytes() for path in written)
    shown = on_two("run", model, *TWO, *option, "--dry-run", **environment)
    assert 'VLLM_API_KEY="${VLLM_API_KEY:?}"' in shown.out
    assert SECRET not in shown.out


def test_a_proxy_is_not_asked_for_the_way_to_this_machine(on_two: Mgpu, model: Path) -> None:
    names = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    ended = on_two("run", model, *TWO, "--ask", "Hello", **dict.fromkeys(names, f"http://127.0.0.1:{free_port()}"))
    assert (ended.exit_code, ended.out) == (0, ANSWER), ended
