"""A program that poses as `ollama`: its API, log, children, signals and lies, without a model.

Run it through the program that `install` writes. What it does was recorded from Ollama 0.32.15, whose models each run
in a llama-server child (`ollama_runner`). The environment chooses the rest:

    OLLAMA_HOST, OLLAMA_MODELS, HOME and the OLLAMA_ and LLAMA_ARG_ variables that move a model, as in the real one
    FAKE_DEVICES, FAKE_UUIDS     the cards, as in `llama_server`
    FAKE_LIBRARY="name:tag=bytes ..."     what can be pulled ("smollm2:135m=98362432")
    FAKE_DISCOVERY_S (0.1), FAKE_STOP_S (0.1), FAKE_TOKENS_PER_SECOND (200), FAKE_KV_BYTES_PER_TOKEN (23040)
    FAKE_FAIL   one or more, separated by commas:
        silent-cpu cpu-runner one-card amx-lie              models are not where they were asked for
        slow-load[:SECONDS] load-oom bad-arch               loading takes long, or fails
        pull-slow[:SECONDS] pull-fails pull-breaks          so does pulling
        runner-dies                                         the child dies while it answers
        not-ollama                                          something else answers on the port
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from tests.fakes.ollama_http import VERSION, Server
from tests.fakes.ollama_runner import say
from tests.fakes.ollama_scheduler import Scheduler, environment, log
from tests.fakes.ollama_store import Store

_ROOT = Path(__file__).parent.parent.parent
_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
_SHOWN = (
    "CUDA_VISIBLE_DEVICES",
    "GGML_VK_VISIBLE_DEVICES",
    "OLLAMA_CONTEXT_LENGTH",
    "OLLAMA_HOST",
    "OLLAMA_MODELS",
    "OLLAMA_SCHED_SPREAD",
)


def install(folder: Path, name: str = "ollama") -> Path:
    """Write an executable program `name` into `folder` that is this fake, and return its path."""
    program = folder / name
    root, python = shlex.quote(str(_ROOT)), shlex.quote(sys.executable)
    program.write_text(
        f'#!/bin/sh\nPYTHONPATH={root}; export PYTHONPATH\nexec {python} -P -S -m tests.fakes.ollama_server "$@"\n'
    )
    program.chmod(0o755)
    return program


def main(arguments: list[str]) -> NoReturn:
    """Run; ends the process in every case."""
    if arguments in (["--version"], ["-v"]):
        print("Warning: could not connect to a running Ollama instance")
        print(f"Warning: client version is {VERSION}")
        _exit(0)
    if arguments != ["serve"]:
        say(f'Error: unknown command "{arguments[0] if arguments else ""}" for "ollama"')
        _exit(1)
    if not os.environ.get("HOME"):
        say("panic: $HOME is not defined\n\ngoroutine 1 [running]:\ngithub.com/ollama/ollama/envconfig.Models()")
        _exit(2)
    _serve()


def _serve() -> NoReturn:
    host, _, port = environment("OLLAMA_HOST", "127.0.0.1:11434").removeprefix("http://").partition(":")
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    store = Store()
    scheduler = Scheduler(store)
    try:
        server = Server((host, int(port or 11434)), scheduler, store)
    except OSError as error:
        say(f"Error: listen tcp {host}:{port}: bind: {(error.strerror or '').lower()}")
        _exit(1)
    settings = {"OLLAMA_MODELS": store.folder}
    shown = " ".join(f"{name}:{settings.get(name) or environment(name)}" for name in _SHOWN)
    log("routes.go:1951", "server config", env=f"map[{shown}]")
    log("routes.go:2008", f"Listening on {host}:{server.server_port} (version {VERSION})")
    scheduler.discover()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    signal.sigwait(_STOP_SIGNALS)
    scheduler.stop()
    time.sleep(float(environment("FAKE_STOP_S", "0.1")))
    _exit(0)


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
