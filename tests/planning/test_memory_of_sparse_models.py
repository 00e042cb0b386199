"""The memory rules on models made to try them, and on which they were mended, against llama-server's projection.

`tests/data/llama_cpp_memory_sparse.csv` holds what build 10434 projected for models without data (`sparse_models`):
odd heads, vocabularies, windows, experts, latent attention and recurrent layers. The figures of devices are whole MiB,
rounded down, but for compute buffers.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from mgpu.models.gguf_facts import facts_from_gguf
from mgpu.units import MIB
from tests.fakes.devices import rpc_devices
from tests.fakes.sparse_models import MODELS
from tests.planning.engine_rows import Answer, Asked, ask, facts_of, plan, read_rows

ANSWERS = read_rows()


def row_id(asked: Asked) -> str:
    default = Asked(asked.model)
    changed = [f"{key}={value}" for key, value in vars(asked).items() if value != getattr(default, key)]
    return " ".join([asked.model, *changed])


@pytest.mark.parametrize("asked", [pytest.param(asked, id=row_id(asked)) for asked in ANSWERS])
def test_the_plan_agrees_with_the_engine(asked: Asked) -> None:
    agrees(asked, ANSWERS[asked])


def agrees(asked: Asked, answers: tuple[Answer, ...]) -> None:
    candidate = plan(asked)
    devices = {device.device: device for device in candidate.devices}
    for answer in answers:
        ledger = candidate.host if answer.device == "Host" else devices[answer.device]
        roundings = 3 if answer.device == "Host" else 1  # the sum of what lies mapped, pinned and repacked
        assert -1 <= ledger.weights_bytes / MIB - answer.weights_mib < roundings + 1e-6, answer
        assert -1 <= ledger.kv_bytes / MIB - answer.kv_mib < roundings + 1e-6, answer
        high_mib = ledger.compute_bytes / MIB - answer.compute_mib
        assert high_mib >= -1, answer
        total_mib = answer.weights_mib + answer.kv_mib + answer.compute_mib
        assert answer.device == "Host" or high_mib <= total_mib * 0.05, answer


def test_every_model_was_asked_about_in_many_ways() -> None:
    counts = Counter(asked.model for asked in ANSWERS)
    assert set(counts) == set(MODELS)
    assert len(counts) >= 12
    assert min(counts.values()) >= 12
    architectures = {model.architecture for model in MODELS.values()}
    assert {"llama", "gemma3", "glm4moe", "deepseek2", "llama4", "qwen35", "granitehybrid"} <= architectures


@pytest.mark.parametrize("name", ["gemma4", "qwen35moe"])
def test_facts_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    written = facts_from_gguf(MODELS[name].write(tmp_path / "model.gguf"))
    assert written.layers == facts_of(name).layers
    assert written.head_bytes == facts_of(name).head_bytes


@pytest.mark.real_device
@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(Asked("qwen3-narrow", ctk="q8_0", ctv="q8_0", np=2), id="quantised cache"),
        pytest.param(Asked("gemma3", ctx=16_384), id="sliding windows"),
        pytest.param(Asked("llama-wide-vocabulary", fa="off", ctx=4096), id="without flash attention"),
        pytest.param(Asked("qwen3moe-small", extra="-ncmoe 5"), id="experts on the host"),
        pytest.param(Asked("deepseek2-narrow", ub=256), id="latent attention"),
        pytest.param(Asked("granitehybrid", np=3, ctx=12_288), id="recurrent layers"),
    ],
)
def test_the_installed_engine_says_the_same(asked: Asked, tmp_path: Path) -> None:
    path = asked.sparse.write(tmp_path / "model.gguf")
    with rpc_devices(asked.devices) as endpoints:
        answers = ask(asked, path, endpoints)
    assert [answer.device for answer in answers] == ["RPC0", "RPC1", "Host"]
    agrees(asked, answers)
