"""What vLLM writes while it starts: how far it is, and what it allocated.

The lines were recorded from version 0.32.0 on CPUs; those that only cards print were read in its source. Each
process of an engine puts its name in front: `(APIServer pid=1)`, `(EngineCore_DP0 pid=2)`, `(Worker_PP0_TP1 pid=3)`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mgpu.backends.backend import DeviceMemory
from mgpu.planning.candidates import Candidate

PHASES = (
    "starting",
    "starting workers",
    "connecting cards",
    "loading weights",
    "compiling",
    "allocating KV cache",
    "capturing CUDA graphs",
    "listening",
)
"""What `phase` returns, in the order in which a load goes through it ("loading weights" may carry a percentage)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A line of the log taken apart: the process it comes from (None: not said), its level (None: no log line but
    a traceback, or what a library printed) and what it says."""

    process: str | None
    level: str | None
    text: str


def parse_line(line: str) -> Entry:
    """Take a line apart. Never raises, whatever the line holds."""
    match = _PREFIX.match(line[:_LONGEST_LINE])
    assert match  # both parts of the prefix are optional
    return Entry(process=match["process"], level=match["level"] or match["uvicorn"], text=match["text"].rstrip())


def phase(line: str) -> str | None:
    """What of `PHASES` a line says has begun, None for most lines."""
    line = line[:_LONGEST_LINE]
    if match := _SHARDS.search(line):
        return f"loading weights, {match['percent']} %"
    return next((name for sign, name in _PHASE_SIGNS if sign in line), None)


def reached(lines: Sequence[str]) -> str | None:
    """The last phase that the lines name, without its percentage."""
    for line in reversed(lines):
        if name := phase(line):
            return name.partition(",")[0]
    return None


def device_memory(lines: Sequence[str], candidate: Candidate) -> dict[int, DeviceMemory]:
    """What the log says was allocated on each card, by the card's place in `candidate.devices`.

    Only the first worker of an engine reports; the others of its stage, and those of the same stage in other
    replicas, hold the same. Of the other stages of a pipeline nothing is known. Compute buffers are never reported.
    """
    weights: dict[int, int] = {}
    caches: dict[int, int] = {}
    for entry in map(parse_line, lines):
        if match := _WEIGHTS.search(entry.text):
            weights[_rank(entry.process, candidate)] = _bytes(match["gib"])
        elif match := _KV.search(entry.text):
            caches[_rank(entry.process, candidate)] = _bytes(match["gib"])
    weights, caches = _spread(weights, candidate), _spread(caches, candidate)
    return {
        rank: DeviceMemory(weights_bytes=weights.get(rank), kv_bytes=caches.get(rank))
        for rank in range(len(candidate.devices))
        if rank in weights or rank in caches
    }


def kv_tokens(lines: Sequence[str]) -> int | None:
    """How many tokens the engine says its KV cache holds (of one replica), None where it does not."""
    for line in reversed(lines):
        if match := _KV_TOKENS.search(line[:_LONGEST_LINE]):
            return int(match["tokens"].replace(",", ""))
    return None


_LONGEST_LINE = 4096

_PREFIX = re.compile(
    r"(?:\((?P<process>[\w-]+) pid=\d+\) )?"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?"
    r"|(?P<uvicorn>INFO|WARNING|ERROR): {1,6})?"
    r"(?P<text>[^\n]*)",
    re.DOTALL,
)
_SHARDS = re.compile(r"Loading (?:safetensors|pt|\w+) checkpoint shards: +(?P<percent>\d+)% Completed")
_PHASE_SIGNS = (
    ("Application startup complete", "listening"),
    ("Starting vLLM server on", "listening"),
    ("Capturing CUDA graph", "capturing CUDA graphs"),
    ("Available KV cache memory", "allocating KV cache"),
    (" KV cache size: ", "allocating KV cache"),
    ("Warming up model for the compilation", "compiling"),
    ("Dynamo bytecode transform", "compiling"),
    ("torch.compile t", "compiling"),  # takes, took
    ("Starting to load model", "loading weights"),
    (" distributed_init_method=", "connecting cards"),
    ("LLM engine (v", "starting workers"),
    ("non-default args:", "starting"),
)
_WEIGHTS = re.compile(r"Model loading took (?P<gib>\d+(?:\.\d+)?) GiB")
_KV = re.compile(r"Available KV cache memory: (?P<gib>\d+(?:\.\d+)?) GiB")
_KV_TOKENS = re.compile(r" KV cache size: (?P<tokens>[\d,]+) tokens")
_RANK = re.compile(r"_(?P<group>DP|PP|TP)(?P<rank>\d+)")


def _rank(process: str | None, candidate: Candidate) -> int:
    """The place of a worker among all: replicas first, then stages, then the members of a stage."""
    ranks = {match["group"]: int(match["rank"]) for match in _RANK.finditer(process or "")}
    stage = ranks.get("DP", 0) * candidate.pipeline_parallel + ranks.get("PP", 0)
    return stage * candidate.tensor_parallel + ranks.get("TP", 0)


def _spread(known: Mapping[int, int], candidate: Candidate) -> dict[int, int]:
    """`known`, and the same for the other members of the stages of which one is known, in every replica."""
    by_stage = {_stage(rank, candidate): size for rank, size in known.items()}
    ranks = [rank for rank in range(len(candidate.devices)) if _stage(rank, candidate) in by_stage]
    return {rank: known.get(rank, by_stage[_stage(rank, candidate)]) for rank in ranks}


def _stage(rank: int, candidate: Candidate) -> int:
    return rank // candidate.tensor_parallel % candidate.pipeline_parallel


def _bytes(gib: str) -> int:
    return round(float(gib) * (1 << 30))
