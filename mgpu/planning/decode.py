"""The time one token takes, term by term, so that a reader can add it up.

    seconds = weights ÷ rate + layers × launch + layers × reduction + hops × hop + KV cache ÷ rate

Cards that work in turn add their times; of cards that work at the same time the slowest counts. The constants and
where they come from are in `speed_constants`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mgpu.planning.speed_constants import VALUES, Values
from mgpu.planning.work import Chip, Share, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One summand: `what` it is, the sum that gives it (`how`), and its `seconds`."""

    what: str
    how: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.what}: {self.how} = {self.seconds * 1e3:.2f} ms"


def decode_terms(work: Work, constants: Values = VALUES) -> tuple[Term, ...]:
    """Return the summands of one token's time for one user at the depth of `work`, without what is on the host.

    Every card's bandwidth must be known; `bound_seconds` says so.
    """
    terms = [*weight_terms(work, constants), launches(work, constants)]
    if work.width > 1:
        terms.append(reductions(work, constants))
    if len(work.stages) > 1:
        terms.append(hops(work, constants))
    if any(share.kv_bytes for stage in work.stages for share in stage.shares):
        terms += kv_terms(work, constants)
    return tuple(terms)


def decode_seconds(work: Work, constants: Values = VALUES) -> float:
    """Return the sum of `decode_terms`."""
    return sum(term.seconds for term in decode_terms(work, constants))


def bound_seconds(work: Work) -> float | None:
    """Return the least time physics allows for a token at an empty context: the bytes over the bandwidth, cards in
    turn added up. None where a bandwidth is unknown or nothing is read, also of what is on the host."""
    seconds = 0.0
    for stage in work.stages:
        rates = [(share.weights_bytes, share.chip.bandwidth_gb_s) for share in stage.shares]
        if not all(rate for _, rate in rates):
            return None
        seconds += max(read / (rate * 1e9) for read, rate in rates if rate)
    if work.host:
        if not work.host.bandwidth_gb_s:
            return None
        seconds += (work.host.weights_bytes + work.host.expert_bytes) / (work.host.bandwidth_gb_s * 1e9)
    return seconds or None


def weight_terms(work: Work, constants: Values = VALUES, *, read: Callable[[Share], float] | None = None) -> list[Term]:
    """Return the time the weights take, or what `read` says each share reads of them."""
    read = read or _weights
    return [
        _reading("weights", work, shares, constants, read, _weights_rate) for shares in _alike(work, read, constants)
    ]


def kv_terms(work: Work, constants: Values = VALUES, *, users: float = 1) -> list[Term]:
    """Return the time the KV cache of `users` takes."""

    def read(share: Share) -> float:
        return share.kv_bytes * users

    return [
        _reading("KV cache", work, shares, constants, read, _kv_rate)
        for shares in _alike(work, read, constants)
        if any(map(read, shares))
    ]


def launches(work: Work, constants: Values = VALUES) -> Term:
    """Return the time that starting the kernels of all layers takes; the slowest card counts."""
    each = max(_launch_us(work, chip, constants) for chip in work.chips)
    how = f"{work.layers} layers × {each:.4g} µs"
    return Term(what="starting kernels", how=how, seconds=work.layers * each * 1e-6)


def reductions(work: Work, constants: Values = VALUES) -> Term:
    """Return the time the cards of a stage wait for each other in every layer, when little is exchanged."""
    each = _reduction_us(work, constants)
    cut = constants["llama.cpp cut, experts"] if work.experts and not work.vllm else 0
    rounds = math.log2(work.width)
    how = f"{work.layers} layers × ({each:.0f} µs × log2({work.width} cards){f' + {cut:.0f} µs' if cut else ''})"
    return Term(what="adding up between cards", how=how, seconds=work.layers * (each * rounds + cut) * 1e-6)


def hops(work: Work, constants: Values = VALUES) -> Term:
    """Return the time of going from stage to stage, when little is sent."""
    each = constants["hop, before 2025" if work.before_2025 else "hop"]
    count = len(work.stages) - 1
    return Term(what="from card to card", how=f"{count} × {each:.0f} µs", seconds=count * each * 1e-6)


