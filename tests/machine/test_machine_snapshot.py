from __future__ import annotations

import contextlib
import dataclasses
import json
import types
import typing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.machine.snapshot import Machine, machine_from_json, to_json

SCALARS: dict[object, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**62), 2**62),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(max_size=8),
    bool: st.booleans(),
}


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a type that a snapshot is made of."""
    if typing.get_origin(kind) is types.UnionType:
        return st.one_of(*(st.none() if arg is type(None) else values_of(arg) for arg in typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return st.lists(values_of(typing.get_args(kind)[0]), max_size=2).map(tuple)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = {field.name: values_of(hints[field.name]) for field in dataclasses.fields(kind)}
        if kind is Machine:
            fields["schema_version"] = st.just(1)
        return st.builds(typing.cast(Any, kind), **fields)
    return SCALARS[kind]


@given(values_of(Machine))
def test_every_machine_survives_json(machine: Machine) -> None:
    assert machine_from_json(json.loads(json.dumps(to_json(machine)))) == machine


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(values_of(Machine), st.sampled_from([field.name for field in dataclasses.fields(Machine)]), JSON)
def test_a_damaged_machine_is_a_value_error_or_a_machine(machine: Machine, field: str, junk: object) -> None:
    data = to_json(machine)
    assert isinstance(data, dict)
    with contextlib.suppress(ValueError):
        assert isinstance(machine_from_json({**data, field: junk}), Machine)


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        ({}, r"snapshot.gpus\[0\].index: missing"),
        ({"index": True, "vendor": "", "name": ""}, r"gpus\[0\].index: expected int, found bool"),
        ({"index": 0, "vendor": "", "name": "", "pcie": {"gen": "4"}}, r"gpus\[0\].pcie.gen: expected int"),
        ({"index": 0, "vendor": "", "name": "", "used_by": {}}, r"gpus\[0\].used_by: expected a list"),
        ({"index": 0, "vendor": "", "name": "", "power_w": 10**400}, r"gpus\[0\].power_w: too large"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(gpu: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        machine_from_json({"captured_at": "", "source": "", "gpus": [gpu]})
