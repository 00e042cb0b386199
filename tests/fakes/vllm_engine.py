"""An engine core: it has its workers load, hands on the steps that its server asks for, and notices their death.

The server speaks to it as it does to its workers (`vllm_worker`).
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from contextlib import suppress
from functools import partial

from tests.fakes.vllm_log_lines import Log
from tests.fakes.vllm_processes import ORPHAN_S, fork
from tests.fakes.vllm_worker import DONE, READY, STEP, Load, Worker, gib

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


class EngineCore:
    """One replica, in a process of its own."""

    def __init__(self, load: Load, replica: int, server: socket.socket) -> None:
        self.load, self.replica, self.server = load, replica, server
        self.name = f"EngineCore_DP{replica}" if load.settings.replicas > 1 else "EngineCore"
        self.log = Log(self.name)
        self.workers: dict[socket.socket, tuple[int, int]] = {}
        self.alone: Worker | None = None
        self.told: signal.Signals | None = None
        self.stepped = self.draining = False
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
        self._start_workers()
        for _ in range(2):
            self._gather(_NOT_INITIALIZED, "fail_trunc")
            self._ask()
        if "exit0" in self.load.faults:
            self.server.sendall(READY)  # as far as it comes: the server ends while its workers load
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
        self._serve()

    def _introduce(self) -> None:
        settings, path = self.load.settings, self.load.settings.model
        self.load.pause(0.1)
        config = f"model='{path}', speculative_config=None, tokenizer='{path}', dtype=torch.bfloat16"
        shape = f"tensor_parallel_size={settings.tensor}, pipeline_parallel_size={settings.pipeline}"
        version = self.load.version
        self.log.info("core.py:133", f"Initializing a V1 LLM engine (v{version}) with config: {config}, {shape}")

    def _start_workers(self) -> None:
        for rank in range(self.load.settings.workers):
            ours, theirs = socket.socketpair()
            core = None if self.load.cpu or self.load.settings.workers > 1 else self.name
            worker = Worker(self.load, rank, self.replica, theirs, core=core)
            if core:
                self.alone = worker
                threading.Thread(target=_work, args=(worker,), daemon=True).start()
                self.workers[ours] = (rank, 0)
                return
            close = (ours, *self.workers, self.server, self.waking, self.woken)
            pid = fork(f"VLLM::{worker.name}", worker.run, close=close)
            theirs.close()
            self.workers[ours] = (rank, pid)

    def _gather(self, error: str, recording: str) -> None:
        """Wait until every worker has done what it was told; end where one fails."""
        for each in self.workers:
            if not each.recv(1):
                if self.alone:
                    self._fail(self.alone.error or error, "fail_kv")
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
                f"({gib(wanted * each)} GiB KV cache is needed, which is larger than the available KV cache memory "
                f"({gib(tokens * each)} GiB). Based on the available memory, the estimated maximum model length is "
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
        while not self._leaves(busy=time.monotonic() - last_step < _DRAINED_S, stuck=bool(pending)):
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
                        self.stepped = self.told is not None
                        self.server.sendall(DONE)
        self.log.info("core.py:1666", "[shutdown] EngineCore: request processing complete; starting resource teardown")
        self.log.info("core.py:1499", "[shutdown] EngineCore: exiting busy loop")

    def _leaves(self, *, busy: bool, stuck: bool) -> bool:
        """Whether it was told to end, and does: what is in flight may be waited for."""
        if self.told is None or stuck or (busy and not self.stepped):  # it looks after its next step
            return False
        timeout = self.load.settings.shutdown_timeout_s
        if not self.draining:
            self.draining = True
            what = f"[shutdown] EngineCore: start mode={'drain' if timeout else 'abort'} timeout={timeout}s"
            self.log.info("core.py:1635", what)
        return not (busy and timeout)

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
        if self.told is not None:
            return
        self.told = signal.Signals(number)
        self.log.info("core.py:1454", f"[shutdown] EngineCore: trigger received signal={self.told.name}")


def _work(worker: Worker) -> None:
    with worker.engine, suppress(SystemExit):
        worker.run()


def start_engine(load: Load, replica: int, close: tuple[socket.socket, ...]) -> tuple[int, socket.socket]:
    """Fork an engine core; return its pid and the socket on which it takes steps."""
    ours, theirs = socket.socketpair()
    core = EngineCore(load, replica, theirs)
    title = f"VLLM::{core.name}"
    pid = fork(title, partial(EngineCore.run, core), close=(*close, ours))
    for each in (theirs, core.waking, core.woken):
        each.close()
    return pid, ours
