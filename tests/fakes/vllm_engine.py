"""An engine core and its workers: they load, compute one token of every request at a time, and fail on demand.

The server speaks to the engine core over a socket with single bytes, and so does the engine core to its workers: "s"
asks for a step, "k" says that it is done. Who stops answering hangs, and who closes the socket is dead.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.fakes.vllm_log_lines import Log
from tests.fakes.vllm_model import GIB, Memory, Model, damage
from tests.fakes.vllm_options import Settings
from tests.fakes.vllm_processes import ORPHAN_S, die_after, fork

STEP, DONE, READY = b"s", b"k", b"r"
# The real one waits 2 s for workers to end by themselves, and nearly 10 when they had work.
_NOTICE_S = 0.2
_NOTICE_BUSY_S = 0.5
_DRAINED_S = 0.1
_BIND = "VLLM_CPU_OMP_THREADS_BIND"
_NOT_INITIALIZED = (
    "Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace for "
    "root cause."
)
_EXCEPTION = "^(ValueError|RuntimeError|AssertionError|Exception): "


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
    """One rank of an engine, in a process of its own."""

    def __init__(self, load: Load, rank: int, replica: int, engine: socket.socket) -> None:
        self.load, self.rank, self.engine = load, rank, engine
        self.first = rank % load.settings.tensor == 0
        self.card = replica * load.settings.workers + rank
        self.log = Log("Worker")
        self.name = load.worker_name(rank, replica)

    def run(self) -> None:
        self._connect()
        self._load_weights()
        self._answer(READY)
        for work in (self._profile, self._capture):
            if not self._await():
                return
            work()
            self._answer(READY)
        if self._is_last():
            die_after(self.load.faults.get("worker-dies"))
        while self._await():
            if "worker-dies-in-request" in self.load.faults and self._is_last():
                os.kill(os.getpid(), signal.SIGKILL)
            if "hang-request" in self.load.faults and self._is_last():
                os.kill(os.getpid(), signal.SIGSTOP)
            self._answer(DONE)
        if self.first:
            self.log.info("multiproc_executor.py:843", "Parent process exited, terminating worker queues")

    def _connect(self) -> None:
        load, log = self.load, self.log
        workers = load.settings.workers
        self.load.pause(0.2)
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
            share = f"({load.settings.utilization:g}, {_gib(take)} GiB)"
            self._fail(
                f"ValueError: Free memory on device cuda:{self.card} ({_gib(free)}/{_gib(total)} GiB) on startup is "
                f"less than desired GPU memory utilization {share}. Decrease GPU memory utilization or reduce GPU "
                "memory used by other processes."
            )

    def _load_weights(self) -> None:
        load, log = self.load, self.log
        log.process = self.name
        runner = "cpu_model_runner.py:68" if load.cpu else "gpu_model_runner.py:5080"
        log.info(runner, f"Starting to load model {load.settings.model}...")
        while "hang-loading" in load.faults:
            time.sleep(60)
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
                what = f"Model loading took {_gib(weights)} GiB memory and {took:.6f} seconds"
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
            where = f"Available memory on node 0 ({_gib(free)}/{_gib(total)} GiB) on kv cache allocation"
            wanted = f"is less than requested memory for kv ({max(kv, free * 20) / GIB:.1f} GiB)."
            how = "Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by other"
            self._fail(f"ValueError: {where} {wanted} {how} processes.", loaded=True)
        if load.cpu:
            what = f"Explicitly set ({kv / GIB:.1f}/{_gib(total)}) GiB for KV cache on node 0."
            log.info("cpu_worker.py:260", what)
        elif self.rank == 0:
            log.info("gpu_worker.py:760", f"Available KV cache memory: {_gib(max(0, kv))} GiB")
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
            f"capacity of {_gib(total)} GiB {held}{_gib(total * 19 // 20)} GiB memory in use."
        )

    def _fail(self, error: str, *, loaded: bool = False) -> None:
        """End with this exception, as a worker does that is being made (or was `loaded` before)."""
        if loaded:
            last = {r"^ValueError: Available memory.*": error}
            self.log.replay("fail_kvhuge", r"hit an exception", "EngineCore failed", of="Worker", instead=last)
        else:
            last = {r"^safetensors\S+: .*": error}
            self.log.replay("fail_trunc", r"WorkerProc failed to start", "SafetensorError", of="Worker", instead=last)
        raise SystemExit(1)

    def _is_last(self) -> bool:
        return self.rank == self.load.settings.workers - 1

    def _answer(self, byte: bytes) -> None:
        try:
            self.engine.sendall(byte)
        except OSError:
            raise SystemExit(0) from None

    def _await(self) -> bool:
        return bool(self.engine.recv(1))


class EngineCore:
    """One replica, in a process of its own."""

    def __init__(self, load: Load, replica: int, server: socket.socket) -> None:
        self.load, self.replica, self.server = load, replica, server
        self.name = f"EngineCore_DP{replica}" if load.settings.replicas > 1 else "EngineCore"
        self.log = Log(self.name)
        self.workers: dict[socket.socket, tuple[int, int]] = {}
        self.told: signal.Signals | None = None
        self.serving = False
        self.waking, self.woken = socket.socketpair()

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self.waking.setblocking(False)
        signal.set_wakeup_fd(self.waking.fileno(), warn_on_full_buffer=False)
        self._introduce()
        if self.load.cpu and self.load.settings.workers > 1 and os.environ.get(_BIND, "auto") == "auto":
            self._fail("", "tp2_auto")
        for rank in range(self.load.settings.workers):
            ours, theirs = socket.socketpair()
            worker = Worker(self.load, rank, self.replica, theirs)
            close = (ours, *self.workers, self.server, self.waking, self.woken)
            pid = fork(f"VLLM::{worker.name}", worker.run, close=close)
            theirs.close()
            self.workers[ours] = (rank, pid)
        self._gather(_NOT_INITIALIZED, "fail_trunc")
        failed = "RuntimeError: Worker failed with error, please check the stack trace above for the root cause"
        self._ask()
        self._gather(failed, "fail_kvhuge")
        self._check_cache()
        self._ask()
        self._gather(failed, "fail_kvhuge")
        self.log.info("core.py:402", "init engine (profile, create kv cache, warmup model) took 0.05 s")
        self.serving = True
        self.server.sendall(READY)
        die_after(self.load.faults.get("engine-dies"))
        self._serve()

    def _introduce(self) -> None:
        settings, path = self.load.settings, self.load.settings.model
        self.load.pause(0.2)
        config = f"model='{path}', speculative_config=None, tokenizer='{path}', dtype=torch.bfloat16"
        shape = f"tensor_parallel_size={settings.tensor}, pipeline_parallel_size={settings.pipeline}"
        version = self.load.version
        self.log.info("core.py:133", f"Initializing a V1 LLM engine (v{version}) with config: {config}, {shape}")

    def _gather(self, error: str, recording: str) -> None:
        """Wait until every worker has done what it was told; end where one fails."""
        for each in self.workers:
            if not each.recv(1):
                self._fail(error, recording)

    def _check_cache(self) -> None:
        load, memory, wanted = self.load, self.load.memory, self.load.settings.max_model_len or 0
        if min(memory.kv_bytes) <= 0:
            how = "Try increasing `gpu_memory_utilization` when initializing the engine."
            self._fail(f"ValueError: No available memory for the cache blocks. {how}", "fail_kv")
        tokens = memory.kv_tokens
        if "kv-too-small" in load.faults:
            tokens = min(tokens, max(memory.block_tokens, wanted // 2 // memory.block_tokens * memory.block_tokens))
        if tokens < wanted:
            each = max(memory.token_bytes)
            self._fail(
                f"ValueError: To serve at least one request with the model's max seq len ({wanted}), "
                f"({_gib(wanted * each)} GiB KV cache is needed, which is larger than the available KV cache memory "
                f"({_gib(tokens * each)} GiB). Based on the available memory, the estimated maximum model length is "
                f"{tokens}. Try increasing `gpu_memory_utilization` (which also controls CPU memory on the CPU "
                "backend) or decreasing `max_model_len` when initializing the engine. See "
                "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details.",
                "fail_kv",
            )
        kind, times = "CPU" if load.cpu else "GPU", f"{tokens / max(1, wanted):.2f}x"
        what = f"Maximum concurrency for {wanted:,} tokens per request: {times}"
        self.log.info("kv_cache_utils.py:2327", f"{kind} KV cache size: {tokens:,} tokens, {what}")

    def _fail(self, error: str, recording: str) -> None:
        """End as an engine core does that could not start: its traceback twice, the second time without its name."""
        if self.told:
            raise SystemExit(0)
        decisive = r"^(?:ValueError: To serve|RuntimeError: Worker failed|Exception: WorkerProc).*"
        instead = {decisive: error, "^Process EngineCore:": f"Process {self.name}:"}
        self.log.replay(recording, "EngineCore failed to start", "^Process", of="EngineCore", instead=instead)
        self.log.replay(recording, "^Process EngineCore", _EXCEPTION, of=None, instead=instead)
        raise SystemExit(1)

    def _ask(self) -> None:
        for each in self.workers:
            each.sendall(STEP)

    def _serve(self) -> None:
        pending: set[socket.socket] = set()
        last_step = 0.0
        sources = [self.woken, self.server, *self.workers]
        while not self._leaves(busy=bool(pending) or time.monotonic() - last_step < _DRAINED_S):
            for ready in select.select(sources, [], [], _DRAINED_S if self.told else None)[0]:
                byte = ready.recv(64 if ready is self.woken else 1)
                if ready is self.woken:
                    continue
                if ready is self.server:
                    if not byte:  # the server was killed, which nobody here looks for
                        select.select([self.woken], [], [], ORPHAN_S)
                        raise SystemExit(1)
                    pending = set(self.workers)
                    self._ask()
                elif not byte:
                    self._lose(ready, busy=bool(pending))
                else:
                    pending.discard(ready)
                    if not pending:
                        last_step = time.monotonic()
                        self.server.sendall(DONE)

    def _leaves(self, *, busy: bool) -> bool:
        return self.told is not None and not (busy and self.load.settings.shutdown_timeout_s)

    def _lose(self, dead: socket.socket, *, busy: bool) -> None:
        if self.told:
            raise SystemExit(0)
        rank, pid = self.workers.pop(dead)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        what = f"Worker proc VllmWorker-{rank} died unexpectedly (exit code: {status}), shutting down executor."
        self.log.error("multiproc_executor.py:315", what)
        self.log.info(
            "multiproc_executor.py:479", f"[shutdown] Executor: waiting for worker exit count={len(self.workers)}"
        )
        time.sleep(_NOTICE_BUSY_S if busy else _NOTICE_S)
        name = "sig_kill_worker1_inflight" if busy else "sig_kill_worker1_idle"
        self.log.replay(name, "encountered a fatal error", of="EngineCore")
        raise SystemExit(1)

    def _on_signal(self, number: int, _: object) -> None:
        if not self.serving:  # dies of it; its server waits for it in vain
            raise SystemExit(1)
        self.told = signal.Signals(number)
        self.log.info("core.py:1454", f"[shutdown] EngineCore: trigger received signal={self.told.name}")
        timeout = self.load.settings.shutdown_timeout_s
        mode = f"mode={'drain' if timeout else 'abort'} timeout={timeout}s"
        self.log.info("core.py:1635", f"[shutdown] EngineCore: start {mode}")


def start_engine(load: Load, replica: int, close: tuple[socket.socket, ...]) -> tuple[int, socket.socket]:
    """Fork an engine core; return its pid and the socket on which it takes steps."""
    ours, theirs = socket.socketpair()
    core = EngineCore(load, replica, theirs)
    title = f"VLLM::{core.name}"
    pid = fork(title, partial(EngineCore.run, core), close=(*close, ours))
    for each in (theirs, core.waking, core.woken):
        each.close()
    return pid, ours


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
