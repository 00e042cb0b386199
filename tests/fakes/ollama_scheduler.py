"""How a fake Ollama places a model and runs it: the cards it finds, its prediction, its llama-server children.

It logs what was recorded of version 0.32.15, with its lies: a wrong card index leaves only the CPU and says nothing,
and /api/ps counts in `size_vram` what was never on a card.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tests.fakes.llama_server_load import MIB, Device, local_devices
from tests.fakes.ollama_runner import faults_asked, say
from tests.fakes.ollama_store import DETAILS, Store, full_name

_KV_BYTES_PER_TOKEN = 23040
_TRAINED_CTX = 8192
_VARIABLES = {"CUDA": "CUDA_VISIBLE_DEVICES", "ROCm": "ROCR_VISIBLE_DEVICES", "Vulkan": "GGML_VK_VISIBLE_DEVICES"}
# Names of what is no card's memory, as Ollama knows them: AMX is missing among them.
_HOST_BUFFER = re.compile(r"CPU|CPU_\w+|BLAS|\w+_Host")
_BUFFER = re.compile(r": +(\S+) (?:model|KV|compute|output) buffer size = +([\d.]+) MiB")


class LoadFailed(Exception):
    """What Ollama says of a model it could not load."""


def log(source: str, message: str, level: str = "INFO", **fields: object) -> None:
    """One structured line, as Go's slog writes it."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]
    words = [f"{name}={_quoted(value)}" for name, value in fields.items()]
    say(" ".join([f"time={now}Z", f"level={level}", f"source={source}", f"msg={_quoted(message)}", *words]))


def environment(name: str, default: str = "") -> str:
    return os.environ.get(name) or default


def flag(name: str) -> bool:
    """Any text that is no word for "no" counts as yes."""
    return environment(name).lower() not in ("", "0", "f", "false")


@dataclass(frozen=True)
class Card:
    """A device Ollama found: `index` counts within its library, `visible` is its entry in the user's list."""

    index: int
    library: str
    visible: str
    device: Device


