"""The speed of a plan as intervals, with the sums they come from and how much evidence there is.

What is likely is computed by `decode`, `batching` and `prefill`; the interval around it is as wide as published
measurements lie around such predictions, and wider where there are few. No value exceeds the physical bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mgpu.planning.batching import aggregate_tok_s, least_tok_s, step_terms
from mgpu.planning.decode import bound_seconds, decode_seconds, decode_terms, digits
from mgpu.planning.links import SLOW_GB_S
from mgpu.planning.prefill import prefill_tok_s, prefill_words
from mgpu.planning.speed import Range, floored
from mgpu.planning.speed_constants import CONSTANTS, VALUES, Values
from mgpu.planning.work import HostPart, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What is predicted of a way to run a model, in tokens per second.

    `decode` is for one user at the depth of the work, `start` the same at an empty context; `aggregate` for all users
    together, None for one; `prefill` for one user's prompt. `bound` is the physical bound for one user at an empty
    context, None where offloaded layers read a memory of unknown bandwidth. `basis` are the sums, line by line, that
    give `decode` (and `prefill` and `aggregate`). `thin` are the reasons why the evidence is thin; empty where it is
    not.
    """

    decode: Range
    start: Range
    aggregate: Range | None
    prefill: Range | None
    bound: float | None
    basis: tuple[str, ...]
    thin: tuple[str, ...]


def predict(work: Work, constants: Values = VALUES) -> Prediction | None:
    """Return what speed is likely for `work`, or None where nothing honest can be said: a card's bandwidth is
    unknown, or nothing is read.

    Layers on the host give a range from its memory's bandwidth (two channels of DDR5 where that is unknown), of which
    `likely` is only the middle.
    """
    if work.stages and bound_seconds(replace(work, host=None)) is None:
        return None
    if not work.stages and not (work.host and work.host.weights_bytes + work.host.expert_bytes):
        return None
    known = bound_seconds(work)
    bound = 1 / known if known else None
    alone = tuple(_thin(work))
    thin = (*alone, *_thin_for_many(work, constants))
    decode = _one_user(work, constants, bound, alone)
    start = _one_user(_at_the_start(work), constants, bound, alone)
    aggregate = _all_users(work, constants, bound, thin) if work.users > 1 and not work.host else None
    prefill = None if work.host else _prompt(work, constants)
    return Prediction(
        decode=decode,
        start=start,
        aggregate=aggregate,
        prefill=prefill,
        bound=bound,
        basis=tuple(_basis(work, constants, decode, prefill, aggregate, bound)),
        thin=thin,
    )


def _one_user(work: Work, constants: Values, bound: float | None, thin: tuple[str, ...]) -> Range:
    seconds = decode_seconds(work, constants) if work.stages else 0.0
    if work.host:
        fastest, slowest = _host_seconds(work, constants)
        high = 1 / (seconds * slowed(work, constants) + fastest)
        low = 1 / (seconds * slowed(work, constants) * (1 + _spread(work, constants, thin)) + slowest)
        return _capped(low, math.sqrt(low * high), high, bound)
    likely = 1 / (seconds * slowed(work, constants))
    return _around(likely, _spread(work, constants, thin), _downwards(work, constants), bound)


def _all_users(work: Work, constants: Values, bound: float | None, thin: tuple[str, ...]) -> Range:
    spread = _spread(work, constants, thin) + constants["spread users"]

    def together(users: float) -> Range:
        return _together(replace(work, users=users), constants, bound, spread)

    found = together(work.users)
    measured = _measured_users(work, constants)
    if work.users <= measured:
        return found
    # More of them get no less together; that they get what the formula gives is a hope.
    low = together(measured).low
    return Range(low=low, likely=math.sqrt(low * found.high), high=found.high)


def _measured_users(work: Work, constants: Values) -> float:
    """How many users at once what is predicted of them was measured with."""
    return math.inf if work.vllm else constants[f"llama.cpp users {'experts' if work.experts else 'dense'}"]


def _together(work: Work, constants: Values, bound: float | None, spread: float) -> Range:
    """What all users get; the low end is that of stages which do not overlap, where that cannot be told."""
    downwards, most = _downwards(work, constants), bound and bound * work.users
    likely = aggregate_tok_s(work, constants) / slowed(work, constants)
    least = least_tok_s(work, constants) / slowed(work, constants)
    return replace(_around(likely, spread, downwards, most), low=_around(least, spread, downwards, most).low)


def _prompt(work: Work, constants: Values) -> Range | None:
    likely = prefill_tok_s(work, constants)
    if likely is None:
        return None
    return _around(likely / slowed(work, constants), constants["spread prefill"], _downwards(work, constants), None)


def _around(likely: float, spread: float, downwards: float, bound: float | None) -> Range:
    return _capped(likely / (1 + spread + downwards), likely, likely * (1 + spread), bound)


def _capped(low: float, likely: float, high: float, bound: float | None) -> Range:
    most = math.inf if bound is None else bound
    return Range(low=min(low, most), likely=min(likely, most), high=min(high, most))