def _weights(share: Share) -> float:
    return share.weights_bytes


def _weights_rate(work: Work, chip: Chip, constants: Values) -> float:
    if work.vllm:
        rate = constants["vLLM weights"] * (constants["vLLM weights, CDNA"] if chip.cdna else 1)
    else:
        rate = constants["llama.cpp weights quantised" if work.quantised else "llama.cpp weights 16-bit"]
        rate *= constants["llama.cpp weights, HBM"] if chip.memory == "hbm" else 1
    return rate * (constants["weights, LPDDR"] if chip.memory == "lpddr" else 1)


def _kv_rate(work: Work, _chip: Chip, constants: Values) -> float:
    if work.vllm:
        return constants["vLLM KV"]
    if work.before_2025 or not work.flash_attention:
        return constants["llama.cpp KV, no flash attention"]
    return constants[f"llama.cpp KV, {work.library if work.library in ('CUDA', 'ROCm') else 'other'}"]


def _launch_us(work: Work, chip: Chip, constants: Values) -> float:
    kind = "experts" if work.experts else "dense"
    if work.vllm:
        return constants[f"vLLM layer {kind}{', CDNA' if chip.cdna else ''}"]
    if chip.vendor == "amd":
        each = constants["llama.cpp layer, AMD"]
    else:
        each = constants[f"llama.cpp layer {kind}"]
        each *= constants["llama.cpp layer, Ada and later"] if chip.modern else 1
        each *= constants["llama.cpp layer, no tensor cores"] if chip.without_tensor_cores else 1
    return each * (constants["llama.cpp layer, before 2025"] if work.before_2025 else 1)


def _reduction_us(work: Work, constants: Values) -> float:
    if work.vllm:
        return constants["vLLM reduction"]
    if work.library == "CUDA":
        return constants["llama.cpp reduction"]
    # Of Intel's cards nobody measured another library: it is not taken to be faster.
    intel = work.library == "SYCL" or any(chip.vendor == "intel" for chip in work.chips)
    return constants["llama.cpp reduction, SYCL" if intel else "llama.cpp reduction, staged"]


def digits(number: float) -> str:
    """Return a number with as many digits as a sum needs: two behind the point, of small ones three that count."""
    return f"{number:.2f}" if number >= 1 else f"{number:.3g}"


_Rate = Callable[[Work, Chip, Values], float]


def _alike(work: Work, read: Callable[[Share], float], constants: Values) -> Iterator[tuple[Share, ...]]:
    """The share that counts of each stage, those of equal cards together: they make one line."""
    groups: dict[Chip, list[Share]] = {}
    for stage in work.stages:
        slowest = max(stage.shares, key=lambda share: read(share) / _usable(work, share.chip, constants))
        groups.setdefault(slowest.chip, []).append(slowest)
    yield from (tuple(shares) for shares in groups.values())


def _usable(work: Work, chip: Chip, constants: Values) -> float:
    return _weights_rate(work, chip, constants) * (chip.bandwidth_gb_s or 0)


def _reading(
    what: str, work: Work, shares: tuple[Share, ...], constants: Values, read: Callable[[Share], float], rate: _Rate
) -> Term:
    """Bytes over bandwidth over what of it is reached, for cards of one kind that work in turn."""
    chip = shares[0].chip
    total = sum(read(share) for share in shares)
    reached = rate(work, chip, constants)
    bandwidth = chip.bandwidth_gb_s or math.nan
    where = f", on each of {work.width} cards" if work.width > 1 else ""
    where += f", {len(shares)} {'stages' if work.width > 1 else 'cards'} in turn" if len(shares) > 1 else ""
    how = f"{digits(total / 1e9)} GB ÷ {bandwidth:.4g} GB/s ÷ {reached:.3g}{where}"
    return Term(what=what, how=how, seconds=total / (bandwidth * 1e9) / reached)
