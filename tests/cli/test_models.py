"""Models that fetch themselves, through the program: `plan hf:…`, `run hf:…`, `pull` and `ls`."""

from __future__ import annotations

import json
import random
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgpu.cli.pace import Pace
from mgpu.cli.pulls import OllamaPull
from mgpu.cli.views.status import fetch_line
from mgpu.models.fetch import Progress
from tests.fakes.devices import free_port
from tests.fakes.hub_server import FakeHub, running
from tests.fakes.ollama_running import MODEL as OLLAMA_MODEL
from tests.fakes.ollama_running import RunningOllama, running_ollama
from tests.fakes.ollama_server import install as install_ollama
from tests.fakes.shapes import SHAPES
from tests.fakes.sparse_gguf import make_sparse_gguf
from tests.fakes.tiny_llama import make_tiny_llama, write_safetensors

from .contract import COUNT, FLAG, NOTHING, NUMBER, PLAN, TEXT, TIME, checked, exactly, listed, maybe
from .program import Mgpu, until

FORMAT = {"enum": ["gguf", "safetensors", "ollama"]}
PULL = exactly(
    models=listed(
        exactly(
            model=TEXT,
            format=FORMAT,
            quantisation=maybe(TEXT),
            path=maybe(TEXT),
            bytes=maybe(COUNT),
            fetched=FLAG,
            seconds=maybe(NUMBER),
            error=maybe(TEXT),
        )
    ),
    fetched_bytes=COUNT,
)
LS = exactly(
    models=listed(
        exactly(
            model=TEXT,
            name=TEXT,
            format=FORMAT,
            profile=maybe(TEXT),
            repository=maybe(TEXT),
            quantisation=maybe(TEXT),
            bytes=COUNT,
            total_bytes=maybe(COUNT),
            path=maybe(TEXT),
            last_used_at=TIME,
            state={"enum": ["complete", "partial", "broken"]},
            problem=maybe(TEXT),
        )
    ),
    total_bytes=COUNT,
    folders=listed(TEXT),
)
PROFILE = """\
name: mine
description: A profile of the user's
license: mit
model: {architecture: llama, layers: 4, embedding_length: 2048, feed_forward_length: 8192, heads: 32, kv_heads: 8,
  vocabulary: 1000, context_length: 131072, tied_embeddings: true, rope_freqs: true}
quantisations:
  Q4_K_M: {repository: org/mine}
default_quantisation: Q4_K_M
"""
FOR_OTHER_ENGINES = f"""\
vllm:
  - {{repository: org/none, quantisation: fp8}}
  - {{repository: org/tiny, quantisation: bf16}}
ollama: {OLLAMA_MODEL}
"""


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A model of four layers in 12 MB."""
    path = tmp_path_factory.mktemp("small") / "m.gguf"
    shape = SHAPES["smollm2-135m"].model_copy(update={"embedding_length": 512, "heads": 8, "kv_heads": 2})
    return make_sparse_gguf(path, shape, "Q4_0", layers=4, vocabulary=1000).read_bytes()


@pytest.fixture
def hub(mgpu: Mgpu, tmp_path: Path, small: bytes) -> Iterator[FakeHub]:
    """A hub with some models, which `mgpu` asks; its caches are in a folder of the test's own."""
    big = make_sparse_gguf(tmp_path / "Big-Q4_K_M.gguf", SHAPES["llama-3.3-70b"], "Q4_K_M")
    tiny = make_tiny_llama(tmp_path / "tiny")
    repositories: dict[str, dict[str, bytes | Path]] = {
        "org/Big-GGUF": {big.name: big},
        "org/mine": {"mine-Q4_K_M.gguf": small},
        "org/both": {"both-Q4_K_M.gguf": small + b"both"},
        "org/tiny": {path.name: path.read_bytes() for path in tiny.iterdir()},
        "org/pickle": {"config.json": b"{}", "pytorch_model.bin": b"x"},
    }
    profiles = Path(mgpu.environment["XDG_CONFIG_HOME"]) / "mgpu/profiles"
    profiles.mkdir(parents=True)
    (profiles / "mine.yaml").write_text(PROFILE)
    (profiles / "both.yaml").write_text(PROFILE.replace("mine", "both") + FOR_OTHER_ENGINES)
    with running(FakeHub(repositories)) as serving:
        mgpu.environment |= {
            "HF_ENDPOINT": serving.endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "OLLAMA_MODELS": str(tmp_path / "ollama"),
            "OLLAMA_HOST": f"127.0.0.1:{free_port()}",
        }
        for variable in ("HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            mgpu.environment.pop(variable, None)
        yield serving


def test_a_model_on_the_hub_is_planned_before_it_is_fetched(mgpu: Mgpu, hub: FakeHub) -> None:
    ended = mgpu("plan", "hf:org/Big-GGUF", "--machine", "2x4090", "--json")
    plan = checked(ended.json, "plan", PLAN)
    assert (plan["model"]["name"], plan["model"]["layers"], plan["best"]) == ("Big", 80, 0)
    assert plan["model"]["source"] == "hf:org/Big-GGUF/Big-Q4_K_M.gguf"
    assert hub.served_bytes < plan["model"]["file_bytes"] / 1000
    served = hub.served_bytes
    assert "FITS   Big · Q4_K_M" in mgpu("plan", "hf:org/Big-GGUF:Q4_K_M", "--machine", "2x4090").out
    assert hub.served_bytes == served


def test_a_model_on_the_hub_is_run(mgpu: Mgpu, hub: FakeHub, small: bytes) -> None:
    ended = mgpu("run", "hf:org/mine", "--ctx", "512", "--ask", "Why?")
    assert (ended.exit_code, ended.out.startswith("I am a fake engine")) == (0, True)
    assert "fetch    mine-Q4_K_M.gguf" in ended.err
    assert hub.served_bytes < 2 * len(small)
    served, asked = hub.served_bytes, len(hub.requests)
    assert mgpu("run", "hf:org/mine", "--ctx", "512", "--ask", "Why?").exit_code == 0
    assert (hub.served_bytes, len(hub.requests)) == (served, asked)
    mgpu.assert_nothing_left()


def test_without_the_hub_a_plan_says_that_it_is_not_confirmed(mgpu: Mgpu, hub: FakeHub) -> None:
    mgpu("plan", "hf:org/Big-GGUF", "--machine", "2x4090")
    ended = mgpu("plan", "hf:org/Big-GGUF", "--machine", "2x4090", "--json", HF_HUB_OFFLINE="1")
    assert ended.exit_code == 0
    assert ended.json["warnings"] == ["planned from what was read of hf:org/Big-GGUF before: HF_HUB_OFFLINE is set"]


@pytest.mark.parametrize(
    ("words", "changes", "code"),
    [
        pytest.param("plan hf:org/none", {}, "not-found", id="plan of no repository"),
        pytest.param("plan hf:org/mine", {"gated": True}, "gated", id="plan of a gated one"),
        pytest.param("plan hf:org/mine:Q2_K", {}, "quantisation-unknown", id="plan of no such quantisation"),
        pytest.param("plan hf:org/mine --quant Q2_K", {}, "quantisation-unknown", id="the same by --quant"),
        pytest.param("plan hf:org/mine:Q4_K_M --quant Q2_K", {}, "usage", id="two quantisations"),
        pytest.param("plan hf:org/mine --quant ..", {}, "usage", id="a quantisation that is none"),
        pytest.param("plan hf:../mine", {}, "usage", id="a way out"),
        pytest.param("plan hf:org/..", {}, "usage", id="another"),
        pytest.param("plan hf:org/mine", {"is_a_proxy_page": True}, "bad-server", id="a page in between"),
        pytest.param("pull hf:org/none", {}, "not-found", id="pull of no repository"),
        pytest.param("pull hf:org/mine", {"gated": True}, "gated", id="pull of a gated one"),
        pytest.param("pull hf:org/mine --quant Q2_K", {}, "quantisation-unknown", id="pull of no such quantisation"),
        pytest.param("pull hf:org/mine hf:a/../b", {}, "usage", id="pull of a way out"),
        pytest.param("pull", {}, "usage", id="pull of nothing"),
        pytest.param("pull nosuch", {}, "profile-unknown", id="pull of no profile"),
        pytest.param("pull llama-8b --quant Q9", {}, "usage", id="pull of a quantisation the profile lacks"),
        pytest.param("pull ./x.gguf", {}, "usage", id="pull of a file"),
        pytest.param("pull ollama:llama3.1 --quant Q8_0", {}, "usage", id="pull of a tag and a quantisation"),
        pytest.param("pull ollama:llama3.1 --backend vllm", {}, "usage", id="pull of a tag for another engine"),
        pytest.param("pull llama-8b --backend vllm --quant Q4_K_M", {}, "usage", id="pull of a GGUF for vLLM"),
        pytest.param("pull llama-8b --backend ollama --quant Q4_K_M", {}, "usage", id="pull of a GGUF for Ollama"),
        pytest.param("pull mine --backend vllm", {}, "usage", id="pull of a profile without a repository for vLLM"),
        pytest.param("pull mine --backend ollama", {}, "usage", id="pull of a profile without a tag"),
        pytest.param("pull mine --backend nosuch", {}, "usage", id="pull for no engine"),
        pytest.param("pull hf:org/mine --backend vllm", {}, "not-found", id="pull of a repository without safetensors"),
        pytest.param("pull hf:org/tiny --backend llama.cpp", {}, "not-found", id="pull of one without GGUF files"),
        pytest.param("pull hf:org/tiny:Q4_K_M", {}, "quantisation-unknown", id="pull of safetensors in none of theirs"),
        pytest.param("pull hf:org/tiny --backend vllm --quant fp8", {}, "quantisation-unknown", id="the same for vLLM"),
        pytest.param("pull hf:org/tiny", {"gated": True}, "gated", id="pull of gated safetensors"),
        pytest.param("pull hf:org/pickle", {}, "not-found", id="pull of a repository with pickles only"),
    ],
)
def test_what_cannot_be_had_is_told_in_one_object(
    mgpu: Mgpu, hub: FakeHub, words: str, changes: dict[str, object], code: str
) -> None:
    for name, value in changes.items():
        setattr(hub, name, value)
    ended = mgpu(*words.split(), "--json")
    checked(ended.json, words.split()[0], NOTHING)
    assert [error["code"] for error in ended.json["errors"]] == [code]
    assert ended.json["errors"][0]["hint"]
    assert ended.err == ""
    assert hub.served_bytes < 1000  # a configuration at most


@pytest.mark.parametrize(
    ("variables", "code"),
    [
        pytest.param({"HF_ENDPOINT": "nonsense"}, "bad-environment", id="an endpoint that is no address"),
        pytest.param({"HF_ENDPOINT": "http://[::1"}, "bad-environment", id="an endpoint that cannot be parsed"),
        pytest.param({"HF_ENDPOINT": "http://127.0.0.1:1"}, "hub-unreachable", id="an endpoint where nothing is"),
        pytest.param({"HF_HUB_OFFLINE": "1"}, "offline", id="forbidden"),
        pytest.param({"ALL_PROXY": "nonsense://x"}, "bad-environment", id="a proxy that is none"),
    ],
)
def test_an_environment_in_which_nothing_can_be_had_is_said_to_be_so(
    mgpu: Mgpu, hub: FakeHub, variables: dict[str, str | None], code: str
) -> None:
    for command in ("plan", "pull"):
        ended = mgpu(command, "hf:org/mine", "--json", **variables)
        assert (ended.exit_code, [error["code"] for error in ended.json["errors"]]) == (3, [code])
    assert hub.requests == []


def test_a_proxy_is_not_used_for_this_machine(mgpu: Mgpu, hub: FakeHub) -> None:
    proxies = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    assert mgpu("pull", "hf:org/mine", **proxies).exit_code == 0
    assert mgpu("run", "hf:org/mine", "--ctx", "512", "--ask", "Why?", **proxies).exit_code == 0


def test_pull_fetches_all_and_again_nothing(mgpu: Mgpu, hub: FakeHub, small: bytes) -> None:
    hub.repositories["org/two"] = {"two-Q8_0.gguf": small + b"2"}
    ended = mgpu("pull", "mine", "hf:org/two", "mine", "--json")
    assert (ended.exit_code, ended.err) == (0, "")
    data = checked(ended.json, "pull", PULL)
    assert [(each["model"], each["quantisation"], each["bytes"]) for each in data["models"]] == [
        ("mine", "Q4_K_M", len(small)),
        ("hf:org/two", "Q4_0", len(small) + 1),
    ]
    assert [Path(each["path"]).read_bytes() for each in data["models"]] == [small, small + b"2"]
    assert [each["fetched"] for each in data["models"]] == [True, True]
    assert data["fetched_bytes"] == 2 * len(small) + 1
    assert len(hub.downloads()) == 2

    again = checked(mgpu("pull", "mine", "hf:org/two", "--json").json, "pull", PULL)
    assert [each["fetched"] for each in again["models"]] == [False, False]
    assert again["fetched_bytes"] == 0
    ended = mgpu("pull", "mine", "hf:org/two")
    assert [line.split() for line in ended.out.splitlines()] == [
        ["mine", data["models"][0]["path"]],
        ["hf:org/two", data["models"][1]["path"]],
    ]
    assert len(hub.downloads()) == 2

    found = checked(mgpu("ls", "--json").json, "ls", LS)
    assert [(model["model"], model["state"]) for model in found["models"]] == [
        ("hf:org/two:Q4_0", "complete"),
        ("mine", "complete"),
    ]
    assert found["total_bytes"] == data["fetched_bytes"]
    shown = mgpu("ls").out
    assert all(each["path"] in shown for each in data["models"])
    assert "2 models, 1" in shown


def test_pull_tells_people_what_was_fetched(mgpu: Mgpu, hub: FakeHub) -> None:
    ended = mgpu("pull", "hf:org/mine")
    assert ended.err.startswith("fetch    mine-Q4_K_M.gguf  ")
    assert ended.out.startswith("hf:org/mine   ")


def test_one_that_fails_keeps_no_other_from_being_fetched(mgpu: Mgpu, hub: FakeHub, small: bytes) -> None:
    noise = random.Random(0).randbytes(1000)
    hub.repositories["org/noise"] = {"noise.gguf": noise}
    ended = mgpu("pull", "hf:org/noise", "hf:org/mine", "--json")
    data = checked(ended.json, "pull", PULL)
    assert ended.exit_code == 3
    assert [(each["error"], each["path"] is None) for each in data["models"]] == [
        ("model-unusable", True),
        (None, False),
    ]
    assert ended.json["errors"][0]["hint"].startswith("remove it, then pull again: rm /")


def test_a_pull_that_is_interrupted_goes_on_where_it_was(mgpu: Mgpu, hub: FakeHub, small: bytes) -> None:
    hub.seconds_per_chunk = 0.05
    pulling = mgpu.start("pull", "hf:org/mine", "--json")
    until(lambda: hub.served_bytes > 1 << 20, "a megabyte is fetched")
    ended = pulling.end(signal.SIGINT)
    data = checked(ended.json, "pull", PULL)
    assert ended.exit_code == 130
    assert [error["code"] for error in ended.json["errors"]] == ["interrupted"]
    assert data["models"][0]["path"] is None
    (partial,) = checked(mgpu("ls", "--json").json, "ls", LS)["models"]
    assert (partial["model"], partial["state"]) == ("hf:org/mine", "partial")
    assert 0 < partial["bytes"] < len(small)
    assert "mgpu pull hf:org/mine goes on" in mgpu("ls").out
    hub.seconds_per_chunk = 0
    assert mgpu("pull", "hf:org/mine").exit_code == 0
    assert hub.downloads()[-1] == f"bytes={partial['bytes']}-"


def test_people_are_told_that_an_interrupted_pull_goes_on(mgpu: Mgpu, hub: FakeHub) -> None:
    hub.seconds_per_chunk = 0.05
    pulling = mgpu.start("pull", "hf:org/mine")
    until(lambda: hub.served_bytes > 1 << 20, "a megabyte is fetched")
    ended = pulling.end(signal.SIGTERM)
    assert (ended.exit_code, ended.out) == (130, "")
    assert ended.err == "stopped: what is here stays, and the same command goes on from there\n"


def test_a_repository_with_safetensors_is_pulled_and_listed(mgpu: Mgpu, hub: FakeHub, tmp_path: Path) -> None:
    ended = mgpu("pull", "hf:org/tiny", "--json")
    (pulled,) = checked(ended.json, "pull", PULL)["models"]
    assert (pulled["format"], pulled["quantisation"], pulled["fetched"]) == ("safetensors", "bf16", True)
    folder = Path(pulled["path"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == hub.repositories["org/tiny"]
    assert pulled["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    asked = len(hub.requests)
    (again,) = checked(mgpu("pull", "hf:org/tiny", "--json", HF_HUB_OFFLINE="1").json, "pull", PULL)["models"]
    assert (again["path"], again["fetched"], len(hub.requests)) == (pulled["path"], False, asked)
    (found,) = checked(mgpu("ls", "--json").json, "ls", LS)["models"]
    assert (found["model"], found["format"], found["state"]) == ("hf:org/tiny", "safetensors", "complete")
    assert (found["profile"], found["path"], found["bytes"]) == ("both", pulled["path"], pulled["bytes"])
    assert "hf:org/tiny   safetensors   bf16" in mgpu("ls").out


@pytest.mark.parametrize(
    ("words", "form", "argument"),
    [
        pytest.param("both", "gguf", "both", id="a profile means its GGUF"),
        pytest.param("both --backend llama.cpp", "gguf", "both", id="and for llama.cpp"),
        pytest.param("both --quant bf16", "safetensors", "hf:org/tiny", id="unless only vLLM has the quantisation"),
        pytest.param("both --backend vllm --quant BF16", "safetensors", "hf:org/tiny", id="or vLLM is to load it"),
        pytest.param("hf:org/tiny:BF16", "safetensors", "hf:org/tiny", id="a repository in the quantisation it has"),
        pytest.param("hf:org/tiny --backend vllm", "safetensors", "hf:org/tiny", id="a repository for vLLM"),
        pytest.param("hf:org/mine --backend ollama", "gguf", "mine", id="a GGUF that Ollama can import"),
    ],
)
def test_the_engine_and_the_quantisation_choose_the_form(
    mgpu: Mgpu, hub: FakeHub, words: str, form: str, argument: str
) -> None:
    (pulled,) = checked(mgpu("pull", *words.split(), "--json").json, "pull", PULL)["models"]
    assert (pulled["format"], pulled["fetched"]) == (form, True)
    (found,) = checked(mgpu("ls", "--json").json, "ls", LS)["models"]
    assert (found["format"], found["model"] in (argument, "both")) == (form, True)


def test_a_profiles_first_repository_is_meant_and_named(mgpu: Mgpu, hub: FakeHub) -> None:
    ended = mgpu("pull", "both", "--backend", "vllm", "--json")
    assert [error["code"] for error in ended.json["errors"]] == ["not-found"]
    assert "org/none" in ended.json["errors"][0]["message"]
    ended = mgpu("pull", "both", "--backend", "vllm", "--quant", "awq", "--json")
    assert ended.json["errors"][0]["message"].endswith("in 'awq'; it has fp8, bf16")


def test_safetensors_that_are_interrupted_go_on_where_they_were(mgpu: Mgpu, hub: FakeHub, tmp_path: Path) -> None:
    repository = hub.repositories["org/tiny"]
    del repository["model.safetensors"]
    tensors = {"model.embed_tokens.weight": (256, 256)} | {f"model.layers.{i}.mlp.w": (3 << 19,) for i in range(4)}
    index = {"weight_map": {name: f"model-{i}.safetensors" for i, name in enumerate(tensors)}}
    for name, file in index["weight_map"].items():
        write_safetensors(tmp_path / file, {name: tensors[name]}, values=False)
        repository[file] = (tmp_path / file).read_bytes()
    repository["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.stalls_after_bytes = 2 << 20
    pulling = mgpu.start("pull", "hf:org/tiny", "--json")
    until(lambda: hub.served_bytes >= 4 * (2 << 20), "four connections stand still")
    begun = time.monotonic()
    ended = pulling.end(signal.SIGINT)
    assert time.monotonic() - begun < 10
    data = checked(ended.json, "pull", PULL)
    assert (ended.exit_code, data["models"][0]["path"], ended.err) == (130, None, "")
    (partial,) = checked(mgpu("ls", "--json").json, "ls", LS)["models"]
    assert (partial["model"], partial["format"], partial["state"]) == ("hf:org/tiny", "safetensors", "partial")
    assert 0 < partial["bytes"] < partial["total_bytes"] == sum(len(content) for content in contents(repository))
    assert "mgpu pull hf:org/tiny goes on" in mgpu("ls").out
    hub.stalls_after_bytes = None
    hub.release.set()
    before = len(hub.downloads())
    assert mgpu("pull", "hf:org/tiny").out.startswith("hf:org/tiny   ")
    resumed = [asked for asked in hub.downloads()[before:] if asked.endswith("-")]
    assert (len(resumed), "bytes=0-" in resumed) == (4, False)
    (found,) = checked(mgpu("ls", "--json").json, "ls", LS)["models"]
    assert (found["state"], found["bytes"]) == ("complete", partial["total_bytes"])


def contents(repository: dict[str, bytes | Path]) -> list[bytes]:
    return [content for content in repository.values() if isinstance(content, bytes)]


def test_weights_that_are_damaged_are_said_to_be_so(mgpu: Mgpu, hub: FakeHub) -> None:
    hub.repositories["org/tiny"]["model.safetensors"] = b"<!DOCTYPE html>" * 100
    ended = mgpu("pull", "hf:org/tiny", "--json")
    (pulled,) = checked(ended.json, "pull", PULL)["models"]
    assert (ended.exit_code, pulled["error"], pulled["path"]) == (3, "model-corrupt", None)
    assert ended.json["errors"][0]["hint"].endswith("hub/models--org--tiny")


@pytest.fixture
def ollama(mgpu: Mgpu, hub: FakeHub, tmp_path: Path) -> Iterator[RunningOllama]:
    """An Ollama that runs beside mgpu."""
    with running_ollama(tmp_path / "home") as serving:
        mgpu.environment |= {"OLLAMA_HOST": serving.url, "OLLAMA_MODELS": str(serving.models)}
        yield serving


@pytest.mark.parametrize("words", [f"ollama:{OLLAMA_MODEL}", "both --backend ollama"])
def test_a_running_ollama_fetches_its_models_itself(mgpu: Mgpu, ollama: RunningOllama, words: str) -> None:
    (pulled,) = checked(mgpu("pull", *words.split(), "--json").json, "pull", PULL)["models"]
    assert (pulled["format"], pulled["quantisation"], pulled["bytes"]) == ("ollama", "Q4_1", 98362432)
    assert (pulled["fetched"], pulled["path"], pulled["model"]) == (True, None, words.split()[0])
    (again,) = checked(mgpu("pull", *words.split(), "--json").json, "pull", PULL)["models"]
    assert (again["fetched"], again["bytes"]) == (False, pulled["bytes"])
    (found,) = checked(mgpu("ls", "--json").json, "ls", LS)["models"]
    assert (found["model"], found["format"], found["profile"]) == (f"ollama:{OLLAMA_MODEL}", "ollama", "both")
    assert (found["bytes"], found["last_used_at"] >= "2026-11-23") == (pulled["bytes"], True)
    ended = mgpu("pull", *words.split())
    assert ended.out == f"{words.split()[0]}   in Ollama\n"


@pytest.mark.parametrize(
    ("faults", "words", "exit_code", "code"),
    [
        pytest.param("", "ollama:nosuch", 3, "not-found", id="no such model"),
        pytest.param("pull-fails", f"ollama:{OLLAMA_MODEL}", 3, "disk-full", id="a full disk"),
        pytest.param("pull-breaks", f"ollama:{OLLAMA_MODEL}", 4, "download-interrupted", id="a server that breaks off"),
        pytest.param("not-ollama", f"ollama:{OLLAMA_MODEL}", 3, "not-ollama", id="something else on the port"),
    ],
)
def test_what_ollama_cannot_fetch_is_told(
    mgpu: Mgpu, hub: FakeHub, tmp_path: Path, faults: str, words: str, exit_code: int, code: str
) -> None:
    with running_ollama(tmp_path / "home", {"FAKE_FAIL": faults}) as serving:
        ended = mgpu("pull", words, "--json", OLLAMA_HOST=serving.url)
        listed_too = mgpu("ls", "--json", OLLAMA_HOST=serving.url)
    assert (ended.exit_code, [error["code"] for error in ended.json["errors"]]) == (exit_code, [code])
    assert ended.json["errors"][0]["hint"] or exit_code == 4 or code == "disk-full"
    checked(listed_too.json, "ls", LS)
    assert [words for words in listed_too.json["warnings"] if "is not Ollama" in words] == (
        listed_too.json["warnings"] if faults == "not-ollama" else []
    )


def test_ctrl_c_while_ollama_fetches_leaves_it_to_go_on(tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with running_ollama(tmp_path, {"FAKE_FAIL": "pull-slow:0.2"}) as serving:
        pulling = OllamaPull(argument="m", tag=OLLAMA_MODEL, url=serving.url)
        with pytest.raises(KeyboardInterrupt):
            pulling.fetch(interrupt)
        assert not pulling.fetched
        pulling.fetch(lambda _: None)
        assert pulling.fetched


@pytest.mark.parametrize(
    ("variables", "code", "hint"),
    [
        pytest.param({}, "ollama-not-running", "start it first: ollama serve", id="installed"),
        pytest.param({"MGPU_OLLAMA": None}, "engine-missing", "https://ollama.com/download", id="not installed"),
    ],
)
def test_an_ollama_that_does_not_run_is_to_be_started_first(
    mgpu: Mgpu, hub: FakeHub, tmp_path: Path, variables: dict[str, str | None], code: str, hint: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # reserved, but nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        nowhere = {
            "OLLAMA_HOST": address,
            "MGPU_OLLAMA": str(install_ollama(tmp_path)),
            "PATH": str(tmp_path / "empty"),
        }
        ended = mgpu("pull", "ollama:llama3.1", "--json", **{**nowhere, **variables})
    (error,) = ended.json["errors"]
    assert (ended.exit_code, error["code"], hint in error["hint"]) == (3, code, True)


def test_an_ollama_that_does_not_run_costs_nothing(mgpu: Mgpu, hub: FakeHub) -> None:
    ended = mgpu("ls", "--json")
    assert (ended.json["data"]["models"], ended.json["warnings"]) == ([], [])


def test_space_is_looked_for_for_all_together_before_anything_is_fetched(
    mgpu: Mgpu, hub: FakeHub, tmp_path: Path
) -> None:
    for number in range(3):
        path = tmp_path / f"{number}.gguf"
        with path.open("wb") as file:
            file.write(str(number).encode())
            file.truncate(1 << 43)
        hub.repositories[f"org/{number}"] = {path.name: path}
    ended = mgpu("pull", *(f"hf:org/{number}" for number in range(3)), "--json")
    checked(ended.json, "pull", NOTHING)
    (error,) = ended.json["errors"]
    assert error["code"] == "disk-full"
    assert f"{3 << 43:,} bytes are needed" in error["message"]
    assert hub.served_bytes == 0


def test_ls_of_an_empty_machine_says_how_to_get_a_model(mgpu: Mgpu, hub: FakeHub) -> None:
    assert checked(mgpu("ls", "--json").json, "ls", LS)["models"] == []
    ended = mgpu("ls")
    assert (ended.exit_code, "mgpu pull llama-8b" in ended.out) == (0, True)


def test_ls_marks_what_is_broken(mgpu: Mgpu, hub: FakeHub) -> None:
    path = Path(mgpu("pull", "hf:org/mine", "--json").json["data"]["models"][0]["path"])
    path.resolve().write_bytes(b"<!DOCTYPE html>")
    shown = mgpu("ls").out
    assert "broken" in shown.splitlines()[0]
    assert "it is a web page, not a model" in shown
    ended = mgpu("pull", "hf:org/mine", "--json")
    assert (ended.exit_code, ended.json["data"]["models"][0]["error"]) == (3, "model-unusable")
    assert ended.json["errors"][0]["hint"] == f"remove it, then pull again: rm {path.resolve()}"
    path.resolve().unlink()
    assert mgpu("pull", "hf:org/mine").exit_code == 0
    assert "broken" not in mgpu("ls").out.splitlines()[0]


@pytest.mark.parametrize(
    ("done", "rate", "words"),
    [
        pytest.param(26_400_000_000, 118_000_000.0, "62%  26.4/42.5 GB  118.0 MB/s  2:16 left", id="on its way"),
        pytest.param(0, None, "0%  0.0/42.5 GB", id="just begun"),
        pytest.param(1_000_000_000, 0.0, "2%  1.0/42.5 GB", id="standing still"),
        pytest.param(42_500_000_000, 1.5e9, "100%  42.5/42.5 GB  1.5 GB/s", id="done"),
    ],
)
def test_a_bar_tells_how_much_how_fast_and_how_long(done: int, rate: float | None, words: str) -> None:
    progress = Progress(stage="downloading", name="m.gguf (1 of 2)", done_bytes=done, total_bytes=42_500_000_000)
    line = str(fetch_line(progress, rate, 100))
    assert line.startswith("fetch    m.gguf (1 of 2)  ━")
    assert line.endswith(words)


@pytest.mark.parametrize(
    ("looks", "rate"),
    [
        pytest.param([(0.0, 0)], None, id="too early"),
        pytest.param([(0.0, 0), (0.4, 10)], None, id="still too early"),
        pytest.param([(0.0, 1000), (2.0, 1200)], 100, id="what was there before does not count"),
        pytest.param([(t / 2, 100 * t) for t in range(100)], 200, id="steady"),
        pytest.param([(t, 100 * t) for t in range(20)] + [(20 + t, 1900) for t in range(9)], 0, id="standing still"),
        pytest.param([(0.0, 900), (1.0, 0), (2.0, 50)], 50, id="begun anew"),
    ],
)
def test_a_rate_is_that_of_the_last_seconds(looks: list[tuple[float, int]], rate: float | None) -> None:
    pace = Pace()
    assert [pace.look("downloading", done, now) for now, done in looks][-1] == rate
    assert pace.look("unpacking", 10**9, looks[-1][0] + 1) is None
