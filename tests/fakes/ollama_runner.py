"""The llama-server that a fake Ollama starts for a model: a load as it was recorded, endpoints without a model.

It loads SmolLM2-135M's shape (30 layers and the head) stretched to the size of the file it is given, deals the layers
over FAKE_DEVICES as llama.cpp does, fits them to the memory that is free as `--fit` does, and prints buffers,
devices and layers in llama.cpp's words. Settings come from the command line and from LLAMA_ARG_ variables.
FAKE_FAIL: `slow-load[:SECONDS]`, `runner-dies` (after its first answer begins), `amx-lie`, `bad-arch`, `load-oom`.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tests.fakes.llama_server_engine import Engine
from tests.fakes.llama_server_http import Server
from tests.fakes.llama_server_load import KV_TYPE_BYTES, MIB, Device, local_devices
from tests.fakes.llama_server_options import Settings, parse

LAYERS = 30
# SmolLM2-135M in Q4_1: a file of 98362432 bytes holds 63.41 MiB of layers and 28.69 MiB of head.
_FILE_MIB = 98362432 / MIB
_LAYER_MIB, _HEAD_MIB = 63.41 / LAYERS, 28.69
_AMX_MIB = 95.34  # the weights as the CPU's matrix unit wants them
_KV_BYTES_PER_TOKEN = 23040
_COMPUTE_MIB = {512: (15.26, 31.79, 17.70, 15.26), 1024: (30.52, 96.14, 85.35, 38.75)}  # by micro-batch
_FROM_ENVIRONMENT = {
    "LLAMA_ARG_TENSOR_SPLIT": "-ts",
    "LLAMA_ARG_SPLIT_MODE": "-sm",
    "LLAMA_ARG_N_GPU_LAYERS": "-ngl",
}
_DEFAULT_MARGIN_MIB = 1024


def main(arguments: list[str]) -> NoReturn:
    """Load, then serve until told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    given = [
        part for name, flag in _FROM_ENVIRONMENT.items() if (value := os.environ.get(name)) for part in (flag, value)
    ]
    if os.environ.get("LLAMA_ARG_ENDPOINT_METRICS"):
        given.append("--metrics")
    settings, _ = parse([*given, *arguments], lambda _: ())
    on_cards = _layers_asked([*given, *arguments])
    faults = faults_asked()
    devices = local_devices()
    _introduce(devices)
    engine = Engine(settings, frozenset(faults), float(os.environ.get("FAKE_TOKENS_PER_SECOND", "200")))

    def on_request() -> None:
        if "runner-dies" in faults:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    server = Server(engine, on_request)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    threading.Thread(target=_leave_when_told, daemon=True).start()
    say(f"srv    load_model: loading model '{settings.model}'")
    if settings.split_mode == "row":
        _give_up("device Vulkan0 does not support split buffers")
    if "bad-arch" in faults:
        _give_up("unknown model architecture: 'lxama'")
    time.sleep(faults.get("slow-load", 0.0))
    _load(settings, devices, on_cards, faults)
    engine.ready = True
    say("srv  llama_server: model loaded")
    say(f"srv  llama_server: listening on http://{settings.host}:{settings.port}")
    say("srv  update_slots: all slots are idle")
    while True:
        signal.pause()


def faults_asked() -> dict[str, float]:
    """The words of FAKE_FAIL with their seconds."""
    pairs = (word.partition(":") for word in os.environ.get("FAKE_FAIL", "").split(",") if word)
    return {name: float(seconds or 0.2) for name, _, seconds in pairs}


def say(text: str) -> None:
    """Write a line to stderr in one piece, so that parent and child do not mix theirs."""
    os.write(2, f"{text}\n".encode())


