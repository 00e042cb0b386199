"""What every kind of MODEL is to each engine, and what is said of those that are nothing to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mgpu.errors import BadModel, MgpuError, Missing, UsageError
from mgpu.machine.simulate import simulate
from mgpu.models.fetch import fetch
from mgpu.models.folder import fetch_folder
from mgpu.models.forms import HubFolder, Model, find_model, missing_form
from mgpu.models.hf_config import is_called
from mgpu.models.source import HubRepository, parse_model
from mgpu.planning.vllm_candidates import vllm_fixes
from mgpu.planning.vllm_memory import VllmWants
from mgpu.profile import load_profile, shipped_profile_folder
from tests.fakes import ollama_registry
from tests.fakes.hub_server import FakeHub
from tests.fakes.ollama_registry import FakeRegistry
from tests.fakes.shapes import SHAPES
from tests.fakes.sparse_gguf import make_sparse_gguf
from tests.fakes.tiny_llama import make_tiny_llama

ENGINES = ("llama.cpp", "vllm", "ollama")
GGUF, FOLDER, TAG = ("llama.cpp", "ollama"), ("vllm",), ("ollama",)


@pytest.fixture(autouse=True)
def _nothing_but_what_is_served(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(caches / "ollama"))
    monkeypatch.setattr("mgpu.models.ollama_store._SERVICE_FOLDER", str(caches / "service"))
    monkeypatch.setenv("MGPU_OLLAMA_REGISTRY", "http://127.0.0.1:1")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in either form, and with what is no model."""
    folder = tmp_path_factory.mktemp("files")
    shape = SHAPES["smollm2-135m"].model_copy(update={"embedding_length": 64, "feed_forward_length": 64})
    make_sparse_gguf(folder / "m-Q4_0.gguf", shape, "Q4_0", layers=1, vocabulary=300)
    make_tiny_llama(folder / "tiny")
    for name in ("empty", "only-gguf", "folder.gguf"):
        (folder / name).mkdir()
    (folder / "only-gguf" / "m.gguf").write_bytes(b"GGUF")
    return folder


@pytest.fixture
def filled(hub: FakeHub, files: Path) -> FakeHub:
    """A hub with repositories of either form, of both and of neither."""
    gguf: dict[str, bytes | Path] = {"m-Q4_0.gguf": (files / "m-Q4_0.gguf").read_bytes(), "m-Q8_0.gguf": b"another"}
    folder: dict[str, bytes | Path] = {path.name: path.read_bytes() for path in (files / "tiny").iterdir()}
    hub.repositories |= {"org/m-GGUF": gguf, "org/tiny": folder, "org/both": gguf | folder}
    hub.repositories["org/text"] = {"README.md": b"hello"}
    return hub


@pytest.fixture
def registry(files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRegistry]:
    with ollama_registry.running(FakeRegistry()) as serving:
        serving.add("library/tiny:1b", files / "m-Q4_0.gguf")
        serving.add("library/tiny:latest", files / "m-Q4_0.gguf")
        monkeypatch.setenv("MGPU_OLLAMA_REGISTRY", serving.address)
        yield serving


def found(argument: str, quant: str | None = None) -> Model:
    return find_model(parse_model(argument), quant)


def engines(model: Model) -> tuple[str, ...]:
    return tuple(engine for engine in ENGINES if model.forms(engine))


def quantisations(model: Model, engine: str) -> list[str | None]:
    return [weights.facts.quantisation for weights in model.forms(engine)]


@pytest.mark.parametrize(
    ("quant", "gguf", "safetensors"),
    [
        pytest.param(None, ["Q4_K_M"], ["awq-int4-g128", "fp8-b128", "bf16"], id="its own choice, and all for vLLM"),
        pytest.param("Q5_K_M", ["Q5_K_M"], [], id="a quantisation of GGUF"),
        pytest.param("q5_k_m", ["Q5_K_M"], [], id="in small letters"),
        pytest.param("fp8", [], ["fp8-b128"], id="a quantisation of vLLM's"),
        pytest.param("FP8", [], ["fp8-b128"], id="in capitals"),
    ],
)
def test_a_profile_has_forms_for_all_engines(quant: str | None, gguf: list[str], safetensors: list[str]) -> None:
    model = found("llama-70b", quant)
    assert (model.name, model.kind) == ("llama-70b", "a profile")
    assert [quantisations(model, engine) for engine in ENGINES] == [gguf, safetensors, gguf]
    for weights in (*model.gguf, *model.safetensors):
        assert (weights.facts.name, weights.path) == ("llama-70b", None)
        assert weights.source
    labels = [weights.label for weights in model.gguf]
    assert labels == [f"Llama-3.3-70B-Instruct-{name}.gguf" for name in gguf]
    assert all(weights.label.count("/") == 1 for weights in model.safetensors)


