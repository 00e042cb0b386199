"""What following an engine costs."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import threading
import time

import psutil

from benchmarks.timing import MGPU, verdict

SECONDS = 30.0
BAR_MIB = 60
BAR_CORE_PERCENT = 2.0


def main() -> None:
    """Memory and CPU of `mgpu run` on a terminal while it follows, over 30 s."""
    terminal, side = pty.openpty()
    process = subprocess.Popen([str(MGPU), "run", "smollm2-135m"], stdin=side, stdout=side, stderr=side)
    os.close(side)
    ready = threading.Event()
    threading.Thread(target=_read, args=(terminal, ready), daemon=True).start()
    try:
        if not ready.wait(300):
            raise SystemExit("mgpu run did not become ready")
        watched = psutil.Process(process.pid)
        time.sleep(2)
        before, begun = watched.cpu_times(), time.monotonic()
        largest = 0
        while time.monotonic() - begun < SECONDS:
            largest = max(largest, watched.memory_info().rss)
            time.sleep(0.5)
        after = watched.cpu_times()
        share = (after.user + after.system - before.user - before.system) / (time.monotonic() - begun) * 100
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
    mib = largest / 2**20
    print(f"resident memory  {mib:6.1f} MiB   bar {BAR_MIB}: {verdict(mib, BAR_MIB)}")
    print(f"CPU              {share:6.2f} % of a core   bar {BAR_CORE_PERCENT}: {verdict(share, BAR_CORE_PERCENT)}")


def _read(terminal: int, ready: threading.Event) -> None:
    seen = b""
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:
            return
        seen = (seen + data)[-65536:]
        if b"ready: " in seen:
            ready.set()
