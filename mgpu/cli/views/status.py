"""Lines of a run: plan, fetch, load, check, status."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgpu.backends.samples import Sample
from mgpu.cli.views.ways import shape_words, split_words
from mgpu.cli.views.words import card_name, cell_gib, sizes
from mgpu.planning.choice import TITLES
from mgpu.planning.speed import Range, interval
from mgpu.units import GIB, gib, seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mgpu.backends.backend import DeviceMemory
    from mgpu.backends.samples import Rates
    from mgpu.models.fetch import Progress
    from mgpu.planning.candidates import Candidate, PlannedDevice
    from mgpu.running.client import Answer, Canary
    from mgpu.running.instance import Instance
    from mgpu.running.start import Loading

_SPARKS = "▁▂▃▄▅▆▇█"
_MB = 1_000_000
# The engine may place a buffer a little differently; more than this is worth a word.
_TOLERATED_EXCESS = 0.03
# Below this part of the KV cache that was planned, fewer users find room than were promised.
_LEAST_KV_SHARE = 0.9
# A shorter answer is no measurement of the speed.
_MEASURED_TOKENS = 64


def home_path(path: Path) -> str:
    """Return a path with the home folder as `~`."""
    try:
        return f"~/{path.relative_to(Path.home())}"
    except (ValueError, RuntimeError):  # somewhere else, or a user without a home
        return str(path)


def printable(text: str) -> str:
    """Return a model's text without the control characters that would command the terminal."""
    return "".join(c for c in text if c in "\n\t" or (c.isprintable() or ord(c) > 0xA0))


def plan_line(candidate: Candidate) -> str:
    """Return the plan in one line: engine, quantisation, split, memory by card."""
    used = _used(candidate)
    if not used:
        where = f"{split_words(candidate)} · {gib(candidate.host.total_bytes)} of RAM"
    else:
        shape = shape_words(candidate)
        cards = ", ".join(f"gpu{device.gpu}" for device in used)
        where = f"{shape} over {cards}" if shape else cards
        where += " · " + " + ".join(f"{device.total_bytes / GIB:.2f}" for device in used) + " GiB"
        if candidate.host.layers:
            where += f", {candidate.host.layers} layers in RAM ({gib(candidate.host.total_bytes)})"
        elif candidate.host.expert_layers:
            where += f", experts of {candidate.host.expert_layers} layers in RAM ({gib(candidate.host.total_bytes)})"
    users = "" if candidate.parallel == 1 else f" × {candidate.parallel} users"
    expected = expected_words(candidate)
    speed = f" · {expected} tokens/s expected" if expected else ""
    what = f"{candidate.quant or '?'} · {candidate.ctx_tokens} tokens{users}"
    return f"{TITLES[candidate.backend]} · {what} · {where}{speed}"


def expected_words(candidate: Candidate) -> str | None:
    """Return how many tokens per second one user may expect, from a full context to an empty one: "16-22"; None where
    nothing is predicted."""
    speed = candidate.speed
    if speed.decode_tok_s is None or speed.decode_start_tok_s is None:
        return None
    whole = Range(low=speed.decode_tok_s.low, likely=speed.decode_tok_s.likely, high=speed.decode_start_tok_s.high)
    return interval(whole, speed.bound_tok_s)


def fetch_line(progress: Progress, rate_bytes_s: float | None, width: int) -> RenderableType:
    """Return one line of a download: bar, per cent, bytes, rate, time left."""
    done, total = progress.done_bytes, progress.total_bytes
    words = sizes(done) if not total else f"{done / total:.0%}  {sizes(done, total)}"
    if rate_bytes_s and progress.stage == "downloading":
        words += f"  {sizes(round(rate_bytes_s))}/s"
        if total and done < total:
            words += f"  {_clock((total - done) / rate_bytes_s)} left"
    label = "fetch" if progress.stage == "downloading" else progress.stage
    return _bar_line(f"{label:<8} {progress.name}", done / total if total else None, words, width)


def load_line(loading: Loading, file_bytes: int | None, width: int) -> RenderableType:
    """Return one line of loading: the phase, and how much of the file is in memory, where that can be told."""
    if file_bytes is None:
        name, _, percent = loading.phase.partition(", ")  # vLLM counts its files itself
        fraction = int(percent.split()[0]) / 100 if percent else None
        return _bar_line(f"{'load':<8} {name}", fraction, f"{percent}  {seconds(loading.seconds)}".strip(), width)
    mapped = min(loading.mapped_bytes, file_bytes)
    words = f"{mapped / _MB:.0f} of {file_bytes / _MB:.0f} MB in memory  {seconds(loading.seconds)}"
    return _bar_line(f"{'load':<8} {loading.phase}", mapped / file_bytes if file_bytes else None, words, width)