@pytest.mark.parametrize(
    ("quant", "hint"),
    [
        pytest.param("Q4_K_N", "--quant Q4_K_M", id="nearest to a GGUF"),
        pytest.param("awk", "--quant awq", id="nearest to one for vLLM"),
        pytest.param("", "--quant Q4_K_M", id="nothing"),
        pytest.param("zzzz" * 50, "--quant Q4_K_M", id="near to none: the usual one"),
    ],
)
def test_a_quantisation_that_a_profile_lacks_is_answered_with_those_it_has(quant: str, hint: str) -> None:
    with pytest.raises(UsageError) as raised:
        found("llama-70b", quant)
    assert "Q3_K_M, Q4_K_M, Q5_K_M, Q6_K, Q8_0; for vLLM awq, fp8, bf16" in raised.value.message
    assert raised.value.hint == hint


@pytest.mark.parametrize(
    ("quant", "engine", "message", "hint"),
    [
        pytest.param("awq", "llama.cpp", "no such quantisation for llama.cpp; it has Q3_K_M", "--quant", id="GGUF"),
        pytest.param("Q4_K_M", "vllm", "no such quantisation for vllm; it has awq, fp8", "--quant awq", id="vLLM"),
        pytest.param("bf16", "ollama", "no such quantisation for ollama; it has Q3_K_M", "--quant", id="Ollama"),
    ],
)
def test_a_quantisation_of_another_engine_is_said_to_be_one(quant: str, engine: str, message: str, hint: str) -> None:
    error = missing_form(found("llama-70b", quant), engine)
    assert (type(error), error.exit_code) == (UsageError, 2)
    assert message in error.message
    assert hint in (error.hint or "")
    assert "leave --backend out" in (error.hint or "")


@pytest.mark.parametrize("name", sorted(path.stem for path in shipped_profile_folder().glob("*.yaml")))
def test_every_profile_names_its_quantisations_so_that_quant_finds_them(name: str) -> None:
    profile = load_profile(name).profile
    for quantisation in profile.quantisations:
        assert quantisations(found(name, quantisation), "llama.cpp") == [quantisation]
    for source in profile.vllm:
        (weights,) = found(name, source.quantisation).safetensors
        assert is_called(weights.facts.quantisation, source.quantisation)
        assert weights in found(name, weights.facts.quantisation).safetensors, "by the name that plans show"
        assert weights.source == HubFolder(repository=source.repository)
    assert quantisations(found(name), "llama.cpp") == [profile.default_quantisation]


@pytest.mark.parametrize(
    ("name", "machine"),
    [
        pytest.param("llama-2-13b", "4080", id="awq for f16"),
        pytest.param("llama-70b", "2x4090", id="awq for bf16"),
        pytest.param("gemma-3-27b", "4090", id="w4a16"),
        pytest.param("mistral-small-24b", "2x4080", id="fp8"),
    ],
)
def test_a_quantisation_that_a_way_out_proposes_is_found(name: str, machine: str) -> None:
    model = found(name)
    largest = max(model.safetensors, key=lambda weights: weights.facts.file_bytes)
    others = list(model.other_quantisations(largest))
    simulated = simulate(machine)
    fixes = vllm_fixes(largest.facts, others, VllmWants(), simulated.gpus, simulated)
    proposed = [fix for fix in fixes if fix.change.startswith("--quant ")]
    assert proposed
    for fix in proposed:
        assert fix.candidate.quant in quantisations(found(name, fix.change.split()[1]), "vllm")


@pytest.mark.parametrize("quant", [None, "fp8", "Q6_K"])
def test_a_profiles_other_quantisations_are_there_for_ways_out(quant: str | None) -> None:
    model = found("llama-70b", quant)
    all_of = {
        "llama.cpp": ["Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"],
        "vllm": ["awq-int4-g128", "fp8-b128", "bf16"],
    }
    for engine, names in all_of.items():
        for weights in model.forms(engine):
            others = [facts.quantisation for facts in model.other_quantisations(weights)]
            assert others == [name for name in names if name != weights.facts.quantisation]
            for name in names:
                other = model.in_quantisation(engine, name)
                assert (other.facts.quantisation, other.source is not None) == (name, True)
            assert model.in_quantisation(engine, "unheard-of") == model.forms(engine)[0]


