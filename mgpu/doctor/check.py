"""What a check is, and what it may say: findings, or why it could not look."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from mgpu.machine.inspection import Inspection


class Severity(StrEnum):
    """`fail`: will not work, or gives wrong output; `warn`: slower or fragile; `info`: worth saying, never coloured."""

    fail = "fail"
    warn = "warn"
    info = "info"


class Area(StrEnum):
    """The lines of the screen, in their order."""

    driver = "Driver"
    gpus = "GPUs"
    pcie = "PCIe"
    p2p = "P2P"
    memory = "Memory"
    power = "Power"
    host = "Host"
    container = "Container"
    amd = "AMD"
    intel = "Intel"
    engines = "Engines"
    profile = "Profile"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What was seen: a path or a function, and its value as a word."""

    path: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is not as it should be. `summary` is one sentence of at most 90 characters; `fix` the commands
    (or steps in the BIOS), in order; `gpus` the cards it is about, by index (none: all, or the host). `confidence` is
    "read", "probed" or "inferred". `id` is set by the runner."""

    severity: Severity
    summary: str
    evidence: tuple[Evidence, ...] = ()
    fix: tuple[str, ...] = ()
    gpus: tuple[int, ...] = ()
    needs_root: bool = False
    confidence: str = "read"
    id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """A fact that could not be read, why, and whether root could. `id` is set by the runner."""

    reason: str
    needs_root: bool = False
    id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Purpose:
    """What the machine is to be good for: an engine ("llama.cpp", "vllm", "ollama"; None: any), how many cards one
    model is cut over (None: not said), and what a profile needs. `missing_bytes` is what of the weights is not on the
    disk yet."""

    backend: str | None = None
    tensor_parallel: int | None = None
    expected_gpus: int | None = None
    psu_w: int | None = None
    attention_heads: int | None = None
    kv_heads: int | None = None
    weights_bytes: int | None = None
    missing_bytes: int | None = None
    port: int | None = None

    @property
    def joins_cards(self) -> bool:
        """Whether cards send each other parts of one model's work: a cut tensor does, and vLLM in all its ways."""
        return self.backend == "vllm" if self.tensor_parallel is None else self.tensor_parallel > 1

    def over(self, cards: int) -> Purpose:
        """Return the purpose on a machine with so many cards that can be used: vLLM is to cut a model over all of them
        where no other number is said."""
        if self.backend != "vllm" or self.tensor_parallel is not None or cards < 2:
            return self
        return replace(self, tensor_parallel=cards)


Said = Iterator[Finding | Skip]
Subject = Callable[[Inspection, Purpose], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A check: its stable `id`, its place on the screen, its tier ("A": does not start, hangs or lies; "B": works, but
    slow or fragile), and the function. `about` is what it looks at (`mgpu.doctor.subjects`): where one of them is not
    here, the check does not apply. `explanation` is the function's docstring, shown by --explain: what it looks at, the
    rule, why (with numbers), what to do."""

    id: str
    area: Area
    tier: str
    run: Callable[[Inspection, Purpose], Said]
    explanation: str
    needs_root: bool = False
    about: tuple[Subject, ...] = ()

    @property
    def title(self) -> str:
        """What it detects, in one line."""
        return self.explanation.splitlines()[0].rstrip(".")

    def applies(self, inspection: Inspection, purpose: Purpose) -> bool:
        """Whether there is anything here that it could find fault with."""
        return all(subject(inspection, purpose) for subject in self.about)


def check(
    id: str,  # noqa: A002  the field's own word for it
    area: Area,
    tier: str,
    *,
    needs_root: bool = False,
    about: tuple[Subject, ...] = (),
) -> Callable[[Callable[[Inspection, Purpose], Said]], Check]:
    """Make a check of a generator function over (inspection, purpose); its docstring is the explanation."""

    def make(function: Callable[[Inspection, Purpose], Said]) -> Check:
        return Check(
            id=id,
            area=area,
            tier=tier,
            run=function,
            explanation=inspect.cleandoc(function.__doc__ or ""),
            needs_root=needs_root,
            about=about,
        )

    return make
