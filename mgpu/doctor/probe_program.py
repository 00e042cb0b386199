"""The program of a probe, run by the Python of an engine's environment: it needs PyTorch and nothing of mgpu.

    python probe_program.py '{"device": "cuda", "cards": 2, "seconds": 18}'

Says what it finds as JSON objects, one a line of stdout behind a mark (libraries print there, too). PyTorch is imported
once; every stage runs in forked processes that can be killed, for a hang is one of the answers.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

MARK = "mgpu-probe "
_COPY_S = 0.3
_COPY_BYTES = 64 * 2**20
_PAIR_VALUES = 2 * 2**20
_SUM_VALUES = 2**22
_ROUNDS = 5
# Of the time that is left: copies, then the all-reduce as it is, then the control run.
_COPIES_SHARE, _FIRST_SHARE = 0.4, 0.55


def say(event: str, **facts: object) -> None:
    """Write one event to stdout, in one piece."""
    os.write(1, (MARK + json.dumps({"event": event, **facts}) + "\n").encode())


def main(wanted: dict[str, Any]) -> None:
    """Probe `cards` devices of kind "cuda" (or as many processes on "cpu") within `seconds`."""
    deadline = time.monotonic() + float(wanted["seconds"])
    device, cards = str(wanted["device"]), int(wanted["cards"])
    torch = importlib.import_module("torch")
    say("loaded", torch=str(torch.__version__))
    if device == "cuda" and not _sees(torch, cards):
        say("problem", text=f"the engine's PyTorch {torch.__version__} does not see the {cards} cards")
        return
    if device == "cuda":
        limit_s = (deadline - time.monotonic()) * _COPIES_SHARE
        told, hung = _in_processes([lambda _: _copies(torch, cards)], limit_s)
        for line in told:
            say("failed", text=line["error"])
        if hung:
            say("hang", stage="copies")
    if cards > 1:
        first_s = (deadline - time.monotonic()) * _FIRST_SHARE
        _sums(torch, device, cards, first_s, control=False)
        _sums(torch, device, cards, deadline - time.monotonic() - 0.5, control=True)
    say("done")


def _sees(torch: Any, cards: int) -> bool:
    """Asked in a process of its own: a process that has used CUDA cannot be forked any more."""
    told, hung = _in_processes([lambda tell: tell({"seen": int(torch.cuda.device_count())})], 5)
    return not hung and any(line.get("seen") == cards for line in told)


def _copies(torch: Any, cards: int) -> None:
    host = torch.ones(_COPY_BYTES, dtype=torch.uint8).pin_memory()
    for card in range(cards):
        there = torch.empty_like(host, device=f"cuda:{card}")
        torch.cuda.synchronize(card)
        say("copying", card=card)
        begun, copied = time.monotonic(), 0
        while (passed := time.monotonic() - begun) < _COPY_S or not copied:
            there.copy_(host, non_blocking=True)
            torch.cuda.synchronize(card)
            copied += _COPY_BYTES
        say("copied", card=card, gb_s=copied / passed / 1e9)
    for a in range(cards):
        for b in range(cards):
            if a != b:
                say("pairing", a=a, b=b)
                say("pair", a=a, b=b, **_pair(torch, a, b))


def _pair(torch: Any, a: int, b: int) -> dict[str, object]:
    """Copy a pattern from card to card, and compare it where it should be: with one that was made there."""

    def pattern(card: int) -> Any:
        return torch.arange(_PAIR_VALUES, dtype=torch.int64, device=f"cuda:{card}") * 2654435761 + (a * 64 + b)

    sent, there = pattern(a), torch.zeros(_PAIR_VALUES, dtype=torch.int64, device=f"cuda:{b}")
    torch.cuda.synchronize(a)
    torch.cuda.synchronize(b)
    begun = time.monotonic()
    there.copy_(sent)
    torch.cuda.synchronize(a)
    torch.cuda.synchronize(b)
    passed = max(time.monotonic() - begun, 1e-9)
    return {"right": bool(torch.equal(there, pattern(b))), "gb_s": 8 * _PAIR_VALUES / passed / 1e9}


def _sums(torch: Any, device: str, cards: int, limit_s: float, *, control: bool) -> None:
    """All-reduces over 2, 4 ... all cards in one process each, and what became of them."""
    sizes = sorted({size for size in (2, 4, 8, 16, cards) if size <= cards})
    if limit_s < 1:
        for size in sizes:
            say("collective", ranks=size, control=control, outcome="unfinished")
        return
    with tempfile.TemporaryDirectory(prefix="mgpu-probe-") as folder:
        store = os.path.join(folder, "store")  # noqa: PTH118 - no more imports than needed

        def rank_of(rank: int) -> Callable[[Callable[[dict[str, Any]], None]], None]:
            return lambda tell: _rank(torch, device, rank, cards, sizes, store, tell, control=control)

        told, hung = _in_processes([rank_of(rank) for rank in range(cards)], limit_s)
    met = sum(1 for line in told if "joined" in line) == cards
    error = next((str(line["error"]) for line in told if "error" in line), None)
    for size in sizes:
        answers = [line for line in told if line.get("ranks") == size]
        facts: dict[str, Any] = {"outcome": "right", "gb_s": min((each["gb_s"] for each in answers), default=None)}
        if not all(each["right"] for each in answers):
            facts["outcome"] = "wrong"
        elif len(answers) < size:
            # Who has not even met may have had no time to.
            facts = {"outcome": "hang" if hung and met else "unfinished" if hung else "error", "detail": error}
            facts["outcome"] = "error" if error else facts["outcome"]
        say("collective", ranks=size, control=control, **facts)


def _rank(
    torch: Any,
    device: str,
    rank: int,
    cards: int,
    sizes: Sequence[int],
    store: str,
    tell: Callable[[dict[str, Any]], None],
    *,
    control: bool,
) -> None:
    if control:
        os.environ["NCCL_P2P_DISABLE"] = "1"
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        os.environ[name] = "lo"  # all ranks are here: nothing may wait for a network
    distributed = importlib.import_module("torch.distributed")
    where = torch.device("cuda", rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=distributed.FileStore(store, cards),
        rank=rank,
        world_size=cards,
        timeout=timedelta(seconds=60),
    )
    tell({"joined": rank})
    for size in sizes:
        group = distributed.new_group(list(range(size)))
        if rank >= size:
            continue
        pattern = (torch.arange(_SUM_VALUES, dtype=torch.float32, device=where) % 251) + 1
        values, right, passed = pattern, True, 0.0
        for _ in range(_ROUNDS):
            values = pattern * (rank + 1)
            _finish(torch, device)
            begun = time.monotonic()
            distributed.all_reduce(values, group=group)
            _finish(torch, device)
            passed = min(time.monotonic() - begun, passed or 60.0)
            right = right and bool(torch.equal(values, pattern * (size * (size + 1) // 2)))
        bus_bytes = 2 * (size - 1) / size * 4 * _SUM_VALUES
        tell({"ranks": size, "right": right, "gb_s": bus_bytes / max(passed, 1e-9) / 1e9})


def _finish(torch: Any, device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _in_processes(
    bodies: Sequence[Callable[[Callable[[dict[str, Any]], None]], None]], limit_s: float
) -> tuple[list[dict[str, Any]], bool]:
    """Run each body in a forked process; return what they told, and whether one had to be killed at the limit."""
    reading, writing = os.pipe()
    children = []
    for body in bodies:
        child = os.fork()
        if not child:
            os.close(reading)
            _be_child(body, writing)
        children.append(child)
    os.close(writing)
    deadline, text = time.monotonic() + limit_s, b""
    while (left := deadline - time.monotonic()) > 0:
        if select.select([reading], [], [], left)[0]:
            piece = os.read(reading, 65536)
            text += piece
            if not piece:  # all have ended
                break
            if b'"error"' in text:  # the others would wait for the one that failed
                deadline = min(deadline, time.monotonic() + 1)
    hung = left <= 0
    os.close(reading)
    for child in children:
        if hung:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return [json.loads(line) for line in text.decode().splitlines() if line.endswith("}")], hung


def _be_child(body: Callable[[Callable[[dict[str, Any]], None]], None], writing: int) -> None:
    def tell(facts: dict[str, Any]) -> None:
        os.write(writing, (json.dumps(facts) + "\n").encode())

    try:
        body(tell)
    except BaseException as error:  # whatever it is, it is an answer
        lines = str(error).strip().splitlines() or [type(error).__name__]
        tell({"error": lines[0][:200]})
    finally:
        os._exit(0)  # no library may tidy up: some wait for their peers when they do


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
