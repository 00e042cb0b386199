"""How llama-server loads a model, told in its own log lines: phases, buffer sizes, and how it fails."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.llama_server_options import Settings

MIB = 1 << 20
KV_TYPE_BYTES = {"f32": 4.0, "q8_0": 34 / 32, "q5_1": 0.75, "q5_0": 22 / 32, "q4_1": 0.625, "q4_0": 18 / 32}


_VISIBILITY = {
    "CUDA": "CUDA_VISIBLE_DEVICES",
    "ROCm": "HIP_VISIBLE_DEVICES",
    "Vulkan": "GGML_VK_VISIBLE_DEVICES",
}


class LoadFailed(Exception):
    """The model cannot be loaded; what was wrong is logged already."""


class Log:
    """Lines on stderr, with the time since the start, as `-lv` wants them."""

    def __init__(self) -> None:
        self.verbosity = 3
        self._started = time.monotonic()
        self._lock = threading.Lock()

    def write(self, text: str, *, level: str = "I", verbosity: int = 4) -> None:
        if self.verbosity < verbosity and level == "I":
            return
        micros = int((time.monotonic() - self._started) * 1e6)
        stamp = f"{micros // 60_000_000}.{micros // 1_000_000 % 60:02d}"
        self.raw(f"{stamp}.{micros // 1000 % 1000:03d}.{micros % 1000:03d} {level} {text}")

    def error(self, text: str) -> None:
        self.write(text, level="E")

    def raw(self, text: str) -> None:
        # As the real one, which goes on when the disk is full.
        with self._lock, contextlib.suppress(OSError):
            sys.stderr.write(text + "\n")
            sys.stderr.flush()


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device as `--list-devices` shows it."""

    id: str
    description: str
    total_mib: int
    free_mib: int

    @property
    def listed(self) -> str:
        return f"{self.description} ({self.total_mib} MiB, {self.free_mib} MiB free)"

    @property
    def buffer_name(self) -> str:
        return f"RPC0[{self.description}]" if self.id.startswith("RPC") else self.id


def local_devices() -> list[Device]:
    """The devices of FAKE_DEVICES="CUDA0: NAME (N MiB, N MiB free); ..." that the environment leaves visible.

    CUDA_VISIBLE_DEVICES and the like select by index, or by the UUIDs that FAKE_UUIDS gives the CUDA devices
    in order; what stays is numbered anew.
    """
    devices: list[Device] = []
    for kind, variable in _VISIBILITY.items():
        text = os.environ.get("FAKE_DEVICES", "")
        found = re.findall(kind + r"\d+: (.+?) \((\d+) MiB, (\d+) MiB free\)", text)
        visible = os.environ.get(variable)
        if visible is not None:
            uuids = os.environ.get("FAKE_UUIDS", "").split(",")
            wanted = [entry.strip() for entry in visible.split(",") if entry.strip()]
            indices = [_index(entry, uuids) for entry in wanted]
            found = [found[index] for index in indices if index is not None and index < len(found)]
        devices += [
            Device(id=f"{kind}{index}", description=name, total_mib=int(total), free_mib=int(free))
            for index, (name, total, free) in enumerate(found)
        ]
    return devices


def rpc_devices(servers: str, log: Log) -> list[Device]:
    """One device of 24 GiB for each server that accepts a connection; the others are dropped with a line."""
    reachable: list[Device] = []
    for server in filter(None, servers.split(",")):
        host, _, port = server.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=2).close()
        except (OSError, ValueError):
            log.error(f"Failed to connect to {server}")
            continue
        reachable.append(Device(id=f"RPC{len(reachable)}", description=server, total_mib=24105, free_mib=24105))
    return reachable


def load(settings: Settings, devices: Sequence[Device], faults: frozenset[str], log: Log) -> None:
    """Log a load of `settings.model`; raises `LoadFailed` where the real program would give up.

    Weights are the size of the file, a token of KV cache is FAKE_KV_BYTES_PER_TOKEN (163840 with f16), a
    compute buffer 256 MiB at `-ub 512`. What does not fit into a device's free memory is out of memory.
    """
    model = settings.model or ""
    log.write(f"srv    load_model: loading model '{model}'", verbosity=3)
    size = _checked_size(model, faults, log)
    log.write(f"llama_model_loader: loaded meta data with 33 key-value pairs and 272 tensors from {model}")
    by_id = {device.id: device for device in devices}
    used = list(devices) if settings.devices is None else [by_id[name] for name in settings.devices]
    loading = _Loading(settings, used, faults, log)
    loading.weights(size)
    loading.check_flash_attention()
    loading.cache()
    loading.compute()
    log.write("cmn  common_init_: warming up the model with an empty run - please wait ... (--no-warmup to disable)")
    log.write(
        f"srv    load_model: initializing, n_slots = {settings.slots}, "
        f"n_ctx_slot = {settings.ctx_tokens // settings.slots}, kv_unified = 'false'",
        verbosity=3,
    )


