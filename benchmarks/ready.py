"""How much later mgpu is ready than the engine alone."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import datetime

from benchmarks.timing import MGPU, spread, verdict

MODEL = "smollm2-135m"
ROUNDS = 9
BAR_S = 0.7


def main() -> None:
    """From `mgpu run` to ready against the very llama-server command it prints, in turn."""
    subprocess.run([str(MGPU), "run", MODEL, "--ask", "hi"], check=True, capture_output=True)  # fetches the model
    printed = subprocess.run([str(MGPU), "run", MODEL, "--dry-run"], check=True, capture_output=True, text=True)
    command = shlex.split(printed.stdout)
    runs: list[dict[str, float]] = []
    alone: list[float] = []
    for _ in range(ROUNDS):
        alone.append(_engine_alone(command))
        runs.append(_mgpu_run())
    devices = _timed([command[0], "--list-devices"])
    interpreter = _timed([sys.executable, "-c", "pass"])
    version = _timed([str(MGPU), "--version"])

    total = [run["ready"] for run in runs]
    later = statistics.median(total) - statistics.median(alone)
    print(f"llama-server alone   {spread(alone)}   exec to /health 200, asked every 5 ms")
    print(f"mgpu run             {spread(total)}   exec to the ready line")
    print(f"later by             {later * 1e3:7.0f} ms   bar {BAR_S} s: {verdict(later, BAR_S)}")
    print("accounted for:")
    rows = (
        ("interpreter", interpreter),
        ("command line (typer)", version - interpreter),
        ("plan: profile, file, machine, device list", _median(runs, "planned") - version),
        ("  of it llama-server --list-devices alone", devices),
        ("instance folder, port, process start", _median(runs, "started") - _median(runs, "planned")),
        (
            "engine loads, seen by polling",
            _median(runs, "checked") - _median(runs, "started") - _median(runs, "canary"),
        ),
        ("  the engine alone takes", statistics.median(alone)),
        ("canary completion", _median(runs, "canary")),
        ("ready line", _median(runs, "ready") - _median(runs, "checked")),
    )
    for name, value in rows:
        print(f"  {name:<44} {value * 1e3:7.0f} ms")


def _median(runs: list[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def _timed(command: list[str]) -> float:
    values = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        values.append(time.perf_counter() - begun)
    return statistics.median(values)


def _mgpu_run() -> dict[str, float]:
    """Seconds from exec to each event of a run that is stopped when it is ready."""
    begun = time.time()
    seconds: dict[str, float] = {}
    with _process([str(MGPU), "run", MODEL, "--json"], stdout=subprocess.PIPE) as process:
        assert process.stdout
        for line in process.stdout:
            data = json.loads(line)["data"]
            seconds.setdefault(data["event"], datetime.fromisoformat(data["at"]).timestamp() - begun)
            if data["event"] == "checked":
                seconds["canary"] = data["answer_seconds"]
            if data["event"] == "ready":
                break
    return seconds


def _engine_alone(command: list[str]) -> float:
    """Seconds from exec until /health answers 200."""
    port = command[command.index("--port") + 1]
    begun = time.perf_counter()
    with _process(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                return time.perf_counter() - begun
            time.sleep(0.005)
    raise SystemExit(f"the engine did not start: {shlex.join(command)}")


@contextlib.contextmanager
def _process(command: list[str], *, stdout: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.DEVNULL, text=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
        if process.stdout:
            process.stdout.close()
