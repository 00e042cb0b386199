"""What to try after a failure: a ladder per cause, one step at a time, never at what the user pinned.

A step is a change of what could have been typed; it is planned again before it is used, and the plan may refuse it.
The same start again is a step too, for what once worked and may be over by itself. Both count towards one budget.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mgpu.backends.failure import Failure
from mgpu.running.causes import Kind, kind_of

MOST_RESTARTS = 10
"""Starts after the first one, until the engine has been healthy for `HEALTHY_S`."""
HEALTHY_S = 600.0

_FIRST_DELAY_S = 1.0
_LONGEST_DELAY_S = 60.0
# A context this short serves one question and a short answer (as in planning).
_SMALLEST_CTX_TOKENS = 2048
_CTX_STEP_TOKENS = 256
# Each halving costs a load; what still does not fit with a quarter needs another kind of change.
_MOST_STEPS = 2
_UTILISATION_STEP = 0.05
_LEAST_UTILISATION = 0.70
_MOST_UTILISATION = 0.95
_LAST_PORT = 65535
_MOST_PORTS = 5
_UUID_CHARACTERS = len("GPU-01234567")

P2P_VARIABLE = "NCCL_P2P_DISABLE"
_ENGINE_ARGUMENTS = ("--gpu-memory-utilization", "--disable-custom-all-reduce")
# Words that only the engine knows which they were said to.
_OF_ONE_ENGINE = ("--quant", "--kv-type", "--split-mode", *_ENGINE_ARGUMENTS)


# So many starts without a change come first, where it has worked before: a card may come back, a port become free,
# and clients know the address.
_UNCHANGED_FIRST = {Kind.LOST_DEVICE: 1, Kind.ENVIRONMENT: 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A card as `mgpu gpus` counts it; `device` is what the engine's log calls it ("CUDA1"), None when unknown."""

    index: int
    uuid: str | None = None
    device: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What of a plan the ladder can change. `cards` are those it uses, `other_cards` usable ones that it leaves out.

    `utilisation` is vLLM's share of a card's memory, None for engines that have none. `smaller_quants` are names for
    --quant, the largest first; `other_backends` are engines that are installed and load this model, the best first.
    """

    backend: str
    ctx_tokens: int
    parallel: int
    kv_type: str
    split_mode: str
    tensor_parallel: int = 1
    utilisation: float | None = None
    cards: tuple[Card, ...] = ()
    other_cards: tuple[Card, ...] = ()
    smaller_quants: tuple[str, ...] = ()
    other_backends: tuple[str, ...] = ()
    port: int | None = None

    @property
    def exchanges_data(self) -> bool:
        """Whether the cards work on the same layers, or vLLM's stages hand over with NCCL, so that one that does not
        reach another stops all."""
        return len(self.cards) > 1 and (self.backend == "vllm" or self.split_mode == "tensor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One step of a ladder: `setting` is an option, an engine's argument or a variable, `value` what it becomes (None
    for a switch), `before` what it was. `cause` is a failure's code and `at` when it was tried (ISO 8601 UTC).

    `refused` says why the plan or the engine would not have it; it is not in effect then.
    """

    cause: str
    setting: str
    value: str | None = None
    before: str | None = None
    at: str | None = None
    refused: str | None = None

    @property
    def words(self) -> str:
        """The change as a user would type it."""
        if not self.setting.startswith("-"):
            return f"{self.setting}={self.value}"
        typed = shlex.join(self._typed)
        return f"-- {typed}" if self.setting in _ENGINE_ARGUMENTS else typed

    @property
    def _typed(self) -> tuple[str, ...]:
        return (self.setting,) if self.value is None else (self.setting, self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """The same start once more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Nothing is left to try: why, and the change that only the user can make (None: the failure's own hint)."""

    reason: str
    fix: Change | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What changes come to: options of `mgpu run` by name, arguments of the engine, variables of its environment."""

    options: dict[str, str]
    engine_arguments: tuple[str, ...]
    environment: dict[str, str]


def delay_s(restarts: int) -> float:
    """Return how long to wait before the next start after so many: 1, 2, 4 … 60 seconds."""
    return min(_FIRST_DELAY_S * (1 << min(restarts, 16)), _LONGEST_DELAY_S)


def next_step(
    failure: Failure,
    setup: Setup | None,
    tried: Sequence[Change],
    pinned: frozenset[str],
    *,
    proven: bool,
    restarts: int,
) -> Change | Again | Stop:
    """Return what to do about `failure` of an engine that ran as `setup` (None: it never came to a plan).

    `tried` are all changes so far, refused ones too; `pinned` names what the user typed: options ("--ctx"), engine
    arguments and variables. `proven` says that the engine has been ready before: what never worked is not started
    again without a change. `restarts` counts the starts since it was last healthy for long.
    """
    kind = kind_of(failure)
    if kind is Kind.DETERMINISTIC:
        return Stop(reason=failure.message)
    changes = list(_changes(kind, failure, setup, tried)) if setup else []
    blocked = next((change for change in changes if change.setting in pinned), None)
    if restarts >= MOST_RESTARTS:
        return Stop(reason=f"{failure.message}; given up after {restarts} restarts", fix=blocked)
    if proven and restarts < _UNCHANGED_FIRST.get(kind, 0):
        return Again()
    if free := next((change for change in changes if change.setting not in pinned), None):
        return free
    return Again() if proven else Stop(reason=failure.message, fix=blocked)


def in_effect(changes: Iterable[Change]) -> Settings:
    """Return what `changes`, oldest first, come to. Another engine is not told what was meant for the one before."""
    latest: dict[str, str | None] = {}
    for change in changes:
        if change.refused is not None:
            continue
        if change.setting == "--backend":
            latest = {setting: value for setting, value in latest.items() if setting not in _OF_ONE_ENGINE}
        latest[change.setting] = change.value
    arguments = [(setting, value) for setting, value in latest.items() if setting in _ENGINE_ARGUMENTS]
    return Settings(
        options={s: v for s, v in latest.items() if s.startswith("-") and s not in _ENGINE_ARGUMENTS and v is not None},
        engine_arguments=tuple(word for pair in arguments for word in pair if word is not None),
        environment={s: v for s, v in latest.items() if not s.startswith("-") and v is not None},
    )


def with_change(command: Sequence[str], change: Change) -> str:
    """Return `command`, an argv of mgpu, with `change` in the place of what it says now, quoted for a shell."""
    if not change.setting.startswith("-"):
        return f"{change.words} {shlex.join(command)}"
    end = command.index("--") if "--" in command else len(command)
    own, engine = list(command[:end]), list(command[end + 1 :])
    meant = engine if change.setting in _ENGINE_ARGUMENTS else own
    while (place := _place(meant, change.setting)) is not None:
        joined = "=" in meant[place]
        del meant[place : place + (1 if joined or change.value is None else 2)]
    meant += change._typed
    return shlex.join([*own, *(["--", *engine] if engine else [])])


def _place(words: Sequence[str], flag: str) -> int | None:
    return next((i for i, word in enumerate(words) if word.partition("=")[0] == flag), None)


def _changes(kind: Kind, failure: Failure, setup: Setup, tried: Sequence[Change]) -> Iterator[Change]:
    """The changes that may help and have not been tried, the mildest first."""
    steps = {
        Kind.OUT_OF_MEMORY: _less_memory,
        Kind.HANG: _less_exchange,
        Kind.LOST_DEVICE: _without_card,
        Kind.ENVIRONMENT: _elsewhere,
    }
    if kind not in steps:
        return
    known = {(change.setting, change.value) for change in tried}
    for setting, before, value in steps[kind](failure, setup, tried):
        if (setting, value) not in known:
            yield Change(cause=failure.code, setting=setting, before=before, value=value)


_Steps = Iterator[tuple[str, str | None, str | None]]


def _less_memory(failure: Failure, setup: Setup, tried: Sequence[Change]) -> _Steps:
    on_host = failure.code.startswith("host-")
    vllm = setup.backend == "vllm"
    if on_host or failure.part != "weights":  # which the KV cache has no part in
        yield from _smaller("--ctx", setup.ctx_tokens, tried, least=_SMALLEST_CTX_TOKENS, step=_CTX_STEP_TOKENS)
        yield from _smaller("--parallel", setup.parallel, tried, least=1, step=1)
        if setup.kv_type in ("f16", "bf16", "f32"):
            yield "--kv-type", setup.kv_type, "fp8" if vllm else "q8_0"
    if not on_host:
        if vllm and setup.utilisation is not None:
            yield from _utilisation(failure, setup.utilisation, tried)
        if not vllm and (setup.split_mode == "tensor" or (setup.split_mode == "none" and setup.other_cards)):
            yield "--split-mode", setup.split_mode, "layer"
        if setup.other_cards and not _tries("--gpus", tried):  # a card that was left out stays out
            yield "--gpus", _names(setup.cards), _names((*setup.cards, *setup.other_cards))
    if setup.smaller_quants and len(_tries("--quant", tried)) < _MOST_STEPS:
        tried_quants = [change.value for change in _tries("--quant", tried)]
        yield from (("--quant", None, quant) for quant in setup.smaller_quants if quant not in tried_quants)
    been = {change.before for change in _tries("--backend", tried)}
    yield from (("--backend", setup.backend, other) for other in setup.other_backends if other not in been)


def _smaller(setting: str, now: int, tried: Sequence[Change], *, least: int, step: int) -> _Steps:
    """Half of what there is, or of what was last tried in vain."""
    before = _tries(setting, tried)
    if len(before) >= _MOST_STEPS:
        return
    smallest = min([now, *(int(change.value) for change in before if change.value and change.value.isdecimal())])
    if smallest > least:
        yield setting, str(now), str(max(least, smallest // 2 // step * step))


def _utilisation(failure: Failure, now: float, tried: Sequence[Change]) -> _Steps:
    """A larger share where vLLM counts that its share leaves too little for the KV cache, a smaller one where a card
    refused memory: only then does the log name the card."""
    setting = "--gpu-memory-utilization"
    if failure.part == "kv" and failure.device is None:
        if now < _MOST_UTILISATION:
            yield setting, f"{now:g}", f"{_MOST_UTILISATION:g}"
        return
    taken = [float(change.value) for change in _tries(setting, tried) if change.value]
    smaller = round(min([now, *taken]) - _UTILISATION_STEP, 2)
    if smaller >= _LEAST_UTILISATION:
        yield setting, f"{now:g}", f"{smaller:g}"


def _less_exchange(_: Failure, setup: Setup, __: Sequence[Change]) -> _Steps:
    if not setup.exchanges_data:
        return
    yield P2P_VARIABLE, None, "1"
    if setup.backend != "vllm":
        yield "--split-mode", setup.split_mode, "layer"
    elif setup.tensor_parallel > 1:
        yield "--disable-custom-all-reduce", None, None


def _without_card(failure: Failure, setup: Setup, _: Sequence[Change]) -> _Steps:
    left = tuple(card for card in setup.cards if card.device != failure.device)
    if failure.device and left and len(left) < len(setup.cards):
        yield "--gpus", _names(setup.cards), _names(left)


def _elsewhere(failure: Failure, setup: Setup, tried: Sequence[Change]) -> _Steps:
    if failure.code == "port-in-use" and setup.port is not None:
        ports = [int(change.value) for change in _tries("--port", tried) if change.value and change.value.isdecimal()]
        port = max([setup.port, *ports]) + 1
        if len(ports) < _MOST_PORTS and port <= _LAST_PORT:
            yield "--port", str(setup.port), str(port)


def _tries(setting: str, tried: Sequence[Change]) -> list[Change]:
    return [change for change in tried if change.setting == setting]


def _names(cards: Sequence[Card]) -> str:
    """Cards as --gpus takes them: by the beginning of the UUID, since indices move when a card is gone. A bare index
    would be a count where it stands alone."""
    beginnings = [card.uuid[:_UUID_CHARACTERS] if card.uuid else None for card in cards]
    return ",".join(
        f"gpu{card.index}" if not short else short if beginnings.count(short) == 1 else str(card.uuid)
        for card, short in zip(cards, beginnings, strict=True)
    )
