"""Machines that are not here: from an expression such as "2x4090+4080", or from a snapshot file."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from mgpu.errors import UsageError
from mgpu.machine.cards import Card, find_card
from mgpu.machine.snapshot import Driver, Gpu, Host, Link, Machine, PcieLink, machine_from_json, to_json
from mgpu.units import GIB

MAX_CARDS = 64
MAX_FILE_BYTES = 8 * 1024**2


def simulate(expression_or_path: str) -> Machine:
    """Return the machine that `--machine` asks for, with source "simulated".

    An expression names cards and counts: "2x4090", "4090+4080", '3x"RTX 3090"'; "none" or "cpu" is a machine
    without cards; "2x4090+ram64" has 64 GiB of host memory to spare. Free memory is what the driver leaves of an idle
    card (`Card.reserved_bytes`); what an
    expression does not say (host, bus, links between PCIe cards) is unknown. A value with a slash or a dot
    is a snapshot file: a machine as JSON, bare or inside the envelope that mgpu prints.
    Devices get the names that engines would give them (CUDA0, ROCm0, Vulkan0) where none are recorded.
    Raises UsageError for anything else, naming the file and the value in it that is wrong.
    """
    text = expression_or_path.strip()
    machine = _read_snapshot(text) if _looks_like_file(text) else _parse(text)
    return dataclasses.replace(machine, source="simulated", gpus=_with_engine_devices(machine.gpus))


def _looks_like_file(text: str) -> bool:
    return "/" in text or "." in text  # no card has either in its name


_TERM = re.compile(
    r"""(?: (?P<count>[-+]?\d+) \s* [xX×*] (?!\s*tx?$) \s* )? (?P<quote>["']?) (?P<card>.*) (?P=quote)""",
    re.X,
)


_RAM = re.compile(r"ram\s*(?P<gib>[1-9]\d{0,4})\s*(?:g|gb|gib)?", re.IGNORECASE)


def _parse(text: str) -> Machine:
    cards: list[Card] = []
    ram_bytes = None
    terms = [term.strip() for term in text.split("+")]
    memory = [found for term in terms if (found := _RAM.fullmatch(term))]
    if memory and len(terms) > 1:
        ram_bytes = int(memory[-1]["gib"]) * GIB
        terms = [term for term in terms if not _RAM.fullmatch(term)]
    if [term.lower() for term in terms] not in (["none"], ["cpu"]):
        for term in terms:
            if term.lower().startswith("ram") and not _RAM.fullmatch(term):
                raise UsageError(
                    f"{term[:40]!r} in --machine is no size of host memory, which is told in whole GiB",
                    hint="for example --machine 2x4090+ram64",
                )
            cards += _parse_term(term, text)
            if len(cards) > MAX_CARDS:
                raise _too_many()
    return Machine(
        captured_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        source="simulated",
        driver=Driver() if any(card.vendor == "nvidia" for card in cards) else None,
        host=Host(ram_bytes=ram_bytes, ram_available_bytes=ram_bytes),
        gpus=tuple(_gpu(index, card) for index, card in enumerate(cards)),
        links=_switched_links(cards),
    )


def _parse_term(term: str, text: str) -> list[Card]:
    if (whole := _whole_name(term)) is not None:  # "7900XTX" is no 7900 cards of "TX"
        return [whole]
    if re.search(r",|[xX×*]\s*\d{1,2}$|^\d{1,2}\s+\S", term):
        _suggest(term, text)
    parts = _TERM.fullmatch(term)
    if not parts or not parts["card"].strip():
        raise UsageError(
            f"--machine {_shown(text)} is not a machine: a card's name is missing",
            hint="name cards and how many, as in --machine 2x3090+4090, or give a snapshot file",
        )
    card, digits = find_card(parts["card"].strip()), parts["count"] or "1"
    if len(digits) > 6:
        raise _too_many()
    if (count := int(digits)) < 1:
        raise UsageError(
            f"--machine {_shown(text)} asks for {count} cards: a count is at least 1",
            hint="for a machine without a card: --machine none",
        )
    if count > MAX_CARDS:
        raise _too_many()
    return [card] * count


def _whole_name(term: str) -> Card | None:
    try:
        return find_card(term.strip("\"'"))
    except UsageError:
        return None


def _suggest(term: str, text: str) -> None:
    """Raise UsageError where a machine is written in another way whose meaning is plain."""
    behind = re.fullmatch(r"(?P<card>.+?)\s*[xX×*]\s*(?P<count>\d{1,2})", term)
    found = behind or re.fullmatch(r"(?P<count>\d{1,2})\s+(?P<card>[^xX×*].*)", term)
    meant = f"{found['count']}x{found['card']}" if found else "+".join(map(str.strip, term.split(",")))
    if all(_whole_name(re.sub(r"^\d+x", "", part)) for part in meant.split("+")):
        shown = f'"{meant}"' if " " in meant else meant
        raise UsageError(f"--machine {_shown(text)} is not a machine", hint=f"did you mean --machine {shown}?")


def _too_many() -> UsageError:
    return UsageError(
        f"a simulated machine has at most {MAX_CARDS} cards", hint="ask for fewer, as in --machine 8xH100"
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _gpu(index: int, card: Card) -> Gpu:
    return Gpu(
        index=index,
        vendor=card.vendor,
        name=card.full_name,
        total_bytes=card.total_bytes,
        free_bytes=card.total_bytes - card.reserved_bytes,
        compute_capability=card.compute_capability,
        gfx=card.gfx,
        bandwidth_gb_s=card.bandwidth_gb_s,
        pcie=PcieLink(gen_max=card.pcie_gen, width_max=card.pcie_lanes),
        power_limit_w=card.tdp_w,
    )


def _switched_links(cards: list[Card]) -> tuple[Link, ...]:
    """SXM boards since the A100 join all cards through NVSwitch; how other cards are wired is unknown."""
    return tuple(
        Link(a=a, b=b, kind="NVLink", p2p=True)
        for (a, one), (b, other) in itertools.combinations(enumerate(cards), 2)
        if one is other and "SXM" in one.name and (one.nvlink_version or 0) >= 3
    )


_ENGINE_NAMES = {"nvidia": "CUDA", "amd": "ROCm", "intel": "Vulkan"}


def _with_engine_devices(gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    if any(gpu.engine_devices for gpu in gpus):
        return gpus
    counters = {name: itertools.count() for name in _ENGINE_NAMES.values()}
    named = []
    for gpu in gpus:
        name = _ENGINE_NAMES.get(gpu.vendor)
        if name and gpu.problem is None:
            gpu = dataclasses.replace(gpu, engine_devices=(f"{name}{next(counters[name])}",))
        named.append(gpu)
    return tuple(named)


def _read_snapshot(text: str) -> Machine:
    try:
        path = Path(text).expanduser()
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _bad_file(text, f"cannot be read: {reason}") from None
    if len(content) > MAX_FILE_BYTES:
        raise _bad_file(text, f"is larger than {MAX_FILE_BYTES // 1024**2} MiB, so it is no snapshot")
    try:
        data = json.loads(content.decode("utf-8-sig"), parse_constant=_refuse_constant)
        return _checked(machine_from_json(_machine_of_envelope(data)))
    except UnicodeDecodeError:
        raise _bad_file(text, "is not text in UTF-8") from None
    except json.JSONDecodeError as error:
        raise _bad_file(text, f"is not JSON: line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise _bad_file(text, "is nested too deeply to be a snapshot") from None
    except ValueError as error:
        raise _bad_file(text, str(error)) from None


def _bad_file(name: str, reason: str) -> UsageError:
    shown = name if len(name) <= 200 else name[:200] + "…"
    return UsageError(
        f"the snapshot {shown!r}: {reason}",
        code="snapshot-invalid",
        hint="make one on the machine in question: mgpu gpus --json > machine.json",
    )


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a number of JSON")


def _machine_of_envelope(data: object) -> object:
    """The machine inside what `mgpu gpus --json` (data) or `mgpu plan --json` (data.machine) printed."""
    if isinstance(data, dict) and "schema" in data:
        data = data.get("data")
        if isinstance(data, dict) and isinstance(data.get("machine"), dict):
            return data["machine"]
    return data


def _checked(machine: Machine) -> Machine:
    """Refuse what has the right types but is no machine. Raises ValueError naming the value."""
    for path, value in _leaves(to_json(machine), "snapshot"):
        if isinstance(value, str) and not value.isprintable():
            raise ValueError(f"{path}: holds characters that cannot be printed")
        lowest = 0 if path.endswith(("_bytes", "_w", "_gb_s", ".index")) else -_OUT_OF_RANGE
        if isinstance(value, int | float) and not lowest <= value < _OUT_OF_RANGE:
            raise ValueError(f"{path}: out of range")
    if len(machine.gpus) > MAX_CARDS:
        raise ValueError(f"snapshot.gpus: {len(machine.gpus)} cards, at most {MAX_CARDS} are planned for")
    indices = [gpu.index for gpu in machine.gpus]
    for position, gpu in enumerate(machine.gpus):
        path = f"snapshot.gpus[{position}]"
        if gpu.index in indices[:position]:
            raise ValueError(f"{path}.index: another card has {gpu.index}")
        if gpu.free_bytes is not None and gpu.total_bytes is not None and gpu.free_bytes > gpu.total_bytes:
            raise ValueError(f"{path}.free_bytes: {gpu.free_bytes} is more than total_bytes")
    for position, link in enumerate(machine.links):
        if link.a not in indices or link.b not in indices or link.a == link.b:
            raise ValueError(f"snapshot.links[{position}]: gpu{link.a} and gpu{link.b} are not two cards here")
    return machine


_OUT_OF_RANGE = 2**60


def _leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _leaves(entry, f"{path}.{key}")
    elif isinstance(value, list):
        for position, entry in enumerate(value):
            yield from _leaves(entry, f"{path}[{position}]")
    else:
        yield path, value