def phase_line(instance: Instance, since_s: float, width: int) -> RenderableType:
    """Return one line of a start that another process does: the phase, and how long it may still take."""
    left = f"about {seconds(instance.remaining_s)} left, " if instance.remaining_s else ""
    name, _, percent = (instance.phase or str(instance.state)).partition(", ")
    number = percent.split(" ")[0]
    fraction = int(number) / 100 if number.isdecimal() else None
    return _bar_line(f"{'load':<8} {name}", fraction, f"{percent}  {left}{seconds(since_s)}".strip(), width)


def check_line(candidate: Candidate, memory: Mapping[int, DeviceMemory], canary: Canary) -> str:
    """Return what the cards really hold, and how the engine answered."""
    held = [
        f"gpu{device.gpu} {actual.total_bytes / GIB:.2f} of {(device.total_bytes - device.runtime_bytes) / GIB:.2f}"
        for device, actual in _actual(candidate, memory)
        if actual
    ]
    cards = f"{', '.join(held)} GiB planned · " if held else ""
    rate = f" · {canary.generation_tok_s:.1f} tokens/s" if canary.generation_tok_s else ""
    if rate and (expected := expected_words(candidate)):
        rate += f" in its first words, {expected} expected"
    return f"{cards}answered in {seconds(canary.seconds)}{rate}"


def complaints(
    candidate: Candidate, memory: Mapping[int, DeviceMemory], canary: Canary, *, tells_every_card: bool
) -> list[str]:
    """Return what is not as planned: a card that holds nothing, one that holds more or has
    less room for the KV cache, an answer like garbage.

    Where the engine does not tell of every card, one it is silent about is no complaint.
    """
    found = []
    for device, actual in _actual(candidate, memory):
        name = f"gpu{device.gpu} ({device.device})"
        if actual is None or not actual.weights_bytes:
            if tells_every_card:
                found.append(f"{name} was planned to hold layers and holds none: the model runs elsewhere")
            continue
        planned = device.total_bytes - device.runtime_bytes
        if actual.total_bytes > planned * (1 + _TOLERATED_EXCESS):
            found.append(f"{name} holds {gib(actual.total_bytes)}, planned were {gib(planned)}")
        room = actual.kv_bytes if candidate.backend == "vllm" else None  # the others take what they are told
        if room is not None and room < device.kv_bytes * _LEAST_KV_SHARE:
            found.append(f"{name} has room for {gib(room)} of KV cache, planned were {gib(device.kv_bytes)}")
    if not canary.text.strip():
        found.append("the first answer was empty")
    elif canary.one_token_repeated:
        found.append(
            f"the first answer repeats one token ({printable(canary.text)[:24]!r}): the results may be garbage"
        )
    return found


def actual_data(candidate: Candidate, memory: Mapping[int, DeviceMemory]) -> list[dict[str, Any]]:
    """Return planned and actual bytes by card, for JSON."""
    return [
        {
            "gpu": device.gpu,
            "uuid": device.uuid,
            "device": device.device,
            "planned_bytes": device.total_bytes - device.runtime_bytes,
            "weights_bytes": actual.weights_bytes if actual else None,
            "kv_bytes": actual.kv_bytes if actual else None,
            "compute_bytes": actual.compute_bytes if actual else None,
            "actual_bytes": actual.total_bytes if actual else None,
        }
        for device, actual in _actual(candidate, memory)
    ]


def answer_line(answer: Answer, candidate: Candidate | None = None) -> str:
    """Return how fast an answer came and, of one that is long enough to be a measurement, what was expected."""
    parts = []
    if answer.generated_tokens is not None and answer.generation_tok_s:
        expected = expected_words(candidate) if candidate and answer.generated_tokens >= _MEASURED_TOKENS else None
        beside = f" ({expected} expected)" if expected else ""
        parts.append(f"{answer.generated_tokens} tokens at {answer.generation_tok_s:.1f} tokens/s{beside}")
    if answer.prompt_tokens and answer.prompt_tok_s:
        parts.append(f"prompt {answer.prompt_tokens} tokens at {answer.prompt_tok_s:.0f} tokens/s")
    if answer.finish_reason == "length":
        parts.append("cut off there: --max-tokens, or the context, was reached")
    return " · ".join(parts) or "the engine counted no tokens"


def status_line(sample: Sample | None, rates: Rates | None, up_s: float) -> str:
    """Return the status in one line of plain words."""
    return "   ".join(status_parts(sample, rates, up_s))


