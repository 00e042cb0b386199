"""`mgpu plan --exact`: a plan beside what a real llama-server projects on two real devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.devices import NO_VULKAN, real_llama_server, rpc_devices
from tests.fakes.hub_server import FakeHub, running
from tests.fakes.shapes import SHAPES
from tests.fakes.sparse_gguf import make_sparse_gguf

from .contract import NOTHING, PLAN, checked
from .program import Mgpu

MIB = 1 << 20
real_device = pytest.mark.real_device


@pytest.fixture(scope="module")
def devices() -> Iterator[str]:
    with rpc_devices(2) as endpoints:
        yield ",".join(endpoints)


@pytest.fixture
def real(mgpu: Mgpu, tmp_path: Path) -> Mgpu:
    """mgpu with a real engine, and a temporary folder and caches of its own."""
    (tmp_path / "tmp").mkdir()
    mgpu.environment |= {
        "MGPU_LLAMA_SERVER": str(real_llama_server()),
        "TMPDIR": str(tmp_path / "tmp"),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        **NO_VULKAN,
    }
    mgpu.environment.pop("HF_HUB_OFFLINE", None)
    return mgpu


def assert_agreed(mgpu: Mgpu, exact: dict[str, Any], devices: int) -> None:
    """See that weights and KV cache are as the engine says, which rounds down, and that nothing is left behind."""
    assert len(exact["devices"]) == devices
    for each in [*exact["devices"], exact["host"]]:
        for part in ("weights_bytes", "kv_bytes"):
            assert 0 <= each["planned"][part] - each["projected"][part] < MIB, each
        # Every card but one that holds the last layer alone really gets the first one's compute buffer.
        assert -MIB < each["planned"]["compute_bytes"] - each["projected"]["compute_bytes"] < 40 * MIB, each
    assert exact["devices"][0]["planned"]["weights_bytes"] > 100 * MIB
    assert list(Path(mgpu.environment["TMPDIR"]).iterdir()) == []
    mgpu.assert_nothing_left()


@real_device
@pytest.mark.parametrize("words", ["llama-70b", "qwen3-30b-a3b --ctx 32k", "gpt-oss-20b", "gemma-3-27b --parallel 2"])
def test_a_profile_is_planned_as_the_engine_projects_it(real: Mgpu, devices: str, words: str) -> None:
    ended = real("plan", *words.split(), "--exact", "--json", "--offload", "forbid", "--", "--rpc", devices)
    assert_agreed(real, checked(ended.json, "plan", PLAN)["exact"], 2)


@real_device
def test_a_model_on_the_hub_is_planned_as_the_engine_projects_it(real: Mgpu, devices: str, tmp_path: Path) -> None:
    big = make_sparse_gguf(tmp_path / "m-Q6_K.gguf", SHAPES["qwen3-32b"], "Q6_K", vocabulary=9000)
    with running(FakeHub({"org/repo": {big.name: big}})) as hub:
        words = ["hf:org/repo", "--tensor-split", "3,1", "--kv-type", "q8_0"]
        ended = real("plan", *words, "--exact", "--json", "--", "--rpc", devices, HF_ENDPOINT=hub.endpoint)
    assert_agreed(real, checked(ended.json, "plan", PLAN)["exact"], 2)


@real_device
def test_a_file_is_planned_as_the_engine_projects_it(real: Mgpu, devices: str, tmp_path: Path) -> None:
    path = make_sparse_gguf(tmp_path / "m.gguf", SHAPES["llama-3.1-8b"], "Q5_K_M", vocabulary=9000)
    ended = real("plan", path, "--gpus", "1", "--exact", "--json", "--", "--rpc", devices)
    assert_agreed(real, checked(ended.json, "plan", PLAN)["exact"], 1)
    screen = real("plan", path, "--exact", "--", "--rpc", devices).out
    assert "llama-server was asked what it would hold" in screen
    plan, comparison = screen.split("planned/projected")
    assert "gpu1 127.0.0.1" in comparison
    assert "--exact" not in plan.split("mgpu run")[1].splitlines()[0]


@real_device
def test_the_processor_is_asked_too(real: Mgpu) -> None:
    exact = checked(real("plan", "smollm2-135m", "--exact", "--json").json, "plan", PLAN)["exact"]
    assert exact["devices"] == []
    assert exact["host"]["difference_bytes"] == pytest.approx(0, abs=3 * MIB)
    assert exact["largest_difference_bytes"] == abs(exact["host"]["difference_bytes"])


@real_device
def test_a_file_that_the_engine_does_not_take_is_an_error(real: Mgpu, devices: str, tmp_path: Path) -> None:
    path = make_sparse_gguf(tmp_path / "m.gguf", SHAPES["llama-3.2-1b"], "Q8_0", layers=2, vocabulary=1000)
    path.write_bytes(path.read_bytes().replace(b"llama", b"lxama"))
    ended = real("plan", path, "--exact", "--json", "--", "--rpc", devices)
    checked(ended.json, "plan", NOTHING)
    assert ended.exit_code == 4
    assert ended.json["errors"][0]["hint"]
    real.assert_nothing_left()


def test_without_being_asked_the_engine_projects_nothing(mgpu: Mgpu, tiny: Path) -> None:
    assert checked(mgpu("plan", tiny, "--json").json, "plan", PLAN)["exact"] is None


@pytest.mark.parametrize(
    ("words", "variables", "exit_code", "code", "hint"),
    [
        pytest.param("--machine 2x4090", {}, 2, "usage", "--machine", id="cards that are not here"),
        pytest.param("", {"MGPU_LLAMA_SERVER": "/none"}, 3, "engine-missing", "MGPU_LLAMA_SERVER", id="no engine"),
        pytest.param("", {"FAKE_FAIL": "bad-arch"}, 4, "architecture-unknown", "", id="an engine that fails"),
    ],
)
def test_what_cannot_be_asked_is_said(
    mgpu: Mgpu, tiny: Path, words: str, variables: dict[str, str | None], exit_code: int, code: str, hint: str
) -> None:
    ended = mgpu("plan", tiny, "--exact", "--json", *words.split(), **variables)
    checked(ended.json, "plan", NOTHING)
    assert (ended.exit_code, ended.json["errors"][0]["code"]) == (exit_code, code)
    assert hint in ended.json["errors"][0]["hint"]
    mgpu.assert_nothing_left()
