"""What Ollama writes: the cards it found, the runner it started for each model, and what that allocated where.

Two generations of logs are understood. From 0.30 on each model has a llama-server of its own, whose lines stand in
Ollama's log as it wrote them (recorded from 0.32.15). Up to 0.24 Ollama says itself what it allocated, in sizes with
one decimal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mgpu.backends.backend import DeviceMemory
from mgpu.backends.llama_cpp_log import HOST, DeviceBuffers, buffers_by_device, parse_line
from mgpu.backends.llama_cpp_log import Phase as RunnerPhase
from mgpu.planning.candidates import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundDevice:
    """A card Ollama found when it started.

    `id` is its UUID (up to 0.24) or its place among the cards of its `library` ("CUDA", "ROCm", "Vulkan") that are
    visible; `visible_as` is what the list of visible devices calls it, None when there is no such list. `name` is
    what a runner that sees all of them calls it.
    """

    id: str
    visible_as: str | None
    library: str
    name: str
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """One start of a model's runner. `cards` pairs the cards it uses with what it holds there, `host` is what it
    holds in RAM; `layers` of `of_layers` (the head counts as one) went to cards by its own word, which is the same
    on a machine that has none."""

    model: str | None
    port: int | None
    cards: tuple[tuple[FoundDevice, DeviceBuffers], ...]
    host: DeviceBuffers
    layers: int | None
    of_layers: int | None

    @property
    def allocated(self) -> bool:
        """Whether the log says yet where the model is."""
        return bool(self.cards or self.host.total_bytes)


def found_devices(lines: Iterable[str]) -> tuple[FoundDevice, ...] | None:
    """Return the cards the last start found, () when it will use the CPU only, None when it has not said yet."""
    found: list[FoundDevice] | None = None
    for line in lines:
        if _DISCOVERY.search(line):
            found = None
        elif _COMPUTE in line:
            found = [] if found is None else found
            fields = _fields(line)
            if fields.get("library", "cpu") != "cpu":
                found.append(_device(fields))
    return None if found is None else tuple(found)


def models_folder(lines: Iterable[str]) -> Path | None:
    """Return the folder where the server keeps its models, as it said when it started; None if it did not."""
    match = next(filter(None, map(_MODELS.search, lines)), None)
    return Path(re.sub(r"\\(.)", r"\1", match["folder"])) if match else None


def runners(lines: Sequence[str]) -> tuple[Runner, ...]:
    """Return every start of a runner the log tells of, in order; a model that was loaded anew is in it again."""
    found = found_devices(lines) or ()
    starts: list[_Start] = []
    single = None
    for line in lines:
        if _SINGLE in line:
            single = _fields(line)
        elif match := _STARTING.search(line):
            starts.append(_Start(command=match["command"].replace('\\"', '"'), selected=[single] if single else []))
            single = None
        elif starts:
            starts[-1].read(line)
    return tuple(start.runner(found) for start in starts)


def planned_runner(lines: Sequence[str]) -> Runner | None:
    """Return the runner of the model that was loaded first, as it was started last; others hold other models."""
    started = runners(lines)
    return next((runner for runner in reversed(started) if runner.model == started[0].model), None)


def runner_port(lines: Sequence[str]) -> int | None:
    """Return the port on which the planned model's llama-server answers; None before it is started, and of runners
    up to 0.24, which have no counters."""
    runner = planned_runner(lines)
    return runner.port if runner else None


def planned_index(device: FoundDevice, candidate: Candidate) -> int | None:
    """Return which of `candidate.devices` a card is, None when it is none of them.

    mgpu makes exactly the planned cards visible, in their order, so that the place in that list tells; a UUID tells
    more surely.
    """
    used = [index for index, planned in enumerate(candidate.devices) if not planned.idle]
    for token in (device.visible_as, device.id):
        for index in used:
            if token and token == candidate.devices[index].uuid:
                return index
    if not device.id.isdecimal() or int(device.id) >= len(used):
        return None
    index = used[int(device.id)]
    library = candidate.devices[index].device.rstrip("0123456789")
    return index if library.lower() == device.library.lower() else None


def memory(lines: Sequence[str], candidate: Candidate) -> Mapping[int, DeviceMemory]:
    """Return what the planned model's runner holds on each planned card, by its index in `candidate.devices`.

    In tensor-parallel mode each figure is that of the fullest card, because the runner prints no other.
    """
    runner = planned_runner(lines)
    held: dict[int, DeviceMemory] = {}
    for device, buffers in runner.cards if runner else ():
        index = planned_index(device, candidate)
        if index is not None:
            held[index] = DeviceMemory(
                weights_bytes=buffers.weights_bytes,
                kv_bytes=buffers.kv_bytes,
                compute_bytes=buffers.compute_bytes,
            )
    return held


def phase(line: str) -> str | None:
    """Return what a line says of starting and loading, in a few words, or None."""
    for sign, words in _PHASES:
        if sign in line:
            return words
    event = parse_line(line)
    return event.name if isinstance(event, RunnerPhase) and event.name not in ("devices", "listening") else None


_LONGEST_LINE = 8192
_COMPUTE = 'msg="inference compute"'
_SINGLE = "single GPU for llama-server model"
# One of the settings it lists, in the order of their names.
_MODELS = re.compile(r'msg="server config" env="map\[(?:[^"\\]|\\.)*? OLLAMA_MODELS:(?P<folder>(?:[^"\\]|\\.)+?) \w+:')
_DISCOVERY = re.compile(r'msg="(?:discovering available GPUs|looking for compatible GPUs)')
# Up to 0.24 the cards were found by a runner without a model.
_STARTING = re.compile(
    r'msg="starting (?:llama-server|runner|llama server)" cmd="(?P<command>(?:[^"\\]|\\.)*--model (?:[^"\\]|\\.)*)"'
)
_FIELD = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S*)')
_OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")
_LAYERS = re.compile(r"ID:(\S+) Layers:\d+")
_HELD = re.compile(r'msg="(?P<part>model weights|kv cache|compute graph)"')
_SIZE = re.compile(r"([\d.]+) ([KMGT]?)i?B")
_PHASES = (
    ('msg="discovering available GPUs', "looking for cards"),
    ('msg="looking for compatible GPUs', "looking for cards"),
    ('msg="starting llama-server"', "starting the model's llama-server"),
    ('msg="starting runner"', "starting the model's runner"),
)


@dataclass
class _Start:
    """What stands in the log after one start of a runner, as far as it was read."""

    command: str
    selected: list[dict[str, str]]
    memory_lines: list[dict[str, str]] = field(default_factory=list)
    layer_ids: list[str] = field(default_factory=list)
    told: dict[str, DeviceBuffers] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    layers: tuple[int, int] | None = None

    def read(self, line: str) -> None:
        if 'msg="gpu memory"' in line:
            self.memory_lines.append(_fields(line))
        elif "GPULayers:" in line:
            self.layer_ids = _LAYERS.findall(line[:_LONGEST_LINE])
        elif match := _HELD.search(line):
            self._told(match["part"], _fields(line))
        elif match := _OFFLOADED.search(line):
            self.layers = int(match[1]), int(match[2])
        if not line.startswith("time="):
            self.lines.append(line)

    def runner(self, found: Sequence[FoundDevice]) -> Runner:
        selected = self._selected(found)
        by_name = buffers_by_device(self.lines)
        if not any(name != HOST and buffers.weights_bytes for name, buffers in by_name.items()) and self.told:
            by_name = self.told
        model = re.search(r"--model (\S+)", self.command)
        port = re.search(r"--port (\d+)", self.command)
        cards = [(_card(name, selected, found), held) for name, held in by_name.items() if name != HOST]
        return Runner(
            model=model[1] if model else None,
            port=int(port[1]) if port and "ollama runner" not in self.command else None,
            cards=tuple((card, held) for card, held in cards if held.weights_bytes or held.kv_bytes),
            host=by_name.get(HOST, DeviceBuffers()),
            layers=self.layers[0] if self.layers else None,
            of_layers=self.layers[1] if self.layers else None,
        )

    def _selected(self, found: Sequence[FoundDevice]) -> list[FoundDevice]:
        """The cards the runner was given, in its order. Up to 0.24 only those with layers; all are listed."""
        if self.layer_ids:
            return [device for each in self.layer_ids for device in found if device.id == each]
        return [
            device
            for each in self.memory_lines or self.selected
            for device in found
            if (device.id, device.library) == (each.get("id"), each.get("library"))
        ]

    def _told(self, part: str, fields: Mapping[str, str]) -> None:
        name = fields.get("device") or fields.get("buffer") or fields.get("backend")
        size = _size(fields.get("size", ""))
        if name is None or size is None:
            return
        name = HOST if name.startswith("CPU") else name
        held = self.told.get(name, DeviceBuffers())
        # It is printed as planned and again as allocated: what is said last counts.
        if part == "model weights":
            self.told[name] = replace(held, weights_bytes=size)
        elif part == "kv cache":
            self.told[name] = replace(held, kv_bytes=size)
        else:
            self.told[name] = replace(held, compute_bytes=size)


def _card(name: str, selected: Sequence[FoundDevice], found: Sequence[FoundDevice]) -> FoundDevice:
    """The card a runner calls `name`: one that was given a single card calls it "CUDA0", whichever it is."""
    if len(selected) == 1:
        return selected[0]
    for device in (*selected, *found):
        if device.name == name:
            return device
    library = name.rstrip("0123456789")
    return FoundDevice(id=name[len(library) :], visible_as=None, library=library, name=name, description="")


def _device(fields: Mapping[str, str]) -> FoundDevice:
    return FoundDevice(
        id=fields.get("id", ""),
        visible_as=fields.get("filter_id") or None,
        library=fields.get("library", ""),
        name=fields.get("name", ""),
        description=fields.get("description") or fields.get("name", ""),
    )


def _fields(line: str) -> dict[str, str]:
    """The `key=value` pairs of a structured line, unquoted."""
    pairs = _FIELD.findall(line[:_LONGEST_LINE])
    return {key: re.sub(r"\\(.)", r"\1", value[1:-1]) if value[:1] == '"' else value for key, value in pairs}


def _size(text: str) -> int | None:
    match = _SIZE.fullmatch(text)
    try:
        return round(float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")) if match else None
    except ValueError:
        return None
