"""The catalogue of cards: what a card's name says about its memory, speed and links.

`cards.csv` beside this file is the data; its header says where each column comes from.
"""

from __future__ import annotations

import csv
import difflib
import functools
import re
from dataclasses import dataclass
from pathlib import Path

from mgpu.errors import UsageError

MIB = 1024**2

# What NVML reports as reserved lies between 450 MiB (RTX 3090) and 869 MiB (A100) where it was read from
# a real card; any other card is given the middle of the common ones.
TYPICAL_RESERVED_BYTES = 512 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One model of card, as an engine lists it (one die of a card that carries two).

    `total_bytes` is what the driver typically reports, `reserved_bytes` what it keeps of that (0 for AMD and
    Intel, whose totals already leave it out), `marketed_gb` what the box says. `memory` is "gddr", "hbm" or "lpddr"
    (the host's own, shared with the processor). The fp16 rates are dense tensor-core rates, 0.0 where the card has no
    such units; GeForce halves the rate when it accumulates in fp32, as engines do. `nvlink_total_gb_s` and
    `xgmi_total_gb_s` sum all links in both directions.
    """

    vendor: str
    name: str
    marketed_gb: int
    total_bytes: int
    reserved_bytes: int
    memory: str
    bandwidth_gb_s: float
    fp16_tflops: float
    fp16_fp32_accumulate_tflops: float
    fp32_tflops: float
    compute_capability: str | None
    gfx: str | None
    pcie_gen: int
    pcie_lanes: int
    nvlink_version: int | None
    nvlink_total_gb_s: float | None
    xgmi_total_gb_s: float | None
    tdp_w: float
    pci_id: str | None
    notes: str

    @property
    def full_name(self) -> str:
        """The name with its maker's, as drivers report it: "NVIDIA GeForce RTX 4090"."""
        return f"{_MAKERS[self.vendor]} {self.name}"


@functools.cache
def catalogue() -> tuple[Card, ...]:
    """Return every card mgpu knows, in the order of the file (read once)."""
    text = Path(__file__).with_name("cards.csv").read_text(encoding="utf-8")
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return tuple(_card(row) for row in csv.DictReader(lines))


def find_card(text: str) -> Card:
    """Return the card that a person means by `text`: "4090", "rtx4090", "A100-80", "7900xtx", "3060 12gb".

    Letter case, spaces, the maker and series ("GeForce RTX") may be left out, and so may the memory size and
    the form factor where all that is left agrees on the memory: then SXM is meant, because machines named
    by "A100-80" or "H100" in plural are SXM boards (say "A100 PCIe 80" for the other).
    Raises UsageError, offering the nearest names, when no card or several different ones fit.
    """
    found = _matches(text)
    if len(found) == 1:
        return found[0]
    shown = text if len(text) <= 40 else text[:40] + "…"
    if found:
        names = _listed([card.name for card in found])
        hint = f'say which, for example --machine "2x{found[-1].name}"'
        raise UsageError(f"the card '{shown}' is ambiguous: it could be {names}", code="card-ambiguous", hint=hint)
    raise UsageError(
        f"the card '{shown}' is not in the catalogue; the nearest names are {_listed(_nearest_names(text))}",
        code="card-unknown",
        hint="or save a snapshot where the card is, with: mgpu gpus --json > machine.json",
    )


def card_for_name(name: str, total_bytes: int | None = None) -> Card | None:
    """Return the catalogue's card for a name that a driver or an engine reports, or None.

    A name that lists alternatives ("AMD Instinct MI60 / MI50") is settled by the nearest `total_bytes`.
    Mobile chips ("… Laptop GPU") share a name but no figures with the desktop card, and give None.
    """
    alternatives = [found[0] for part in name.split(" / ") if len(found := _matches(part)) == 1]
    if len(alternatives) < 2 or total_bytes is None:
        return alternatives[0] if alternatives else None
    return min(alternatives, key=lambda card: abs(card.total_bytes - total_bytes))


_MAKERS = {"nvidia": "NVIDIA", "amd": "AMD", "intel": "Intel"}

# Words that say nothing about which card it is.
_NOISE = frozenset(
    {
        "nvidia",
        "amd",
        "intel",
        "geforce",
        "radeon",
        "generation",
        "graphics",
        "edition",
        "workstation",
        "gpu",
        "card",
        "r",
        "tm",
        "hbm3",
    }
)

# Words that people leave out, but that count when they are there: "6000" may be any RTX 6000.
_OPTIONAL = frozenset(
    {"rtx", "gtx", "rx", "arc", "quadro", "tesla", "instinct", "pro", "ai", "ada", "blackwell", "sxm", "pcie"}
)


@dataclass(frozen=True, slots=True)
class _Words:
    """A name taken apart: the words that make the model, the optional words, and the sizes."""

    model: frozenset[str]
    optional: frozenset[str]
    sizes: frozenset[int]


def _matches(text: str) -> list[Card]:
    """Cards that `text` may mean; exactly one where the rules of `find_card` settle it."""
    if len(text) > 100:
        return []
    asked = _words(text)
    fitting = [card for card in catalogue() if _fits(asked, card)]
    if asked.sizes:
        # "3060-8GB" is no 3060 Ti, though that has 8 GB and the 3060 in the catalogue has not.
        any_size = _Words(model=asked.model, optional=asked.optional, sizes=frozenset())
        named = [card for card in catalogue() if _fits(any_size, card) and _card_words(card).model <= _all_words(asked)]
        fitting = [card for card in fitting if not named or card in named]
    exact = [card for card in fitting if _card_words(card).model <= _all_words(asked)]
    fitting = exact or fitting
    if len({card.total_bytes for card in fitting}) == 1:
        sxm = [card for card in fitting if "sxm" in _card_words(card).optional]
        if len(sxm) == 1:
            return sxm
    return fitting


def _fits(asked: _Words, card: Card) -> bool:
    words = _card_words(card)
    numbered = {word for word in words.model if any(map(str.isdigit, word))} or words.model
    unknown = asked.model - words.model
    sizes = asked.sizes | {int(word) for word in unknown if word.isdecimal() and len(word) < 5}
    return (
        bool(numbered <= asked.model)
        and all(word.isdecimal() for word in unknown)
        and asked.optional <= words.optional | words.model
        and sizes <= {card.marketed_gb}
    )


def _all_words(words: _Words) -> frozenset[str]:
    return words.model | words.optional


@functools.cache
def _card_words(card: Card) -> _Words:
    return _words(card.name)


def _words(text: str) -> _Words:
    """Take a name apart: "RTX4070TiSuper 16GB" is the model {4070, ti, super}, optional {rtx}, sizes {16}."""
    text = re.sub(r"\(.*?\)", " ", text.lower()).replace("max-q", "maxq")
    text = re.sub(r"(\d+)\s*gi?b\b", r" \1gb ", text)
    words: set[str] = set()
    sizes: set[int] = set()
    for word in re.findall(r"[a-z0-9]+", text):
        if size := re.fullmatch(r"([0-9]{1,4})gb?", word):
            sizes.add(int(size[1]))
            continue
        series = re.fullmatch(r"(rtx|gtx|rx|pro|titan)([a-z]?\d.*|rtx|xp|v)", word)
        for part in series.groups() if series else (word,):
            words.update(_split_suffix(part))
    words = {"sxm" if re.fullmatch(r"sxm\d?", word) else word for word in words} - _NOISE
    # In "TITAN RTX" and "TITAN V" nothing but the series names the model.
    optional = words & _OPTIONAL if words - _OPTIONAL - {"titan"} else set[str]()
    return _Words(frozenset(words - optional), frozenset(optional), frozenset(sizes))


def _split_suffix(word: str) -> list[str]:
    """Split what is written together: "4070tisuper" into 4070, ti, super; "a100sxm" into a100, sxm."""
    parts = re.fullmatch(r"([a-z]{0,2}\d{2,4}?)(ti)?(super|xtx|xt|gre|d|ada|sxm\d?|pcie|nvl|hx)?", word)
    return [part for part in parts.groups() if part] if parts else [word]


def _nearest_names(text: str) -> list[str]:
    """Four names near `text`; compared without the series words that would make every name alike."""
    short = {" ".join(sorted(_all_words(_card_words(card)) - _OPTIONAL)): card.name for card in catalogue()}
    asked = " ".join(sorted(_all_words(_words(text[:40])) - _OPTIONAL))
    near = [short[key] for key in difflib.get_close_matches(asked, short, n=4, cutoff=0.5)]
    return near or ["GeForce RTX 3090", "GeForce RTX 4090", "GeForce RTX 5090", "Radeon RX 7900 XTX"]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _card(row: dict[str, str]) -> Card:
    total_mib = int(row["total_mib"] or int(row["marketed_gb"]) * 1024)
    reserved = int(row["reserved_mib"]) * MIB if row["reserved_mib"] else TYPICAL_RESERVED_BYTES
    return Card(
        vendor=row["vendor"],
        name=row["name"],
        marketed_gb=int(row["marketed_gb"]),
        total_bytes=total_mib * MIB,
        reserved_bytes=reserved if row["vendor"] == "nvidia" else 0,
        memory=row["memory"],
        bandwidth_gb_s=float(row["bandwidth_gb_s"]),
        fp16_tflops=float(row["fp16_tflops"]),
        fp16_fp32_accumulate_tflops=float(row["fp16_fp32_accumulate_tflops"]),
        fp32_tflops=float(row["fp32_tflops"]),
        compute_capability=row["compute_capability"] or None,
        gfx=row["gfx"] or None,
        pcie_gen=int(row["pcie_gen"]),
        pcie_lanes=int(row["pcie_lanes"]),
        nvlink_version=int(row["nvlink_version"]) if row["nvlink_version"] else None,
        nvlink_total_gb_s=_float_or_none(row["nvlink_total_gb_s"]),
        xgmi_total_gb_s=_float_or_none(row["xgmi_total_gb_s"]),
        tdp_w=float(row["tdp_w"]),
        pci_id=row["pci_id"] or None,
        notes=row["notes"],
    )


def _float_or_none(text: str) -> float | None:
    return float(text) if text else None
