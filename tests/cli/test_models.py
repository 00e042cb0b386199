"""Models that fetch themselves, through the program: `plan hf:…`, `run hf:…`, `pull` and `ls`."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgpu.cli.pace import Pace
from mgpu.cli.views.status import fetch_line
from mgpu.models.fetch import Progress
from tests.fakes.hub_server import FakeHub, running
from tests.fakes.shapes import SHAPES
from tests.fakes.sparse_gguf import make_sparse_gguf

from .contract import COUNT, FLAG, NOTHING, NUMBER, PLAN, TEXT, TIME, checked, exactly, listed, maybe
from .program import Mgpu, until

PULL = exactly(
    models=listed(
        exactly(
            model=TEXT,
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
            profile=maybe(TEXT),
            repository=maybe(TEXT),
            quantisation=maybe(TEXT),
            bytes=COUNT,
            total_bytes=maybe(COUNT),
            path=TEXT,
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
    with running(FakeHub({"org/Big-GGUF": {big.name: big}, "org/mine": {"mine-Q4_K_M.gguf": small}})) as serving:
        mgpu.environment |= {
            "HF_ENDPOINT": serving.endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
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
        pytest.param("pull ollama:llama3.1", {}, "source-unsupported", id="pull from Ollama"),
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
    assert hub.served_bytes == 0


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
    (Path(mgpu.environment["XDG_CONFIG_HOME"]) / "mgpu/profiles").mkdir(parents=True)
    (Path(mgpu.environment["XDG_CONFIG_HOME"]) / "mgpu/profiles/mine.yaml").write_text(PROFILE)
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
