"""The environment `ollama serve` is started in: what a plan becomes, what is refused, what is dropped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mgpu.backends.backend import Serving
from mgpu.backends.ollama import (
    BACKEND,
    build_launch,
    clean_environment,
    find_ollama,
    require_ollama,
    sample,
)
from mgpu.backends.samples import Sample
from mgpu.errors import Missing, UsageError
from mgpu.planning.candidates import Candidate
from mgpu.planning.wants import Wants
from tests.fakes.ollama_server import install

from . import recorded_ollama as recorded
from .planned_ollama import MIB, planned

SERVING = Serving(
    program=Path("/opt/ollama"),
    model="llama3.1:8b",
    name="llama",
    host="127.0.0.1",
    port=8080,
    folder=Path("/var/lib/mgpu/llama"),
)
HOME = {"HOME": "/home/someone"}
TWO_CUDA = planned(("CUDA0", "CUDA1"), (16, 14), uuids=("GPU-1f", "GPU-2e"))


def environment_of(candidate: Candidate, environ: dict[str, str] | None = None, *arguments: str) -> dict[str, str]:
    return dict(build_launch(candidate, replace(SERVING, arguments=arguments), environ=environ or HOME).env)


def test_a_plan_over_two_cards_becomes_this_environment() -> None:
    launch = BACKEND.launch(TWO_CUDA, SERVING)
    assert launch.argv == ("/opt/ollama", "serve")
    assert {name: value for name, value in launch.env.items() if name != "HOME"} == {
        "OLLAMA_HOST": "127.0.0.1:8080",
        "OLLAMA_NO_CLOUD": "1",
        "OLLAMA_NOPRUNE": "1",
        "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMA_CONTEXT_LENGTH": "4096",
        "OLLAMA_NUM_PARALLEL": "1",
        "OLLAMA_SCHED_SPREAD": "1",
        "OLLAMA_GPU_OVERHEAD": "268435456",
        "LLAMA_ARG_FIT_TARGET": "256",
        "LLAMA_ARG_ENDPOINT_METRICS": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "GPU-1f,GPU-2e",
        "ROCR_VISIBLE_DEVICES": "-1",
        "GGML_VK_VISIBLE_DEVICES": "-1",
    }
    assert launch.secrets == frozenset()


@pytest.mark.parametrize(
    ("candidate", "environ", "visible"),
    [
        pytest.param(TWO_CUDA, {}, ("GPU-1f,GPU-2e", "-1", "-1"), id="NVIDIA by UUID"),
        pytest.param(
            TWO_CUDA, {"CUDA_VISIBLE_DEVICES": "1"}, ("GPU-1f,GPU-2e", "-1", "-1"), id="whatever is masked outside"
        ),
        pytest.param(
            planned(("CUDA0", "CUDA1"), (0, 30), uuids=("GPU-1f", "GPU-2e")),
            {},
            ("GPU-2e", "-1", "-1"),
            id="without a card that would hold nothing",
        ),
        pytest.param(planned(("CUDA2", "CUDA0"), (16, 14)), {}, ("2,0", "-1", "-1"), id="NVIDIA without UUIDs"),
        pytest.param(planned(("Vulkan1", "Vulkan0"), (16, 14)), {}, ("-1", "-1", "1,0"), id="Vulkan by index"),
        pytest.param(
            planned(("Vulkan0", "Vulkan1"), (16, 14)),
            {"GGML_VK_VISIBLE_DEVICES": "0,0"},
            ("-1", "-1", "0,0"),
            id="Vulkan within a mask",
        ),
        pytest.param(
            planned(("Vulkan1",), (30,)), {"GGML_VK_VISIBLE_DEVICES": "3, 5"}, ("-1", "-1", "5"), id="a masked one"
        ),
        pytest.param(planned(("ROCm1",), (30,)), {}, (None, "1", "-1"), id="AMD, for which CUDA's list counts, too"),
        pytest.param(planned((), ()), {}, ("-1", "-1", "-1"), id="the CPU"),
    ],
)
def test_exactly_the_planned_cards_are_visible(
    candidate: Candidate, environ: dict[str, str], visible: tuple[str | None, str | None, str | None]
) -> None:
    env = environment_of(candidate, HOME | environ)
    names = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES")
    assert tuple(env.get(name) for name in names) == visible


@pytest.mark.parametrize(
    ("candidate", "settings"),
    [
        pytest.param(planned(("CUDA0",), (30,)), {"OLLAMA_SCHED_SPREAD": None}, id="one card is not spread"),
        pytest.param(planned(), {"OLLAMA_SCHED_SPREAD": "1", "OLLAMA_VULKAN": "1"}, id="two Vulkan cards are"),
        pytest.param(planned(), {"LLAMA_ARG_TENSOR_SPLIT": None}, id="llama.cpp deals, unless somebody else does"),
        pytest.param(
            planned(layers=(24, 6), wants=Wants(tensor_split=(3, 1))),
            {"LLAMA_ARG_TENSOR_SPLIT": "24,7"},
            id="a split that was asked for, in whole units",
        ),
        pytest.param(planned(split_mode="tensor"), {"LLAMA_ARG_SPLIT_MODE": "tensor"}, id="tensor mode"),
        pytest.param(
            planned(wants=Wants(headroom_bytes=2048 * MIB)),
            {"LLAMA_ARG_FIT_TARGET": "2048", "OLLAMA_GPU_OVERHEAD": str(2048 * MIB)},
            id="headroom, for new and old versions",
        ),
        pytest.param(
            planned(wants=Wants(kv_type_k="q8_0", kv_type_v="q8_0", flash_attention="on")),
            {"OLLAMA_KV_CACHE_TYPE": "q8_0", "OLLAMA_FLASH_ATTENTION": "1"},
            id="a quantised cache",
        ),
        pytest.param(
            planned(wants=Wants(flash_attention="off")),
            {"OLLAMA_FLASH_ATTENTION": "0", "OLLAMA_KV_CACHE_TYPE": None},
            id="no flash attention",
        ),
        pytest.param(planned(), {"OLLAMA_FLASH_ATTENTION": None}, id="flash attention is Ollama's choice"),
        pytest.param(
            planned(wants=Wants(parallel=4), ctx_tokens=8192),
            {"OLLAMA_NUM_PARALLEL": "4", "OLLAMA_CONTEXT_LENGTH": "8192"},
            id="the context is each user's",
        ),
    ],
)
def test_wishes_become_settings(candidate: Candidate, settings: dict[str, str | None]) -> None:
    env = environment_of(candidate)
    assert {name: env.get(name) for name in settings} == settings


def test_what_the_user_sets_after_the_dashes_is_passed_on() -> None:
    env = environment_of(planned(), HOME, "OLLAMA_MAX_QUEUE=64", "LLAMA_ARG_THREADS=8", "OLLAMA_KEEP_ALIVE=10m")
    assert (env["OLLAMA_MAX_QUEUE"], env["LLAMA_ARG_THREADS"], env["OLLAMA_KEEP_ALIVE"]) == ("64", "8", "10m")


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        pytest.param("OLLAMA_SCHED_SPREAD=0", "--gpus", id="a setting of the plan"),
        pytest.param("LLAMA_ARG_FIT_TARGET=1", "--headroom", id="another"),
        pytest.param("--verbose", "OLLAMA_MAX_QUEUE=64", id="an option"),
        pytest.param("LD_PRELOAD=/tmp/x.so", "OLLAMA_MAX_QUEUE=64", id="a variable of somebody else"),
        pytest.param("OLLAMA_ORIGINS=\0", None, id="a zero byte"),
    ],
)
def test_what_would_contradict_the_plan_or_mean_nothing_is_refused(argument: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        environment_of(planned(), HOME, argument)
    assert hint is None or hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("candidate", "serving"),
    [
        pytest.param(planned(), replace(SERVING, api_key="secret"), id="an API key"),
        pytest.param(planned(wants=Wants(kv_type_v="q8_0")), SERVING, id="two types of cache"),
    ],
)
def test_what_ollama_cannot_do_is_refused(candidate: Candidate, serving: Serving) -> None:
    with pytest.raises(UsageError):
        build_launch(candidate, serving, environ=HOME)


def test_an_address_of_version_six_is_written_in_brackets() -> None:
    env = build_launch(planned(), replace(SERVING, host="::1"), environ=HOME).env
    assert env["OLLAMA_HOST"] == "[::1]:8080"


def test_a_home_is_found_where_the_environment_has_none() -> None:
    assert "HOME" not in environment_of(planned(), HOME)
    assert environment_of(planned(), {"PATH": "/bin"})["HOME"].startswith("/")


def test_stray_settings_are_dropped_and_named() -> None:
    kept, dropped = clean_environment(
        {
            "PATH": "/bin",
            "OLLAMA_MODELS": "/m",
            "OLLAMA_HOST": "0.0.0.0",
            "OLLAMA_SCHED_SPREAD": "1",
            "LLAMA_ARG_MMAP": "0",
            "GGML_VK_VISIBLE_DEVICES": "0,0",
        }
    )
    assert kept == {"PATH": "/bin", "OLLAMA_MODELS": "/m"}
    assert dropped == ("LLAMA_ARG_MMAP", "OLLAMA_SCHED_SPREAD")


class TestProgram:
    def test_it_is_found_on_the_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program = install(tmp_path)
        monkeypatch.delenv("MGPU_OLLAMA", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        engine = find_ollama()
        assert engine is not None
        assert (engine.path, engine.found_in, engine.backend) == (program, "PATH", "ollama")

    def test_the_variable_comes_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program = install(tmp_path, "my-ollama")
        monkeypatch.setenv("MGPU_OLLAMA", str(program))
        assert require_ollama().path == program
        assert require_ollama().found_in == "$MGPU_OLLAMA"

    def test_a_variable_that_names_nothing_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MGPU_OLLAMA", "/nowhere/ollama")
        with pytest.raises(Missing, match="MGPU_OLLAMA"):
            find_ollama()

    def test_none_is_missing_with_the_way_to_get_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MGPU_OLLAMA", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert find_ollama() is None
        with pytest.raises(Missing, match="not installed") as caught:
            require_ollama()
        assert caught.value.code == "engine-missing"


@pytest.mark.parametrize(
    ("answers", "reading"),
    [
        pytest.param(
            {"/metrics": recorded.text("runner_metrics.txt")},
            Sample(
                at=1.0,
                prompt_tokens_total=31,
                prompt_seconds_total=0.051667,
                generation_tokens_total=4,
                generation_seconds_total=0.094961,
            ),
            id="the model's llama-server",
        ),
        pytest.param(
            {"/api/version": '{"version":"0.32.15"}'}, Sample(at=1.0), id="Ollama itself, which counts nothing"
        ),
        pytest.param({}, None, id="nobody"),
    ],
)
def test_counters_are_the_runners(answers: dict[str, str], reading: Sample | None) -> None:
    assert sample(1.0, answers.get) == reading
