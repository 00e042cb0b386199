"""Starting a probe: the only part of a diagnosis that makes the cards work, for 20 seconds at most."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from mgpu.doctor import probe_program
from mgpu.doctor.facts import in_use_bytes
from mgpu.doctor.proof import CardCopy, Collective, PairCopy, Proof
from mgpu.machine.inspection import Inspection
from mgpu.machine.layout import health
from mgpu.machine.snapshot import Gpu
from mgpu.programs import kill_group, start_program

LIMIT_S = 20.0
# For the program to say what hangs before it is ended itself.
_SPARE_S = 1.5
# What the kernel may take to end a program that was killed; one inside a driver that hangs is never ended.
_END_S = 2.0
_BUSY_PERCENT = 10
# A desktop holds less, and an engine more.
_BUSY_BYTES = 2**30

# What a card's PCIe link is now: its generation and its width, None where that cannot be read.
Link = Callable[[Gpu], tuple[int | None, int | None]]


def probe(inspection: Inspection, *, link: Link | None = None) -> Proof:
    """Return what the cards prove when they are made to work. Blocks for `LIMIT_S` at most; never raises for what it
    finds: where it cannot be done, `problem` says why."""
    gpus = probed_cards(inspection)
    if not gpus:
        return Proof(problem="there is no NVIDIA or AMD card that can be used")
    if why := busy(inspection, gpus):
        return Proof(problem=why)
    python = torch_python()
    if python is None:
        return Proof(problem="no vLLM with PyTorch is installed: mgpu backends install vllm")
    return prove(python, gpus, link=link or link_from_sysfs)


def probed_cards(inspection: Inspection) -> tuple[Gpu, ...]:
    """Return the cards that one PyTorch can use together: the NVIDIA cards, else the AMD ones."""
    usable = [gpu for gpu in inspection.machine.gpus if gpu.problem is None and not gpu.integrated]
    for vendor in ("nvidia", "amd"):
        if found := tuple(gpu for gpu in usable if gpu.vendor == vendor):
            return found
    return ()


def busy(inspection: Inspection, gpus: Sequence[Gpu]) -> str | None:
    """Return which card is at work or may be, and with what; None where all are known to be idle."""
    for gpu in gpus:
        card = health(inspection, gpu)
        loads = [gpu.utilisation_percent, *(reading.utilisation_percent for reading in card.readings)]
        load = max((load for load in loads if load is not None), default=None)
        if load is None:
            return f"whether GPU{gpu.index} is busy could not be read; a probe might disturb it"
        if load >= _BUSY_PERCENT:
            return f"GPU{gpu.index} is busy ({load} %); a probe would disturb it"
        for process in gpu.used_by:
            if process.bytes is not None and process.bytes >= _BUSY_BYTES:
                return f"GPU{gpu.index} is in use by {process.name or 'a process'} (pid {process.pid})"
        used = in_use_bytes(gpu, card)
        if used is not None and used > _BUSY_BYTES:
            return f"GPU{gpu.index} is in use: {used / _BUSY_BYTES:.1f} GiB of its memory are taken"
    return None


def torch_python() -> Path | None:
    """Return the Python of the installed vLLM's environment if PyTorch is in it, else None."""
    from mgpu.backends.vllm_program import find_vllm
    from mgpu.errors import MgpuError

    try:
        engine = find_vllm()
    except MgpuError:
        return None
    if engine is None:
        return None
    # Not resolved further than the program: an environment's Python is a link out of it.
    folder = engine.path.resolve().parent
    python = folder / "python"
    has_torch = any((folder.parent / "lib").glob("python3*/site-packages/torch/__init__.py"))
    return python if has_torch and os.access(python, os.X_OK) else None


