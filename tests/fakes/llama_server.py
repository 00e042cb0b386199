"""A program that poses as llama-server: its options, log, endpoints, signals and ends, without a model.

Run it as `python -m tests.fakes.llama_server ARGUMENTS`, or through the program that `install` writes.
What it does was recorded from a real llama-server (build 10434). The environment chooses the rest:

    FAKE_DEVICES="CUDA0: NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free); ..."
    FAKE_UUIDS="GPU-1f...,GPU-2e..."     of the CUDA devices, for a CUDA_VISIBLE_DEVICES that names them
    FAKE_KV_BYTES_PER_TOKEN, FAKE_TOKENS_PER_SECOND (200)
    FAKE_FAIL   one or more, separated by commas:
        oom-weights oom-kv oom-compute port bad-arch corrupt exit0 segv abort empty-log    ends while it starts
        hang-loading slow-load[:SECONDS]                                                   starts late or never
        die-in-request hang-request garbage repeat-token                                   fails while it serves
        ignore-term spawn-child                                                            is hard to stop
        talkative                                                                          answers until told to stop
    FAKE_FAIL_STARTS=N:FILE   fails only the first N times it is started with a model, counted in FILE

A device that is too small for the model's file, its context and its compute buffer is out of memory without
being told so. Once it serves, SIGUSR1 takes its last device away, of which it dies.
"""

from __future__ import annotations

import os
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from tests.fakes.llama_server_engine import Engine
from tests.fakes.llama_server_http import Server
from tests.fakes.llama_server_load import Device, LoadFailed, Log, load, local_devices, rpc_devices
from tests.fakes.llama_server_options import HELP, Refused, Settings, parse

VERSION = "version: 0.1.0-dev (build 1, commit 7e4c0a9)\nbuilt with GNU 11.4.0 for Linux x86_64\n"
_ROOT = Path(__file__).parent.parent.parent
_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
LOSE_DEVICE = signal.SIGUSR1
# Ends by itself, should a test that starts it be killed before it can clean up.
_STUBBORN_CHILD = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(120)
"""


def install(folder: Path, name: str = "llama-server") -> Path:
    """Write an executable program `name` into `folder` that is this fake, and return its path."""
    program = folder / name
    root, python = shlex.quote(str(_ROOT)), shlex.quote(sys.executable)
    program.write_text(f'#!/bin/sh\nPYTHONPATH={root} exec {python} -P -S -m tests.fakes.llama_server "$@"\n')
    program.chmod(0o755)
    return program


def main(arguments: list[str]) -> NoReturn:
    """Run; ends the process in every case."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Programs that only ask for the devices or the version are answered, as they would be.
    faults = _faults() if "-m" in arguments else {}
    log = Log()
    if "empty-log" in faults:
        _exit(1)
    if "ignore-term" in faults:
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    devices: dict[str, list[Device]] = {"local": local_devices(), "rpc": []}

    def device_ids(servers: str) -> list[str]:
        devices["rpc"] = rpc_devices(servers, log)
        return [device.id for device in (*devices["local"], *devices["rpc"])]

    try:
        settings, asked = parse(arguments, device_ids)
    except Refused as refusal:
        sys.stderr.write(str(refusal))
        _exit(1)
    if asked:
        _tell(asked, [*devices["local"], *devices["rpc"]])
    log.verbosity = settings.verbosity
    _serve(settings, (*devices["local"], *devices["rpc"]), faults, log)


