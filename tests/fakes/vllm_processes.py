"""The processes of a vLLM beside its server: a resource tracker, an engine core for each replica, a worker a rank.

They are forked one from the other and stay in the server's process group. None of them ends because the server was
killed; a worker ends with its engine core. So that a failed test leaves nothing for good, all end after two minutes
without a server.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tests.fakes.vllm_log_lines import leaked

SHARED_MEMORY = Path("/dev/shm")
ORPHAN_S = 120
_SWEEP_AFTER_S = 60
_PR_SET_NAME = 15


def fork(title: str, body: Callable[[], None], *, close: Sequence[socket.socket] = ()) -> int:
    """Run `body` in a child that calls itself `title`, without the sockets in `close`; return its pid.

    Like the real ones it has the title instead of its arguments and its environment.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        for each in close:
            each.close()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _call_oneself(title)
        body()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


class Leftovers:
    """The sockets and the shared memory of a vLLM. Its sockets and the memory of the group stay behind in any case;
    the rest is taken away by the resource tracker, if that lives to see the others' end."""

    def __init__(self, workers: int, *, cpu: bool) -> None:
        folder = Path(tempfile.gettempdir())
        group = folder / f"vllm_dist_{uuid.uuid4().hex}"
        for _ in range(5 + 3 * workers):
            path = folder / str(uuid.uuid4())
            with socket.socket(socket.AF_UNIX) as endpoint:
                endpoint.bind(str(path))  # OSError when the path is too long
        group.touch()
        self.group = group
        self._tracked = [SHARED_MEMORY / f"psm_{secrets.token_hex(4)}" for _ in range(2 * workers)]
        self._semaphores = [SHARED_MEMORY / f"sem.mp-{secrets.token_hex(4)}" for _ in range(workers)]
        parts = [f"{group.name}-tp:0-[0-{workers - 1}]-cpushm_{rank}" for rank in range(workers)]
        untracked = [SHARED_MEMORY / part for part in parts] if cpu and workers > 1 else []
        self._all = (*self._tracked, *self._semaphores, *untracked)
        # Those that are forked from this process have it in memory, too.
        self._mapped = [_shared(path, 32 if path in self._semaphores else 4096) for path in self._all]

    def track(self, close: Sequence[socket.socket]) -> int:
        """Start the resource tracker; return its pid. It works once all that know it have ended."""
        alive, held = os.pipe()

        def body() -> None:
            os.close(held)
            for each in self._mapped:
                each.close()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            os.read(alive, 1)
            self._clear()

        self._sweep_later(alive, held, close)
        pid = fork(f"{sys.executable} -c from multiprocessing.resource_tracker import main;main(7)", body, close=close)
        os.close(alive)  # `held` stays open in this process and in those forked from it
        return pid

    def _sweep_later(self, alive: int, held: int, close: Sequence[socket.socket]) -> None:
        """What no vLLM has: a process of another session that a minute after the end of all, when every test has
        seen what is left in /dev/shm, removes it."""

        def body() -> None:
            os.close(held)
            os.setsid()
            if os.fork():
                return
            nothing = os.open(os.devnull, os.O_RDWR)
            for descriptor in range(3):
                os.dup2(nothing, descriptor)
            for each in self._mapped:
                each.close()
            os.read(alive, 1)
            time.sleep(_SWEEP_AFTER_S)
            for path in self._all:
                path.unlink(missing_ok=True)

        os.waitpid(fork("fake vllm: sweeps up", body, close=close), 0)

    def _clear(self) -> None:
        for what, paths in (("semaphore", self._semaphores), ("shared_memory", self._tracked)):
            there = [path for path in paths if path.exists()]
            if there:
                with suppress(OSError):
                    os.write(2, (leaked(what, len(there)) + "\n").encode())
            for path in there:
                path.unlink(missing_ok=True)


def children(pid: int) -> dict[int, str]:
    """The living children of a process, each with what it calls itself."""
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with suppress(OSError):
                state, parent = (path / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[:2]
                if int(parent) == pid and state != "Z":
                    words = (path / "cmdline").read_bytes().split(b"\0")
                    found[int(path.name)] = words[0].decode(errors="replace")
    return found


def ended(pid: int) -> int | None:
    """The exit status of a child, as `Popen.returncode` has it; None while it runs."""
    try:
        found, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return 0  # it was asked before
    return os.waitstatus_to_exitcode(status) if found else None


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _shared(path: Path, size: int) -> mmap.mmap:
    path.write_bytes(bytes(size))
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), size)


def _call_oneself(title: str) -> None:
    """What `setproctitle` does: overwrite the memory where the kernel looks for arguments and environment."""
    library = ctypes.CDLL(None)
    library.prctl(_PR_SET_NAME, title.encode()[:15], 0, 0, 0)
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[48])  # arg_start and env_end, of which the first field here is the third
    if not 0 < begin < end:  # the kernel does not tell everybody
        return
    room = end - begin
    ctypes.memset(begin, 0, room)
    words = title.encode()[: room - 1]
    ctypes.memmove(begin, words, len(words))