def test_a_file_has_no_other_quantisations(files: Path) -> None:
    model = found(str(files / "m-Q4_0.gguf"))
    assert list(model.other_quantisations(model.gguf[0])) == []
    assert model.in_quantisation("ollama", "Q8_0") == model.gguf[0]


@pytest.mark.parametrize(
    ("argument", "name", "kind", "expected", "quantisation"),
    [
        pytest.param("{files}/m-Q4_0.gguf", "m-Q4_0", "a GGUF file", GGUF, "Q4_0", id="a GGUF file"),
        pytest.param("{files}/tiny", "tiny", "a model in safetensors", FOLDER, "bf16", id="a folder"),
        pytest.param("hf:org/m-GGUF:Q4_0", "m", "a GGUF file", GGUF, "Q4_0", id="a repository with GGUF files"),
        pytest.param("hf:org/tiny", "tiny", "a model in safetensors", FOLDER, "bf16", id="with safetensors"),
        pytest.param("hf:org/tiny:BF16", "tiny", "a model in safetensors", FOLDER, "bf16", id="in their quantisation"),
        pytest.param("hf:org/both:Q4_0", "both", "a GGUF file", GGUF, "Q4_0", id="with both, one asked for"),
        pytest.param("hf:org/both:bf16", "both", "a model in safetensors", FOLDER, "bf16", id="or the other"),
        pytest.param("ollama:tiny:1b", "tiny-1b", "an Ollama model", TAG, "Q4_0", id="a tag"),
        pytest.param("ollama:tiny", "tiny", "an Ollama model", TAG, "Q4_0", id="the latest of a model"),
    ],
)
def test_a_model_is_for_the_engines_that_load_its_form(
    filled: FakeHub,
    registry: FakeRegistry,
    files: Path,
    argument: str,
    name: str,
    kind: str,
    expected: tuple[str, ...],
    quantisation: str,
) -> None:
    model = found(argument.format(files=files))
    assert (model.name, model.kind, engines(model)) == (name, kind, expected)
    (weights,) = model.forms(expected[0])
    assert (weights.facts.name, weights.facts.quantisation) == (name, quantisation)
    assert (weights.path is not None) == ("{files}" in argument)
    assert weights.unconfirmed is None
    for engine in ENGINES:
        if engine not in expected:
            error = missing_form(model, engine)
            assert (type(error), error.code) == (Missing, "form-unsupported")
            assert f"{name} is {kind}, and {engine} wants" in error.message
            assert error.hint


@pytest.mark.parametrize(
    ("projector", "remark"),
    [
        pytest.param(None, None, id="none"),
        pytest.param(bytes(64 << 20), "its vision projector (0.06 GiB) is not in the plan", id="one of 64 MiB"),
    ],
)
def test_a_projector_that_is_not_planned_is_remarked(
    registry: FakeRegistry, files: Path, projector: bytes | None, remark: str | None
) -> None:
    registry.add("library/seeing:1b", files / "m-Q4_0.gguf", projector=projector)
    assert [weights.remark for weights in found("ollama:seeing:1b").tag] == [remark]


def test_a_repository_in_safetensors_is_planned_without_its_weights(filled: FakeHub) -> None:
    (weights,) = found("hf:org/tiny").safetensors
    assert (weights.source, weights.label) == (HubFolder(repository="org/tiny"), "org/tiny")
    config = filled.repositories["org/tiny"]["config.json"]
    assert isinstance(config, bytes)
    assert filled.served_bytes == len(config)