def _spread(work: Work, constants: Values, thin: tuple[str, ...]) -> float:
    engine = "vLLM" if work.vllm else "llama.cpp"
    spread = constants[f"spread {engine} {'experts' if work.experts else 'dense'}"]
    return spread + (constants["spread thin"] if thin else 0)


def _cut(work: Work) -> float:
    """How much of its rated power the most limited card lacks."""
    return 1 - min((chip.power for chip in work.chips), default=1.0)


def slowed(work: Work, constants: Values) -> float:
    """Return by what factor power limits lengthen a token."""
    return 1 / (1 - constants["power shift"] * _cut(work))


def _downwards(work: Work, constants: Values) -> float:
    """How much lower than it is higher the speed may be."""
    unequal = constants["spread unequal"] if work.width > 1 and _are_unequal(work) else 0.0
    return constants["power spread"] * _cut(work) + unequal


def _are_unequal(work: Work) -> bool:
    return any(len({share.chip.bandwidth_gb_s for share in stage.shares}) > 1 for stage in work.stages)


def _at_the_start(work: Work) -> Work:
    """The same work at an empty context."""
    stages = tuple(
        replace(stage, shares=tuple(replace(share, kv_bytes=0) for share in stage.shares)) for stage in work.stages
    )
    return replace(work, stages=stages, host=replace(work.host, kv_bytes=0) if work.host else None)


def _host_seconds(work: Work, constants: Values) -> tuple[float, float]:
    """The least and the most time a token spends on what is in host memory."""
    host = work.host
    assert host is not None
    dense = host.weights_bytes + host.kv_bytes
    slow = host.bandwidth_gb_s or constants["host bandwidth low"]
    most = dense / constants["host weights low"] + host.expert_bytes / constants["host experts low"]
    if host.bandwidth_gb_s is None:
        least = (dense + host.expert_bytes) / constants["host bandwidth high"]
    else:
        least = dense / constants["host weights high"] + host.expert_bytes / constants["host experts high"]
        least /= host.bandwidth_gb_s
    return least / 1e9, most / slow / 1e9


def _basis(
    work: Work,
    constants: Values,
    decode: Range,
    prefill: Range | None,
    aggregate: Range | None,
    bound: float | None,
) -> Iterator[str]:
    """The sums as a reader can redo them, and where their constants come from."""
    constants = _Read(constants)
    terms = decode_terms(work, constants) if work.stages else ()
    yield from (str(term) for term in terms)
    seconds = sum(term.seconds for term in terms)
    if _cut(work):
        seconds *= slowed(work, constants)
        shift = f"÷ (1 − {constants['power shift']:g} × {_cut(work):.2f})"
        yield f"power limited to {1 - _cut(work):.0%}: {shift} = {seconds * 1e3:.2f} ms"
    spread, downwards = _spread(work, constants, tuple(_thin(work))), _downwards(work, constants)
    if work.host:
        yield from _host_words(work, work.host, constants)
        least, most = _host_seconds(work, constants)
        cards = f"{seconds * 1e3:.2f} ms + " if work.stages else ""
        at_worst = f"{seconds * 1e3:.2f} ms × {1 + spread:.3g} + " if work.stages else ""
        slowest = f"1 ÷ ({at_worst}{most * 1e3:.2f} ms) = {decode.low:.3g}"
        yield f"one user: {slowest} to 1 ÷ ({cards}{least * 1e3:.2f} ms) = {decode.high:.3g} tokens/s"
    else:
        told = f"{decode.likely:.1f} tokens/s, {decode.low:.1f} to {decode.high:.1f}"
        yield f"one user: 1 ÷ {seconds * 1e3:.2f} ms = {told}"
        yield f"its interval: ÷ {1 + spread + downwards:.3g} and × {1 + spread:.3g}{_capped_words(decode, bound)}"
    if bound:
        yield f"physical bound: {floored(bound)} tokens/s (the bytes over the bandwidth, nothing else)"
    if prefill:
        sum_ = prefill_words(work, constants)
        shift = f" ÷ {slowed(work, constants):.3f} for less power" if _cut(work) else ""
        yield f"prompt: {sum_}{shift} = {prefill.likely:.0f} tokens/s, {prefill.low:.0f} to {prefill.high:.0f}"
    if aggregate:
        steps = step_terms(work, constants)
        yield from (f"{work.users:.0f} users, {term}" for term in steps)
        each = sum(term.seconds for term in steps) * slowed(work, constants)
        likely = min(aggregate.high, work.users / each)
        measured = _measured_users(work, constants)
        told = f"{aggregate.low:.0f} to {aggregate.high:.0f}"
        if work.users > measured:
            told = f"not measured; {told}, from what {_users(measured)} would get at least"
        yield f"{_users(work.users)}: {work.users:.0f} ÷ {each * 1e3:.2f} ms = {likely:.0f} tokens/s, {told}"
        if work.users <= measured and not (work.vllm and len(work.stages) > 1):
            spread += constants["spread users"]
            yield f"their interval: ÷ {1 + spread + downwards:.3g} and × {1 + spread:.3g}"
    # What is read but does not count here: powers of one, and products with nothing.
    idle: tuple[str, ...] = () if _cut(work) else ("where power",)
    idle += ("where llama.cpp",) if work.vllm else ()
    idle += ("where llama.cpp prefill, layer split",) if len(work.stages) < 2 else ()
    yield from (line for line in constants.origins() if not line.startswith(idle))


