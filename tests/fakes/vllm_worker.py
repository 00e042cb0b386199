"""A worker of an engine core: it loads its part of the model, computes one token at a time, and fails on demand.

The engine core speaks to it over a socket with single bytes: "s" asks for a step, "k" says that it is done. Who stops
answering hangs, and who closes the socket is dead.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.vllm_log_lines import Log
from tests.fakes.vllm_model import GIB, Memory, Model, damage
from tests.fakes.vllm_options import Settings

STEP, DONE, READY = b"s", b"k", b"r"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is to be loaded, and how."""

    settings: Settings
    model: Model
    memory: Memory
    faults: Mapping[str, float]
    cpu: bool
    version: str
    group: Path
    delay_s: float

    def worker_name(self, rank: int, replica: int) -> str:
        """Such as Worker_PP0_TP1; a rank counts within the replica."""
        settings, name = self.settings, "Worker"
        if settings.replicas > 1 and not self.cpu:
            name += f"_DP{replica}"
        if settings.pipeline > 1:
            name += f"_PP{rank // settings.tensor}"
        return name + (f"_TP{rank % settings.tensor}" if settings.tensor > 1 else "")

    def pause(self, share: float) -> None:
        time.sleep(self.delay_s * share)


class Worker:
    """One rank of an engine, in a process of its own or, alone on a card, in that of the engine core `core`: it then
    logs under that one's name, and `error` is what it failed of."""

    def __init__(self, load: Load, rank: int, replica: int, engine: socket.socket, *, core: str | None = None) -> None:
        self.load, self.rank, self.engine, self.core = load, rank, engine, core
        self.error: str | None = None
        self.first = rank % load.settings.tensor == 0
        self.card = replica * load.settings.workers + rank
        self.log = Log(core or "Worker")
        self.name = core or load.worker_name(rank, replica)
        self.deaf = False

    def run(self) -> None:
        self._connect()
        self._answer(READY)
        for work in (self._begin, self._load_weights, self._profile, self._capture):  # each after all did the former
            if not self._await():
                return
            work()
            self._answer(READY)
        if self.core is None:
            signal.signal(signal.SIGTERM, self._on_term)
        while self._await():
            if self.deaf:
                continue
            if "worker-dies-in-request" in self.load.faults and self._is_last():
                os.kill(os.getpid(), signal.SIGKILL)
            if "hang-request" in self.load.faults and self._is_last():
                os.kill(os.getpid(), signal.SIGSTOP)
            self._answer(DONE)
        if self.first and self.core is None:
            self.log.info("multiproc_executor.py:843", "Parent process exited, terminating worker queues")

    def _connect(self) -> None:
        load, log = self.load, self.log
        workers = load.settings.workers
        self.load.pause(0.1)
        method, backend = (f"file://{load.group}", "gloo") if load.cpu else ("tcp://127.0.0.1:43251", "nccl")
        what = f"world_size={workers} rank={self.rank} local_rank={self.rank} distributed_init_method={method}"
        log.info("parallel_state.py:1906", f"{what} backend={backend}")
        if self.rank == 0:
            if not load.cpu and workers > 1:
                log.info("pynccl.py:111", "vLLM is using nccl==2.28.9")
            ranks = "DP rank 0, PP rank 0, PCP rank 0, TP rank 0, ETP rank 0, EP rank N/A, EPLB rank N/A"
            log.info("parallel_state.py:2350", f"rank 0 in world size {workers} is assigned as {ranks}")
        if "nccl" in load.faults:
            error = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled cuda error"
            self._fail(f"torch.distributed.DistBackendError: {error} (run with NCCL_DEBUG=INFO for details)")
        held = (load.memory.free_bytes, load.memory.card_bytes, load.memory.wanted_bytes)
        free, total, take = (sizes[self.rank] for sizes in held)
        if not load.cpu and free < take:
            share = f"({load.settings.utilization:g}, {gib(take)} GiB)"
            self._fail(
                f"ValueError: Free memory on device cuda:{self.card} ({gib(free)}/{gib(total)} GiB) on startup is "
                f"less than desired GPU memory utilization {share}. Decrease GPU memory utilization or reduce GPU "
                "memory used by other processes."
            )

    def _begin(self) -> None:
        self.log.process = self.name
        runner = "cpu_model_runner.py:68" if self.load.cpu else "gpu_model_runner.py:5080"
        self.log.info(runner, f"Starting to load model {self.load.settings.model}...")

    def _load_weights(self) -> None:
        load, log = self.load, self.log
        if load.faults.keys() & {"hang-loading", "exit0"}:
            self._await()  # for what comes only when the engine core has gone
            raise SystemExit(1)
        time.sleep(load.faults.get("slow-load", 0.0))
        weights = load.memory.weights_bytes[self.rank]
        if "oom-weights" in load.faults or (not load.cpu and weights > load.memory.free_bytes[self.rank]):
            self._fail(self._out_of_memory(weights // max(1, load.model.layers)))
        begun = time.monotonic()
        count = len(load.model.files)
        for number, path in enumerate(load.model.files):
            if self.first:
                self._progress(number, count)
            broken = "Error while deserializing header: incomplete metadata, file not fully covered"
            if what := broken if "truncated" in load.faults else damage(path):
                self._fail(f"safetensors._safetensors_rust.SafetensorError: {what}")
            load.pause(0.3 / count)
        if self.first:
            self._progress(count, count)
            took = time.monotonic() - begun
            log.info("default_loader.py:501", f"Loading weights took {took:.2f} seconds")
            if not load.cpu and self.rank == 0:
                what = f"Model loading took {gib(weights)} GiB memory and {took:.6f} seconds"
                log.info("gpu_model_runner.py:5150", what)

    def _profile(self) -> None:
        load, log, memory = self.load, self.log, self.load.memory
        if not load.settings.eager and self.first:
            if load.cpu:
                log.info("cpu_model_runner.py:87", "Warming up model for the compilation...")
            else:
                log.info("backends.py:1070", "Dynamo bytecode transform time: 0.01 s")
                log.info("monitor.py:48", "torch.compile took 0.02 s in total")
        if "oom-compute" in load.faults:
            self._fail(self._out_of_memory(GIB // 2), loaded=True)
        kv, free, total = (each[self.rank] for each in (memory.kv_bytes, memory.free_bytes, memory.card_bytes))
        if "kv-huge" in load.faults or (load.cpu and kv > free):
            where = f"Available memory on node 0 ({gib(free)}/{gib(total)} GiB) on kv cache allocation"
            wanted = f"is less than requested memory for kv ({max(kv, free * 20) / GIB:.1f} GiB)."
            how = "Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by other"
            self._fail(f"ValueError: {where} {wanted} {how} processes.", loaded=True)
        if load.cpu:
            what = f"Explicitly set ({kv / GIB:.1f}/{gib(total)}) GiB for KV cache on node 0."
            log.info("cpu_worker.py:260", what)
        elif self.rank == 0:
            log.info("gpu_worker.py:760", f"Available KV cache memory: {gib(max(0, kv))} GiB")
        if "oom-kv" in load.faults:
            self._fail(self._out_of_memory(kv), loaded=True)

    def _capture(self) -> None:
        load = self.load
        load.pause(0.2)
        if not load.cpu and not load.settings.eager and self.rank == 0:
            for size in (0, 2):
                what = f"{50 * size:3d}%|{'█' * 5 * size:10}| {size}/2 [00:00<00:00, 22.15it/s]"
                self.log.plain(f"Capturing CUDA graphs (mixed prefill-decode, PIECEWISE): {what}")
            self.log.info("gpu_model_runner.py:5320", "Graph capturing finished in 1 secs, took 0.39 GiB")

    def _progress(self, done: int, count: int) -> None:
        rate = f"[00:00<00:00, {30.0 * done:.2f}it/s]" if done else "[00:00<?, ?it/s]"
        what = f"{100 * done // max(1, count):3d}% Completed | {done}/{count} {rate}"
        self.log.plain(f"\nLoading safetensors checkpoint shards: {what}\n")

    def _out_of_memory(self, size: int) -> str:
        total = self.load.memory.card_bytes[self.rank]
        amount = f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / (1 << 20):.2f} MiB"
        held = f"of which {min(size // 2, total // 20) / (1 << 20):.2f} MiB is free. Process {os.getpid()} has "
        return (
            f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {amount}. GPU {self.card} has a total "
            f"capacity of {gib(total)} GiB {held}{gib(total * 19 // 20)} GiB memory in use."
        )

    def _fail(self, error: str, *, loaded: bool = False) -> None:
        """End with this exception, as a worker does that is being made (or was `loaded` before)."""
        self.error = error
        if self.core is not None:
            raise SystemExit(1)
        if loaded:
            last = {r"^ValueError: Available memory.*": error}
            self.log.replay("fail_kvhuge", r"hit an exception", "EngineCore failed", of="Worker", instead=last)
        else:
            last = {r"^safetensors\S+: .*": error}
            self.log.replay("fail_trunc", r"WorkerProc failed to start", "SafetensorError", of="Worker", instead=last)
        raise SystemExit(1)

    def _on_term(self, *_: object) -> None:
        """From now on no step is answered, so that nothing can be drained; the end comes with the engine's."""
        self.deaf = True

    def _is_last(self) -> bool:
        return self.rank == self.load.settings.workers - 1

    def _answer(self, byte: bytes) -> None:
        try:
            self.engine.sendall(byte)
        except OSError:
            raise SystemExit(0) from None

    def _await(self) -> bool:
        return bool(self.engine.recv(1))


def gib(size: int) -> str:
    """Bytes as vLLM logs them."""
    return f"{size / GIB:.2f}"