@pytest.mark.parametrize(
    ("argument", "quant", "error", "code", "words"),
    [
        pytest.param("{files}/m-Q4_0.gguf", "Q4_0", UsageError, "usage", "is one model", id="a choice of one file"),
        pytest.param("{files}/tiny", "bf16", UsageError, "usage", "is one model", id="a choice of one folder"),
        pytest.param("{files}/no.gguf", None, Missing, "model-missing", "no file", id="no file"),
        pytest.param("{files}/none", None, Missing, "model-missing", "there is no file or folder", id="no folder"),
        pytest.param("{files}/empty", None, BadModel, "model-missing", "without a config.json", id="an empty folder"),
        pytest.param("{files}/only-gguf", None, BadModel, "model-missing", "/*.gguf", id="a folder of GGUF files"),
        pytest.param("{files}/folder.gguf", None, BadModel, "model-missing", "a folder", id="a folder called a file"),
        pytest.param("hf:org/none", None, Missing, "not-found", "org/none", id="no repository"),
        pytest.param("hf:org/text", None, Missing, "not-found", "neither GGUF files nor", id="a repository of texts"),
        pytest.param("hf:org/m-GGUF:Q2_K", None, UsageError, "quantisation-unknown", "Q4_0, Q8_0", id="not of its"),
        pytest.param("hf:org/m-GGUF", "Q2_K", UsageError, "quantisation-unknown", "Q4_0, Q8_0", id="by the option"),
        pytest.param("hf:org/tiny", "awq", UsageError, "quantisation-unknown", "bf16", id="safetensors in others"),
        pytest.param("hf:org/tiny:Q4_0", "Q8_0", UsageError, "usage", "contradicts", id="two at once"),
        pytest.param("ollama:tiny:1b", "Q4_0", UsageError, "usage", "the tag says it", id="a choice of one tag"),
        pytest.param("ollama:tiny:2b", None, Missing, None, "ollama:tiny:2b", id="no tag"),
    ],
)
def test_what_is_no_model_is_explained(
    filled: FakeHub,
    registry: FakeRegistry,
    files: Path,
    argument: str,
    quant: str | None,
    error: type[MgpuError],
    code: str | None,
    words: str,
) -> None:
    with pytest.raises(error) as raised:
        found(argument.format(files=files), quant)
    assert raised.value.code == code or code is None
    assert words in f"{raised.value.message} {raised.value.hint}"
    assert raised.value.hint


@pytest.mark.parametrize("argument", ["hf:org/m-GGUF:Q4_0", "hf:org/tiny"], ids=["GGUF", "safetensors"])
def test_a_gated_repository_names_the_page_and_the_token(filled: FakeHub, argument: str) -> None:
    filled.gated = True
    with pytest.raises(Missing) as raised:
        found(argument)
    assert raised.value.code == "gated"
    told = f"{raised.value.message} {raised.value.hint}"
    assert "HF_TOKEN" in told
    assert "huggingface.co/org/" in told or f"{filled.endpoint}/org/" in told


@pytest.mark.parametrize("argument", ["hf:org/m-GGUF:Q4_0", "hf:org/tiny", "ollama:tiny:1b"])
def test_without_the_network_what_was_read_before_is_used_and_said(
    filled: FakeHub, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch, argument: str
) -> None:
    before = found(argument).forms("vllm" if "org/tiny" in argument else "ollama")[0]
    filled.status = registry.status = 503
    after = found(argument).forms("vllm" if "org/tiny" in argument else "ollama")[0]
    assert after.facts == before.facts
    assert after.unconfirmed
    assert after.path is None


@pytest.mark.parametrize(
    ("argument", "engine"),
    [
        pytest.param("hf:org/m-GGUF:Q4_0", "llama.cpp", id="a GGUF file"),
        pytest.param("hf:org/tiny", "vllm", id="a folder"),
        pytest.param("hf:org/tiny:bf16", "vllm", id="a folder in its quantisation"),
    ],
)
def test_what_is_on_disk_needs_no_hub(filled: FakeHub, argument: str, engine: str) -> None:
    source = parse_model(argument)
    assert isinstance(source, HubRepository)
    path = fetch(source) if engine == "llama.cpp" else fetch_folder(source.repository)
    filled.requests.clear()
    filled.status = 503
    (weights,) = found(argument).forms(engine)
    assert (weights.path, weights.label, weights.unconfirmed) == (path, str(path), None)
    assert filled.requests == []


def test_a_folder_on_disk_in_another_quantisation_is_not_taken_for_it(filled: FakeHub) -> None:
    fetch_folder("org/both")
    assert found("hf:org/both:Q4_0").gguf[0].path is None
    with pytest.raises(UsageError, match="no file in AWQ"):
        found("hf:org/both:awq")


def test_a_profiles_folder_on_disk_is_read_itself(hub: FakeHub, files: Path) -> None:
    repository = load_profile("llama-8b").profile.vllm[0].repository
    hub.repositories[repository] = {path.name: path.read_bytes() for path in (files / "tiny").iterdir()}
    path = fetch_folder(repository)
    first, *others = found("llama-8b").safetensors
    assert (first.path, first.facts.name, len(first.facts.layers)) == (path, "llama-8b", 4)
    assert all(weights.path is None for weights in others)
