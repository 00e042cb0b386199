"""What is remembered of a measurement: its setting, and JSON both ways."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mgpu.machine.simulate import simulate
from mgpu.machine.snapshot import Host
from mgpu.models.shape import facts_from_shape
from mgpu.planning.candidates import layer_split
from mgpu.planning.measurements import Setting, measurement_from_json, measurement_to_json, setting_of
from mgpu.planning.wants import Wants
from tests.fakes.shapes import SHAPES
from tests.planning.measured_settings import CARD, MEASURED, SETTING

CPU = Host(cpu="A CPU", cores=8, ram_available_bytes=1 << 36)


def setting(
    wants: Wants | None = None,
    *,
    machine: str = "2x4090",
    ctx: int = 4096,
    host: Host = CPU,
    power_limit_w: float = 450.0,
    uuids: tuple[str | None, ...] = ("GPU-1", "GPU-2"),
    build: str | None = "b1",
    arguments: tuple[str, ...] = (),
) -> Setting | None:
    model = facts_from_shape("8b", SHAPES["llama-3.1-8b"], "Q4_K_M")
    gpus = tuple(
        replace(gpu, uuid=uuid, power_limit_w=power_limit_w)
        for gpu, uuid in zip(simulate(machine).gpus, uuids, strict=False)
    )
    candidate = layer_split(model, wants or Wants(), gpus, host, ctx)
    return setting_of(
        candidate, model="8b.gguf", quantisation="Q4_K_M", gpus=gpus, host=host, build=build, arguments=arguments
    )


@pytest.mark.parametrize(
    "same",
    [
        pytest.param(setting(ctx=8192), id="another context, which is not filled"),
        pytest.param(setting(Wants(tensor_split=(3, 1))), id="more layers on one of two equal cards"),
        pytest.param(setting(host=replace(CPU, cores=16)), id="a processor that computes nothing"),
    ],
)
def test_a_setting_is_the_same_with(same: Setting | None) -> None:
    assert same is not None
    assert same == setting()


def test_layers_on_unequal_cards_belong_to_it() -> None:
    one, other = (setting(Wants(tensor_split=(split, 1)), machine="4090+3090") for split in (1, 3))
    assert one is not None
    assert one != other


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(setting(build="b2"), id="build"),
        pytest.param(setting(power_limit_w=300.0), id="power limit"),
        pytest.param(setting(uuids=("GPU-1", "GPU-3")), id="another card of the same name"),
        pytest.param(setting(uuids=("GPU-2", "GPU-1")), id="the order of the cards"),
        pytest.param(setting(machine="4090"), id="fewer cards"),
        pytest.param(setting(arguments=("--no-mmap",)), id="an argument of the user's"),
        pytest.param(setting(Wants(split_mode="tensor")), id="split"),
        pytest.param(setting(Wants(parallel=2)), id="users"),
        pytest.param(setting(Wants(kv_type_k="q8_0")), id="the type of K"),
        pytest.param(setting(Wants(kv_type_v="q8_0")), id="the type of V"),
        pytest.param(setting(Wants(kv_on_host=True)), id="where the cache is"),
        pytest.param(setting(Wants(ubatch=1024)), id="micro-batch"),
        pytest.param(setting(Wants(flash_attention="off")), id="flash attention"),
    ],
)
def test_a_setting_is_another_with_another(other: Setting | None) -> None:
    assert other is not None
    assert other != setting()


def test_the_proportions_of_a_tensor_split_belong_to_it() -> None:
    assert setting(Wants(split_mode="tensor", tensor_split=(3, 1))) != setting(Wants(split_mode="tensor"))


def test_a_processor_belongs_to_it_where_it_computes() -> None:
    assert setting(host=replace(CPU, cores=16), machine="none") != setting(machine="none")
    offloaded = setting(Wants(offload=True), machine="4090", ctx=160_000)
    assert offloaded
    assert (offloaded.cpu, offloaded.cards[0].uuid) == ("A CPU, 8 cores", "GPU-1")


@pytest.mark.parametrize(
    "unknown",
    [
        pytest.param(setting(build=None), id="the build"),
        pytest.param(setting(uuids=("GPU-1", None)), id="a card"),
        pytest.param(setting(machine="none", host=replace(CPU, cpu=None)), id="the processor, where it computes"),
    ],
)
def test_there_is_none_without(unknown: Setting | None) -> None:
    assert unknown is None


def test_a_measurement_comes_back_from_json_as_it_was() -> None:
    for each in (
        MEASURED,
        replace(MEASURED, setting=replace(SETTING, build=None, cards=(replace(CARD, uuid=None, power_limit_w=None),))),
    ):
        assert measurement_from_json(json.loads(json.dumps(measurement_to_json(each)))) == each


@pytest.mark.parametrize(
    ("path", "value"),
    [
        pytest.param(("tok_s",), "fast", id="text for a number"),
        pytest.param(("tok_s",), float("nan"), id="not a number"),
        pytest.param(("tok_s",), -1.0, id="a negative speed"),
        pytest.param(("users",), True, id="yes for a number"),
        pytest.param(("measured_at",), 5, id="a number for text"),
        pytest.param(("setting",), None, id="no setting"),
        pytest.param(("setting", "flags"), "-fa on", id="text for a list"),
        pytest.param(("setting", "cards"), [{"uuid": "x"}], id="half a card"),
        pytest.param(("setting", "more"), 1, id="what is not known"),
    ],
)
def test_a_record_that_is_not_understood_is_refused(path: tuple[str, ...], value: object) -> None:
    record = json.loads(json.dumps(measurement_to_json(MEASURED)))
    place = record
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=r"."):
        measurement_from_json(record)
    with pytest.raises(ValueError, match="nothing else"):
        measurement_from_json([record])
