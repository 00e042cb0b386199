"""Options that only some engines know: which one refuses which, and what is said instead."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest

from mgpu.cli.engines import eligible, read_arguments
from mgpu.cli.options import BACKENDS, Backend, FlashAttention, KvType, Offload, PlannerOptions, SplitMode
from mgpu.errors import UsageError
from mgpu.models.forms import Model, find_model
from mgpu.models.source import parse_model
from mgpu.planning.wants import Wants

from .contract import NOTHING, PLAN, checked
from .program import Mgpu

LLAMA, VLLM, OLLAMA = Backend.llama_cpp, Backend.vllm, Backend.ollama
ALL, GGUF = {LLAMA, VLLM, OLLAMA}, {LLAMA, OLLAMA}
# Not wishes: they choose the engine, its cards and the model's form, or weigh engines against each other.
CHOOSING = {"backend", "gpus", "quant", "goal"}

OPTIONS = [
    pytest.param({"ctx": "4k"}, "", ALL, id="--ctx"),
    pytest.param({"parallel": 4}, "", ALL, id="--parallel"),
    pytest.param({"headroom": "1GiB"}, "", ALL, id="--headroom"),
    pytest.param({"split_mode": SplitMode.none}, "", ALL, id="--split-mode none"),
    pytest.param({"kv_type": KvType.q8_0}, "--kv-type q8_0", GGUF, id="--kv-type q8_0"),
    pytest.param({"kv_type": KvType.q4_0}, "--kv-type q4_0", GGUF, id="--kv-type q4_0"),
    pytest.param({"split_mode": SplitMode.layer}, "--split-mode layer", GGUF, id="--split-mode layer"),
    pytest.param({"tensor_split": "3,1"}, "--tensor-split", GGUF, id="--tensor-split"),
    pytest.param({"flash_attn": FlashAttention.off}, "--flash-attn", GGUF, id="--flash-attn off"),
    pytest.param({"flash_attn": FlashAttention.on}, "--flash-attn", GGUF, id="--flash-attn on"),
    pytest.param({"offload": Offload.allow}, "--offload allow", GGUF, id="--offload allow"),
    pytest.param({"ubatch": 256}, "--ubatch", {LLAMA}, id="--ubatch"),
    pytest.param({"kv_type": KvType.fp8}, "--kv-type fp8", {VLLM}, id="--kv-type fp8"),
    pytest.param({"split_mode": SplitMode.tensor}, "--split-mode tensor", ALL - {OLLAMA}, id="--split-mode tensor"),
    pytest.param({"tensor_parallel": 2}, "--tensor-parallel", {VLLM}, id="--tensor-parallel"),
    pytest.param({"pipeline_parallel": 2}, "--pipeline-parallel", {VLLM}, id="--pipeline-parallel"),
    pytest.param({"replicas": 2}, "--replicas", {VLLM}, id="--replicas"),
]


@pytest.fixture(scope="module")
def model() -> Model:
    """A model that every engine has a form of."""
    return find_model(parse_model("llama-70b"), None)


def options_of(given: dict[str, object], backend: Backend = Backend.auto) -> PlannerOptions:
    return PlannerOptions(backend=backend, **given)  # type: ignore[arg-type]


def wants_of(options: PlannerOptions, backend: Backend) -> Wants:
    return options.vllm_wants() if backend == VLLM else options.wants()


def flags() -> set[str]:
    """Every option of the planner as it is typed."""
    hints = typing.get_type_hints(PlannerOptions, include_extras=True)
    return {hint.__metadata__[0].default for hint in hints.values()}


def test_the_table_knows_every_option() -> None:
    listed = {name for case in OPTIONS for name in typing.cast("dict[str, object]", case.values[0])}
    assert listed | CHOOSING == set(PlannerOptions.__slots__)


@pytest.mark.parametrize(("given", "name", "known_by"), OPTIONS)
def test_no_engine_ignores_an_option_silently(
    model: Model, given: dict[str, object], name: str, known_by: set[Backend]
) -> None:
    options = options_of(given)
    for backend in BACKENDS:
        refusal = options.refused_by(backend)
        assert (refusal is None) == (backend in known_by), (backend, refusal)
        if refusal is None:
            assert wants_of(options, backend) != wants_of(PlannerOptions(), backend), backend
    assert set(eligible(model, options, ())) == known_by, "auto takes those that know it, without a word"


@pytest.mark.parametrize(("given", "name", "known_by"), OPTIONS)
def test_an_engine_that_was_asked_for_says_what_it_does_not_know(
    model: Model, given: dict[str, object], name: str, known_by: set[Backend]
) -> None:
    for backend in BACKENDS:
        options = options_of(given, backend)
        if backend in known_by:
            assert eligible(model, options, ()) == (backend,)
            continue
        with pytest.raises(UsageError) as raised:
            eligible(model, options, ())
        assert raised.value.exit_code == 2
        assert name in raised.value.message
        hint = raised.value.hint or ""
        ours, _, theirs = hint.partition("-- ")
        assert hint
        assert set(re.findall(r"--[a-z][a-z-]+", ours)) <= flags(), hint
        for flag in re.findall(r"--[a-z][a-z-]+", theirs):
            assert read_arguments(backend, [flag, "1"], PlannerOptions()).handed_on == (flag, "1")


@pytest.mark.parametrize("kv_type", [KvType.q8_0, KvType.q4_0])
@pytest.mark.parametrize("backend", [Backend.auto, *BACKENDS])
def test_a_quantised_cache_needs_flash_attention(model: Model, kv_type: KvType, backend: Backend) -> None:
    with pytest.raises(UsageError) as raised:
        eligible(model, options_of({"kv_type": kv_type, "flash_attn": FlashAttention.off}, backend), ())
    assert raised.value.hint


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"tensor_parallel": 2, "ubatch": 256}, id="one of each"),
        pytest.param({"kv_type": KvType.fp8, "tensor_split": "1,1"}, id="a type and a split"),
        pytest.param({"replicas": 2, "offload": Offload.allow}, id="replicas and layers in RAM"),
    ],
)
def test_options_that_no_engine_knows_together_are_explained(model: Model, given: dict[str, object]) -> None:
    with pytest.raises(UsageError) as raised:
        eligible(model, options_of(given), ())
    assert raised.value.hint


@pytest.mark.parametrize(
    ("words", "backends"),
    [
        pytest.param("--tensor-parallel 2", ["vllm"], id="vLLM's"),
        pytest.param("--kv-type q8_0", ["llama.cpp", "ollama"], id="not vLLM's"),
        pytest.param("--ubatch 256", ["llama.cpp"], id="llama.cpp's alone"),
    ],
)
def test_the_choice_is_narrowed_without_a_warning(mgpu: Mgpu, words: str, backends: list[str]) -> None:
    ended = mgpu("plan", "llama-70b", "--machine", "2x4090", "--json", *words.split())
    data = checked(ended.json, "plan", PLAN)
    assert (ended.exit_code, ended.json["warnings"], data["best"]) == (0, [], 0)
    assert list(dict.fromkeys(candidate["backend"] for candidate in data["candidates"])) == backends


@pytest.mark.parametrize("words", ["--backend vllm --ubatch 256", "--backend ollama --kv-type fp8"])
@pytest.mark.parametrize("command", ["plan", "run --dry-run"])
def test_what_is_refused_is_the_command_lines_fault(mgpu: Mgpu, tiny: Path, command: str, words: str) -> None:
    argument = "llama-70b" if "vllm" in words else tiny
    ended = mgpu(*command.split(), argument, "--json", *words.split())
    checked(ended.json, command.split()[0], NOTHING)
    assert (ended.exit_code, ended.json["errors"][0]["code"]) == (2, "usage")
    assert words.split()[2] in ended.json["errors"][0]["message"]
