"""The keys and types that scripts rely on, as JSON Schemas that allow no other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import jsonschema

import mgpu

from .program import Ended

Json = dict[str, Any]


def exactly(**properties: object) -> Json:
    """The schema of an object with these keys, all of them and no other."""
    return {
        "type": "object",
        "properties": properties,
        "required": sorted(properties),
        "additionalProperties": False,
    }


def listed(items: object) -> Json:
    return {"type": "array", "items": items}


def maybe(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


TEXT, COUNT, FLAG, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {"type": "number"}
TIME = {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$"}
ENVELOPE = exactly(
    schema={"type": "string", "pattern": r"^mgpu\.[a-z.]+/1$"},
    command=TEXT,
    ok=FLAG,
    exit_code=COUNT,
    simulated=FLAG,
    data={},
    warnings=listed(TEXT),
    errors=listed(exactly(code={"type": "string", "pattern": "^[a-z0-9-]+$"}, message=TEXT, hint=maybe(TEXT))),
)
PROCESS = exactly(pid=COUNT, name=maybe(TEXT), bytes=maybe(COUNT))
PCIE = exactly(**dict.fromkeys(("gen", "gen_max", "width", "width_max", "slot_width"), maybe(COUNT)))
NVLINK = exactly(port=COUNT, active=FLAG, version=maybe(COUNT), remote_bus_id=maybe(TEXT))
GPU = exactly(
    index=COUNT,
    vendor=TEXT,
    name=TEXT,
    uuid=maybe(TEXT),
    bus_id=maybe(TEXT),
    total_bytes=maybe(COUNT),
    free_bytes=maybe(COUNT),
    used_by=listed(PROCESS),
    compute_capability=maybe(TEXT),
    gfx=maybe(TEXT),
    bandwidth_gb_s=maybe(NUMBER),
    pcie=PCIE,
    bar1_bytes=maybe(COUNT),
    power_w=maybe(NUMBER),
    power_limit_w=maybe(NUMBER),
    temperature_c=maybe(COUNT),
    utilisation_percent=maybe(COUNT),
    nvlink=listed(NVLINK),
    mig=maybe(FLAG),
    integrated=maybe(FLAG),
    display=maybe(FLAG),
    engine_devices=listed(TEXT),
    problem=maybe(TEXT),
)
HOST = exactly(
    hostname_redacted={"const": True},
    kernel=maybe(TEXT),
    cpu=maybe(TEXT),
    cores=maybe(COUNT),
    ram_bytes=maybe(COUNT),
    ram_available_bytes=maybe(COUNT),
    numa_nodes=maybe(COUNT),
    virtualisation=maybe(TEXT),
    container=maybe(TEXT),
)
MACHINE = exactly(
    schema_version={"const": 1},
    captured_at=TIME,
    source={"enum": ["probed", "simulated"]},
    host=HOST,
    driver=maybe(exactly(version=maybe(TEXT), cuda=maybe(TEXT), module_flavour=maybe(TEXT), problem=maybe(TEXT))),
    gpus=listed(GPU),
    links=listed(exactly(a=COUNT, b=COUNT, kind=TEXT, p2p=maybe(FLAG))),
)
RANGE = maybe(exactly(low=NUMBER, likely=NUMBER, high=NUMBER))
DEVICE = exactly(
    gpu=COUNT,
    uuid=maybe(TEXT),
    name=TEXT,
    device=TEXT,
    first_layer=COUNT,
    layers=COUNT,
    head=FLAG,
    weights_bytes=COUNT,
    kv_bytes=COUNT,
    compute_bytes=COUNT,
    runtime_bytes=COUNT,
    total_bytes=COUNT,
    card_bytes=maybe(COUNT),
    free_bytes=COUNT,
    spare_bytes=COUNT,
    basis=TEXT,
)
BACKEND = {"enum": ["llama.cpp", "vllm", "ollama"]}
CANDIDATE = exactly(
    backend=BACKEND,
    split_mode={"enum": ["layer", "tensor", "pipeline", "none"]},
    tensor_parallel=COUNT,
    pipeline_parallel=COUNT,
    replicas=COUNT,
    quant=maybe(TEXT),
    kv_type=TEXT,
    ctx_tokens=COUNT,
    parallel=COUNT,
    verdict={"enum": ["fits", "fits-with-offload", "does-not-fit", "illegal", "unavailable"]},
    reasons=listed(TEXT),
    devices=listed(DEVICE),
    host=exactly(
        layers=COUNT,
        expert_layers=COUNT,
        weights_bytes=COUNT,
        kv_bytes=COUNT,
        compute_bytes=COUNT,
        total_bytes=COUNT,
        basis=TEXT,
        free_bytes=maybe(COUNT),
        spare_bytes=maybe(COUNT),
    ),
    short_bytes=COUNT,
    max_ctx_tokens=maybe(COUNT),
    speed=exactly(
        decode_tok_s=RANGE,
        decode_start_tok_s=RANGE,
        aggregate_tok_s=RANGE,
        aggregate_users=maybe(COUNT),
        prefill_tok_s=RANGE,
        bound_tok_s=maybe(NUMBER),
        basis=maybe(TEXT),
        sums=listed(TEXT),
        thin=listed(TEXT),
        unknown=maybe(TEXT),
    ),
    argv=listed(TEXT),
    env={"type": "object", "additionalProperties": TEXT},
) | {
    "if": {"properties": {"verdict": {"const": "illegal"}}},
    "then": {"properties": {"argv": {"maxItems": 0}}},
    "else": {"properties": {"argv": {"minItems": 1}}},
}
MODEL = exactly(
    name=TEXT,
    architecture=TEXT,
    quantisation=maybe(TEXT),
    parameters=maybe(COUNT),
    active_parameters=maybe(COUNT),
    layers=COUNT,
    heads=maybe(COUNT),
    kv_heads=maybe(COUNT),
    head_dim=maybe(COUNT),
    embedding_length=maybe(COUNT),
    vocabulary=maybe(COUNT),
    context_length=maybe(COUNT),
    experts=maybe(COUNT),
    experts_used=maybe(COUNT),
    file_bytes=COUNT,
    source=TEXT,
)
PARTS = exactly(weights_bytes=COUNT, kv_bytes=COUNT, compute_bytes=COUNT, total_bytes=COUNT)
SIDES: Json = {"planned": PARTS, "projected": maybe(PARTS), "difference_bytes": maybe(COUNT)}
EXACT = exactly(
    program=TEXT,
    seconds=NUMBER,
    devices=listed(exactly(gpu=COUNT, uuid=maybe(TEXT), device=TEXT, **SIDES)),
    host=exactly(**SIDES),
    largest_difference_bytes=maybe(COUNT),
)
PLAN = exactly(
    model=MODEL,
    machine=MACHINE,
    best=maybe(COUNT),
    why=maybe(TEXT),
    candidates={**listed(CANDIDATE), "minItems": 1},
    fixes=listed(exactly(change=TEXT, candidate=CANDIDATE)),
    left_out=listed(exactly(backend=BACKEND, reason=TEXT)),
    not_modelled=listed(TEXT),
    exact=maybe(EXACT),
)
ENGINE_DEVICE = exactly(id=TEXT, description=TEXT, total_bytes=COUNT, free_bytes=COUNT)
BACKENDS = exactly(
    backends=listed(
        exactly(
            backend={"enum": ["llama.cpp", "vllm", "ollama"]},
            installed=FLAG,
            path=maybe(TEXT),
            found_in=maybe(TEXT),
            version=maybe(TEXT),
            devices=maybe(listed(ENGINE_DEVICE)),
            cpu_build=maybe(FLAG),
            running=maybe(
                exactly(
                    url=TEXT,
                    version=TEXT,
                    loaded=maybe(listed(exactly(name=TEXT, bytes=maybe(COUNT), ctx_tokens=maybe(COUNT)))),
                )
            ),
            problem=maybe(TEXT),
            note=maybe(TEXT),
        )
    )
)
INSTALLED = exactly(backend={"const": "vllm"}, package=TEXT, path=TEXT, version=maybe(TEXT), seconds=NUMBER)
LAUNCH = exactly(argv=listed(TEXT), env={"type": "object", "additionalProperties": TEXT}, fetched=FLAG)
PROFILES = exactly(
    profiles=listed(
        exactly(name=TEXT, path=TEXT, shipped=FLAG, overridden=FLAG, description=maybe(TEXT), error=maybe(TEXT))
    ),
    user_folder=TEXT,
)
STATE = {"enum": ["starting", "ready", "degraded", "restarting", "stopping", "stopped", "failed"]}
OVERVIEW = exactly(
    version=TEXT,
    gpus=COUNT,
    llama_cpp=maybe(TEXT),
    vllm=maybe(TEXT),
    ollama=maybe(TEXT),
    ollama_url=maybe(TEXT),
    driver_problem=maybe(TEXT),
    instances=listed(exactly(name=TEXT, state=maybe(STATE))),
)
SHARES = listed(exactly(uuid=maybe(TEXT), index=COUNT, planned_bytes=maybe(COUNT), actual_bytes=maybe(COUNT)))
EXIT = maybe(
    exactly(
        code=maybe(COUNT),
        signal=maybe(COUNT),
        cause=TEXT,
        at=TIME,
        last_lines=listed(TEXT),
        message=maybe(TEXT),
        hint=maybe(TEXT),
    )
)
INSTANCE = exactly(
    name=TEXT,
    state=maybe(STATE),
    backend=maybe(TEXT),
    model=maybe(TEXT),
    url=maybe(TEXT),
    pid=maybe(COUNT),
    started_at=maybe(TIME),
    ready_at=maybe(TIME),
    gpus=SHARES,
    rate=maybe(
        exactly(
            generation_tok_s=maybe(NUMBER),
            prompt_tok_s=maybe(NUMBER),
            running=maybe(COUNT),
            waiting=maybe(COUNT),
            kv_used=maybe(NUMBER),
        )
    ),
    restarts=COUNT,
    exit=EXIT,
    first_exit=EXIT,
    log_path=maybe(TEXT),
    argv=listed(TEXT),
    phase=maybe(TEXT),
    remaining_s=maybe(NUMBER),
    changes=listed(
        exactly(cause=TEXT, setting=TEXT, value=maybe(TEXT), before=maybe(TEXT), at=maybe(TIME), refused=maybe(TEXT))
    ),
    slots=maybe(COUNT),
    supervisor_pid=maybe(COUNT),
    problem=maybe(TEXT),
)
PS = exactly(
    instances=listed(INSTANCE),
    orphaned=listed(exactly(name=TEXT, pids=listed(COUNT))),
    foreign=listed(exactly(pid=maybe(COUNT), name=TEXT, url=maybe(TEXT), gpus=SHARES)),
    cards=listed(
        exactly(
            index=COUNT,
            uuid=maybe(TEXT),
            name=maybe(TEXT),
            total_bytes=maybe(COUNT),
            free_bytes=maybe(COUNT),
            used_by=listed(PROCESS),
        )
    ),
)
STOP = exactly(
    instances=listed(
        exactly(name=TEXT, result={"enum": ["stopped", "over", "stopping", "left"]}, seconds=maybe(NUMBER))
    ),
    freed=listed(exactly(index=COUNT, bytes=COUNT)),
    freed_ram_bytes=maybe(COUNT),
)
REAP = exactly(
    reaped=listed(
        exactly(
            name=TEXT,
            processes=listed(exactly(pid=COUNT, name=TEXT, gpus=SHARES)),
            folders=listed(TEXT),
            segments=listed(exactly(path=TEXT, bytes=COUNT)),
            unproven=listed(exactly(pid=COUNT, name=TEXT)),
            remaining=listed(exactly(pid=COUNT, why=TEXT)),
        )
    )
)
NOTHING: Json = {"type": "null"}
DOCTOR_ENVELOPE: Json = json.loads((Path(mgpu.__file__).parent / "doctor" / "doctor.schema.json").read_text())
DOCTOR: Json = DOCTOR_ENVELOPE["properties"]["data"]["anyOf"][0]
_CHECK: Json = {"id": TEXT, "area": TEXT, "tier": TEXT, "needs_root": FLAG, "fixable": FLAG, "title": TEXT}
DOCTOR_LIST = exactly(checks=listed(exactly(**_CHECK)))
DOCTOR_EXPLAIN = exactly(checks=listed(exactly(**_CHECK, explanation=TEXT)))

EVENTS: dict[str, Json] = {
    "planned": exactly(
        event=TEXT, at=TIME, model=TEXT, backend=BACKEND, quant=maybe(TEXT), ctx_tokens=COUNT, why=maybe(TEXT)
    ),
    "attached": exactly(event=TEXT, at=TIME, url=TEXT, version=TEXT, loaded=listed(TEXT)),
    "fetching": exactly(event=TEXT, at=TIME, name=TEXT, total_bytes=maybe(COUNT)),
    "fetched": exactly(event=TEXT, at=TIME, name=TEXT, seconds=NUMBER),
    "started": exactly(event=TEXT, at=TIME, pid=COUNT, log_path=TEXT),
    "loading": exactly(event=TEXT, at=TIME, phase=TEXT),
    "checked": exactly(
        event=TEXT,
        at=TIME,
        devices=listed(
            exactly(
                gpu=COUNT,
                uuid=maybe(TEXT),
                device=TEXT,
                planned_bytes=COUNT,
                weights_bytes=maybe(COUNT),
                kv_bytes=maybe(COUNT),
                compute_bytes=maybe(COUNT),
                actual_bytes=maybe(COUNT),
            )
        ),
        answer_seconds=NUMBER,
        generation_tok_s=maybe(NUMBER),
    ),
    "warning": exactly(event=TEXT, at=TIME, message=TEXT),
    "ready": exactly(event=TEXT, at=TIME, name=TEXT, url=TEXT, model=TEXT, pid=maybe(COUNT), seconds=NUMBER),
    "answer": exactly(event=TEXT, at=TIME, text=TEXT),
    "answered": exactly(
        event=TEXT,
        at=TIME,
        generated_tokens=maybe(COUNT),
        generation_tok_s=maybe(NUMBER),
        prompt_tokens=maybe(COUNT),
        prompt_tok_s=maybe(NUMBER),
        finish_reason=maybe(TEXT),
    ),
    "status": exactly(
        event=TEXT,
        at=TIME,
        state={"enum": ["ready", "degraded"]},
        gpus=listed(exactly(uuid=maybe(TEXT), index=COUNT, planned_bytes=COUNT, actual_bytes=maybe(COUNT))),
        up_seconds=NUMBER,
        rate=exactly(
            generation_tok_s=maybe(NUMBER),
            prompt_tok_s=maybe(NUMBER),
            running=maybe(COUNT),
            waiting=maybe(COUNT),
            kv_used=maybe(NUMBER),
        ),
    ),
    "stopping": exactly(event=TEXT, at=TIME, name=TEXT),
    "stopped": exactly(event=TEXT, at=TIME, name=TEXT, seconds=NUMBER, freed_bytes=COUNT),
}


def checked(entry: Json, command: str, data: Json) -> Json:
    """The data of an envelope that keeps the contract."""
    jsonschema.validate(entry, ENVELOPE)
    jsonschema.validate(entry["data"], data)
    assert (entry["schema"], entry["command"]) == (f"mgpu.{command}/1", command)
    assert entry["ok"] == (entry["exit_code"] == 0)
    assert not (entry["ok"] and entry["errors"])
    for key, value in leaves(entry["data"]):
        # What a profile or its schema names is not ours to spell.
        assert re.fullmatch("[a-z0-9_]+", key) or command in ("profiles.show", "profiles.schema"), key
        if re.search(r"(bytes|tokens|index|pid)$", key):
            assert value is None or type(value) is int, (key, value)  # 1.0 is an integer for JSON Schema
    found = entry["data"]
    assert found is None or isinstance(found, dict)
    return found or {}


def leaves(value: object, key: str = "data") -> Iterator[tuple[str, object]]:
    """Every value that is no object or list, with its key; variables of an environment have names of their own."""
    match value:
        case dict() if key != "env":
            for name, entry in value.items():
                yield from leaves(entry, name)
        case list():
            for entry in value:
                yield from leaves(entry, key)
        case _:
            yield key, value


def checked_stream(ended: Ended) -> list[str]:
    """The names of a stream's events, each of which keeps the contract."""
    for entry in ended.stream:
        if entry["data"] is None:
            checked(entry, "run", NOTHING)
        else:
            checked(entry, "run", EVENTS[entry["data"]["event"]])
            assert entry["exit_code"] == 0
    times = [datetime.fromisoformat(entry["data"]["at"]) for entry in ended.stream if entry["data"]]
    assert times == sorted(times)
    assert ended.stream[-1]["exit_code"] == ended.exit_code
    return ended.events