@dataclass(frozen=True, slots=True)
class _Shape:
    """What one unit costs in MiB; the last unit is the head. `compute` are the buffers of a single card, of each of
    several that hold everything, and of the first and of another one where layers are in RAM."""

    layer: float
    head: float
    kv_layer: float
    compute: tuple[float, float, float, float]

    def device(self, index: int, first: int, count: int, *, cards: int, whole: bool) -> tuple[float, float, float]:
        """Weights, KV cache and compute buffer of a device with `count` units from `first` on; `whole` when the
        cards hold everything."""
        head = count > 0 and first + count == LAYERS + 1
        layers = count - head
        single, each, first_card, other = self.compute
        compute = (single if cards == 1 else each) if whole else first_card if index == 0 else other
        return layers * self.layer + head * self.head, layers * self.kv_layer, compute if count else 0.0


def _load(settings: Settings, devices: list[Device], on_cards: int, faults: dict[str, float]) -> None:
    shape = _shape(settings)
    used = devices[:1] if settings.split_mode == "none" else devices
    counts = _counts(settings, used, on_cards, shape)
    if settings.split_mode == "tensor":
        say(f"llama_prepare_model_devices: creating a Meta device for tensor parallelism from {len(used)} devices:")
        for index, device in enumerate(used):
            say(f"llama_prepare_model_devices: - device {index}: {device.id} ({device.description})")
        free = sum(device.free_mib for device in used)
        say(f"llama_prepare_model_devices: using device Meta() (Meta()) (unknown id) - {free} MiB free")
    else:
        for device in used:
            who = f"{device.id} ({device.description}) (unknown id)"
            say(f"llama_prepare_model_devices: using device {who} - {device.free_mib} MiB free")
    first = LAYERS + 1 - sum(counts)
    parts = []
    for index, count in enumerate(counts):
        parts.append(shape.device(index, first, count, cards=len(used), whole=sum(counts) == LAYERS + 1))
        first += count
    say("load_tensors: loading model tensors, this can take a while... (load_mode = mmap)")
    if used and ("load-oom" in faults or any(sum(p) > d.free_mib for p, d in zip(parts, used, strict=True))):
        say(f"alloc_tensor_range: failed to allocate {used[-1].id} buffer of size {int(parts[-1][0] * MIB)}")
        _give_up(f"unable to allocate {used[-1].id} buffer")
    # The count says "to GPU" on a machine without one, too.
    say(f"load_tensors: offloaded {sum(counts) if used else LAYERS + 1}/{LAYERS + 1} layers to GPU")
    host_layers = LAYERS + 1 - sum(counts) if used else 0
    if used:
        _buffer("load_tensors", "CPU_Mapped", "model", shape.head + min(host_layers, LAYERS) * shape.layer)
    elif "amx-lie" in faults:
        _buffer("load_tensors", "AMX", "model", _AMX_MIB / _HEAD_MIB * shape.head)
        _buffer("load_tensors", "CPU", "model", shape.head)
    else:
        _buffer("load_tensors", "CPU", "model", LAYERS * shape.layer + shape.head)
    say("llama_context: constructing llama_context")
    pinned = f"{used[0].id.rstrip('0123456789')}_Host" if used else "CPU"
    say(f"llama_context: {pinned:>10}  output buffer size =     0.19 MiB")
    names = [device.id for device in used]
    if settings.split_mode == "tensor":
        # The head is on each member, and so is the widest part of the rest.
        names = ["Meta()"]
        parts = [(LAYERS * shape.layer / len(used) + shape.head, LAYERS * shape.kv_layer / len(used), 16.38)]
    for place, function, kind in (
        (0, "load_tensors", "model"),
        (1, "llama_kv_cache", "KV"),
        (2, "sched_reserve", "compute"),
    ):
        if kind == "KV" and (host_layers or not used):
            _buffer(function, "CPU", kind, (host_layers if used else LAYERS) * shape.kv_layer)
        for name, part in zip(names, parts, strict=True):
            if part[place]:
                _buffer(function, name, kind, part[place])
    if not used:
        _buffer("sched_reserve", "CPU", "compute", 17.51)
    per_slot = settings.ctx_tokens // settings.slots
    say(f"srv    load_model: initializing, n_slots = {settings.slots}, n_ctx_slot = {per_slot}, kv_unified = 'false'")