class _Loading:
    """The memory of the devices while one model is loaded onto them."""

    def __init__(self, settings: Settings, devices: Sequence[Device], faults: frozenset[str], log: Log) -> None:
        self.settings, self.devices, self.faults, self.log = settings, devices, faults, log
        self.model = settings.model or ""
        self.free = {device.id: device.free_mib * MIB for device in devices}
        self.shares = dict(zip(devices, _shares(settings, devices), strict=True))

    def weights(self, size: int) -> None:
        if self.settings.split_mode == "tensor":
            for index, device in enumerate(self.devices):
                member = f"- device {index}: {device.id} ({device.description})"
                self.log.write(f"llama_prepare_model_devices: {member}")
        self.log.write("load_tensors: loading model tensors, this can take a while... (load_mode = mmap)")
        if refused := self._allocate("oom-weights", "alloc_tensor_range", size):
            self.log.error(f"llama_model_load: error loading model: unable to allocate {refused} buffer")
            raise _not_loaded(self.model, self.log)
        on_host = size / 50 if self.devices else size
        self.log.write(f"load_tensors:   CPU_Mapped model buffer size = {on_host / MIB:8.2f} MiB")
        self._report("load_tensors", "model", size)

    def check_flash_attention(self) -> None:
        if self.settings.flash_attention != "off":
            return
        if self.settings.split_mode == "tensor":
            self._no_context("SPLIT_MODE_TENSOR requires flash_attn to be enabled")
        if self.settings.kv_type[1].startswith("q"):
            self._no_context("quantized V cache requires flash_attn to be enabled")

    def cache(self) -> None:
        tokens = self.settings.ctx_tokens
        self.log.write("llama_context: constructing llama_context")
        self.log.write(f"llama_context: n_ctx                 = {tokens}")
        self.log.write("llama_context:        CPU  output buffer size =     0.38 MiB")
        per_token = int(os.environ.get("FAKE_KV_BYTES_PER_TOKEN", "163840"))
        size = tokens * sum(per_token / 4 * KV_TYPE_BYTES.get(kind, 2.0) for kind in self.settings.kv_type)
        if self._allocate("oom-kv", "alloc_tensor_range", size):
            self._no_context("failed to initialize the context: failed to allocate buffer for kv cache")
        if not self.devices:
            self.log.write(f"llama_kv_cache:        CPU KV buffer size = {size / MIB:8.2f} MiB")
        self._report("llama_kv_cache", "KV", size)

    def compute(self) -> None:
        self.log.write("sched_reserve: reserving ...")
        size = 256 * MIB * self.settings.ubatch / 512
        self.shares = dict.fromkeys(self.devices, 1.0)
        if self._allocate("oom-compute", "ggml_gallocr_reserve_n_impl", size):
            self.log.error("graph_reserve: failed to allocate compute buffers")
            self._no_context("failed to initialize the context: failed to allocate compute pp buffers")
        self._report("sched_reserve", "compute", size)
        self.log.write("sched_reserve:        CPU compute buffer size =    14.51 MiB")

    def _allocate(self, fault: str, function: str, size: float) -> str | None:
        """Take each device's share of `size`; the name of the device that refuses, after its line."""
        for device, share in self.shares.items():
            last = device is self.devices[-1]
            if (fault in self.faults and last) or size * share > self.free[device.id]:
                wanted = int(size * share)
                self.log.error(f"{function}: failed to allocate {device.buffer_name} buffer of size {wanted}")
                return device.buffer_name
            self.free[device.id] -= int(size * share)
        return None

    def _report(self, function: str, kind: str, size: float) -> None:
        parts = {device.buffer_name: size * share for device, share in self.shares.items()}
        if self.settings.split_mode == "tensor":
            parts = {"Meta()": max(parts.values(), default=0.0)}
        for name, part in parts.items():
            self.log.write(f"{function}: {name} {kind} buffer size = {part / MIB:8.2f} MiB")

    def _no_context(self, why: str) -> None:
        self.log.error(f"llama_init_from_model: {why}")
        self.log.error(f"cmn  common_init_: failed to create context with model '{self.model}'")
        self.log.error(f"srv    load_model: failed to create_context with model '{self.model}'")
        raise LoadFailed


def _checked_size(model: str, faults: frozenset[str], log: Log) -> int:
    """The size of the model file with all its parts, unless it is not a model."""
    path = Path(model)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except IsADirectoryError:
        magic = b""
    except OSError as error:
        log.error(f"gguf_init_from_file: failed to open GGUF file '{model}' ({error.strerror})")
        log.error(f"llama_model_load: error loading model: llama_model_loader: failed to load model from {model}")
        raise _not_loaded(model, log) from None
    if len(magic) < 4:
        log.error("gguf_init_from_reader: failed to read magic")
        raise _not_loaded(model, log)
    if magic != b"GGUF":
        shown = magic.decode("latin-1")
        log.error(f"gguf_init_from_reader: invalid magic characters: '{shown}', expected 'GGUF'")
        raise _not_loaded(model, log)
    if "bad-arch" in faults:
        log.error("llama_model_load: error loading model: unknown model architecture: 'lxama'")
        raise _not_loaded(model, log)
    if "corrupt" in faults:
        log.error(
            "llama_model_load: error loading model: tensor 'blk.11.ffn_up.weight' data is not within the file "
            "bounds, model is corrupted or incomplete"
        )
        raise _not_loaded(model, log)
    parts = [path]
    if match := re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", path.name):
        parts = sorted(path.parent.glob(f"{match[1]}-?????-of-{match[2]}.gguf"))
    return sum(part.stat().st_size for part in parts)


def _index(entry: str, uuids: Sequence[str]) -> int | None:
    if entry.isdigit():
        return int(entry)
    return next((index for index, uuid in enumerate(uuids) if uuid and uuid.startswith(entry)), None)


def _shares(settings: Settings, devices: Sequence[Device]) -> list[float]:
    given = settings.tensor_split[: len(devices)]
    weights = [*given, *[0.0] * (len(devices) - len(given))] if given else [float(d.free_mib) for d in devices]
    if settings.split_mode == "none":
        weights = [1.0 if place == 0 else 0.0 for place in range(len(devices))]
    total = sum(weights) or 1.0
    return [weight / total for weight in weights]


def _not_loaded(model: str, log: Log) -> LoadFailed:
    log.error("llama_model_load_from_file_impl: failed to load model")
    log.error(f"cmn  common_init_: failed to load model '{model}'")
    log.error(f"srv    load_model: failed to load model, '{model}'")
    return LoadFailed()
