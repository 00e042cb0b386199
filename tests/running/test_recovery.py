"""The ladder: what is tried after each cause, in which order, and what is left to the user."""

from __future__ import annotations

import ast
import shlex
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.backends.failure import Failure
from mgpu.cli.options import PlannerOptions
from mgpu.errors import Missing, NoAnswer, UsageError
from mgpu.running.causes import KINDS, Kind, failure_from, kind_of
from mgpu.running.recovery import (
    MOST_RESTARTS,
    Again,
    Card,
    Change,
    Setup,
    Stop,
    delay_s,
    in_effect,
    next_step,
    with_change,
)

PACKAGE = Path(__file__).parents[2] / "mgpu"
# Other commands and the doctor: what they say ends no instance.
ASIDE = (
    *("backends/install.py", "models/wheel.py", "running/census.py", "running/stopping.py"),
    *(f"cli/{name}.py" for name in ("detach", "export", "logs", "main", "named", "ollama_models", "profiles")),
    *(f"cli/{name}.py" for name in ("pulls", "reap", "stop", "backends", "models")),
)
# What `mgpu.running.registry` says to other commands, and the doctor's words.
TOLD_TO_OTHERS = {"unknown-instance", "instance-lives"}
TELL_CAUSES = tuple(
    path
    for path in PACKAGE.rglob("*.py")
    if str(path.relative_to(PACKAGE)) not in ASIDE and path.relative_to(PACKAGE).parts[0] != "doctor"
)
CARDS = tuple(Card(index=i, uuid=f"GPU-{i}{i}{i}{i}{i}{i}{i}{i}-0000", device=f"CUDA{i}") for i in range(4))
LLAMA = Setup(
    backend="llama.cpp",
    ctx_tokens=8192,
    parallel=4,
    kv_type="f16",
    split_mode="layer",
    cards=CARDS[:2],
    other_cards=CARDS[2:3],
    smaller_quants=("Q4_K_M", "Q3_K_M"),
    other_backends=("vllm",),
    port=8080,
)
VLLM = replace(
    LLAMA,
    backend="vllm",
    split_mode="tensor",
    tensor_parallel=2,
    utilisation=0.9,
    smaller_quants=("AWQ",),
    other_backends=("llama.cpp",),
)
OPTIONS = frozenset({"--ctx", "--parallel", "--kv-type", "--split-mode", "--gpus", "--quant", "--backend"})
ENGINES_OWN = frozenset({"--gpu-memory-utilization", "--disable-custom-all-reduce"})
EVERYTHING = OPTIONS | ENGINES_OWN | {"--port", "NCCL_P2P_DISABLE"}


def failure(code: str, **more: typing.Any) -> Failure:
    return Failure(code=code, message=f"it was {code}", hint="a hint", **{"deterministic": False, **more})


