"""A machine as a value: cards, links, driver and host, with JSON both ways.

`None` always means unknown, never zero or no. Bytes are `int`; rates name their unit.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field

SCHEMA_VERSION = 1

_Value = typing.TypeVar("_Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """A process that holds memory of a card; `bytes` is None where the driver will not say."""

    pid: int
    name: str | None = None
    bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PcieLink:
    """A card's PCIe link: `gen` and `width` now (idle cards drop to gen 1), the card's own maxima,
    and the width of the slot (of the upstream bridge), which is what the board offers."""

    gen: int | None = None
    gen_max: int | None = None
    width: int | None = None
    width_max: int | None = None
    slot_width: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NvLinkPort:
    """One NVLink port of a card; `remote_bus_id` is None behind a switch or when inactive."""

    port: int
    active: bool
    version: int | None = None
    remote_bus_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One card. `vendor` is "nvidia", "amd", "intel", or "other" for what only an engine lists
    (RPC devices, software renderers). `engine_devices` are the names engines give this card, such as
    ("CUDA0",). `integrated` says that the GPU is part of the processor and borrows the host's memory.
    `problem` is set when the card is present but cannot be used (fallen off the bus)."""

    index: int
    vendor: str
    name: str
    uuid: str | None = None
    bus_id: str | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    used_by: tuple[GpuProcess, ...] = ()
    compute_capability: str | None = None
    gfx: str | None = None
    bandwidth_gb_s: float | None = None
    pcie: PcieLink = field(default_factory=PcieLink)
    bar1_bytes: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: int | None = None
    utilisation_percent: int | None = None
    nvlink: tuple[NvLinkPort, ...] = ()
    mig: bool | None = None
    display: bool | None = None
    integrated: bool | None = None
    engine_devices: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """How two cards (by index) reach each other: `kind` is "NVLink", "PIX", "PXB", "PHB", "NODE",
    "SYS" or "unknown"; `p2p` is what the driver claims about peer access."""

    a: int
    b: int
    kind: str
    p2p: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """The GPU driver; `problem` is one sentence when it is installed but unusable."""

    version: str | None = None
    cuda: str | None = None
    module_flavour: str | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The computer around the cards. The host name is never recorded."""

    hostname_redacted: bool = True
    kernel: str | None = None
    cpu: str | None = None
    cores: int | None = None
    ram_bytes: int | None = None
    ram_available_bytes: int | None = None
    numa_nodes: int | None = None
    virtualisation: str | None = None
    container: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Everything planning and diagnosis know of a machine. `source` is "probed" or "simulated"."""

    schema_version: int = SCHEMA_VERSION
    captured_at: str
    source: str
    host: Host = field(default_factory=Host)
    driver: Driver | None = None
    gpus: tuple[Gpu, ...] = ()
    links: tuple[Link, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDevice:
    """A device as an engine lists it: `id` is what its flags take ("CUDA0", "Vulkan1", "RPC0")."""

    id: str
    description: str
    total_bytes: int
    free_bytes: int


def to_json(value: object) -> object:
    """Return `value` (any dataclass of this module) as plain dicts, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    return value


def machine_from_json(data: object) -> Machine:
    """Rebuild a Machine from `to_json`'s output.

    Unknown keys are ignored, so that an older mgpu reads a newer snapshot.
    Raises ValueError naming the path of the first value of a wrong type or missing.
    """
    machine = value_from_json(Machine, data, "snapshot")
    if machine.schema_version > SCHEMA_VERSION:
        raise ValueError(f"snapshot has schema version {machine.schema_version}, newest known is {SCHEMA_VERSION}")
    return machine


def value_from_json(kind: type[_Value], data: object, path: str) -> _Value:
    """Rebuild a value of the dataclass `kind` from `to_json`'s output, which is called `path` in errors.

    Unknown keys are ignored. Raises ValueError naming the path of the first value of a wrong type or missing.
    """
    value = build(kind, data, path)
    assert isinstance(value, kind)
    return value


def build(kind: object, data: object, path: str) -> object:
    """Return `data`, as json.loads has it, as a value of type `kind`: a frozen dataclass of scalars, unions with None,
    tuples and other such dataclasses. `path` is what an error calls it.

    Unknown keys are ignored. Raises ValueError naming the path of the first value of a wrong type or missing.
    """
    origin = typing.get_origin(kind)
    if origin is types.UnionType:
        if data is None:
            return None
        (inner,) = (arg for arg in typing.get_args(kind) if arg is not type(None))
        return build(inner, data, path)
    if origin is tuple:
        if not isinstance(data, list):
            raise ValueError(f"{path}: expected a list, found {type(data).__name__}")
        item, *others = typing.get_args(kind)
        items = [item] * len(data) if others == [...] else [item, *others]
        if len(items) != len(data):
            raise ValueError(f"{path}: expected {len(items)} values, found {len(data)}")
        return tuple(
            build(item, entry, f"{path}[{i}]") for i, (item, entry) in enumerate(zip(items, data, strict=True))
        )
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, data, path)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        try:
            return float(data)
        except OverflowError:
            raise ValueError(f"{path}: too large a number") from None
    if isinstance(data, float) and not math.isfinite(data):
        raise ValueError(f"{path}: {data} is out of range")
    assert isinstance(kind, type)
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise ValueError(f"{path}: expected {kind.__name__}, found {type(data).__name__}")
    return data


def _build_dataclass(kind: type, data: object, path: str) -> object:
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected an object, found {type(data).__name__}")
    hints = typing.get_type_hints(kind)
    values = {}
    for f in dataclasses.fields(kind):
        if f.name in data:
            values[f.name] = build(hints[f.name], data[f.name], f"{path}.{f.name}")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{path}.{f.name}: missing")
    return kind(**values)