class _Read(dict[str, float]):
    """Constants that remember which of them were read."""

    def __init__(self, constants: Values) -> None:
        super().__init__(constants)
        self.read: dict[str, None] = {}

    def __getitem__(self, name: str) -> float:
        self.read[name] = None
        return super().__getitem__(name)

    def origins(self) -> Iterator[str]:
        """Where each of those that were read comes from, as `speed_constants` has it."""
        for name in self.read:
            if constant := CONSTANTS.get(name):
                rows = f", {constant.rows} rows of {constant.sources} sources" if constant.rows else ""
                unit = "" if constant.unit == "×" else f" {constant.unit}"
                yield f"where {name} is {self[name]:g}{unit} ({constant.origin}{rows})"


def _host_words(work: Work, host: HostPart, constants: Values) -> Iterator[str]:
    """How long reading host memory takes at best and at worst."""
    dense, experts = (host.weights_bytes + host.kv_bytes) / 1e9, host.expert_bytes / 1e9
    least, most = _host_seconds(work, constants)
    rate = host.bandwidth_gb_s
    if rate is None:
        fast = f"{digits(dense + experts)} GB ÷ {constants['host bandwidth high']:g} GB/s"
    else:
        fast = _two_reads(dense, constants["host weights high"], experts, constants["host experts high"], rate)
    low = rate or constants["host bandwidth low"]
    slow = _two_reads(dense, constants["host weights low"], experts, constants["host experts low"], low)
    assumed = "" if rate else " (its rate is unknown: two channels of DDR5 are assumed)"
    yield f"host memory at best: {fast} = {least * 1e3:.2f} ms{assumed}"
    yield f"host memory at worst: {slow} = {most * 1e3:.2f} ms"


def _two_reads(dense_gb: float, reached: float, experts_gb: float, reached_experts: float, rate_gb_s: float) -> str:
    parts = [f"{digits(dense_gb)} GB ÷ {rate_gb_s:g} GB/s ÷ {reached:g}"] if dense_gb else []
    parts += [f"{digits(experts_gb)} GB of experts ÷ {rate_gb_s:g} GB/s ÷ {reached_experts:g}"] if experts_gb else []
    return " + ".join(parts)


def _capped_words(rates: Range, bound: float | None) -> str:
    return ", no more than the physical bound" if bound is not None and rates.high >= bound else ""


def _users(count: float) -> str:
    return "one user" if count == 1 else f"{count:.0f} users"


def _thin_for_many(work: Work, constants: Values) -> Iterator[str]:
    if work.users == 1 or work.vllm or work.host:
        return
    measured = _measured_users(work, constants)
    if work.users <= measured:
        yield "several users of llama.cpp at once: two measurements"
    else:
        what = (
            "several users of llama.cpp and experts" if work.experts else f"{_users(work.users)} of llama.cpp at once"
        )
        yield f"{what}: not measured, only {_users(measured)}"


def _thin(work: Work) -> Iterator[str]:
    """Why few or no measurements stand behind a prediction: fewer than three sources, or sources that disagree."""
    chips = work.chips
    tensor = work.width > 1
    if not work.vllm and tensor:
        if work.experts:
            yield "a tensor split of a model with experts: measured on two machines, and lost on one"
        if work.width > 2:
            yield "a tensor split over more than two cards: measured on one machine"
        if work.library != "CUDA":
            yield f"a tensor split with {work.library}: hardly measured"
    if work.vllm and tensor and work.experts:
        yield "vLLM's tensor parallelism with experts: measurements disagree by half"
    if tensor and work.link_gb_s and work.link_gb_s < SLOW_GB_S:
        yield "cards at the same time over a slow link: not measured"
    if work.vllm and len(work.stages) > 1:
        several = ", nor how users spread over its stages" if work.users > 1 else ""
        yield f"vLLM's pipeline: not measured{several}"
    if work.vllm and any(chip.vendor != "nvidia" for chip in chips):
        yield "vLLM on cards that are not NVIDIA's: one source"
    if _are_unequal(work):
        yield "unequal cards at the same time: one measurement"
    if any(chip.vendor not in ("nvidia", "amd") for chip in chips):
        yield "cards that are neither NVIDIA's nor AMD's: one source"
    if not work.vllm and work.library == "Vulkan":
        yield "Vulkan: drivers differ"
    if any(chip.without_tensor_cores for chip in chips):
        yield "cards without tensor cores: two sources"
    if any(chip.memory == "lpddr" for chip in chips):
        yield "memory shared with the processor: one source"
    if work.host:
        yield "layers on the host: its memory decides"