def _shape(settings: Settings) -> _Shape:
    scale = Path(settings.model or "").stat().st_size / MIB / _FILE_MIB
    per_token = int(os.environ.get("FAKE_KV_BYTES_PER_TOKEN", str(_KV_BYTES_PER_TOKEN)))
    elements = sum(KV_TYPE_BYTES.get(kind, 2.0) for kind in settings.kv_type)
    kv = settings.ctx_tokens * per_token / LAYERS / 4 * elements / MIB
    seen = _COMPUTE_MIB[min(_COMPUTE_MIB, key=lambda ubatch: abs(ubatch - settings.ubatch))]
    # Another model is one of the tests', with a vocabulary of hundreds instead of 49152, which decides these buffers.
    small = 1.0 if math.isclose(scale, 1.0, rel_tol=0.01) else 0.25
    single, each, first_card, other = (mib * small for mib in seen)
    compute = (single, each, first_card, other)
    return _Shape(layer=_LAYER_MIB * scale, head=_HEAD_MIB * scale, kv_layer=kv, compute=compute)


def _counts(settings: Settings, used: list[Device], on_cards: int, shape: _Shape) -> list[int]:
    """The units of each device: in proportion first, then filled from the back where that leaves too little free."""
    if not used:
        return []
    given = settings.tensor_split[: len(used)]
    counts = _dealt(on_cards, list(given) if given else [float(device.free_mib) for device in used])
    if given or on_cards <= LAYERS or settings.split_mode != "layer":
        return counts  # what the user has set is not adjusted
    targets = _margins(len(used))

    def room(device: int, first: int, count: int, *, whole: bool) -> bool:
        needed = sum(shape.device(device, first, count, cards=len(used), whole=whole))
        return needed <= used[device].free_mib - targets[device]

    starts = [sum(counts[:index]) for index in range(len(used))]
    if all(room(index, starts[index], counts[index], whole=True) for index in range(len(used))):
        return counts
    left, filled = LAYERS + 1, [0] * len(used)
    for index in reversed(range(len(used))):
        while left and room(index, left - 1, filled[index] + 1, whole=left == 1):
            left, filled[index] = left - 1, filled[index] + 1
    return filled


def _dealt(units: int, weights: list[float]) -> list[int]:
    total, counts = sum(weights) or 1.0, [0] * len(weights)
    for unit in range(units):
        share = 0.0
        for index, weight in enumerate(weights):
            share += weight / total
            if unit / units < share or index == len(weights) - 1:
                counts[index] += 1
                break
    return counts


def _margins(devices: int) -> list[float]:
    text = os.environ.get("LLAMA_ARG_FIT_TARGET") or str(_DEFAULT_MARGIN_MIB)
    margins = [float(part) for part in text.split(",")]
    return margins if len(margins) == devices else margins[:1] * devices


def _layers_asked(arguments: list[str]) -> int:
    asked = [int(value) for flag, value in itertools.pairwise(arguments) if flag == "-ngl"]
    return min(asked[-1], LAYERS + 1) if asked else LAYERS + 1


def _introduce(devices: list[Device]) -> None:
    say("cmn  common_param: device_info:")
    for device in devices:
        say(f"cmn  common_param:   - {device.id:8}: {device.listed}")
    say("cmn  common_param:   - CPU     : Fake CPU (24105 MiB, 24105 MiB free)")


def _buffer(function: str, name: str, kind: str, mib: float) -> None:
    say(f"{function}: {name:>12} {kind} buffer size = {mib:8.2f} MiB")


def _give_up(why: str) -> NoReturn:
    say(f"llama_model_load: error loading model: {why}")
    say("llama_model_load_from_file_impl: failed to load model")
    say("srv    operator(): operator(): cleaning up before exit...")
    say("srv  llama_server: exiting due to model loading error")
    os._exit(1)


def _leave_when_told() -> NoReturn:
    signal.sigwait({signal.SIGTERM})
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