def prove(
    python: Path,
    gpus: Sequence[Gpu],
    *,
    device: str = "cuda",
    limit_s: float = LIMIT_S,
    link: Link = lambda _: (None, None),
) -> Proof:
    """Return what the probe's program finds of `gpus`, run by `python`; on the device "cpu" each card is a process.

    `link` is asked while a card copies. Blocks for `limit_s` at most, and 2 s for the end of a program that hangs in
    the driver; all that was started has been killed then.
    """
    begun = time.monotonic()
    wanted = {"device": device, "cards": len(gpus), "seconds": max(limit_s - _SPARE_S, 1.0)}
    with tempfile.TemporaryFile() as errors:
        try:
            process = start_program(
                [str(python), "-I", "-W", "ignore", probe_program.__file__, json.dumps(wanted)],
                _environment(gpus),
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        except OSError as error:
            return Proof(problem=f"{python} cannot be run: {error.strerror or error}")
        assert process.stdout is not None
        try:
            proof, done = _listen(_events(process.stdout, begun + limit_s), gpus, link)
        finally:
            kill_group(process, _END_S)
        proof = replace(proof, seconds=round(time.monotonic() - begun, 1))
        if done or proof.problem:
            return proof
        return replace(proof, problem=_why_unfinished(errors, proof, limit_s))


def link_from_sysfs(gpu: Gpu) -> tuple[int | None, int | None]:
    """Return generation and width of a card's PCIe link now."""
    from mgpu.machine import sysfs

    root = Path(os.environ.get("MGPU_ROOT") or "/")
    device = sysfs.pci_device(root, gpu.bus_id) if gpu.bus_id else None
    if device is None:
        return None, None
    now = sysfs.pcie_link(device)
    return now.gen, now.width


def _environment(gpus: Sequence[Gpu]) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    uuids = [gpu.uuid for gpu in gpus if gpu.vendor == "nvidia" and gpu.uuid]
    if uuids:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(uuids)
    return env


def _events(stream: IO[bytes], deadline: float) -> Iterator[dict[str, Any]]:
    """The program's events until it ends or the deadline passes."""
    rest = b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([stream], [], [], left)[0]:
            return
        piece = os.read(stream.fileno(), 65536)
        if not piece:
            return
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(probe_program.MARK.encode()):
                with contextlib.suppress(ValueError):
                    yield json.loads(line[len(probe_program.MARK) :])


def _listen(events: Iterator[dict[str, Any]], gpus: Sequence[Gpu], link: Link) -> tuple[Proof, bool]:
    """What the events prove, and whether the program came to its end."""
    proof, pairing = Proof(), (0, 0)
    links: dict[int, tuple[int | None, int | None]] = {}
    for event in events:
        match event:
            case {"event": "loaded", "torch": str(version)}:
                proof = replace(proof, torch=version)
            case {"event": "problem" | "failed", "text": text}:
                proof = replace(proof, problem=str(text))
            case {"event": "copying", "card": card}:
                links[card] = _while_copying(link, gpus[card])
            case {"event": "copied", "card": card, "gb_s": speed}:
                gen, width = links.get(card, (None, None))
                copy = CardCopy(gpu=gpus[card].index, gb_s=round(speed, 2), pcie_gen=gen, pcie_width=width)
                proof = replace(proof, copies=(*proof.copies, copy))
            case {"event": "pairing", "a": a, "b": b}:
                pairing = (a, b)
            case {"event": "pair", "a": a, "b": b, "right": right, "gb_s": speed}:
                pair = _pair(gpus, a, b, "right" if right else "wrong", round(speed, 2))
                proof = replace(proof, pairs=(*proof.pairs, pair))
            case {"event": "hang"} if pairing[0] != pairing[1]:
                proof = replace(proof, pairs=(*proof.pairs, _pair(gpus, *pairing, "hang", None)))
            case {"event": "collective", "ranks": ranks, "control": control, "outcome": outcome}:
                speed = event.get("gb_s")
                collective = Collective(
                    gpus=tuple(gpu.index for gpu in gpus[:ranks]),
                    control=control,
                    outcome=outcome,
                    gb_s=None if speed is None else round(speed, 2),
                    detail=event.get("detail"),
                )
                proof = replace(proof, collectives=(*proof.collectives, collective))
            case {"event": "done"}:
                return proof, True
    return proof, False


def _pair(gpus: Sequence[Gpu], a: int, b: int, outcome: str, gb_s: float | None) -> PairCopy:
    return PairCopy(a=gpus[a].index, b=gpus[b].index, outcome=outcome, gb_s=gb_s)


def _while_copying(link: Link, gpu: Gpu) -> tuple[int | None, int | None]:
    """The link at its best within the first tenths of a second: it takes some milliseconds to speed up."""
    best = link(gpu)
    for _ in range(10):
        time.sleep(0.01)
        now = link(gpu)
        best = max(best, now, key=lambda each: (each[0] or 0, each[1] or 0))
    return best


def _why_unfinished(errors: IO[bytes], proof: Proof, limit_s: float) -> str:
    if proof.seconds >= limit_s - 0.1:
        return f"the probe was not finished within {limit_s:.0f} s"
    errors.seek(0)
    lines = errors.read(256 * 1024).decode("utf-8", "replace").strip().splitlines()
    last = "".join(c for c in (lines[-1] if lines else "no message") if c.isprintable())
    return f"the probe's program ended early: {last[:150]}"