def status_parts(sample: Sample | None, rates: Rates | None, up_s: float) -> list[str]:
    """Return the status in parts: state, requests, rates, KV cache use."""
    if sample is None:
        return [f"degraded {_clock(up_s)}", "the engine does not answer"]
    if sample == Sample(at=sample.at):
        return [f"ready {_clock(up_s)}", "its counters cannot be read"]
    parts = [f"ready {_clock(up_s)}", f"{_count(sample.running)} running, {_count(sample.waiting)} waiting"]
    if rates:
        parts.append(f"{_rate(rates.generation_tok_s)} tok/s")
        parts.append(f"prompt {_rate(rates.prompt_tok_s)} tok/s")
    if sample.kv_used is not None:
        parts.append(f"KV {sample.kv_used:.0%}")
    return parts


def status_lines(
    sample: Sample | None, rates: Rates | None, up_s: float, history: Sequence[float], cards: str, width: int
) -> RenderableType:
    """Return the status as it is redrawn on a terminal: the line with its sparkline, and the cards below."""
    from rich.console import Group
    from rich.text import Text

    style = "green" if sample else "bold red"
    parts = status_parts(sample, rates, up_s)
    spark = f"   {sparkline(history)}" if sample else ""
    if width < len("   ".join(parts)) + len(spark) + 2:  # on two lines, before anything is cut off
        rows = ["   ".join(parts[:2]), "   ".join(parts[2:])]
    else:
        rows = ["   ".join(parts)]
    lines = [Text.assemble(("● ", style), rows[0], no_wrap=True, overflow="ellipsis")]
    lines += [Text(f"  {row}", no_wrap=True, overflow="ellipsis") for row in rows[1:] if row]
    lines[-1].append(spark, style="cyan")
    if cards:
        lines.append(Text(f"  {cards}", style="dim", no_wrap=True, overflow="ellipsis"))
    return Group(*lines)


def status_data(
    sample: Sample | None,
    rates: Rates | None,
    up_s: float,
    candidate: Candidate,
    memory: Mapping[int, DeviceMemory],
) -> dict[str, Any]:
    """Return the status as JSON, with the names of the contract's instance."""
    return {
        "gpus": [
            {"uuid": held["uuid"], "index": held["gpu"], **{k: held[k] for k in ("planned_bytes", "actual_bytes")}}
            for held in actual_data(candidate, memory)
        ],
        "state": "ready" if sample else "degraded",
        "up_seconds": round(up_s, 1),
        "rate": {
            "generation_tok_s": rates.generation_tok_s if rates else None,
            "prompt_tok_s": rates.prompt_tok_s if rates else None,
            "running": sample.running if sample else None,
            "waiting": sample.waiting if sample else None,
            "kv_used": sample.kv_used if sample else None,
        },
    }


def cards_line(candidate: Candidate, memory: Mapping[int, DeviceMemory]) -> str:
    """Return what each card holds of this engine, in one line; empty on the CPU."""
    return "      ".join(
        f"gpu{device.gpu} {card_name(device.name)}  {cell_gib(actual.total_bytes)}/{cell_gib(device.card_bytes, 1)} GiB"
        for device, actual in _actual(candidate, memory)
        if actual
    )


def sparkline(values: Sequence[float]) -> str:
    """Return one block character for each value, scaled to the largest."""
    top = max(values, default=0.0)
    if top <= 0:
        return _SPARKS[0] * len(values)
    return "".join(_SPARKS[min(int(value / top * len(_SPARKS)), len(_SPARKS) - 1)] for value in values)


def _bar_line(label: str, fraction: float | None, words: str, width: int) -> RenderableType:
    from rich.text import Text

    label = label if len(label) + len(words) + 4 <= width else f"{label[: max(8, width - len(words) - 5)]}…"
    room = min(30, width - len(label) - len(words) - 6)
    parts: list[Any] = [label, "  "]
    if fraction is not None and room >= 5:
        filled = round(max(0.0, min(fraction, 1.0)) * room)
        parts += [("━" * filled, "cyan"), ("━" * (room - filled), "dim"), "  "]
    return Text.assemble(*parts, words, no_wrap=True, overflow="ellipsis")


def _used(candidate: Candidate) -> list[PlannedDevice]:
    return [device for device in candidate.devices if not device.idle]


def _actual(
    candidate: Candidate, memory: Mapping[int, DeviceMemory]
) -> Iterator[tuple[PlannedDevice, DeviceMemory | None]]:
    """Each used card with what the engine says it allocated there, None where it says nothing."""
    for index, device in enumerate(candidate.devices):
        if not device.idle:
            yield device, memory.get(index)


def _clock(duration_s: float) -> str:
    minutes, rest = divmod(int(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _count(value: int | None) -> str:
    return "?" if value is None else str(value)


def _rate(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f}"