@dataclass
class Runner:
    """A llama-server child and the model it holds."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    ctx_tokens: int
    options: dict[str, Any]
    keep_alive_s: float
    lines: list[str] = field(default_factory=list)

    def described(self) -> dict[str, Any]:
        """An entry of /api/ps."""
        buffers = [match for line in self.lines if (match := _BUFFER.search(line))]
        sizes = [(match[1], int(float(match[2]) * MIB)) for match in buffers]
        vram = sum(size for name, size in sizes if not _HOST_BUFFER.fullmatch(name))
        layers = re.search(r"offloaded (\d+)/(\d+)", "\n".join(self.lines))
        total = vram if layers and layers[1] == layers[2] else sum(size for _, size in sizes)
        return {
            "name": full_name(self.name),
            "model": full_name(self.name),
            "size": total,
            "digest": "463d3d2d4b1c631f14b018155e8052be915cbe24d6b34e4af3e7f78040f5af27",
            "details": DETAILS,
            "expires_at": (datetime.now(UTC) + timedelta(seconds=min(self.keep_alive_s, 10**9))).isoformat(),
            "size_vram": vram,
            "context_length": self.ctx_tokens,
        }


class Scheduler:
    """The cards and the running models."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.faults = faults_asked()
        self.cards: list[Card] = []
        self.runners: dict[str, Runner] = {}
        self._lock = threading.RLock()

    def discover(self) -> None:
        """Find the cards and log them."""
        log("runner.go:60", "discovering available GPUs...")
        for variable in _VARIABLES.values():
            if environment(variable):
                log("runner.go:722", "user overrode visible devices", "WARN", **{variable: environment(variable)})
        time.sleep(float(environment("FAKE_DISCOVERY_S", "0.1")))
        self.cards = [] if "silent-cpu" in self.faults else _found()
        for card in self.cards:
            log(
                "types.go:32",
                "inference compute",
                id=card.index,
                filter_id=card.visible,
                library=card.library,
                compute="8.9" if card.library == "CUDA" else "0.0",
                name=card.device.id,
                description=card.device.description,
                libdirs="ollama",
                driver="0.0",
                pci_id="",
                type="discrete",
                total=f"{card.device.total_mib / 1024:.1f} GiB",
                available=f"{card.device.free_mib / 1024:.1f} GiB",
            )
        if not self.cards:
            cpu = {
                "id": "cpu",
                "library": "cpu",
                "compute": "",
                "name": "cpu",
                "description": "cpu",
                "libdirs": "ollama",
            }
            log(
                "types.go:50",
                "inference compute",
                **cpu,
                driver="",
                pci_id="",
                type="",
                total="23.5 GiB",
                available="21.3 GiB",
            )
        total = sum(card.device.total_mib for card in self.cards)
        log("routes.go:2058", "vram-based default context", total_vram=f"{total / 1024:.1f} GiB", default_num_ctx=4096)

    def runner(self, name: str, options: dict[str, Any], keep_alive_s: float) -> Runner:
        """The runner of a model, started if need be; other options start it anew. Raises LoadFailed, NotFound."""
        with self._lock:
            path = self.store.model_file(name)
            given = {**self.store.manifest(name).get("parameters", {}), **options}
            kept = {
                key: value for key, value in given.items() if key in ("num_ctx", "num_gpu", "num_batch", "main_gpu")
            }
            known = self.runners.get(full_name(name))
            if known is not None and (known.process.poll() is not None or known.options != kept):
                if status := known.process.poll():
                    died = {"sys": -status, "string": "signal: killed"}
                    log("llama_server.go:1196", "llama-server process no longer running", "WARN", **died)
                self.unload(name)
                known = None
            if known is None:
                known = self._start(name, path, kept, keep_alive_s)
                self.runners[full_name(name)] = known
            return known

    def unload(self, name: str) -> None:
        with self._lock:
            if gone := self.runners.pop(full_name(name), None):
                gone.process.terminate()
                gone.process.wait()

    def stop(self) -> None:
        """End all children."""
        with self._lock:
            for name in list(self.runners):
                self.unload(name)

    def _start(self, name: str, path: Path, options: dict[str, Any], keep_alive_s: float) -> Runner:
        parallel = int(environment("OLLAMA_NUM_PARALLEL", "1"))
        ctx = min(int(options.get("num_ctx") or environment("OLLAMA_CONTEXT_LENGTH", "0")) or 4096, _TRAINED_CTX)
        chosen, single = self._place(path.stat().st_size + ctx * parallel * _KV_BYTES_PER_TOKEN)
        port = _free_port()
        batch = str(options.get("num_batch") or (512 if ctx * parallel <= 4096 else 1024))
        argv = ["--model", str(path), "--port", str(port), "--host", "127.0.0.1", "--no-webui", "--offline"]
        argv += ["-c", str(ctx * parallel), "-np", str(parallel), "--log-verbosity", "4", "--no-log-prefix"]
        argv += ["--no-log-timestamps"]
        if kind := environment("OLLAMA_KV_CACHE_TYPE"):
            argv += ["--cache-type-k", kind, "--cache-type-v", kind]
        attention = environment("OLLAMA_FLASH_ATTENTION")
        argv += ["--flash-attn", ("on" if flag("OLLAMA_FLASH_ATTENTION") else "off") if attention else "auto"]
        argv += ["-b", batch, "-ub", batch]
        if "num_gpu" in options and options["num_gpu"] >= 0:
            argv += ["-ngl", str(options["num_gpu"])]
        argv += [*(["--split-mode", "none", "--main-gpu", "0"] if single else []), "--context-shift", "--keep", "4"]
        log("server.go:109", "using llama-server for model", model=path)
        log(
            "llama_server.go:433", "starting llama-server", cmd=" ".join(["/srv/ollama/lib/ollama/llama-server", *argv])
        )
        child = self._child_environment(chosen, single)
        process = subprocess.Popen(
            [sys.executable, "-P", "-S", "-m", "tests.fakes.ollama_runner", *argv], stderr=subprocess.PIPE, env=child
        )
        for card in chosen:
            free = f"{card.device.free_mib / 1024:.1f} GiB"
            memory = {"available": free, "free": free, "minimum": "457.0 MiB", "overhead": "0 B"}
            log("sched.go:620", "gpu memory", id=card.index, library=card.library, **memory)
        log("llama_server.go:1048", "loading model via llama-server", model=path)
        started = Runner(name, process, port, ctx, options, keep_alive_s)
        threading.Thread(target=_pass_on, args=(process, started.lines), daemon=True).start()
        begun = time.monotonic()
        while not (_answers(port) and any("all slots are idle" in line for line in started.lines)):
            if process.poll() is not None:
                self._load_failed(path, started)
            time.sleep(0.02)
        log("llama_server.go:1362", f"llama-server started in {time.monotonic() - begun:.2f} seconds")
        return started

    def _place(self, predicted_bytes: int) -> tuple[list[Card], bool]:
        """The cards a model goes to, and whether it is confined to one of several."""
        if len(self.cards) <= 1:
            return self.cards, False
        fitting = [card for card in self.cards if predicted_bytes <= card.device.free_mib * MIB * 80 // 100]
        if "one-card" in self.faults or (fitting and not flag("OLLAMA_SCHED_SPREAD")):
            best = max(fitting or self.cards, key=lambda card: card.device.free_mib)
            log(
                "sched.go:1013",
                "selecting single GPU for llama-server model",
                main_gpu=0,
                id=best.index,
                filter_id=best.visible,
                library=best.library,
                name=best.device.id,
                description=best.device.description,
                integrated="false",
                predicted=f"{predicted_bytes / MIB:.1f} MiB",
                available=f"{best.device.free_mib / 1024:.1f} GiB",
            )
            self._log_group([best])
            return [best], True
        groups: dict[str, list[Card]] = {}
        for card in self.cards:
            groups.setdefault(card.library, []).append(card)
        group = max(groups.values(), key=lambda cards: sum(card.device.free_mib for card in cards))
        if len(groups) > 1:
            self._log_group(group)
        return group, False

    def _log_group(self, group: list[Card]) -> None:
        log(
            "sched.go:1132",
            "selecting GPU backend for llama-server model",
            library=group[0].library,
            gpu_count=len(group),
            available_gpu_count=len(self.cards),
        )

    def _child_environment(self, chosen: list[Card], single: bool) -> dict[str, str]:
        """The child sees only its cards: of Vulkan, that is so for a single one only."""
        child = dict(os.environ)
        if chosen and (single or chosen[0].library != "Vulkan"):
            visible = ",".join(card.visible for card in chosen)
            child[_VARIABLES[chosen[0].library]] = visible
            if chosen[0].library == "ROCm":
                child["HIP_VISIBLE_DEVICES"] = visible
        if not self.cards or "cpu-runner" in self.faults:
            child["FAKE_DEVICES"] = ""
        elif chosen:
            entries = child.get("FAKE_DEVICES", "").split(";")
            child["FAKE_DEVICES"] = ";".join(entry for entry in entries if entry.strip().startswith(chosen[0].library))
        return child

    def _load_failed(self, path: Path, runner: Runner) -> None:
        status = runner.process.wait()
        ended = f"exit status {status}" if status >= 0 else "signal: killed"
        log("llama_server.go:1023", "llama-server terminated", "ERROR", error=ended, exit=status)
        why = [line.split(": ", 1)[1] for line in runner.lines if "error loading model" in line]
        text = f"llama-server process has terminated: {ended}: {' '.join(why)}".rstrip(": ")
        log("sched.go:641", "Load failed", model=path, error=text)
        raise LoadFailed(text)


def _found() -> list[Card]:
    """The cards as discovery leaves them: one wrong index hides all Vulkan devices, or the CUDA ones behind it."""
    found: list[Card] = []
    for library, variable in _VARIABLES.items():
        wanted = [entry.strip() for entry in environment(variable).split(",") if entry.strip()]
        if library == "ROCm" and wanted:
            os.environ["HIP_VISIBLE_DEVICES"] = ",".join(wanted)
        here = [device for device in local_devices() if device.id.startswith(library)]
        if wanted and len(here) < len(wanted) and library == "Vulkan":
            here = []
        found += [
            Card(index, library, wanted[index] if wanted else str(index), device) for index, device in enumerate(here)
        ]
    return found


def _pass_on(process: subprocess.Popen[bytes], lines: list[str]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        text = line.decode(errors="replace").rstrip("\n")
        lines.append(text)
        say(text)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _quoted(value: object) -> str:
    text = str(value)
    return text if re.fullmatch(r"[^\s\"=]+", text) else json.dumps(text, ensure_ascii=False)