def codes_in(path: Path) -> Iterator[str]:
    """Every word that stands where a module says the code of a failure or an error."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        said = [word.value for word in node.keywords if word.arg == "code"]
        if isinstance(node.func, ast.Name) and node.func.id == "_cause":
            said += node.args[:1]
        for value in said:
            branches = [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
            yield from (
                each.value for each in branches if isinstance(each, ast.Constant) and isinstance(each.value, str)
            )


def test_every_code_that_can_be_the_cause_of_an_end_has_a_kind() -> None:
    said = {code for path in TELL_CAUSES for code in codes_in(path)}
    assert {"out-of-memory", "host-out-of-memory", "cards-unreachable", "killed", "nccl-hang", "port-unusable"} <= said
    assert {"reaper-failed", "rate-limited", "temporary-folder", "no-resources", "bug"} <= said
    assert said - set(KINDS) - TOLD_TO_OTHERS == set()


def test_every_kind_is_of_a_code_that_is_said_somewhere() -> None:
    said = "".join(path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "causes.py")
    assert [code for code in KINDS if f'"{code}"' not in said] == []


def test_every_option_of_a_ladder_is_one_that_can_be_typed() -> None:
    hints = typing.get_type_hints(PlannerOptions, include_extras=True).values()
    typed = {flag for hint in hints for flag in (hint.__metadata__[0].default, *hint.__metadata__[0].param_decls)}
    assert typed >= OPTIONS
    changed = {step.setting for code in KINDS for setup in (LLAMA, VLLM) for step in changes(failure(code), setup)}
    assert changed <= EVERYTHING


@pytest.mark.parametrize(
    ("code", "deterministic", "kind"),
    [
        pytest.param("bad-flag", True, Kind.DETERMINISTIC, id="a wrong flag"),
        pytest.param("crashed", True, Kind.DETERMINISTIC, id="a crash that would come again"),
        pytest.param("model-missing", False, Kind.CRASH, id="a hub that could not be reached"),
        pytest.param("exited", False, Kind.CRASH, id="an end with status 0"),
        pytest.param("stopped", False, Kind.CRASH, id="a signal from somebody else"),
        pytest.param("never-heard-of", True, Kind.DETERMINISTIC, id="an unknown code that would come again"),
        pytest.param("never-heard-of", False, Kind.CRASH, id="an unknown code"),
        pytest.param("out-of-memory", True, Kind.OUT_OF_MEMORY, id="memory, while loading"),
        pytest.param("port-in-use", True, Kind.ENVIRONMENT, id="a port"),
        pytest.param("no-resources", False, Kind.ENVIRONMENT, id="no process to be had"),
        pytest.param("reaper-failed", True, Kind.ENVIRONMENT, id="no reaper"),
        pytest.param("rate-limited", False, Kind.ENVIRONMENT, id="a hub that wants to be left alone"),
        pytest.param("device-missing", False, Kind.LOST_DEVICE, id="an RPC server that does not answer"),
    ],
)
def test_kinds(code: str, deterministic: bool, kind: Kind) -> None:
    assert kind_of(failure(code, deterministic=deterministic)) is kind


def test_errors_of_mgpus_own_are_failures_too() -> None:
    assert kind_of(failure_from(NoAnswer("", code="does-not-fit"))) is Kind.OUT_OF_MEMORY
    assert kind_of(failure_from(UsageError("vLLM knows no --ubatch"))) is Kind.DETERMINISTIC
    found = failure_from(Missing("no port is free", code="port-in-use", hint="--port 9000"))
    assert (found.message, found.hint, kind_of(found)) == ("no port is free", "--port 9000", Kind.ENVIRONMENT)


def ladder(
    why: Failure, setup: Setup, *, pinned: frozenset[str] = frozenset(), refused: bool = True
) -> Iterator[Change | Again | Stop]:
    """All steps until nothing is left, where the plan refuses each change (or none changes anything)."""
    tried: list[Change] = []
    while True:
        step = next_step(why, setup, tried, pinned, proven=False, restarts=0)
        yield step
        if not isinstance(step, Change):
            return
        tried.append(replace(step, refused="no" if refused else None))


def changes(why: Failure, setup: Setup) -> list[Change]:
    return [step for step in ladder(why, setup) if isinstance(step, Change)]


@pytest.mark.parametrize(
    ("why", "setup", "expected"),
    [
        pytest.param(
            failure("out-of-memory", part="kv", device="CUDA0"),
            LLAMA,
            "--ctx 4096|--ctx 2048|--parallel 2|--parallel 1|--kv-type q8_0"
            "|--gpus GPU-00000000,GPU-11111111,GPU-22222222|--quant Q4_K_M|--quant Q3_K_M|--backend vllm",
            id="llama.cpp's KV cache",
        ),
        pytest.param(
            failure("out-of-memory", part="weights"),
            replace(LLAMA, split_mode="tensor", smaller_quants=(), other_backends=()),
            "--split-mode layer|--gpus GPU-00000000,GPU-11111111,GPU-22222222",
            id="weights are no matter of context",
        ),
        pytest.param(
            failure("out-of-memory", part="weights"),
            replace(LLAMA, split_mode="none", cards=CARDS[:1], other_cards=CARDS[1:2], smaller_quants=()),
            "--split-mode layer|--gpus GPU-00000000,GPU-11111111|--backend vllm",
            id="one card",
        ),
        pytest.param(
            failure("out-of-memory", part="compute", device="CUDA1"),
            replace(VLLM, ctx_tokens=3000, parallel=1, other_cards=()),
            "--ctx 2048|--kv-type fp8|-- --gpu-memory-utilization 0.85|-- --gpu-memory-utilization 0.8"
            "|-- --gpu-memory-utilization 0.75|-- --gpu-memory-utilization 0.7|--quant AWQ|--backend llama.cpp",
            id="a card that vLLM took too large a share of",
        ),
        pytest.param(
            failure("out-of-memory", part="kv", device="CUDA0"),
            replace(VLLM, ctx_tokens=2048, parallel=1, utilisation=0.7, kv_type="fp8", other_cards=()),
            "--quant AWQ|--backend llama.cpp",
            id="a share that is small already",
        ),
        pytest.param(
            failure("out-of-memory", part="kv"),
            replace(VLLM, ctx_tokens=2048, parallel=1, other_cards=(), smaller_quants=()),
            "--kv-type fp8|-- --gpu-memory-utilization 0.95|--backend llama.cpp",
            id="a share that leaves vLLM too little for its cache",
        ),
        pytest.param(
            failure("host-out-of-memory", part="weights"),
            replace(LLAMA, kv_type="q8_0"),
            "--ctx 4096|--ctx 2048|--parallel 2|--parallel 1|--quant Q4_K_M|--quant Q3_K_M|--backend vllm",
            id="the host's memory is no matter of cards",
        ),
        pytest.param(
            failure("hung"), VLLM, "NCCL_P2P_DISABLE=1|-- --disable-custom-all-reduce", id="vLLM's cards hang"
        ),
        pytest.param(
            failure("nccl-hang"),
            replace(VLLM, tensor_parallel=1, split_mode="pipeline"),
            "NCCL_P2P_DISABLE=1",
            id="a pipeline has no all-reduce",
        ),
        pytest.param(
            failure("garbage"),
            replace(LLAMA, split_mode="tensor"),
            "NCCL_P2P_DISABLE=1|--split-mode layer",
            id="garbage over llama.cpp's tensor split",
        ),
        pytest.param(failure("hung"), LLAMA, "", id="a layer split exchanges nothing that could be left out"),
        pytest.param(failure("hung"), replace(VLLM, cards=CARDS[:1]), "", id="nor does one card"),
        pytest.param(failure("device-lost", device="CUDA1"), LLAMA, "--gpus GPU-00000000", id="a card was lost"),
        pytest.param(
            failure("device-lost", device="CUDA0"),
            replace(LLAMA, cards=(CARDS[0], *(Card(index=i, uuid=f"GPU-00000000-{i}") for i in (1, 2)), Card(index=3))),
            "--gpus GPU-00000000-1,GPU-00000000-2,gpu3",
            id="cards whose names begin alike, or that have none",
        ),
        pytest.param(failure("device-lost"), LLAMA, "", id="which card was lost is not known"),
        pytest.param(
            failure("device-lost", device="CUDA0"), replace(LLAMA, cards=CARDS[:1]), "", id="the only card was lost"
        ),
        pytest.param(failure("killed"), LLAMA, "", id="a crash changes nothing"),
        pytest.param(failure("bad-flag", deterministic=True), LLAMA, "", id="a wrong flag changes nothing"),
        pytest.param(failure("port-in-use"), replace(LLAMA, port=65533), "--port 65534|--port 65535", id="ports"),
        pytest.param(
            failure("port-in-use"),
            LLAMA,
            "--port 8081|--port 8082|--port 8083|--port 8084|--port 8085",
            id="not every port",
        ),
    ],
)
def test_what_is_tried_in_this_order_where_every_plan_refuses(why: Failure, setup: Setup, expected: str) -> None:
    steps = list(ladder(why, setup))
    assert "|".join(step.words for step in steps if isinstance(step, Change)) == expected
    assert steps[-1] == Stop(reason=why.message)


def test_a_change_that_was_planned_is_the_base_of_the_next() -> None:
    why, setup = failure("out-of-memory", part="kv"), LLAMA
    tried: list[Change] = []
    for expected in ("--ctx 4096", "--ctx 2048", "--parallel 2"):
        step = next_step(why, setup, tried, frozenset(), proven=False, restarts=0)
        assert isinstance(step, Change)
        assert step.words == expected
        assert step.cause == "out-of-memory"
        tried.append(step)
        setup = replace(setup, ctx_tokens=int(in_effect(tried).options["--ctx"]))


def test_engines_are_not_tried_twice() -> None:
    there = Change(cause="out-of-memory", setting="--backend", before="llama.cpp", value="vllm")
    only_engine = replace(VLLM, ctx_tokens=512, parallel=1, kv_type="fp8", other_cards=(), smaller_quants=())
    step = next_step(
        failure("out-of-memory", part="weights"),
        replace(only_engine, utilisation=None),
        [there],
        frozenset(),
        proven=False,
        restarts=0,
    )
    assert step == Stop(reason="it was out-of-memory")


def test_a_card_that_was_left_out_stays_out() -> None:
    lost = next_step(failure("device-lost", device="CUDA1"), LLAMA, (), frozenset(), proven=False, restarts=0)
    assert isinstance(lost, Change)
    less = replace(LLAMA, cards=CARDS[:1], other_cards=CARDS[1:], smaller_quants=(), other_backends=())
    why = failure("out-of-memory", part="weights")
    step = next_step(why, less, [lost], frozenset(), proven=False, restarts=0)
    assert step == Stop(reason="it was out-of-memory")


@pytest.mark.parametrize(
    ("code", "proven", "restarts", "expected"),
    [
        pytest.param("crashed", False, 0, Stop, id="what never worked is not tried again as it is"),
        pytest.param("crashed", True, 0, Again, id="what worked is"),
        pytest.param("device-lost", True, 0, Again, id="a card may come back"),
        pytest.param("device-lost", True, 1, Change, id="one that is lost again is left out"),
        pytest.param("device-lost", False, 0, Change, id="one that never worked at once"),
        pytest.param("port-in-use", True, 2, Again, id="clients know the port"),
        pytest.param("port-in-use", True, 3, Change, id="which is not waited for any longer"),
        pytest.param("hung", True, 0, Change, id="what hung would hang again"),
        pytest.param("bad-flag", True, 0, Stop, id="a wrong flag stays one"),
        pytest.param("crashed", True, MOST_RESTARTS - 1, Again, id="the last of the budget"),
        pytest.param("crashed", True, MOST_RESTARTS, Stop, id="nothing is left of the budget"),
        pytest.param("out-of-memory", True, MOST_RESTARTS, Stop, id="nor for changes"),
    ],
)
def test_the_same_again_or_a_change(code: str, proven: bool, restarts: int, expected: type) -> None:
    why = failure(code, device="CUDA1", deterministic=code == "bad-flag")
    step = next_step(why, VLLM, (), frozenset(), proven=proven, restarts=restarts)
    assert isinstance(step, expected)
    assert not isinstance(step, Stop) or ("given up" in step.reason) == (restarts == MOST_RESTARTS)


def test_restarts_back_off() -> None:
    assert [delay_s(restarts) for restarts in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert delay_s(10**9) == 60


@pytest.mark.parametrize("setup", [LLAMA, VLLM], ids=["llama.cpp", "vLLM"])
@pytest.mark.parametrize("code", sorted(KINDS))
@given(pinned=st.frozensets(st.sampled_from(sorted(EVERYTHING))), refused=st.booleans())
def test_what_is_pinned_is_never_changed_and_every_ladder_ends(
    setup: Setup, code: str, pinned: frozenset[str], refused: bool
) -> None:
    why = failure(code, device="CUDA1")
    steps = list(ladder(why, setup, pinned=pinned, refused=refused))
    changed = [step for step in steps if isinstance(step, Change)]
    assert {change.setting for change in changed} <= EVERYTHING
    assert not {change.setting for change in changed} & pinned
    assert len({(change.setting, change.value) for change in changed}) == len(changed)
    last = steps[-1]
    assert isinstance(last, Stop)
    assert last.fix is None or last.fix.setting in pinned


@pytest.mark.parametrize(
    ("why", "expected"),
    [
        pytest.param(failure("out-of-memory", part="kv"), "--ctx 4096", id="the mildest that is pinned"),
        pytest.param(failure("hung"), "NCCL_P2P_DISABLE=1", id="a variable"),
        pytest.param(failure("device-lost", device="CUDA0"), "--gpus GPU-11111111", id="cards"),
        pytest.param(failure("port-in-use"), "--port 8081", id="a port"),
    ],
)
def test_what_only_the_user_can_change_is_the_fix(why: Failure, expected: str) -> None:
    step = next_step(why, VLLM, (), EVERYTHING, proven=False, restarts=0)
    assert isinstance(step, Stop)
    assert step.fix is not None
    assert step.fix.words == expected


@pytest.mark.parametrize(
    ("command", "setting", "value", "expected"),
    [
        pytest.param("mgpu run m", "--ctx", "4096", "mgpu run m --ctx 4096", id="added"),
        pytest.param("mgpu run m --ctx 8k -d", "--ctx", "4096", "mgpu run m -d --ctx 4096", id="replaced"),
        pytest.param("mgpu run m --ctx=8k -d", "--ctx", "4096", "mgpu run m -d --ctx 4096", id="replaced, joined"),
        pytest.param("mgpu run m -- -x", "--ctx", "4096", "mgpu run m --ctx 4096 -- -x", id="before --"),
        pytest.param("mgpu run m", "NCCL_P2P_DISABLE", "1", "NCCL_P2P_DISABLE=1 mgpu run m", id="a variable"),
        pytest.param(
            "mgpu run m",
            "--disable-custom-all-reduce",
            None,
            "mgpu run m -- --disable-custom-all-reduce",
            id="an engine's switch",
        ),
        pytest.param(
            "mgpu run m -- -x --gpu-memory-utilization=0.9",
            "--gpu-memory-utilization",
            "0.85",
            "mgpu run m -- -x --gpu-memory-utilization 0.85",
            id="an engine's argument",
        ),
        pytest.param("mgpu run 'a b'", "--ctx", "1", "mgpu run 'a b' --ctx 1", id="quoted for a shell"),
    ],
)
def test_the_fix_as_a_command(command: str, setting: str, value: str | None, expected: str) -> None:
    change = Change(cause="any", setting=setting, value=value)
    assert with_change(shlex.split(command), change) == expected


def test_what_changes_come_to() -> None:
    def change(setting: str, value: str | None, refused: str | None = None) -> Change:
        return Change(cause="any", setting=setting, value=value, refused=refused)

    history = [
        change("--ctx", "4096"),
        change("--kv-type", "q8_0"),
        change("--ctx", "2048"),
        change("--parallel", "1", refused="it does not fit even so"),
        change("NCCL_P2P_DISABLE", "1"),
        change("--backend", "vllm"),
        change("--disable-custom-all-reduce", None),
        change("--gpu-memory-utilization", "0.85"),
    ]
    found = in_effect(history)
    assert found.options == {"--ctx": "2048", "--backend": "vllm"}
    assert found.engine_arguments == ("--disable-custom-all-reduce", "--gpu-memory-utilization", "0.85")
    assert found.environment == {"NCCL_P2P_DISABLE": "1"}
