"""The exact llama-server command of a plan, and what may follow `--`."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from mgpu.backends.backend import Launch, Serving
from mgpu.backends.llama_cpp import (
    API_KEY_VARIABLE,
    EngineArguments,
    build_launch,
    read_engine_arguments,
)
from mgpu.errors import UsageError
from mgpu.machine.snapshot import Gpu, Host
from mgpu.models.facts import ModelFacts
from mgpu.models.shape import facts_from_shape
from mgpu.planning.candidates import Candidate, layer_split
from mgpu.planning.wants import Wants
from mgpu.units import GIB
from tests.fakes.devices import real_llama_server
from tests.fakes.llama_server_options import options
from tests.fakes.shapes import SHAPES

RPC_SERVERS = "127.0.0.1:1,127.0.0.1:2"
MEMORY = "-ctk f16 -ctv f16 -ub 512 -fa auto"
OTHER_MEMORY = "-ctk q8_0 -ctv q4_0 -ub 1024 -fa on"
END = "-lv 4 --metrics --sse-ping-interval 2"
BUS_ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


@cache
def facts(model: str = "llama-3.1-8b") -> ModelFacts:
    return facts_from_shape(model, SHAPES[model], "Q4_K_M")


def card(device: str, free_gib: float = 24, uuid: str | None = None) -> Gpu:
    index = int(device.lstrip("CUDARPVulkan"))
    free = round(free_gib * GIB)
    return Gpu(
        index=index,
        vendor="nvidia",
        name="card",
        uuid=uuid,
        free_bytes=free,
        total_bytes=free,
        engine_devices=(device,),
    )


def candidate(gpus: Sequence[Gpu], wants: Wants | None = None) -> Candidate:
    return layer_split(facts(), wants or Wants(), gpus, Host(), 8192)


def launch(planned: Candidate, arguments: EngineArguments | None = None, **changes: str | None) -> Launch:
    words = arguments or EngineArguments()
    serving = Serving(
        program=Path("llama-server"),
        model=changes.get("model") or "m.gguf",
        name="llama",
        host="127.0.0.1",
        port=8080,
        folder=Path(),
        arguments=(*(("--rpc", words.rpc) if words.rpc else ()), *words.rest),
        api_key=changes.get("api_key"),
    )
    return build_launch(planned, serving)


PINNED = (card("CUDA1", uuid="GPU-1b"), card("CUDA3", uuid="GPU-3d"))
RPC = (card("RPC0"), card("RPC1", 12))
LAUNCHES = {
    "cards are pinned by UUID, which numbers them anew in their order": (
        candidate(PINNED),
        EngineArguments(),
        {**BUS_ORDER, "CUDA_VISIBLE_DEVICES": "GPU-1b,GPU-3d"},
        f"-dev CUDA0,CUDA1 -ngl 33 -sm layer -ts 17,16 --fit off -c 8192 -np 1 {MEMORY} {END}",
    ),
    "cards without a known UUID keep the engine's names": (
        candidate((card("CUDA1", uuid="GPU-1b"), card("CUDA3"))),
        EngineArguments(),
        BUS_ORDER,
        f"-dev CUDA1,CUDA3 -ngl 33 -sm layer -ts 17,16 --fit off -c 8192 -np 1 {MEMORY} {END}",
    ),
    "one card": (
        candidate(PINNED[1:]),
        EngineArguments(),
        {**BUS_ORDER, "CUDA_VISIBLE_DEVICES": "GPU-3d"},
        f"-dev CUDA0 -ngl 33 -sm none --fit off -c 8192 -np 1 {MEMORY} {END}",
    ),
    "RPC devices are named after their servers are": (
        candidate(RPC),
        EngineArguments(rpc=RPC_SERVERS),
        {},
        f"--rpc {RPC_SERVERS} -dev RPC0,RPC1 -ngl 33 -sm layer -ts 24,9 --fit off -c 8192 -np 1 {MEMORY} {END}",
    ),
    "a local and a remote card": (
        candidate((*PINNED[:1], *RPC[:1])),
        EngineArguments(rpc=RPC_SERVERS),
        BUS_ORDER,
        f"--rpc {RPC_SERVERS} -dev CUDA1,RPC0 -ngl 33 -sm layer -ts 17,16 --fit off -c 8192 -np 1 {MEMORY} {END}",
    ),
    "no card": (
        candidate(()),
        EngineArguments(),
        {},
        f"-dev none -ngl 0 --fit off -c 8192 -np 1 {MEMORY} {END}",
    ),
    "some layers on the host": (
        candidate((card("Vulkan0", 4),), Wants(offload=True)),
        EngineArguments(),
        {},
        f"-dev Vulkan0 -ngl 18 -sm none --fit off -c 8192 -np 1 {MEMORY} {END}",
    ),
    "a card too small for anything": (
        candidate((card("Vulkan0", 0.5),), Wants(offload=True)),
        EngineArguments(),
        {},
        f"-dev none -ngl 0 --fit off -c 8192 -np 1 {MEMORY} {END}",
    ),
    "proportions of the user, in whole units": (
        candidate(PINNED, Wants(tensor_split=(3.0, 1.0))),
        EngineArguments(),
        {**BUS_ORDER, "CUDA_VISIBLE_DEVICES": "GPU-1b,GPU-3d"},
        f"-dev CUDA0,CUDA1 -ngl 33 -sm layer -ts 25,8 --fit off -c 8192 -np 1 {MEMORY} {END}",
    ),
    "a card that would hold nothing is left out": (
        candidate((PINNED[0], card("CUDA2", 0.1, uuid="GPU-2c"), PINNED[1])),
        EngineArguments(),
        {**BUS_ORDER, "CUDA_VISIBLE_DEVICES": "GPU-1b,GPU-3d"},
        f"-dev CUDA0,CUDA1 -ngl 33 -sm layer -ts 17,16 --fit off -c 8192 -np 1 {MEMORY} {END}",
    ),
    "the context is for each of four users, in whole granules": (
        replace(candidate(PINNED[:1]), ctx_tokens=5000, parallel=4),
        EngineArguments(),
        {**BUS_ORDER, "CUDA_VISIBLE_DEVICES": "GPU-1b"},
        f"-dev CUDA0 -ngl 33 -sm none --fit off -c 20480 -np 4 {MEMORY} {END}",
    ),
    "wishes and further arguments": (
        candidate(PINNED[:1], Wants(kv_type_k="q8_0", kv_type_v="q4_0", ubatch=1024, flash_attention="on")),
        EngineArguments(rest=("--temp", "0.5", "--jinja")),
        {**BUS_ORDER, "CUDA_VISIBLE_DEVICES": "GPU-1b"},
        f"-dev CUDA0 -ngl 33 -sm none --fit off -c 8192 -np 1 {OTHER_MEMORY} {END} --temp 0.5 --jinja",
    ),
}
by_name = pytest.mark.parametrize("name", LAUNCHES)


@by_name
def test_the_command_is_exactly_the_plan(name: str) -> None:
    planned, arguments, env, expected = LAUNCHES[name]
    built = launch(planned, arguments)
    head = "llama-server -m m.gguf --alias llama --host 127.0.0.1 --port 8080"
    assert " ".join(built.argv) == f"{head} {expected}"
    assert built.env == env


@pytest.mark.real_engine
@by_name
def test_the_engine_accepts_every_command(name: str) -> None:
    planned, arguments, _, _ = LAUNCHES[name]
    argv = list(launch(planned, arguments).argv[1:])
    place = argv.index("-dev")
    del argv[place : place + 2]  # devices that are not here
    command = [str(real_llama_server()), *argv, "--list-devices"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.splitlines()[:1]) == (0, ["Available devices:"]), done.stderr


@pytest.mark.real_engine
def test_experts_that_the_plan_leaves_to_the_host_are_named_once() -> None:
    model = facts("qwen3-30b-a3b")
    for wants, rest in ((Wants(offload=True), ()), (Wants(cpu_moe_layers=99), ("--n-cpu-moe", "99"))):
        planned = layer_split(model, wants, [card("CUDA0", 8)], Host(), 8192)
        assert planned.verdict == "fits-with-offload"
        argv = launch(planned, EngineArguments(rest=rest)).argv
        assert argv.count("--n-cpu-moe") == 1
        count = int(argv[argv.index("--n-cpu-moe") + 1])
        assert count == (99 if rest else planned.host.expert_layers)
        assert planned.host.layers == 0


def test_a_tensor_split_gives_every_card_all_layers() -> None:
    wants = Wants(split_mode="tensor", tensor_split=(3, 1))
    planned = layer_split(facts(), wants, [card("CUDA0"), card("CUDA1")], Host(), 8192)
    argv = " ".join(launch(planned).argv)
    assert " -ngl 33 -sm tensor -ts 3,1 " in argv
    assert [device.layers for device in planned.devices] == [32, 32]


def test_the_engine_knows_every_flag_by_the_names_that_are_refused() -> None:
    done = subprocess.run([str(real_llama_server()), "--help"], capture_output=True, text=True, timeout=60, check=True)
    known = set(re.findall(r"(?:^|[,\s])(--?[a-z][a-z0-9-]*)", done.stdout))
    assert {word for word in REFUSED if word not in known} == set()


REFUSED = {
    flag: option
    for flags, option in {
        "-m --model -mu --model-url -hf -hfr --hf-repo -hff --hf-file": "MODEL",
        "-a --alias": "--name",
        "--host": "--host",
        "--port": "--port",
        "-dev --device": "--gpus",
        "-sm --split-mode": "--split-mode",
        "-ts --tensor-split": "--tensor-split",
        "-ngl --gpu-layers --n-gpu-layers -fit --fit": "--offload",
        "-c --ctx-size": "--ctx",
        "-np --parallel": "--parallel",
        "-ctk --cache-type-k -ctv --cache-type-v": "--kv-type",
        "-ub --ubatch-size": "--ubatch",
        "-fa --flash-attn": "--flash-attn",
        "--api-key --api-key-file": "--api-key",
        "--api-prefix --ssl-key-file --ssl-cert-file": "proxy",
    }.items()
    for flag in flags.split()
}


@pytest.mark.parametrize("flag", REFUSED)
@pytest.mark.parametrize("spelling", ["{} x", "{}=x", "--temp 0.5 {}"])
def test_what_mgpu_sets_itself_is_refused_after_the_dashes(flag: str, spelling: str) -> None:
    with pytest.raises(UsageError) as refused:
        read_engine_arguments(spelling.format(flag).split(), Wants())
    assert flag in refused.value.message
    assert REFUSED[flag] in (refused.value.hint or "")


def test_no_other_spelling_of_a_refused_flag_slips_through() -> None:
    known = options()
    assert {name for flag in REFUSED for name in known[flag].names} == set(REFUSED)


@pytest.mark.parametrize(
    ("words", "rest", "rpc", "wants"),
    [
        pytest.param("", "", None, Wants(), id="nothing"),
        pytest.param("--temp 0.5 -t 4", "--temp 0.5 -t 4", None, Wants(), id="all else stays as typed"),
        pytest.param("--rpc a:1,b:2 -t 4", "-t 4", "a:1,b:2", Wants(), id="RPC servers"),
        pytest.param("--rpc=a:1", "", "a:1", Wants(), id="RPC servers joined to the flag"),
        pytest.param("--rpc a:1 --rpc b:2", "", "b:2", Wants(), id="the last of several wins as in llama.cpp"),
        pytest.param("-nkvo", "-nkvo", None, Wants(kv_on_host=True), id="cache on the host"),
        pytest.param("--no-kv-offload", "--no-kv-offload", None, Wants(kv_on_host=True), id="the same in long"),
        pytest.param("-kvu", "-kvu", None, Wants(kv_unified=True), id="one cache for all"),
        pytest.param("--kv-unified", "--kv-unified", None, Wants(kv_unified=True), id="one cache for all in long"),
        pytest.param("--swa-full", "--swa-full", None, Wants(swa_full=True), id="whole windows"),
        pytest.param("--embeddings", "--embeddings", None, Wants(embeddings=True), id="an output for every token"),
        pytest.param("-ncmoe 7", "-ncmoe 7", None, Wants(cpu_moe_layers=7), id="experts of some layers"),
        pytest.param("--n-cpu-moe 7", "--n-cpu-moe 7", None, Wants(cpu_moe_layers=7), id="the same in words"),
        pytest.param("--cpu-moe", "--cpu-moe", None, Wants(cpu_moe_layers=1_000_000), id="experts of all layers"),
        pytest.param("-cmoe", "-cmoe", None, Wants(cpu_moe_layers=1_000_000), id="experts of all layers in short"),
        pytest.param("--n-cpu-moe many", "--n-cpu-moe many", None, Wants(), id="nonsense is left to the engine"),
        pytest.param("-ncmoe", "-ncmoe", None, Wants(), id="a value that is missing, too"),
    ],
)
def test_memory_switches_reach_the_plan(words: str, rest: str, rpc: str | None, wants: Wants) -> None:
    arguments, planned = read_engine_arguments(words.split(), Wants())
    assert arguments == EngineArguments(rest=tuple(rest.split()), rpc=rpc)
    assert planned == wants


@pytest.mark.parametrize(
    ("override", "layers"),
    [
        pytest.param("exps=CPU", 1_000_000, id="all experts"),
        pytest.param(r".ffn_.*_exps.=CPU", 1_000_000, id="all experts by their names"),
        pytest.param(r"\.ffn_(up|down|gate)_exps\.=CPU", 1_000_000, id="all experts one by one"),
        pytest.param(r"blk\.[0-7]\.ffn_.*_exps\.=CPU", 8, id="those of the first layers"),
        pytest.param(r"blk\.[2-7]\.ffn_.*_exps\.=CPU", 0, id="not the first layers"),
        pytest.param(r"ffn_(up|down)_exps=CPU", 0, id="only some matrices of each"),
        pytest.param(r"ffn_=CPU", 0, id="dense layers, too"),
        pytest.param(r"blk\.0\.=CPU", 0, id="whole layers"),
        pytest.param("exps=CUDA1", 0, id="another card"),
        pytest.param("(=CPU", 0, id="no pattern at all"),
        pytest.param("", 0, id="nothing"),
    ],
)
def test_overrides_that_keep_experts_on_the_host_are_in_the_plan(override: str, layers: int) -> None:
    arguments, wants = read_engine_arguments(["-ot", override], Wants())
    assert wants.cpu_moe_layers == layers
    assert arguments.unplanned == (() if layers else ("-ot",))


def test_rpc_servers_may_come_from_the_engines_own_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ARG_RPC", "a:1")
    assert read_engine_arguments([], Wants())[0].rpc == "a:1"
    assert read_engine_arguments(["--rpc", "b:2"], Wants())[0].rpc == "b:2"
    monkeypatch.setenv("LLAMA_ARG_RPC", "")
    assert read_engine_arguments([], Wants())[0].rpc is None


@pytest.mark.parametrize("words", [["--rpc"], ["--rpc="], ["--rpc", ""]])
def test_rpc_without_a_server_is_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        read_engine_arguments(words, Wants())


def test_the_api_key_is_in_the_environment_alone_and_shown_nowhere() -> None:
    built = launch(candidate(PINNED), api_key="s3cret,other")
    assert built.env[API_KEY_VARIABLE] == "s3cret,other"
    assert built.public_env() == {
        **BUS_ORDER,
        "CUDA_VISIBLE_DEVICES": "GPU-1b,GPU-3d",
        API_KEY_VARIABLE: "***",
    }
    assert "s3cret" not in " ".join(built.argv)
    assert "s3cret" not in built.shell_command()
    assert f'{API_KEY_VARIABLE}="${{{API_KEY_VARIABLE}:?}}" llama-server -m' in built.shell_command()
    assert launch(candidate(PINNED)).secrets == frozenset()


@pytest.mark.parametrize("key", ["two\nlines", " leading", "trailing ", "tab\t"])
def test_a_key_no_client_could_send_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(UsageError) as refused:
        launch(candidate(PINNED), api_key=key)
    assert key not in refused.value.message


@pytest.mark.parametrize("model", ["/m/a b.gguf", 'it\'s "$HOME" `x`.gguf', "/m/ü;rm -rf.gguf", "a\nb.gguf"])
def test_a_shell_reads_the_command_back(model: str, tmp_path: Path) -> None:
    built = launch(candidate(PINNED), model=model, api_key="s3cret")
    words = shlex.split(built.shell_command())
    assert tuple(words[len(built.env) :]) == built.argv
    program = tmp_path / "llama-server"
    program.write_text('#!/bin/sh\nprintf "%s\\0" "$LLAMA_API_KEY" "$CUDA_VISIBLE_DEVICES" "$@"\n')
    program.chmod(0o755)
    shell = {"PATH": f"{tmp_path}:/usr/bin:/bin", API_KEY_VARIABLE: "from the shell"}
    said = subprocess.run(["/bin/sh", "-c", built.shell_command()], env=shell, capture_output=True, check=True).stdout
    assert said.decode().split("\0")[:-1] == ["from the shell", "GPU-1b,GPU-3d", *built.argv[1:]]