def _serve(settings: Settings, devices: tuple[Device, ...], faults: dict[str, float], log: Log) -> NoReturn:
    _introduce(settings, devices, log)
    named = frozenset(faults)

    def on_request() -> None:
        if "die-in-request" in faults:
            _lose_device(devices, log)

    engine = Engine(settings, named, float(os.environ.get("FAKE_TOKENS_PER_SECOND", "200")))
    log.write("srv         start: binding port with default address family", verbosity=4)
    try:
        if "port" in faults:
            raise OSError
        server = Server(engine, on_request)
    except (OSError, OverflowError):
        where = f"hostname: {settings.host}, port: {settings.port}"
        log.error(f"srv         start: couldn't bind HTTP server socket, {where}")
        log.write("srv    operator(): operator(): cleaning up before exit...", verbosity=3)
        log.error("srv  llama_server: exiting due to HTTP server error")
        _exit(1)
    # Threads never take the signals that end the program: only the main thread waits for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {*_STOP_SIGNALS, LOSE_DEVICE})
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)

    if "spawn-child" in faults:
        _spawn_stubborn_child(log)
    _stumble(faults)
    try:
        load(settings, devices, named, log)
    except LoadFailed:
        log.write("srv    operator(): operator(): cleaning up before exit...", verbosity=3)
        log.error("srv  llama_server: exiting due to model loading error")
        _exit(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    engine.ready = True
    log.write("srv  llama_server: model loaded", verbosity=3)
    log.write(f"srv  llama_server: listening on http://{settings.host}:{server.server_port}", verbosity=3)
    log.write("srv  update_slots: all slots are idle")
    _stop_when_told(engine, server, log, lambda: _lose_device(devices, log))


def _stop_when_told(engine: Engine, server: Server, log: Log, lose_device: Callable[[], None]) -> NoReturn:
    while "ignore-term" in engine.faults:
        time.sleep(60)
    if signal.sigwait({*_STOP_SIGNALS, LOSE_DEVICE}) == LOSE_DEVICE:
        lose_device()
    if "hang-request" not in engine.faults or not engine.in_flight:  # else nothing happens at all
        log.write("srv    operator(): operator(): cleaning up before exit...", verbosity=3)
        server.socket.close()
        engine.stopping.set()

    def leave() -> None:
        engine.wait_until_idle()
        log.write("common_memory_breakdown_print: | memory breakdown [MiB] | total   free    self |")
        _exit(0)

    threading.Thread(target=leave, daemon=True).start()
    signal.sigwait(_STOP_SIGNALS)
    log.raw("Received second interrupt, terminating immediately.")
    _exit(1)


def _faults() -> dict[str, float]:
    """The faults of FAKE_FAIL with their seconds, unless this start is one that shall succeed."""
    words = [word for word in os.environ.get("FAKE_FAIL", "").split(",") if word]
    if limit := os.environ.get("FAKE_FAIL_STARTS"):
        number, _, name = limit.partition(":")
        with Path(name).open("a", encoding="utf-8") as file:
            file.write(".")
        if Path(name).stat().st_size > int(number):
            return {}
    pairs = (word.partition(":") for word in words)
    return {name: float(seconds or 0.2) for name, _, seconds in pairs}


def _introduce(settings: Settings, devices: tuple[Device, ...], log: Log) -> None:
    log.write("cmn  common_param: common_params_print_info: build 1 (7e4c0a9) with GNU 11.4.0 for Linux x86_64")
    log.write(
        f"cmn  common_param: common_params_print_info: verbosity = {settings.verbosity} "
        "(adjust with the `-lv N` CLI arg)",
        verbosity=3,
    )
    log.write("cmn  common_param: device_info:")
    log.write("cmn  common_param:   - CPU     : Fake CPU (24105 MiB, 24105 MiB free)")
    for device in devices:
        log.write(f"cmn  common_param:   - {device.id:8}: {device.listed}")
    if settings.api_keys:
        log.write(f"srv          init: api_keys: ****{settings.api_keys[0][-4:]}")


def _tell(asked: str, devices: list[Device]) -> NoReturn:
    if asked == "version":
        sys.stderr.write(VERSION)
    elif asked == "help":
        sys.stdout.write(HELP.read_text(encoding="utf-8"))
    else:
        listed = [f"  {device.id}: {device.listed}" for device in devices] or ["  (none)"]
        sys.stdout.write("\n".join(["Available devices:", *listed, ""]))
    _exit(0)


def _stumble(faults: dict[str, float]) -> None:
    if "exit0" in faults:
        _exit(0)
    if "segv" in faults:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "abort" in faults:
        os.abort()
    while "hang-loading" in faults:
        time.sleep(60)
    time.sleep(faults.get("slow-load", 0.0))


def _lose_device(devices: Sequence[Device], log: Log) -> None:
    if any(device.id.startswith("CUDA") for device in devices):
        log.raw("/src/ggml/src/ggml-cuda/ggml-cuda.cu:88: CUDA error")
        log.raw("CUDA error: unspecified launch failure")
        where = "ggml_backend_cuda_synchronize at /src/ggml/src/ggml-cuda/ggml-cuda.cu:2780"
        log.raw(f"  current device: {len(devices) - 1}, in function {where}")
    else:
        crashed = "Remote RPC server crashed or returned malformed response"
        log.raw(f"/src/ggml/src/ggml-rpc/ggml-rpc.cpp:519: {crashed}")
        log.error("recv failed (bytes_recv=0, size_to_recv=8)")
    log.raw("[New LWP 1781]\n[Thread debugging using libthread_db enabled]\n#0  __futex_abstimed_wait_common64 ()")
    os.abort()


def _spawn_stubborn_child(log: Log) -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", _STUBBORN_CHILD], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    log.raw(f"fake: child process {child.pid} ignores SIGTERM")


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
