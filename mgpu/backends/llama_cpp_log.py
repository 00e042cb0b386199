"""What llama-server writes with `-lv 4`, line by line, as events; other lines mean nothing.

The lines were recorded from build 10434 (CPU, Vulkan, RPC). Function names in front of the facts change
between versions, so only the facts are matched. Default verbosity prints none of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Part = Literal["weights", "kv", "compute"]

PHASES = (
    "devices",
    "reading header",
    "loading weights",
    "allocating KV cache",
    "reserving compute buffers",
    "warming up",
    "listening",
)
"""The names `Phase` takes, in the order in which a load goes through them."""

HOST = "host"


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferAllocated:
    """A buffer of `bytes` (printed with 0.01 MiB precision) now lies in `device`, named as in the line:
    "CUDA0", "RPC0[127.0.0.1:50052]", "CPU_Mapped", "Meta()"."""

    device: str
    kind: Part
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceListed:
    """A device the engine can use; an RPC device is described by its endpoint. The CPU is listed too."""

    id: str
    description: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """The load has reached the phase `name`, one of `PHASES`."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextInfo:
    """How many requests run side by side, and how many tokens each may hold."""

    slots: int
    ctx_per_slot_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorParallelMember:
    """Device `id` takes part in `-sm tensor`; `Meta()` buffers then lie in every member."""

    id: str


Event = BufferAllocated | DeviceListed | Phase | ContextInfo | TensorParallelMember


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBuffers:
    """Bytes an engine allocated in one device. With `at_most` each figure is that of the fullest device
    of a tensor-parallel group, because the engine prints no other."""

    weights_bytes: int = 0
    kv_bytes: int = 0
    compute_bytes: int = 0
    at_most: bool = False

    @property
    def total_bytes(self) -> int:
        """Weights, KV cache and compute buffers together."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes


def parse_line(line: str) -> Event | None:
    """The event a log line stands for, or None. Never raises, whatever the line holds."""
    line = line[:_LONGEST_LINE].rstrip()
    if "buffer size" in line:
        return _buffer(line)
    if "MiB free)" in line:
        return _device(line)
    if match := _SLOTS.search(line):
        return ContextInfo(slots=int(match["slots"]), ctx_per_slot_tokens=int(match["tokens"]))
    if match := _MEMBER.search(line):
        return TensorParallelMember(id=match["id"])
    for sign, name in _PHASE_SIGNS:
        if sign in line:
            return Phase(name=name)
    return None


def buffers_by_device(lines: Iterable[str]) -> dict[str, DeviceBuffers]:
    """What one start of the engine allocated, by the engine's device id ("CUDA0", "RPC1") and `HOST`.

    When the lines hold several starts, the last one counts.
    """
    devices: list[DeviceListed] = []
    members: list[str] = []
    buffers: list[BufferAllocated] = []
    for event in map(parse_line, lines):
        match event:
            case Phase(name="devices"):
                devices, members, buffers = [], [], []
            case Phase(name="reading header"):  # also when a sleeping server loads its model again
                buffers = []
            case DeviceListed():
                devices.append(event)
            case TensorParallelMember():
                members.append(event.id)
            case BufferAllocated():
                buffers.append(event)
    names = rpc_names(devices)
    found: dict[str, dict[Part, int]] = {}
    shared: set[str] = set()
    for buffer in buffers:
        targets = [device_of(buffer.device, names)]
        if buffer.device.startswith("Meta(") and members:
            targets = members
            shared.update(members)
        for target in targets:
            parts = found.setdefault(target, {"weights": 0, "kv": 0, "compute": 0})
            parts[buffer.kind] += buffer.bytes
    return {
        device: DeviceBuffers(
            weights_bytes=parts["weights"],
            kv_bytes=parts["kv"],
            compute_bytes=parts["compute"],
            at_most=device in shared,
        )
        for device, parts in found.items()
    }


def rpc_names(devices: Iterable[DeviceListed]) -> dict[str, str]:
    """For each RPC device, the name its buffers carry in the log, mapped to its id.

    The log counts devices inside each RPC server: with two servers of one device each, both buffers are
    `RPC0[host:port]`, while the device list has RPC0 and RPC1, described by their endpoints.
    """
    names: dict[str, str] = {}
    seen: dict[str, int] = {}
    for device in devices:
        if device.id.startswith("RPC"):
            index = seen.get(device.description, 0)
            seen[device.description] = index + 1
            names[f"RPC{index}[{device.description}]"] = device.id
    return names


def device_of(buffer_name: str, devices: Mapping[str, str]) -> str:
    """The engine's id of the device that holds a buffer: "CUDA0" of "CUDA0_Split", `HOST` for every kind
    of host memory. `devices` names RPC devices, either as `rpc_names` gives them or by endpoint alone; an
    RPC buffer that is in neither keeps its own name."""
    if match := _RPC_BUFFER.fullmatch(buffer_name):
        return devices.get(buffer_name) or devices.get(match["endpoint"]) or buffer_name
    if buffer_name.startswith(("CPU", "AMX")) or buffer_name.endswith("_Host"):
        return HOST
    match = _ENGINE_DEVICE.match(buffer_name)
    return match[0] if match else buffer_name


_LONGEST_LINE = 4096

_BUFFER = re.compile(
    r"(?<!\S)(?P<device>\S+) +(?P<kind>model|KV|RS|compute|output) buffer size *= *(?P<mib>\d+(?:\.\d+)?) MiB"
)
_KINDS: dict[str, Part] = {"model": "weights", "KV": "kv", "RS": "kv", "compute": "compute", "output": "compute"}
_DEVICE = re.compile(r"(?:^ +|- )(?P<id>[A-Za-z]\w*) *: (?P<description>.*)")
_DEVICE_MEMORY = re.compile(r" \((?P<total>\d+) MiB, (?P<free>\d+) MiB free\)$")
_SLOTS = re.compile(r"\bn_slots = (?P<slots>\d+), n_ctx_slot = (?P<tokens>\d+)")
_MEMBER = re.compile(r"\bllama_prepare_model_devices: - device \d+: (?P<id>\w+) \(")
_RPC_BUFFER = re.compile(r"RPC\d+\[(?P<endpoint>[^\]]+)\]")
_ENGINE_DEVICE = re.compile(r"[A-Za-z]+\d+")

_PHASE_SIGNS = (
    ("device_info:", "devices"),
    ("load_model: loading model", "reading header"),
    ("load_tensors: loading model tensors", "loading weights"),
    ("constructing llama_context", "allocating KV cache"),
    ("sched_reserve: reserving", "reserving compute buffers"),
    ("warming up the model", "warming up"),
    ("listening on http", "listening"),
)

_MIB = 1 << 20


def _buffer(line: str) -> BufferAllocated | None:
    match = _BUFFER.search(line)
    if match is None:
        return None
    size = round(float(match["mib"]) * _MIB)
    return BufferAllocated(device=match["device"], kind=_KINDS[match["kind"]], bytes=size)


def _device(line: str) -> DeviceListed | None:
    memory = _DEVICE_MEMORY.search(line)
    match = memory and _DEVICE.search(line[: memory.start()])
    if not memory or not match:
        return None
    return DeviceListed(
        id=match["id"],
        description=match["description"],
        total_bytes=int(memory["total"]) * _MIB,
        free_bytes=int(memory["free"]) * _MIB,
    )
