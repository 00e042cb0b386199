"""The record of an instance: JSON both ways, and what is no record."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest

from mgpu.backends.failure import Failure
from mgpu.running.instance import (
    SCHEMA_VERSION,
    Exit,
    GpuShare,
    Instance,
    ProcessId,
    Rate,
    State,
    instance_from_json,
    instance_to_json,
)
from mgpu.running.recovery import Card, Change, Setup

AT = "2026-10-01T12:00:00+00:00"
# Every field is set, so that none is forgotten on the way.
FULL = Instance(
    name="llama-70b",
    state=State.RESTARTING,
    backend="llama.cpp",
    model="hf:org/llama-70b:Q4_K_M",
    url="http://127.0.0.1:8080",
    started_at=AT,
    ready_at="2026-10-01T12:00:41Z",
    gpus=(GpuShare(uuid="GPU-a", index=0, planned_bytes=20 << 30, actual_bytes=21 << 30),),
    rate=Rate(generation_tok_s=19.1, prompt_tok_s=320.0, running=1, waiting=0, kv_used=0.4),
    restarts=2,
    exit=Exit(code=None, signal=9, cause="killed", at=AT, last_lines=("bye", "\x1b[0m"), message="m", hint="h"),
    first_exit=Exit(code=1, signal=None, cause="crashed", at=AT),
    log_path="/state/llama-70b/engine.log",
    argv=("llama-server", "-m", "a b.gguf"),
    phase="loading weights",
    remaining_s=12.5,
    supervisor=ProcessId(pid=4000, started_ticks=1234567, boot_id="e2b1"),
    engine=ProcessId(pid=4711, started_ticks=1234890, boot_id="e2b1"),
    group=4711,
    changes=(Change(cause="out-of-memory", setting="--ctx", value="4096", before="8192", at=AT, refused="no"),),
    command=("mgpu", "run", "llama-70b"),
    pinned=("--ctx",),
    mgpu_version="0.6.0",
    setup=Setup(
        backend="llama.cpp",
        ctx_tokens=8192,
        parallel=1,
        kv_type="f16",
        split_mode="layer",
        utilisation=0.9,
        cards=(Card(index=0, uuid="GPU-a", device="CUDA0"),),
        other_cards=(Card(index=1),),
        smaller_quants=("Q4_K_M",),
        other_backends=("vllm",),
        port=8080,
    ),
    broken=Failure(code="hung", message="m", deterministic=False),
    trouble=Failure(code="killed", message="m", hint="h", deterministic=False, part="kv", wanted_bytes=1),
    on_trial=True,
    served_as="llama:8b",
    warnings=("gpu1 holds more than planned",),
    restarts_itself=False,
    exit_code=4,
    log_reference="/engine.log, line 3",
    recent_restarts=1,
    healthy_since_s=99.5,
)
MINIMAL = {
    "name": "llama",
    "state": "starting",
    "model": "llama-8b",
    "started_at": AT,
    "supervisor": {"pid": 1, "started_ticks": 0, "boot_id": ""},
}
CONTRACT = (
    "name state backend model url pid started_at ready_at gpus rate restarts exit log_path argv",
    {"gpus": "uuid index planned_bytes actual_bytes", "rate": "generation_tok_s prompt_tok_s running waiting kv_used"},
    "code signal cause at last_lines",
)


def text_of(instance: Instance) -> str:
    return json.dumps(instance_to_json(instance))


def test_there_and_back() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(Instance)}
    assert all(getattr(FULL, name) != value for name, value in defaults.items() if name != "schema_version")
    assert instance_from_json(json.loads(text_of(FULL))) == FULL
    minimal = instance_from_json(MINIMAL)
    assert minimal == instance_from_json(json.loads(text_of(minimal)))
    assert minimal.state is State.STARTING


def test_scripts_find_what_they_were_promised() -> None:
    data = json.loads(text_of(FULL))
    own, nested, last = CONTRACT
    assert set(own.split()) <= set(data)
    assert set(data["gpus"][0]) == set(nested["gpus"].split())
    assert set(data["rate"]) == set(nested["rate"].split())
    assert set(last.split()) <= set(data["exit"])
    assert (data["state"], data["pid"]) == ("restarting", 4711)
    assert json.loads(text_of(dataclasses.replace(FULL, engine=None)))["pid"] is None


def test_what_a_later_mgpu_adds_is_ignored_and_what_it_changes_is_refused() -> None:
    data = json.loads(text_of(FULL))
    data["mood"] = data["exit"]["mood"] = "good"
    assert instance_from_json(data) == FULL
    # Said first: what else is wrong with it is what the newer version means by it.
    newer = {"schema_version": SCHEMA_VERSION + 1, "state": "sleeping"}
    with pytest.raises(ValueError, match=r"written by a newer mgpu \(version 2, newest known 1\)"):
        instance_from_json(newer)


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        pytest.param("name", "../etc", r"instance.name: '../etc' is no name", id="a name that leaves the folder"),
        pytest.param("name", "a\n", r"instance.name", id="a name of two lines"),
        pytest.param("state", "sleeping", r"instance.state: 'sleeping' is no state", id="no state"),
        pytest.param("state", ["ready"], r"instance.state", id="a state in a list"),
        pytest.param("state", None, r"instance.state", id="null for a state"),
        pytest.param("started_at", "yesterday", r"instance.started_at: 'yesterday' is no time", id="no time"),
        pytest.param("started_at", "2026-01-01T00:00:00", r"instance.started_at", id="a time without its zone"),
        pytest.param("ready_at", "", r"instance.ready_at", id="an empty time"),
        pytest.param("first_exit.at", "never", r"instance.first_exit.at", id="no time of a first end"),
        pytest.param("exit.at", "x" * 10**6, r"instance.exit.at", id="a long time"),
        pytest.param("changes.0.at", "never", r"instance.changes\[0\].at", id="a change at no time"),
        pytest.param("engine.pid", 1, r"instance.engine.pid: no process", id="init is no engine"),
        pytest.param("engine.pid", -1, r"instance.engine.pid: no process", id="everybody is no engine"),
        pytest.param("engine.pid", 10**30, r"instance.engine.pid: no process", id="more than there can be"),
        pytest.param("engine.pid", True, r"instance.engine.pid: expected int", id="yes for a number"),
        pytest.param("engine.pid", 4711.0, r"instance.engine.pid: expected int", id="a fraction of a process"),
        pytest.param("group", 0, r"instance.group: no process", id="mgpu's own group"),
        pytest.param("group", 1, r"instance.group: no process", id="everybody's group"),
        pytest.param("supervisor.pid", 0, r"instance.supervisor.pid", id="no supervisor"),
        pytest.param("gpus", {}, r"instance.gpus: expected a list", id="an object for a list"),
        pytest.param("gpus.0", None, r"instance.gpus\[0\]: expected an object", id="null for a card"),
        pytest.param("rate.kv_used", float("nan"), r"instance.rate.kv_used: nan", id="not a number"),
        pytest.param("remaining_s", float("inf"), r"instance.remaining_s: inf", id="for ever"),
        pytest.param("setup.ctx_tokens", "8192", r"instance.setup.ctx_tokens: expected int", id="text for a number"),
        pytest.param("schema_version", "1", r"instance.schema_version: expected int", id="text for the version"),
    ],
)
def test_what_is_wrong_is_named(path: str, value: object, complaint: str) -> None:
    data = json.loads(text_of(FULL))
    *above, last = path.split(".")
    place: Any = data
    for key in above:
        place = place[int(key) if key.isdecimal() else key]
    place[int(last) if last.isdecimal() else last] = value
    with pytest.raises(ValueError, match=complaint) as refused:
        instance_from_json(data)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("missing", sorted(MINIMAL))
def test_what_is_missing_is_named(missing: str) -> None:
    data = {key: value for key, value in MINIMAL.items() if key != missing}
    with pytest.raises(ValueError, match=f"instance.{missing}: missing"):
        instance_from_json(data)


@pytest.mark.parametrize("data", [None, 0, "", "instance", [], [{}], True], ids=repr)
def test_what_is_no_object_is_no_record(data: object) -> None:
    with pytest.raises(ValueError, match="instance: expected an object"):
        instance_from_json(data)


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in `data` with each of its keys."""
    for key, value in list(data.items() if isinstance(data, dict) else enumerate(data)):
        yield data, key
        if isinstance(value, (dict, list)):
            yield from places(value)


@pytest.mark.parametrize(
    "junk", [None, 0, -1, 1.5, "", "\0", [], {}, True, 10**400, [[]]], ids=lambda junk: repr(junk)[:9]
)
def test_junk_in_any_place_is_read_or_refused(junk: object) -> None:
    original = json.loads(text_of(FULL))
    for number in range(len(list(places(original)))):
        data = copy.deepcopy(original)
        container, key = list(places(data))[number]
        container[key] = junk
        complaint = ""
        try:
            instance_from_json(data)
        except ValueError as refused:
            complaint = str(refused)
        assert not complaint or complaint.startswith("instance") or "newer mgpu" in complaint
